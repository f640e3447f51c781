"""Errors of the user's making: one line that names the flag, file or value, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from common.training.interrupt import EXIT_INTERRUPTED, Interrupted


class BadInput(Exception):
    """The command line, the data or a checkpoint cannot be used; the message is one line for the user."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message says where and what was saved."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, without the usage, and raised as BadInput."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see --help)")


def run_cli(program: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main`, with one line on stderr instead of a traceback for two of its exceptions.

    BadInput gives exit code 2; Interrupted, a run that was asked to stop and saved its state, 75. Other errors keep
    their traceback.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{program}: {stop}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_INTERRUPTED) from None
