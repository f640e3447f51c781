"""A batch script inside its job, start after start, with programs that stand for Slurm's and for the training."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

JOB = "77"


class Job:
    """A job that was planned once. `start` is one start of it: srun's ranks end as told, and nothing is computed.

    Attributes:
        requeued: how often the job asked Slurm for another start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        self.logs = self.output / "logs"
        self.logs.mkdir(parents=True)
        (folder / "bin").mkdir()
        for name, text in {
            "scontrol": 'case "$1 $2" in "show hostnames") echo node1 ;; show*) echo " JobState=RUNNING"; echo "   Command='
            f'{ROOT}/slurm/pretrain_mae.sh" ;; requeue*) echo "$2" >>{folder}/requeued ;; esac',
            "srun": 'for word; do case $word in --output=*) log=${word#--output=};; esac; done; eval "$STEP"',
            "sbatch": f"touch {folder}/submitted",
        }.items():
            (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        self.script = folder / "slurm_script"  # the name of Slurm's copy
        self.script.write_text((ROOT / "slurm" / "pretrain_mae.sh").read_text())
        (self.logs / f".{JOB}.plan").write_text("a summary\n-m\nmae_evolved.main_pretrain\n")

    @property
    def requeued(self) -> int:
        file = self.folder / "requeued"
        return len(file.read_text().split()) if file.exists() else 0

    def start(self, number: int, ranks: str, *flags: str, **values: str) -> subprocess.CompletedProcess[str]:
        """Start `number` of the job; `ranks` is what srun does."""
        environment = {
            "PATH": f"{self.folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", "SITE_ENV": os.devnull,
            "ACTIVATE": "true", "OUTPUT_DIR": str(self.output), "DATA_PATH": "unused", "STEP": ranks, "AT": str(self.output),
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NAME": "pretrain_mae", "SLURM_RESTART_COUNT": str(number),
            "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "node1", **values,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(self.script), *flags], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip


STOPPED = ': >"$STOPPED"'
SAVED = f'sleep 0.02; : >"$AT/checkpoint-last.pth"; {STOPPED}'
FAILED = 'echo "srun: error: node1: task 0: Exited with exit code 1" >&2; echo trace >${log/\\%t/0}; exit 1'


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_job_of_days_is_stopped_as_often_as_it_likes_while_it_saves(job: Job) -> None:
    """Twenty starts that each saved, then one that could not: it goes back into the queue like the others."""
    for number in range(1, 21):
        assert job.start(number, SAVED).returncode == 75
    ended = job.start(21, STOPPED)
    assert (ended.returncode, job.requeued) == (75, 21), ended.stderr


def test_starts_in_a_row_without_a_checkpoint_are_counted(job: Job) -> None:
    """One that saves begins the count anew, and so does one that Slurm ended while it was counted."""
    for number, ranks in enumerate((STOPPED, STOPPED, SAVED, STOPPED, STOPPED), start=1):
        assert job.start(number, ranks).returncode == 75
    ended = job.start(6, STOPPED)
    assert ended.returncode == 1
    assert job.requeued == 5
    assert ended.stderr == (
        "pretrain_mae: error: 3 starts in a row ended before a checkpoint was written (MAX_RESTARTS 3): not requeued\n"
    )


def test_site_says_how_many_starts(job: Job) -> None:
    assert job.start(1, STOPPED, MAX_RESTARTS="1").returncode == 1
    assert job.requeued == 0


def test_checkpoint_of_an_earlier_job_is_none_of_this_one(job: Job) -> None:
    (job.output / "checkpoint-last.pth").touch()
    time.sleep(0.02)
    assert job.start(1, STOPPED, MAX_RESTARTS="1").returncode == 1


def test_finished_job_leaves_no_count(job: Job) -> None:
    assert job.start(1, SAVED).returncode == 75
    assert (job.logs / f".{JOB}.starts").exists()
    done = job.start(2, "true")
    assert done.returncode == 0, done.stderr
    assert not (job.logs / f".{JOB}.starts").exists()


@pytest.mark.parametrize(
    ("checkpoint", "flags", "advice"),
    [
        ("", (), "there is no checkpoint yet, so the same command starts anew"),
        ("checkpoint-last.pth", (), "the same command continues the last checkpoint"),
        ("checkpoint-last.pth", ("--resume", "none"), "the same command with --resume auto continues the last checkpoint"),
        ("checkpoint-last.pth", ("--resume=none",), "the same command with --resume auto continues the last checkpoint"),
        ("best.pth", (), "there is no checkpoint yet, so the same command starts anew"),
    ],
)
def test_failed_rank_is_told_what_the_same_command_does(job: Job, checkpoint: str, flags: tuple[str, ...], advice: str) -> None:
    if checkpoint:
        (job.output / checkpoint).touch()
    ended = job.start(1, FAILED, *flags)
    assert ended.returncode == 1
    assert f"pretrain_mae: error: rank 0 failed (srun's exit code 1); {advice}\n" in ended.stderr
    assert ended.stderr.endswith("trace\n")


def test_help_in_a_job_runs_nothing(job: Job) -> None:
    """`sbatch slurm/pretrain_mae.sh --help`: sbatch has taken the job already, which then only prints."""
    ended = job.start(0, "touch $AT/ran", "--help")
    assert ended.returncode == 0
    assert "usage: main_pretrain" in ended.stdout
    assert not (job.output / "ran").exists()
