"""Learning rate, parameter groups, moving average."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from common.training.config import TrainConfig
from common.training.optim import EncoderEMA, absolute_lr, lr_at, make_optimizer


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
    assert {id(one) for one in plain["params"]} == {id(one) for one in (model[0].bias, model[1].weight, model[1].bias)}
    assert {id(one) for one in decayed["params"]} == {id(model[0].weight), id(model.token)}


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
