"""Pictures show the numbers that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

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


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the figure as it was drawn last, which is as it is saved."""
    drawn: list[str] = []
    figure, text = Figure.draw, Text.draw

    def draw_figure(self: Figure, renderer: Any) -> None:
        drawn.clear()
        figure(self, renderer)

    def draw_text(self: Text, renderer: Any) -> None:
        if self.get_text():
            drawn.append(self.get_text())
        text(self, renderer)

    monkeypatch.setattr(Figure, "draw", draw_figure)
    monkeypatch.setattr(Text, "draw", draw_text)
    return drawn


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


def assert_whole(picture: np.ndarray) -> None:
    """White paper around everything: no title or label reaches the edge, where it would be cut."""
    for edge in (picture[:3], picture[-3:], picture[:, :3], picture[:, -3:]):
        assert (edge == 255).all()


LONG = ["bird", "fruit_or_vegetable", "a_class_with_a_name_of_more_than_sixty_letters_without_a_single_space"]


@pytest.mark.parametrize(("count", "size"), [(1, (48, 48)), (3, (96, 32)), (6, (32, 96))])
def test_predictions_are_whole(texts: list[str], count: int, size: tuple[int, int]) -> None:
    """Predicted and true class in black above each image, one line a class where it fits; no ink at the edges."""
    probabilities = torch.tensor([[0.2, 0.7, 0.1], [0.1, 0.3, 0.6], [0.8, 0.1, 0.1]]).repeat(2, 1)[:count]
    labels = torch.tensor([1, 0, 0, 2, 2, 2])[:count]
    picture = pictures.draw_predictions(torch.rand(count, 3, *size), labels, probabilities, LONG)["predictions"]
    assert_whole(picture)
    assert "predicted fruit_or_vegetable 70%\ntrue fruit_or_vegetable" in texts
    words = "".join(texts).replace("\n", "")
    assert words.count(LONG[2]) == {1: 0, 3: 1, 6: 5}[count]
    titles = [text for text in texts if text.startswith("predicted")]
    assert len(titles) == count
    assert max(len(line) for title in titles for line in title.split("\n")) <= 34
    # No image is padded: the figure is about as high as its images and titles.
    high, wide = size
    column = picture.shape[1] / min(4, count)
    expected = (column * high / wide + 21 * max(title.count("\n") + 1 for title in titles)) * -(-count // 4) + 60
    assert abs(picture.shape[0] - expected) < 0.25 * expected


def test_right_and_wrong_have_their_frames() -> None:
    """Blue and whole where the class is right, vermilion and dashed where it is wrong, on the image's edge."""
    images = torch.full((2, 3, 48, 48), 0.5)
    drawn = pictures.draw_predictions(images, torch.tensor([0, 0]), torch.tensor([[0.9, 0.1], [0.1, 0.9]]), ["a", "b"])[
        "predictions"
    ]
    left, right = np.array_split(drawn[: drawn.shape[0] * 7 // 8].astype(int), 2, axis=1)
    blue, vermilion = (np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) for colour in ("#0072b2", "#d55e00"))
    found = [[(np.abs(half - colour).max(axis=2) < 8).sum() for colour in (blue, vermilion)] for half in (left, right)]
    assert found[0][0] > 1000
    assert found[0][1] == found[1][0] == 0
    assert 0.4 * found[0][0] < found[1][1] < 0.85 * found[0][0]  # dashes


@pytest.mark.parametrize("count", [2, 8, 45])
def test_confusion_is_whole(texts: list[str], count: int) -> None:
    """Axis labels, class names and the colour bar's label, also with long names; absent classes are explained."""
    names = [f"{LONG[1]}_{k}" for k in range(count)]
    matrix = torch.eye(count, dtype=torch.int64) * 3
    assert_whole(pictures.draw_confusion(matrix, names)["confusion"])
    assert {"true class", "predicted class", "share of the true class", "percent of each true class, by predicted class"} <= set(
        texts
    )
    assert (names[0] in texts) == (count <= 40)
    matrix[1] = 0
    assert_whole(pictures.draw_confusion(matrix, names)["confusion"])
    assert "percent of each true class, by predicted class\n(white rows: not in the data)" in texts


def test_percents_show_on_their_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Black on bright cells, white on dark ones: 4.5 : 1 at least, on every colour of the map."""
    inks: list[tuple[str, Any, Any]] = []
    original = Axes.text

    def text(self: Axes, x: float, y: float, words: str, **more: Any) -> Any:
        if words.isdigit():
            heatmap = self.images[0]
            inks.append((words, more["color"], heatmap.cmap(heatmap.norm(heatmap.get_array()[y, x]))[:3]))
        return original(self, x, y, words, **more)

    monkeypatch.setattr(Axes, "text", text)
    pictures.draw_confusion(torch.tensor([[k, 12 - k] for k in range(12)]).repeat(1, 6)[:, :12], list("abcdefghijkl"))
    assert len(inks) == 12 * 12 - 6
    for _, ink, ground in inks:
        first, second = sorted(_luminance(colour) + 0.05 for colour in (ink, ground))
        assert second / first >= 4.5


def _luminance(colour: Any) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def test_curves_and_layers_are_whole(texts: list[str]) -> None:
    """Loss in digits without an offset above the axis, both axes named."""
    lines = [{"epoch": k, "train_loss": 2.08 + k * 1e-5, "AP_box": 12.5} for k in range(3)]
    assert_whole(pictures.draw_curves(lines, "AP_box")["curves"])
    assert {"epoch", "training loss (line)", "AP_box in percent (dashed)"} <= set(texts)
    assert not [text for text in texts if text.startswith("+")]
    curves = {"linear": [1.0, 99.0], **{f"{k}-NN of the training images": [5.0, float(k)] for k in (1, 3, 5, 10, 20, 200)}}
    assert_whole(pictures.draw_layers([0, 11], curves)["layers"])
