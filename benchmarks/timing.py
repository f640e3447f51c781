"""Seconds, memory and the machine of a benchmark."""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""What seconds are: those on the clock, or those that processors worked for this process, whatever else they did."""


def seconds_of(stage: Callable[[], Any], device: torch.device, clock: str = "wall") -> float:
    """Seconds of one run of `stage` on one of CLOCKS; on a GPU until it is done."""
    wait(device)
    start = CLOCKS[clock]()
    stage()
    wait(device)
    return CLOCKS[clock]() - start


def wait(device: torch.device) -> None:
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def added_memory(stage: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which the peak during `stage` exceeds what was held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        stage()
        return int(torch.cuda.max_memory_allocated(device) - before)
    if not _reset_peak():
        return None
    before = _status_bytes("VmRSS")
    stage()
    return max(_status_bytes("VmHWM") - before, 0)


def _reset_peak() -> bool:
    """Gives freed memory back to the system and sets the process's peak to what it holds now; False if not Linux."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # otherwise a stage could reuse freed memory and seem to add none
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") > 0
    except (OSError, AttributeError):
        return False


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def memory_method(device: torch.device) -> str:
    """How the column of memory was made, in words."""
    if device.type == "cuda":
        return "peak of torch.cuda's allocated memory above the level before the stage"
    return "peak resident memory of the process (Linux VmHWM) above the level before the stage, freed memory returned first"


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {"device": name, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "torch": torch.__version__}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
