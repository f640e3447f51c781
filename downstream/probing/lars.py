"""LARS (You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017), for linear probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """Momentum SGD whose step is scaled, for each weight matrix, by |w| / |gradient|.

    With g the gradient plus weight_decay * w, and t = trust * |w| / |g| (1 where either norm is 0):
    velocity <- momentum * velocity + t * g;  w <- w - lr * velocity.
    Biases and everything one-dimensional take plain momentum steps without weight decay, as in MoCo v3 and MAE.

    Args:
        trust: coefficient of the ratio of norms.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 1e-3,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; there is no closure to call."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient = weight.grad
        assert gradient is not None
        if weight.ndim > 1:
            gradient = gradient + group["weight_decay"] * weight
            sizes = weight.norm(), gradient.norm()
            ratio = group["trust"] * sizes[0] / sizes[1]
            gradient = gradient * torch.where((sizes[0] > 0) & (sizes[1] > 0), ratio, torch.ones_like(ratio))
        state = self.state[weight]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        state["velocity"].mul_(group["momentum"]).add_(gradient)
        weight.sub_(group["lr"] * state["velocity"])
