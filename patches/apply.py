"""Inserts this project's calls into a clone of an official repository: `python -m patches.apply --help`.

A patch only adds lines. Each of its hunks says "after line a of the official file, insert these lines", so that the
patch files hold no line of the official code. Where a line number alone says where to insert, the file must be the
one that the number was written for: every touched file is compared with the git blob named in upstream.toml.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.training.errors import BadInput, Parser, run_cli

PROGRAM = "patches.apply"
HERE = Path(__file__).parent
HUNK = re.compile(r"@@ -(\d+),0 \+(\d+)(?:,(\d+))? @@")


@dataclass(frozen=True)
class Hunk:
    """Lines to insert after line `after` of the official file (0: before the first)."""

    after: int
    lines: tuple[str, ...]


Patch = dict[str, list[Hunk]]
"""Hunks of each file, top to bottom; paths as in the repository, in the order of the patch."""


@dataclass(frozen=True)
class Upstream:
    """An entry of upstream.toml.

    Attributes:
        name: mae, beit or simmim.
        url, commit, licence: of the official repository.
        folder: where in it the code is.
        blobs: git blob id of every touched file at that commit.
    """

    name: str
    url: str
    commit: str
    licence: str
    folder: str
    blobs: dict[str, str]


# --- Reading -----------------------------------------------------------------------------------------------------


def read_upstream(name: str) -> Upstream:
    """The pinned state of an official repository."""
    entries = tomllib.loads((HERE / "upstream.toml").read_text())
    return Upstream(name=name, **entries[name])


def parse_patch(text: str, source: str) -> Patch:
    """A patch of insertions.

    Raises:
        BadInput: a deletion, a context line, hunks out of order, or anything else that is not an insertion.
    """
    patch: Patch = {}
    hunks: list[Hunk] | None = None
    missing = shift = 0  # lines that the open hunk still lacks; lines inserted so far in this file
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{source}:{number}"
        if missing and line.startswith("+"):
            assert hunks is not None
            hunks[-1] = Hunk(hunks[-1].after, (*hunks[-1].lines, line[1:]))
            missing -= 1
        elif missing:
            raise BadInput(f"{where}: a patch may only insert, and this line does not: {line!r}")
        elif line.startswith("+++ b/"):
            hunks, shift = patch.setdefault(line.removeprefix("+++ b/"), []), 0
            if hunks:
                raise BadInput(f"{where}: the file occurs twice")
        elif header := HUNK.fullmatch(line):
            after, start, missing = int(header[1]), int(header[2]), int(header[3] or 1)
            if hunks is None or start != after + shift + 1 or (hunks and hunks[-1].after >= after):
                raise BadInput(f"{where}: hunk out of order, or its line numbers do not fit those before it: {line!r}")
            hunks.append(Hunk(after, ()))
            shift += missing
        elif hunks is not None and not line.startswith(("diff --git ", "--- a/")):
            raise BadInput(f"{where}: a patch may only insert, and this line does not: {line!r}")
    if missing or not patch or not all(patch.values()):
        raise BadInput(f"{source}: incomplete")
    return patch


def read_patch(upstream: Upstream) -> Patch:
    """The checked patch of an upstream.

    Raises:
        BadInput: see :func:`parse_patch`; or the patch touches other files than upstream.toml pins.
    """
    file = HERE / f"{upstream.name}.patch"
    patch = parse_patch(file.read_text(), file.name)
    if set(patch) != set(upstream.blobs):
        different = sorted(set(patch) ^ set(upstream.blobs))
        raise BadInput(f"{file.name} and upstream.toml do not name the same files: {', '.join(different)}")
    return patch


# --- Text --------------------------------------------------------------------------------------------------------


def insert(original: bytes, hunks: Sequence[Hunk]) -> bytes:
    """The file with the hunks in it.

    Raises:
        ValueError: a hunk lies behind the end of the file.
    """
    lines = original.splitlines(keepends=True)
    for hunk in reversed(hunks):
        if hunk.after > len(lines) or (hunk.after == len(lines) and not original.endswith(b"\n")):
            raise ValueError(f"line {hunk.after} is behind the last complete line")
        lines[hunk.after : hunk.after] = [line.encode() + b"\n" for line in hunk.lines]
    return b"".join(lines)


def blob_id(content: bytes) -> str:
    """The id that git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def render(patch: Patch) -> str:
    """A patch as text, in the form that :func:`parse_patch` reads and `git apply --unidiff-zero` takes."""
    out: list[str] = []
    for path, hunks in patch.items():
        out += [f"diff --git a/{path} b/{path}", f"--- a/{path}", f"+++ b/{path}"]
        shift = 0
        for hunk in hunks:
            size = "" if len(hunk.lines) == 1 else f",{len(hunk.lines)}"
            out += [f"@@ -{hunk.after},0 +{hunk.after + shift + 1}{size} @@", *(f"+{line}" for line in hunk.lines)]
            shift += len(hunk.lines)
    return "\n".join(out) + "\n"


