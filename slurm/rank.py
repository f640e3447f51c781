"""A rank of a job that submitit runs: finds its place, trains, and has the job requeued when it was stopped."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")  # read by submitit when it is imported; USR1 is what trainers know

from submitit import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from common.training.checkpoint import LAST
from common.training.interrupt import EXIT_INTERRUPTED, Interrupted


class Training:
    """Runs the main function of a module; what submitit pickles.

    Args:
        module: with a `main(argv)` that raises Interrupted when it was stopped and its state is saved.
        flags: its command line.
        output_dir: where it keeps its checkpoint.
    """

    def __init__(self, module: str, flags: Sequence[str], output_dir: str) -> None:
        self.module, self.flags, self.output_dir = module, list(flags), output_dir
        self.begun = time.time()
        self.terminated = False

    def __call__(self) -> None:
        """Trains to the end."""
        environment = self._place()
        self.begun = time.time()
        main = importlib.import_module(self.module).main
        if environment is None:
            main(self.flags)
            return
        signal.signal(signal.SIGTERM, self._note)
        try:
            main(self.flags)
        except Interrupted as stop:
            print(stop, flush=True)
            self._leave(environment)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit runs after the requeue: the same, continuing the checkpoint if this start wrote one."""
        last = Path(self.output_dir) / LAST
        saved = last.exists() and last.stat().st_mtime >= self.begun
        return DelayedSubmission(Training(self.module, [*self.flags, *(["--resume", "auto"] if saved else [])], self.output_dir))

    def _place(self) -> JobEnvironment | None:
        """torchrun's variables for this rank; None in the debug executor, which is one process."""
        try:
            environment = JobEnvironment()
        except RuntimeError:
            return None
        if environment.cluster == "debug":
            return None
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if environment.cluster == "local":
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        return environment

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.terminated = True

    def _leave(self, environment: JobEnvironment) -> None:
        """The main rank hands over to submitit's handler, which requeues; the others leave in peace, or srun would kill it.

        SIGTERM is also what scancel and Ctrl-C on a local job send: requeued is only what nobody ends.
        """
        if environment.global_rank == 0 and not self._is_ended(environment):
            signal.raise_signal(environment._usr_sig())
        raise SystemExit(EXIT_INTERRUPTED if self.terminated and environment.cluster == "local" else 0)

    def _is_ended(self, environment: JobEnvironment) -> bool:
        if environment.cluster != "slurm":
            return self.terminated
        description = subprocess.run(
            ["scontrol", "show", "job", environment.raw_job_id], capture_output=True, text=True, check=False
        ).stdout
        return "JobState=RUNNING" not in description.split()
