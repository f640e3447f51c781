"""Real jobs on a real Slurm: they train what one process trains, and come back from every interruption to the same end."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_evolved.main_pretrain import main as train_mae
from tests.conftest import ROOT, assert_same, read_log, write_images
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import TINY, WAIT, script, until

pytestmark = pytest.mark.slow


class Lab:
    """Jobs of one cluster, their data and their outputs.

    Attributes:
        values: the site's, as slurm/site.env has them. A rank a node: on a GPU that is no GPU, or on the CPUs.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        for seed, name in enumerate(("bird", "cat")):
            write_images(folder / "images" / "train" / name, 8, seed=seed)
        self.recipe = folder / "tiny.toml"
        self.recipe.write_text(TINY)
        self.values: dict[str, object] = {
            "NODES": 2, "GPUS_PER_NODE": 1 if cluster.gpus else 0, "CPUS_PER_TASK": 1, "TIME": "00:20:00",
            "EFFECTIVE_BATCH": 8, "BATCH_PER_GPU": 4, "RECIPE": self.recipe, "DATA_PATH": folder / "images",
            "SIGNAL_SECONDS": 30, "ACTIVATE": f"export PATH={Path(sys.executable).parent}:$PATH",
        }  # fmt: skip

    def submit(self, output: Path, *flags: str, **values: object) -> str:
        """The job's number."""
        done = script(
            "pretrain_mae", *flags, environment=self.cluster.environment, OUTPUT_DIR=output, **{**self.values, **values}
        )
        assert done.returncode == 0, done.stderr
        found = re.search(r"submitted job (\d+)", done.stdout)
        assert found, done.stdout
        return found[1]

    def facts(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        return dict(pair.split("=", 1) for pair in self.cluster.run("scontrol", "show", "job", job).split() if "=" in pair)

    def ended(self, job: str, output: Path) -> str:
        """Waits for a job's end and returns its state."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        until(f"the end of job {job}", lambda: self.facts(job)["JobState"] in states, lambda: self.shown(output))
        return self.facts(job)["JobState"]

    def running(self, job: str, restart: int, output: Path) -> None:
        """Waits until the start of this number trains: two epochs more than before are logged."""
        before = self.epochs(output)
        until(
            f"start {restart} of job {job}",
            lambda: self.facts(job)["Restarts"] == str(restart) and self.facts(job)["JobState"] == "RUNNING",
            lambda: self.shown(output),
        )
        until(f"training in start {restart}", lambda: self.epochs(output) >= before + 2, lambda: self.shown(output))

    def loading(self, job: str, output: Path) -> None:
        """Waits until the ranks of a start are there, which then import torch for seconds before they can save anything."""

        def there() -> bool:
            try:
                return bool(self.rank(0, job) and self.rank(1, job))
            except ValueError:
                return False

        until(f"the ranks of job {job}", there, lambda: self.shown(output))

    def epochs(self, output: Path) -> int:
        """Epochs in the log of a run."""
        log = output / "log.txt"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def rank(self, number: int, job: str) -> int:
        """The process that is rank `number` of a job; its children are a loader's."""
        mine = {f"SLURM_PROCID={number}".encode(), f"SLURM_JOB_ID={job}".encode(), b"SLURM_STEP_ID=0"}
        mine.add(f"SLURM_CONF={self.cluster.environment['SLURM_CONF']}".encode())
        parents: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                environment = set((folder / "environ").read_bytes().split(b"\0"))
                if words[1:3] == [b"-m", b"mae_evolved.main_pretrain"] and mine <= environment:
                    parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(") ")[2].split()[1])
        (rank,) = [process for process, parent in parents.items() if parent not in parents]
        return rank

    def shown(self, output: Path) -> str:
        """All that jobs wrote about themselves."""
        return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted((output / "logs").glob("[0-9]*")))


