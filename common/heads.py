"""Which heads of a block show objects: a rule without labels (`--heads select`).

A head that separates objects makes few groups of patches: two patches of one group look alike to it, two of different
groups do not. The cosine similarities of its pairs of patches then lie at two ends. A head that sees one thing everywhere
has them all near 1, one in which every patch is for itself all near 0, and so has noise. The score of a head is therefore
the variance of the cosine similarity over pairs of different patches: 0 in those three cases, s (1 - s) for groups
that make a share s of the pairs alike and the others orthogonal.

B batch   h heads   k heads that are kept   N patches   d features of a row
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .precision import full_precision

Heads = Literal["mean", "concat", "select"]


def cosine_similarity(rows: Tensor) -> Tensor:
    """Cosine similarity of every two rows, in -1..1; a row of zeros has 0 with all, itself too.

    Args:
        rows: float32 [..., N, d].

    Returns:
        float32 [..., N, N], also under autocast.
    """
    length = rows.norm(dim=-1, keepdim=True)
    with full_precision(rows.device):
        unit = rows / torch.where(length > 0, length, 1.0)
        return unit @ unit.transpose(-2, -1)


def head_scores(similarity: Tensor) -> Tensor:
    """How clearly each head separates groups: variance of the similarity over pairs of different patches.

    Args:
        similarity: [B, h, N, N], the cosine similarity of patches in each head.

    Returns:
        [B, h], 0 or more; at most 1/4 where nothing is negative, and 1 in any case.
    """
    patches = similarity.shape[-1]
    others = ~torch.eye(patches, dtype=torch.bool, device=similarity.device)
    pairs = max(patches * (patches - 1), 1)
    mean = (similarity * others).sum(dim=(-2, -1), keepdim=True) / pairs
    return ((similarity - mean).square() * others).sum(dim=(-2, -1)) / pairs


def best_heads(scores: Tensor) -> Tensor:
    """The better half of the heads of each image, h/2 rounded up: int64 [B, k], ascending.

    Of equal scores the head with the smaller index goes first. An image's heads depend on no other image.

    Args:
        scores: [B, h] of :func:`head_scores`.
    """
    kept = (scores.shape[1] + 1) // 2
    return scores.argsort(dim=1, descending=True, stable=True)[:, :kept].sort(dim=1).values


def take_heads(values: Tensor, heads: Tensor) -> Tensor:
    """values[b, heads[b, i]]: [B, h, N, d] and [B, k] -> [B, k, N, d]."""
    return values.gather(1, heads[..., None, None].expand(-1, -1, *values.shape[2:]))
