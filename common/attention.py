"""Attention of the encoder being trained -> patch graph (Eq. 7).

B batch   L blocks (layers) of the encoder   h heads   P prefix tokens (class token)   N patches
T = P + N tokens   D features of a graph row (N, or h*N with heads side by side)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .heads import Heads, best_heads, cosine_similarity, head_scores, take_heads

Layers = Literal["all", "last"] | Sequence[int]
Values = Literal["softmax", "scores"]
Direction = Literal["row", "column", "symmetric"]


def choose_layers(layers: Layers, depth: int) -> list[int]:
    """Indices of the chosen blocks, ascending. Negative indices count from the end.

    Raises:
        ValueError: an index outside the encoder, an empty list, or an unknown word.
    """
    if layers == "all":
        return list(range(depth))
    if layers == "last":
        return [depth - 1]
    if isinstance(layers, str):
        raise ValueError(f"layers must be 'all', 'last' or a list of block indices, not {layers!r}")
    wrong = [i for i in layers if not -depth <= i < depth]
    if wrong:
        raise ValueError(f"layers {wrong} do not exist: the encoder has {depth} blocks")
    if not layers:
        raise ValueError("layers is an empty list: at least one block is needed")
    return sorted({i % depth for i in layers})


class AttentionTap:
    """Reads the softmaxed attention of transformer blocks while they run.

    A forward pre-hook on each block's `attn.attn_drop` sees the attention before dropout and changes nothing.
    That is the seam of timm 0.4.12 blocks, and of the blocks of the official MAE, BEiT and SimMIM code.

        with AttentionTap(model.blocks, layers="last") as tap:
            model(images)
        tap.maps[0]  # [B, h, T, T]

    Fused attention (`scaled_dot_product_attention`, flash attention) never makes the map, and so never runs
    `attn_drop`. Where `attn.fused_attn` says so (ours, timm 1.x), it is turned off in the chosen blocks while maps are
    read, and given back; a block that is fused without that attribute is an error, which names it.

    Args:
        blocks: the encoder's blocks; each needs `attn.attn_drop`. A block that stands there twice is read at each run.
        layers: "all", "last" or a list of block indices.
        values: "softmax", or "scores" for the scaled dot products before the softmax. Scores are computed from
            the output of the module `attn.qkv` ([B, T, 3*h*d], order q, k, v); a bias that a block adds to its
            scores by itself is not in them.

    Raises:
        TypeError: a block without the needed modules, naming it.
        RuntimeError: when the tap is closed, a chosen block whose attention ran without the module that is read, or
            that did not run while others did, naming it.
    """

    def __init__(self, blocks: Iterable[nn.Module], layers: Layers = "all", values: Values = "softmax") -> None:
        if values not in ("softmax", "scores"):
            raise ValueError(f"values must be 'softmax' or 'scores', not {values!r}")
        encoder = list(blocks)
        self.values = values
        self.ends_the_pass = False  # see stream_attention
        self.blocks: list[nn.Module] = []
        self._indices: list[int] = []  # of the chosen blocks in the encoder
        for index in choose_layers(layers, len(encoder)):
            if not any(encoder[index] is block for block in self.blocks):
                self.blocks.append(encoder[index])
                self._indices.append(index)
        self._maps: list[Tensor] = []
        self._reads = [0] * len(self.blocks)  # maps that each block gave
        self._runs = [0] * len(self.blocks)  # runs of its attention
        self._handles: list[Any] = []
        self._unfused: list[Any] = []  # attention modules whose fused attention is off while the tap is open

    @property
    def maps(self) -> list[Tensor]:
        """One detached [B, h, T, T] tensor for each chosen block and forward pass, in the order of execution.

        Raises:
            RuntimeError: no chosen block ran inside the tap, or one ran without giving its map.
        """
        self._check_read()
        if not any(self._reads):
            raise RuntimeError(f"no attention was read: none of the {len(self.blocks)} chosen blocks ran inside the tap")
        return self._maps

    def __enter__(self) -> AttentionTap:
        try:
            for place in range(len(self.blocks)):
                self._hook(place)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._remove()
        if kind is None:
            self._check_read()
            self._check_all_ran()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for attention in self._unfused:
            attention.fused_attn = True
        self._unfused.clear()

    def _hook(self, place: int) -> None:
        attention = self._attention(place, "attn_drop")
        if self.values == "softmax":
            self._handles.append(attention.attn_drop.register_forward_pre_hook(self._read_softmax(place)))
        else:
            self._handles.append(self._attention(place, "qkv").qkv.register_forward_hook(self._read_scores(place, attention)))

        if getattr(attention, "fused_attn", False) is True:
            self._unfused.append(attention)
            attention.fused_attn = False

        def count(*_: Any) -> None:
            self._runs[place] += 1

        self._handles.append(attention.register_forward_hook(count))

    def _attention(self, place: int, needed: str) -> Any:
        """The module `attn` of a block, which has a module `needed`."""
        attention = getattr(self.blocks[place], "attn", None)
        if not isinstance(getattr(attention, needed, None), nn.Module):
            raise TypeError(f"{self._name(place)} has no module attn.{needed}: AttentionTap cannot read its attention")
        return attention

    def _read_softmax(self, place: int) -> Any:
        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._add(place, args[0].detach())

        return read

    def _read_scores(self, place: int, attention: Any) -> Any:
        heads, scale = int(attention.num_heads), float(attention.scale)

        def read(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            batch, tokens, _ = output.shape
            query, key, _ = output.detach().reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
            self._add(place, query @ key.transpose(-2, -1) * scale)

        return read

    def _add(self, place: int, attention: Tensor) -> None:
        self._maps.append(attention)
        self._reads[place] += 1
        if self.ends_the_pass:
            raise _PassEnded

    def _name(self, place: int) -> str:
        return f"block {self._indices[place]} ({type(self.blocks[place]).__name__})"

    def _check_read(self) -> None:
        """Raises RuntimeError for a block whose attention ran more often than it gave its map."""
        needed = "attn_drop" if self.values == "softmax" else "qkv"
        for place, (reads, runs) in enumerate(zip(self._reads, self._runs, strict=True)):
            if reads < runs:
                raise RuntimeError(
                    f"{self._name(place)} ran its attention without running attn.{needed}, so there is no map to read: "
                    "fused attention must be turned off in this block (attn.fused_attn, where a block has it, is)"
                )

    def _check_all_ran(self) -> None:
        """Raises RuntimeError for a block that was not run while others were."""
        for place, runs in enumerate(self._runs):
            if any(self._runs) and not runs:
                raise RuntimeError(f"{self._name(place)} did not run inside the tap, while other blocks did")


def stream_attention(
    blocks: Iterable[nn.Module], tokens: Tensor, layers: Layers = "all", values: Values = "softmax", **block_inputs: Any
) -> Iterator[Tensor]:
    """Runs an encoder block by block and yields the attention of each chosen block before the next one runs.

    Nothing is computed after the map of the last chosen block: not what its attention makes of the values, nor its MLP.

    Args:
        blocks: pre-norm blocks with `norm1` and `attn`, called as `block(tokens, **block_inputs)`.
        tokens: [B, T, D], input of the first block.
        block_inputs: what every block and its attention take besides (a relative position bias, say).

    Yields:
        [B, h, T, T] for each chosen block.

    Raises:
        TypeError, RuntimeError: a block whose attention cannot be read, naming it; see :class:`AttentionTap`.
    """
    encoder = list(blocks)
    chosen = choose_layers(layers, len(encoder))
    for index, block in enumerate(encoder[: chosen[-1] + 1]):
        if index not in chosen:
            tokens = block(tokens, **block_inputs)
            continue
        with AttentionTap(encoder, [index], values) as tap:
            if index < chosen[-1]:
                tokens = block(tokens, **block_inputs)
            else:
                tap.ends_the_pass = True
                with suppress(_PassEnded):
                    block.attn(block.norm1(tokens), **block_inputs)  # type: ignore[operator]
        yield tap.maps.pop()


class _PassEnded(Exception):
    """Leaves a block once its map is read: nothing after that is computed."""


@contextmanager
def attention_mode(model: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Runs the attention pass without gradient and, in mode "eval", with dropout and drop-path off.

    Every module gets back the mode it had, also where modes were mixed and when the pass raises.
    """
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', not {mode!r}")
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(mode == "train")
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def patch_graph(
    attention: Tensor | Iterable[Tensor],
    num_prefix_tokens: int = 1,
    direction: Direction = "row",
    heads: Heads = "mean",
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Patch graph from attention maps (Eq. 7): prefix tokens dropped, negative values cut to 0, heads and blocks averaged.

    Only the running sum over blocks is held: an encoder that yields its maps one by one never has two in memory.

    Args:
        attention: [B, h, T, T] (or [B, T, T] without heads), rows are queries, any floating type; or an iterable of
            such tensors, one a block.
        num_prefix_tokens: P, tokens before the patches (1 for a class token).
        direction: what describes patch i. "row": what it attends to (the paper's phi_i = w_i); "column": how
            much each patch attends to it; "symmetric": the mean of both.
        heads: "mean" averages them; "concat" keeps them side by side; "select" averages those of each image and block
            that separate groups of patches best (heads.py).
        reduction: "mean" over blocks (and heads), or "sum" of all of them as in the authors' released code.

    Returns:
        float32 [B, N, N] for heads "mean" and "select", [B, N, h*N] for "concat"; weights w_ij >= 0.

    Raises:
        ValueError: a map of another shape, no map at all, or an unknown direction.
    """
    maps = [attention] if isinstance(attention, Tensor) else attention

    def edges() -> Iterator[Tensor]:
        for block_map in maps:
            yield _edges(_patch_attention(block_map, num_prefix_tokens), direction, heads, reduction)
            del block_map  # the next block runs before the name is bound again

    graph = _directed(over_blocks(edges(), reduction), direction)  # [B, 1 or h, N, N]
    return graph.transpose(1, 2).flatten(2)


def over_blocks(rows: Iterable[Tensor], reduction: Literal["mean", "sum"]) -> Tensor:
    """Mean or sum of what each block gives; only the running sum is held, and added to in place.

    Raises:
        ValueError: no block at all.
    """
    total, blocks = None, 0
    for block_rows in rows:
        total = block_rows if total is None else total.add_(block_rows)
        blocks += 1
        del block_rows  # the next block runs before the name is bound again
    if total is None:
        raise ValueError("attention_fn gave no attention map: nothing to build the patch graph from")
    return total / blocks if reduction == "mean" else total


def _edges(patches: Tensor, direction: Direction, heads: Heads, reduction: Literal["mean", "sum"]) -> Tensor:
    """Weights of one block, not yet directed: [B, h, N, N] with heads "concat", else [B, 1, N, N]."""
    if heads == "select":
        edges = _positive(patches)
        patches = take_heads(edges, best_heads(head_scores(cosine_similarity(_directed(edges, direction)))))
    if heads == "concat":
        return _positive(patches)
    edges = _sum_of_heads(patches)
    return edges.div_(patches.shape[1]) if reduction == "mean" else edges


def _patch_attention(attention: Tensor, num_prefix_tokens: int) -> Tensor:
    """Attention among patches, a view: [B, h, N, N]."""
    if attention.ndim == 3:
        attention = attention[:, None]
    if attention.ndim != 4 or attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention must be [batch, heads, tokens, tokens], got {list(attention.shape)}")
    return attention[..., num_prefix_tokens:, num_prefix_tokens:]


def _positive(patches: Tensor) -> Tensor:
    """What is above 0, as a copy: float32 [B, h, N, N]."""
    return patches.float().clamp(min=0)


def _sum_of_heads(patches: Tensor) -> Tensor:
    """The positive parts of all heads added up: float32 [B, 1, N, N]. One head at a time, so that no copy of all is made."""
    total = _positive(patches[:, :1])
    for head in range(1, patches.shape[1]):
        total.add_(patches[:, head : head + 1].clamp(min=0))
    return total


def _directed(edges: Tensor, direction: Direction) -> Tensor:
    """[..., N, N] with row i the description of patch i."""
    if direction == "row":
        return edges
    if direction == "column":
        return edges.transpose(-2, -1)
    if direction == "symmetric":
        return (edges + edges.transpose(-2, -1)) / 2
    raise ValueError(f"direction must be 'row', 'column' or 'symmetric', not {direction!r}")
