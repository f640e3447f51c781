"""Where images come from: an ImageNet-style folder, a flat folder, torchvision's sets, or the embedded photographs.

A source has a length, loads image i as RGB, and names it for error messages.
"""

from __future__ import annotations

import gzip
import os
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.training.config import ImageSetConfig
from common.training.errors import BadInput

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its four files."""

PHOTOS = {
    "skimage": (
        "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png",
        "motorcycle_right.png", "camera.png", "coins.png", "brick.png", "grass.png", "gravel.png",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}  # fmt: skip
_PHOTO_FOLDERS = {"skimage": "data", "sklearn": "datasets/images"}
_LONGEST_PHOTO_SIDE = 512
_ENDINGS = ", ".join(IMG_EXTENSIONS)


class Source(Protocol):
    """Samples by number: images, or images with their labels."""

    def __len__(self) -> int: ...

    def load(self, index: int) -> Any:
        """Sample `index`. Raises OSError or ValueError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """File or record of sample `index`."""
        ...


class ImageSource(Source, Protocol):
    """Images by number.

    Attributes:
        summary: one line: how many, from where, and what was passed over.
    """

    summary: str

    def load(self, index: int) -> Image.Image:
        """Image `index` as RGB. Raises OSError or ValueError if it cannot be read."""
        ...

    def name(self, index: int) -> str:
        """File or record of image `index`."""
        ...


class FileSource:
    """Image files, in the order given."""

    def __init__(self, paths: list[Path], summary: str = "") -> None:
        self.paths, self.summary = paths, summary or _count(len(paths), "image file")

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, index: int) -> Image.Image:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB")

    def name(self, index: int) -> str:
        return str(self.paths[index])


class PhotoSource(FileSource):
    """The photographs inside the scikit-image and scikit-learn wheels, at most 512 px long, kept in memory."""

    def __init__(self) -> None:
        paths = [_photo_path(package, name) for package, names in PHOTOS.items() for name in names]
        super().__init__(paths, f"{len(paths)} photographs inside the scikit-image and scikit-learn wheels")
        self._cached = lru_cache(maxsize=None)(self._shrunk)

    def load(self, index: int) -> Image.Image:
        return self._cached(index)

    def _shrunk(self, index: int) -> Image.Image:
        image = super().load(index)
        image.thumbnail((_LONGEST_PHOTO_SIDE, _LONGEST_PHOTO_SIDE))
        return image


class ArraySource:
    """Images in one uint8 array, [n, H, W] grey or [n, H, W, 3] colour."""

    def __init__(self, images: np.ndarray, label: str) -> None:
        self.images, self.label = images, label
        self.summary = f"{len(images)} images of {label}"

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"


def open_source(config: ImageSetConfig) -> ImageSource:
    """The source that --dataset and --data_path name.

    Raises:
        BadInput: nothing there, or not in the expected layout; names the place.
    """
    kind = config.dataset
    if kind == "auto":
        kind = "folder" if config.data_path else "photos"
    if kind == "photos":
        return PhotoSource()
    if kind == "folder":
        files = training_files(Path(config.data_path))
        return FileSource(files.images, files.summary())
    return ArraySource(_torchvision_images(kind, config.data_path, config.download), kind)


def count_source(config: ImageSetConfig) -> int:
    """Images that --dataset and --data_path name. Raises BadInput as :func:`open_source` does."""
    return len(open_source(config))


def find_images(root: Path) -> list[Path]:
    """Image files of a folder for training, in the order of their numbers; see :func:`training_files`."""
    return training_files(root).images


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
        if files.beside > len(files.images):
            raise BadInput(
                f"--data_path {root}: {files.beside} images lie beside the folder train, which holds {len(files.images)} and "
                f"would be read alone: give the folder train another name to use all, or --data_path {train}"
            )
    if not files.images:
        raise BadInput(f"--data_path {root}: no images in {files.folder} ({files.passed_over()}; images end in {_ENDINGS})")
    return files


@dataclass
class ImageFiles:
    """What was found under a folder.

    Attributes:
        folder: that was searched.
        loose: images directly in it, sorted.
        classes: name of each folder in it -> images anywhere under that, sorted.
        others: reason -> how many files were passed over for it; those with an ending of no image by the ending.
        beside: images beside `folder` that were passed over.
    """

    folder: Path
    loose: list[Path] = field(default_factory=list)
    classes: dict[str, list[Path]] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    beside: int = 0

    @property
    def images(self) -> list[Path]:
        """All images: those directly in the folder, then class by class."""
        return [*self.loose, *(path for paths in self.classes.values() for path in paths)]

    def summary(self) -> str:
        """One line: how many images, in how many folders, and what was passed over."""
        images = self.images
        folders = len({path.parent for path in images})
        return f"{_count(len(images), 'image file')} in {_count(folders, 'folder')} under {self.folder}; {self.passed_over()}"

    def passed_over(self) -> str:
        """How many files were passed over, and why."""
        beside = [f"{_count(self.beside, 'image')} beside {self.folder}"] if self.beside else []
        return f"passed over: {', '.join([*described(self.others), *beside]) or 'none'}"


