"""Processes of a run: found from torchrun's environment, or one process without it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.training.errors import BadInput

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those of the run."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws the progress bar."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum of `value` over all ranks."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """A plain object of every rank, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the process group."""
        if self.world > 1:
            dist.destroy_process_group()


def start_processes(device: str) -> Processes:
    """Joins the process group (nccl on GPUs, gloo on CPUs) that torchrun's environment describes.

    Raises:
        BadInput: a device that is not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Processes(rank, world, local_rank, chosen)


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if not device.index < count:
            raise BadInput(f"--device {name}: {device} is not there, this machine has {count} CUDA devices")
    elif device.type != "cpu":
        raise BadInput(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device
