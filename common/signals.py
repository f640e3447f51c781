"""What a block of the encoder says about patches -> graph rows (`--graph`).

The paper's graph is attention (Eq. 7, attention.py). Tokens that a block gives, or its queries, keys or values, describe
patches too, and need no [T, T] map: :func:`stream_signal` runs an encoder as far as the last block that is read,
:func:`signal_graph` makes the rows that the graph cut takes (parts.py). Papers that cut images by keys or tokens: Siméoni et
al., "Localizing Objects with Self-Supervised Transformers and no Labels", BMVC 2021; Amir et al., "Deep ViT Features as Dense
Visual Descriptors", arXiv 2112.05814. None of these is the mask of our paper.

B batch   h heads   P prefix tokens (class token)   N patches   T = P + N tokens   D width   d = D/h   L blocks that are read
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attention import Direction, Layers, Values, choose_layers, over_blocks, patch_graph, stream_attention
from .heads import Heads, best_heads, cosine_similarity, head_scores, take_heads

Graph = Literal["attention", "tokens", "queries", "keys", "values"]
Similarity = Literal["cosine", "vectors"]

PROJECTIONS = ("queries", "keys", "values")
"""Thirds of the output of `attn.qkv`, in its order."""

_ROUNDING = 1e-6  # spread below this share of the largest entry is rounding noise: the vectors are alike


def _check_graph_word(graph: str) -> None:
    if graph not in get_args(Graph):
        raise ValueError(f"graph must be one of {', '.join(get_args(Graph))}, not {graph!r}")


# --- Encoder -> signal of its blocks -----------------------------------------------------------------------------


def stream_signal(
    blocks: Iterable[nn.Module],
    tokens: Tensor,
    graph: Graph = "attention",
    layers: Layers = "all",
    values: Values = "softmax",
    **block_inputs: Any,
) -> Iterator[Tensor]:
    """Runs an encoder block by block and yields the signal of each chosen block before the next one runs.

    Nothing is computed that the signal does not need: for tokens the last chosen block is the last that runs; for
    queries, keys or values its `norm1` and a third of its `qkv` layer are the last. Those are computed from the weights of
    `attn.qkv` (order q, k, v) and its bias, or `attn.q_bias` and `attn.v_bias` as in BEiT and SimMIM: before any
    norm of queries and keys that a block may have besides.

    Args:
        blocks: pre-norm blocks with `norm1` and `attn`, called as `block(tokens, **block_inputs)`.
        tokens: [B, T, D], input of the first block.
        graph: which signal.
        layers: "all", "last" or a list of block indices.
        values: for attention, see :func:`stream_attention`.
        block_inputs: what every block and its attention take besides (a relative position bias, say).

    Yields:
        For each chosen block: attention [B, h, T, T]; tokens, its output [B, T, D]; queries, keys or values [B, h, T, d].

    Raises:
        ValueError: an unknown signal, or blocks that do not exist.
        TypeError, RuntimeError: a block that cannot be read, naming it.
    """
    _check_graph_word(graph)
    if graph == "attention":
        yield from stream_attention(blocks, tokens, layers, values, **block_inputs)
        return
    encoder = list(blocks)
    chosen = choose_layers(layers, len(encoder))
    for index, block in enumerate(encoder[: chosen[-1] + 1]):
        if index in chosen and graph in PROJECTIONS:
            yield project(_attention_of(block, index), block.norm1(tokens), graph)  # type: ignore[operator]
        if index < chosen[-1] or graph == "tokens":
            tokens = block(tokens, **block_inputs)
        if index in chosen and graph == "tokens":
            yield tokens.detach()


def project(attention: Any, tokens: Tensor, graph: Graph) -> Tensor:
    """Queries, keys or values of an attention module with one `qkv` layer: [B, T, D] -> [B, h, T, d]."""
    third, bias = PROJECTIONS.index(graph), qkv_bias(attention)
    weight = attention.qkv.weight.chunk(3)[third]
    projected = functional.linear(tokens, weight, None if bias is None else bias.chunk(3)[third])
    return projected.detach().reshape(*tokens.shape[:2], int(attention.num_heads), -1).transpose(1, 2)


def qkv_bias(attention: Any) -> Tensor | None:
    """Bias of queries, keys and values, [3 * D]: that of the layer, or `q_bias` and `v_bias` with none for keys."""
    if getattr(attention, "q_bias", None) is None:
        return attention.qkv.bias
    return torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])


def _attention_of(block: nn.Module, index: int) -> Any:
    attention = getattr(block, "attn", None)
    if not isinstance(getattr(getattr(attention, "qkv", None), "weight", None), Tensor):
        raise TypeError(
            f"block {index} ({type(block).__name__}) has no layer attn.qkv: its queries, keys and values cannot be read"
        )
    return attention


# --- Signal -> graph rows ----------------------------------------------------------------------------------------


def signal_graph(
    signal: Tensor | Iterable[Tensor],
    graph: Graph = "attention",
    num_prefix_tokens: int = 1,
    *,
    similarity: Similarity = "cosine",
    heads: Heads = "mean",
    direction: Direction = "row",
    reduction: Literal["mean", "sum"] = "mean",
    remove_position: bool = False,
) -> Tensor:
    """Graph rows from any signal: :func:`patch_graph` (Eq. 7) for attention, :func:`vector_graph` for the others.

    Args:
        signal: of one block, or an iterable with one tensor a block, as :func:`stream_signal` gives them.
        graph: which signal it is.
        num_prefix_tokens: P, tokens before the patches.
        heads, reduction: see either function.
        direction: for attention alone.
        similarity, remove_position: for the others alone.

    Returns:
        float32 [B, N, D'], row i describes patch i. D' = N, but h*N for attention with heads "concat", and the
        features of all blocks for "vectors".

    Raises:
        ValueError: a tensor of another shape, no tensor at all, or options that mean nothing together.
    """
    _check_graph_word(graph)
    if graph == "attention":
        return patch_graph(signal, num_prefix_tokens, direction, heads, reduction)
    return vector_graph(signal, num_prefix_tokens, similarity, heads, reduction, remove_position)


def vector_graph(
    vectors: Tensor | Iterable[Tensor],
    num_prefix_tokens: int = 1,
    similarity: Similarity = "cosine",
    heads: Heads = "mean",
    reduction: Literal["mean", "sum"] = "mean",
    remove_position: bool = False,
) -> Tensor:
    """Graph rows from a vector for each patch, centred: prefix tokens dropped, the mean over the image's patches taken out.

    Args:
        vectors: tokens [B, T, D], or vectors of heads [B, h, T, d], any floating type; or an iterable of such, one a block.
        num_prefix_tokens: P, tokens before the patches.
        similarity: "cosine": row i is the cosine similarity of patch i with all patches, in -1..1, averaged over blocks.
            "vectors": row i is the vector itself; blocks stand side by side, each divided by its root mean square over the
            image, so that none outweighs the others.
        heads: "mean" averages the heads' cosine similarities. "concat" puts the heads' vectors side by side, as the one vector of
            width D that they are parts of. "select" is the mean (for "vectors": concat) over the heads of each image and block
            that separate groups best (heads.py).
        reduction: "mean" over blocks and heads, or "sum"; for "cosine" alone.
        remove_position: first takes out the mean over the batch at each position: what depends on the place alone. A
            row then depends on the other images of the batch. A batch of one image is left as it is.

    Returns:
        float32 [B, N, N] for "cosine"; for "vectors" [B, N, L*D], fewer with heads "select". Vectors that are alike up to
        rounding give zeros.

    Raises:
        ValueError: a tensor of another shape, no tensor at all, an unknown word, or averaged vectors of heads, which
            stand in different bases.
    """
    blocks = _centred_blocks(vectors, num_prefix_tokens, heads, remove_position)
    if similarity == "cosine":
        return _cosine_graph(blocks, heads, reduction)
    if similarity == "vectors":
        return _vector_rows(blocks, heads)
    raise ValueError(f"similarity must be 'cosine' or 'vectors', not {similarity!r}")


def _centred_blocks(
    vectors: Tensor | Iterable[Tensor], num_prefix_tokens: int, heads: Heads, remove_position: bool
) -> Iterator[Tensor]:
    """The patches' vectors of each block without their mean: float32 [B, h, N, d], h = 1 for tokens and heads side by side."""
    found = False
    for block_vectors in [vectors] if isinstance(vectors, Tensor) else vectors:
        patches = _patch_vectors(block_vectors, num_prefix_tokens)
        if heads == "concat":
            patches = patches.transpose(1, 2).flatten(2)[:, None]
        if remove_position and len(patches) > 1:
            patches = patches - patches.mean(dim=0, keepdim=True)
        found = True
        yield _centred(patches)
    if not found:
        raise ValueError("attention_fn gave no vectors: nothing to build the patch graph from")


def _patch_vectors(vectors: Tensor, num_prefix_tokens: int) -> Tensor:
    """Vectors of the patches: float32 [B, h, N, d]."""
    if vectors.ndim == 3:
        vectors = vectors[:, None]
    if vectors.ndim != 4:
        raise ValueError(f"vectors must be [batch, tokens, width] or [batch, heads, tokens, width], got {list(vectors.shape)}")
    return vectors[:, :, num_prefix_tokens:].float()


def _centred(patches: Tensor) -> Tensor:
    """Without the mean over the patches [B, h, N, d]; exactly 0 in a head whose vectors are alike up to rounding."""
    largest = patches.abs().amax(dim=(2, 3), keepdim=True)
    centred = patches - patches.mean(dim=2, keepdim=True)
    spread = centred.abs().amax(dim=(2, 3), keepdim=True)
    return torch.where(spread <= _ROUNDING * largest, 0.0, centred)


def _cosine_graph(blocks: Iterator[Tensor], heads: Heads, reduction: Literal["mean", "sum"]) -> Tensor:
    """Cosine similarity over blocks and heads: [B, N, N]."""
    return over_blocks((_similarity(patches, heads, reduction) for patches in blocks), reduction)


def _similarity(patches: Tensor, heads: Heads, reduction: Literal["mean", "sum"]) -> Tensor:
    """Cosine similarity of one block over its heads: [B, N, N]."""
    similarity = cosine_similarity(patches)  # [B, h, N, N]
    if heads == "select":
        similarity = take_heads(similarity, best_heads(head_scores(similarity)))
    return similarity.sum(dim=1) if reduction == "sum" else similarity.mean(dim=1)


def _vector_rows(blocks: Iterator[Tensor], heads: Heads) -> Tensor:
    """The vectors themselves, blocks side by side: [B, N, D']."""
    rows = []
    for patches in blocks:
        if heads == "select":
            patches = take_heads(patches, best_heads(head_scores(cosine_similarity(patches))))
        elif patches.shape[1] > 1:
            raise ValueError("heads must be concat or select with vectors of heads: each head has a basis of its own")
        features = patches.transpose(1, 2).flatten(2)  # [B, N, k*d]
        size = features.square().mean(dim=(1, 2), keepdim=True).sqrt()
        rows.append(features / torch.where(size > 0, size, 1.0))
    return torch.cat(rows, dim=2)
