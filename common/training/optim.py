"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.moving_average import EncoderEMA
from common.training.config import AdamWConfig, EpochsConfig, OptimisationConfig, RunConfig

__all__ = ["EncoderEMA", "Schedule", "absolute_lr", "adamw", "lr_after", "make_optimizer"]


def absolute_lr(config: OptimisationConfig, effective_batch: int) -> float:
    """--lr, or where there is none blr * effective batch / blr_batch (the linear scaling rule)."""
    if config.lr is not None:
        return config.lr
    assert isinstance(config, EpochsConfig)
    return config.blr * effective_batch / config.blr_batch


@dataclass(frozen=True)
class Schedule:
    """Length of a run in updates, and the learning rate of each.

    Attributes:
        config: names length, warm-up and decay.
        updates_an_epoch: updates for which there are samples.
        peak: learning rate after the warm-up.
    """

    config: RunConfig
    updates_an_epoch: int
    peak: float

    @property
    def total_updates(self) -> int:
        """Updates of the run."""
        length = self.config.length
        return int(length.total) if length.unit == "updates" else int(length.total) * self.updates_an_epoch

    @property
    def epochs(self) -> int:
        """Epochs of the run; the last one may be cut short by `total_updates`."""
        return -(-self.total_updates // self.updates_an_epoch)

    def updates_in(self, epoch: int) -> int:
        """Updates of this epoch."""
        return min(self.updates_an_epoch, self.total_updates - epoch * self.updates_an_epoch)

    def updates_after(self, epoch: int) -> int:
        """Updates of the run that are done when this epoch is."""
        return epoch * self.updates_an_epoch + self.updates_in(epoch)

    def lr_at(self, epoch: int, update: int) -> float:
        """Learning rate of an update, counted from 0 in its epoch."""
        length, done = self.config.length, epoch + update / self.updates_an_epoch
        if length.unit == "updates":
            done *= self.updates_an_epoch
        return lr_after(done, length.warmup, length.total, self.config, self.peak)


def lr_after(done: float, warmup: float, total: float, config: OptimisationConfig, peak: float) -> float:
    """Learning rate: linear warm-up, then the schedule that the configuration names.

    Args:
        done, warmup, total: in one unit, epochs or updates.
        peak: at the end of the warm-up.
    """
    share = (done - warmup) / max(total - warmup, 1e-9)
    if config.lr_schedule == "poly":  # the warm-up scales the polynomial, which starts with the run (mmsegmentation's way)
        rate = config.min_lr + (peak - config.min_lr) * max(1 - done / total, 0.0) ** config.lr_power
        return rate * _ramp(done, warmup, config.warmup_start)
    if done < warmup:
        return peak * _ramp(done, warmup, config.warmup_start)
    if config.lr_schedule == "multistep":
        return peak * config.lr_gamma ** sum(done >= milestone * total for milestone in config.milestones)
    return config.min_lr + (peak - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _ramp(done: float, warmup: float, start: float) -> float:
    """From `start` to 1 over the warm-up."""
    return 1.0 if done >= warmup else start + (1 - start) * done / warmup


def make_optimizer(model: nn.Module, config: AdamWConfig, lr: float) -> torch.optim.AdamW:
    """AdamW; weights in the second group; biases, everything one-dimensional and `model.no_weight_decay` in the first.

    The order of the groups is that of the official optimizer state of MAE and BEiT, so that it loads here and there.
    """
    spared: tuple[str, ...] = getattr(model, "no_weight_decay", ())
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    without_decay = {name for name, value in trained if value.ndim <= 1 or name.endswith(".bias") or name in spared}
    plain = [value for name, value in trained if name in without_decay]
    decayed = [value for name, value in trained if name not in without_decay]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": config.weight_decay}]
    return adamw(groups, lr, (config.beta1, config.beta2))


def adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW in one kernel a tensor: a quarter of the time of torch's default on a CPU (docs/LOG.md).

    A state is loaded into the way of computing that this optimiser has, whichever it was saved from.
    """
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
    optimizer.register_load_state_dict_pre_hook(_stay_fused)
    return optimizer


def _stay_fused(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state, with each group saying how this optimiser computes. Older and official states say another way, or nothing."""
    ways = {"fused": True, "foreach": None, "capturable": False}
    return {**state, "param_groups": [{**group, **ways} for group in state["param_groups"]]}
