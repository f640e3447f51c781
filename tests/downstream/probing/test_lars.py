"""LARS against its equations in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from downstream.probing.lars import LARS

START = {"matrix": (5, 3), "kernel": (2, 3, 2, 2), "bias": (5,), "zero": (4, 2), "still": (2, 2)}


def reference(
    weights: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]], rates: list[float]
) -> dict[str, np.ndarray]:
    """You et al., with momentum 0.8, weight decay 0.3, trust 0.02; vectors take plain momentum steps."""
    weights = {name: value.copy() for name, value in weights.items()}
    velocity = {name: np.zeros_like(value) for name, value in weights.items()}
    for step, rate in zip(gradients, rates, strict=True):
        for name, weight in weights.items():
            direction = step[name].copy()
            if weight.ndim > 1:
                direction += 0.3 * weight
                size, slope = np.sqrt((weight**2).sum()), np.sqrt((direction**2).sum())
                direction *= 0.02 * size / slope if size > 0 and slope > 0 else 1
            velocity[name] = 0.8 * velocity[name] + direction
            weight -= rate * velocity[name]
    return weights


def test_steps_by_the_equations() -> None:
    """Five steps with a changing rate: matrices, kernels, vectors, a matrix at zero, one with no gradient and no weight."""
    generator = np.random.default_rng(0)
    start = {name: generator.normal(size=shape) for name, shape in START.items()}
    start["zero"][:] = start["still"][:] = 0
    gradients = [{name: generator.normal(size=shape) for name, shape in START.items()} for _ in range(5)]
    for step in gradients:
        step["still"][:] = 0
    rates = [0.0, 0.5, 3.0, 1.0, 0.25]
    weights = {name: nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    unused = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([*weights.values(), unused], lr=9.0, weight_decay=0.3, momentum=0.8, trust=0.02)
    for step, rate in zip(gradients, rates, strict=True):
        for name, weight in weights.items():
            weight.grad = torch.tensor(step[name])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for name, expected in reference(start, gradients, rates).items():
        np.testing.assert_allclose(weights[name].detach().numpy(), expected, rtol=1e-12, atol=1e-14, err_msg=name)
    assert torch.equal(unused.detach(), torch.ones(2, 2))
    assert not weights["still"].detach().any()
    assert weights["zero"].detach().abs().max() > 0.1


def test_first_step_of_a_matrix_is_trust_times_its_size() -> None:
    """Whatever the size of the gradient."""
    for factor in (1e-6, 1.0, 1e6):
        weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        weight.grad = factor * torch.tensor([[0.0, 1.0]])
        LARS([weight], lr=2.0).step()
        torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0 - 2.0 * 1e-3 * 5.0]]))


def test_state_is_resumed() -> None:
    """Three steps equal two, a saved state, and one."""
    torch.manual_seed(0)
    whole, cut, gradients = nn.Linear(3, 2), nn.Linear(3, 2), [torch.randn(2, 3) for _ in range(3)]
    cut.load_state_dict(whole.state_dict())
    optimizers = [LARS(model.parameters(), lr=0.5) for model in (whole, cut)]
    for count, gradient in enumerate(gradients):
        if count == 2:
            saved = optimizers[1].state_dict()
            optimizers[1] = LARS(cut.parameters(), lr=0.1)
            optimizers[1].load_state_dict(saved)
        for model, optimizer in zip((whole, cut), optimizers, strict=True):
            model.weight.grad, model.bias.grad = gradient.clone(), gradient[:, 0].clone()
            optimizer.step()
    assert torch.equal(whole.weight, cut.weight)
    assert torch.equal(whole.bias, cut.bias)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_types_are_kept(precision: torch.dtype) -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=precision))
    weight.grad = torch.ones_like(weight)
    LARS([weight], lr=1.0).step()
    assert weight.dtype == precision
    assert weight.detach().float().mean() <= 1
