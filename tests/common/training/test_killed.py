"""Runs that are killed (SIGKILL) at any moment go on, and end to the bit as if they had been left alone.

A run is killed again and again, by the clock and in the middle of its writes, until it gets through. Children are forked from a
server that has imported everything, so that a start takes no seconds. Seeds: of the test's parameters.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from common.training.checkpoint import LAST
from tests import methods
from tests.conftest import assert_same, free_ports, read_log

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])

COMPARED = ("model", "optimizer", "scaler", "epoch", "update", "mask", "ema", "meters", "kept_parts")
SAVES = "--save_steps 1 --dist_timeout 0.5"


@dataclass(frozen=True)
class Writes:
    """Dies at the n-th of what this process does to files: before it, or behind it.

    Attributes:
        number: n, from 1.
        behind: after the call, not before it.
    """

    number: int
    behind: bool


def child(method: str, argv: Sequence[str], environment: dict[str, str], log: str, death: Writes | None) -> None:
    """A rank of a run; its output goes to `log`."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    for models, name, model in methods.shallow_models():
        models[name] = model
    if death is not None:
        die_at(death)
    try:
        methods.MAINS[method](list(argv))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def die_at(death: Writes) -> None:
    """Counts calls that flush, rename, link, cut or remove files; all files that a run must not lose go through them."""
    done = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*words: Any, **options: Any) -> Any:
            nonlocal done
            done += 1
            if done == death.number and not death.behind:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*words, **options)
            if done == death.number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    for name in ("fsync", "replace", "link", "truncate", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))


class Killed:
    """A run on one or more ranks in a folder, and how often it was killed."""

    def __init__(self, method: str, flags: str, output: Path, ranks: int) -> None:
        self.method, self.ranks, self.output = method, ranks, output
        self.argv = [*flags.split(), "--output_dir", str(output)]
        self.log = str(output.with_suffix(".txt"))
        self.kills = 0

    def start(self, death: Writes | None = None) -> list[BaseProcess]:
        """Starts all ranks; the first dies at its `death`."""
        places: list[dict[str, str]] = [{}]
        if self.ranks > 1:
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports()), "WORLD_SIZE": str(self.ranks)}
            places = [{**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.ranks)]
        started = []
        for rank, place in enumerate(places):
            dies = death if rank == 0 else None
            started.append(CONTEXT.Process(target=child, args=(self.method, self.argv, place, self.log, dies)))
            started[-1].start()
        return started

    def attempt(self, death: Writes | None = None, seconds: float | None = None, rank: int = 0) -> bool:
        """One start, killed after some seconds or at a write; whether the run got through."""
        processes = self.start(death)
        processes[rank].join(seconds if seconds is not None else 120)
        if processes[rank].exitcode is None:
            processes[rank].kill()
        for process in processes:
            process.join(60)
            if process.exitcode is None:  # a rank that waits for the killed one longer than --dist_timeout
                process.kill()
                pytest.fail(f"a rank was left waiting\n{Path(self.log).read_text()[-3000:]}")
        codes = [process.exitcode for process in processes]
        if -signal.SIGKILL not in codes:
            assert codes == [0] * self.ranks, Path(self.log).read_text()[-3000:]
            return True
        self.kills += 1
        return False


def state_of(output: Path) -> dict[str, Any]:
    state = torch.load(output / LAST, weights_only=True)
    return {name: state[name] for name in COMPARED if name in state}


def kill_again_and_again(method: str, flags: str, work: Path, ranks: int, kills: int, seed: int) -> None:
    """Runs until `kills` are done, each run until it gets through; each ends like the one that was left alone."""
    began = time.perf_counter()
    alone = Killed(method, flags, work / "alone", ranks)
    assert alone.attempt()
    length, draw = time.perf_counter() - began, random.Random(seed)
    state, log, done, runs = state_of(alone.output), read_log(alone.output), 0, 0
    while done < kills:
        run = Killed(method, flags, work / f"run{runs}", ranks)
        through = False
        while not through:
            if run.kills >= 8 or done + run.kills >= kills:
                through = run.attempt()
            elif draw.random() < 0.5:
                through = run.attempt(death=Writes(draw.randint(1, 40), draw.random() < 0.5))
            else:
                through = run.attempt(seconds=draw.uniform(0, length), rank=draw.randrange(ranks))
        assert_same(state_of(run.output), state)
        assert read_log(run.output) == log
        done, runs = done + run.kills, runs + 1


CASES = [
    ("mae", "--parts_every 2", 1),
    ("mae", "", 2),
    ("beit", "--attention_pass training", 1),
    ("simmim", "--recipe authors --schedule_epochs 4", 1),
    ("simmim", "--parts_every 2", 2),
]


@pytest.mark.parametrize(("method", "more", "ranks"), CASES[:2])
def test_killed_runs_end_as_if_left_alone(image_folder: Path, tmp_path: Path, method: str, more: str, ranks: int) -> None:
    """Three kills each, one and two processes (seed 0)."""
    flags = f"{methods.flags(method, image_folder, tmp_path)} {SAVES} {more}"
    kill_again_and_again(method, flags, tmp_path, ranks, kills=3, seed=0)


@pytest.mark.full
@pytest.mark.parametrize(("method", "more", "ranks"), CASES)
def test_killed_at_a_hundred_moments(image_folder: Path, tmp_path: Path, method: str, more: str, ranks: int) -> None:
    """A hundred kills each (seed 1)."""
    flags = f"{methods.flags(method, image_folder, tmp_path)} {SAVES} {more}"
    kill_again_and_again(method, flags, tmp_path, ranks, kills=100, seed=1)
