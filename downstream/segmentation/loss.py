"""Cross-entropy over the labelled pixels of all ranks.

B batch   C classes   h, w height and width of the encoder's input
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from common.training.data import Batch
from common.training.distributed import Processes
from downstream.confusion import IGNORED
from downstream.segmentation.config import SegmentConfig
from downstream.segmentation.upernet import resized


def make_loss(config: SegmentConfig, processes: Processes) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy, that of the auxiliary head weighted, on logits upsampled to the input: the mean over labelled pixels.

    Labelled pixels are counted over all ranks, and what the ranks' average makes of it is the mean over all of them.
    Accumulation steps are averaged as they are. Without any labelled pixel the loss is 0.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch.views
        logits, auxiliary = model(images)
        labelled = processes.sum((labels != IGNORED).sum()).clamp(min=1)
        summed = pixel_loss(logits, labels) + config.auxiliary_weight * pixel_loss(auxiliary, labels)
        return summed * (processes.world / labelled)

    return loss


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over labelled pixels, in fp32.

    Args:
        logits: [B, C, ...] of any size, upsampled to that of the labels.
        labels: 0..C-1 or 255 [B, h, w].
    """
    full = resized(logits.float(), labels.shape[-2:])
    return functional.cross_entropy(full, labels.long(), ignore_index=IGNORED, reduction="sum")
