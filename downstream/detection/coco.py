"""COCO's layout, large-scale jitter, batches of objects, and COCO's scores.

    DIR/annotations/instances_{train,val}2017.json
    DIR/{train,val}2017/*.jpg

Training leaves out crowds, and images without other objects. Evaluation has them all, as COCO's rules say.
Pixels: x and y of a box are edges, so a box around one pixel is 1 wide; pixel i covers i to i + 1.

B batch   n objects of an image   C classes   h, w image as it is in the file   H, W image as the model sees it
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, to_tensor

from common.training.config import Interpolation
from common.training.data import IMAGENET_MEAN, IMAGENET_STD, Batch
from common.training.errors import BadInput

Split = Literal["train", "val"]
INSTALL = "pip install -r requirements-downstream.txt"
MASK_THRESHOLD = 0.5
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = {"bbox": "box", "segm": "mask"}

MOST_BYTES_READ = 50_000_000
"""Of annotations, before a job is submitted."""

_TABLES = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "segmentation"),
}


def mask_tools() -> ModuleType:
    """pycocotools.mask.

    Raises:
        BadInput: it is not installed.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise BadInput(f"COCO annotations need pycocotools: {INSTALL}") from None
    return mask


@dataclass
class Photograph:
    """An image and its objects.

    Attributes:
        image: RGB.
        masks: bool [n, h, w]; none in evaluation.
        labels: int64 [n], 1..C.
        place: number of the image in its source.
    """

    image: Image.Image
    masks: Tensor
    labels: Tensor
    place: int


