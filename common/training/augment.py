"""Random crops, flips and colours of training images, on bytes, and what the device makes of the bytes.

An image is a PIL image, or uint8 [3, H, W] with colours last in memory, as common/training/decode.py gives it. The type
decides who crops: PIL as in the official pipelines, or torch, which works on bytes throughout. Both draw the same numbers in the
same order, so that a seed gives the same boxes, flips and colours. Views are uint8; they become float32 on the device, by
:func:`normalise` and :func:`colours`.

H, W size of an image in pixels   P, Q size of a view
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageStat
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from common.training.config import ImageSetConfig
from common.training.data import IMAGENET_MEAN, IMAGENET_STD

CROP_RATIO = (3 / 4, 4 / 3)
"""Width over height of a random crop: torchvision's default, and that of all three methods."""

Box = tuple[int, int, int, int]
"""Top, left, height, width in pixels."""

_MEAN_STEP = 4  # of the pixels whose grey level stands for that of the image
_LEVELS = Image.fromarray(np.arange(256, dtype=np.uint8)[None])


# --- Draws and crops ---------------------------------------------------------------------------------------------


def draw_crop(image: Any, scale: tuple[float, float]) -> Box:
    """A box, from torch's generator, as transforms.RandomResizedCrop draws it."""
    return transforms.RandomResizedCrop.get_params(image, list(scale), list(CROP_RATIO))


def draw_flip(flip: bool) -> bool:
    """Whether to mirror, from torch's generator, as transforms.RandomHorizontalFlip draws it; no draw without `flip`."""
    return flip and bool(torch.rand(1) < 0.5)


def cut(image: Image.Image | Tensor, box: Box, size: tuple[int, int], interpolation: str, mirrored: bool = False) -> Tensor:
    """The part of an image in a box, resized with antialiasing, then mirrored: uint8 [3, P, Q].

    Args:
        size: (P, Q).
        interpolation: bilinear, bicubic or lanczos.
    """
    if isinstance(image, Image.Image):
        view = functional.resized_crop(image, *box, list(size), InterpolationMode(interpolation))
        return functional.pil_to_tensor(functional.hflip(view) if mirrored else view)
    top, left, height, width = box
    part = image[None, :, top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    resized = interpolate(part, size, mode=interpolation, antialias=True)[0]
    return resized.flip(2) if mirrored else resized


def whole(image: Image.Image | Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """The whole image at the size of a view, its sides scaled each by itself: uint8 [3, P, Q]."""
    _, height, width = functional.get_dimensions(image)
    return cut(image, (0, 0, height, width), size, interpolation)


class RandomCrop:
    """Random resized crop and flip of MAE, SimMIM and the tokenizer: image -> uint8 [3, P, Q]."""

    draws_from_torch = True

    def __init__(self, config: ImageSetConfig) -> None:
        self.size, self.scale, self.flip = config.image_size, config.crop_scale, config.flip
        self.interpolation = config.interpolation

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        return self.located(image)[0]

    def located(self, image: Image.Image | Tensor) -> tuple[Tensor, Box, bool]:
        """The view, its box, and whether it is mirrored. Random numbers come from torch's generator."""
        box = draw_crop(image, self.scale)
        mirrored = draw_flip(self.flip)
        return cut(image, box, self.size, self.interpolation, mirrored), box, mirrored


# --- Colours -----------------------------------------------------------------------------------------------------


class Jitter:
    """Random brightness, contrast and saturation, in random order, as transforms.ColorJitter draws and makes them.

    Args:
        strength: of each of the three.
    """

    def __init__(self, strength: float) -> None:
        self.official = transforms.ColorJitter(strength, strength, strength)

    def draw(self) -> list[tuple[str, float]]:
        """Names and factors, in the order in which they are applied; empty at strength 0."""
        ranges = self.official
        order, *factors = transforms.ColorJitter.get_params(ranges.brightness, ranges.contrast, ranges.saturation, ranges.hue)
        names = ("brightness", "contrast", "saturation", "hue")
        drawn = [(names[number], factors[number]) for number in order.tolist()]
        return [(name, factor) for name, factor in drawn if factor is not None]

    @staticmethod
    def whole(image: Image.Image, drawn: list[tuple[str, float]]) -> Image.Image:
        """The whole image, as the official code has it."""
        for name, factor in drawn:
            image = getattr(functional, f"adjust_{name}")(image, factor)
        return image

    @staticmethod
    def part(image: Tensor, box: Box, drawn: list[tuple[str, float]]) -> Tensor:
        """The part of an image in a box: uint8 [3, height, width]; PIL's arithmetic to the bit, but for one number.

        Contrast is about the mean grey level of the whole image as the changes before left it, and that is taken over every
        fourth row and column of it.
        """
        top, left, height, width = box
        few, part = _as_pil(image[:, ::_MEAN_STEP, ::_MEAN_STEP]), _as_pil(image[:, top : top + height, left : left + width])
        for name, factor in drawn:
            if name == "saturation":
                few, part = (functional.adjust_saturation(picture, factor) for picture in (few, part))
                continue
            level = int(ImageStat.Stat(few.convert("L")).mean[0] + 0.5) if name == "contrast" else 0
            table = list(Image.blend(Image.new("L", _LEVELS.size, level), _LEVELS, factor).tobytes()) * 3
            few, part = few.point(table), part.point(table)
        return functional.pil_to_tensor(part)


def _as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


# --- On the device -----------------------------------------------------------------------------------------------


def colours(views: Tensor) -> Tensor:
    """Bytes [..., 3, P, Q] -> colours in 0..1, float32, to the bit as transforms.ToTensor makes them; floats stay as they are."""
    if views.dtype != torch.uint8:
        return views
    values = views.to(torch.float32, memory_format=torch.contiguous_format)
    return values.div_(torch.tensor(255.0, device=views.device))  # a tensor there: a GPU multiplies by 1/255 otherwise


def normalise(views: Tensor) -> Tensor:
    """Bytes [..., 3, P, Q] -> mean 0 and deviation 1 over ImageNet, as transforms.Normalize makes them of :func:`colours`."""
    if views.dtype != torch.uint8:
        return views
    mean, std = (torch.tensor(values, device=views.device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return colours(views).sub_(mean).div_(std)
