"""Where composed scenes get their objects and backgrounds from: photographs of three Debian packages, or drawn shapes.

Photographs. `tuxpaint-stamps-default` holds cut-outs with an alpha mask, photographs and drawings side by side;
`mate-backgrounds` and `lomiri-wallpapers-16.04` hold wallpapers. What is taken of them is a rule, not a hand-picked list:

1. A class is the union of a few folders, without their sub-folders (which is where `cartoon`, `toys` and `plastic` lie), less
   the names in :data:`NOT_OF_THE_CLASS`, and less every `*_mirror` file, which is another file's picture flipped.
2. A cut-out is a photograph if at most :data:`MAX_FLAT` of its opaque pixels have no luminance gradient to speak of and its
   colours carry at least :data:`MIN_COLOUR_BITS` of entropy (:func:`flat_share`, :func:`colour_bits`). Drawings are filled
   areas. Both rules are needed: of 110 pictures in `cartoon` folders 45 are shaded finely enough to pass this one.
3. It is at least :data:`MIN_SIDE` pixels long and fills at least :data:`MIN_FILL` of the square around it: no specks, no threads.
4. Backgrounds are listed: photographs that show no object of any class, since such an object would be an unlabelled one.

Objects and backgrounds are divided between training and validation by the hash of their name, a quarter of each class to
validation, whatever the seed, the size and the counts: no picture of one split occurs in the other.

H, W height and width of a picture in pixels
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, cos, pi, sin
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from common.draws import Stream, hash_seed
from common.training.errors import BadInput

LibraryKind = Literal["photos", "shapes"]
SPLITS = ("train", "val")

SHARE = Path("/usr/share")
"""Where the packages lie."""

INSTALL = "apt install tuxpaint-stamps-default mate-backgrounds lomiri-wallpapers-16.04"

FOLDERS: dict[str, tuple[str, ...]] = {
    "bird": ("animals/birds",),
    "fish": ("animals/fish",),
    "mammal": (
        "animals/marsupials",
        *(
            f"animals/mammals/{name}"
            for name in ("apes", "bears", "bovines", "camel", "cats", "deer", "dogs", "equines", "rodents")
        ),
    ),
    "flower": ("plants/flowers",),
    "fruit_or_vegetable": ("food/fruit", "food/vegetables"),
    "vehicle": (
        "vehicles",
        *(f"vehicles/{name}" for name in ("auto", "construction", "cycle", "emergency", "masstransit", "race")),
    ),
    "instrument": tuple(f"hobbies/music/{name}" for name in ("brass", "percussion", "string", "wind")),
    "tool": ("household/tools", "household/arttools"),
}
"""Classes and their folders below tuxpaint/stamps."""

NOT_OF_THE_CLASS = {
    "animals/fish/lobster.png": "no fish",
    "animals/fish/shrimp.png": "no fish",
    "vehicles/7spoke256.png": "a wheel",
    "vehicles/wheel_tractor.png": "a wheel",
    "household/tools/cementmixer.png": "a machine on wheels",
}

BACKGROUNDS = (
    *(f"backgrounds/mate/nature/{name}.jpg" for name in ("Aqua", "Blinds", "Dune", "GreenMeadow", "RainDrops", "Storm")),
    *(f"backgrounds/mate/nature/{name}.jpg" for name in ("TwoWings", "Wood")),
    *(f"backgrounds/{name}_by_Aitzol_Berasategi.jpg" for name in ("aitzgorri", "life", "picosdeeuropa", "sunset")),
    "backgrounds/Bridge_by_Sander_Klootwijk.jpg",
    "backgrounds/Dragonfly_by_Bolly.jpg",
    "backgrounds/greentock_by_Peter_Nerlich.jpg",
)
"""Below /usr/share. Left out: paintings and patterns (Elephants, abstract/, desktop/, analogpattern, umang) and photographs of
flowers, animals, fruit, tools or instruments (FreshFlower, Garden, YellowFlower, LadyBird, seeding, friends, free, Picture_0B,
Picture_1A, Wine)."""

MAX_FLAT = 0.25
MIN_COLOUR_BITS = 4.4
MIN_SIDE = 40
MIN_FILL = 0.06
VALIDATION_SHARE = 0.25
_MEASURED_SIDE = 256  # drawings and photographs are told apart at one size, since enlarging flattens and reducing roughens
_FLAT_GRADIENT = 0.5  # grey levels a pixel
SMALLEST_CROP = 0.35  # of a background's shorter side

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
_SHAPES_A_CLASS = 12
_SHAPE_BACKGROUNDS = 12
_SHAPE_SIDE = 256

_T = TypeVar("_T")


@dataclass(frozen=True)
class Picture:
    """A cut-out (RGBA, cropped to what is opaque) or a background (RGB), and where it comes from."""

    name: str
    image: Image.Image


@dataclass(frozen=True)
class Pool:
    """What the scenes of one split are made of. `cutouts[c]` belong to class c."""

    cutouts: tuple[tuple[Picture, ...], ...]
    backgrounds: tuple[Picture, ...]


@dataclass(frozen=True)
class Library:
    """Classes, the pool of each split, and why each cut-out of the folders that is not used is left out."""

    kind: LibraryKind
    classes: tuple[str, ...]
    pools: dict[str, Pool]
    left_out: dict[str, str]


def resolve(sources: Literal["auto", "photos", "shapes"]) -> LibraryKind:
    """`auto` is photos where all three packages are installed, else shapes.

    Raises:
        BadInput: photos are asked for and a package is missing.
    """
    packages = missing_packages()
    if sources == "photos" and packages:
        raise BadInput(f"--sources photos: not installed: {', '.join(packages)}; run: {INSTALL}")
    return "shapes" if sources == "shapes" or packages else "photos"


def missing_packages() -> list[str]:
    """Debian packages of which the expected files are not below :data:`SHARE`."""
    files = {
        "tuxpaint-stamps-default": [f"tuxpaint/stamps/{folder}" for folders in FOLDERS.values() for folder in folders],
        "mate-backgrounds": [name for name in BACKGROUNDS if "/mate/" in name],
        "lomiri-wallpapers-16.04": [name for name in BACKGROUNDS if "/mate/" not in name],
    }
    return [package for package, paths in files.items() if not all((SHARE / path).exists() for path in paths)]


def load_library(kind: LibraryKind, size: int) -> Library:
    """Cut-outs and backgrounds, no larger than scenes of `size` pixels can use them."""
    return _photos(SHARE, size) if kind == "photos" else _shapes(size)


def divide(items: Iterable[_T], names: Iterable[str]) -> dict[str, list[_T]]:
    """A quarter to validation, at least one to each split, by the hash of the names; each split in the order of its names.

    Raises:
        BadInput: fewer than two items, which no two splits can share out.
    """
    named = dict(zip(names, items, strict=True))
    if len(named) < 2:
        raise BadInput(f"{', '.join(named) or 'an empty class'}: at least two pictures are needed, one for each split")
    ranked = sorted(named, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    held_out = min(ceil(len(ranked) * VALIDATION_SHARE), len(ranked) - 1)
    return {
        "val": [named[name] for name in sorted(ranked[:held_out])],
        "train": [named[name] for name in sorted(ranked[held_out:])],
    }


def flat_share(image: Image.Image) -> float:
    """Share of the inner opaque pixels of an RGBA picture whose luminance gradient is below half a grey level a pixel: [0, 1]."""
    opaque = np.asarray(image.getchannel("A")) > 127
    grey = np.asarray(image.convert("RGB").convert("F"))  # [H, W]
    inner = opaque[1:-1, 1:-1] & opaque[:-2, 1:-1] & opaque[2:, 1:-1] & opaque[1:-1, :-2] & opaque[1:-1, 2:]
    across, down = (grey[1:-1, 2:] - grey[1:-1, :-2]) / 2, (grey[2:, 1:-1] - grey[:-2, 1:-1]) / 2
    flat = np.hypot(across, down) < _FLAT_GRADIENT
    return float(flat[inner].mean()) if inner.any() else 1.0


def colour_bits(image: Image.Image) -> float:
    """Entropy of the opaque pixels' colours at 5 bits a channel: [0, 15] bits."""
    pixels = np.asarray(image)[np.asarray(image.getchannel("A")) > 127].astype(np.int64) >> 3
    counts = np.bincount(pixels[:, 0] << 10 | pixels[:, 1] << 5 | pixels[:, 2])
    shares = counts[counts > 0] / counts.sum()
    return float((shares * -np.log2(shares)).sum()) + 0.0  # not -0.0


