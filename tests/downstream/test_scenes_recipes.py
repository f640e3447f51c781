"""The recipes for composed scenes, from pre-training to each downstream task: run in a tiny form, and held against the data."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import beit_evolved.model
import downstream.vit
import mae_evolved.model
import simmim_evolved.model
from beit_evolved import run_beit_pretraining, train_tokenizer
from common.training.errors import BadInput
from downstream import detect, finetune, linear_probe, segment
from mae_evolved import main_pretrain
from scenes.make import make_scenes
from simmim_evolved import main_simmim
from slurm.plan import Resources, plan
from tests.conftest import ROOT

SIDE, CLASSES = 64, 6  # of the drawn shapes below; photographs have 8 classes, and nothing in a recipe says how many
PRETRAINING = {"mae": main_pretrain, "beit": run_beit_pretraining, "simmim": main_simmim}
TASKS = {"finetune": finetune, "linear_probe": linear_probe, "segment": segment, "detect": detect}
LAYOUTS = {"finetune": "imagenet", "linear_probe": "imagenet", "segment": "ade20k", "detect": "coco"}
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/recipes/scenes*.toml"))
TINY = {
    "finetune": "--epochs 1",
    "linear_probe": "--epochs 2 --warmup_epochs 1 --knn 3",
    "segment": "--iterations 2 --warmup_iterations 1",
    "detect": "--epochs 1",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    content = make_scenes(out, train=16, val=4, size=SIDE, seed=0, sources="shapes", workers=1)
    assert len(content["classes"]) == CLASSES
    return out


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 blocks instead of 12."""
    for module in (mae_evolved.model, beit_evolved.model, simmim_evolved.model, downstream.vit):
        for name in [name for name in module.MODELS if "tiny_patch8" in name]:
            monkeypatch.setitem(module.MODELS, name, partial(module.MODELS[name], depth=4))


def recipe(package: str, name: str) -> str:
    return f"--config {ROOT}/{package}/recipes/{name}.toml --device cpu --batch_size 8"


def pretrain(method: str, scenes: Path, folder: Path) -> Path:
    """The checkpoint of an epoch by the recipe."""
    words = f"{recipe(f'{method}_evolved', 'scenes')} --data_path {scenes}/imagenet --epochs 1 --picture_epochs 0"
    if method == "beit":
        made = f"{recipe('beit_evolved', 'scenes_tokenizer')} --data_path {scenes}/imagenet --epochs 1"
        train_tokenizer.main(f"{made} --output_dir {folder}/tokenizer".split())
        words += f" --tokenizer {folder}/tokenizer"
    PRETRAINING[method].main(f"{words} --output_dir {folder}/{method}".split())
    return folder / method / "checkpoint-last.pth"


def test_there_is_one_for_everything() -> None:
    assert [
        "beit_evolved/recipes/scenes.toml", "beit_evolved/recipes/scenes_tokenizer.toml",
        *(f"downstream/recipes/scenes_{task}.toml" for task in sorted(TASKS)),
        "mae_evolved/recipes/scenes.toml", "simmim_evolved/recipes/scenes.toml",
    ] == RECIPES  # fmt: skip


@pytest.mark.parametrize("path", RECIPES)
def test_each_says_what_it_is(path: str) -> None:
    """Source, hardware, claim, and a command that names the file and a module that there is."""
    head = " ".join(line.removeprefix("#").strip() for line in (ROOT / path).read_text().splitlines() if line.startswith("#"))
    for word in ("python -m scenes SCENES", "Hardware: ", "Claim: ", "This project's preset."):
        assert word in head, word
    command = re.search(r"Command: python -m ([\w.]+) --config (\S+) .*--data_path SCENES/(\w+) ", head)
    assert command is not None
    assert command[2] == path
    assert (ROOT / f"{command[1].replace('.', '/')}.py").is_file()
    task = command[1].removeprefix("downstream.")
    assert command[3] == LAYOUTS.get(task, "imagenet")


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("method", ["beit", "simmim", "mae"])
def test_from_scenes_to_scores(method: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pre-training, then each task with nothing but its recipe, data and checkpoint: model, sizes and classes are found."""
    checkpoint = pretrain(method, scenes, tmp_path)
    for task in TASKS if method == "mae" else ("linear_probe",):
        output = tmp_path / task
        words = f"{recipe('downstream', f'scenes_{task}')} --data_path {scenes}/{LAYOUTS[task]} --init_from {checkpoint}"
        capsys.readouterr()
        TASKS[task].main(f"{words} {TINY[task]} --pictures 0 --output_dir {output}".split())
        said = capsys.readouterr().out.splitlines()
        taken = f"--model vit_tiny_patch8 --method {method} --input_size {SIDE} (patch 8, grid 8x8 of the images here)"
        assert said[0] == f"from checkpoint {checkpoint}: {taken}"
        written: dict[str, Any] = json.loads((output / "result.json").read_text())
        classes = written["facts"]["classes"]
        assert (len(classes) if task == "segment" else classes) == CLASSES + (task == "segment"), "and the background"
        assert all(value >= 0 or value == -1 for value in written["metrics"].values())  # -1: no object of that size


@pytest.mark.parametrize("task", TASKS)
def test_batch_is_checked_against_the_data(task: str, scenes: Path, tmp_path: Path) -> None:
    """By the plan, before a job is submitted: 16 images, or as many as have objects."""
    words = f"--config {ROOT}/downstream/recipes/scenes_{task}.toml --data_path {scenes}/{LAYOUTS[task]} --output_dir {tmp_path}"
    with pytest.raises(BadInput, match=r"effective batch of 17 images an update, but an epoch has 16 \(16 images x --repeat 1\)"):
        plan(f"downstream.{task}", words.split(), Resources(1, 1, 17, 17))
    assert plan(f"downstream.{task}", words.split(), Resources(1, 1, 16, 16))
    assert plan(f"downstream.{task}", [*words.split(), "--repeat", "2"], Resources(1, 1, 17, 17))
