"""Cross-entropy on mixed images and labels.

B images   C classes
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from common.training.data import Batch
from downstream.classification.config import FinetuneConfig


class MixedLoss:
    """Cross-entropy on mixed images and labels.

    One draw a batch (of a rank and accumulation step): mixup or cutmix with equal chances, and the share lam. Image i is
    mixed with image i - 1; where timm's Mixup takes the batch in reverse order, the targets are the same: lam * y_i +
    (1 - lam) * y_j, then (1 - smoothing) * target + smoothing / C. Draws come from torch's generator of the CPU, which
    the loop seeds for each update.
    """

    def __init__(self, config: FinetuneConfig, classes: int) -> None:
        mixes: list[Any] = [v2.MixUp(alpha=config.mixup, num_classes=classes)] if config.mixup else []
        mixes += [v2.CutMix(alpha=config.cutmix, num_classes=classes)] if config.cutmix else []
        self.mix = v2.RandomApply([v2.RandomChoice(mixes)], p=config.mix_prob) if mixes else None
        self.smoothing = config.smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch."""
        images, labels = batch.views
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        return functional.cross_entropy(model(images).float(), labels, label_smoothing=self.smoothing)
