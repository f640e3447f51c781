"""Linear heads on the blocks of a frozen encoder.

B images   L probed layers   P prefix tokens   N patches   D width   C classes
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.training.data import Batch
from downstream.classification.model import pooled
from downstream.vit import BackboneViT


class Probes(nn.Module):
    """A frozen encoder with a batch norm and a linear layer on each probed block.

    Args:
        layers: blocks, ascending.
        pool: "cls" or "mean".
        norm: applied to the last block's tokens, or None.
    """

    def __init__(self, encoder: BackboneViT, layers: tuple[int, ...], pool: str, norm: nn.LayerNorm | None, classes: int) -> None:
        super().__init__()
        self.encoder, self.layers, self.pool, self.norm = encoder, layers, pool, norm
        self.encoder.requires_grad_(False).eval()
        if norm is not None:
            norm.requires_grad_(False)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(encoder.width, affine=False, eps=1e-6), nn.Linear(encoder.width, classes))
            for _ in layers
        )
        for head in self.heads:
            nn.init.trunc_normal_(head[1].weight, std=0.01)  # type: ignore[index]
            nn.init.zeros_(head[1].bias)  # type: ignore[index]

    def train(self, mode: bool = True) -> Probes:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> pooled features [B, L, D]."""
        outputs = self.encoder(images, self.layers)
        if self.norm is not None and self.layers[-1] == self.encoder.depth - 1:
            outputs[-1] = self.norm(outputs[-1])
        prefix = self.encoder.num_prefix_tokens
        return torch.stack([pooled(tokens, prefix, self.pool) for tokens in outputs], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width], or their features [B, L, D] -> logits [B, L, C]."""
        features = inputs if inputs.ndim == 3 else self.features(inputs)
        return torch.stack([head(features[:, place]) for place, head in enumerate(self.heads)], dim=1)


def probe_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over layers of the mean cross-entropy: each head then learns as if it were alone."""
    inputs, labels = batch.views
    logits = model(inputs).float()  # [B, L, C]
    each = functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="none")
    return each.reshape(logits.shape[:2]).mean(dim=0).sum()
