"""The transformer block of every model here: MAE's encoder and decoder, BEiT, SimMIM, and their encoders as backbones.

Pre-norm (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, Eq. 1-4), with what the methods add as
options: biases for queries and values but not for keys, a position bias on the scores that is given or the block's own,
layer scale (Touvron et al., "Going Deeper with Image Transformers", ICCV 2021), drop path, windows. Names and shapes of
the state dict are those of the official code of each method, so that weights move both ways.

common/attention.py reads `norm1`, `attn`, `attn.qkv`, `attn.attn_drop`, `attn.num_heads` and `attn.scale`.

B rows of the batch (images, or windows of all images)   T tokens of a row   D width   h heads   d = D/h
H, W patch grid, or side of a window   P prefix tokens (1 class token, or 0)   R = (2H-1)(2W-1) + 3P rows of a table
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.relative_position import relative_position_index, table_rows
from common.models.timm_layers import DropPath, Mlp
from common.models.windows import Windows

LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class BiasedLinear(nn.Linear):
    """A linear layer that is given its bias at each call (keys have none, so the three biases are not one parameter)."""

    def forward(self, tokens: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(tokens, self.weight, bias)


class Attention(nn.Module):
    """Multi-head self-attention.

    Args:
        width, heads: D, h.
        key_bias: one bias for queries, keys and values as in MAE (`qkv.bias`); False: queries and values have one each,
            keys none, as in BEiT and SimMIM (`q_bias`, `v_bias`).
        table_grid: (H, W) that a table of relative position biases of this module's own covers, the grid or a window;
            None: no table.
        prefix_tokens: P, tokens before the patches that the table has rows for.
        windows: attention within windows of the grid; None: among all tokens.
        fused: start value of the attribute `fused_attn`.

    Attributes:
        fused_attn: chooses how attention is computed. False: step by step, through `attn_drop`, where a hook sees the
            attention [B, h, T, T] after the softmax. True: in one kernel, that never holds it; `attn_drop` does not run.
            (timm has called it so since 0.9.)

    Raises:
        ValueError: heads that do not divide the width.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        key_bias: bool = True,
        table_grid: tuple[int, int] | None = None,
        prefix_tokens: int = 1,
        windows: Windows | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.width, self.num_heads, self.scale = width, heads, (width // heads) ** -0.5
        self.key_bias, self.table_grid, self.fused_attn = key_bias, table_grid, fused
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(width))
            self.v_bias = nn.Parameter(torch.zeros(width))
        if table_grid is not None:
            self._add_table(table_grid, prefix_tokens)
        self.qkv = nn.Linear(width, 3 * width) if key_bias else BiasedLinear(width, 3 * width, bias=False)
        self.attn_drop = nn.Identity()
        self.proj = nn.Linear(width, width)
        self.windows = windows

    def _add_table(self, grid: tuple[int, int], prefix: int) -> None:
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(*grid, prefix), self.num_heads))  # [R, h]
        # The class token is the first, and the last three rows of the table are its: both go together. Saved as the
        # official code does, but not where that has no such layout and a large grid would fill checkpoints.
        index = relative_position_index(*grid)[1 - prefix :, 1 - prefix :]
        self.register_buffer("relative_position_index", index.contiguous(), persistent=prefix > 0)

    def forward(self, tokens: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """Every token attends to all tokens of its row, or of its window.

        Args:
            tokens: [B, T, D].
            position_bias: added to the scores, [h, T, T]; not for a module with a table of its own.

        Returns:
            [B, T, D].
        """
        if self.windows is None:
            return self.attend(tokens, position_bias)
        return self.windows.join(self.attend(self.windows.cut(tokens), position_bias))

    def attend(self, tokens: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """Attention among all tokens of a row: [B, T, D] -> [B, T, D]."""
        rows, length, width = tokens.shape
        qkv = self.project(tokens).reshape(rows, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, h, T, d]
        bias = self.score_bias(query, position_bias)
        mix = self.mix_fused if self.fused_attn else self.mix_explicit
        mixed = mix(query, key, value, bias)
        return self.proj(mixed.transpose(1, 2).reshape(rows, length, width))

    def project(self, tokens: Tensor) -> Tensor:
        """Queries, keys and values: [B, T, D] -> [B, T, 3*D]."""
        if self.key_bias:
            return self.qkv(tokens)
        return self.qkv(tokens, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]))

    def score_bias(self, query: Tensor, position_bias: Tensor | None) -> Tensor | None:
        """What is added to the scores, [1 or B, h or 1, T or 1, T] or [h, T, T]; None: nothing is."""
        bias = position_bias
        if self.table_grid is not None:
            if position_bias is not None:
                raise ValueError("position_bias is given to an attention that has a table of its own")
            # Gathered in the type and memory layout that the fast kernels take: at 64 x 64 patches this is what is large.
            bias = self.relative_position_bias_table.t().to(query.dtype)[:, self.relative_position_index][None]
        return bias if self.windows is None else self.windows.close_padding(bias, query)

    def mix_explicit(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """softmax(query key^T / sqrt(d) + bias) value, step by step: [B, h, T, d]."""
        keys = key.transpose(-2, -1)
        # The factor is where the official code of each method has it: the other place rounds differently.
        scores = (query @ keys) * self.scale if self.key_bias else (query * self.scale) @ keys
        if bias is not None:
            scores = scores + bias
        attention = self.attn_drop(scores.softmax(dim=-1))  # [B, h, T, T]
        return attention @ value

    def mix_fused(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """The same in one kernel, without `attn_drop`."""
        same_type = None if bias is None else bias.to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=same_type)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP four times as wide, each on a residual branch.

    Args:
        attention: of the block's width.
        layer_scale: first value of the learned factors on both branches, `gamma_1` and `gamma_2`; 0 leaves them out.
        drop_path: share of samples whose branch is dropped in training.
    """

    def __init__(self, attention: Attention, layer_scale: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        width = attention.width
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.norm1 = LayerNorm(width)
        self.attn = attention
        self.drop_path: nn.Module = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, tokens: Tensor, position_bias: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `position_bias` as in :meth:`Attention.forward`."""
        attended = self.attn(self.norm1(tokens), position_bias)
        tokens = tokens + self.drop_path(_scaled(attended, self.gamma_1))
        return tokens + self.drop_path(_scaled(self.mlp(self.norm2(tokens)), self.gamma_2))


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch
