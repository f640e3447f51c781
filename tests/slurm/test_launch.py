"""submitit's batch scripts compared whole with recorded ones; the local executor interrupted and continued."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.training.errors import BadInput
from slurm.launch import main
from tests.conftest import ROOT, assert_same, read_log
from tests.slurm.conftest import TINY, until

RECORDED = Path(__file__).parent / "recorded"
PARTS = "--model mae_vit_tiny_patch4 --input_size 16 --parts_start 8 --parts_end 3"
RENDERED = {
    "two_nodes": "--nodes 2 --gpus_per_node 8 --effective_batch 64 --batch_per_rank 2 --partition gpu --account lab "
    "--qos long --mem_gb 200 --time 600 --signal_seconds 90 --job_name mae --sbatch constraint=h100 --sbatch exclusive "
    "--setup 'module load cuda'",
    "defaults": "--effective_batch 4 --batch_per_rank 4",
}
"""Options of the launcher for each recorded script."""


@pytest.fixture
def on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH with an srun, which submitit looks for, and an sbatch that refuses."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text("#!/bin/sh\nexit 1\n")
    (folder / "sinfo").write_text("#!/bin/sh\necho 'gpu|gpu*|2|16|1-infinite|UNLIMITED'\n")
    (folder / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    for program in folder.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_batch_script_is_the_recorded_one(name: str, on_a_cluster: Path, image_folder: Path, tmp_path: Path) -> None:
    """RECORD=1 pytest tests/slurm/test_launch.py writes the recorded ones anew."""
    options = shlex.split(RENDERED[name])
    flags = f"{PARTS} --repeat 4 --data_path {image_folder} --output_dir {tmp_path}/out".split()
    main([*options, "--render", str(tmp_path / "batch.sh"), "--", "mae_evolved.main_pretrain", *flags])
    text = (tmp_path / "batch.sh").read_text()
    for real, stands_for in ((str(tmp_path), "WORK"), (sys.executable, "PYTHON"), (str(ROOT), "PROJECT")):
        text = text.replace(real, stands_for)
    if "RECORD" in os.environ:
        (RECORDED / f"{name}.sh").write_text(text)
    assert text == (RECORDED / f"{name}.sh").read_text()
    assert not (tmp_path / "out" / "checkpoint-last.pth").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--effective_batch 4 --batch_per_rank 4 mae_evolved.main_pretrain", "unrecognized arguments"),
        ("--effective_batch 4 --batch_per_rank 4", "MODULE is missing"),
        ("--executor local --nodes 2 --effective_batch 4 --batch_per_rank 4 -- {run}", "--executor local is this machine alone"),
        ("--executor local --render x --effective_batch 4 --batch_per_rank 4 -- {run}", "--render writes the batch script of"),
        ("--nodes 3 --effective_batch 4 --batch_per_rank 4 -- {run}", "3 ranks cannot share an effective batch of 4"),
        ("--time 0 --effective_batch 4 --batch_per_rank 4 -- {run}", "--time must be 1 or more, got 0"),
        ("--sbatch =1 --effective_batch 4 --batch_per_rank 4 -- {run}", "--sbatch must be NAME or NAME=VALUE"),
        ("--effective_batch 4 --batch_per_rank 4 -- {run} --data_path /nowhere", "--data_path /nowhere: no such folder"),
        ("--nodes 4 --effective_batch 4 --batch_per_rank 4 -- {run}", "4 nodes are asked for, but partition gpu has 2"),
        (
            "--cpus_per_task 17 --effective_batch 4 --batch_per_rank 4 -- {run}",
            "17 CPUs a node (1 ranks x 17) are asked for, but",
        ),
        ("--effective_batch 17 --batch_per_rank 4 -- {run}", "but an epoch has 16 (16 images x --repeat 1)"),
        (
            "--partition gpu --effective_batch 4 --batch_per_rank 4 -- {run}",
            "not submitted: invalid partition specified: gpu",
        ),
    ],
)
def test_refused(options: str, message: str, on_a_cluster: Path, image_folder: Path, tmp_path: Path) -> None:
    run = f"mae_evolved.main_pretrain {PARTS} --data_path {image_folder} --output_dir {tmp_path}/out"
    with pytest.raises(BadInput) as error:
        main(options.format(run=run).split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.rglob("out/**/*") if path.is_file()]


def test_no_cluster_is_refused(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = f"--effective_batch 4 --batch_per_rank 4 -- mae_evolved.main_pretrain {PARTS} --data_path {image_folder} --output_dir x"
    with pytest.raises(BadInput, match="srun is not on PATH"):
        main(run.split())


@pytest.mark.slow
def test_local_job_is_stopped_and_continues_by_itself(image_folder: Path, tmp_path: Path) -> None:
    """Two ranks on this machine; --resume none holds for the first start alone."""
    (tmp_path / "tiny.toml").write_text(TINY.replace("epochs = 30", "epochs = 8"))
    common = f"mae_evolved.main_pretrain --config {tmp_path}/tiny.toml --data_path {image_folder} --resume none"
    for name in ("whole", "cut"):
        words = "-m slurm.launch --executor local --tasks_per_node 2 --effective_batch 4 --batch_per_rank 2 --wait --"
        output = tmp_path / name
        job = subprocess.Popen(
            [sys.executable, *f"{words} {common} --output_dir {output}".split()], cwd=ROOT, stdout=subprocess.DEVNULL,
            env={**{k: v for k, v in os.environ.items() if not k.startswith("SLURM")}, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if name == "cut":
            until("an epoch", lambda log=output / "log.txt": log.exists() and log.read_text())
            for rank in _tasks(job.pid):
                os.kill(rank, signal.SIGUSR1)
        assert job.wait(240) == 0, "".join(path.read_text() for path in output.glob("submitit/*/*_log.*"))
    assert not list(tmp_path.rglob("*%*")), "a folder by the name of submitit's place-holder"
    said = "".join(path.read_text() for path in (tmp_path / "cut").glob("submitit/*/*_log.out"))
    assert "asked to stop; saved" in said or "Requeued job" in said
    assert "resumed" in said
    first, second = (torch.load(tmp_path / name / "checkpoint-last.pth", weights_only=True)["model"] for name in ("whole", "cut"))
    assert_same(second, first)
    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")


def _tasks(launcher: int) -> list[int]:
    """The ranks: children of submitit's controller, which is a child of the launcher."""

    def children(process: int) -> list[int]:
        return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    return [task for controller in children(launcher) for task in children(controller)]


def test_debug_runs_in_this_process(image_folder: Path, tmp_path: Path) -> None:
    flags = f"{PARTS} --data_path {image_folder} --output_dir {tmp_path}/out --epochs 1 --warmup_epochs 0 --device cpu "
    flags += "--num_workers 0 --picture_epochs 0"
    main(f"--executor debug --effective_batch 4 --batch_per_rank 4 -- mae_evolved.main_pretrain {flags}".split())
    assert len(read_log(tmp_path / "out")) == 1
    assert not list(tmp_path.rglob("*%*"))


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_the_module_submits_nothing(
    flag: str, on_a_cluster: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (on_a_cluster / "sbatch").write_text(f"#!/bin/sh\ntouch {tmp_path}/submitted\n")
    flags = f"--effective_batch 4 --batch_per_rank 4 -- mae_evolved.main_pretrain {PARTS} --data_path {image_folder} {flag}"
    with pytest.raises(SystemExit) as ended:
        main([*flags.split(), "--output_dir", f"{tmp_path}/out"])
    assert ended.value.code in (0, None)
    assert "--weight_decay" in capsys.readouterr().out
    assert not (tmp_path / "submitted").exists()
    assert not (tmp_path / "out").exists()
