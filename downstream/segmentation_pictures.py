"""Pictures of a segmentation: images with their true and predicted classes, and the confusion matrix.

C classes   H, W height and width of an image in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.training.data import denormalise
from common.visualize import part_colours

LONGER_SIDE = 256
"""Of an image in a picture, in pixels."""

_GAP, _WHITE, _COLOUR_SHARE, _MOST_NAMES = 6, 255, 0.7, 30


def palette(classes: int) -> np.ndarray:
    """A colour for each class, always the same one, and black for unlabelled pixels: uint8 [256, 3]."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[:classes] = (part_colours(classes) * 255).round()
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
    shown = Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)
    cells = [np.asarray(shown)]
    for labels in (truth, predicted):
        colours = Image.fromarray(palette(classes)[labels.cpu().numpy()]).resize(size, Image.Resampling.NEAREST)
        cells.append(np.asarray(Image.blend(shown, colours, _COLOUR_SHARE)))
    gap = np.full((size[1], _GAP, 3), _WHITE, dtype=np.uint8)
    return np.concatenate([cells[0], gap, cells[1], gap, cells[2]], axis=1)


def stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures [h, w, 3] of different sizes one below another on white."""
    width = max(row.shape[1] for row in rows)
    filled = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=_WHITE) for row in rows]
    return np.concatenate(filled)[:-_GAP]


def can_draw_confusion() -> bool:
    """Whether matplotlib is installed (requirements-demo.txt)."""
    return find_spec("matplotlib") is not None


def draw_confusion(confusion: Tensor, names: Sequence[str]) -> np.ndarray:
    """Confusion matrix int64 [C, C] as shares of each true class: uint8 [h, w, 3]. Classes that are not in truth stay empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = confusion.cpu().double()
    shares = torch.where(counts.sum(1, keepdim=True) > 0, counts / counts.sum(1, keepdim=True), torch.nan)
    side = 3 + 0.25 * min(len(names), _MOST_NAMES)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="true", title="share of the pixels of each true class")
    if len(names) <= _MOST_NAMES:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return drawn[..., :3].copy()
