"""Relative position biases, as BEiT and SimMIM use them: rows of a table for pairs of tokens, and the table shared by blocks.

Relative positions follow Swin (Liu et al., ICCV 2021): one learned number for each head and each offset between
two patches; three more rows of the table serve the class token. Names and shapes of the state dict are those of
the official BEiT and SimMIM code, so that weights move both ways. A table of a block's own is in common/models/block.py.

H, W patch grid   N = H*W patches   T = 1 + N tokens   h heads   R = (2H-1)(2W-1) + 3 rows of the table
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def table_rows(height: int, width: int, prefix_tokens: int = 1) -> int:
    """R: one row for each offset between two patches, and three for each prefix token (1 class token, or none)."""
    return (2 * height - 1) * (2 * width - 1) + 3 * prefix_tokens


def relative_position_index(height: int, width: int) -> Tensor:
    """Row of the table for each pair of tokens, query first: int64 [T, T].

    Patch to patch: (row_i - row_j + H - 1) * (2W - 1) + (column_i - column_j + W - 1). The last three rows of the
    table are for class token to patch, patch to class token, and class token to itself.
    """
    places = torch.arange(height * width)
    rows, columns = places // width, places % width
    down = rows[:, None] - rows + height - 1
    across = columns[:, None] - columns + width - 1
    offsets = table_rows(height, width, prefix_tokens=0)
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
        self.relative_position_bias_table = nn.Parameter(torch.zeros(table_rows(*grid_size), heads))  # [R, h]
        self.register_buffer("relative_position_index", relative_position_index(*grid_size))

    def forward(self) -> Tensor:
        """The number to add to each score: [h, T, T]."""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).contiguous()
