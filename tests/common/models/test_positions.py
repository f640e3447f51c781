"""Fixed positions against their formula."""

from __future__ import annotations

import math

import pytest

from common.models.positions import sincos_positions


def test_positions_by_formula() -> None:
    """Column first, then row; sines, then cosines; frequencies 10000^(-i/(width/4)); zeros for the class token."""
    positions = sincos_positions((3, 5), 16)[0]
    assert positions.shape == (16, 16)
    assert positions[0].abs().max() == 0
    row, column = 2, 3
    angles = [coordinate * 10000 ** (-i / 4) for coordinate in (column, row) for i in range(4)]
    expected = [f(a) for half in (angles[:4], angles[4:]) for f in (math.sin, math.cos) for a in half]
    assert positions[1 + row * 5 + column].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_width_that_four_does_not_divide() -> None:
    with pytest.raises(ValueError, match="need a width divisible by 4, got 18"):
        sincos_positions((2, 2), 18)
