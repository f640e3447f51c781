"""`python -m scenes OUT` composes labelled scenes; scenes/make.py says how."""

from common.training.errors import run_cli
from scenes.make import PROGRAM, main

if __name__ == "__main__":
    run_cli(PROGRAM, main)
