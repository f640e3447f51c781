"""Accuracy on a validation set.

B images   C classes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.training.data import denormalise
from common.training.distributed import Processes
from downstream.classification.config import FinetuneConfig
from downstream.classification.labelled import LabelledImages, middle
from downstream.confusion import confusion_matrix
from downstream.pictures import draw_confusion, draw_predictions
from downstream.training import Scores, evaluation_batches


class ClassificationEvaluation:
    """Accuracy over a validation set, each image counted once over all ranks."""

    def __init__(self, config: FinetuneConfig, val: LabelledImages, processes: Processes) -> None:
        self.config, self.val, self.processes = config, val, processes
        self.transform = middle(config)
        # Drawn: images spread over the set, whose order is by class, that this rank sees.
        own = range(processes.rank, len(val), processes.world)
        count = min(config.pictures, len(own)) if processes.is_main else 0
        self.drawn = {own[place * len(own) // count] for place in range(count)}

    def __call__(self, model: nn.Module) -> Scores:
        """Top-1 and top-5 in percent (top-5 where there are more than five classes), mean cross-entropy, pictures."""
        classes, device = len(self.val.classes), self.processes.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # true class, predicted class
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in evaluation_batches(self.val, self.transform, self.config, self.processes):
            images, labels = batch.views
            logits = model(images).float()
            sums += count_correct(logits, labels)
            matrix += confusion_matrix(logits.argmax(dim=1), labels, classes, ignored=None)
            for place in (place for place, index in enumerate(batch.sample_ids.tolist()) if index in self.drawn):
                drawn.append((images[place].cpu(), labels[place].cpu(), logits[place].cpu()))
        images_seen, top1, top5, loss = self.processes.sum(sums).tolist()
        numbers = {"top1": 100 * top1 / images_seen, "top5": 100 * top5 / images_seen, "val_loss": loss / images_seen}
        if classes <= 5:
            del numbers["top5"]
        return Scores(numbers, self._pictures(self.processes.sum(matrix), drawn))

    def _pictures(self, matrix: Tensor, drawn: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        if not drawn:
            return {}
        images, labels, logits = (torch.stack(column) for column in zip(*drawn, strict=True))
        predictions = draw_predictions(denormalise(images), labels, logits.softmax(dim=1), self.val.classes)
        return {**predictions, **draw_confusion(matrix.cpu(), self.val.classes)}


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Images, those right first, those right among the first five, sum of cross-entropies: float64 [4]."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
    hits = best == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    counts = [torch.tensor(len(labels), device=logits.device), hits[:, 0].sum(), hits.any(dim=1).sum(), loss]
    return torch.stack([count.double() for count in counts])
