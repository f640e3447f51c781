"""One loop for all: nothing is a kind of it, and every command gives it a task."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common.models.block import Attention, Block
from common.training.loop import Loop
from common.training.task import Task, flatten_tallies, split_tallies

COMMANDS = (
    "mae_evolved.main_pretrain", "beit_evolved.run_beit_pretraining", "simmim_evolved.main_simmim",
    "beit_evolved.train_tokenizer",
    "downstream.finetune", "downstream.linear_probe", "downstream.segment", "downstream.detect",
)  # fmt: skip


def test_nothing_is_a_kind_of_loop() -> None:
    for command in COMMANDS:
        importlib.import_module(command)
    assert Loop.__final__  # type: ignore[attr-defined]
    assert Loop.__subclasses__() == []
    kinds = {kind.__name__ for kind in Task.__subclasses__() if kind.__module__.split(".")[0] != "tests"}
    assert kinds == {"PretrainingTask", "SupervisedTask", "TokenizerTask"}


def test_a_task_fills_in_calls_of_the_protocol_only() -> None:
    """Every public method that the loop calls on a task is one of Task's, and says what it is for."""
    calls = {name: call for name, call in vars(Task).items() if inspect.isfunction(call) and not name.startswith("_")}
    source = inspect.getsource(Loop)
    for name, call in calls.items():
        assert f"task.{name}(" in source, name
        assert call.__doc__, name
    assert len(calls) <= 18


@pytest.mark.parametrize("rows", [{}, {"one": torch.tensor(3)}, {"row": torch.tensor([1, 2]), "one": torch.tensor(5.0)}])
def test_tallies_go_over_the_network_in_one_row(rows: dict[str, torch.Tensor]) -> None:
    summed = (2 * flatten_tallies(rows)).tolist()
    split = split_tallies(rows, summed)
    assert split.keys() == rows.keys()
    for name, value in rows.items():
        twice = split[name] if value.ndim else torch.tensor(split[name])
        assert torch.equal(twice.double(), 2 * value.double())
        assert isinstance(split[name], torch.Tensor if value.ndim else float)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_compiled_blocks_are_inside_what_averages_gradients() -> None:
    """So that accumulation steps can go without the exchange, and the loop finds `no_sync`; the state dict keeps its names."""
    model = nn.Sequential(Block(Attention(8, 2, fused=True)), Block(Attention(8, 2, fused=True)))
    names = list(model.state_dict())
    run = SimpleNamespace(
        task=SimpleNamespace(model=model),
        config=SimpleNamespace(compile=True, accum_iter=2),
        processes=SimpleNamespace(world=2),
        device=torch.device("cpu"),
        run=SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False)),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    run.trained = Loop._wrapped(run)  # type: ignore[arg-type]
    assert isinstance(run.trained, nn.parallel.DistributedDataParallel)
    assert run.trained.module is model
    assert all(block.compiled for block in model)
    assert list(model.state_dict()) == names
    exchanged: list[bool] = []
    run.task.loss = lambda trained, batch, prepared: (
        exchanged.append(trained.require_backward_grad_sync) or batch.requires_grad_()
    )
    for last in (False, True):
        Loop._backward(run, torch.tensor(1.0), None, SimpleNamespace(terms={}), last)  # type: ignore[arg-type]
    assert exchanged == [False, True]
