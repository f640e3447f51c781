"""Recipes are found by their names from any folder, listed in --help, and an unknown name says which there are."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from beit_evolved.run_beit_pretraining import BEiTConfig
from beit_evolved.train_tokenizer import TokenizerConfig
from common.training.command_line import make_parser, parse_arguments, parse_flags
from common.training.config import RunConfig
from common.training.errors import BadInput
from common.training.recipes import recipes_folder
from downstream.classification.config import FinetuneConfig
from downstream.detection.config import DetectConfig
from downstream.probing.config import ProbeConfig
from downstream.segmentation.config import SegmentConfig
from mae_evolved.main_pretrain import MAEConfig
from simmim_evolved.main_simmim import SimMIMConfig
from tests.conftest import ROOT, run_module

LISTED: dict[type[RunConfig], set[str]] = {
    MAEConfig: {
        "demo", "cifar10", "cifar100", "stl10", "fashion_mnist", "table4_mae_small_200", "table5_mae_base_300",
    },
    BEiTConfig: {"demo", "official_beit_base_800", "table4_beit_small_200"},
    TokenizerConfig: {"demo_tokenizer"},
    SimMIMConfig: {"demo", "official_simmim_base_800", "table4_simmim_small_200"},
    FinetuneConfig: {"fashion_mnist_finetune", "table4_finetune_small", "table5_finetune_base"},
    ProbeConfig: {"fashion_mnist_linear_probe", "table5_linear_probe_base"},
    SegmentConfig: {"ade20k_upernet_80k"},
    DetectConfig: {"coco_mask_rcnn_15ep"},
}  # fmt: skip


@pytest.mark.parametrize("config", LISTED, ids=lambda config: config.__name__)
def test_help_lists_the_recipes_of_the_command(config: type[RunConfig]) -> None:
    """Those that it takes, each with the first line of its file, and none of the other commands that share the folder."""
    shown = make_parser(config, "program", "").format_help().split("\nrecipes:\n")[1]
    lines = dict(re.findall(r"^  (\S+) +(.*)$", shown, re.MULTILINE))
    assert set(lines) >= LISTED[config]
    others = {name for other, names in LISTED.items() if recipes_folder(other) == recipes_folder(config) for name in names}
    assert not set(lines) & (others - LISTED[config])
    folder = recipes_folder(config)
    assert folder is not None
    for name, line in lines.items():
        assert f"# {line}" == (folder / f"{name}.toml").read_text().splitlines()[0]


def test_a_name_is_the_file_of_that_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names are those of the command's own package: MAE's demo is not SimMIM's. What the command line says wins."""
    monkeypatch.chdir(tmp_path)
    by_path = parse_arguments(
        MAEConfig, "p", "", ["--config", str(ROOT / "mae_evolved/recipes/cifar10.toml"), "--data_path", "x"]
    )
    assert parse_arguments(MAEConfig, "p", "", ["--config", "cifar10", "--data_path", "x"]) == by_path
    assert parse_arguments(MAEConfig, "p", "", ["--config", "demo", "--epochs", "3"])[0].epochs == 3
    assert parse_arguments(MAEConfig, "p", "", ["--config", "demo"])[0].model == "mae_vit_tiny_patch8"
    assert parse_arguments(SimMIMConfig, "p", "", ["--config", "demo"])[0].model == "simmim_vit_tiny_patch8"
    tuned = parse_flags(FinetuneConfig, "p", "", ["--config", "fashion_mnist_finetune", "--data_path", "x"])
    assert tuned.model == "vit_tiny_patch4"


def test_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one without a suffix, here or elsewhere; and a file here by the name of a recipe wins."""
    monkeypatch.chdir(tmp_path)
    Path("demo").write_text("epochs = 7\nwarmup_epochs = 1\n")
    for said in ("demo", "./demo", str(tmp_path / "demo")):
        assert parse_arguments(MAEConfig, "p", "", ["--config", said])[0].epochs == 7
    for said in ("none.toml", "mae_evolved/demo"):
        with pytest.raises(BadInput, match=f"--config {said}: .*No such file"):
            parse_arguments(MAEConfig, "p", "", ["--config", said])


def test_an_unknown_name_is_one_line_with_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput) as error:
        parse_flags(TokenizerConfig, "p", "", ["--config", "demo2"])
    assert (
        str(error.value) == "--config demo2: no such file, and no recipe by that name (recipes: demo_tokenizer, scenes_tokenizer)"
    )


def test_a_command_run_as_a_program_finds_its_recipes() -> None:
    """As a program its configuration is of the module __main__."""
    done = run_module("simmim_evolved.main_simmim --config nothing", PYTHONPATH=os.fspath(ROOT))
    assert done.returncode == 2
    assert "(recipes: demo, official_simmim_base_800, scenes, table4_simmim_small_200" in done.stderr
