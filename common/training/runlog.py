"""What a run writes about itself: run.json, log.txt (a JSON line an epoch), TensorBoard events, progress bar."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from common.mask_config import MaskConfig
from common.training.config import RunConfig
from common.training.distributed import Processes
from common.training.errors import BadInput
from common.training.files import NoRoom, find_no_room, no_room, written_whole
from common.training.pace import Pace

RESULT = "result.json"
"""Written when a run is finished, and only then: launchers and tables go by it."""

PACKAGES = ("torch", "torchvision", "timm", "numpy", "tensorboard", "submitit")


class RunLog:
    """Files of a run; on ranks other than the main one nothing is written."""

    def __init__(self, config: RunConfig, processes: Processes) -> None:
        self.folder = Path(config.output_dir)
        self.tensorboard_folder = Path(config.log_dir) if config.log_dir else self.folder / "tensorboard"
        self.active = processes.is_main
        self.update = 0  # updates of the run that are done, as far as the loop has told
        self.events = Events(self.tensorboard_folder, self.say)
        self.waiting: list[str] = []  # lines of epochs for which log.txt had no room

    def open(self, facts: dict[str, Any], first_epoch: int, first_update: int) -> None:
        """Starts or continues the log: lines of epochs that will be run again are dropped."""
        if not self.active:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"--output_dir {self.folder}: {error.strerror}") from None
        self._write_run_json(facts)
        log = self.folder / "log.txt"
        entries, damaged = self._read()
        if damaged:
            numbers = ", ".join(map(str, damaged))
            self.say(f"{log}: dropped what cannot be read, as where a process or a machine ended while it wrote: line {numbers}")
        kept = [line for line in entries if line["epoch"] < first_epoch]
        write_text(log, "".join(json.dumps(line) + "\n" for line in kept))
        self.events.open(first_update)

    def lines(self) -> list[dict[str, Any]]:
        """The epochs in log.txt that can be read."""
        return self._read()[0]

    def _read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The epochs in log.txt, and the numbers of lines that are none."""
        log = self.folder / "log.txt"
        text = log.read_bytes().decode(errors="replace") if log.exists() else ""
        entries, damaged = [], []
        for number, line in enumerate(text.splitlines(), 1):
            entry = _epoch_of(line)
            if entry is None:
                damaged.append(number)
            else:
                entries.append(entry)
        return entries, damaged

    def epoch(self, line: dict[str, Any]) -> None:
        """Appends the epoch's line, on the disk when this returns, and gives its numbers to TensorBoard at `update`.

        A disk without room does not stop a run: lines wait in memory for the next epoch.
        """
        if not self.active:
            return
        self.waiting.append(json.dumps(line) + "\n")
        self._write_waiting()
        for key, value in line.items():
            if isinstance(value, (int, float)):
                self.scalar(f"epoch/{key}", value, self.update)

    def _write_waiting(self) -> None:
        try:
            _append(self.folder / "log.txt", "".join(self.waiting))
            self.waiting.clear()
        except NoRoom as error:
            self.say(f"{error}; the line waits in memory, and training goes on")

    def scalar(self, name: str, value: float, update: int) -> None:
        """A number for TensorBoard."""
        self.events.write(lambda writer: writer.add_scalar(name, value, update))

    def image(self, name: str, picture: Any) -> None:
        """A picture [H, W, 3] uint8 for TensorBoard, at `update`."""
        self.events.write(lambda writer: writer.add_image(name, picture, self.update, dataformats="HWC"))

    def forget_result(self) -> None:
        """Removes the result of an earlier run in this folder: called when there is something left to train."""
        if self.active:
            (self.folder / RESULT).unlink(missing_ok=True)

    def result(self, task: str, config: RunConfig, metrics: dict[str, Any], **more: Any) -> Path:
        """Writes result.json: the last numbers, and what they are of. Called when the run is finished."""
        path = self.folder / RESULT
        if self.active:
            result = {"task": task, "metrics": metrics, "seed": config.seed, **more, "config": asdict(config)}
            write_text(path, json.dumps(result, indent=2) + "\n")
        return path

    def close(self) -> None:
        """Flushes the events, and lines for which there was no room."""
        if self.waiting:
            self._write_waiting()
        self.events.close()

    def say(self, text: str) -> None:
        """A line for the user, without breaking the progress bar."""
        if self.active:
            bar = _tqdm()
            (bar.write if bar else print)(text)
            sys.stdout.flush()

    def _write_run_json(self, facts: dict[str, Any]) -> None:
        """The first start is kept; every later one is added to `resumed`."""
        path = self.folder / "run.json"
        if path.exists() and facts["resumed_from"]:
            try:
                first = json.loads(path.read_text())
            except ValueError:
                self.say(f"{path}: is damaged, and written anew; what the first start was is lost")
            else:
                first.setdefault("resumed", []).append(facts)
                facts = first
        write_text(path, json.dumps(facts, indent=2) + "\n")


