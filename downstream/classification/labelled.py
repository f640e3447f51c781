"""Labelled images of a training or a validation set, and how they are transformed for classification.

Layouts: ImageNet folders (`train/<class>/*`, `val/<class>/*`), torchvision's named sets, Debian's Fashion-MNIST.

B images   C classes
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from common.training.config import ImageSetConfig
from common.training.data import IMAGENET_MEAN, IMAGENET_STD, Transform
from common.training.errors import BadInput
from common.training.listing import scan_images
from common.training.sources import DEBIAN_FASHION_MNIST, ArraySource, FileSource, ImageSource, read_idx

FASHION_CLASSES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class LabelledImages:
    """Images with their classes.

    Args:
        images: the images.
        labels: class of each, 0..C-1.
        classes: names of the classes.
    """

    def __init__(self, images: ImageSource, labels: list[int], classes: list[str]) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> tuple[Any, int]:
        """(image, class)."""
        return self.images.load(index), self.labels[index]

    def name(self, index: int) -> str:
        return self.images.name(index)

    @property
    def summary(self) -> str:
        """One line for people: see :class:`common.training.sources.ImageSource`."""
        return f"{self.images.summary}; {len(self.classes)} classes"


class LabelledSubset:
    """Some samples of a set, in the order given."""

    def __init__(self, source: LabelledImages, indices: list[int]) -> None:
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> tuple[Any, int]:
        """(image, class)."""
        return self.source.load(self.indices[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])


def draw_subset(source: LabelledImages, count: int, seed: int) -> LabelledImages | LabelledSubset:
    """`count` samples drawn without replacement, the same number of each class up to one; 0: all of them.

    Raises:
        BadInput: more than there are.
    """
    if count == 0:
        return source
    if count > len(source):
        raise BadInput(f"--subset {count}: there are {len(source)} training images")
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor(source.labels)[order]
    by_class, sizes = labels.argsort(stable=True), labels.bincount()
    turn = torch.empty_like(order)  # how many of the class came before, in the shuffled order
    turn[by_class] = torch.arange(len(source)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    return LabelledSubset(source, order[turn.argsort(stable=True)[:count]].sort().values.tolist())


def open_labelled(config: ImageSetConfig, train: bool) -> LabelledImages:
    """The training or the validation set that --dataset and --data_path name.

    Raises:
        BadInput: not there, or without labels; names the place.
    """
    kind = config.dataset
    if kind == "auto":
        kind = "folder"
    if kind == "photos":
        raise BadInput("--dataset photos has no labels; give --data_path, or a named set")
    if kind == "folder":
        return _folder(config, train)
    images, labels, classes = _named_set(kind, config, train)
    if len(images) != len(labels):
        raise BadInput(f"--dataset {kind}: {len(images)} images, but {len(labels)} labels in --data_path {config.data_path!r}")
    return LabelledImages(ArraySource(images, kind), [int(label) for label in labels], classes)


def count_labelled(config: Any) -> int:
    """Training images of fine-tuning and of linear probes, as many as --subset leaves. Raises BadInput: see `open_labelled`."""
    images = len(open_labelled(config, train=True))
    return min(images, config.subset) if config.subset else images


def same_classes(train: LabelledImages, val: LabelledImages, data_path: str) -> None:
    """Raises BadInput unless both sets name the same classes in the same order."""
    differ = sorted(set(train.classes) ^ set(val.classes))
    if train.classes != val.classes:
        raise BadInput(f"--data_path {data_path}: train and val have different classes: {', '.join(differ[:8])}")


def _folder(config: ImageSetConfig, train: bool) -> LabelledImages:
    if not config.data_path:
        raise BadInput("--data_path is needed: a folder with train/<class>/ and val/<class>/")
    folder = Path(config.data_path) / ("train" if train else "val")
    if not folder.is_dir():
        raise BadInput(f"--data_path {config.data_path}: no folder {folder} (expected train/<class>/ and val/<class>/)")
    files = scan_images(folder)
    if files.loose:
        files.others["outside class folders"] += len(files.loose)
        files.loose = ()
    if not files.classes:
        raise BadInput(f"--data_path {config.data_path}: no class folders in {folder} (expected {folder.name}/<class>/*)")
    if not len(files):
        raise BadInput(f"--data_path {config.data_path}: no images in the class folders of {folder} ({files.passed_over()})")
    labels = [label for label, paths in enumerate(files.classes.values()) for _ in paths]
    return LabelledImages(FileSource(files.names, files.summary()), labels, list(files.classes))


def _named_set(kind: str, config: ImageSetConfig, train: bool) -> tuple[np.ndarray, Any, list[str]]:
    """Images uint8 [n, H, W(, 3)], labels, names."""
    root, download = config.data_path, config.download
    if kind == "fashion-mnist" and not download and (folder := _debian_folder(root)):
        part = "train" if train else "t10k"
        return (
            read_idx(folder / f"{part}-images-idx3-ubyte.gz"),
            read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
            [*FASHION_CLASSES],
        )
    try:
        if kind == "stl10":
            stl = datasets.STL10(root, split="train" if train else "test", download=download)
            return stl.data.transpose(0, 2, 3, 1), stl.labels, list(stl.classes)
        if kind == "fashion-mnist":
            fashion = datasets.FashionMNIST(root or ".", train=train, download=download)
            return fashion.data.numpy(), fashion.targets.tolist(), [*FASHION_CLASSES]
        maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
        cifar = maker(root, train=train, download=download)
        return cifar.data, cifar.targets, list(cifar.classes)
    except (RuntimeError, OSError) as error:
        hint = " (or install Debian's dataset-fashion-mnist)" if kind == "fashion-mnist" else ""
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BadInput(
            f"--dataset {kind}: cannot be read from --data_path {root!r}{hint}: {reason}; --download fetches it"
        ) from None


def _debian_folder(root: str) -> Path | None:
    folder = Path(root) if root else DEBIAN_FASHION_MNIST
    return folder if (folder / "train-images-idx3-ubyte.gz").is_file() else None


# --- transforms: (image, class) -> (tensor [3, height, width], int64 scalar) ---


class WithLabel:
    """Applies an image transform and keeps the class beside it."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, sample: tuple[Any, int]) -> tuple[Tensor, Tensor]:
        image, label = sample
        return self.transform(image), torch.tensor(label)


