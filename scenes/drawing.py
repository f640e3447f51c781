"""One composed scene: a crop of a background, one to three cut-outs on it, and the visible mask of each.

Scene i of a split is drawn by a generator seeded with (seed, split, i): no other scene, no count and no number of worker
processes changes it.

The class of a scene, as an ImageNet folder needs one, is the class of the object with the largest visible area. So that nobody
can argue about it, that object shows at least :data:`DOMINANCE` times the area of any other; the classes take turns, so that
all have equally many scenes.

S side of the (square) scene in pixels
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.draws import Stream, hash_seed
from scenes.sources import SMALLEST_CROP, SPLITS, Picture, Pool

MAX_OBJECTS = 3
MAIN_AREA = (0.10, 0.35)  # opaque area of the main object, as a share of the scene
OTHER_AREA = (0.2, 0.5)  # of another object, as a share of the main object's
LONGEST_SIDE = 0.95  # of an object, as a share of the scene's side: binds for thin ones
OVERHANG = 0.15  # how much of an object's box may lie outside the scene on each axis
VISIBLE_MAIN, VISIBLE_OTHER = 0.7, 0.5  # least visible share of an object's own opaque pixels
LEAST_AREA = 0.005  # least visible area, as a share of the scene
DOMINANCE = 1.5
_TRIES = 20  # then the main object stands alone and wholly inside, which always meets the rules


@dataclass(frozen=True)
class Instance:
    """An object of a scene: class in 0..C-1, visible mask bool [S, S], name of the cut-out."""

    label: int
    mask: NDArray[np.bool_]
    name: str


@dataclass(frozen=True)
class Scene:
    """Pixels uint8 [S, S, 3]; the instances, the first of which gives the scene its class; name of the background."""

    pixels: NDArray[np.uint8]
    instances: tuple[Instance, ...]
    background: str

    @property
    def label(self) -> int:
        return self.instances[0].label


@dataclass(frozen=True)
class _PlacedCutout:
    """A cut-out at its size, RGBA, with its upper left corner in the scene; `depth` orders what covers what."""

    label: int
    name: str
    rgba: NDArray[np.uint8]  # [h, w, 4]
    left: int
    top: int
    depth: float


def draw_scene(pool: Pool, size: int, seed: int, split: str, index: int) -> Scene:
    """Scene `index` of a split, a pure function of its arguments.

    Args:
        size: side in pixels.
        split: "train" or "val".
    """
    generator = np.random.default_rng(hash_seed(seed, SPLITS.index(split), index, Stream.SCENE))
    name, canvas = _crop(pool, size, generator)
    main = index % len(pool.cutouts)
    count = int(generator.integers(1, MAX_OBJECTS + 1))
    for _ in range(_TRIES):
        placed = _place(pool, size, main, count, OVERHANG, generator)
        masks = _visible(placed, size)
        if _acceptable(placed, masks):
            break
    else:
        placed = _place(pool, size, main, 1, 0.0, generator)
        masks = _visible(placed, size)
    for cutout in sorted(placed, key=lambda cutout: cutout.depth):
        _paste(canvas, cutout)
    instances = tuple(Instance(cutout.label, mask, cutout.name) for cutout, mask in zip(placed, masks, strict=True))
    return Scene(np.clip(np.rint(canvas), 0, 255).astype(np.uint8), instances, name)


def _crop(pool: Pool, size: int, generator: np.random.Generator) -> tuple[str, NDArray[np.float32]]:
    """A square crop of a background, half of the time flipped: its name and float32 [S, S, 3] in 0..255."""
    picture = pool.backgrounds[int(generator.integers(len(pool.backgrounds)))]
    width, height = picture.image.size
    side = generator.uniform(SMALLEST_CROP, 1) * min(width, height)
    left, top = generator.uniform(0, width - side), generator.uniform(0, height - side)
    crop = picture.image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    pixels = np.asarray(crop, dtype=np.float32)
    return picture.name, (pixels[:, ::-1] if generator.random() < 0.5 else pixels).copy()


def _place(pool: Pool, size: int, main: int, count: int, overhang: float, generator: np.random.Generator) -> list[_PlacedCutout]:
    """The main object, then `count` - 1 others of any class, each with its size and place; depths are in random order."""
    area = generator.uniform(*MAIN_AREA) * size**2
    placed = [_place_one(pool, size, main, area, overhang, generator)]
    for _ in range(count - 1):
        label = int(generator.integers(len(pool.cutouts)))
        placed.append(_place_one(pool, size, label, area * generator.uniform(*OTHER_AREA), overhang, generator))
    return placed


def _place_one(pool: Pool, size: int, label: int, area: float, overhang: float, generator: np.random.Generator) -> _PlacedCutout:
    picture = pool.cutouts[label][int(generator.integers(len(pool.cutouts[label])))]
    rgba = _scaled(picture, area, LONGEST_SIDE * size)
    if generator.random() < 0.5:
        rgba = rgba[:, ::-1]
    height, width = rgba.shape[:2]
    left = round(generator.uniform(-overhang * width, size - width + overhang * width))
    top = round(generator.uniform(-overhang * height, size - height + overhang * height))
    return _PlacedCutout(label, picture.name, rgba, left, top, generator.random())


def _scaled(picture: Picture, area: float, longest: float) -> NDArray[np.uint8]:
    """The cut-out with `area` opaque pixels, or as many as its longest side allows: uint8 [h, w, 4]."""
    opaque = np.asarray(picture.image.getchannel("A")) > 127
    scale = min((area / float(opaque.sum())) ** 0.5, longest / max(picture.image.size))
    width, height = (max(1, round(length * scale)) for length in picture.image.size)
    return np.asarray(picture.image.resize((width, height), Image.Resampling.BICUBIC))


def _windows(cutout: _PlacedCutout, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a placed cut-out lies: rows and columns of the scene, and the same of the cut-out."""
    height, width = cutout.rgba.shape[:2]
    top, bottom = max(cutout.top, 0), min(cutout.top + height, size)
    left, right = max(cutout.left, 0), min(cutout.left + width, size)
    scene = (slice(top, bottom), slice(left, right))
    return scene, (slice(top - cutout.top, bottom - cutout.top), slice(left - cutout.left, right - cutout.left))


