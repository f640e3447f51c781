"""Moving average of the encoder whose attention makes the graph (`--attention_from ema`)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class EncoderEMA:
    """Moving average of the weights that make the attention maps.

    The copy leaves out what the attention pass does not run (names in `without`, such as a decoder).

    Args:
        model: the model being trained.
        decay: share of the old average kept at each update.
        without: submodules that the copy does not need.
    """

    def __init__(self, model: nn.Module, decay: float, without: Iterable[str] = ()) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model)
        for name in without:
            setattr(self.model, name, nn.Identity())
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average = decay * average + (1 - decay) * model."""
        current = dict(model.named_parameters())
        pairs = [(average, current[name]) for name, average in self.model.named_parameters()]
        averages: list[Tensor] = [average for average, _ in pairs]
        torch._foreach_lerp_(averages, [value.detach() for _, value in pairs], 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Weights of the average."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them, strictly."""
        self.model.load_state_dict(state)
