"""A small data set in COCO's layout: ellipses on noise, with a crowd, an image without objects, and ids with gaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 90, "name": "egg"}, {"id": 7, "name": "ball"}]
SIZES = [(40, 56), (48, 48), (56, 40), (36, 60), (48, 40), (44, 44)]


def ellipse(size: tuple[int, int], centre: tuple[float, float], radii: tuple[float, float]) -> np.ndarray:
    """bool [height, width]."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1


def box_of(mask: np.ndarray) -> list[float]:
    """[x, y, width, height]."""
    rows, columns = np.nonzero(mask)
    return [float(v) for v in (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1)]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's plain run lengths, column by column, zeros first."""
    counts, last = [0], False
    for value in mask.T.ravel().tolist():
        if value != last:
            counts.append(0)
            last = value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def write_coco(root: Path, seed: int = 0) -> Path:
    """Writes both splits, of six images each: the fifth has a crowd alone, the sixth nothing."""
    (root / "annotations").mkdir(parents=True)
    for split, shift in (("train", 0), ("val", 100)):
        generator = np.random.default_rng(seed + shift)
        folder = root / f"{split}2017"
        folder.mkdir()
        images, annotations = [], []
        for place, size in enumerate(SIZES):
            pixels = generator.integers(0, 90, (*size, 3), dtype=np.uint8)
            image_id = 11 + 3 * place + shift
            for category in CATEGORIES if place < 4 else CATEGORIES[:1] if place == 4 else []:
                radii = generator.uniform(6, 13, 2)
                centre = [generator.uniform(r, side - r) for r, side in zip(radii, size, strict=True)]
                mask = ellipse(size, (centre[0], centre[1]), (radii[0], radii[1]))
                pixels[mask] = (250, 120, 30) if category["name"] == "egg" else (40, 120, 250)
                annotations.append(
                    {
                        "id": len(annotations),  # from 0, as some tools write them
                        "image_id": image_id,
                        "category_id": category["id"],
                        "bbox": box_of(mask),
                        "area": float(mask.sum()),
                        "iscrowd": int(place == 4),
                        "segmentation": run_lengths(mask),
                    }
                )
            images.append({"id": image_id, "file_name": f"{image_id}.png", "height": size[0], "width": size[1]})
            Image.fromarray(pixels).save(folder / f"{image_id}.png")
        held = {"images": images, "annotations": annotations, "categories": CATEGORIES}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(held))
    return root
