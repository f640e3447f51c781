"""Rows of the table of relative positions, and the bias that blocks share, against definitions."""

from __future__ import annotations

import pytest
import torch

from common.models.relative_position import RelativePositionBias, relative_position_index, table_rows


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (4, 2), (14, 14)])
def test_index_by_its_definition(grid: tuple[int, int]) -> None:
    """Same offset, same row; other offset, other row; three rows of their own for the class token."""
    height, width = grid
    index = relative_position_index(height, width)
    rows = (2 * height - 1) * (2 * width - 1) + 3
    places = [(row, column) for row in range(height) for column in range(width)]
    of_offset: dict[tuple[int, int], int] = {}
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            value = int(index[1 + i, 1 + j])
            assert of_offset.setdefault((row - other_row, column - other_column), value) == value
    assert sorted(of_offset.values()) == list(range(rows - 3))
    assert index[0, 0] == rows - 1
    assert set(index[0, 1:].tolist()) == {rows - 3}
    assert set(index[1:, 0].tolist()) == {rows - 2}


def test_bias_is_looked_up_per_head() -> None:
    bias = RelativePositionBias((2, 3), heads=4)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    made = bias()
    assert made.shape == (4, 7, 7)
    query, key, head = 5, 2, 3  # patch 4 = (1, 1) looks at patch 1 = (0, 1): offset (1, 0)
    row = (1 + 1) * 5 + (0 + 2)
    assert made[head, query, key] == bias.relative_position_bias_table[row, head]


def test_rows_of_a_table() -> None:
    """Of 3 x 5 patches there are 5 * 9 offsets; a class token adds three rows."""
    assert (table_rows(3, 5, prefix_tokens=0), table_rows(3, 5), table_rows(1, 1)) == (45, 48, 4)
    assert table_rows(4, 2) == relative_position_index(4, 2).max() + 1