# --- A checkout --------------------------------------------------------------------------------------------------


class Checkout:
    """A clone of an official repository.

    Args:
        path: its root, or the folder of the code in it.

    Raises:
        BadInput: not the root of a git checkout, or not at the pinned commit.
    """

    def __init__(self, path: Path, upstream: Upstream) -> None:
        self.upstream, self.root = upstream, path
        if not path.is_dir():
            raise BadInput(f"{path} is not a folder")
        self.root = Path(self._git("rev-parse", "--show-toplevel", wrong=f"{path} is not a git checkout").strip())
        if path.resolve() not in (self.root.resolve(), (self.root / upstream.folder).resolve()):
            raise BadInput(f"{path} is a folder inside the git checkout {self.root}: give its root")
        commit = self._git("rev-parse", "HEAD", wrong=f"{path} is a git checkout without a commit").strip()
        if commit != upstream.commit:
            raise BadInput(
                f"{path} is at commit {commit[:10]}, the {upstream.name} patch is for {upstream.commit[:10]} "
                f"(git -C {path} checkout {upstream.commit})"
            )

    def _git(self, *arguments: str, wrong: str = "git failed") -> str:
        """Output of a git command. GIT_* of the caller (a hook, say) must not point it to another repository."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        try:
            done = subprocess.run(
                ["git", "-C", str(self.root), *arguments], capture_output=True, text=True, env=clean, check=False
            )
        except FileNotFoundError:
            raise BadInput("git is not installed") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[0]
            raise BadInput(f"{wrong} ({reason})")
        return done.stdout

    def read(self, path: str) -> bytes:
        """Content of a file of the working tree."""
        try:
            return (self.root / path).read_bytes()
        except OSError as error:
            raise BadInput(f"{self.root / path}: {error.strerror}") from None

    def modified(self) -> list[str]:
        """Tracked files that differ from the commit, in the index or the working tree."""
        lines = self._git("status", "--porcelain", "--untracked-files=no", "--no-renames").splitlines()
        return [line[3:] for line in lines]

    def originals(self, patch: Patch) -> dict[str, bytes]:
        """Contents of the touched files, each the pinned one.

        Raises:
            BadInput: a file that is not the pinned one, or has our lines already.
        """
        contents = {path: self.read(path) for path in patch}
        if all(self.is_patched(path, patch[path], content) for path, content in contents.items()):
            raise BadInput(f"the {self.upstream.name} patch is already applied to {self.root}")
        for path, content in contents.items():
            if blob_id(content) != self.upstream.blobs[path]:
                raise BadInput(
                    f"{self.root / path} is blob {blob_id(content)[:10]}, not {self.upstream.blobs[path][:10]}: "
                    f"it was changed (git -C {self.root} checkout {path})"
                )
        return contents

    def is_patched(self, path: str, hunks: Sequence[Hunk], content: bytes) -> bool:
        """Whether a file is the pinned one with our lines in it, and nothing else."""
        plain = remove(content, hunks)
        return plain is not None and blob_id(plain) == self.upstream.blobs[path]

    def refuse_dirty(self, others_may_differ: bool) -> None:
        """Raises BadInput where tracked files differ; untouched ones only unless `others_may_differ`."""
        dirty = [] if others_may_differ else self.modified()
        if dirty:
            more = f" and {len(dirty) - 1} more" if len(dirty) > 1 else ""
            raise BadInput(f"{self.root} has changes in {dirty[0]}{more} (--force-dirty leaves other files alone)")


def remove(patched: bytes, hunks: Sequence[Hunk]) -> bytes | None:
    """The file without the hunks; None where they are not in it."""
    lines = patched.splitlines(keepends=True)
    for hunk in hunks:
        inserted = [line.encode() + b"\n" for line in hunk.lines]
        if lines[hunk.after : hunk.after + len(inserted)] != inserted:
            return None
        del lines[hunk.after : hunk.after + len(inserted)]
    return b"".join(lines)


def write_all(root: Path, contents: dict[str, bytes]) -> None:
    """Writes all files or none: every content goes to a file beside its target first, and a failure undoes the rest."""
    waiting: dict[Path, Path] = {}
    done: dict[Path, bytes] = {}
    try:
        for path, content in contents.items():
            target = root / path
            waiting[target] = target.with_name(f".{target.name}.evolved-mask")
            waiting[target].write_bytes(content)
            shutil.copymode(target, waiting[target])
        for target, temporary in waiting.items():
            before = target.read_bytes()
            os.replace(temporary, target)
            done[target] = before
    except BaseException as error:
        for target, before in done.items():
            target.write_bytes(before)
        if isinstance(error, OSError):
            raise BadInput(f"nothing was changed: {error}") from None
        raise
    finally:
        for temporary in waiting.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


# --- The command -------------------------------------------------------------------------------------------------


def apply(checkout: Checkout, patch: Patch, *, force_dirty: bool = False, check: bool = False) -> str:
    """Inserts the patch (or, with `check`, only finds out whether it would go in) and says what was done."""
    originals = checkout.originals(patch)
    checkout.refuse_dirty(force_dirty)
    try:
        patched = {path: insert(content, patch[path]) for path, content in originals.items()}
    except ValueError as error:
        raise BadInput(f"{checkout.upstream.name}.patch does not fit its own blobs: {error}") from None
    count = f"{sum(len(hunk.lines) for hunks in patch.values() for hunk in hunks)} lines in {len(patch)} files"
    if check:
        return f"{checkout.upstream.name}.patch can be applied to {checkout.root}: {count}"
    write_all(checkout.root, patched)
    return f"applied {checkout.upstream.name}.patch to {checkout.root}: {count}; see it with git -C {checkout.root} diff"


def reverse(checkout: Checkout, patch: Patch) -> str:
    """Takes the inserted lines out again.

    Raises:
        BadInput: a touched file is not the pinned one with our lines, so that taking them out would lose work.
    """
    contents = {path: checkout.read(path) for path in patch}
    for path, content in contents.items():
        if not checkout.is_patched(path, patch[path], content):
            plain = blob_id(content) == checkout.upstream.blobs[path]
            state = "does not have the patch" if plain else "was changed besides the patch"
            raise BadInput(f"{checkout.root / path} {state}: nothing was reversed")
    write_all(checkout.root, {path: remove(content, patch[path]) or b"" for path, content in contents.items()})
    return f"reversed {checkout.upstream.name}.patch in {checkout.root}"


def export(checkout: Checkout) -> str:
    """The changes of a working tree as a patch of insertions, for a move to another commit (README.md)."""
    diff = checkout._git("diff", "--unified=0", "--no-color", "--no-ext-diff", "--no-renames", "HEAD")
    lines = (re.sub(r"^(@@ .*? @@).*", r"\1", line) for line in diff.splitlines() if not line.startswith("index "))
    return render(parse_patch("\n".join(lines), "git diff"))


def main(argv: Sequence[str]) -> None:
    """Parses the command line and does what it says."""
    args = _parser().parse_args(argv)
    upstream = read_upstream(args.upstream)
    if args.show:
        print((HERE / f"{upstream.name}.patch").read_text(), end="")
        return
    if args.path is None:
        raise BadInput("PATH is missing: the root of a clone of " + upstream.url)
    checkout = Checkout(Path(args.path), upstream)
    if args.export:
        print(export(checkout), end="")
        return
    patch = read_patch(upstream)
    if args.reverse:
        print(reverse(checkout, patch))
    else:
        print(apply(checkout, patch, force_dirty=args.force_dirty, check=args.check))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("upstream", choices=("mae", "beit", "simmim"), help="which official repository")
    parser.add_argument("path", metavar="PATH", nargs="?", help="root of its clone (for beit: of unilm, or its folder beit)")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="say whether the patch can be applied, and change nothing")
    action.add_argument("--reverse", action="store_true", help="take the inserted lines out again")
    action.add_argument("--show", action="store_true", help="print the patch")
    action.add_argument("--export", action="store_true", help="print the changes in PATH as a patch file")
    parser.add_argument("--force-dirty", action="store_true", help="allow changes in files that the patch does not touch")
    return parser


if __name__ == "__main__":
    run_cli(PROGRAM, main)
