"""Images with a class for every pixel, in ADE20K's layout, and transforms that move both alike.

    ROOT/images/{training,validation}/NAME.jpg
    ROOT/annotations/{training,validation}/NAME.png     8 bits, one channel: 0 or 255 unlabelled, 1..C classes
    ROOT/classes.txt                                    optional: a line `number<TAB>name` for each of 1..C

In the program classes are 0..C-1 and unlabelled pixels 255 (what mmsegmentation calls reduce_zero_label).

C classes   H, W height and width of an image in pixels
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from common.training.data import IMAGENET_MEAN, IMAGENET_STD, Batch, RefusedSample
from common.training.errors import BadInput
from common.training.listing import described
from downstream.confusion import IGNORED

SPLITS = ("training", "validation")
MOST_CLASSES = 254
"""0 and 255 of the 8 bits mean unlabelled."""

ADE20K_CLASSES = 150
LONGEST_SIDE = 4
"""Of a resized training image, in shorter sides of the crop: ADE20K's 2048 for a crop of 512."""

_IMAGES, _ANNOTATIONS = (".jpg", ".jpeg", ".png"), ".png"
_CROP_ATTEMPTS = 10

AnnotatedImage = tuple[Image.Image, np.ndarray]


class SegmentationSource:
    """One split of a folder in ADE20K's layout; `load` gives the image as RGB, and uint8 labels [H, W] of 0..C-1 or 255.

    Attributes:
        summary: one line: how many images there are, and which files were passed over and why.

    Raises:
        BadInput: folders missing or empty, or images and annotations that do not belong together; names them.
    """

    def __init__(self, root: Path, split: str, classes: int) -> None:
        others = Counter[str]()
        images = _files(root, root / "images" / split, _IMAGES, others)
        annotations = _files(root, root / "annotations" / split, (_ANNOTATIONS,), others)
        unannotated = [path for stem, path in images.items() if stem not in annotations]
        orphaned = [path for stem, path in annotations.items() if stem not in images]
        if unannotated:
            raise BadInput(
                f"--data_path {root}: {len(unannotated)} images of {split} without annotation, such as {unannotated[0]}"
            )
        if orphaned:
            raise BadInput(f"--data_path {root}: {len(orphaned)} annotations of {split} without image, such as {orphaned[0]}")
        self.classes = classes
        self.pairs = [(images[stem], annotations[stem]) for stem in images]
        self.summary = (
            f"{split}: {len(self.pairs)} images with annotations; passed over: {', '.join(described(others)) or 'none'}"
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return str(self.pairs[index][0])

    def load(self, index: int) -> AnnotatedImage:
        """Sample `index`. Raises OSError or ValueError if a file cannot be read or does not fit; names it."""
        place, annotation = self.pairs[index]
        with Image.open(place) as image:
            picture = image.convert("RGB")
        labels = read_labels(annotation, self.classes)
        if labels.shape != (picture.height, picture.width):
            size = f"{labels.shape[1]}x{labels.shape[0]}"
            raise ValueError(f"annotation {annotation} has {size} pixels, its image {picture.width}x{picture.height}")
        return picture, labels


def read_labels(path: Path, classes: int) -> np.ndarray:
    """An annotation -> uint8 [H, W] of 0..C-1 or 255.

    Raises:
        OSError: cannot be read; ValueError: more than one channel; RefusedSample: a class above C. All name the file.
    """
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except OSError as error:
        raise OSError(f"annotation {path}: {error}") from None
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise ValueError(f"annotation {path}: must be an 8-bit image of one channel, is {image.mode}")
    unknown = labels[(labels > classes) & (labels != IGNORED)]
    if unknown.size:
        raise RefusedSample(
            f"annotation {path}: holds class {unknown.max()}, but there are {classes} classes: --classes, or classes.txt of "
            "--data_path, says how many"
        )
    return np.where(labels == 0, IGNORED, labels - (labels != IGNORED).astype(np.uint8)).astype(np.uint8)


def class_names(root: Path, count: int = 0) -> list[str]:
    """Names of the classes 1..C: those of ROOT/classes.txt, else their numbers.

    Args:
        count: C; 0: as many as classes.txt has, or ADE20K's 150 without one.

    Raises:
        BadInput: classes.txt cannot be read as such, or has another number of classes.
    """
    path = root / "classes.txt"
    if not path.is_file():
        return [str(number) for number in range(1, (count or ADE20K_CLASSES) + 1)]
    try:
        rows = [line.split("\t") for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}") from None
    if not rows or [row[0] for row in rows] != [str(number) for number in range(1, len(rows) + 1)] or {*map(len, rows)} != {2}:
        raise BadInput(f"{path}: expected lines `number<TAB>name`, numbered from 1")
    if count and count != len(rows):
        raise BadInput(f"--classes {count}: {path} has {len(rows)}")
    if len(rows) > MOST_CLASSES:
        raise BadInput(f"{path}: {len(rows)} classes, but 8-bit annotations hold at most {MOST_CLASSES}")
    return [row[1] for row in rows]


def _files(root: Path, folder: Path, suffixes: tuple[str, ...], others: Counter[str]) -> dict[str, Path]:
    """Stem -> file, sorted; `others` counts what is passed over, by its ending or a reason."""
    if not folder.is_dir():
        raise BadInput(f"--data_path {root}: no folder {folder} (expected {{images,annotations}}/{{training,validation}})")
    listed = list(folder.iterdir())
    paths = sorted(path for path in listed if path.suffix.lower() in suffixes and not path.name.startswith("."))
    rest = set(listed).difference(paths)
    others.update("hidden" if path.name.startswith(".") else path.suffix.lower() or "without an ending" for path in rest)
    if not paths:
        raise BadInput(f"--data_path {root}: no {' or '.join(suffixes)} files in {folder}")
    files = {path.stem: path for path in paths}
    if len(files) < len(paths):
        double = next(path for path in paths if files[path.stem] != path)
        raise BadInput(f"--data_path {root}: {double} and {files[double.stem].name} have the same name")
    return files


class TrainingTransform:
    """Random scale, crop, flip and colour; a sample of a source -> (image float [3, h, w], labels uint8 [h, w]).

    What ADE20K is trained with in mmsegmentation and BEiT. All draws are from torch's global generator. The image is
    scaled bilinearly with antialiasing, labels to the nearest. What the crop has beyond the image is 0 after
    normalisation (the mean colour), and unlabelled.

    Args:
        size: (h, w) of the crop in pixels.
        scale: the range of r: the image is scaled, its shape kept, to fit the crop's shorter side times r on its own
            shorter side, and LONGEST_SIDE times that on its longer one, whichever is the smaller.
        cat_max_ratio: another crop is drawn, up to 10, while one class has this share of the labelled pixels or more.
        flip: half of the images.
        photometric: brightness, contrast, saturation and hue, each in half of the images.
    """

    def __init__(
        self, size: tuple[int, int], scale: tuple[float, float], cat_max_ratio: float, flip: bool, photometric: bool
    ) -> None:
        self.size, self.scale, self.cat_max_ratio = size, scale, cat_max_ratio
        self.flip, self.photometric = flip, photometric

    def __call__(self, sample: AnnotatedImage) -> tuple[Tensor, Tensor]:
        image, labels = as_tensors(sample)
        image, labels = self._scaled(image, labels)
        top, left = self._crop_place(labels)
        image, labels = (plane[..., top : top + self.size[0], left : left + self.size[1]] for plane in (image, labels))
        if self.flip and _uniform(0, 1) < 0.5:
            image, labels = image.flip(-1), labels.flip(-1)
        colours = image.float() / 255
        colours = normalise(distorted(colours) if self.photometric else colours)
        return padded(colours, self.size, 0.0), padded(labels, self.size, IGNORED)

    def _scaled(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        short = min(self.size) * _uniform(*self.scale)
        height, width = image.shape[-2:]
        factor = min(short / min(height, width), LONGEST_SIDE * short / max(height, width))
        return resize_both(image, labels, (max(1, round(height * factor)), max(1, round(width * factor))))

    def _crop_place(self, labels: Tensor) -> tuple[int, int]:
        """(top, left)."""
        room = [max(have - want, 0) for have, want in zip(labels.shape, self.size, strict=True)]
        for _ in range(_CROP_ATTEMPTS):
            top, left = (int(torch.randint(0, space + 1, ())) for space in room)
            if _varied(labels[top : top + self.size[0], left : left + self.size[1]], self.cat_max_ratio):
                break
        return top, left


def _varied(labels: Tensor, cat_max_ratio: float) -> bool:
    """Whether there are two classes, and none has that share of the labelled pixels."""
    if cat_max_ratio >= 1:
        return True
    counts = torch.bincount(labels.flatten().long(), minlength=IGNORED + 1)[:IGNORED]
    return bool((counts > 0).sum() > 1 and counts.max() < cat_max_ratio * counts.sum())


def distorted(colours: Tensor) -> Tensor:
    """Colours 0..1 [3, H, W] with brightness, contrast, saturation and hue each changed with probability 1/2.

    Liu et al., "SSD", ECCV 2016 (its released code), with mmsegmentation's ranges: brightness +-32 of 255, factors 0.5
    to 1.5, hue +-18 of 180 degrees; contrast comes before or after saturation and hue.
    """
    contrast_first = _coin()
    if _coin():
        colours = (colours + _uniform(-32, 32) / 255).clamp(0, 1)
    if contrast_first:
        colours = _contrast(colours)
    if _coin():
        colours = functional.adjust_saturation(colours, _uniform(0.5, 1.5))
    if _coin():
        colours = functional.adjust_hue(colours, _uniform(-18, 18) / 180)
    return colours if contrast_first else _contrast(colours)


def _contrast(colours: Tensor) -> Tensor:
    return (colours * _uniform(0.5, 1.5)).clamp(0, 1) if _coin() else colours


def _coin() -> bool:
    return _uniform(0, 1) < 0.5


def _uniform(low: float, high: float) -> float:
    """From torch's global generator, which is seeded for each sample."""
    return low + (high - low) * float(torch.rand((), dtype=torch.float64))


def validation_transform(sample: AnnotatedImage) -> tuple[Tensor, Tensor]:
    """A sample of a source -> (normalised image float [3, H, W], labels uint8 [H, W]) in their own size."""
    image, labels = as_tensors(sample)
    return normalise(image.float() / 255), labels


def as_tensors(sample: AnnotatedImage) -> tuple[Tensor, Tensor]:
    """A sample of a source -> (image uint8 [3, H, W], labels uint8 [H, W])."""
    image, labels = sample
    return functional.pil_to_tensor(image), torch.from_numpy(labels)


def resize_both(image: Tensor, labels: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Image [3, H, W] bilinearly, labels [H, W] to the nearest, so that pixels stay under their labels."""
    resized_labels = functional.resize(labels[None], list(size), interpolation=InterpolationMode.NEAREST_EXACT)[0]
    return functional.resize(image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True), resized_labels


def normalise(colours: Tensor) -> Tensor:
    """Colours 0..1 [3, H, W] -> mean 0 and deviation 1 over ImageNet."""
    return functional.normalize(colours, list(IMAGENET_MEAN), list(IMAGENET_STD))


def padded(tensor: Tensor, size: tuple[int, int], value: float) -> Tensor:
    """[..., H, W] -> [..., *size], filled up on the right and below."""
    down, across = size[0] - tensor.shape[-2], size[1] - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, across, 0, down), value=value) if down or across else tensor.contiguous()


def collate_whole(samples: Sequence[Any]) -> Batch:
    """Samples of different sizes -> Batch whose views are image, labels, image, labels, ... of each."""
    return Batch(
        views=tuple(view for views, _, _, _ in samples if views is not None for view in views),
        sample_ids=torch.tensor([index for _, index, _, _ in samples]),
        names=[name for _, _, name, _ in samples],
        bad=[line for _, _, _, lines in samples for line in lines],
    )


def cover_size(image: tuple[int, int], window: tuple[int, int], scale: float) -> tuple[int, int]:
    """(H, W) of an image that is resized, its shape kept, to just cover `scale` times the window, and the window at least."""
    factor = max(window[0] / image[0], window[1] / image[1]) * max(scale, 1.0)
    return max(window[0], round(image[0] * factor)), max(window[1], round(image[1] * factor))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: a stride apart, the last one ending with the side."""
    last = length - window
    return [min(step * stride, last) for step in range(1 + math.ceil(last / stride))]
