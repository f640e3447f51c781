"""Scores of a model on validation images, and pictures of them.

C classes   H, W height and width of an image
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from common.training.distributed import Processes
from common.training.errors import BadInput
from downstream.confusion import confusion_matrix, scores_of
from downstream.pictures import draw_confusion
from downstream.segmentation.config import SegmentConfig
from downstream.segmentation.data import SegmentationSource, collate_whole, validation_transform
from downstream.segmentation.inference import Predictor
from downstream.segmentation.pictures import Triptych, draw_sheet, triptych
from downstream.training import Scores, evaluation_batches


class SegmentationEvaluation:
    """Scores of a model on the validation images, the same on every rank."""

    def __init__(self, config: SegmentConfig, source: SegmentationSource, names: list[str], processes: Processes) -> None:
        self.config, self.source, self.names, self.processes = config, source, names, processes
        slide = config.inference == "slide"
        self.predict = Predictor(config.image_size, config.strides, slide, config.scales, config.test_flip, config.batch_size)

    def __call__(self, model: nn.Module) -> Scores:
        """Raises BadInput if no pixel of the validation images is labelled."""
        classes, device = len(self.names), self.processes.device
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        rows: dict[int, Triptych] = {}
        for batch in evaluation_batches(self.source, validation_transform, self.config, self.processes, collate_whole):
            images, labels = batch.views[0::2], batch.views[1::2]
            predictions = self.predict(model, images)
            for index, image, truth, predicted in zip(batch.sample_ids.tolist(), images, labels, predictions, strict=True):
                confusion += confusion_matrix(predicted, truth, classes)
                if index < self.config.pictures:
                    rows[index] = triptych(image, truth, predicted, classes)
        return self._scores(self.processes.sum(confusion), rows)

    def _scores(self, confusion: Tensor, rows: dict[int, Triptych]) -> Scores:
        if not confusion.any():
            raise BadInput(f"--data_path {self.config.data_path}: no pixel of the validation annotations is labelled")
        scores = scores_of(confusion)
        numbers = {"mIoU": 100 * scores.miou, "mAcc": 100 * scores.macc, "aAcc": 100 * scores.aacc}
        pictures: dict[str, np.ndarray] = {}
        of_ranks = {index: row for part in self.processes.gather(rows) for index, row in part.items()}
        if of_ranks:
            pictures["validation"] = draw_sheet([of_ranks[index] for index in sorted(of_ranks)], self.names)
            pictures |= draw_confusion(confusion.cpu(), self.names)
        return Scores(numbers, pictures)
