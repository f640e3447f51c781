"""Pictures of results: predicted classes on images, confusion matrices. Without matplotlib (group `demo`) there are none.

n images   C classes
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

_NAMED = 40  # more classes than these are drawn without names


def draw_predictions(images: Tensor, labels: Tensor, probabilities: Tensor, classes: list[str]) -> dict[str, np.ndarray]:
    """Images with true class, predicted class and its probability; wrong ones in red.

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
    figure = _figure(2.6 * columns, 3.0 * rows)
    for place, (image, label, share) in enumerate(zip(images, labels.tolist(), probabilities, strict=True), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        guess = int(share.argmax())
        answer = f"{classes[guess]} {float(share[guess]):.0%}"
        title = answer if guess == label else f"{answer}\nis {classes[label]}"
        axes.set_title(title, fontsize=9, color="black" if guess == label else "firebrick")
        axes.axis("off")
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
    figure.colorbar(heatmap, ax=axes, fraction=0.046, label="share of the true class")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= _NAMED:
        axes.set_xticks(range(len(classes)), classes, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), classes, fontsize=8)
    if len(classes) <= 12:
        for row in range(len(classes)):
            for column in range(len(classes)):
                value = float(shares[row, column])
                if value >= 0.005:
                    colour = "black" if value > 0.6 else "white"
                    axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
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
    for name, values in curves.items():
        axes.plot(layers, values, marker="o", label=name)
    axes.set_xlabel("block")
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
    axes.plot([line["epoch"] + 1 for line in lines], [line["train_loss"] for line in lines], color="tab:blue")
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("training loss", color="tab:blue")
    axes.grid(alpha=0.3)
    judged = [line for line in lines if metric in line]
    metric_axes = axes.twinx()
    metric_axes.plot([line["epoch"] + 1 for line in judged], [line[metric] for line in judged], color="tab:orange", marker="o")
    metric_axes.set_ylabel(metric, color="tab:orange")
    return {"curves": _pixels(figure)}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> np.ndarray:
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
