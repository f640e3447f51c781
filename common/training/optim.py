"""Optimiser, learning-rate schedule, and the moving average of an encoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.training.config import RunConfig


def absolute_lr(config: RunConfig, effective_batch: int) -> float:
    """--lr, or blr * effective batch / blr_batch (the linear scaling rule)."""
    return config.lr if config.lr is not None else config.blr * effective_batch / config.blr_batch


def lr_at(epoch: float, config: RunConfig, peak: float) -> float:
    """Learning rate at a fractional epoch: linear warm-up, then the schedule that the configuration names."""
    if epoch < config.warmup_epochs:
        return peak * config.warmup_start + (1 - config.warmup_start) * peak * epoch / config.warmup_epochs
    if config.lr_schedule == "multistep":
        return peak * config.lr_gamma ** sum(epoch >= share * config.epochs for share in config.milestones)
    share = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def make_optimizer(model: nn.Module, config: RunConfig, lr: float) -> torch.optim.AdamW:
    """AdamW; weights in the second group; biases, everything one-dimensional and `model.no_weight_decay` in the first.

    The order of the groups is that of the official optimizer state of MAE and BEiT, so that it loads here and there.
    """
    spared: tuple[str, ...] = getattr(model, "no_weight_decay", ())
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    without_decay = {name for name, value in trained if value.ndim <= 1 or name.endswith(".bias") or name in spared}
    plain = [value for name, value in trained if name in without_decay]
    decayed = [value for name, value in trained if name not in without_decay]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.weight_decay}]
    return torch.optim.AdamW(groups, lr=lr, betas=(config.beta1, config.beta2))


class EncoderEMA:
    """Moving average of the weights that make the attention maps (`--attention_from ema`).

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
