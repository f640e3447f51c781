"""apply.py on a small git repository with files of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from common.training.errors import run_cli
from patches import apply

SCRIPT = "one = 1\ntwo = 2\nthree = 3\n"
HELPER = "def help():\n    return 0"  # no newline at the end
PATCH = """diff --git a/code/helper.py b/code/helper.py
--- a/code/helper.py
+++ b/code/helper.py
@@ -0,0 +1,2 @@
+import ours
+
@@ -1,0 +4 @@
+    ours.call()
diff --git a/code/script.py b/code/script.py
--- a/code/script.py
+++ b/code/script.py
@@ -2,0 +3 @@
+ours = 2.5
@@ -3,0 +5 @@
+ours = 3.5
"""
PATCHED_SCRIPT = "one = 1\ntwo = 2\nours = 2.5\nthree = 3\nours = 3.5\n"
PATCHED_HELPER = "import ours\n\ndef help():\n    ours.call()\n    return 0"


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository at its pinned commit; patch and pins beside it take the place of the real ones."""
    root = tmp_path / "clone"
    (root / "code").mkdir(parents=True)
    (root / "code" / "script.py").write_text(SCRIPT)
    (root / "code" / "helper.py").write_text(HELPER)
    (root / "other.py").write_text("other = 0\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "Theirs")
    pins = tmp_path / "pins"
    pins.mkdir()
    blobs = "\n".join(f'"{path}" = "{git(root, "rev-parse", f"HEAD:{path}")}"' for path in ("code/helper.py", "code/script.py"))
    (pins / "upstream.toml").write_text(
        f'[mae]\nurl = "https://github.com/theirs/code"\ncommit = "{git(root, "rev-parse", "HEAD")}"\n'
        f'licence = "theirs"\nfolder = "code"\n[mae.blobs]\n{blobs}\n'
    )
    (pins / "mae.patch").write_text(PATCH)
    monkeypatch.setattr(apply, "HERE", pins)
    return root


@pytest.fixture
def refused(clone: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command, which must refuse: one line, exit code 2, and not a byte changed. Returns the line."""

    def run(*arguments: str) -> str:
        before = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts}
        with pytest.raises(SystemExit) as stopped:
            run_cli("patches.apply", apply.main, arguments)
        assert stopped.value.code == 2
        after = {path: path.read_bytes() for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts}
        assert after == before
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def files(clone: Path) -> tuple[str, str]:
    return (clone / "code" / "script.py").read_text(), (clone / "code" / "helper.py").read_text()


@pytest.mark.parametrize("folder", [".", "code"])
def test_applies_at_the_root_or_at_the_folder_of_the_code(clone: Path, folder: str) -> None:
    apply.main(["mae", str(clone / folder)])
    assert files(clone) == (PATCHED_SCRIPT, PATCHED_HELPER)
    assert {line.split("\t")[1] for line in git(clone, "diff", "--numstat").splitlines()} == {"0"}
    assert git(clone, "status", "--porcelain", "--untracked-files=all").split() == ["M", "code/helper.py", "M", "code/script.py"]


def test_git_applies_it_to_the_same_bytes(clone: Path) -> None:
    git(clone, "apply", "--unidiff-zero", str(apply.HERE / "mae.patch"))
    assert files(clone) == (PATCHED_SCRIPT, PATCHED_HELPER)


def test_export_gives_the_patch_back(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply.main(["mae", str(clone)])
    capsys.readouterr()
    apply.main(["mae", str(clone), "--export"])
    assert capsys.readouterr().out == PATCH


def test_export_refuses_what_is_not_an_insertion(clone: Path, refused: Callable[..., str]) -> None:
    (clone / "code" / "script.py").write_text("one = 1\nthree = 3\n")
    assert "may only insert" in refused("mae", str(clone), "--export")


def test_check_changes_nothing(clone: Path) -> None:
    apply.main(["mae", str(clone), "--check"])
    assert files(clone) == (SCRIPT, HELPER)


def test_reverse_restores_every_byte_and_mode(clone: Path) -> None:
    (clone / "code" / "script.py").chmod(0o755)
    apply.main(["mae", str(clone), "--force-dirty"])
    assert (clone / "code" / "script.py").stat().st_mode & 0o777 == 0o755
    apply.main(["mae", str(clone), "--reverse"])
    assert files(clone) == (SCRIPT, HELPER)
    assert (clone / "code" / "script.py").stat().st_mode & 0o777 == 0o755


def test_show_needs_no_clone(clone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apply.main(["mae", "--show"])
    assert capsys.readouterr().out == PATCH


def test_refuses_what_is_not_a_checkout(clone: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "plain").mkdir()
    assert "is not a git checkout" in refused("mae", str(tmp_path / "plain"))
    assert "is not a folder" in refused("mae", str(tmp_path / "absent"))
    assert "PATH is missing" in refused("mae")


def test_refuses_a_folder_inside(clone: Path, refused: Callable[..., str]) -> None:
    (clone / "docs").mkdir()
    assert "give its root" in refused("mae", str(clone / "docs"))


def test_refuses_another_commit(clone: Path, refused: Callable[..., str]) -> None:
    git(clone, "commit", "--quiet", "--allow-empty", "--message", "Later")
    assert f"is at commit {git(clone, 'rev-parse', 'HEAD')[:10]}" in refused("mae", str(clone))


@pytest.mark.parametrize("force", [[], ["--force-dirty"]])
def test_refuses_a_touched_file_that_differs(clone: Path, refused: Callable[..., str], force: list[str]) -> None:
    (clone / "code" / "script.py").write_text(SCRIPT + "four = 4\n")
    assert "script.py is blob" in refused("mae", str(clone), *force)


def test_refuses_a_missing_file(clone: Path, refused: Callable[..., str]) -> None:
    (clone / "code" / "script.py").unlink()
    assert "No such file" in refused("mae", str(clone))


def test_refuses_a_second_time(clone: Path, refused: Callable[..., str]) -> None:
    apply.main(["mae", str(clone)])
    assert "already applied" in refused("mae", str(clone))
    assert "already applied" in refused("mae", str(clone), "--check")


def test_refuses_a_dirty_tree_unless_told_to_leave_it_alone(clone: Path, refused: Callable[..., str]) -> None:
    (clone / "other.py").write_text("other = 1\n")
    (clone / "untracked.py").write_text("")  # outputs of earlier runs do not count
    assert "has changes in other.py" in refused("mae", str(clone))
    apply.main(["mae", str(clone), "--force-dirty"])
    assert files(clone) == (PATCHED_SCRIPT, PATCHED_HELPER)
    assert (clone / "other.py").read_text() == "other = 1\n"


def test_refuses_to_reverse_what_it_did_not_write(clone: Path, refused: Callable[..., str]) -> None:
    assert "does not have the patch" in refused("mae", str(clone), "--reverse")
    apply.main(["mae", str(clone)])
    (clone / "code" / "script.py").write_text(PATCHED_SCRIPT + "# a note of the user's\n")
    assert "was changed besides the patch" in refused("mae", str(clone), "--reverse")


@pytest.mark.parametrize("bad", ["@@ -2 +2 @@\n-two = 2\n+two = 3\n", "@@ -1,2 +1,3 @@\n one = 1\n+mine = 1\n two = 2\n"])
def test_refuses_a_patch_with_a_deletion_or_context(clone: Path, refused: Callable[..., str], bad: str) -> None:
    head = PATCH.partition("@@ -2,0 +3 @@")[0]
    (apply.HERE / "mae.patch").write_text(head + bad)
    assert "may only insert" in refused("mae", str(clone))


def test_refuses_a_patch_of_unpinned_files(clone: Path, refused: Callable[..., str]) -> None:
    (apply.HERE / "mae.patch").write_text(PATCH.replace("code/script.py", "other.py"))
    assert "do not name the same files" in refused("mae", str(clone))


def test_refuses_a_hunk_behind_the_end(clone: Path, refused: Callable[..., str]) -> None:
    """A file's last line without newline has no place after it."""
    (apply.HERE / "mae.patch").write_text(PATCH.replace("@@ -1,0 +4 @@", "@@ -2,0 +5 @@"))
    assert "does not fit" in refused("mae", str(clone))


def test_a_failure_in_the_middle_leaves_nothing(
    clone: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second file cannot be put in place: the first one is put back."""
    replace, calls = apply.os.replace, []

    def failing(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(apply.os, "replace", failing)
    assert "nothing was changed" in refused("mae", str(clone))
    assert len(calls) == 2
    assert files(clone) == (SCRIPT, HELPER)


def test_a_git_environment_of_the_caller_does_not_mislead(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a hook of another repository."""
    monkeypatch.setenv("GIT_DIR", str(clone.parent / "elsewhere"))
    apply.main(["mae", str(clone), "--check"])


def test_unknown_upstream_is_one_line(refused: Callable[..., str]) -> None:
    assert "invalid choice: 'ijepa'" in refused("ijepa", ".")
