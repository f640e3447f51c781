"""Masking rules of other papers, each a function; masks.py files them under the words of `--mask`.

A rule says how early each patch is masked (the highest numbers first, `select_masked`), or which patches are. Each docstring
names its source and what of it is left out. All of them are rules of a mask alone: teachers, losses and networks of those
papers are not here.

B batch (images)   h heads   P prefix tokens   H, W patch grid   N = H*W patches   T = P + N tokens   K parts
m masked patches   u patches across a square
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

Counts = int | Tensor
"""Masked patches: m of every image, or int64 [B], a number for each."""

INVERSE_BLOCK_DRAWS = 4  # aspect ratio, row, column, corner
MIN_ASPECT = 0.5  # of the visible block: between a half and 2
_BELOW_ONE = 0.999  # keeps (n - 1 + draw) / n below 1 in float32


def received_attention(attention: Tensor | Iterable[Tensor], num_prefix_tokens: int = 1) -> Tensor:
    """Attention that each patch gets, for `attn-high` and `attn-low`: float32 [B, N], the mean over heads and blocks.

    From the class token (the first token) where there are prefix tokens; without any, the mean over all patches. Negative entries
    (scores before a softmax) count as 0, as in the patch graph.

    attn-high masks the patches with most of it: AttMask-High of Kakogeorgiou et al., "What to Hide from Your Students", ECCV
    2022, arXiv 2203.12719. Left out: the teacher of its distillation (here the encoder being trained, or its average under
    `--attention_from ema`), the hints that AttMask-Hint leaves visible, and its mask ratio, which is drawn for each image
    (`--mask_ratio_range`). It reads the last block: `--layers last`.

    attn-low masks those with least of it, so that the most attended ones stay visible: Li et al., "MST: Masked Self-Supervised
    Transformer for Visual Representation", NeurIPS 2021, arXiv 2106.05656. Left out: the draw by which MST masks only some of the
    little attended patches, since here m is given and all of them are needed; its teacher; its decoder.

    Args:
        attention: [B, h, T, T] or [B, T, T], rows are queries; or an iterable of such tensors, one a block.
        num_prefix_tokens: P.

    Raises:
        ValueError: a map of another shape, or no map at all.
    """
    total, blocks = None, 0
    for block_map in [attention] if isinstance(attention, Tensor) else attention:
        if block_map.ndim not in (3, 4) or block_map.shape[-1] != block_map.shape[-2]:
            raise ValueError(f"attention must be [batch, heads, tokens, tokens], got {list(block_map.shape)}")
        queries = block_map[..., :1, :] if num_prefix_tokens else block_map
        received = queries[..., num_prefix_tokens:].float().clamp(min=0).mean(dim=-2)  # [B, h, N] or [B, N]
        received = received.mean(dim=1) if received.ndim == 3 else received
        total = received if total is None else total + received
        blocks += 1
    if total is None:
        raise ValueError("attention_fn gave no attention map: nothing to rank the patches by")
    return total / blocks


def semantic_probability(
    parts: Tensor, part_draw: Tensor, patch_draw: Tensor, offset: Tensor, num_masked: Counts, alpha: float
) -> Tensor:
    """From a share of every part (alpha = 0) to whole parts (alpha = 1), for `semantic`: float32 [B, N].

    SemMAE's schedule: Li et al., "SemMAE: Semantic-Guided Masking for Learning Masked Autoencoders", NeurIPS 2022, arXiv
    2206.10207. At first m/N of the patches of each part are masked (patterns within parts), at the end whole parts, in the
    order of their draws, until m patches are (relations between parts; at most one part is split); in between each part's share
    is (1 - alpha) times the first and alpha times the last, which always adds up to m. Left out: SemMAE's own parts, learned by
    a network from a pre-trained encoder (here: those of Eq. 10-16); its decoder; its own growth of alpha (here: Eq. 4,
    `--gamma`).

    Within a part, patches in random order stand at (rank + offset) / size, so that a share s takes s * size of them, rounded up
    or down at random.

    Args:
        parts: int64 [B, N] in 0..K-1.
        part_draw: [B, K] in [0, 1): parts with high numbers are the first that are masked whole.
        patch_draw: [B, N] in [0, 1): order within parts.
        offset: [B, K] in [0, 1).
        num_masked: m, or int64 [B].
        alpha: in 0..1.
    """
    patches, count = parts.shape[1], num_masked[:, None] if isinstance(num_masked, Tensor) else num_masked
    sizes = torch.zeros_like(part_draw).scatter_add(1, parts, torch.ones_like(patch_draw))  # [B, K]
    order = part_draw.argsort(dim=1, descending=True, stable=True)
    ordered = sizes.gather(1, order)
    whole = ((count - (ordered.cumsum(dim=1) - ordered)) / ordered.clamp(min=1)).clamp(0, 1)
    shares = (1 - alpha) * (count / patches) + alpha * torch.zeros_like(sizes).scatter(1, order, whole)  # [B, K]
    place = (_rank_in_part(parts, patch_draw, sizes) + offset.clamp(max=_BELOW_ONE).gather(1, parts)) / sizes.gather(1, parts)
    return shares.gather(1, parts) - place


def _rank_in_part(parts: Tensor, draw: Tensor, sizes: Tensor) -> Tensor:
    """0 for the patch of a part with the smallest number, 1 for the next, ...: float32 [B, N]."""
    by_draw = draw.argsort(dim=1, stable=True)
    order = by_draw.gather(1, parts.gather(1, by_draw).argsort(dim=1, stable=True))  # part by part, by their numbers
    first = (sizes.cumsum(dim=1) - sizes).gather(1, parts.gather(1, order))  # where the part of each begins
    ranks = torch.arange(parts.shape[1], device=parts.device, dtype=sizes.dtype) - first
    return torch.zeros_like(ranks).scatter(1, order, ranks)


def inverse_block_masks(height: int, width: int, num_masked: Counts, uniforms: Tensor) -> Tensor:
    """One rectangle stays visible, rolled cyclically to any place of the grid, for `inverse-block`: bool [B, N].

    Inverse block masking with roll of CAPI (Darcet et al., "Cluster and Predict Latent Patches for Improved Masked Image
    Modeling", arXiv 2502.08769; mask ratio 0.65 there), taken up by Franca (Venkataramanan et al., arXiv 2507.14137). The roll
    lets every patch be visible equally often, which a block that has to fit into the grid does not. The aspect ratio is
    log-uniform between 1/2 and 2 (chosen here), as far as the grid allows. Added: where the N - m visible patches fill no
    rectangle, its last column is short by the missing ones, at a random corner, so that the count is exact.

    Args:
        num_masked: m, or int64 [B]; below N.
        uniforms: [B, INVERSE_BLOCK_DRAWS] numbers in [0, 1).
    """
    counts = torch.as_tensor(num_masked, device=uniforms.device).expand(len(uniforms))
    visible = height * width - counts  # [B]
    aspect = torch.exp(math.log(MIN_ASPECT) * (1 - 2 * uniforms[:, 0]))
    tall = (visible * aspect).sqrt().round().long()
    tall = torch.minimum(torch.maximum(tall, (visible + width - 1) // width), visible.clamp(max=height)).clamp(min=1)
    wide = (visible + tall - 1) // tall
    short = tall * wide - visible  # patches that the last column lacks
    corner = (uniforms[:, 3] * 4).long()
    row = _rolled(height, tall, uniforms[:, 1], corner % 2)[:, :, None]  # [B, H, 1]
    column = _rolled(width, wide, uniforms[:, 2], corner // 2)[:, None, :]  # [B, 1, W]
    tall, wide, short = (size[:, None, None] for size in (tall, wide, short))
    block = (row < tall) & (column < wide) & ~((column == wide - 1) & (row >= tall - short))
    return ~block.flatten(1)


def _rolled(length: int, size: Tensor, draw: Tensor, turned: Tensor) -> Tensor:
    """Place of each row (or column) in a block of `size` [B] that begins anywhere, from its other end where turned."""
    first = (draw * length).long().clamp(max=length - 1)[:, None]
    place = torch.arange(length, device=draw.device) - first
    return torch.where(turned[:, None] == 1, size[:, None] - 1 - place, place) % length


def square_probability(height: int, width: int, unit: int, uniforms: Tensor) -> Tensor:
    """One number for each square of u x u patches, given to all of its patches, for `squares`: [B, N].

    Pixio's masks (Yang et al., "In Pursuit of Pixel Supervision for Visual Pre-training", arXiv 2512.15715: squares of 4 x 4
    patches), with any side. `random-units`, SimMIM's rule, needs a grid that its squares fill and masks whole squares, ceil(U
    r) of them; here squares at the right and lower edge may be cut off, the count is floor(N r), and the last square is masked
    in part. Where squares fill the grid and m is whole squares, the two draw the same masks.

    Args:
        unit: u.
        uniforms: [B, ceil(H/u) * ceil(W/u)] numbers in [0, 1).
    """
    row = torch.arange(height, device=uniforms.device)[:, None] // unit
    column = torch.arange(width, device=uniforms.device) // unit
    return uniforms[:, (row * squares_across(width, unit) + column).flatten()]


def squares_across(length: int, unit: int) -> int:
    """Squares along a side of `length` patches, the last one cut off where it does not fit."""
    return -(-length // unit)