@pytest.fixture(scope="module")
def lab(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(cluster, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Path:
    """The run that was left alone: `sbatch slurm/pretrain_mae.sh` itself, a CPU process on each of two nodes."""
    output = lab.folder / "whole"
    said = subprocess.run(
        ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=20",
         f"--output={lab.folder}/whole.out", "slurm/pretrain_mae.sh"],
        env={**lab.cluster.environment, "SITE_ENV": os.devnull, "OUTPUT_DIR": str(output)}
        | {key: str(value) for key, value in lab.values.items() if key not in ("NODES", "GPUS_PER_NODE", "CPUS_PER_TASK")},
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    job = said.stdout.strip()
    assert lab.ended(job, output) == "COMPLETED", (lab.folder / "whole.out").read_text() + lab.shown(output)
    return output


def steps(output: Path) -> list[float]:
    """The loss of every update."""
    return [event.value for event in _losses(output)]


def _losses(output: Path) -> list[Any]:
    events = EventAccumulator(str(output / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return list(events.Scalars("train/loss"))


def test_two_nodes_train_what_one_process_trains(lab: Lab, whole: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    train_mae(f"--config {lab.recipe} --data_path {lab.folder}/images --batch_size 8 --output_dir {one}".split())
    mine, theirs = steps(one), steps(whole)
    assert len(mine) == len(theirs) == 60
    worst = max(abs(a - b) for a, b in zip(mine, theirs, strict=True))
    print(f"largest difference of a step's loss: {worst:.2e}")
    assert worst <= 1e-5


def test_run_that_is_interrupted_in_every_way_ends_as_one_left_alone(lab: Lab, whole: Path) -> None:
    """Requeued, at its time limit, preempted, and one rank killed: the same weights, state and log, bit for bit."""
    output = lab.folder / "cut"
    job = lab.submit(output, "--save_steps", "1")
    lab.running(job, 0, output)
    lab.cluster.run("scontrol", "requeue", job)
    lab.running(job, 1, output)
    assert "resumed" in (output / "logs" / f"{job}-1-rank0.log").read_text()

    with _slow(lab.rank(1, job)) as told:  # Slurm looks at time limits every 30 s, and such a run may be over by then
        lab.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        until("the signal before the time limit", told, lambda: lab.shown(output))
    until("a requeue", lambda: lab.facts(job)["Restarts"] == "2", lambda: lab.shown(output))
    lab.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    lab.running(job, 2, output)
    assert "asked to stop; saved" in (output / "logs" / f"{job}-1-rank0.log").read_text()

    urgent = lab.cluster.run(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--ntasks-per-node=4", "-o", "/dev/null", "--wrap", "true"
    )
    lab.running(job, 3, output)
    assert lab.facts(urgent.strip())["JobState"] == "COMPLETED"

    begun = time.monotonic()
    os.kill(lab.rank(1, job), signal.SIGKILL)
    assert lab.ended(job, output) == "FAILED"
    took = time.monotonic() - begun
    assert took < 60
    said = (output / "logs" / f"{job}.out").read_text()
    assert re.search(r"error: rank [0-9, ]*1[0-9, ]* failed \(srun's exit code 137\)", said), said
    assert "killed by signal 9" in said

    last = lab.submit(output, "--save_steps", "1")
    assert lab.ended(last, output) == "COMPLETED", lab.shown(output)
    first, second = (torch.load(one / "checkpoint-last.pth", weights_only=True) for one in (whole, output))
    for state in (first, second):
        for key in ("output_dir", "save_steps"):
            del state["config"][key]
    assert_same(second, first)
    assert read_log(output) == read_log(whole)
    gaps = sorted((b.wall_time - a.wall_time for a, b in itertools.pairwise(_losses(output))), reverse=True)[:4]
    print(f"dead rank: job ended after {took:.1f} s; seconds from the last update to the next, four stops:", *map(round, gaps))


def test_job_that_gets_on_is_requeued_however_often_it_was_stopped(lab: Lab) -> None:
    """A job of days in the small: stopped after each of four starts, then before it could save; two such in a row end it."""
    output = lab.folder / "days"
    job = lab.submit(output, "--epochs", "5000", "--save_steps", "1", MAX_RESTARTS=2)

    def stop(restart: int) -> None:
        lab.cluster.run("scancel", "--signal=USR1", job)
        until(f"requeue {restart + 1}", lambda: lab.facts(job)["Restarts"] == str(restart + 1), lambda: lab.shown(output))

    for restart in range(4):
        lab.running(job, restart, output)
        stop(restart)
    lab.loading(job, output)
    epochs = lab.epochs(output)
    stop(4)
    assert lab.epochs(output) == epochs, "that start was to be stopped before it trained"
    lab.running(job, 5, output)
    stop(5)
    for restart in (6, 7):
        lab.loading(job, output)
        if restart == 6:
            stop(6)
        else:
            lab.cluster.run("scancel", "--signal=USR1", job)
    assert lab.ended(job, output) == "FAILED"
    said = (output / "logs" / f"{job}.out").read_text()
    assert said.count("stopped; back into the queue") == 7
    assert "2 starts in a row ended before a checkpoint was written (MAX_RESTARTS 2): not requeued" in said


@contextlib.contextmanager
def _slow(process: int) -> Iterator[Callable[[], bool]]:
    """A rank that takes as long over its update as the block lasts; yields whether USR1 has come.

    Slurm wakes a stopped process that it signals if it tracks them by /proc; elsewhere the signal waits.
    """

    def told() -> bool:
        try:
            status = Path(f"/proc/{process}/status").read_text()
        except OSError:
            return True
        pending = re.search(r"ShdPnd:\s*([0-9a-f]+)", status)
        return "\nState:\tT" not in status or bool(pending and int(pending[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    os.kill(process, signal.SIGSTOP)
    until("a stop", lambda: "\nState:\tT" in Path(f"/proc/{process}/status").read_text())
    try:
        yield told
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def test_rank_that_fails_ends_the_job_with_its_traceback(lab: Lab, tmp_path: Path) -> None:
    """Rank 1 raises while rank 0 waits for it."""
    (tmp_path / "tqdm.py").write_text(
        "import os\nif os.environ.get('SLURM_PROCID') == '1':\n    raise RuntimeError('the disk of this node is gone')\n"
        "raise ImportError\n"
    )
    broken = f"{lab.values['ACTIVATE']} PYTHONPATH={tmp_path}"
    job = lab.submit(lab.folder / "broken", ACTIVATE=broken)
    begun = time.monotonic()
    assert lab.ended(job, lab.folder / "broken") == "FAILED"
    assert time.monotonic() - begun < 120
    said = (lab.folder / "broken" / "logs" / f"{job}.out").read_text()
    assert "Traceback (most recent call last)" in said
    assert "RuntimeError: the disk of this node is gone" in said
    assert lab.facts(job)["Restarts"] == "0"


def test_refused_by_the_cluster_or_by_the_job_itself(lab: Lab, whole: Path) -> None:
    before = lab.cluster.run("squeue", "-h", "-a", "-t", "all", "-o", "%A")
    output = lab.folder / "refused"
    done = script("pretrain_mae", environment=lab.cluster.environment, OUTPUT_DIR=output, PARTITION="nowhere", **lab.values)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "not submitted: invalid partition specified: nowhere" in done.stderr
    assert lab.cluster.run("squeue", "-h", "-a", "-t", "all", "-o", "%A") == before
    for values, message in (
        ({"NODES": 4}, "4 nodes are asked for, but partition all has 2: the job would wait for ever"),
        ({"CPUS_PER_TASK": 5}, "5 CPUs a node (1 ranks x 5) are asked for, but partition all has at most 4"),
    ):
        wished = {**lab.values, **values}
        done = script("pretrain_mae", environment=lab.cluster.environment, OUTPUT_DIR=output, **wished)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert message in done.stderr
        assert lab.cluster.run("squeue", "-h", "-a", "-t", "all", "-o", "%A") == before
    done = script("pretrain_mae", "--seed", "5", environment=lab.cluster.environment, OUTPUT_DIR=whole, **lab.values)
    assert done.returncode == 2
    assert "made with other settings: --seed 0 -> 5" in done.stderr
    assert lab.cluster.run("squeue", "-h", "-a", "-t", "all", "-o", "%A") == before


def test_submitit_requeues_and_resumes(lab: Lab, whole: Path) -> None:
    output = lab.folder / "submitit"
    options = f"--executor slurm --nodes 2 --gpus_per_node {lab.values['GPUS_PER_NODE']} --cpus_per_task 1 --partition all "
    options += "--effective_batch 8 --batch_per_rank 4 --time 20 -- mae_evolved.main_pretrain"
    words = f"-m slurm.launch {options} --config {lab.recipe} --data_path {lab.folder}/images --output_dir {output}"
    done = subprocess.run(
        [sys.executable, *words.split()],
        env=lab.cluster.environment, cwd=ROOT, capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    job = re.search(r"job (\d+);", done.stdout)
    assert job, done.stdout

    def shown() -> str:
        return "\n".join(f"== {path}\n{path.read_text()}" for path in output.glob("submitit/*/*_log.*"))

    until("training", lambda: lab.epochs(output) >= 2, shown)
    lab.cluster.run("scancel", "--signal=USR1", job[1])
    until("a requeue", lambda: lab.facts(job[1])["Restarts"] == "1", shown)
    assert lab.epochs(output) < 30
    until("the end", lambda: lab.facts(job[1])["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), shown)
    assert lab.facts(job[1])["JobState"] == "COMPLETED", shown()
    first, second = (torch.load(one / "checkpoint-last.pth", weights_only=True)["model"] for one in (whole, output))
    assert_same(second, first)
    assert read_log(output) == read_log(whole)
