"""The former name of `python -m paper.reproduce`."""

from common.training.errors import run_cli
from paper.reproduce import PROGRAM, main

if __name__ == "__main__":
    run_cli(PROGRAM, main)
