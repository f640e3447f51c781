"""The transformer block of every model here: MAE's encoder and decoder, BEiT, SimMIM, and their encoders as backbones.

Pre-norm (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, Eq. 1-4), with what the methods add as
options: biases for queries and values but not for keys, a position bias on the scores that is given or the block's own,
layer scale (Touvron et al., "Going Deeper with Image Transformers", ICCV 2021), drop path, windows. Names and shapes of
the state dict are those of the official code of each method, so that weights move both ways.

common/attention.py reads `norm1`, `attn`, `attn.qkv`, `attn.attn_drop`, `attn.num_heads` and `attn.scale`.

B rows of the batch (images, or windows of all images)   T tokens of a row   D width   h heads   d = D/h
H, W patch grid, or side of a window   P prefix tokens (1 class token, or 0)   R = (2H-1)(2W-1) + 3P rows of a table
Q wanted tokens of a row (all T, or fewer in the last block of a model that reads no more)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.relative_position import relative_position_index, table_rows
from common.models.timm_layers import Mlp
from common.models.windows import Windows

LayerNorm = partial(nn.LayerNorm, eps=1e-6)

Places = Tensor | slice
"""Which tokens of a row: int64 [B, Q], each image its own, or a slice that all rows share."""


def take(tokens: Tensor, places: Places) -> Tensor:
    """tokens[b, places[b, q]]: [B, T, D] -> [B, Q, D]."""
    if isinstance(places, slice):
        return tokens[:, places]
    rows, length, width = tokens.shape
    first = torch.arange(rows, device=places.device)[:, None] * length
    # Whole rows at a time. `gather` goes number by number, and takes 6 to 10 times as long, forwards and backwards.
    return functional.embedding(places + first, tokens.reshape(rows * length, width))


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
            attention [B, h, T, T] after the softmax. True: in one kernel, that never holds it; `attn_drop` does not run. On a GPU
            some of torch's kernels add gradients up in an order that differs from run to run.
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

    def forward(self, tokens: Tensor, position_bias: Tensor | None = None, places: Places | None = None) -> Tensor:
        """Every token attends to all tokens of its row, or of its window.

        Args:
            tokens: [B, T, D].
            position_bias: added to the scores, [h, T, T]; not for a module with a table of its own.
            places: tokens that attend, and whose outputs are given; None: all. Not in windows.

        Returns:
            [B, Q, D].

        Raises:
            ValueError: places in windows, or a position bias beside a table.
        """
        if self.windows is None:
            return self.attend(tokens, position_bias, places)
        if places is not None:
            raise ValueError("attention in windows gives all tokens, not those at some places")
        return self.windows.join(self.attend(self.windows.cut(tokens), position_bias))

    def attend(self, tokens: Tensor, position_bias: Tensor | None = None, places: Places | None = None) -> Tensor:
        """Attention among all tokens of a row: [B, T, D] -> [B, Q, D]."""
        query, key, value = self.project(tokens, places)
        bias = self.score_bias(query, position_bias)
        if bias is not None and places is not None:
            bias = _bias_at(bias, places)
        mix = self.mix_fused if self.fused_attn else self.mix_explicit
        mixed = mix(query, key, value, bias)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def project(self, tokens: Tensor, places: Places | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, h, Q, d], keys and values [B, h, T, d] of tokens [B, T, D]; queries at the places only."""
        bias: Tensor = self.qkv.bias
        if not self.key_bias:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if places is None:
            qkv = self.qkv(tokens) if self.key_bias else self.qkv(tokens, bias)
            query, key, value = self._by_head(qkv, 3)
            return query, key, value
        weight, width = self.qkv.weight, self.width
        (query,) = self._by_head(functional.linear(take(tokens, places), weight[:width], bias[:width]), 1)
        key, value = self._by_head(functional.linear(tokens, weight[width:], bias[width:]), 2)
        return query, key, value

    def _by_head(self, projected: Tensor, parts: int) -> Tensor:
        """[B, T, parts*D] -> [parts, B, h, T, d]."""
        rows, length, _ = projected.shape
        return projected.reshape(rows, length, parts, self.num_heads, self.width // self.num_heads).permute(2, 0, 3, 1, 4)

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
        if bias is not None and bias.requires_grad and bias.device.type == "cpu" and torch.is_grad_enabled():
            # No kernel for CPUs gives the gradient of a bias, and what torch does instead is slower than the plain steps.
            scores = (query * self.scale) @ key.transpose(-2, -1) + bias
            return scores.softmax(dim=-1) @ value
        same_type = None if bias is None else bias.to(query.dtype)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=same_type)


