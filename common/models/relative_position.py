"""Transformer block with a relative position bias, as BEiT and SimMIM use it.

Relative positions follow Swin (Liu et al., ICCV 2021): one learned number for each head and each offset between
two patches; three more rows of the table serve the class token. Names and shapes of the state dict are those of
the official BEiT and SimMIM code, so that weights move both ways.

B batch   H, W patch grid   N = H*W patches   T = 1 + N tokens   D width   h heads   d = D/h
R = (2H-1)(2W-1) + 3 rows of the table
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.timm_layers import DropPath, Mlp

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


def relative_position_index(height: int, width: int) -> Tensor:
    """Row of the table for each pair of tokens, query first: int64 [T, T].

    Patch to patch: (row_i - row_j + H - 1) * (2W - 1) + (column_i - column_j + W - 1). The last three rows of the
    table are for class token to patch, patch to class token, and class token to itself.
    """
    places = torch.arange(height * width)
    rows, columns = places // width, places % width
    down = rows[:, None] - rows + height - 1
    across = columns[:, None] - columns + width - 1
    offsets = (2 * height - 1) * (2 * width - 1)
    index = torch.empty(1 + len(places), 1 + len(places), dtype=torch.int64)
    index[1:, 1:] = down * (2 * width - 1) + across
    index[0, :], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


class RelativePositionBias(nn.Module):
    """The bias that all blocks of an encoder share.

    Args:
        grid_size: (H, W).
        heads: h.
    """

    relative_position_index: Tensor

    def __init__(self, grid_size: tuple[int, int], heads: int) -> None:
        super().__init__()
        height, width = grid_size
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * height - 1) * (2 * width - 1) + 3, heads))  # [R, h]
        self.register_buffer("relative_position_index", relative_position_index(height, width))

    def forward(self) -> Tensor:
        """The number to add to each score: [h, T, T]."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()


class BiasedLinear(nn.Linear):
    """A linear layer that is given its bias at each call (keys have none, so the three biases are not one parameter)."""

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(tokens, self.weight, bias)


class BiasedAttention(nn.Module):
    """Multi-head attention with a bias for queries and values but not for keys, and a position bias on the scores.

    `attn_drop` sees the attention after the softmax, `qkv` gives queries, keys and values: what
    common/attention.py reads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.qkv = BiasedLinear(width, 3 * width, bias=False)
        self.attn_drop = nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `position_bias` is [h, T, T]."""
        batch, length, width = tokens.shape
        biases = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = self.qkv(tokens, biases).reshape(batch, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, T, d]
        scores = (query * self.scale) @ key.transpose(-2, -1)
        if position_bias is not None:
            scores = scores + position_bias
        attention = self.attn_drop(scores.softmax(dim=-1))  # [B, h, T, T]
        mixed = (attention @ value).transpose(1, 2).reshape(batch, length, width)
        return self.proj(mixed)


class BiasedBlock(nn.Module):
    """Pre-norm transformer block with a position bias, layer scale and drop path.

    Args:
        layer_scale: first value of the learned factors on both branches; None or 0 leaves them out.
        drop_path: share of samples whose branch is dropped in training.
        attention: takes the place of BiasedAttention; called as `attention(tokens, position_bias)`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.norm1 = LayerNorm(width)
        self.attn = attention or BiasedAttention(width, heads)
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, tokens: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        attended = self.attn(self.norm1(tokens), position_bias)
        tokens = tokens + self.drop_path(_scaled(attended, self.gamma_1))
        return tokens + self.drop_path(_scaled(self.mlp(self.norm2(tokens)), self.gamma_2))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch
