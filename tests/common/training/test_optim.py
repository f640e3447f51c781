"""Learning rate, parameter groups, moving average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from common.training.config import TrainConfig
from common.training.optim import EncoderEMA, absolute_lr, adamw, lr_after, make_optimizer
from tests.methods import lr_at


def test_learning_rate_by_hand() -> None:
    """Warm-up is linear from 0; half-way down the cosine is the mean of peak and floor; the end is the floor."""
    config = TrainConfig(epochs=200, warmup_epochs=40, min_lr=1e-5)
    peak = absolute_lr(config, 4096)
    assert peak == pytest.approx(1.5e-4 * 16)
    assert lr_at(0, config, peak) == 0
    assert lr_at(10, config, peak) == pytest.approx(peak / 4)
    assert lr_at(40, config, peak) == pytest.approx(peak)
    assert lr_at(120, config, peak) == pytest.approx((peak + 1e-5) / 2)
    assert lr_at(80, config, peak) == pytest.approx(1e-5 + (peak - 1e-5) * (1 + math.cos(math.pi / 4)) / 2)
    assert lr_at(200, config, peak) == pytest.approx(1e-5)
    assert absolute_lr(TrainConfig(lr=3e-4), 4096) == 3e-4
    assert lr_at(1, TrainConfig(epochs=1, warmup_epochs=1), 1.0) == pytest.approx(1.0)


def test_decay_is_for_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model.register_parameter("token", nn.Parameter(torch.zeros(1, 1, 3)))
    model.register_parameter("fixed", nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    plain, decayed = make_optimizer(model, TrainConfig(weight_decay=0.1), 1.0).param_groups
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.1)
    assert {id(weight) for weight in plain["params"]} == {
        id(weight) for weight in (model[0].bias, model[1].weight, model[1].bias)
    }
    assert {id(weight) for weight in decayed["params"]} == {id(model[0].weight), id(model.token)}


def test_moving_average_by_hand() -> None:
    """average <- d * average + (1 - d) * weight, for what the attention pass runs; the decoder is left out."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 9)

    torch.manual_seed(0)
    model = Model()
    ema = EncoderEMA(model, 0.9, without=["decoder"])
    expected = model.encoder.weight.detach().clone()
    for _ in range(3):
        model.encoder.weight.data.normal_()
        ema.update(model)
        expected = 0.9 * expected + 0.1 * model.encoder.weight.detach()
    assert torch.allclose(ema.model.encoder.weight, expected, atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert set(ema.state_dict()) == {"encoder.weight", "encoder.bias"}
    assert isinstance(model.decoder, nn.Linear)
    copy = EncoderEMA(Model(), 0.9, without=["decoder"])
    copy.load_state_dict(ema.state_dict())
    assert torch.equal(copy.model.encoder.weight, ema.model.encoder.weight)  # type: ignore[union-attr, arg-type]


def test_poly_schedule_by_hand() -> None:
    """Counted from the start of the run; the warm-up scales it; degree 1 ends in the floor along a line."""
    config = TrainConfig(lr_schedule="poly", lr_power=1.0, min_lr=0.1, warmup_start=0.5)
    assert lr_after(0, 10, 100, config, 1.1) == pytest.approx(1.1 * 0.5)
    assert lr_after(5, 10, 100, config, 1.1) == pytest.approx((0.1 + 0.95) * 0.75)
    assert lr_after(10, 10, 100, config, 1.1) == pytest.approx(0.1 + 0.9)
    assert lr_after(75, 10, 100, config, 1.1) == pytest.approx(0.1 + 0.25)
    assert lr_after(100, 10, 100, config, 1.1) == lr_after(120, 10, 100, config, 1.1) == pytest.approx(0.1)
    cubic = TrainConfig(lr_schedule="poly", lr_power=3.0)
    assert lr_after(50, 0, 100, cubic, 2.0) == pytest.approx(2 / 8)


def test_schedules_in_updates_and_in_epochs_agree() -> None:
    """lr_after takes any unit; a schedule of --epochs counts in epochs."""
    for schedule in ("cosine", "multistep", "poly"):
        config = TrainConfig(lr_schedule=schedule, epochs=20, warmup_epochs=4, lr_milestones="0.5,0.875", min_lr=1e-3)  # type: ignore[arg-type]
        for epoch in (0.0, 1.5, 4.0, 9.9, 10.0, 17.5, 19.99):
            assert lr_after(epoch * 7, 28, 140, config, 0.3) == pytest.approx(lr_at(epoch, config, 0.3))
    steps = TrainConfig(lr_schedule="multistep", lr_milestones="0.5,0.875", lr_gamma=0.2, warmup_epochs=0)
    assert [lr_after(done, 0, 16, steps, 1.0) for done in (7, 8, 13, 14, 16)] == pytest.approx([1, 0.2, 0.2, 0.04, 0.04])


@pytest.mark.parametrize("way", [{}, {"foreach": True}, {"fused": True}])
def test_updates_are_those_of_torchs_plain_adamw(way: dict[str, bool]) -> None:
    """Also from a state that was saved by another way of computing, in the middle: the weights go on as if nothing had."""
    torch.manual_seed(0)
    start, gradients = [torch.randn(4, 3), torch.randn(5)], [[torch.randn(4, 3), torch.randn(5)] for _ in range(6)]
    weights = [[nn.Parameter(value.clone()) for value in start] for _ in range(3)]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95)}
    plain, saved = (
        torch.optim.AdamW(parameters, **settings, **some) for parameters, some in zip(weights, ({}, way), strict=False)
    )
    ours = adamw([{"params": weights[2]}], **settings)

    def step(optimizer: torch.optim.Optimizer, number: int) -> None:
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients[number], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    for number in range(6):
        step(plain, number)
        step(saved if number < 3 else ours, number)
        if number == 2:
            ours.load_state_dict(saved.state_dict())
            for mine, other in zip(weights[2], weights[1], strict=True):
                mine.data.copy_(other)
    assert ours.param_groups[0]["fused"] is True
    for value, expected in zip(weights[2], weights[0], strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
