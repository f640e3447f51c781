"""One confusion matrix, and the three numbers of semantic segmentation that follow from it.

mIoU, mAcc and aAcc (Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, Sec. 5: mean IU,
mean accuracy and pixel accuracy), over the pixels of the whole set and not image by image, as ADE20K is evaluated.

The paper's Table 4 heads a column of about 79.6 with "mAcc". Beside an mIoU of about 40 that is no mean over classes,
but fits the share of right pixels, here aAcc; both are reported.

C classes   M pixels
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = 255
"""Label of a pixel that counts neither in the loss nor in the evaluation."""


def confusion_matrix(predicted: Tensor, truth: Tensor, classes: int, ignored: int | None = IGNORED) -> Tensor:
    """Counts of pixels: int64 [C, C], true class down, predicted class across. What has the truth `ignored` is left out.

    Args:
        predicted: integers 0..C-1 [...].
        truth: integers 0..C-1 or `ignored`, of the same shape.
        ignored: None where every label counts.
    """
    if ignored is not None:
        counted = truth != ignored
        predicted, truth = predicted[counted], truth[counted]
    pairs = truth.long() * classes + predicted.long()
    return torch.bincount(pairs.flatten(), minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class SegmentationScores:
    """Shares 0 to 1; nan where there is nothing to divide by.

    Attributes:
        miou: mean of `iou` over classes in truth or prediction.
        macc: mean of `accuracy` over classes in truth.
        aacc: share of right pixels.
        iou: [C] intersection over union; nan where a class is neither in truth nor in prediction.
        accuracy: [C] share of a class's pixels found (recall); nan where a class is not in truth.
    """

    miou: float
    macc: float
    aacc: float
    iou: np.ndarray
    accuracy: np.ndarray


def scores_of(confusion: Tensor) -> SegmentationScores:
    """The scores of a confusion matrix int64 [C, C] as :func:`confusion_matrix` makes it.

    Classes without a value do not enter the means, as in mmsegmentation (`nanmean`): a class that occurs in truth
    only, or in prediction only, has an IoU of 0 that does enter.
    """
    counts = confusion.cpu().double().numpy()
    correct, in_truth, in_prediction = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    iou, accuracy = _share(correct, in_truth + in_prediction - correct), _share(correct, in_truth)
    return SegmentationScores(_mean(iou), _mean(accuracy), float(_share(correct.sum(), in_truth.sum())), iou, accuracy)


def _share(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """part / whole, nan where whole is 0."""
    return np.divide(numerator, denominator, out=np.full_like(np.asarray(denominator), np.nan), where=denominator > 0)


def _mean(values: np.ndarray) -> float:
    """Mean of what is not nan; nan if nothing is."""
    return float(values[~np.isnan(values)].mean()) if not np.isnan(values).all() else float("nan")
