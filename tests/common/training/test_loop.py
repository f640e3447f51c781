"""One loop for all: nothing is a kind of it, and every command gives it a task."""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch

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
    assert len(calls) <= 15


@pytest.mark.parametrize("rows", [{}, {"one": torch.tensor(3)}, {"row": torch.tensor([1, 2]), "one": torch.tensor(5.0)}])
def test_tallies_go_over_the_network_in_one_row(rows: dict[str, torch.Tensor]) -> None:
    summed = (2 * flatten_tallies(rows)).tolist()
    split = split_tallies(rows, summed)
    assert split.keys() == rows.keys()
    for name, value in rows.items():
        twice = split[name] if value.ndim else torch.tensor(split[name])
        assert torch.equal(twice.double(), 2 * value.double())
        assert isinstance(split[name], torch.Tensor if value.ndim else float)
