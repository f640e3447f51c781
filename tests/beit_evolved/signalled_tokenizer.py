"""The tokenizer's training, whose second rank gets SIGUSR1 after update SIGNAL_AFTER: for the test of signals."""

from __future__ import annotations

import os
import signal
import sys

from beit_evolved.train_tokenizer import PROGRAM, main
from common.training.errors import run_cli
from common.training.loop import Loop

_step, steps = Loop._step, 0


def step(self: Loop, norm: object) -> None:
    """An optimiser step, and the signal after the one that is asked for."""
    global steps
    _step(self, norm)  # type: ignore[arg-type]
    steps += 1
    if os.environ["RANK"] == "1" and str(steps) == os.environ["SIGNAL_AFTER"]:
        os.kill(os.getpid(), signal.SIGUSR1)


if __name__ == "__main__":
    Loop._step = step  # type: ignore[method-assign]
    run_cli(PROGRAM, main, sys.argv[1:])
