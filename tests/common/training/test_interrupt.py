"""A run that gets a signal saves, leaves with code 75, and goes on to the same end as one that was left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from common.training.distributed import slurm_environment
from common.training.errors import run_cli
from common.training.interrupt import EXIT_INTERRUPTED, Interrupted, Interruption
from tests.conftest import ROOT, TINY, assert_same, free_ports, read_log

RUN = f"{TINY} --batch_size 2 --num_workers 1 --epochs 6"


def _start(images: Path, output: Path, world: int, flags: str = "") -> list[subprocess.Popen[str]]:
    """A rank each, as srun starts them."""
    words = f"-m mae_evolved.main_pretrain {RUN} --data_path {images} --output_dir {output} {flags}".split()
    port = str(free_ports())
    return [
        subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
                **{"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                **{"SLURM_JOB_ID": "7", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"},
                **{"SLURM_STEP_NUM_TASKS": str(world), "SLURM_STEP_TASKS_PER_NODE": str(world)},
            },
        )
        for rank in range(world)
    ]


def _wait(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    shown = "".join(rank.communicate(timeout=120)[0] for rank in ranks)
    return [rank.returncode for rank in ranks], shown


def _weights(output: Path) -> dict[str, object]:
    return torch.load(output / "checkpoint-last.pth", weights_only=True)["model"]


@pytest.mark.slow
def test_signal_to_one_rank_stops_all_and_the_run_goes_on_exactly(image_folder: Path, tmp_path: Path) -> None:
    """Stopped by SIGUSR1, then by SIGTERM, after an epoch each: the run ends as one that was left alone."""
    codes, shown = _wait(_start(image_folder, tmp_path / "whole", world=2))
    assert codes == [0, 0], shown
    output, epochs = tmp_path / "cut", 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        ranks = _start(image_folder, output, world=2)
        while not (output / "log.txt").exists() or len((output / "log.txt").read_text().splitlines()) <= epochs:
            time.sleep(0.02)
        ranks[1].send_signal(number)
        codes, shown = _wait(ranks)
        assert codes == [EXIT_INTERRUPTED, EXIT_INTERRUPTED], shown
        assert "asked to stop; saved" in shown
        assert epochs < len(read_log(output)) < 6
        epochs = len(read_log(output))
    codes, shown = _wait(_start(image_folder, output, world=2))
    assert codes == [0, 0], shown
    assert "resumed" in shown
    assert_same(_weights(output), _weights(tmp_path / "whole"))
    assert read_log(output) == read_log(tmp_path / "whole")


def test_handlers_come_back_and_an_earlier_one_is_told_after_the_save() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with pytest.raises(Interrupted):
            _leave_on_signal(seen)
        assert seen == [signal.SIGUSR1]
        with Interruption():
            os.kill(os.getpid(), signal.SIGUSR1)
        assert seen == [signal.SIGUSR1], "a run that ended by itself leaves nobody to tell"
    finally:
        signal.signal(signal.SIGUSR1, before)


def _leave_on_signal(seen: list[int]) -> None:
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.requested
        assert seen == []
        raise Interrupted("saved")


def test_second_interrupt_does_not_wait() -> None:
    """Python's own handler is set first: a shell starts what runs in its background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            _interrupt_twice()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_twice() -> None:
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_exit_code_and_line(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(argv: object) -> None:
        raise Interrupted("asked to stop; saved x")

    with pytest.raises(SystemExit) as left:
        run_cli("program", stop, [])
    assert left.value.code == EXIT_INTERRUPTED
    assert capsys.readouterr().err == "program: asked to stop; saved x\n"


SLURM = {"SLURM_JOB_ID": "10012", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "7"}


def test_environment_of_a_slurm_step() -> None:
    environment = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST": "gpu7"}
    assert slurm_environment(environment) == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu7",
        "MASTER_PORT": "20012",
    }
    repeated = slurm_environment({**environment, "SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "MASTER_ADDR": "me", "MASTER_PORT": "9"})
    assert (repeated["LOCAL_WORLD_SIZE"], repeated["MASTER_ADDR"], repeated["MASTER_PORT"]) == ("3", "me", "9")


@pytest.mark.slow
def test_run_with_a_loader_that_fails_ends_with_its_own_error(image_folder: Path, tmp_path: Path) -> None:
    """Its workers ignore SIGTERM, which must not keep it from ending, nor hide the error behind theirs."""
    flags = f"{TINY} --num_workers 1 --data_path {image_folder} --output_dir {tmp_path}"
    fails = (
        "import sys; from common.training.loop import Loop; from mae_evolved.main_pretrain import main\n"
        "def count(*arguments): raise RuntimeError('the disk of this node is gone')\n"
        "Loop._count = count\n"
        "main(sys.argv[1:])"
    )
    ended = subprocess.run([sys.executable, "-c", fails, *flags.split()], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 1
    assert ended.stderr.rstrip().splitlines()[-1] == "RuntimeError: the disk of this node is gone"
