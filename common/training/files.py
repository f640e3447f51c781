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


class NoRoom(BadInput):
    """A disk is full, or a quota used up."""


@contextmanager
def written_whole(path: Path, previous: Path | None = None) -> Iterator[IO[bytes]]:
    """A file to write; once the block is left it is `path`, on the disk and not in a cache, and after an error there is nothing
    of it.

    Args:
        previous: where the file that `path` was before is kept, in the place of what was kept there. Without hard links, which
            some file systems lack, it is not kept: at no moment is there no `path`.

    Raises:
        NoRoom: what `path` was before it still is.
    """
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = find_no_room(error)
        if full is None:
            raise
        raise no_room(path, full.strerror or "no room") from None


def _keep(path: Path, previous: Path) -> None:
    """The file `path` under the name `previous` too."""
    link = temporary_name(previous)
    link.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.link(path, link)
        os.replace(link, previous)


def _sync_folder(folder: Path) -> None:
    """New names in a folder outlive a loss of power; a system that cannot say so is left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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


def no_room(path: Path, reason: str) -> NoRoom:
    """The line for a file that could not be written."""
    kept = "; the one that was there before is untouched" if path.exists() else ""
    return NoRoom(f"{path}: not written, {reason} ({shown_bytes(free_bytes(path.parent))} free){kept}")


def require_room(path: Path, needed: int) -> None:
    """Raises NoRoom, before anything is written, where `needed` bytes are more than the disk of `path` has free.

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
