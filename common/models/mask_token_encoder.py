"""The encoder that BEiT and SimMIM share: a ViT that sees a mask token in the place of every masked patch.

No absolute positions; one relative position bias for all blocks. Names and shapes of the state dict are those of
the official code of both.

B batch   H, W patch grid   N = H*W patches   T = 1 + N tokens   D width   h heads   p patch size in pixels
Q wanted patches of an image
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.attention import Layers, Values
from common.models.block import Attention, Block, LayerNorm
from common.models.initialisation import reset_as_beit
from common.models.names import patch_grid
from common.models.relative_position import RelativePositionBias
from common.models.timm_layers import PatchEmbed
from common.signals import Graph, stream_signal


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
        self.blocks = nn.ModuleList(
            Block(Attention(width, heads, key_bias=False, fused=True), layer_scale, rate) for rate in rates
        )
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

    def encode(self, images: Tensor, mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Normalised tokens of the patches, without the class token: [B, N, D].

        Args:
            places: int64 [B, Q], the patches whose tokens are wanted: [B, Q, D] is returned. The last block computes
                queries and MLP for these alone.
        """
        tokens, bias = self.embed(images, mask), self.rel_pos_bias()
        for block in self.blocks[:-1]:
            tokens = block(tokens, bias)
        if places is None:
            return self.norm(self.blocks[-1](tokens, bias))[:, 1:]
        return self.norm(self.blocks[-1](tokens, bias, places + 1))

    def attention_maps(self, images: Tensor, layers: Layers = "all", values: Values = "softmax") -> Iterator[Tensor]:
        """Attention on whole images, one [B, h, T, T] a block, as the blocks run; scores too hold the position bias."""
        return self.signal(images, "attention", layers, values)

    def signal(
        self, images: Tensor, graph: Graph = "attention", layers: Layers = "all", values: Values = "softmax"
    ) -> Iterator[Tensor]:
        """Attention, tokens, queries, keys or values on whole images; see :func:`stream_signal`."""
        bias = self.rel_pos_bias()
        scores = graph == "attention" and values == "scores"
        for block_signal in stream_signal(self.blocks, self.embed(images), graph, layers, values, position_bias=bias):
            yield block_signal + bias if scores else block_signal
