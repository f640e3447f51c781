"""Scores of parts against the true objects of a scene, patch by patch.

S side of a scene in pixels   H, W patch grid   N = H*W patches   K parts   O objects of a scene
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import adjusted_rand_score, homogeneity_completeness_v_measure

from benchmarks.pieces import count_pieces
from common.training.errors import BadInput

Labels = NDArray[np.int64]

SCORES = ("homogeneity", "rand", "information", "overlap", "pieces", "single", "filled")
"""Names of :class:`PartScores`, in the order of the tables."""


@dataclass(frozen=True)
class PartScores:
    """Scores of one image, or their mean over images.

    Attributes:
        homogeneity: 1 if no part holds patches of two objects (Rosenberg and Hirschberg 2007). It rises with K by itself.
        rand: adjusted Rand index, 0 for random parts, 1 for the objects themselves (background counts as an object).
        information: normalised mutual information, arithmetic mean.
        overlap: for each object the best intersection over union with a part, the mean over objects.
        pieces: 4-connected pieces of a part that is not empty, on average.
        single: pieces of a single patch, as a share of all pieces.
        filled: parts that are not empty.
    """

    homogeneity: float
    rand: float
    information: float
    overlap: float
    pieces: float
    single: float
    filled: float


@dataclass(frozen=True)
class Scenes:
    """Pictures and what they show.

    Attributes:
        pictures: uint8 [S, S, 3] each.
        objects: int64 [S, S] each: 0 background, 1..O objects.
    """

    pictures: list[NDArray[np.uint8]]
    objects: list[Labels]


def read_scenes(folder: Path, count: int, split: str = "val2017") -> Scenes:
    """The first `count` scenes of a split that `python -m scenes` wrote.

    Raises:
        BadInput: no such scenes, or fewer.
    """
    path = folder / "coco" / "annotations" / f"instances_{split}.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        raise BadInput(f"{folder}: no scenes there ({path} cannot be read); make them by `python -m scenes {folder}`") from None
    if len(content["images"]) < count:
        raise BadInput(f"{folder}: has {len(content['images'])} scenes of {split}, {count} are wanted")
    by_image: dict[int, list[Any]] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation["segmentation"])
    chosen = content["images"][:count]
    pictures = [np.array(Image.open(folder / "coco" / split / image["file_name"]).convert("RGB")) for image in chosen]
    return Scenes(pictures, [_object_map(by_image.get(image["id"], []), image["height"], image["width"]) for image in chosen])


def _object_map(segments: Sequence[dict[str, Any]], height: int, width: int) -> Labels:
    objects = np.zeros((height, width), dtype=np.int64)
    for index, segment in enumerate(segments, 1):
        counts = segment["counts"]
        inside = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T  # column by column, zeros first
        objects[inside] = index
    return objects


def patch_objects(objects: Labels, grid_size: tuple[int, int]) -> Labels:
    """The object that most pixels of a patch show: [N].

    Args:
        objects: [S, S], S a multiple of both sides of the grid.
    """
    height, width = grid_size
    rows, columns = objects.shape[0] // height, objects.shape[1] // width
    patches = objects.reshape(height, rows, width, columns).swapaxes(1, 2).reshape(height * width, -1)  # [N, pixels]
    counts = (patches[:, None] == np.arange(objects.max() + 1)[:, None]).sum(axis=2)  # [N, 1 + O]
    return counts.argmax(axis=1).astype(np.int64)


def score_parts(parts: Labels, truth: Labels, grid_size: tuple[int, int]) -> PartScores:
    """Scores of one image.

    Args:
        parts: [N], part of each patch.
        truth: [N], object of each patch, 0 background.
    """
    homogeneity, _, information = homogeneity_completeness_v_measure(truth, parts)
    pieces = count_pieces(torch.from_numpy(parts)[None], grid_size)
    return PartScores(
        homogeneity=float(homogeneity),
        rand=float(adjusted_rand_score(truth, parts)),
        information=float(information),
        overlap=best_overlap(parts, truth),
        pieces=pieces.a_part,
        single=pieces.single_pieces,
        filled=float(len(np.unique(parts))),
    )


def best_overlap(parts: Labels, truth: Labels) -> float:
    """Mean over objects of the best intersection over union with a part; NaN without objects."""
    members = parts[None] == np.unique(parts)[:, None]  # [K, N]
    best = []
    for index in np.unique(truth[truth > 0]):
        shown = truth == index
        both, either = (members & shown).sum(axis=1), (members | shown).sum(axis=1)
        best.append(float((both / either).max()))
    return float(np.mean(best)) if best else float("nan")


def mean_scores(scores: Sequence[PartScores]) -> PartScores:
    """The mean of each score; images without objects do not count in `overlap`."""
    return PartScores(**{name: float(np.nanmean([getattr(score, name) for score in scores])) for name in SCORES})
