"""The confusion matrix and its scores against scikit-learn and torchmetrics."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from downstream.confusion import IGNORED, confusion_matrix, scores_of

CLASSES = 7


def drawn(seed: int, missing: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Predictions right in about half of the pixels, and truth [3, 20, 24], a fifth of it ignored; no class of `missing`
    is in either."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.tensor([k for k in range(CLASSES) if k not in missing])
    shape = (3, 20, 24)
    truth = kept[torch.randint(len(kept), shape, generator=generator)]
    other = kept[torch.randint(len(kept), shape, generator=generator)]
    predicted = torch.where(torch.rand(shape, generator=generator) < 0.4, truth, other)
    truth[torch.rand(shape, generator=generator) < 0.2] = IGNORED
    return predicted, truth


@pytest.mark.parametrize(("seed", "missing"), [(0, ()), (1, (0,)), (2, (3, 6))])
def test_counts_and_scores_are_those_of_the_libraries(seed: int, missing: tuple[int, ...]) -> None:
    predicted, truth = drawn(seed, missing)
    confusion = confusion_matrix(predicted, truth.to(torch.uint8), CLASSES)
    counted = truth != IGNORED
    true, said = truth[counted].numpy(), predicted[counted].numpy()
    assert confusion.dtype == torch.int64
    assert np.array_equal(confusion.numpy(), sklearn_confusion(true, said, labels=range(CLASSES)))

    found = scores_of(confusion)
    options = {"num_classes": CLASSES, "ignore_index": IGNORED}
    assert found.miou == pytest.approx(float(MulticlassJaccardIndex(**options)(predicted, truth)), abs=1e-6)
    assert found.aacc == pytest.approx(float(MulticlassAccuracy(average="micro", **options)(predicted, truth)), abs=1e-6)
    assert found.macc == pytest.approx(balanced_accuracy_score(true, said), abs=1e-12)
    each = MulticlassJaccardIndex(average="none", **options)(predicted, truth).numpy()
    assert np.array_equal(np.flatnonzero(np.isnan(found.iou)), missing)
    assert np.allclose(np.nan_to_num(found.iou), each, atol=1e-6)


def test_a_class_that_is_only_predicted_counts_in_miou_but_not_in_macc() -> None:
    truth, predicted = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 2, 1, 1, 1])
    found = scores_of(confusion_matrix(predicted, truth, 4))
    assert found.miou == pytest.approx((2 / 3 + 1 + 0) / 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a prediction is no class of truth
        assert found.macc == pytest.approx(balanced_accuracy_score(truth, predicted)) == pytest.approx((2 / 3 + 1) / 2)
    assert np.array_equal(np.isnan(found.iou), [False, False, False, True])
    assert np.array_equal(np.isnan(found.accuracy), [False, False, True, True])


def test_scores_of_a_set_are_not_the_mean_over_its_images() -> None:
    """Matrices are added, as over batches and ranks."""
    predicted, truth = drawn(3)
    summed = sum(confusion_matrix(one, other, CLASSES) for one, other in zip(predicted, truth, strict=True))
    assert isinstance(summed, Tensor)
    assert torch.equal(summed, confusion_matrix(predicted, truth, CLASSES))


def test_nothing_labelled_gives_nan() -> None:
    nothing = confusion_matrix(torch.zeros(4, 4), torch.full((4, 4), IGNORED), CLASSES)
    found = scores_of(nothing)
    assert all(math.isnan(value) for value in (found.miou, found.macc, found.aacc))


def test_counts_above_what_fp32_holds_are_exact() -> None:
    huge = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    assert scores_of(huge).aacc == (2**41 + 1) / (2**41 + 2)
