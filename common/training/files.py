"""Files that are written whole or not at all, and one line where a disk is full."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from common.training.errors import BadInput

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT))
"""What the system answers where a disk is full, or a quota used up."""


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write; once the block is left it is `path`, and after an error there is nothing of it.

    Raises:
        BadInput: no room for it; what `path` was before it still is.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = find_no_room(error)
        if full is None:
            raise
        raise no_room(path, full.strerror or "no room") from None


def temporary_name(path: Path) -> Path:
    """Where `path` is while it is written."""
    return path.with_name(f".{path.name}.tmp")


def find_no_room(error: BaseException) -> OSError | None:
    """The system's word that there is no room, behind an error: torch.save raises another one over it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in NO_ROOM:
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def no_room(path: Path, reason: str) -> BadInput:
    """The line for a file that could not be written."""
    kept = "; the one that was there before is untouched" if path.exists() else ""
    return BadInput(f"{path}: not written, {reason} ({shown_bytes(free_bytes(path.parent))} free){kept}")


def require_room(path: Path, needed: int) -> None:
    """Raises BadInput, before anything is written, where `needed` bytes are more than the disk of `path` has free.

    A quota, or a disk that others fill in the meantime, is found out by writing only.
    """
    if needed > free_bytes(path.parent):
        raise no_room(path, f"it needs {shown_bytes(needed)}")


def free_bytes(folder: Path) -> int:
    """Room that is free for this user on the disk of a folder."""
    return shutil.disk_usage(folder).free


def shown_bytes(count: int) -> str:
    """For people: "1.5 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.1f} kB"