def opaque_share(image: Image.Image) -> float:
    """Opaque pixels over the area of the smallest upright square around the picture: [0, 1]."""
    return float((np.asarray(image.getchannel("A")) > 127).sum()) / max(image.size) ** 2


def reason_against(image: Image.Image) -> str:
    """Why an RGBA cut-out is not used; empty if it is."""
    if max(image.size) < MIN_SIDE:
        return f"{max(image.size)} px"
    if opaque_share(image) < MIN_FILL:
        return f"fills {opaque_share(image):.3f} of its square"
    measured = _at_most(image, _MEASURED_SIDE)
    flat, bits = flat_share(measured), colour_bits(measured)
    return f"drawn: flat {flat:.2f}, colour {bits:.1f} bits" if flat > MAX_FLAT or bits < MIN_COLOUR_BITS else ""


def _at_most(image: Image.Image, side: int) -> Image.Image:
    """The picture reduced to a longest side; never enlarged. Pillow weights RGBA by alpha, so no dark rim appears."""
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS) if scale < 1 else image


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as file:
            yield file
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a picture: {error}") from None


def _open_cutout(path: Path) -> Image.Image:
    """An RGBA picture, cropped to what is opaque."""
    with _opened(path) as file:
        image = file.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    return image.crop(box) if box else image


