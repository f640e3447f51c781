"""One short run of each method with each mask, on the photographs inside the wheels: does the loss fall?

    python -m benchmarks.short_runs

Prints a Markdown table of the first and last epoch's loss. Tiny models, a few dozen updates, one seed: it shows that
every trainer learns with every mask, and nothing about which mask is better. Losses of different masks are not
comparable with each other, nor are those of different methods.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import beit_evolved.model
import mae_evolved.model
import simmim_evolved.model
from beit_evolved import run_beit_pretraining, train_tokenizer
from mae_evolved import main_pretrain
from simmim_evolved import main_simmim

DEPTH = 4
MASKS = ("evolved", "random", "grid", "block", "part", "official")
COMMON = (
    "--dataset photos --input_size 64 --repeat 8 --epochs 6 --batch_size 16 --warmup_epochs 1 --lr 1e-3 --num_workers 0 "
    "--picture_epochs 0 --device cpu --resume none"
)
TOKENIZER = (
    "--dataset photos --input_size 64 --repeat 8 --epochs 4 --batch_size 16 --lr 3e-3 --vocabulary 256 --code_width 32 "
    "--width 24 --num_workers 0 --pictures 0 --device cpu --resume none"
)

Main = Callable[[Sequence[str]], None]


def run(main: Main, flags: str, output: Path) -> list[float]:
    """Losses of the epochs of one run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(f"{flags} --output_dir {output}".split())
    return [json.loads(line)["train_loss"] for line in (output / "log.txt").read_text().splitlines()]


def make_shallow() -> dict[str, tuple[str, Main]]:
    """Method -> its tiny model, cut to a few blocks, and its trainer."""
    trainers = {
        "MAE": ("mae_vit_tiny_patch8", mae_evolved.model.MODELS, main_pretrain.main),
        "BEiT": ("beit_tiny_patch8_8k_vocab", beit_evolved.model.MODELS, run_beit_pretraining.main),
        "SimMIM": ("simmim_vit_tiny_patch8", simmim_evolved.model.MODELS, main_simmim.main),
    }
    for name, models, _ in trainers.values():
        models[name] = partial(models[name], depth=DEPTH)  # type: ignore[index, arg-type]
    return {method: (name, main) for method, (name, _, main) in trainers.items()}


def main() -> None:
    """Runs everything and prints the table."""
    start = time.perf_counter()
    methods = make_shallow()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        run(train_tokenizer.main, TOKENIZER, work / "tokenizer")
        print("| method | mask | loss of the first epoch | of the last | change |")
        print("|---|---|---|---|---|")
        for method, (model, trainer) in methods.items():
            tokenizer = f"--tokenizer {work / 'tokenizer'}" if method == "BEiT" else ""
            for mask in MASKS:
                losses = run(trainer, f"--model {model} --mask {mask} {tokenizer} {COMMON}", work / f"{method}-{mask}")
                change = losses[-1] / losses[0] - 1
                print(f"| {method} | {mask} | {losses[0]:.4f} | {losses[-1]:.4f} | {change:+.0%} |", flush=True)
    print(f"\n{len(methods) * len(MASKS)} runs in {time.perf_counter() - start:.0f} s; command: python -m benchmarks.short_runs")


if __name__ == "__main__":
    main()