class CocoSource:
    """Images of a split with their objects, as a Source (common/training/sources.py).

    Args:
        root: the folder with `annotations` in it.
        split: "train" leaves out what training does, "val" nothing.

    Attributes:
        names: of the C classes; label i + 1 is `names[i]`, in the order of COCO's category ids `category_ids`.
        records: entries `images` of the JSON.
        left_out: how many images are in the JSON but not here.
        annotations: entries `annotations` of the JSON; empty in training, which keeps them packed, an image each.

    Raises:
        BadInput: a file or folder that is missing, not in COCO's layout, or without any object.
    """

    def __init__(self, root: Path, split: Split) -> None:
        self.file = root / "annotations" / f"instances_{split}2017.json"
        self.folder, self.split, self.tools = root / f"{split}2017", split, mask_tools()
        tables = _read_tables(self.file)
        if not self.folder.is_dir():
            raise BadInput(f"--data_path {root}: has no folder {self.folder.name} for the images of {self.file.name}")
        categories = sorted(tables["categories"], key=lambda category: category["id"])
        self.category_ids: list[int] = [category["id"] for category in categories]
        self.names: list[str] = [category["name"] for category in categories]
        by_image = self._checked(tables)
        if split == "train":
            self.records = [record for record in tables["images"] if by_image[record["id"]]]
            # Millions of small objects would be copied into each loader process as their reference counts change.
            self._packed = [json.dumps(by_image[record["id"]]).encode() for record in self.records]
            self.annotations: list[dict[str, Any]] = []
        else:
            self.records, self.annotations = tables["images"], tables["annotations"]
        self.left_out = len(tables["images"]) - len(self.records)
        if not any(by_image.values()):
            raise BadInput(f"{self.file}: no image has an object")

    def _checked(self, tables: dict[str, list[dict[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
        """Image id -> its annotations without crowds."""
        images, classes = {entry["id"] for entry in tables["images"]}, set(self.category_ids)
        by_image = defaultdict[int, list[dict[str, Any]]](list)
        for entry in tables["annotations"]:
            for key, known in (("image_id", images), ("category_id", classes)):
                if entry[key] not in known:
                    raise BadInput(f"{self.file}: annotation {entry['id']} has the unknown {key} {entry[key]!r}")
            if not entry.get("iscrowd", 0):
                by_image[entry["image_id"]].append({key: entry[key] for key in ("id", "category_id", "segmentation")})
        return by_image

    def __len__(self) -> int:
        return len(self.records)

    def name(self, index: int) -> str:
        return str(self.folder / self.records[index]["file_name"])

    def load(self, index: int) -> Photograph:
        """Image `index`, in training with its objects. Raises OSError or ValueError if they cannot be read."""
        record = self.records[index]
        with Image.open(self.name(index)) as file:
            image = file.convert("RGB")
        size = (record["height"], record["width"])
        if (image.height, image.width) != size:
            raise ValueError(f"is {image.width} x {image.height}, but {self.file.name} says {size[1]} x {size[0]}")
        objects = json.loads(self._packed[index]) if self.split == "train" else []
        masks = [self._mask(annotation, size) for annotation in objects]
        labels = [1 + self.category_ids.index(annotation["category_id"]) for annotation in objects]
        stacked = torch.from_numpy(np.stack(masks)).bool() if masks else torch.zeros(0, *size, dtype=torch.bool)
        return Photograph(image, stacked, torch.tensor(labels, dtype=torch.int64), index)

    def _mask(self, annotation: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
        """uint8 [h, w]. Raises ValueError if the annotation holds no mask of this size."""
        try:
            return decoded(annotation["segmentation"], size, self.tools)
        except Exception as error:  # pycocotools raises bare Exceptions
            raise ValueError(f"annotation {annotation['id']}: segmentation cannot be read: {error}") from None


def count_training_images(root: Path, most: int = MOST_BYTES_READ) -> int:
    """Images of the training split that have an object, as :class:`CocoSource` takes them, without pycocotools.

    Above `most` bytes of JSON, which COCO's own has, nothing is parsed and the files of the folder are counted: those without
    an object are then among them.

    Raises:
        BadInput: a file or folder that is missing, not in COCO's layout, or without any object.
    """
    file, folder = root / "annotations" / "instances_train2017.json", root / "train2017"
    try:
        if file.stat().st_size > most:
            return sum(1 for _ in folder.iterdir())
    except OSError as error:
        raise BadInput(f"{error.filename}: {error.strerror} (expected COCO's layout, see --data_path)") from None
    tables = _read_tables(file)
    images = {entry["id"] for entry in tables["images"]}
    count = len(images & {entry["image_id"] for entry in tables["annotations"] if not entry.get("iscrowd", 0)})
    if count == 0:
        raise BadInput(f"{file}: no image has an object")
    return count


def _read_tables(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The three lists of COCO's JSON with the keys that are used here."""
    try:
        tables = json.loads(file.read_text())
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror} (expected COCO's layout, see --data_path)") from None
    except ValueError as error:
        raise BadInput(f"{file}: is not JSON: {error}") from None
    for table, keys in _TABLES.items():
        rows = tables.get(table) if isinstance(tables, dict) else None
        if not isinstance(rows, list):
            raise BadInput(f"{file}: is not COCO's: it has no list {table!r}")
        for row in rows:
            lacking = [key for key in keys if key not in row]
            if lacking:
                raise BadInput(f"{file}: {table} {row.get('id', row)} has no {', '.join(lacking)}")
    return tables


def decoded(segmentation: Any, size: tuple[int, int], tools: ModuleType) -> np.ndarray:
    """A mask from polygons or run lengths, packed or plain: uint8 [h, w].

    Polygons of fewer than three points cover nothing; pycocotools would take two points for a box.
    """
    if isinstance(segmentation, list):
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            return np.zeros(size, dtype=np.uint8)
        packed = tools.merge(tools.frPyObjects(polygons, *size))
    else:
        packed = tools.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation
        if tuple(packed["size"]) != size:
            raise ValueError(f"its size is {tuple(packed['size'])}, that of the image {size}")
    return tools.decode(packed)


# --- what the model sees ---


def fitted(size: tuple[int, int], target: tuple[int, int], factor: float = 1.0) -> tuple[int, int]:
    """(h, w) scaled to fit into the target, its aspect kept, times a factor; at least a pixel."""
    scale = min(target[0] / size[0], target[1] / size[1]) * factor
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


@dataclass(frozen=True)
class Jitter:
    """Large-scale jitter and flip (Ghiasi et al., CVPR 2021; the augmentation of ViTDet).

    The image is resized to fit the input, times a factor; then a window of the input's size is cut from it at random,
    or it is filled up at its right and lower edge with ImageNet's mean colour. Masks are cut from the original by the
    same map, nearest pixel; boxes are made anew, tight around what is left of the masks, and objects of which nothing
    is left are dropped. Four numbers from torch's generator decide.

    Attributes:
        size: (H, W).
        scale: range of the factor, uniform.
        flip: half of the images.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    flip: bool
    interpolation: Interpolation

    def __call__(self, photograph: Photograph) -> tuple[Tensor, dict[str, Tensor]]:
        """-> image [3, H, W], and `boxes` [n, 4], `labels` [n], `masks` [n, H, W]."""
        factor, down, across, side = torch.rand(4).tolist()
        low, high = self.scale
        image = photograph.image
        resized = fitted((image.height, image.width), self.size, low + (high - low) * factor)
        window_size = (min(resized[0], self.size[0]), min(resized[1], self.size[1]))
        start = (int(down * (resized[0] - window_size[0] + 1)), int(across * (resized[1] - window_size[1] + 1)))
        flip = self.flip and side < 0.5
        pixels = cut(image, resized, start, window_size, self.interpolation)
        masks = photograph.masks[:, _nearest(image.height, resized[0], start[0], window_size[0])]
        masks = masks[:, :, _nearest(image.width, resized[1], start[1], window_size[1])]
        visible = masks.flatten(1).any(dim=1)
        masks = padded(masks[visible], self.size)
        pixels = padded(pixels, self.size)
        if flip:
            pixels, masks = pixels.flip(-1), masks.flip(-1)
        return pixels, {"boxes": tight_boxes(masks), "labels": photograph.labels[visible], "masks": masks.to(torch.uint8)}


@dataclass(frozen=True)
class Fit:
    """What evaluation sees: the image resized to fit the input, filled up at its right and lower edge."""

    size: tuple[int, int]
    interpolation: Interpolation

    def __call__(self, photograph: Photograph) -> tuple[Tensor, dict[str, Tensor]]:
        """-> image [3, H, W], and `place`."""
        image = photograph.image
        resized = fitted((image.height, image.width), self.size)
        pixels = cut(image, resized, (0, 0), resized, self.interpolation)
        return padded(pixels, self.size), {"place": torch.tensor(photograph.place)}


def cut(
    image: Image.Image,
    resized: tuple[int, int],
    start: tuple[int, int],
    window_size: tuple[int, int],
    interpolation: Interpolation,
) -> Tensor:
    """The window of `window_size` pixels at `start` of the image resized to `resized`, normalised: [3, *window_size].

    The rest of the resized image is never made.
    """
    down, across = resized[0] / image.height, resized[1] / image.width
    box = (
        start[1] / across,
        start[0] / down,
        min((start[1] + window_size[1]) / across, image.width),
        min((start[0] + window_size[0]) / down, image.height),
    )
    window = image.resize((window_size[1], window_size[0]), Image.Resampling[interpolation.upper()], box=box)
    return normalize(to_tensor(window), IMAGENET_MEAN, IMAGENET_STD)


def _nearest(size: int, resized: int, start: int, window_size: int) -> Tensor:
    """For each of `window_size` pixels of the resized image, the pixel of the original that its centre lies in."""
    centres = 2 * torch.arange(start, start + window_size) + 1  # whole numbers, so that no rounding moves an edge
    return centres * size // (2 * resized)


def padded(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., h, w] filled up with zeros at the right and below: [..., H, W]."""
    return torch.nn.functional.pad(planes, (0, size[1] - planes.shape[-1], 0, size[0] - planes.shape[-2]))


def tight_boxes(masks: Tensor) -> Tensor:
    """Boxes of masks that are not empty: [n, H, W] -> float [n, 4] as x0, y0, x1, y1 of their edges."""
    spans = []
    for axis in (1, 2):  # any over rows tells the columns, and the other way round
        occupied = masks.bool().any(dim=axis)
        first = occupied.int().argmax(dim=1)
        spans.append((first, occupied.shape[1] - occupied.flip(1).int().argmax(dim=1)))
    (left, right), (top, bottom) = spans
    return torch.stack([left, top, right, bottom], dim=1).float()


@dataclass
class ObjectBatch(Batch):
    """Images with what is known of each.

    Attributes:
        targets: for each image, in training `boxes`, `labels`, `masks` (see Jitter), in evaluation `place`.
    """

    targets: list[dict[str, Tensor]] = field(default_factory=list)

    def to(self, device: torch.device) -> ObjectBatch:
        """The same batch on `device`."""
        batch = super().to(device)
        targets = [{key: value.to(device, non_blocking=True) for key, value in target.items()} for target in self.targets]
        return ObjectBatch(batch.views, batch.sample_ids, batch.names, batch.bad, targets)

    def pin_memory(self) -> ObjectBatch:
        """Called by the loader."""
        pinned = super().pin_memory()
        targets = [{key: value.pin_memory() for key, value in target.items()} for target in self.targets]
        return ObjectBatch(pinned.views, pinned.sample_ids, pinned.names, pinned.bad, targets)


def collate_objects(samples: list[tuple[tuple[Any, ...] | None, int, str, list[str]]]) -> ObjectBatch:
    """Samples -> batch; views are empty when an image was unreadable and so was all that was tried in its place."""
    read = [views for views, _, _, _ in samples if views is not None]
    complete = len(read) == len(samples)
    return ObjectBatch(
        views=(torch.stack([image for image, _ in read]),) if complete else (),
        sample_ids=torch.tensor([index for _, index, _, _ in samples]),
        names=[name for _, _, name, _ in samples],
        bad=[line for _, _, _, lines in samples for line in lines],
        targets=[target for _, target in read],
    )


# --- scores ---


@dataclass
class Detections:
    """Objects that the model found in an image, in the image's own pixels.

    Attributes:
        place: number of the image in its source.
        boxes: float [n, 4] as x0, y0, x1, y1.
        labels: [n], 1..C.
        scores: [n].
        masks: n packed run lengths of pycocotools.
    """

    place: int
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    masks: list[dict[str, Any]]


class CocoScores:
    """pycocotools' scores on a validation split.

    Args:
        source: of the split "val".
    """

    def __init__(self, source: CocoSource) -> None:
        self.source = source
        # pycocotools marks a match by the id of the object, and takes 0 for none: ids begin with 1 here.
        objects = [
            {**annotation, "id": number, "iscrowd": annotation.get("iscrowd", 0)}
            for number, annotation in enumerate(source.annotations, 1)
        ]
        self.truth = self._dataset(objects)

    def __call__(self, detections: list[Detections]) -> dict[str, float]:
        """AP, AP50 and AP75, and AP of small, medium and large objects, in percent, for boxes and masks.

        Args:
            detections: of every image, in any order.

        Returns:
            `AP_box`, ..., `APl_mask`; without the sizes that no object of the split has.
        """
        numbers: dict[str, float] = {}
        for kind, name in KINDS.items():
            for metric, value in zip(METRICS, self._summary(detections, kind), strict=True):
                if value >= 0:  # -1 says that there was nothing to find
                    numbers[f"{metric}_{name}"] = 100 * value
        return numbers

    def _summary(self, detections: list[Detections], kind: str) -> list[float]:
        from pycocotools.cocoeval import COCOeval

        with contextlib.redirect_stdout(io.StringIO()):
            judge = COCOeval(self.truth, self._dataset(self._results(detections, kind)), kind)
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        return [float(value) for value in judge.stats[: len(METRICS)]]

    def _results(self, detections: list[Detections], kind: str) -> list[dict[str, Any]]:
        """Entries as COCO wants them. The area, which says what is small, is that of what is judged."""
        rows: list[dict[str, Any]] = []
        for image in sorted(detections, key=lambda image: image.place):
            image_id = self.source.records[image.place]["id"]
            for (x0, y0, x1, y1), label, score, mask in zip(
                image.boxes.tolist(), image.labels.tolist(), image.scores.tolist(), image.masks, strict=True
            ):
                row = {"id": len(rows) + 1, "image_id": image_id, "category_id": self.source.category_ids[label - 1]}
                row |= {"score": score, "iscrowd": 0, "bbox": [x0, y0, x1 - x0, y1 - y0]}
                row["area"] = (x1 - x0) * (y1 - y0)
                if kind == "segm":
                    row |= {"segmentation": mask, "area": float(self.source.tools.area(mask))}
                rows.append(row)
        return rows

    def _dataset(self, annotations: list[dict[str, Any]]) -> Any:
        from pycocotools.coco import COCO

        categories = [{"id": number} for number in self.source.category_ids]
        coco = COCO()
        coco.dataset = {"images": self.source.records, "categories": categories, "annotations": annotations}
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco
