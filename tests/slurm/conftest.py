"""Jobs on a real Slurm of two nodes, small enough for two cores."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import Cluster, missing

TINY = """\
model = "mae_vit_tiny_patch4"
input_size = "16"
epochs = 30
warmup_epochs = 1
blr = 1e-2
num_workers = 1
parts_start = 8
parts_end = 3
picture_epochs = 0
save_freq = 1000
device = "cpu"
"""
WAIT = 240
"""Seconds that a test waits for anything; the machine may be busy."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One for a file of tests; no two at a time, whatever pytest's workers do."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's: a socket's path is at most 107 characters
    try:
        with (Path(tempfile.gettempdir()) / "evolved-masks-slurm.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with Cluster(folder) as running:
                yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def until(what: str, happened: Callable[[], object], details: Callable[[], str] = str, seconds: float = WAIT) -> None:
    """Waits for something."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s\n{details()}"
        time.sleep(0.05)


def script(name: str, *flags: str, environment: dict[str, str], **values: object) -> subprocess.CompletedProcess[str]:
    """`slurm/NAME.sh FLAGS` on the login node, site values given in the environment."""
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / f"{name}.sh"), *flags],
        env={"SITE_ENV": os.devnull, **environment, **{key: str(value) for key, value in values.items()}},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
