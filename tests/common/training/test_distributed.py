"""Two real processes under torchrun (gloo) equal one process with the same global batch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.training.checkpoint import LAST
from tests.conftest import TINY, free_ports, read_log, run_module


def step_losses(output: Path) -> list[float]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.value for event in events.Scalars("train/loss")]


def test_two_processes_equal_one(image_folder: Path, tmp_path: Path) -> None:
    """Loss of each step to 1e-5, the same share of spared passes, and the same weights up to rounding."""
    flags = f"{TINY} --data_path {image_folder} --accum_iter 2 --num_workers 1"
    alone = run_module(f"mae_evolved.main_pretrain {flags} --batch_size 4 --output_dir {tmp_path}/one")
    assert alone.returncode == 0, alone.stderr
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m mae_evolved.main_pretrain"
    two = run_module(f"{launch} {flags} --batch_size 2 --output_dir {tmp_path}/two")
    assert two.returncode == 0, two.stderr
    first, second = step_losses(tmp_path / "one"), step_losses(tmp_path / "two")
    assert len(first) == len(second) == 8
    assert second == pytest.approx(first, abs=1e-5)
    keys = ("skipped_attention", "alpha", "num_parts", "images", "epoch")
    assert [[line[key] for key in keys] for line in read_log(tmp_path / "one")] == [
        [line[key] for key in keys] for line in read_log(tmp_path / "two")
    ]
    states = [torch.load(tmp_path / name / LAST, weights_only=True)["model"] for name in ("one", "two")]
    assert max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0]) < 1e-4


def test_bad_input_of_one_rank_ends_all(image_folder: Path, tmp_path: Path) -> None:
    """An unreadable image that only one rank meets ends the job, with its name, and without a traceback of ours."""
    broken = image_folder / "train" / "cat" / "image_05.jpg"
    broken.write_bytes(b"not an image")
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m mae_evolved.main_pretrain"
    run = run_module(f"{launch} {TINY} --data_path {image_folder} --output_dir {tmp_path}/two")
    assert run.returncode != 0
    assert re.search(r"main_pretrain: error: unreadable image .*image_05.jpg", run.stderr)
    assert "errors.py" not in run.stderr
