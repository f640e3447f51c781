"""Pictures of results: predicted classes on images, confusion matrices, curves. Without matplotlib (group `demo`) there are none.

n images   C classes
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from common.visualize.colours import BASE, RIGHT, WRONG, text_colour

_NAMED = 40  # more classes than these are drawn without names
_DPI = 120
_DASHED = (0, (3, 1.5))
_WRAP = 34  # letters of a title's line over one image


def draw_predictions(images: Tensor, labels: Tensor, probabilities: Tensor, classes: list[str]) -> dict[str, np.ndarray]:
    """Images with predicted class, its probability and the true class, in a blue frame where they agree, else in a dashed one.

    Args:
        images: values 0..1, [n, 3, height, width].
        labels: int64 [n].
        probabilities: [n, C].

    Returns:
        {"predictions": uint8 [height, width, 3]}, or nothing without matplotlib.
    """
    if not can_draw():
        return {}
    columns = min(4, len(images))
    rows = math.ceil(len(images) / columns)
    titles = [_title(int(share.argmax()), float(share.max()), label, classes) for label, share in _pairs(labels, probabilities)]
    lines = max(title.count("\n") + 1 for title in titles)
    height, width = images.shape[2:]
    figure = _figure(2.4 * columns, (2.4 * height / width + 0.17 * lines) * rows + 0.4)
    for place, (image, (label, share), title) in enumerate(
        zip(images, _pairs(labels, probabilities), titles, strict=True), start=1
    ):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(title, fontsize=8)
        _frame(axes, right=int(share.argmax()) == label)
    figure.legend(handles=_frames(), loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return {"predictions": _pixels(figure)}


def draw_confusion(matrix: Tensor, classes: Sequence[str]) -> dict[str, np.ndarray]:
    """A confusion matrix in shares of the true class, with numbers where there are few classes; empty rows: not in truth.

    Args:
        matrix: counts, true class first: [C, C].

    Returns:
        {"confusion": uint8 [height, width, 3]}, or nothing without matplotlib.
    """
    if not can_draw():
        return {}
    shares = matrix.double() / matrix.sum(dim=1, keepdim=True)  # nan, drawn as nothing, for a class that is not in truth
    side = min(max(3.5, 0.42 * len(classes) + 2), 14)
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    heatmap = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(heatmap, ax=axes, fraction=0.046, label="share of the true class", format="{x:.0%}")
    absent = "\n(white rows: not in the data)" if bool(shares.isnan().any()) else ""
    axes.set_title(f"percent of each true class, by predicted class{absent}", fontsize=9)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(classes) <= _NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
    if len(classes) <= 12:
        _write_shares(axes, heatmap, shares)
    return {"confusion": _pixels(figure)}


def draw_layers(layers: list[int], curves: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Accuracy against depth.

    Args:
        layers: blocks, from 0.
        curves: name -> percent for each of the layers.

    Returns:
        {"layers": uint8 [height, width, 3]}, or nothing without matplotlib.
    """
    if not can_draw():
        return {}
    figure = _figure(5.5, 3.6)
    axes = figure.add_subplot()
    styles = itertools.cycle(
        {"color": colour, "marker": marker} for colour, marker in zip(BASE[4:] + BASE[:3], "os^DvP", strict=True)
    )
    for name, values in curves.items():
        axes.plot(layers, values, label=name, **next(styles))
    axes.set_xlabel("block (0: the first)")
    axes.set_ylabel("top-1 in percent")
    axes.set_xticks(layers)
    axes.grid(alpha=0.3)
    axes.legend()
    return {"layers": _pixels(figure)}


def draw_curves(lines: Sequence[dict[str, Any]], metric: str) -> dict[str, np.ndarray]:
    """Training loss and a metric over the epochs.

    Args:
        lines: of log.txt, with `epoch` and `train_loss`, and `metric` where an epoch was evaluated.

    Returns:
        {"curves": uint8 [height, width, 3]}, or nothing without matplotlib or with less than two epochs.
    """
    if not can_draw() or len(lines) < 2:
        return {}
    figure = _figure(5.5, 3.6)
    axes = figure.add_subplot()
    axes.plot([line["epoch"] + 1 for line in lines], [line["train_loss"] for line in lines], color=RIGHT)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("training loss (line)", color=RIGHT)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    judged = [line for line in lines if metric in line]
    metric_axes = axes.twinx()
    metric_axes.plot([line["epoch"] + 1 for line in judged], [line[metric] for line in judged], color=WRONG, marker="o", ls="--")
    metric_axes.set_ylabel(f"{metric} in percent (dashed)", color=WRONG)
    return {"curves": _pixels(figure)}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _pairs(labels: Tensor, probabilities: Tensor) -> list[tuple[int, Tensor]]:
    return list(zip(labels.tolist(), probabilities, strict=True))


def _title(predicted: int, probability: float, label: int, classes: list[str]) -> str:
    """Predicted and true class, a long name on several lines."""
    lines = [f"predicted {classes[predicted]} {probability:.0%}", f"true {classes[label]}"]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, _WRAP))


def _frame(axes: Any, right: bool) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=RIGHT if right else WRONG, linewidth=2.5, linestyle="-" if right else _DASHED, capstyle="butt")


def _frames() -> list[Any]:
    """What the frames mean, for a legend."""
    from matplotlib.lines import Line2D

    return [
        Line2D([], [], color=RIGHT, linewidth=2.5, label="right"),
        Line2D([], [], color=WRONG, linewidth=2.5, linestyle=_DASHED, label="wrong"),
    ]


def _write_shares(axes: Any, heatmap: Any, shares: Tensor) -> None:
    """Percent in the cells, in the colour that shows on the cell's own."""
    for row, column in itertools.product(range(len(shares)), repeat=2):
        value = float(shares[row, column])
        if value >= 0.005:
            ink = np.array(text_colour(np.array(heatmap.cmap(heatmap.norm(value))[:3]))) / 255
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=tuple(ink))


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> np.ndarray:
    """The figure as it fits around all that is drawn: a label that the layout leaves outside makes it larger."""
    figure.canvas.draw()  # the layout knows the places of labels only once they were drawn
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08)
    return np.array(Image.open(buffer).convert("RGB"))
