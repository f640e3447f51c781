"""Windows of a grid: cut, joined, and closed where they are filled up."""

from __future__ import annotations

import torch

from common.models.windows import Windows, from_windows, to_windows


def test_windows_come_back_whole() -> None:
    tokens = torch.arange(2 * 5 * 7.0).reshape(2, 35, 1)
    windows = to_windows(tokens, (5, 7), 3)
    assert windows.shape == (2 * 2 * 3, 9, 1)
    assert windows[2, :, 0].tolist() == [6, 0, 0, 13, 0, 0, 20, 0, 0]
    assert torch.equal(from_windows(windows, (5, 7), 3), tokens)


def test_padding_is_closed_and_nothing_else() -> None:
    """A 2 x 3 grid in windows of 2: the second window of an image has no tokens in its right column."""
    windows, query = Windows((2, 3), 2), torch.zeros(4, 1, 4, 8)  # two images of two windows
    closed = windows.close_padding(None, query)
    assert closed is not None
    assert closed.shape == (4, 1, 1, 4)
    end = float("-inf")
    assert closed[:, 0, 0].tolist() == [[0, 0, 0, 0], [0, end, 0, end]] * 2
    bias = torch.randn(1, 3, 4, 4)
    both = windows.close_padding(bias, query)
    assert torch.equal(both, bias + closed)
    assert Windows((2, 4), 2).close_padding(bias, query) is bias
    assert not windows.state_dict()