def _visible(placed: list[_PlacedCutout], size: int) -> list[NDArray[np.bool_]]:
    """Masks bool [S, S] of what is opaque (alpha above one half) and not covered by what is opaque above it."""
    masks: dict[int, NDArray[np.bool_]] = {}
    covered = np.zeros((size, size), dtype=bool)
    for number in sorted(range(len(placed)), key=lambda number: -placed[number].depth):
        in_scene, in_cutout = _windows(placed[number], size)
        opaque = np.zeros_like(covered)
        opaque[in_scene] = placed[number].rgba[..., 3][in_cutout] > 127
        masks[number] = opaque & ~covered
        covered |= opaque
    return [masks[number] for number in range(len(placed))]


def _acceptable(placed: list[_PlacedCutout], masks: list[NDArray[np.bool_]]) -> bool:
    """Every object shows enough of itself, and the first shows clearly more than any other."""
    areas = [int(mask.sum()) for mask in masks]
    for number, (cutout, area) in enumerate(zip(placed, areas, strict=True)):
        share = VISIBLE_OTHER if number else VISIBLE_MAIN
        if area < share * int((cutout.rgba[..., 3] > 127).sum()) or area < LEAST_AREA * masks[number].size:
            return False
    return all(areas[0] >= DOMINANCE * area for area in areas[1:])


def _paste(canvas: NDArray[np.float32], cutout: _PlacedCutout) -> None:
    """Blends a cut-out into the scene by its alpha, soft edges included."""
    in_scene, in_cutout = _windows(cutout, len(canvas))
    patch = cutout.rgba[in_cutout].astype(np.float32)
    alpha = patch[..., 3:] / 255
    canvas[in_scene] = canvas[in_scene] * (1 - alpha) + patch[..., :3] * alpha
