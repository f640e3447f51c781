"""Sheets of pictures with titles and a legend, drawn by Pillow: nothing is cut, and no cell is padded that need not be.

Widths and heights in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP, GROUP_GAP = 10, 6, 18
"""Paper around a sheet, between its cells, and between groups of columns."""

_TEXT, _SWATCH, _INK, _PAPER = 15, 13, (0, 0, 0), 255
_LINE = 21
"""Height of a line of text with the space under it."""


@cache
def font(size: int = _TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


def text_width(text: str, size: int = _TEXT) -> int:
    """Width of a line of text."""
    return int(np.ceil(font(size).getlength(text)))


@dataclass(frozen=True)
class Key:
    """A line of the legend: one or several colours, float [3] in 0..1, and what they mean."""

    colours: Sequence[np.ndarray]
    meaning: str

    @property
    def width(self) -> int:
        return _SWATCH * len(self.colours) + GAP + text_width(self.meaning)


@dataclass(frozen=True)
class Group:
    """Columns under a common title; each has its own title below that."""

    columns: Sequence[str]
    title: str = ""


@dataclass
class Sheet:
    """Rows of pictures under titled columns, a heading above all and a legend below.

    Attributes:
        groups: the columns from left to right.
        heading: the first line.
        legend: wrapped to the width of the columns.
        rows: cells uint8 [h, w, 3], one a column; None leaves a cell empty. Sizes may differ.
    """

    groups: Sequence[Group]
    heading: str = ""
    legend: Sequence[Key] = ()
    rows: list[Sequence[np.ndarray | None]] = field(default_factory=list)

    def draw(self) -> np.ndarray:
        """The sheet: uint8 [height, width, 3]."""
        lefts, widths = self._columns()
        tops, heights, bottom = self._lines()
        width = max(lefts[-1] + widths[-1], MARGIN + max((key.width for key in self.legend), default=0)) + MARGIN
        width = max(width, 2 * MARGIN + text_width(self.heading))
        keys = self._placed_keys(width, bottom + GAP)
        height = (keys[-1][2] + _LINE if keys else bottom) + MARGIN
        paper = Image.new("RGB", (width, height), (_PAPER,) * 3)
        pen = ImageDraw.Draw(paper)
        self._write_titles(pen, lefts, widths)
        for cells, top, tall in zip(self.rows, tops, heights, strict=True):
            for cell, left, wide in zip(cells, lefts, widths, strict=True):
                if cell is not None:
                    paper.paste(Image.fromarray(cell), (left + (wide - cell.shape[1]) // 2, top + (tall - cell.shape[0]) // 2))
        for key, left, top in keys:
            _draw_key(pen, key, left, top)
        return np.asarray(paper)

    def _columns(self) -> tuple[list[int], list[int]]:
        """Left edges and widths: as wide as the widest cell, or as a title where that is wider."""
        lefts: list[int] = []
        widths: list[int] = []
        left, column = MARGIN, 0
        for group in self.groups:
            within = [
                max([text_width(title), *(cells[column + k].shape[1] for cells in self.rows if cells[column + k] is not None)])  # type: ignore[union-attr]
                for k, title in enumerate(group.columns)
            ]
            missing = text_width(group.title) - sum(within) - GAP * (len(within) - 1)
            within = [wide + max(0, -(-missing // len(within))) for wide in within]
            for wide in within:
                lefts.append(left)
                widths.append(wide)
                left += wide + GAP
            left += GROUP_GAP - GAP
            column += len(within)
        return lefts, widths

    def _lines(self) -> tuple[list[int], list[int], int]:
        """Top edges and heights of the rows, and where the last one ends."""
        top = MARGIN + _LINE * (bool(self.heading) + any(group.title for group in self.groups) + self._has_column_titles())
        tops: list[int] = []
        heights = [max((cell.shape[0] for cell in cells if cell is not None), default=0) for cells in self.rows]
        for tall in heights:
            tops.append(top)
            top += tall + GAP
        return tops, heights, top - GAP * bool(heights)

    def _has_column_titles(self) -> bool:
        return any(any(group.columns) for group in self.groups)

    def _write_titles(self, pen: ImageDraw.ImageDraw, lefts: list[int], widths: list[int]) -> None:
        top = MARGIN
        if self.heading:
            pen.text((MARGIN, top), self.heading, _INK, font())
            top += _LINE
        if any(group.title for group in self.groups):
            column = 0
            for group in self.groups:
                last = column + len(group.columns) - 1
                _centre(pen, group.title, lefts[column], lefts[last] + widths[last], top)
                if group.title and len(group.columns) > 1:
                    pen.line((lefts[column], top + _LINE - 2, lefts[last] + widths[last] - 1, top + _LINE - 2), (150,) * 3)
                column = last + 1
            top += _LINE
        for title, left, wide in zip((title for group in self.groups for title in group.columns), lefts, widths, strict=True):
            _centre(pen, title, left, left + wide, top)

    def _placed_keys(self, width: int, top: int) -> list[tuple[Key, int, int]]:
        """Legend entries with their places, from left to right and in lines."""
        placed: list[tuple[Key, int, int]] = []
        left = MARGIN
        for key in self.legend:
            if left > MARGIN and left + key.width > width - MARGIN:
                left, top = MARGIN, top + _LINE
            placed.append((key, left, top))
            left += key.width + GROUP_GAP
        return placed


def write_label(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, ink: tuple[int, ...], ground: tuple[int, ...]
) -> None:
    """Text on a ground of its own, moved so far that it lies inside the picture where it fits at all."""
    size = 13
    wide, high = text_width(text, size) + 4, size + 4
    left = max(0, min(place[0], pen.im.size[0] - wide))
    top = max(0, min(place[1], pen.im.size[1] - high))
    pen.rectangle((left, top, left + wide - 1, top + high - 1), fill=ground)
    pen.text((left + 2, top), text, ink, font(size))


def _centre(pen: ImageDraw.ImageDraw, text: str, left: int, right: int, top: int) -> None:
    pen.text((left + (right - left - text_width(text)) // 2, top), text, _INK, font())


def _draw_key(pen: ImageDraw.ImageDraw, key: Key, left: int, top: int) -> None:
    for k, colour in enumerate(key.colours):
        box = (left + k * _SWATCH, top + 2, left + (k + 1) * _SWATCH - 1, top + 1 + _SWATCH)
        pen.rectangle(box, fill=tuple(round(255 * float(value)) for value in colour), outline=_INK)
    pen.text((left + _SWATCH * len(key.colours) + GAP, top), key.meaning, _INK, font())