def described(others: Counter[str]) -> list[str]:
    """Files that were passed over, in words; those that are counted by their ending together and last."""
    words = [f"{count} {reason}" for reason, count in sorted(others.items()) if not reason.startswith(".")]
    endings = [(ending, count) for ending, count in others.most_common() if ending.startswith(".")]
    if endings:
        shown = ", ".join(f"{ending} {count}" for ending, count in endings[:5])
        total = sum(count for _, count in endings)
        words.append(f"{total} of other kinds ({shown}{', ...' if len(endings) > 5 else ''})")
    return words


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def scan_images(folder: Path) -> ImageFiles:
    """Everything under a folder. Hidden files and folders, and links to folders below the first level, are passed over."""
    files = ImageFiles(folder)
    for entry in _entries(folder, files.others):
        if entry.is_dir():
            found: list[Path] = []
            _scan(entry.path, found, files.others)
            files.classes[entry.name] = sorted(found)
        else:
            _sort_in(entry, files.loose, files.others)
    files.loose.sort()
    files.classes = dict(sorted(files.classes.items()))
    return files


def _scan(folder: str, found: list[Path], others: Counter[str]) -> None:
    for entry in _entries(folder, others):
        if not entry.is_dir():
            _sort_in(entry, found, others)
        elif entry.is_symlink():  # may lead in a circle
            others["links to folders"] += 1
        else:
            _scan(entry.path, found, others)


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


def _sort_in(entry: os.DirEntry[str], found: list[Path], others: Counter[str]) -> None:
    """One file: an image, or counted with the reason why it is none."""
    ending = os.path.splitext(entry.name)[1].lower()
    if ending not in IMG_EXTENSIONS:
        others[ending or "without an ending"] += 1
    elif entry.is_file():
        found.append(Path(entry.path))
    else:
        others["links that lead nowhere" if entry.is_symlink() else "that are no plain files"] += 1


def is_image(path: Path) -> bool:
    """Whether it is a file with the name of an image, and not hidden."""
    return path.suffix.lower() in IMG_EXTENSIONS and not path.name.startswith(".") and path.is_file()


def _photo_path(package: str, name: str) -> Path:
    spec = find_spec(package)
    path = Path(spec.origin).parent / _PHOTO_FOLDERS[package] / name if spec and spec.origin else None
    if path is None or not path.is_file():
        raise BadInput(
            f"--dataset photos needs the photograph {name} of {package}: "
            "pip install -r requirements-demo.txt, or give --data_path"
        )
    return path


def _torchvision_images(kind: str, data_path: str, download: bool) -> np.ndarray:
    """Training images of a named set: uint8 [n, H, W(, 3)]."""
    if kind == "fashion-mnist" and not download:
        folder = _idx_folder(Path(data_path) if data_path else DEBIAN_FASHION_MNIST)
        if folder:
            return read_idx_images(folder)
    try:
        if kind == "stl10":
            return datasets.STL10(data_path, split="train+unlabeled", download=download).data.transpose(0, 2, 3, 1)
        if kind == "fashion-mnist":
            return datasets.FashionMNIST(data_path or ".", train=True, download=download).data.numpy()
        maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
        return maker(data_path, train=True, download=download).data
    except (RuntimeError, OSError) as error:
        hint = " (or install Debian's dataset-fashion-mnist)" if kind == "fashion-mnist" else ""
        reason = str(error).splitlines()[0]
        raise BadInput(
            f"--dataset {kind}: cannot be read from --data_path {data_path!r}{hint}: {reason}; --download fetches it"
        ) from None


def _idx_folder(folder: Path) -> Path | None:
    """`folder` if it holds the gzipped training images as Debian's package ships them."""
    return folder if (folder / "train-images-idx3-ubyte.gz").is_file() else None


def read_idx_images(folder: Path) -> np.ndarray:
    """Training images of an MNIST-like set: uint8 [n, H, W]."""
    return read_idx(folder / "train-images-idx3-ubyte.gz")


def read_idx(path: Path) -> np.ndarray:
    """A gzipped file in the IDX format of MNIST: uint8 [n, H, W] of images, [n] of labels.

    The header is big-endian int32: 0x0800 plus the number of dimensions, then the length of each.

    Raises:
        BadInput: not such a file, or not of the length that its header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise BadInput(f"{path}: {error}") from None
    dimensions = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    lengths = np.frombuffer(raw[4 : 4 + 4 * dimensions], dtype=">i4").astype(np.int64)
    first = 4 + 4 * dimensions
    if dimensions not in (1, 3) or len(lengths) != dimensions or len(raw) != first + int(np.prod(lengths)):
        raise BadInput(f"{path}: not an IDX file of bytes, or cut short")
    return np.frombuffer(raw, dtype=np.uint8, offset=first).reshape(lengths)
