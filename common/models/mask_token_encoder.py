"""The encoder that BEiT and SimMIM share: a ViT that sees a mask token in the place of every masked patch.

No absolute positions; one relative position bias for all blocks. Names and shapes of the state dict are those of
the official code of both.

B batch   H, W patch grid   N = H*W patches   T = 1 + N tokens   D width   h heads   p patch size in pixels
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from common.attention import Layers, Values, stream_attention
from common.models.names import patch_grid
from common.models.relative_position import BiasedBlock, LayerNorm, RelativePositionBias
from common.models.timm_layers import PatchEmbed, trunc_normal_

INIT_STD = 0.02


class MaskTokenEncoder(nn.Module):
    """ViT with a mask token and a shared relative position bias.

    Args:
        input_size: (height, width) of the images in pixels, multiples of `patch_size`.
        patch_size: p, pixels.
        width, depth, heads: D, number of blocks, h.
        drop_path: rate at the last block; it grows linearly from 0 at the first.
        layer_scale: first value of the learned factors on the branches; 0 leaves them out.

    Raises:
        ValueError: an input size that the patch size does not divide.
    """

    num_prefix_tokens = 1
    no_weight_decay: tuple[str, ...] = ("cls_token",)
    """Parameters without weight decay besides biases and norms (common/training/optim.py)."""

    def __init__(
        self,
        input_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.1,
        layer_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid_size = patch_grid(input_size, patch_size)
        self.patch_size, self.width = patch_size, width
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbed(input_size, patch_size, 3, width)
        self.rel_pos_bias = RelativePositionBias(self.grid_size, heads)
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(BiasedBlock(width, heads, layer_scale, rate) for rate in rates)
        self.norm = LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See :func:`reset_as_beit`."""
        reset_as_beit(self, self.blocks, (self.cls_token, self.mask_token))

    def embed(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Class token and patch embeddings, the mask token where `mask` [B, N] is True: [B, T, D]."""
        tokens = self.patch_embed(images)
        if mask is not None:
            tokens = torch.where(mask[..., None], self.mask_token, tokens)
        return torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)

    def encode(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalised tokens of the patches, without the class token: [B, N, D]."""
        tokens, bias = self.embed(images, mask), self.rel_pos_bias()
        for block in self.blocks:
            tokens = block(tokens, bias)
        return self.norm(tokens)[:, 1:]

    def attention_maps(self, images: Tensor, layers: Layers = "all", values: Values = "softmax") -> Iterator[Tensor]:
        """Attention on whole images, one [B, h, T, T] a block, as the blocks run; scores too hold the position bias."""
        bias = self.rel_pos_bias()
        for attention in stream_attention(self.blocks, self.embed(images), layers, values, position_bias=bias):
            yield attention if values == "softmax" else attention + bias


def reset_as_beit(encoder: nn.Module, blocks: Iterable[nn.Module], tokens: Iterable[nn.Parameter]) -> None:
    """Normal weights cut at one standard deviation; branches of block i scaled by 1/sqrt(2i) (BEiT, Sec. 2.5)."""
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in tokens:
        init_normal(token)
    for number, block in enumerate(blocks, start=1):
        for name in ("attn.proj.weight", "mlp.fc2.weight"):
            block.get_parameter(name).data.div_(math.sqrt(2 * number))


def init_normal(weight: Tensor) -> None:
    """Normal with standard deviation 0.02, cut at one standard deviation as in the official code of both methods."""
    trunc_normal_(weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
