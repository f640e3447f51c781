"""Accuracy of probed layers and of k-NN on features that are made once.

B images   L probed layers   D width   C classes   n images   k neighbours
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.training.distributed import Processes
from downstream.classification.evaluation import count_correct
from downstream.pictures import draw_layers
from downstream.probing.config import ProbeConfig
from downstream.probing.heads import Probes
from downstream.probing.knn import knn_votes
from downstream.training import Scores


class ProbeEvaluation:
    """Accuracy of every probed layer on cached validation features, and of k-NN once.

    Args:
        val: features [n, L, D] and classes [n] of the validation images.
        train: those of the training images, or None without k-NN.
        trained: whether the heads are worth a number; else there are only those of k-NN.
    """

    def __init__(
        self,
        config: ProbeConfig,
        val: tuple[Tensor, Tensor],
        train: tuple[Tensor, Tensor] | None,
        classes: int,
        processes: Processes,
        trained: bool = True,
    ) -> None:
        self.config, self.processes, self.classes, self.trained = config, processes, classes, trained
        own = slice(processes.rank, None, processes.world)
        self.features, self.labels = val[0][own], val[1][own]
        self.knn = self._knn(*train) if train is not None else {}

    def __call__(self, model: nn.Module) -> Scores:
        """top1 and top5 are those of the last probed layer; with several layers each has a number of its own besides."""
        assert isinstance(model, Probes)
        device, names = self.processes.device, [f"_layer{layer}" for layer in model.layers]
        sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)
        for first in range(0, len(self.labels), self.config.batch_size):
            here = slice(first, first + self.config.batch_size)
            logits, labels = model(self.features[here].to(device)).float(), self.labels[here].to(device)
            sums += torch.stack([count_correct(logits[:, place], labels) for place in range(len(names))])
        shares = self.processes.sum(sums)
        shares = 100 * shares[:, 1:3] / shares[:, :1]  # [L, (top-1, top-5)]
        numbers = self._named(shares, names) if self.trained else {}
        curves = {**({"linear": shares[:, 0].tolist()} if self.trained else {}), **self._curves()}
        drawn = draw_layers(list(model.layers), curves) if len(names) > 1 and self.processes.is_main else {}
        return Scores({**numbers, **self.knn}, drawn)

    def _named(self, shares: Tensor, names: list[str]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for column, kind in enumerate(("top1", "top5") if self.classes > 5 else ("top1",)):
            numbers[kind] = float(shares[-1, column])
            if len(names) > 1:
                numbers |= {f"{kind}{name}": float(value) for name, value in zip(names, shares[:, column], strict=True)}
        return numbers

    def _knn(self, bank: Tensor, labels: Tensor) -> dict[str, float]:
        """Top-1 in percent: `knn20` of the last layer, and `knn20_layer5` of each where there are several."""
        numbers: dict[str, float] = {}
        for k in self.config.neighbours:
            shares = [self._knn_share(bank[:, place], labels, place, k) for place in range(len(self.config.layers))]
            numbers[f"knn{k}"] = shares[-1]
            if len(shares) > 1:
                numbers |= {f"knn{k}_layer{layer}": share for layer, share in zip(self.config.layers, shares, strict=True)}
        return numbers

    def _knn_share(self, bank: Tensor, labels: Tensor, place: int, k: int) -> float:
        queries, bank, labels = (tensor.to(self.processes.device) for tensor in (self.features[:, place], bank, labels))
        votes = knn_votes(bank, labels, queries, k, self.classes)
        counts = torch.tensor([int((votes.argmax(dim=1).cpu() == self.labels).sum()), len(self.labels)], dtype=torch.float64)
        right, seen = self.processes.sum(counts.to(self.processes.device)).tolist()
        return 100 * right / seen

    def _curves(self) -> dict[str, list[float]]:
        return {
            f"{k}-NN": [self.knn[f"knn{k}_layer{layer}"] for layer in self.config.layers]
            for k in self.config.neighbours
            if self.knn and len(self.config.layers) > 1
        }
