"""Optimiser and learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from common.moving_average import EncoderEMA
from common.training.config import RunConfig

__all__ = ["EncoderEMA", "absolute_lr", "lr_after", "lr_at", "make_optimizer"]


def absolute_lr(config: RunConfig, effective_batch: int) -> float:
    """--lr, or blr * effective batch / blr_batch (the linear scaling rule)."""
    return config.lr if config.lr is not None else config.blr * effective_batch / config.blr_batch


def lr_at(epoch: float, config: RunConfig, peak: float) -> float:
    """Learning rate at a fractional epoch of a run whose length is --epochs."""
    return lr_after(epoch, config.warmup_epochs, config.epochs, config, peak)


def lr_after(done: float, warmup: float, total: float, config: RunConfig, peak: float) -> float:
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
