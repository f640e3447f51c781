"""Errors of the user's making: one line that names the flag, file or value, exit code 2, no traceback.

So is a run whose numbers became NaN or infinite, with exit code 1.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from common.training.interrupt import EXIT_INTERRUPTED, Interrupted

EXIT_NONFINITE = 1
"""A run whose loss, gradient or weights became NaN or infinite: the command was well formed, its numbers were not."""


class BadInput(Exception):
    """The command line, the data, a checkpoint or a disk cannot be used; the message is one line for the user.

    All ranks raise it, and the main one says it.
    """


class RankError(BadInput):
    """The same, found by one rank while the others train on: that rank says it, and its end ends theirs."""


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient became NaN or infinite; the message says where and what was saved."""


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one line, without the usage, and raised as BadInput."""

    def error(self, message: str) -> NoReturn:
        raise BadInput(f"{message} (see --help)")


def run_cli(program: str, main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs `main`, with one line on stderr instead of a traceback for what a user can see to.

    BadInput and a full disk give exit code 2; NonFiniteLoss 1; Interrupted, a run that was asked to stop and saved its state,
    75. Other errors keep their traceback.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except BadInput as error:
        _leave(program, f"error: {error}", 2, alone=isinstance(error, RankError))
    except NonFiniteLoss as error:
        _leave(program, f"error: {error}", EXIT_NONFINITE)
    except Interrupted as stop:
        _leave(program, str(stop), EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _leave(program, f"error: {error.filename or 'the output folder'}: {error.strerror}", 2, alone=True)


def _leave(program: str, line: str, code: int, alone: bool = False) -> NoReturn:
    """Says `line` on the main rank, or on whichever it is, and ends the process."""
    if alone or os.environ.get("RANK", "0") == "0":
        print(f"{program}: {line}", file=sys.stderr, flush=True)
    raise SystemExit(code) from None
