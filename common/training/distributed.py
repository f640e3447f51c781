"""Processes of a run: found from the environment of torchrun or of a Slurm step, or one process without it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.training.errors import BadInput

T = TypeVar("T")

SLURM_PORTS = range(20000, 30000)
"""Where the rendezvous of a Slurm job listens unless MASTER_PORT says otherwise: one of these, by the job's number."""


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

    def gather_tensor(self, value: Tensor) -> list[Tensor]:
        """A tensor of every rank, of one shape and type, on the device of the run, in the order of the ranks."""
        if self.world == 1:
            return [value]
        values = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(values, value)
        return values

    def share(self, values: Iterable[Tensor]) -> None:
        """Puts the main rank's values into those of all ranks."""
        if self.world > 1:
            for value in values:
                dist.broadcast(value, 0)

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main rank, a plain object, while the others wait; its BadInput is raised on all ranks, which
        then end together."""
        if self.world == 1:
            return work()
        answer: list[Any] = [None, ""]
        if self.is_main:
            try:
                answer[0] = work()
            except BadInput as error:
                answer[1] = str(error)
        dist.broadcast_object_list(answer, 0, device=self.device if self.device.type == "cuda" else None)
        if answer[1]:
            raise BadInput(answer[1])
        result: T = answer[0]
        return result

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leaves the process group."""
        if self.world > 1:
            dist.destroy_process_group()


def start_processes(device: str, timeout_minutes: float = 30) -> Processes:
    """Joins the process group (nccl on GPUs, gloo on CPUs) that the environment describes.

    The first that applies:

    1. RANK and WORLD_SIZE are set (torchrun, submitit's export): those.
    2. This is one task of a Slurm step with more than one (srun): its task number, and the first node as the meeting
       point; MASTER_ADDR and MASTER_PORT may say otherwise.
    3. One process.

    Args:
        timeout_minutes: how long a rank waits for the others before it stops with an error.

    Raises:
        BadInput: a device that is not there.
    """
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        os.environ.update(slurm_environment(os.environ))
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world > 1:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return Processes(rank, world, local_rank, chosen)


def count_ranks() -> int:
    """Processes of the run, as :func:`start_processes` will find them."""
    if "RANK" not in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return int(os.environ["SLURM_STEP_NUM_TASKS"])
    return int(os.environ.get("WORLD_SIZE", "1"))


def slurm_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for one task of a Slurm step, from Slurm's own.

    Raises:
        BadInput: a node list that scontrol cannot expand.
    """
    port = SLURM_PORTS[int(environment["SLURM_JOB_ID"]) % len(SLURM_PORTS)]
    variables = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": _tasks_on_node(environment),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }
    return {**variables, "MASTER_ADDR": environment.get("MASTER_ADDR") or _first_node(environment)}


def _tasks_on_node(environment: Mapping[str, str]) -> str:
    """Tasks of the step on this node, from a list such as `4(x2),3` (a count, and for how many nodes it stands)."""
    counts: list[str] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    return counts[int(environment.get("SLURM_NODEID", "0"))]


def _first_node(environment: Mapping[str, str]) -> str:
    nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
    if "[" not in nodes:
        return nodes.split(",")[0]
    try:
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise BadInput(f"cannot expand the node list {nodes}: {error}; set MASTER_ADDR to the first node") from None
    return hosts.stdout.split()[0]


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        own = 0 if count == 1 and "SLURM_STEP_NUM_TASKS" in os.environ else local_rank  # --gpus-per-task shows each its own
        device = torch.device("cuda", own if device.index is None else device.index)
        if not device.index < count:
            raise BadInput(f"--device {name}: {device} is not there, this machine has {count} CUDA devices")
    elif device.type != "cpu":
        raise BadInput(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    return device
