"""Pictures of a segmentation: images with their true and predicted classes.

C classes   H, W height and width of an image in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from common.training.data import denormalise
from common.visualize import borders
from common.visualize.captions import Group, Key, Sheet
from common.visualize.colours import distinct_colours

LONGER_SIDE = 256
"""Of an image in a picture, in pixels."""

_COLOUR_SHARE = 0.7
_UNLABELLED = 255


def palette(classes: int) -> np.ndarray:
    """A colour for each class, always the same one, and black for unlabelled pixels: uint8 [256, 3]."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[:classes] = np.round(distinct_colours(classes) * 255)
    return colours


class Triptych(NamedTuple):
    """An image with its classes.

    Attributes:
        cells: the image, its true classes and the predicted ones, uint8 [3, h, w, 3].
        shown: the classes in it, 255 for unlabelled pixels.
    """

    cells: np.ndarray
    shown: frozenset[int]


def triptych(image: Tensor, truth: Tensor, predicted: Tensor, classes: int) -> Triptych:
    """The image, its true classes and the predicted ones.

    Args:
        image: normalised [3, H, W].
        truth, predicted: classes [H, W], 255 where unlabelled.
    """
    picture = (denormalise(image).permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    factor = LONGER_SIDE / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    cells, shown = [np.asarray(resized)], frozenset[int]()
    for labels in (truth.cpu().numpy(), predicted.cpu().numpy()):
        drawn = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
        cell = np.array(Image.blend(resized, Image.fromarray(palette(classes)[drawn]), _COLOUR_SHARE))
        cell[borders(drawn)] //= 3
        cells.append(cell)
        shown |= frozenset(int(label) for label in np.unique(labels))
    return Triptych(np.stack(cells), shown)


def draw_sheet(triptychs: Sequence[Triptych], names: Sequence[str]) -> np.ndarray:
    """Rows of images with titles, and the names of the classes that are in them: uint8 [height, width, 3].

    Args:
        names: of all C classes.
    """
    shown = sorted(frozenset[int]().union(*(row.shown for row in triptychs)))
    colours = palette(len(names)) / 255
    legend = [Key([colours[label]], "unlabelled" if label == _UNLABELLED else names[label]) for label in shown]
    return Sheet(
        [Group(("image", "true classes", "predicted classes"))], "", legend, [list(row.cells) for row in triptychs]
    ).draw()
