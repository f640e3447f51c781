"""Fixed absolute positions of patches, as MAE uses them.

H, W patch grid
"""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_positions(grid_size: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, zeros for the class token: float32 [1, 1 + H*W, width].

    The first half of the width encodes the column, the second the row; each half is sines, then cosines, of the
    coordinate times 10000^(-i / (width/4)).
    """
    if width % 4:
        raise ValueError(f"2-D sine-cosine positions need a width divisible by 4, got {width}")
    down, across = (torch.arange(size, dtype=torch.float64) for size in grid_size)
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(down, across, indexing="ij")
    angles = [coordinate.flatten()[:, None] * frequencies for coordinate in (column, row)]
    patches = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), patches]).float()[None]