def _open_background(path: Path, shorter: int) -> Image.Image:
    """A photograph reduced to a shorter side; JPEG files are reduced while being read, which is much faster."""
    with _opened(path) as file:
        file.draft("RGB", (shorter, shorter))
        image = file.convert("RGB")
    scale = shorter / min(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS) if scale < 1 else image


@lru_cache(maxsize=2)
def _photos(share: Path, size: int) -> Library:
    stamps, left_out = share / "tuxpaint/stamps", {}
    pools: dict[str, list[tuple[Picture, ...]]] = {split: [] for split in SPLITS}
    for folders in FOLDERS.values():
        pictures = []
        for path in (path for folder in folders for path in sorted((stamps / folder).glob("*.png"))):
            name = path.relative_to(stamps).as_posix()
            image = _open_cutout(path)
            reason = "a mirrored copy" if path.stem.endswith("_mirror") else NOT_OF_THE_CLASS.get(name) or reason_against(image)
            if reason:
                left_out[name] = reason
            else:
                pictures.append(Picture(name, _at_most(image, size)))
        _share_out(pools, pictures)
    shorter = ceil(size / SMALLEST_CROP)
    backgrounds = divide((Picture(name, _open_background(share / name, shorter)) for name in BACKGROUNDS), BACKGROUNDS)
    return _library("photos", tuple(FOLDERS), pools, backgrounds, left_out)


def _share_out(pools: dict[str, list[tuple[Picture, ...]]], pictures: Sequence[Picture]) -> None:
    """Adds one class to the pools of both splits."""
    for split, divided in divide(pictures, [picture.name for picture in pictures]).items():
        pools[split].append(tuple(divided))


def _library(
    kind: LibraryKind,
    classes: tuple[str, ...],
    cutouts: dict[str, list[tuple[Picture, ...]]],
    backgrounds: dict[str, list[Picture]],
    left_out: dict[str, str],
) -> Library:
    pools = {split: Pool(tuple(cutouts[split]), tuple(backgrounds[split])) for split in SPLITS}
    return Library(kind, classes, pools, left_out)