class Events:
    """TensorBoard's file of a run. Whatever becomes of it, the run goes on: said once, and tried again in a new file.

    Args:
        folder: for TensorBoard.
        say: tells the user.
    """

    TRIES = 3

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.writer: SummaryWriter | None = None
        self.failures = 0

    def open(self, first_update: int | None) -> None:
        """Starts a file in which events before `first_update` count, and later ones of older files do not."""
        self._guarded(lambda: self._open(first_update))

    def _open(self, first_update: int | None) -> None:
        self.writer = SummaryWriter(str(self.folder), purge_step=first_update)

    def write(self, write: Callable[[SummaryWriter], None]) -> None:
        """Writes if there is a file."""
        writer = self.writer
        if writer is not None and not self._guarded(lambda: write(writer)) and self.failures < self.TRIES:
            self.open(None)

    def close(self) -> None:
        """Puts what was written on the disk."""
        if self.writer is not None:
            self._guarded(self.writer.close)

    def _guarded(self, work: Callable[[], None]) -> bool:
        try:
            work()
        except OSError as error:  # of the thread that writes, told at the next call
            self.writer = None
            self.failures += 1
            if self.failures == 1:
                self.say(f"TensorBoard: events are lost ({error.strerror}: {error.filename}); training goes on")
            return False
        return True


def run_facts(
    config: RunConfig, processes: Processes, resumed_from: Path | None, mask: MaskConfig | None = None, **more: Any
) -> dict[str, Any]:
    """What is needed to repeat a run."""
    gpu = torch.cuda.get_device_name(processes.device) if processes.device.type == "cuda" else None
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "config": asdict(config),
        "mask": asdict(mask) if mask else None,
        "git": _git_commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": {
            "type": processes.device.type,
            "name": gpu or platform.processor() or platform.machine(),
            "world_size": processes.world,
            "threads": torch.get_num_threads(),
            "host": platform.node(),
            "slurm_job": os.environ.get("SLURM_JOB_ID"),
        },
        "resumed_from": str(resumed_from) if resumed_from else None,
        **more,
    }


def progress(steps: range, last: int, title: str, log: RunLog, pace: Pace) -> Any:
    """A progress bar around `steps`, or a line every minute where stderr is no terminal or there is no tqdm.

    Args:
        steps: updates of an epoch, which may be taken up in its middle.
        last: updates of the whole epoch.
        log: says the lines; silent on ranks other than the main one.
        pace: of the run.
    """
    bar = _tqdm()
    if bar and log.active and sys.stderr.isatty():
        return bar(steps, total=len(steps), desc=title, dynamic_ncols=True, leave=False, unit="step")
    return ProgressLines(steps, last, title, log.say, pace)


SECONDS_BETWEEN_LINES = 60.0


class ProgressLines:
    """Stands in for a progress bar in a file: what the bar would show, once a minute. See :func:`progress`."""

    def __init__(self, steps: range, last: int, title: str, say: Callable[[str], None], pace: Pace) -> None:
        self.steps, self.last, self.title, self.say, self.pace = steps, last, title, say, pace
        self.done, self.said_at = steps.start, pace.clock()

    def __iter__(self) -> Iterator[int]:
        for step in self.steps:
            self.done = step + 1
            yield step

    def set_postfix_str(self, text: str) -> None:
        """Called after each step: `text` as the bar shows it."""
        now = self.pace.clock()
        if now - self.said_at >= SECONDS_BETWEEN_LINES and self.done < self.last:
            self.said_at = now
            self.say("  ".join(word for word in (self.title, f"update {self.done}/{self.last}", text, self.pace.words()) if word))


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def _git_commit() -> dict[str, Any] | None:
    """Commit of this code, and whether files differ from it."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _epoch_of(line: str) -> dict[str, Any] | None:
    """A line of log.txt; None if it is none."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("epoch"), int) else None


def _append(path: Path, text: str) -> None:
    """All of `text` at the end of a file, and on the disk, or nothing of it.

    Raises:
        NoRoom: the disk is full.
    """
    length = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        os.truncate(path, length)
        if find_no_room(error) is None:
            raise
        raise no_room(path, error.strerror or "no room") from None


def write_text(path: Path, text: str) -> None:
    """Writes `path` whole or not at all."""
    with written_whole(path) as file:
        file.write(text.encode())
