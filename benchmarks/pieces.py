"""Connected pieces of part maps: how far parts are from being one blob each.

Two patches belong to one piece where a way from one to the other, from patch to patch above, below, left or right, stays inside
their part.

B images   H, W patch grid   N = H*W patches
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor


@dataclass(frozen=True)
class Pieces:
    """Counts over a batch of part maps.

    Attributes:
        a_part: connected pieces of a part that has any patch, on average: 1 if every part is one blob.
        single_parts: share of those parts that are a single patch.
        single_pieces: share of the pieces that are a single patch.
    """

    a_part: float
    single_parts: float
    single_pieces: float


def label_pieces(parts: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """A number for each connected piece, 0, 1, ... over the whole batch: int64 [B, N] from parts int64 [B, N]."""
    maps = parts.reshape(-1, *grid_size).cpu().numpy()
    place = np.arange(maps.size).reshape(maps.shape)
    down, across = maps[:, 1:] == maps[:, :-1], maps[:, :, 1:] == maps[:, :, :-1]
    first = np.concatenate([place[:, :-1][down], place[:, :, :-1][across]])
    second = np.concatenate([place[:, 1:][down], place[:, :, 1:][across]])
    edges = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(maps.size, maps.size))
    _, labels = connected_components(edges, directed=False)
    return torch.from_numpy(labels).long().reshape(parts.shape)


def count_pieces(parts: Tensor, grid_size: tuple[int, int]) -> Pieces:
    """Pieces of parts int64 [B, N] on an (H, W) grid; a part of one image has nothing to do with that number in another."""
    sizes = torch.bincount(label_pieces(parts, grid_size).flatten())
    members = torch.stack([parts == part for part in parts.unique()]).sum(dim=2)  # [K, B] patches of each part
    filled = members[members > 0]
    return Pieces(
        a_part=len(sizes) / len(filled),
        single_parts=(filled == 1).float().mean().item(),
        single_pieces=(sizes == 1).float().mean().item(),
    )
