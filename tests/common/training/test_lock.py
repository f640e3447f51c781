"""One run at a time in an output folder. Nothing here is random."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.training import lock as module
from common.training.checkpoint import LAST
from common.training.errors import BadInput
from common.training.lock import LOCK, STALE_SECONDS, Holder, RunLock, is_running, process_start, slurm_state, why_stale
from common.training.loop import Loop
from tests.conftest import assert_same, read_log

HERE = Holder.here()
ELSEWHERE = replace(HERE, host="node7", machine="another boot", token="theirs")
IN_A_JOB = replace(ELSEWHERE, cluster="big", job="70", job_start="1")


def leave(folder: Path, holder: Holder, age: float = 0.0) -> Path:
    """A lock as its holder left it, `age` seconds ago."""
    folder.mkdir(exist_ok=True)
    path = folder / LOCK
    path.write_text(json.dumps(vars(holder)))
    os.utime(path, (time.time() - age,) * 2)
    return path


def ended_process() -> int:
    """The number of a process that is no more."""
    return int(subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True).stdout)


def test_held_refused_and_released(tmp_path: Path) -> None:
    """The second is told who holds the folder, and changes nothing; what the lock needed is gone afterwards."""
    folder = tmp_path / "a" / "run"
    first, second = RunLock(folder), RunLock(folder)
    first.acquire()
    said = json.loads((folder / LOCK).read_text())
    assert (said["pid"], said["host"]) == (os.getpid(), HERE.host)
    assert said["process_start"] == process_start(os.getpid())
    with pytest.raises(BadInput) as refusal:
        second.acquire()
    assert f"--output_dir {folder}: in use by process {os.getpid()} on {HERE.host}, since {said['since']}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    second.release()
    assert os.listdir(folder) == [LOCK]
    first.release()
    assert not (tmp_path / "a").exists()


def test_folders_that_hold_something_stay(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    lock.acquire()
    (tmp_path / "run" / "log.txt").write_text("")
    lock.release()
    assert os.listdir(tmp_path / "run") == ["log.txt"]


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--output_dir .*file/run: Not a directory"):
        RunLock(tmp_path / "file" / "run").acquire()


def test_a_killed_process_leaves_a_lock_and_a_half_written_checkpoint(tmp_path: Path) -> None:
    """Both are cleared away by the next run on this machine, at once; so is the lock of a number that another process has now."""
    leave(tmp_path, replace(HERE, pid=ended_process(), token="killed"))
    (tmp_path / f".{LAST}.tmp").write_bytes(b"half")
    lock = RunLock(tmp_path)
    lock.acquire()
    assert "taken over from process" in lock.taken_from
    assert lock.taken_from.endswith("this process is gone")
    assert os.listdir(tmp_path) == [LOCK]
    lock.release()
    leave(tmp_path, replace(HERE, process_start="1", token="reused"))
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    assert os.listdir(tmp_path) == []


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        started = process_start(child.pid)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet collected
        assert not is_running(child.pid, started or "")
    assert is_running(os.getpid(), HERE.process_start)


@pytest.mark.parametrize(
    ("holder", "me", "age", "state", "reason"),
    [
        (ELSEWHERE, HERE, STALE_SECONDS - 1, None, None),
        (ELSEWHERE, HERE, STALE_SECONDS + 1, None, "it was last touched 10 minutes ago"),
        (HERE, HERE, 10 * STALE_SECONDS, None, None),  # stopped by Ctrl-Z, say
        (Holder(), HERE, 1, None, None),  # not written out yet
        (Holder(), HERE, STALE_SECONDS + 1, None, "it was last touched 10 minutes ago"),
        (IN_A_JOB, replace(HERE, cluster="big", job="71"), 1, "", "this job has left the queue"),
        (IN_A_JOB, replace(HERE, cluster="big", job="71"), 1, "RUNNING", None),
        (IN_A_JOB, replace(HERE, cluster="big", job="71"), STALE_SECONDS + 1, "RUNNING", "it was last touched 10 minutes ago"),
        (IN_A_JOB, replace(HERE, cluster="big", job="71"), STALE_SECONDS + 1, "SUSPENDED", None),
        (IN_A_JOB, replace(HERE, cluster="big", job="71"), 1, None, None),  # Slurm does not answer
        (IN_A_JOB, replace(HERE, cluster="small", job="71"), 1, "", None),  # that queue knows nothing of this one
        (
            IN_A_JOB,
            replace(HERE, cluster="big", job="70", job_start="2"),
            1,
            "RUNNING",
            "this is an earlier start of the same job",
        ),
        (IN_A_JOB, replace(HERE, cluster="big", job="70", job_start="1"), 1, "RUNNING", None),
    ],
)
def test_when_a_lock_of_another_machine_is_stale(
    holder: Holder, me: Holder, age: float, state: str | None, reason: str | None
) -> None:
    assert why_stale(holder, me, age, lambda job: state) == reason


def test_the_queue_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """squeue as Slurm writes it: a running job, one that is unknown by now, a controller that is down, and none at all."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        '#!/bin/sh\ncase "$*" in *70*) echo RUNNING ;; '
        '*71*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;; '
        '*) echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; exit 1 ;; esac\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [slurm_state(job) for job in ("70", "71", "72")] == ["RUNNING", "", None]
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert slurm_state("70") is None