# Drawn shapes: for machines without the packages. Textured, so that a mean colour does not tell the class.


@lru_cache(maxsize=2)
def _shapes(size: int) -> Library:
    pools: dict[str, list[tuple[Picture, ...]]] = {split: [] for split in SPLITS}
    for label, shape in enumerate(SHAPES):
        cutouts = [
            Picture(f"{shape}-{number:02d}", _at_most(_draw_shape(label, number), size)) for number in range(_SHAPES_A_CLASS)
        ]
        _share_out(pools, cutouts)
    side = ceil(size / SMALLEST_CROP)
    backgrounds = [
        Picture(f"background-{number:02d}", _texture(_shape_generator(99, number), side)) for number in range(_SHAPE_BACKGROUNDS)
    ]
    return _library("shapes", SHAPES, pools, divide(backgrounds, [picture.name for picture in backgrounds]), {})


def _shape_generator(label: int, number: int) -> np.random.Generator:
    return np.random.default_rng(hash_seed(0, label, number, Stream.SHAPE))


def _texture(generator: np.random.Generator, side: int) -> Image.Image:
    """A smooth field of one hue's neighbourhood, with stripes and grain: RGB [side, side]."""
    base = generator.uniform(40, 215, 3)
    coarse = np.clip(base + generator.normal(0, 35, (6, 6, 3)), 0, 255).astype(np.uint8)
    field = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    angle, waves = generator.uniform(0, pi), generator.uniform(2, 14)
    row, column = np.mgrid[0:side, 0:side] / side
    stripes = np.sin(2 * pi * waves * (column * cos(angle) + row * sin(angle)))
    field = field + generator.uniform(0, 30) * stripes[..., None] + generator.normal(0, 8, (side, side, 1))
    return Image.fromarray(np.clip(field, 0, 255).astype(np.uint8))


def _draw_shape(label: int, number: int) -> Image.Image:
    """Cut-out `number` of a shape: RGBA, cropped to what is opaque. Turned by up to 20 degrees, drawn at twice its size."""
    generator = _shape_generator(label, number)
    turn, side = generator.uniform(-pi / 9, pi / 9), 2 * _SHAPE_SIDE
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    for outline, fill in _outlines(SHAPES[label]):
        x, y = outline[:, 0] * cos(turn) - outline[:, 1] * sin(turn), outline[:, 0] * sin(turn) + outline[:, 1] * cos(turn)
        pen.polygon([(side / 2 * (1 + a), side / 2 * (1 + b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)], fill=fill)
    image = _texture(generator, _SHAPE_SIDE)
    image.putalpha(mask.resize(image.size, Image.Resampling.LANCZOS))
    return image.crop(image.getchannel("A").getbbox())


def _outlines(shape: str) -> list[tuple[NDArray[np.float64], int]]:
    """Polygons [points, 2] in the unit disc, and what each paints: 255 opaque, 0 a hole."""
    if shape == "star":
        return [(_ring_of_points(10, (0.95, 0.4)), 255)]
    if shape == "cross":
        arms = np.array(
            [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
        )
        return [(arms * 0.3, 255)]
    if shape == "ring":
        return [(_ring_of_points(90, (0.95,)), 255), (_ring_of_points(90, (0.5,)), 0)]
    return [(_ring_of_points({"circle": 90, "square": 4, "triangle": 3}[shape], (0.95,)), 255)]


def _ring_of_points(count: int, radii: tuple[float, ...]) -> NDArray[np.float64]:
    """`count` points around the centre, their radii in turn. A square (4) stands on its side, all else on its base."""
    angles = 2 * np.pi * (np.arange(count) + (0.5 if count == 4 else 0)) / count - np.pi / 2
    return np.array([radii[number % len(radii)] for number in range(count)])[:, None] * np.stack(
        [np.cos(angles), np.sin(angles)], 1
    )
