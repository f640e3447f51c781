"""Classes of all pixels of an image of any size, from a model that takes one size: by windows, or squeezed into it.

B images   n windows   C classes   H, W height and width of an image   h, w those of the model's input
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.segmentation.data import cover_size, window_starts
from downstream.segmentation.upernet import resized


@dataclass(frozen=True)
class Predictor:
    """Images of any size -> a class for each of their pixels.

    `slide`: the image is resized, its shape kept, to just cover the input size times a scale, and windows of the input
    size are laid over it, the last of a row or column ending with the image. Logits are averaged where windows overlap.
    Scales below 1 count as 1, for the encoder takes full windows only; so BEiT's multi-scale evaluation does.
    `whole`: the image is squeezed to the input size, whatever its shape.

    Logits are resized to the image before anything else is done with them; softmax is averaged over scales and flips.

    Attributes:
        size: (h, w).
        strides: pixels between windows, down and across.
        batch_size: windows in a forward pass.
    """

    size: tuple[int, int]
    strides: tuple[int, int]
    slide: bool = True
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    batch_size: int = 16

    def __call__(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """Normalised images [3, H, W], of different sizes, -> classes int64 [H, W] of each."""
        return [shares.argmax(dim=0) for shares in self.probabilities(model, images)]

    def probabilities(self, model: nn.Module, images: Sequence[Tensor]) -> list[Tensor]:
        """As above -> [C, H, W] of each, which sum to 1 over classes."""
        views = Counter(max(scale, 1.0) for scale in self.scales)
        total = [torch.zeros((), device=images[0].device) for _ in images]
        weight = 1 / (len(self.scales) * (1 + self.flip))
        for scale, times in views.items():
            for flip in (False, True) if self.flip else (False,):
                inputs = [image.flip(-1) for image in images] if flip else images
                for i, logits in enumerate(self._logits(model, inputs, scale)):
                    full = resized((logits.flip(-1) if flip else logits)[None], images[i].shape[-2:])[0]
                    total[i] = total[i] + weight * times * full.softmax(dim=0)
        return total

    def _logits(self, model: nn.Module, images: Sequence[Tensor], scale: float) -> list[Tensor]:
        """[C, ...] of each image, in the size it was looked at."""
        if self.slide:
            return [self.slid(model, image, scale) for image in images]
        return list(self._forward(model, torch.stack([shrunk(image, self.size) for image in images])))

    def slid(self, model: nn.Module, image: Tensor, scale: float) -> Tensor:
        """Logits of one image [3, H, W] from windows: [C, ...] of :func:`cover_size`."""
        height, width = self.size
        image = shrunk(image, cover_size((image.shape[1], image.shape[2]), self.size, scale))
        places = [
            (slice(top, top + height), slice(left, left + width))
            for top in window_starts(image.shape[1], height, self.strides[0])
            for left in window_starts(image.shape[2], width, self.strides[1])
        ]
        logits = self._forward(model, torch.stack([image[:, rows, columns] for rows, columns in places]))
        total, count = logits.new_zeros(logits.shape[1], *image.shape[1:]), logits.new_zeros(image.shape[1:])
        for (rows, columns), window_logits in zip(places, logits, strict=True):
            total[:, rows, columns] += window_logits
            count[rows, columns] += 1
        return total / count

    def _forward(self, model: nn.Module, windows: Tensor) -> Tensor:
        """[n, 3, h, w] -> logits fp32 [n, C, h, w]."""
        return torch.cat([resized(model(part)[0].float(), self.size) for part in torch.split(windows, self.batch_size)])


def shrunk(image: Tensor, size: tuple[int, int]) -> Tensor:
    """[3, H, W] -> [3, *size], bilinear with antialiasing as in training."""
    if image.shape[-2:] == size:
        return image
    return functional.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]
