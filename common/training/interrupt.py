"""A run that is asked to stop saves its state first, and says by its exit code that it wants to go on.

Slurm sends a signal before the time limit (`--signal=USR1@120`) and SIGTERM on preemption, requeue and cancel. Any rank
may get it first, so the ranks agree, after an update, that one of them was asked; then all leave together.

Order of events: signal -> flag -> the update that runs is finished -> all ranks know -> checkpoint-last.pth ->
:class:`Interrupted` -> exit code 75. A second SIGTERM or Ctrl-C does not wait.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_INTERRUPTED = 75
"""EX_TEMPFAIL of sysexits.h: stopped on request, state saved, the same command continues. Launchers requeue on it."""

SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """The run was asked to stop; its state is saved, and the message says where."""


class Interruption:
    """While this is entered, the signals set `signal` instead of ending the process; the old handlers come back after.

    Handlers can be set in the main thread only; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self.signal is not None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Puts the handlers back. A handler that was there before (submitit's) gets the signal now that the state is saved.

        A rank that leaves by an error ends its loader first: the workers ignore SIGTERM, with which Python ends them at its
        exit, and it would wait for them for ever.
        """
        self.restore()
        workers = multiprocessing.active_children() if error is not None else []
        if workers and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise over the error that is on its way
        for worker in workers:
            worker.kill()
        if isinstance(error, Interrupted) and self.signal is not None:
            handler = signal.getsignal(self.signal)
            if callable(handler) and handler is not signal.default_int_handler:
                os.kill(os.getpid(), self.signal)

    def restore(self) -> None:
        """The handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        urgent = number == signal.SIGINT or (number == signal.SIGTERM and self.signal == signal.SIGTERM)
        if self.requested and urgent:
            self.restore()
            os.kill(os.getpid(), number)
        self.signal = signal.Signals(number)


def shield_worker(worker: int) -> None:
    """`worker_init_fn` of a loader: Slurm signals every process of a step, and only the rank itself is to act on it.

    A worker ends when its rank does.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