def augmentation(config: Any) -> Transform:
    """Random resized crop, flip, RandAugment or colour jitter, normalisation, random erasing.

    RandAugment is timm's, whose magnitudes vary (`rand-m9-mstd0.5-inc1`), as in the fine-tuning of BEiT, MAE and SimMIM:
    it turns and shears with the interpolation of the crop. Rectangles of noise are erased as in timm's mode `pixel`.
    """
    interpolation = InterpolationMode(config.interpolation)
    steps: list[Any] = [transforms.RandomResizedCrop(config.image_size, scale=config.crop_scale, interpolation=interpolation)]
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip())
    if config.auto_augment:
        steps.append(_rand_augment(config))
    elif config.color_jitter:
        steps.append(transforms.ColorJitter(*[config.color_jitter] * 3))
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if config.random_erasing:
        steps.append(transforms.RandomErasing(config.random_erasing, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"))
    return WithLabel(transforms.Compose(steps))


def _rand_augment(config: Any) -> Transform:
    from timm.data import auto_augment
    from timm.data.auto_augment import rand_augment_transform

    fill = tuple(round(255 * value) for value in IMAGENET_MEAN)
    resample = Image.Resampling.BICUBIC if config.interpolation == "bicubic" else Image.Resampling.BILINEAR
    settings = {"translate_const": int(min(config.image_size) * 0.45), "img_mean": fill, "interpolation": resample}
    transform = rand_augment_transform(config.auto_augment, settings)
    for op in transform.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterized
    return transform


def posterized(image: Image.Image, bits: int, **settings: Any) -> Image.Image:
    """The image with the upper `bits` of each channel: all of them from 8 up, none (black) at 0, timm's strongest.

    Pillow 13 refuses 0 bits, which a magnitude of 10 asks for: one image in 44 that draws this operation at 9 +- 0.5.
    """
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def is_rand_augment(words: str) -> bool:
    """Whether timm reads every word of it; its own reader passes over words that it does not know."""
    return re.fullmatch(r"rand(-(m|n|inc)\d+|-mstd\d+(\.\d+)?|-w0)*", words) is not None


class ResizeToCover:
    """Resizes an image so that its middle of `size` has `share` of the side that binds.

    The shorter side becomes floor(side / share) for square sizes, as in torchvision's Resize and the official evaluations.

    Args:
        size: (height, width) of the crop that follows.
        share: in (0, 1].
    """

    def __init__(self, size: tuple[int, int], share: float, interpolation: InterpolationMode) -> None:
        self.size, self.share, self.interpolation = size, share, interpolation

    def __call__(self, image: Any) -> Any:
        (height, width), (high, wide) = self.size, (image.height, image.width)
        if height * wide >= width * high:
            side = int(height / self.share)
            size = (side, side * wide // high)
        else:
            side = int(width / self.share)
            size = (side * high // wide, side)
        return transforms.functional.resize(image, list(size), self.interpolation)


def middle(config: Any) -> Transform:
    """The middle of an image, after :class:`ResizeToCover`; normalised."""
    steps = [
        ResizeToCover(config.image_size, config.crop_pct, InterpolationMode(config.interpolation)),
        transforms.CenterCrop(config.image_size),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ]
    return WithLabel(transforms.Compose(steps))