def _bias_at(bias: Tensor, places: Places) -> Tensor:
    """Rows of a bias that all images share, for the queries at the places: [h, T, T] (or [1, h, T, T]) -> [B or 1, h, Q, T]."""
    by_query = bias.reshape(bias.shape[-3:]).transpose(0, 1)  # [T, h, T]
    if isinstance(places, slice):
        return by_query[places].transpose(0, 1)[None]
    length, heads, _ = by_query.shape
    rows = functional.embedding(places, by_query.reshape(length, heads * length))  # [B, Q, h*T]
    return rows.reshape(*places.shape, heads, length).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP four times as wide, each on a residual branch.

    Args:
        attention: of the block's width.
        layer_scale: first value of the learned factors on both branches, `gamma_1` and `gamma_2`; 0 leaves them out.
        drop_path: share of samples whose branch is dropped in training (Huang et al., "Deep Networks with Stochastic
            Depth", ECCV 2016); the others' branches are divided by 1 - `drop_path`. The draws are those of timm.

    Attributes:
        compiled: run by `torch.compile` where gradients are recorded. Without gradients, and while attention is read
            (`attn.fused_attn` is False), the block runs as it is written: maps are read by hooks, which a compiled block skips.
    """

    def __init__(self, attention: Attention, layer_scale: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        width = attention.width
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.norm1 = LayerNorm(width)
        self.attn = attention
        self.drop_path = drop_path
        self.norm2 = LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)
        self.compiled = False

    def forward(self, tokens: Tensor, position_bias: Tensor | None = None, places: Places | None = None) -> Tensor:
        """[B, T, D] -> [B, Q, D].

        Args:
            position_bias: as in :meth:`Attention.forward`.
            places: the tokens that are read afterwards; None: all. All others serve as keys and values only.
        """
        unread = self.attn.fused_attn and torch.is_grad_enabled()
        branches = _compiled_branches() if self.compiled and unread else Block.branches
        if not (self.training and self.drop_path):
            return branches(self, tokens, position_bias, places)
        first, second = self._draw_kept(tokens), self._draw_kept(tokens)
        if tokens.device.type == "cpu" and unread and not self.compiled:
            return self._kept_branches(tokens, position_bias, places, first, second)
        keep = 1 - self.drop_path
        return branches(self, tokens, position_bias, places, first / keep, second / keep)

    def branches(
        self,
        tokens: Tensor,
        position_bias: Tensor | None,
        places: Places | None,
        first: Tensor | None = None,
        second: Tensor | None = None,
    ) -> Tensor:
        """Both branches; `first` and `second` [B, 1, 1] are factors of a branch, one a sample."""
        attended = self._attended(tokens, position_bias, places)
        tokens = tokens if places is None else take(tokens, places)
        tokens = tokens + (attended if first is None else attended * first)
        mixed = self._mixed(tokens)
        return tokens + (mixed if second is None else mixed * second)

    def _attended(self, tokens: Tensor, position_bias: Tensor | None, places: Places | None) -> Tensor:
        return _scaled(self.attn(self.norm1(tokens), position_bias, places), self.gamma_1)

    def _mixed(self, tokens: Tensor) -> Tensor:
        return _scaled(self.mlp(self.norm2(tokens)), self.gamma_2)

    # --- drop path ---

    def _draw_kept(self, tokens: Tensor) -> Tensor:
        """1 for samples that keep a branch, 0 for the others: [B, 1, 1], drawn in the type of the branch as timm does."""
        device = tokens.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # not on the meta device
        kind = torch.get_autocast_dtype(device) if mixed else tokens.dtype
        if self.gamma_1 is not None:
            kind = torch.promote_types(kind, self.gamma_1.dtype)
        return (torch.rand(len(tokens), 1, 1, dtype=kind, device=tokens.device) + (1 - self.drop_path)).floor()

    def _kept_branches(
        self, tokens: Tensor, position_bias: Tensor | None, places: Places | None, first: Tensor, second: Tensor
    ) -> Tensor:
        """Both branches, each computed for the samples that keep it. On a GPU it would wait for their number."""
        rows = _kept_rows(first)
        part = None if places is None else places if isinstance(places, slice) else places.index_select(0, rows)
        attended = self._attended(tokens.index_select(0, rows), position_bias, part)
        tokens = self._add(tokens if places is None else take(tokens, places), rows, attended, first)
        rows = _kept_rows(second)
        return self._add(tokens, rows, self._mixed(tokens.index_select(0, rows)), second)

    def _add(self, tokens: Tensor, rows: Tensor, branch: Tensor, kept: Tensor) -> Tensor:
        branch = branch.div(1 - self.drop_path)
        if len(rows) == 1:
            branch = branch * kept[rows]  # the one row may be there for its parameters' sake only
        kind = torch.promote_types(tokens.dtype, branch.dtype)
        return tokens.to(kind).index_add(0, rows, branch.to(kind))


def _kept_rows(kept: Tensor) -> Tensor:
    """Samples that keep a branch; the first where none does, so that its parameters have gradients on every rank."""
    rows = kept.flatten().nonzero()[:, 0]
    return rows if len(rows) else rows.new_zeros(1)


def _scaled(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else gamma * branch


MOST_GRAPHS = 32
"""Compiled forms of a block that a run may need: sizes, with and without drop path, the lengths of uneven masks."""


def compile_blocks(model: nn.Module) -> None:
    """Has the blocks of a model compiled when they first run, or the whole model where it has none."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        block.compiled = True
    if not blocks:
        model.compile()


@cache
def _compiled_branches() -> Callable[..., Any]:
    """Blocks of equal sizes share one compiled function. Shapes are fixed: a decoder's differ from its encoder's for good."""
    import torch._dynamo  # a second or two, for runs that compile alone

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_GRAPHS)
    return torch.compile(Block.branches, dynamic=False, fullgraph=True)
