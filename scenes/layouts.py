"""The three layouts of composed scenes: ImageNet folders, ADE20K, COCO. make.py draws the tree.

C classes   H, W height and width in pixels   S side of a scene
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scenes.drawing import Scene
from scenes.sources import SPLITS

ADE20K = {"train": "training", "val": "validation"}
COCO = {"train": "train2017", "val": "val2017"}
FIRST_ID = {"train": 1, "val": 1_000_001}
"""COCO ids, which are also the files' stems, do not depend on how many scenes there are."""

_JPEG_QUALITY = 95


def make_folders(out: Path, classes: Sequence[str]) -> None:
    """The empty tree."""
    for split in SPLITS:
        for name in classes:
            (out / "imagenet" / split / name).mkdir(parents=True)
        for kind in ("images", "annotations"):
            (out / "ade20k" / kind / ADE20K[split]).mkdir(parents=True)
        (out / "coco" / COCO[split]).mkdir(parents=True)
    (out / "coco/annotations").mkdir()


def write_lists(out: Path, split: str, records: Sequence[dict[str, Any]], classes: Sequence[str], size: int) -> None:
    """COCO's json of a split, and ADE20K's list of classes."""
    content = json.dumps(_coco(records, classes, size), separators=(",", ":"))
    (out / f"coco/annotations/instances_{COCO[split]}.json").write_text(content)
    names = [*classes, "background"]
    (out / "ade20k/classes.txt").write_text("".join(f"{index}\t{name}\n" for index, name in enumerate(names, 1)))


def write_scene(out: Path, scene: Scene, classes: Sequence[str], split: str, image_id: int) -> dict[str, Any]:
    """The files of one scene, and its record for COCO's json."""
    stem = f"{image_id:012d}"
    picture = out / "imagenet" / split / classes[scene.label] / f"{stem}.jpg"
    Image.fromarray(scene.pixels).save(picture, quality=_JPEG_QUALITY, subsampling=0)
    for folder in (out / "ade20k/images" / ADE20K[split], out / "coco" / COCO[split]):
        _link(picture, folder / picture.name)
    annotation = np.full(scene.pixels.shape[:2], len(classes) + 1, dtype=np.uint8)  # [S, S]
    for instance in scene.instances:
        annotation[instance.mask] = instance.label + 1
    Image.fromarray(annotation).save(out / "ade20k/annotations" / ADE20K[split] / f"{stem}.png")
    objects = [
        {
            "label": instance.label,
            "name": instance.name,
            "bbox": box_of(instance.mask),
            "area": int(instance.mask.sum()),
            "counts": run_lengths(instance.mask),
        }
        for instance in scene.instances
    ]
    return {"id": image_id, "file_name": picture.name, "label": scene.label, "background": scene.background, "objects": objects}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths of a mask [H, W]: column by column, zeros first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.concatenate(([0], changes, [flat.size]))).tolist()
    return [0, *counts] if flat[0] else counts


def box_of(mask: NDArray[np.bool_]) -> list[int]:
    """[left, top, width, height] in pixels of a mask [H, W] that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]


def _coco(records: Sequence[dict[str, Any]], classes: Sequence[str], size: int) -> dict[str, Any]:
    """COCO's instances json; categories are numbered as ADE20K's, an object is ten times its picture's id plus its rank.

    `cutout` and `background`, which COCO does not have, name the pictures used.
    """
    annotations = [
        {
            "id": record["id"] * 10 + rank,
            "image_id": record["id"],
            "category_id": instance["label"] + 1,
            "bbox": instance["bbox"],
            "area": instance["area"],
            "iscrowd": 0,
            "segmentation": {"size": [size, size], "counts": instance["counts"]},
            "cutout": instance["name"],
        }
        for record in records
        for rank, instance in enumerate(record["objects"])
    ]
    return {
        "info": {"description": "scenes composed by evolved-part-masking; SOURCES.txt names what of"},
        "licenses": [],
        "images": [
            {
                "id": record["id"],
                "file_name": record["file_name"],
                "width": size,
                "height": size,
                "background": record["background"],
            }
            for record in records
        ],
        "annotations": annotations,
        "categories": [{"id": index, "name": name, "supercategory": "object"} for index, name in enumerate(classes, 1)],
    }
