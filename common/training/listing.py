"""Which image files there are: one scan of a folder, and their names as packed bytes.

A million paths as Python objects take hundreds of megabytes, and a loader's process that reads them copies their pages, for it
counts references in them. Here names are one array of bytes and one of ends, which nobody writes to. Of several ranks the main
one scans; the others receive the arrays.

n names   b bytes of all of them
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.training.distributed import Processes
from common.training.errors import BadInput

_ENDINGS = ", ".join(IMG_EXTENSIONS)


# --- Names -------------------------------------------------------------------------------------------------------


class PackedNames(Sequence[str]):
    """Paths of files, held as bytes of the file system's encoding; any name that a file can have comes back as it was.

    Args:
        data: uint8 [b], the names one behind the other.
        ends: int64 [n], where each ends.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data, self.ends = data, ends

    @classmethod
    def of(cls, paths: Iterable[str | Path]) -> PackedNames:
        """Packs names in the order given."""
        names = [os.fsencode(path) for path in paths]
        ends = np.cumsum(np.fromiter(map(len, names), np.int64, len(names)))
        return cls(np.frombuffer(b"".join(names), np.uint8), ends)

    @classmethod
    def joined(cls, parts: Sequence[PackedNames]) -> PackedNames:
        """All names of the parts, one part behind the other."""
        starts = np.cumsum([0, *(len(part.data) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts[:-1], strict=True)]
        empty = cls.of([])
        return cls(np.concatenate([empty.data, *(part.data for part in parts)]), np.concatenate([empty.ends, *ends]))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # negative ones too; IndexError beyond the ends
        start = self.ends[place - 1] if place else 0
        return os.fsdecode(self.data[start : self.ends[place]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""
        return self.data.nbytes + self.ends.nbytes


# --- What is in a folder -----------------------------------------------------------------------------------------


@dataclass
class ImageFiles:
    """What was found under a folder.

    Attributes:
        folder: that was searched.
        loose: images directly in it, sorted.
        classes: name of each folder in it -> images anywhere under that, sorted.
        others: reason -> how many files were passed over for it; those with an ending of no image by the ending.
        beside: images beside `folder` that were passed over.
        class_folders: folders in and under the classes that hold an image themselves.
    """

    folder: Path
    loose: Sequence[str] = ()
    classes: dict[str, PackedNames] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    beside: int = 0
    class_folders: int = 0

    @property
    def names(self) -> PackedNames:
        """All images: those directly in the folder, then class by class."""
        return PackedNames.joined([PackedNames.of(self.loose), *self.classes.values()])

    def __len__(self) -> int:
        return len(self.loose) + sum(map(len, self.classes.values()))

    def summary(self) -> str:
        """One line: how many images, in how many folders, and what was passed over."""
        folders = self.class_folders + bool(self.loose)
        return f"{counted(len(self), 'image file')} in {counted(folders, 'folder')} under {self.folder}; {self.passed_over()}"

    def passed_over(self) -> str:
        """How many files were passed over, and why."""
        beside = [f"{counted(self.beside, 'image')} beside {self.folder}"] if self.beside else []
        return f"passed over: {', '.join([*described(self.others), *beside]) or 'none'}"


def find_images(root: Path) -> list[Path]:
    """Image files of a folder for training, in the order of their numbers; see :func:`training_files`."""
    return [Path(name) for name in training_files(root).names]


def training_files(root: Path) -> ImageFiles:
    """Image files under `root`/train, or under `root` where there is no such folder.

    Raises:
        BadInput: no such folder, a folder without images, or more images beside the folder train than in it; names it.
    """
    if not root.is_dir():
        raise BadInput(f"--data_path {root}: no such folder")
    train = root / "train"
    files = scan_images(train if train.is_dir() else root)
    if train.is_dir():
        files.beside = sum(is_image(path) for path in root.iterdir())
        if files.beside > len(files):
            raise BadInput(
                f"--data_path {root}: {files.beside} images lie beside the folder train, which holds {len(files)} and "
                f"would be read alone: give the folder train another name to use all, or --data_path {train}"
            )
    if not len(files):
        raise BadInput(f"--data_path {root}: no images in {files.folder} ({files.passed_over()}; images end in {_ENDINGS})")
    return files


def list_for_all(root: Path, processes: Processes | None = None) -> tuple[PackedNames, str]:
    """Names and summary of :func:`training_files`: the main rank scans, and the others receive what it found.

    Raises:
        BadInput: as `training_files`, on all ranks.
    """
    found: list[tuple[PackedNames, str]] = []

    def scan() -> None:
        files = training_files(root)
        found.append((files.names, files.summary()))

    if processes is None or processes.world == 1:
        scan()
        return found[0]
    processes.on_main(scan)
    return share_names(found[0] if processes.is_main else None, processes)


def share_names(found: tuple[PackedNames, str] | None, processes: Processes) -> tuple[PackedNames, str]:
    """What the main rank gives, on every rank: three tensors travel, no pickled object.

    Args:
        found: names and a line; None on the other ranks.
    """
    names, line = found or (PackedNames.of([]), "")
    words = np.frombuffer(os.fsencode(line), np.uint8)
    sizes = _broadcast(torch.tensor([len(names), len(names.data), len(words)]), processes)
    count, length, rest = sizes.tolist()
    ends = torch.from_numpy(names.ends) if processes.is_main else torch.empty(count, dtype=torch.int64)
    text = np.concatenate([names.data, words]) if processes.is_main else np.empty(length + rest, np.uint8)
    ends, data = _broadcast(ends, processes), _broadcast(torch.from_numpy(text), processes).numpy()
    return PackedNames(data[:length].copy(), ends.numpy()), os.fsdecode(data[length:].tobytes())


def _broadcast(value: Tensor, processes: Processes) -> Tensor:
    """The main rank's values, on the CPU."""
    moved = value.to(processes.device)
    processes.share([moved])
    return moved.cpu()


def described(others: Counter[str]) -> list[str]:
    """Files that were passed over, in words; those that are counted by their ending together and last."""
    words = [f"{count} {reason}" for reason, count in sorted(others.items()) if not reason.startswith(".")]
    endings = [(ending, count) for ending, count in others.most_common() if ending.startswith(".")]
    if endings:
        shown = ", ".join(f"{ending} {count}" for ending, count in endings[:5])
        total = sum(count for _, count in endings)
        words.append(f"{total} of other kinds ({shown}{', ...' if len(endings) > 5 else ''})")
    return words


def counted(number: int, what: str) -> str:
    """`3 images`, `1 image`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


# --- The scan ----------------------------------------------------------------------------------------------------


def scan_images(folder: Path) -> ImageFiles:
    """Everything under a folder. Hidden files and folders, and links to folders below the first level, are passed over."""
    files = ImageFiles(folder)
    loose: list[str] = []
    classes: dict[str, PackedNames] = {}
    for entry in _entries(folder, files.others):
        if entry.is_dir():
            found: list[str] = []
            files.class_folders += _scan(entry.path, found, files.others)
            classes[entry.name] = PackedNames.of(_in_order(found))
        else:
            _sort_in(entry, loose, files.others)
    files.loose = _in_order(loose)
    files.classes = dict(sorted(classes.items()))
    return files


def _in_order(paths: list[str]) -> list[str]:
    """Sorted part by part, as Path objects are: a separator comes before all that a name may hold."""
    return sorted(paths, key=lambda path: path.replace(os.sep, "\0"))


def _scan(folder: str, found: list[str], others: Counter[str]) -> int:
    """Adds the images under a folder; how many folders hold one themselves."""
    subfolders, before = [], len(found)
    for entry in _entries(folder, others):
        if not entry.is_dir():
            _sort_in(entry, found, others)
        elif entry.is_symlink():  # may lead in a circle
            others["links to folders"] += 1
        else:
            subfolders.append(entry.path)
    return (len(found) > before) + sum(_scan(path, found, others) for path in subfolders)


def _entries(folder: Path | str, others: Counter[str]) -> list[os.DirEntry[str]]:
    """Visible entries of a folder; the rest is counted."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except OSError:
        others["folders that cannot be read"] += 1
        return []
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    if len(visible) < len(entries):
        others["hidden"] += len(entries) - len(visible)
    return visible


def _sort_in(entry: os.DirEntry[str], found: list[str], others: Counter[str]) -> None:
    """One file: an image, or counted with the reason why it is none."""
    ending = os.path.splitext(entry.name)[1].lower()
    if ending not in IMG_EXTENSIONS:
        others[ending or "without an ending"] += 1
    elif entry.is_file():
        found.append(entry.path)
    else:
        others["links that lead nowhere" if entry.is_symlink() else "that are no plain files"] += 1


def is_image(path: Path) -> bool:
    """Whether it is a file with the name of an image, and not hidden."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and path.is_file()
