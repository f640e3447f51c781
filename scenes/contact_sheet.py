"""A sheet of scenes as they were written, with the outline and the class of every mask: for the eye to judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLUMNS = 8
_LEAST_CELL = 192  # pixels; smaller scenes are enlarged
_GAP = 4
_COLOURS = ((255, 64, 64), (64, 255, 64), (255, 255, 64))  # by rank: the object that gives the class is red


def contact_sheet(scenes: Sequence[tuple[Path, list[dict[str, Any]]]], classes: Sequence[str], size: int) -> Image.Image:
    """Draws what the files hold.

    Args:
        scenes: picture file and its objects, each with `label`, `bbox` and `counts` (COCO's run lengths).
        size: side of a scene in pixels.
    """
    scale = -(-_LEAST_CELL // size)
    cell = size * scale + _GAP
    sheet = Image.new("RGB", (cell * COLUMNS, cell * -(-len(scenes) // COLUMNS)), "white")
    for number, (path, objects) in enumerate(scenes):
        with Image.open(path) as picture:
            tile = _tile(picture.convert("RGB"), objects, classes, scale)
        sheet.paste(tile, (number % COLUMNS * cell, number // COLUMNS * cell))
    return sheet


def decode_run_lengths(counts: Sequence[int], size: int) -> NDArray[np.bool_]:
    """The mask [size, size] of COCO's uncompressed run lengths."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size, size, order="F")


def _tile(picture: Image.Image, objects: list[dict[str, Any]], classes: Sequence[str], scale: int) -> Image.Image:
    size = picture.width
    pixels = np.array(picture.resize((size * scale, size * scale), Image.Resampling.NEAREST))
    for rank, instance in enumerate(objects):
        mask = decode_run_lengths(instance["counts"], size).repeat(scale, axis=0).repeat(scale, axis=1)
        pixels[_outline(mask)] = _COLOURS[rank]
    tile = Image.fromarray(pixels)
    pen = ImageDraw.Draw(tile)
    for rank, instance in enumerate(objects):
        corner = (max(0, min(instance["bbox"][0] * scale, tile.width - 80)), max(0, instance["bbox"][1] * scale - 13))
        pen.rectangle(pen.textbbox(corner, classes[instance["label"]]), fill="black")
        pen.text(corner, classes[instance["label"]], fill=_COLOURS[rank])
    return tile


def _outline(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the mask with a neighbour outside it; the border of the picture does not count as outside."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner
