"""UperNet on a plain ViT, for semantic segmentation (Xiao et al., "Unified Perceptual Parsing", ECCV 2018, Sec. 3).

    images -> encoder -> tokens after four blocks -> neck: maps at 4, 2, 1 and 1/2 times the patch grid
           -> decoder: pyramid pooling on the coarsest, top-down pathway, all fused at the finest -> logits
           -> auxiliary head on the map of the third block -> logits, in training only

The four blocks and the neck are those of BEiT's segmentation (microsoft/unilm, beit/semantic_segmentation), which MAE's
published recipes share. Sizes and start values follow mmsegmentation's UPerHead and FCNHead, but for convolutions, which
start as He et al. (ICCV 2015) say.

B batch   height, width of the images   H, W patch grid   D width of the encoder   E width of the decoder   C classes
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.vit import BackboneViT

NormKind = Literal["batch", "group"]

POOLS = (1, 2, 3, 6)
"""Sides of the grids that pyramid pooling averages over (Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017)."""

_MOST_GROUPS, _FEWEST_CHANNELS = 32, 8


class UperNet(nn.Module):
    """Encoder, neck, decoder and auxiliary head.

    Args:
        encoder: with a patch grid of 2x2 or more.
        classes: C.
        channels: E; 0 for the encoder's width D.
        auxiliary_channels: width of the auxiliary head.
        norm: of neck and heads. "batch" is the published one, and makes the output of an image in training depend on its
            batch; "group", at most 32 groups, does not.
        dropout: share of channels dropped before each classifier, in training.

    Raises:
        ValueError: a patch grid too small for the coarsest map.
    """

    def __init__(
        self,
        encoder: BackboneViT,
        classes: int,
        channels: int = 0,
        auxiliary_channels: int = 256,
        norm: NormKind = "batch",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(encoder.grid_size) < 2:
            raise ValueError(f"a patch grid of {encoder.grid_size[0]}x{encoder.grid_size[1]} has no map at half its size")
        self.encoder, self.blocks = encoder, feature_blocks(encoder.depth)
        width = encoder.width
        self.neck = Neck(width, norm)
        self.decoder = Decoder(width, channels or width, classes, norm, dropout)
        self.auxiliary = nn.Sequential(
            convolution(width, auxiliary_channels, 3, norm), nn.Dropout2d(dropout), classifier(auxiliary_channels, classes)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, height, width] -> logits [B, C, 4H, 4W], and in training those of the auxiliary head [B, C, H, W]."""
        maps = self.neck(self.features(images))
        return self.decoder(maps), self.auxiliary(maps[2]) if self.training else None

    def features(self, images: Tensor) -> list[Tensor]:
        """[B, 3, height, width] -> tokens of the patches after each of `blocks`, as maps [B, D, H, W]."""
        encoder = self.encoder
        outputs = encoder(images, self.blocks)
        return [tokens[:, encoder.num_prefix_tokens :].mT.unflatten(2, encoder.grid_size).contiguous() for tokens in outputs]


def feature_blocks(depth: int) -> tuple[int, ...]:
    """The blocks (0-based) whose tokens are taken: at a third, a half, two thirds and the end of the depth.

    That is 3, 5, 7, 11 of 12 and 7, 11, 15, 23 of 24 as in BEiT's configurations; 32 blocks, for which it has none,
    give 10, 15, 20, 31.
    """
    return tuple(max(round(depth * share) - 1, 0) for share in (1 / 3, 1 / 2, 2 / 3, 1))


class Neck(nn.Module):
    """Four maps [B, D, H, W] -> at 4, 2, 1 and 1/2 times the size: learned upsampling, and the maximum of 2x2."""

    def __init__(self, width: int, norm: NormKind) -> None:
        super().__init__()
        twice = [_double(width), make_norm(norm, width), nn.GELU(), _double(width)]
        self.scales = nn.ModuleList([nn.Sequential(*twice), _double(width), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Finest first."""
        return [scale(features) for scale, features in zip(self.scales, maps, strict=True)]


class PyramidPooling(nn.Module):
    """[B, D, h, w] -> [B, E, h, w]: averages over grids of several sides, each a map again, beside the map itself."""

    def __init__(self, width: int, channels: int, norm: NormKind) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), convolution(width, channels, 1, norm)) for side in POOLS
        )
        self.fuse = convolution(width + len(POOLS) * channels, channels, 3, norm)

    def forward(self, coarsest: Tensor) -> Tensor:
        return self.fuse(torch.cat([coarsest, *(resized(stage(coarsest), coarsest.shape[-2:]) for stage in self.stages)], dim=1))


class Decoder(nn.Module):
    """Maps, finest first -> logits at the size of the finest."""

    def __init__(self, width: int, channels: int, classes: int, norm: NormKind, dropout: float) -> None:
        super().__init__()
        self.pooling = PyramidPooling(width, channels, norm)
        self.lateral = nn.ModuleList(convolution(width, channels, 1, norm) for _ in range(3))
        self.smooth = nn.ModuleList(convolution(channels, channels, 3, norm) for _ in range(3))
        self.fuse = convolution(4 * channels, channels, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classify = classifier(channels, classes)

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = self.pathway(maps)
        finest = levels[0].shape[-2:]
        fused = self.fuse(torch.cat([levels[0], *(resized(level, finest) for level in levels[1:])], dim=1))
        return self.classify(self.dropout(fused))

    def pathway(self, maps: list[Tensor]) -> list[Tensor]:
        """Each map plus the upsampled sum of the coarser ones (Lin et al., "Feature Pyramid Networks", CVPR 2017)."""
        summed = [self.pooling(maps[-1])]
        for finer, lateral in reversed(list(zip(maps[:-1], self.lateral, strict=True))):
            summed.insert(0, lateral(finer) + resized(summed[0], finer.shape[-2:]))
        return [*(smooth(level) for smooth, level in zip(self.smooth, summed[:-1], strict=True)), summed[-1]]


def resized(maps: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear, with pixels as squares and not as points (align_corners=False): [B, C, h, w] -> [B, C, *size]."""
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def make_norm(norm: NormKind, channels: int) -> nn.Module:
    """A norm of that kind. Groups have 8 channels or more: of a map of one cell, which pooling makes, few would leave nothing."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    groups = math.gcd(_MOST_GROUPS, channels, max(1, channels // _FEWEST_CHANNELS))
    return nn.GroupNorm(groups, channels)


def convolution(width: int, channels: int, side: int, norm: NormKind) -> nn.Sequential:
    """Convolution that keeps the size, norm, ReLU."""
    layer = nn.Conv2d(width, channels, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, make_norm(norm, channels), nn.ReLU())


def classifier(channels: int, classes: int) -> nn.Conv2d:
    """Logits of each place, near zero at the start."""
    layer = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _double(width: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)
