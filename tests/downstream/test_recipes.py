"""Recipes of the downstream tasks: they parse, and say of themselves what they are."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

import downstream
from common.training.command_line import parse_flags
from downstream.finetune import FinetuneConfig
from downstream.linear_probe import ProbeConfig
from downstream.training import TaskConfig
from tests.conftest import ROOT

FOLDER = Path(downstream.__path__[0]) / "recipes"
TASKS: dict[str, type[TaskConfig]] = {"finetune": FinetuneConfig, "linear_probe": ProbeConfig}
RECIPES = [(task, path) for path in sorted(FOLDER.glob("*.toml")) for task in TASKS if f"_{task}" in path.name]


def read(task: str, path: Path) -> TaskConfig:
    return parse_flags(TASKS[task], task, "", ["--config", str(path), "--data_path", "images"])


def test_there_are_the_recipes_of_the_tables() -> None:
    assert {path.stem for _, path in RECIPES} >= {
        "table4_finetune_small", "table5_finetune_base", "table5_linear_probe_base",
        "fashion_mnist_finetune", "fashion_mnist_linear_probe",
    }  # fmt: skip
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packaged == {"evolved_part_masking": ["py.typed"]}  # recipes are run from a checkout: the wheel is the mask alone


@pytest.mark.parametrize(("task", "path"), RECIPES, ids=[path.stem for _, path in RECIPES])
def test_header_agrees_with_the_values(task: str, path: Path) -> None:
    """Effective batch = processes x batch_size x accum_iter; as many processes in the command; the command names the file."""
    config = read(task, path)
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(line.removeprefix("#").strip() for line in header)
    total, processes, size = map(int, re.search(r"effective batch (\d+) = (\d+) (?:GPUs|process) x (\d+)", text).groups())  # type: ignore[union-attr]
    assert total == processes * size
    assert size == config.batch_size * config.accum_iter
    counts = [int(count) for count in re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", text)]
    started = 1
    for count in counts:
        started *= count
    assert started == processes
    assert re.search(rf"Command: .*-m downstream\.{task} --config downstream/recipes/{path.name} ", text)
    assert "Claim: none" in text


def test_tables_follow_the_design() -> None:
    """Fine-tuning and the probe as their sources have them; the defaults of the programs equal the recipes."""
    for name, model in (("table4_finetune_small", "vit_small_patch16"), ("table5_finetune_base", "vit_base_patch16")):
        config, default = read("finetune", FOLDER / f"{name}.toml"), FinetuneConfig()
        assert isinstance(config, FinetuneConfig)
        assert (config.model, config.epochs, config.layer_decay, config.drop_path) == (model, 100, 0.65, 0.1)
        assert (config.mixup, config.cutmix, config.random_erasing, config.auto_augment) == (
            0.8,
            1.0,
            0.25,
            "rand-m9-mstd0.5-inc1",
        )
        differ = {key for key in vars(config) if getattr(config, key) != getattr(default, key)}
        assert differ <= {"model", "batch_size", "data_path"}
    probe = read("linear_probe", FOLDER / "table5_linear_probe_base.toml")
    assert (probe.blr, probe.blr_batch, probe.epochs, probe.warmup_epochs, probe.weight_decay) == (0.1, 256, 90, 10, 0)
    assert {key for key in vars(probe) if getattr(probe, key) != getattr(ProbeConfig(), key)} <= {
        "model",
        "batch_size",
        "data_path",
    }
