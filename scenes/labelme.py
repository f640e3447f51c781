"""Photographs labelled with labelme, exported as VOC folders, in the layout that downstream.segment reads.

    python -m scenes.labelme VOC OUT --val 0.2

    VOC/JPEGImages/*.jpg
    VOC/SegmentationClassPNG/*.png, or SegmentationClass/*.png      0 background, 1.. classes, 255 unlabelled
    VOC/class_names.txt                                             a name a line, the background's first

The background becomes a class of its own, for in ADE20K's layout 0 means unlabelled: numbers move up by one, and 255
becomes 0. With --val 0 the same photographs are for training and validation, which shows whether a model can learn them
at all, and nothing else.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.training.errors import BadInput, Parser, run_cli
from downstream.confusion import IGNORED
from downstream.segmentation.data import MOST_CLASSES, SPLITS

PROGRAM = "scenes.labelme"
_LABELS = ("SegmentationClassPNG", "SegmentationClass")


def convert(voc: Path, out: Path, val: float = 0.0, seed: int = 0) -> list[str]:
    """Writes `out`, which must not exist, and returns the names of the classes 1..C.

    Args:
        val: share of the photographs drawn for validation, at least one; 0: all are for both.
        seed: of that draw.

    Raises:
        BadInput: folders or files missing, or labels that no class has; names them. Nothing is written then.
    """
    if not 0 <= val < 1:
        raise BadInput(f"--val must be in [0, 1), got {val}")
    if out.exists():
        raise BadInput(f"{out} exists already; name a new folder")
    names = _names(voc / "class_names.txt")
    pairs = _pairs(voc)
    annotations = [_annotation(label, len(names)) for _, label in pairs]
    for split, indices in _splits(len(pairs), val, seed).items():
        for kind in ("images", "annotations"):
            (out / kind / split).mkdir(parents=True)
        for index in indices:
            image = pairs[index][0]
            shutil.copyfile(image, out / "images" / split / image.name)
            Image.fromarray(annotations[index]).save(out / "annotations" / split / f"{image.stem}.png")
    (out / "classes.txt").write_text("".join(f"{number}\t{name}\n" for number, name in enumerate(names, 1)))
    return names


def _names(path: Path) -> list[str]:
    try:
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: {error}") from None
    names = [name for name in names if name != "__ignore__"]  # labelme's own name for 255
    if not 1 <= len(names) <= MOST_CLASSES:
        raise BadInput(f"{path}: {len(names)} classes; 1 to {MOST_CLASSES} are possible")
    return names


def _pairs(voc: Path) -> list[tuple[Path, Path]]:
    """Photographs with their labels, sorted."""
    folder = next((voc / name for name in _LABELS if any((voc / name).glob("*.png"))), None)
    if folder is None:
        raise BadInput(f"{voc}: no PNG files in {' or '.join(_LABELS)}")
    images = sorted((voc / "JPEGImages").glob("*.jpg"))
    if not images:
        raise BadInput(f"{voc / 'JPEGImages'}: no .jpg files")
    unlabelled = [image for image in images if not (folder / f"{image.stem}.png").is_file()]
    if unlabelled:
        raise BadInput(f"{folder}: no {unlabelled[0].stem}.png for {unlabelled[0]}")
    return [(image, folder / f"{image.stem}.png") for image in images]


def _annotation(path: Path, classes: int) -> np.ndarray:
    """Labels of VOC uint8 [H, W] -> ADE20K's: one more, and 0 for 255."""
    try:
        with Image.open(path) as image:
            labels = np.asarray(image)
    except OSError as error:
        raise BadInput(f"{path}: {error}") from None
    if labels.ndim != 2 or labels.dtype != np.uint8:
        raise BadInput(f"{path}: must be an 8-bit image of one channel")
    unknown = labels[(labels >= classes) & (labels != IGNORED)]
    if unknown.size:
        raise BadInput(f"{path}: holds label {unknown.max()}, but class_names.txt has {classes} names")
    return np.where(labels == IGNORED, 0, labels + np.uint8(1)).astype(np.uint8)


def _splits(count: int, val: float, seed: int) -> dict[str, list[int]]:
    training, validation = SPLITS
    if not val:
        return {training: [*range(count)], validation: [*range(count)]}
    held_out = max(1, round(val * count))
    if held_out == count:
        raise BadInput(f"--val {val}: leaves none of {count} photographs for training")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return {training: sorted(order[held_out:]), validation: sorted(order[:held_out])}


def main(argv: Sequence[str]) -> None:
    """The command `python -m scenes.labelme`."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("voc", metavar="VOC", type=Path, help="folder that labelme's labelme2voc wrote")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--val", type=float, default=0.0, metavar="SHARE", help="share held out for validation [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice [%(default)s]")
    args = parser.parse_args(argv)
    names = convert(**vars(args))
    counts = ", ".join(f"{len([*(args.out / 'images' / split).iterdir()])} {split}" for split in SPLITS)
    print(f"{args.out} holds {counts} images of {len(names)} classes")


if __name__ == "__main__":
    run_cli(PROGRAM, main)
