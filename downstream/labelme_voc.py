"""The former name of `python -m scenes.labelme`."""

from common.training.errors import run_cli
from scenes.labelme import PROGRAM, main

if __name__ == "__main__":
    run_cli(PROGRAM, main)
