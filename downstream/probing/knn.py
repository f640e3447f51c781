"""Classification by k nearest neighbours.

B images   D width   C classes   n training images   k neighbours
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

KNN_TEMPERATURE = 0.07
"""Of the neighbours' votes, exp(cosine / temperature): Wu et al., CVPR 2018; DINO."""


def knn_votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int, chunk: int = 256) -> Tensor:
    """Votes of the k most similar training images, each weighted by exp(cosine / 0.07).

    Args:
        bank: features of the training images [n, D].
        labels: their classes [n].
        queries: [B, D].
        chunk: queries compared at once.

    Returns:
        [B, C], higher is better.
    """
    bank, queries = functional.normalize(bank, dim=1), functional.normalize(queries, dim=1)
    votes = torch.zeros(len(queries), classes, dtype=queries.dtype, device=queries.device)
    for first in range(0, len(queries), chunk):
        near = (queries[first : first + chunk] @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((near.values - 1) / KNN_TEMPERATURE).exp()  # minus one: no overflow, and the same order
        votes[first : first + chunk].scatter_add_(1, labels[near.indices], weights)
    return votes
