"""Colours of parts and classes, chosen for readers who do not see all of them, and the text colour that shows on each.

K colours
"""

from __future__ import annotations

from functools import cache

import numpy as np

BASE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")
"""The colours of Okabe and Ito's set (Color Universal Design, 2008) without black, which lines and unlabelled pixels have."""

RIGHT, WRONG = BASE[4], BASE[5]
"""Blue and vermilion: also told apart where red and green are not."""

_DARKEST, _LIGHTEST = 0.6, 0.7


def rgb(colour: str) -> np.ndarray:
    """`#rrggbb` -> float [3] in 0..1."""
    return np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])


@cache
def _colours(count: int) -> np.ndarray:
    base = np.array([rgb(colour) for colour in BASE])
    rounds, kinds = np.divmod(np.arange(count), len(BASE))
    colours = np.array([_shaded(base[kind], _level(int(turn))) for turn, kind in zip(rounds, kinds, strict=True)]).reshape(-1, 3)
    colours.setflags(write=False)
    return colours


def distinct_colours(count: int) -> np.ndarray:
    """The seven colours of `BASE`, then shades and tints of them, none twice: float [count, 3] in 0..1.

    The first ones stay the same whatever the count.
    """
    return _colours(count)


def text_colour(background: np.ndarray) -> tuple[int, int, int]:
    """Black or white, whichever has the higher contrast (WCAG 2) on a background of float [3] in 0..1."""
    linear = np.where(background <= 0.04045, background / 12.92, ((background + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ np.array([0.2126, 0.7152, 0.0722]))
    on_black, on_white = (luminance + 0.05) / 0.05, 1.05 / (luminance + 0.05)
    return (0, 0, 0) if on_black >= on_white else (255, 255, 255)


def _level(turn: int) -> float:
    """0, -1, 1, then numbers between that halve the widest gap (van der Corput's sequence in base 2), none twice."""
    if turn < 3:
        return (0.0, -1.0, 1.0)[turn]
    number, denominator, value = turn - 1, 2.0, 0.0
    while number:
        value += (number % 2) / denominator
        number, denominator = number // 2, denominator * 2
    return 2 * value - 1


def _shaded(colour: np.ndarray, level: float) -> np.ndarray:
    """Towards black below 0, towards white above."""
    return colour * (1 + level * _DARKEST) if level < 0 else colour + (1 - colour) * level * _LIGHTEST
