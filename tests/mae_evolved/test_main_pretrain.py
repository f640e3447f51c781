"""The command as a user meets it: real processes, exit codes, one-line errors, help."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.training.checkpoint import LAST
from mae_evolved.model import MODELS
from tests.conftest import TINY, run_module

PROGRAM = "mae_evolved.main_pretrain"


def test_help_shows_every_flag_with_its_default() -> None:
    run = run_module(f"{PROGRAM} --help")
    assert run.returncode == 0
    for text in (
        "--norm_pix_loss, --no_norm_pix_loss",
        "exponent of alpha = (t/T)^gamma (Eq. 4, Table 2) [2.0]",
        "--recipe {authors,best,paper}",
    ):
        assert " ".join(text.split()) in " ".join(run.stdout.split())
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--data_path /nowhere", "--data_path /nowhere: no such folder"),
        (
            "--input_size 16 --model mae_vit_tiny_patch4",
            "K = 40 parts is above the N = 16 patches of an image "
            "(image 16, patch grid 4x4; see --mask_ratio, --parts_start, --preset small)",
        ),
        ("--epochs ten", "argument --epochs: invalid int value: 'ten' (see --help)"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags: str, line: str, tmp_path: Path) -> None:
    """In a process of its own; nothing is written."""
    run = run_module(f"{PROGRAM} --output_dir {tmp_path}/out {flags}")
    assert run.returncode == 2
    assert run.stderr == f"main_pretrain: error: {line}\n"
    assert not (tmp_path / "out").exists()


def test_checkpoints_move_to_the_official_layout(image_folder: Path, tmp_path: Path) -> None:
    """What is under `model` is the plain state dict of the model; `optimizer` and `epoch` are there too."""
    run = run_module(f"{PROGRAM} {TINY} --epochs 1 --data_path {image_folder} --output_dir {tmp_path}/out")
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    state = torch.load(tmp_path / "out" / LAST, weights_only=True)
    MODELS["mae_vit_tiny_patch4"](input_size=(16, 16)).load_state_dict(state["model"], strict=True)
    assert state["epoch"] == 0
    assert len(state["optimizer"]["param_groups"]) == 2
    assert f"checkpoint   {tmp_path}/out/checkpoint-last.pth" in run.stdout