def race(folder: Path, count: int = 8) -> list[str]:
    """What as many threads are told that want one folder at the same time; "" for those that got it."""
    barrier, told = threading.Barrier(count), list[str]()

    def take() -> None:
        lock = RunLock(folder)
        barrier.wait()
        try:
            lock.acquire()
            told.append("")
        except BadInput as refusal:
            told.append(str(refusal))

    threads = [threading.Thread(target=take) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("stale", [True, False])
def test_one_of_many_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: bool, links: bool) -> None:
    """Also where all of them find the same stale lock, and on disks without hard links."""

    def no_links(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    meeting = threading.Barrier(8)

    def seen_by_all(*question: Any) -> str | None:
        reason = why_stale(*question)
        if reason is not None:  # nobody goes on before all have found it stale
            meeting.wait(timeout=30)
        return reason

    monkeypatch.setattr(module, "why_stale", seen_by_all)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    folder = tmp_path / "run"
    folder.mkdir()
    if stale:
        leave(folder, ELSEWHERE, STALE_SECONDS + 60)
    told = race(folder)
    assert told.count("") == 1
    assert all("in use by process" in line for line in told if line)
    assert os.listdir(folder) == [LOCK]


def test_it_is_touched_while_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOUCH_SECONDS", 0.01)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(lock.path, (1, 1))
    for _ in range(500):
        if lock.path.stat().st_mtime > 1:
            break
        time.sleep(0.01)
    assert time.time() - lock.path.stat().st_mtime < 60
    lock.release()


def test_a_run_whose_lock_was_taken_writes_nothing_more(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after its machine had been asleep for an hour. The other's lock stays."""
    original = Loop._train_update

    def overtaken(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == (2, 0):
            leave(self.run.output, ELSEWHERE)
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_train_update", overtaken)
    with pytest.raises(BadInput, match=r"taken over by process .* on node7") as error:
        train("run", "--batch_size 8 --mask grid")
    output = Path(str(error.value).split()[1].rstrip(":"))
    assert json.loads((output / LOCK).read_text())["token"] == "theirs"
    assert (output / LAST).exists()
    assert len(read_log(output)) == 2


def test_two_runs_in_one_folder(train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second leaves the first one's files alone; the lock goes with the end of a run, also after an error."""
    original, refusals, flags = Loop._train_update, list[str](), "--batch_size 8 --mask grid"

    def beside(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == (1, 1) and not refusals:
            before = {path: path.stat().st_mtime_ns for path in self.run.output.iterdir()}
            with pytest.raises(BadInput) as refusal:
                train("run", f"{flags} --gamma 3")
            refusals.append(str(refusal.value))
            assert before == {path: path.stat().st_mtime_ns for path in self.run.output.iterdir()}
        if (epoch, update) == (3, 0) and len(refusals) == 1:
            refusals.append("cut off")
            raise KeyboardInterrupt
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_train_update", beside)
    with pytest.raises(KeyboardInterrupt):
        train("run", flags)
    assert f"in use by process {os.getpid()}" in refusals[0]
    output = train("run", flags)
    assert not (output / LOCK).exists()
    assert_same(read_log(output), read_log(train("alone", flags)))
