"""Windows of a patch grid, in which attention stays (ViTDet: Li et al., "Exploring Plain Vision Transformer Backbones for
Object Detection", ECCV 2022, Sec. 3).

B images   H, W patch grid   N = H*W patches   w side of a window in patches   D width
V windows of an image = ceil(H/w) * ceil(W/w)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Windows(nn.Module):
    """Cuts a grid into windows edge to edge from the top left, and joins them again. Holds nothing that is saved.

    Where w does not divide the grid, the last windows are filled up with tokens that nothing attends to: their scores
    are -inf, and what they compute is cut off again.

    Args:
        grid_size: (H, W).
        side: w.
    """

    padding: Tensor

    def __init__(self, grid_size: tuple[int, int], side: int) -> None:
        super().__init__()
        self.grid_size, self.side = grid_size, side
        self.fits = not (grid_size[0] % side or grid_size[1] % side)
        if not self.fits:
            real = to_windows(torch.ones(1, grid_size[0] * grid_size[1], 1), grid_size, side)
            self.register_buffer("padding", real[:, None, None, :, 0] == 0, persistent=False)  # [V, 1, 1, w*w]

    def cut(self, tokens: Tensor) -> Tensor:
        """[B, N, D] -> [B*V, w*w, D]."""
        return to_windows(tokens, self.grid_size, self.side)

    def join(self, windows: Tensor) -> Tensor:
        """[B*V, w*w, D] -> [B, N, D]."""
        return from_windows(windows, self.grid_size, self.side)

    def close_padding(self, bias: Tensor | None, query: Tensor) -> Tensor | None:
        """A bias on the scores, or None, with -inf for keys that fill a window up.

        Args:
            bias: broadcasts to [V, h, w*w, w*w].
            query: [B*V, h, w*w, d]; tells the type and B.

        Returns:
            [B*V, h or 1, w*w or 1, w*w], one copy an image; `bias` itself where the windows fit.
        """
        if self.fits:
            return bias
        closed = torch.zeros_like(self.padding, dtype=query.dtype).masked_fill(self.padding, float("-inf"))
        closed = closed if bias is None else bias + closed
        return closed.repeat(len(query) // len(closed), 1, 1, 1)


def to_windows(tokens: Tensor, grid_size: tuple[int, int], window: int) -> Tensor:
    """[B, N, D] -> [B*V, w*w, D], windows of an image in raster order; zeros where the grid ends inside a window."""
    height, width = grid_size
    grid = tokens.reshape(len(tokens), height, width, -1)
    grid = functional.pad(grid, (0, 0, 0, -width % window, 0, -height % window))
    down, across = grid.shape[1] // window, grid.shape[2] // window
    cut = grid.reshape(-1, down, window, across, window, tokens.shape[2])
    return cut.transpose(2, 3).reshape(-1, window * window, tokens.shape[2])


def from_windows(windows: Tensor, grid_size: tuple[int, int], window: int) -> Tensor:
    """Inverse of :func:`to_windows`: [B*V, w*w, D] -> [B, N, D]."""
    height, width = grid_size
    down, across = -(-height // window), -(-width // window)
    cut = windows.reshape(-1, down, across, window, window, windows.shape[2]).transpose(2, 3)
    grid = cut.reshape(-1, down * window, across * window, windows.shape[2])
    return grid[:, :height, :width].flatten(1, 2)
