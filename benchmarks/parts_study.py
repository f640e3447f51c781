"""Pre-trains the models whose parts benchmarks/parts_quality.py compares: each method, evolved and random masks, several seeds.

    python -m benchmarks.parts_study OUT                   # about an hour of 2 CPU cores; continued when started again
    python -m benchmarks.parts_quality OUT/*/checkpoint-*.pth --scenes OUT/scenes

Scenes are those of `python -m scenes`: what is trained on and what is measured on share no picture. The models are the tiny ones
cut to 6 blocks, on 8 x 8 patches, so that 18 runs end on a laptop. Checkpoints are kept at four ages. Runs of one seed end before
the next seed begins: an interrupted study still holds whole seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import beit_evolved.model
import mae_evolved.model
import simmim_evolved.model
from beit_evolved import run_beit_pretraining, train_tokenizer
from mae_evolved import main_pretrain
from simmim_evolved import main_simmim

SCENE_SIZE, DEPTH, AGES, BATCH = 64, 6, 4, 64
METHODS = ("mae", "beit", "simmim")
MASKS = ("evolved", "random")


class _Method(NamedTuple):
    model: str
    models: dict[str, Any]
    main: Callable[[Sequence[str]], None]
    flags: str


_METHODS = {
    "mae": _Method("mae_vit_tiny_patch8", mae_evolved.model.MODELS, main_pretrain.main, "--lr 1.5e-3"),
    "beit": _Method("beit_tiny_patch8_8k_vocab", beit_evolved.model.MODELS, run_beit_pretraining.main, "--lr 1.5e-3"),
    "simmim": _Method("simmim_vit_tiny_patch8", simmim_evolved.model.MODELS, main_simmim.main, "--lr 1e-3"),
}
_TOKENIZER = "--epochs 8 --lr 3e-3 --vocabulary 512 --code_width 32 --width 24 --warmup_epochs 1 --pictures 0"
_COMMON = f"--input_size {SCENE_SIZE} --num_workers 0 --device cpu --picture_epochs 0"


@contextlib.contextmanager
def shallow_models() -> Iterator[None]:
    """The tiny models with DEPTH blocks, as long as the context lasts."""
    before = {name: method.models[method.model] for name, method in _METHODS.items()}
    try:
        for method in _METHODS.values():
            method.models[method.model] = partial(method.models[method.model], depth=DEPTH)
        yield
    finally:
        for name, method in _METHODS.items():
            method.models[method.model] = before[name]


def run_name(method: str, mask: str, seed: int) -> str:
    """Folder of a run: mae-evolved-0."""
    return f"{method}-{mask}-{seed}"


def pretrain(out: Path, method: str, mask: str, seed: int, epochs: int, batch_size: int = BATCH) -> float:
    """Trains a run to its end, from where it stands; returns the seconds of this call."""
    start = time.perf_counter()
    chosen, folder = _METHODS[method], out / run_name(method, mask, seed)
    tokenizer = f"--tokenizer {out / 'tokenizer'}" if method == "beit" else ""
    run = f"--model {chosen.model} --mask {mask} --seed {seed} --data_path {out}/scenes/imagenet --output_dir {folder}"
    length = f"--batch_size {batch_size} --epochs {epochs} --warmup_epochs {epochs / 20} --save_freq {max(epochs // AGES, 1)}"
    flags = f"{_COMMON} {chosen.flags} {tokenizer} {run} {length}"
    if not (folder / "result.json").exists():
        with _console(out / f"{folder.name}.txt"):
            chosen.main(flags.split())
    return time.perf_counter() - start


@contextlib.contextmanager
def _console(path: Path) -> Iterator[None]:
    with path.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def prepare(out: Path, scenes: int, methods: Sequence[str] = METHODS) -> None:
    """Scenes, and where BEiT is among the methods the tokenizer that its targets come from."""
    from scenes.make import make_scenes

    make_scenes(out / "scenes", train=scenes, val=400, size=SCENE_SIZE)
    if "beit" in methods and not (out / "tokenizer" / "result.json").exists():
        with _console(out / "tokenizer.txt"):
            flags = f"{_TOKENIZER} --input_size {SCENE_SIZE} --batch_size {BATCH} --num_workers 0 --device cpu"
            train_tokenizer.main(f"{flags} --data_path {out}/scenes/imagenet --output_dir {out}/tokenizer".split())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not there yet, and says how long it took."""
    parser = argparse.ArgumentParser(prog="benchmarks.parts_study", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of scenes, tokenizer and runs")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each run")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of each run [%(default)s]")
    parser.add_argument("--scenes", type=int, default=4000, help="training scenes")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=METHODS,
        help="only these, so that two processes can share; start the second once the scenes are there",
    )
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    prepare(options.out, options.scenes, options.methods)
    with shallow_models():
        for seed in range(options.seeds):
            for mask in MASKS:
                for method in options.methods:
                    seconds = pretrain(options.out, method, mask, seed, options.epochs)
                    print(f"{run_name(method, mask, seed)}: {seconds:.0f} s on {os.cpu_count()} cores", flush=True)


if __name__ == "__main__":
    main()
