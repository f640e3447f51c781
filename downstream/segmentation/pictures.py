"""Pictures of a segmentation: images with their true and predicted classes.

C classes   H, W height and width of an image in pixels
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from common.training.data import denormalise

LONGER_SIDE = 256
"""Of an image in a picture, in pixels."""

_GAP, _WHITE, _COLOUR_SHARE = 6, 255, 0.7


def palette(classes: int) -> np.ndarray:
    """A colour for each class, always the same one, and black for unlabelled pixels: uint8 [256, 3]."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for k in range(classes):  # hues as far apart as they can be; neighbours differ in brightness too
        shade = colorsys.hsv_to_rgb(k / classes, 0.6 + 0.35 * (k % 2), 0.95 - 0.4 * (k % 3 == 2))
        colours[k] = np.round(np.array(shade) * 255)
    return colours


def triptych(image: Tensor, truth: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """The image, its true classes and the predicted ones, side by side: uint8 [h, 3w + gaps, 3].

    Args:
        image: normalised [3, H, W].
        truth, predicted: classes [H, W], 255 where unlabelled.
    """
    picture = (denormalise(image).permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    factor = LONGER_SIDE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    cells = [np.asarray(resized)]
    for labels in (truth, predicted):
        colours = Image.fromarray(palette(classes)[labels.cpu().numpy()]).resize(size, Image.Resampling.NEAREST)
        cells.append(np.asarray(Image.blend(resized, colours, _COLOUR_SHARE)))
    gap = np.full((size[1], _GAP, 3), _WHITE, dtype=np.uint8)
    return np.concatenate([cells[0], gap, cells[1], gap, cells[2]], axis=1)


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [h, w, 3] of different sizes one below another on white."""
    width = max(row.shape[1] for row in rows)
    filled = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=_WHITE) for row in rows]
    return np.concatenate(filled)[:-_GAP]
