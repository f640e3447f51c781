"""SimMIM (Xie et al., "SimMIM: a Simple Framework for Masked Image Modeling", CVPR 2022) with a ViT.

The encoder sees a mask token in the place of every masked patch; one linear layer predicts raw pixels, and the
masked ones are compared by L1. Names and shapes of the state dict are those of the official `models/simmim.py`
(microsoft/SimMIM) with its ViT, so checkpoints move both ways.

B batch   H, W patch grid   N = H*W patches   D width   p patch size in pixels   P = H*p, Q = W*p pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.attention import Layers, Values
from common.masks import masked_places, pixel_mask
from common.models.block import take
from common.models.mask_token_encoder import MaskTokenEncoder
from common.signals import Graph

EMPTY = 1e-5
"""By which the official code keeps its division defined for an empty mask; kept, for equal losses."""


class SimMIM(nn.Module):
    """Masked patches -> their pixels.

    Args:
        encoder: sizes of the encoder, see :class:`MaskTokenEncoder`.
    """

    num_prefix_tokens = MaskTokenEncoder.num_prefix_tokens
    no_weight_decay = tuple(f"encoder.{name}" for name in MaskTokenEncoder.no_weight_decay)

    def __init__(self, **encoder: Any) -> None:
        super().__init__()
        self.encoder = MaskTokenEncoder(**encoder)
        self.grid_size, self.patch_size = self.encoder.grid_size, self.encoder.patch_size
        pixels = nn.Conv2d(self.encoder.width, 3 * self.patch_size**2, kernel_size=1)
        self.decoder = nn.Sequential(pixels, nn.PixelShuffle(self.patch_size))

    def attention_maps(self, images: Tensor, layers: Layers = "all", values: Values = "softmax") -> Iterator[Tensor]:
        """Attention of the encoder on whole images, one [B, h, 1+N, 1+N] a block."""
        return self.encoder.attention_maps(images, layers, values)

    def signal(
        self, images: Tensor, graph: Graph = "attention", layers: Layers = "all", values: Values = "softmax"
    ) -> Iterator[Tensor]:
        """Attention, tokens, queries, keys or values of the encoder on whole images; see :func:`stream_signal`."""
        return self.encoder.signal(images, graph, layers, values)

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicted pixels of all patches: [B, 3, P, Q]."""
        tokens = self.encoder.encode(images, mask)  # [B, N, D]
        return self.decoder(tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid_size))

    def reconstruct_at(self, images: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Predicted pixels of the patches `places` [B, Q] alone: [B, Q, 3*p*p], colours outermost."""
        pixels: Any = self.decoder[0]
        return functional.linear(self.encoder.encode(images, mask, places), pixels.weight.flatten(1), pixels.bias)

    def forward(self, images: Tensor, mask: Tensor, predicted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructs the image and compares the masked pixels.

        Args:
            images: [B, 3, P, Q].
            mask: bool [B, N], True = masked; counts may differ between images.
            predicted: bool [B, N], the masked patches that are predicted and compared, and no others; None: all patches
                are predicted, the masked ones compared. The mask itself gives the same loss sooner.

        Returns:
            The mean absolute error over the masked (or the chosen) pixels, a scalar, and the prediction [B, 3, P, Q], or
            that of the chosen patches [B, most of an image, 3*p*p], filled up where an image has fewer.
        """
        if predicted is None:
            prediction = self.reconstruct(images, mask)
            return masked_l1(prediction.float(), images.float(), mask, self.grid_size), prediction
        places, real = masked_places(predicted)
        prediction = self.reconstruct_at(images, mask, places)
        target = take(self.patchify(images.float()), places)
        error = (prediction.float() - target).abs()
        if real is not None:
            error = torch.where(real[..., None], error, 0.0)
        return error.sum() / (predicted.sum() * self.patch_size**2 + EMPTY) / 3, prediction

    def patchify(self, images: Tensor) -> Tensor:
        """[B, 3, H*p, W*p] -> [B, N, 3*p*p], colours outermost."""
        (down, across), size = self.grid_size, self.patch_size
        cut = images.reshape(len(images), 3, down, size, across, size)
        return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def masked_l1(prediction: Tensor, target: Tensor, mask: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Mean absolute error over the pixels of masked patches.

    Args:
        prediction, target: [B, 3, P, Q].
        mask: bool [B, N].
    """
    height, width = grid_size
    masked = pixel_mask(mask, height, width, target.shape[-1] // width)[:, None]  # [B, 1, P, Q]
    error = torch.where(masked, (prediction - target).abs(), 0.0)
    return error.sum() / (masked.sum() + EMPTY) / target.shape[1]


# The base model of the official code, and ViT-S of the paper's Table 4 (384 wide, 12 deep, 6 heads). The tiny models
# are this project's, for 32-pixel images and for the demo.
MODELS: dict[str, Callable[..., SimMIM]] = {
    "simmim_vit_tiny_patch4": partial(SimMIM, patch_size=4, width=192, depth=12, heads=3),
    "simmim_vit_tiny_patch8": partial(SimMIM, patch_size=8, width=192, depth=12, heads=3),
    "simmim_vit_small_patch16": partial(SimMIM, patch_size=16, width=384, depth=12, heads=6),
    "simmim_vit_base_patch16": partial(SimMIM, patch_size=16, width=768, depth=12, heads=12),
}
