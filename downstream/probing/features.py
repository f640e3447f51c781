"""Features of whole sets, made once.

B images   L probed layers   D width   n images of the set
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from common.training.task import Run
from downstream.classification.labelled import middle
from downstream.probing.config import ProbeConfig
from downstream.probing.heads import Probes
from downstream.training import evaluation_batches


class FeatureSource:
    """Features and classes in memory, as samples."""

    def __init__(self, features: Tensor, labels: Tensor, name: Callable[[int], str]) -> None:
        self.features, self.labels, self.name = features, labels, name

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """([L, D], class)."""
        return self.features[index], self.labels[index]


def as_is(sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The transform of features: none."""
    return sample


@torch.no_grad()
def extract(model: Probes, source: Any, config: ProbeConfig, run: Run) -> tuple[Tensor, Tensor]:
    """Features float32 [n, L, D] and classes [n] of all images' middles, in the order of the set, on the CPU of every rank."""
    model.eval()
    processes, extracted = run.processes, []
    for batch in evaluation_batches(source, middle(config), config, processes):
        with run.autocast():
            features = model.features(batch.images)
        extracted.append((batch.sample_ids.cpu(), features.float().cpu(), batch.views[1].cpu()))
    own = tuple(torch.cat(parts) for parts in zip(*extracted, strict=True)) if extracted else None
    of_ranks = [part for part in processes.gather(own) if part is not None]
    ids, features, labels = (torch.cat(parts) for parts in zip(*of_ranks, strict=True))
    order = ids.argsort()
    return features[order], labels[order]
