"""The former name of `python -m paper.tables`."""

from common.training.errors import run_cli
from paper.tables import PROGRAM, main

if __name__ == "__main__":
    run_cli(PROGRAM, main)
