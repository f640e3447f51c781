"""Scores of a detector on validation images.

n objects of an image   h, w height and width of an image in its file
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from common.training.distributed import Processes
from downstream.detection.coco import (
    MASK_THRESHOLD,
    CocoScores,
    CocoSource,
    Detections,
    Fit,
    ObjectBatch,
    collate_objects,
    fitted,
)
from downstream.detection.config import DetectConfig
from downstream.detection.mask_rcnn import paste
from downstream.detection.pictures import draw_detections
from downstream.training import Scores, evaluation_batches


@dataclass
class DetectionEvaluation:
    """Scores of a model on the validation images, shared by the ranks."""

    config: DetectConfig
    source: CocoSource
    processes: Processes

    def __post_init__(self) -> None:
        self.judge = CocoScores(self.source) if self.processes.is_main else None

    def __call__(self, model: nn.Module) -> Scores:
        config = self.config
        transform = Fit(config.image_size, config.interpolation)
        own: list[Detections] = []
        for batch in evaluation_batches(self.source, transform, config, self.processes, collate_objects):
            assert isinstance(batch, ObjectBatch)
            for target, output in zip(batch.targets, model(batch.images), strict=True):
                own.append(self.in_file(int(target["place"]), output))
        detections = [image for rank in self.processes.gather(own) for image in rank]
        numbers = self.judge(detections) if self.judge is not None else {}
        pictures = draw_detections(self.source, detections, config.pictures) if self.processes.is_main else {}
        return Scores(self.processes.gather(numbers)[0], pictures)

    def in_file(self, place: int, output: dict[str, Tensor]) -> Detections:
        """Objects of an image as the model sees it -> of the image as it is in its file."""
        record = self.source.records[place]
        size = (record["height"], record["width"])
        resized = fitted(size, self.config.image_size)
        down, across = resized[0] / size[0], resized[1] / size[1]
        edges = output["boxes"].new_tensor([resized[1], resized[0], resized[1], resized[0]])
        inside = output["boxes"].minimum(edges)  # what was filled up is no part of the image
        kept = (inside[:, 2:] > inside[:, :2]).all(dim=1)
        boxes, masks = inside[kept], output["masks"][kept]
        scale = boxes.new_tensor([across, down, across, down])
        packed = pack(paste(masks, output["boxes"][kept], (down, across), size) >= MASK_THRESHOLD, self.source.tools)
        labels, scores = (output[key][kept].cpu().numpy() for key in ("labels", "scores"))
        return Detections(place, (boxes / scale).cpu().numpy(), labels, scores, packed)


def pack(masks: Tensor, tools: Any) -> list[dict[str, Any]]:
    """Masks [n, h, w] as pycocotools' run lengths."""
    planes = masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0)
    packed: list[dict[str, Any]] = tools.encode(np.asfortranarray(planes))
    return packed
