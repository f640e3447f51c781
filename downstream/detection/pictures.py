"""Pictures of true and detected objects.

n objects of an image
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common.visualize.captions import Group, Sheet, write_label
from common.visualize.colours import distinct_colours, text_colour
from downstream.detection.coco import CocoSource, Detections, decoded, fitted

DRAWN_SCORE = 0.5
_PICTURE_SIDE = 384
_COLOURS = tuple(tuple(round(255 * value) for value in colour) for colour in distinct_colours(10).tolist())


def draw_detections(source: CocoSource, detections: Sequence[Detections], count: int) -> dict[str, np.ndarray]:
    """The first `count` images: truth on the left, what was detected with a score of one half or more on the right.

    Returns:
        {"detections": uint8 [height, width, 3]}, or nothing without an image to show.
    """
    shown = sorted((image for image in detections if image.place < count), key=lambda image: image.place)
    if not shown:
        return {}
    columns = Group(("true objects", f"detected, score {DRAWN_SCORE} or more"))
    return {"detections": Sheet([columns], rows=[truth_and_detections(source, image) for image in shown]).draw()}


def truth_and_detections(source: CocoSource, detected: Detections) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of one image."""
    record, tools = source.records[detected.place], source.tools
    image, size = source.load(detected.place).image, (record["height"], record["width"])
    objects = [truth for truth in source.annotations if truth["image_id"] == record["id"] and not truth.get("iscrowd")]
    names = [source.names[source.category_ids.index(truth["category_id"])] for truth in objects]
    true_boxes = np.array([truth["bbox"] for truth in objects], dtype=float).reshape(-1, 4)
    true_boxes[:, 2:] += true_boxes[:, :2]
    truth = draw(image, true_boxes, [decoded(truth["segmentation"], size, tools) for truth in objects], names)
    sure = np.flatnonzero(detected.scores >= DRAWN_SCORE)
    words = [f"{source.names[detected.labels[i] - 1]} {detected.scores[i]:.2f}" for i in sure]
    return truth, draw(image, detected.boxes[sure], [tools.decode(detected.masks[i]) for i in sure], words)


def draw(image: Image.Image, boxes: np.ndarray, masks: list[np.ndarray], words: list[str]) -> np.ndarray:
    """An image with boxes, masks and words on it, its longer side 384 pixels: uint8 [height, width, 3]."""
    height, width = fitted((image.height, image.width), (_PICTURE_SIDE, _PICTURE_SIDE))
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    if not len(boxes):
        return pixels.permute(1, 2, 0).numpy()
    scaled = torch.from_numpy(boxes * ([width / image.width, height / image.height] * 2)).float()
    planes = torch.from_numpy(np.stack(masks))[:, None].float()
    planes = nn.functional.interpolate(planes, size=(height, width), mode="nearest-exact")[:, 0] > 0
    colours: list[Any] = [_COLOURS[i % len(_COLOURS)] for i in range(len(boxes))]
    pixels = draw_segmentation_masks(pixels, planes, alpha=0.45, colors=colours)
    pixels = draw_bounding_boxes(pixels, scaled, colors=colours, width=2)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for box, text, colour in zip(scaled.tolist(), words, colours, strict=True):  # above all boxes, on the colour of its own
        write_label(pen, (round(box[0]), round(box[1])), text, text_colour(np.array(colour) / 255), colour)
    return np.array(picture)
