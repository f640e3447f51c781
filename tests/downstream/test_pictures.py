"""Pictures show the numbers that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from downstream import pictures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[float], list[float]]]:
    """Lines that are plotted."""
    found: list[tuple[list[float], list[float]]] = []
    original = Axes.plot

    def plot(self: Axes, x: Any, y: Any, *rest: Any, **more: Any) -> Any:
        found.append((list(x), list(y)))
        return original(self, x, y, *rest, **more)

    monkeypatch.setattr(Axes, "plot", plot)
    return found


def test_curves_of_loss_and_metric(drawn: list[tuple[list[float], list[float]]]) -> None:
    """The metric where an epoch was evaluated; epochs counted from 1."""
    lines = [
        {"epoch": 0, "train_loss": 3.0},
        {"epoch": 1, "train_loss": 2.0, "top1": 10.0},
        {"epoch": 2, "train_loss": 1.5, "top1": 20.0},
    ]
    picture = pictures.draw_curves(lines, "top1")["curves"]
    assert picture.dtype == np.uint8
    assert picture.std() > 5
    assert drawn == [([1, 2, 3], [3.0, 2.0, 1.5]), ([2, 3], [10.0, 20.0])]
    assert pictures.draw_curves(lines[:1], "top1") == {}


def test_nothing_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "can_draw", lambda: False)
    assert pictures.draw_curves([{"epoch": 0, "train_loss": 1.0}] * 2, "top1") == {}
    assert pictures.draw_confusion(torch.eye(2, dtype=torch.int64), ["a", "b"]) == {}
    assert pictures.draw_layers([0, 1], {"linear": [1.0, 2.0]}) == {}


def test_confusion_in_shares_of_the_true_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows sum to 1; a class that is not in truth is drawn as nothing."""
    shown: list[np.ndarray] = []
    original = Axes.imshow

    def imshow(self: Axes, values: Any, *rest: Any, **more: Any) -> Any:
        shown.append(np.asarray(values))
        return original(self, values, *rest, **more)

    monkeypatch.setattr(Axes, "imshow", imshow)
    pictures.draw_confusion(torch.tensor([[3, 1, 0], [0, 2, 2], [0, 0, 0]]), ["a", "b", "c"])
    assert np.array_equal(shown[0], [[0.75, 0.25, 0], [0, 0.5, 0.5], [np.nan] * 3], equal_nan=True)
