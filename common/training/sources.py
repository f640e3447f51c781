"""Where images come from: an ImageNet-style folder, a flat folder, torchvision's sets, or the embedded photographs.

A source has a length, loads image i as RGB, and names it for error messages.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from common.training.config import ImageSetConfig
from common.training.decode import decode_file
from common.training.distributed import Processes
from common.training.errors import BadInput
from common.training.listing import PackedNames, counted, list_for_all

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
        in_memory: images are not read from files each time.
    """

    summary: str
    in_memory: bool

    def load(self, index: int) -> Image.Image:
        """Image `index` as RGB. Raises OSError or ValueError if it cannot be read."""
        ...

    def decode(self, index: int) -> Tensor | Image.Image:
        """Image `index` as uint8 [3, H, W]; as :meth:`load` gives it where torchvision.io cannot decode it as PIL does."""
        ...

    def name(self, index: int) -> str:
        """File or record of image `index`."""
        ...


class FileSource:
    """Image files, in the order given."""

    in_memory = False

    def __init__(self, paths: Iterable[str | Path], summary: str = "") -> None:
        self.names = paths if isinstance(paths, PackedNames) else PackedNames.of(paths)
        self.summary = summary or counted(len(self.names), "image file")

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        with Image.open(self.name(index)) as image:
            return image.convert("RGB")

    def decode(self, index: int) -> Tensor | Image.Image:
        pixels = decode_file(self.name(index))
        return self.load(index) if pixels is None else pixels

    def name(self, index: int) -> str:
        name: str = self.names[index]
        return name


class PhotoSource(FileSource):
    """The photographs inside the scikit-image and scikit-learn wheels, at most 512 px long, kept in memory."""

    in_memory = True

    def __init__(self) -> None:
        paths = [_photo_path(package, name) for package, names in PHOTOS.items() for name in names]
        super().__init__(paths, f"{len(paths)} photographs inside the scikit-image and scikit-learn wheels")
        self._cached = lru_cache(maxsize=None)(self._shrunk)

    def load(self, index: int) -> Image.Image:
        return self._cached(index)

    def decode(self, index: int) -> Tensor:
        return pil_to_tensor(self.load(index))

    def _shrunk(self, index: int) -> Image.Image:
        image = super().load(index)
        image.thumbnail((_LONGEST_PHOTO_SIDE, _LONGEST_PHOTO_SIDE))
        return image


class ArraySource:
    """Images in one uint8 array, [n, H, W] grey or [n, H, W, 3] colour."""

    in_memory = True

    def __init__(self, images: np.ndarray, label: str) -> None:
        self.images, self.label = images, label
        self.summary = f"{len(images)} images of {label}"

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def decode(self, index: int) -> Tensor:
        return pil_to_tensor(self.load(index))

    def name(self, index: int) -> str:
        return f"{self.label}[{index}]"


def open_source(config: ImageSetConfig, processes: Processes | None = None) -> ImageSource:
    """The source that --dataset and --data_path name.

    Args:
        processes: of a run; the main one lists the files of a folder for all.

    Raises:
        BadInput: nothing there, or not in the expected layout; names the place.
    """
    kind = config.dataset
    if kind == "auto":
        kind = "folder" if config.data_path else "photos"
    if kind == "photos":
        return PhotoSource()
    if kind == "folder":
        return FileSource(*list_for_all(Path(config.data_path), processes))
    return ArraySource(_torchvision_images(kind, config.data_path, config.download), kind)


def count_source(config: ImageSetConfig) -> int:
    """Images that --dataset and --data_path name. Raises BadInput as :func:`open_source` does."""
    return len(open_source(config))


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
