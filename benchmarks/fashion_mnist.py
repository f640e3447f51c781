"""What a short MAE pre-training with evolved masks is worth on Fashion-MNIST: k-NN, linear probe, fine-tuning.

    python -m benchmarks.fashion_mnist

Beside it the same evaluations of random weights, and k-NN and multinomial logistic regression (scikit-learn) of the raw
pixels. A ViT of 4 blocks, 192 wide, patch 4 on 28 px (49 patches), a few epochs, a share of the images: it shows that
the chain from pre-training to scores works, and nothing about the paper's numbers or about which mask is better.

Every seed draws its own training images, weights, order and crops; the validation images are the same. Both
linear classifiers and k-NN see all training images with labels, fine-tuning `--labels` of them.
Weights that were pre-trained are fine-tuned with layer decay .75, random ones with 1 (no layer is to be kept as it is).
No setting was chosen by validation scores.

n images
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import downstream.vit
import mae_evolved.model
from common.training.errors import BadInput, run_cli
from common.training.sources import DEBIAN_FASHION_MNIST, read_idx
from downstream import finetune, linear_probe
from downstream.probing.knn import KNN_TEMPERATURE
from mae_evolved import main_pretrain

DEPTH = 4
NEIGHBOURS = 20
COMMON = "--dataset fashion-mnist --input_size 28 --interpolation bilinear --num_workers 0 --device cpu --resume none "
PRETRAIN = "--model mae_vit_tiny_patch4 --batch_size 64 --lr 1.5e-3 --warmup_epochs 1 --crop_scale 0.5 1 "
PRETRAIN += "--parts_start 10 --parts_end 3 --picture_epochs 1"  # 40 -> 10 of 196 patches becomes 10 -> 3 of 49
TASKS = "--model vit_tiny_patch4 --method mae --crop_pct 1 --warmup_epochs 1 "
PROBE = f"--layer all --cache --knn {NEIGHBOURS} --pool mean --batch_size 256 --lr 4 --epochs 60 --eval_freq 60 --pictures 0"
FINETUNE = "--batch_size 32 --lr 1e-3 --drop_path 0 --mixup 0 --cutmix 0 --random_erasing 0 --crop_scale 0.5 1 --pictures 16"
FINETUNE_EXTRA = ["--auto_augment", ""]
COLUMNS = ("k-NN", "linear", "fine-tuned")

Percentages = dict[str, float]
Main = Callable[[Sequence[str]], None]


def make_shallow() -> None:
    """Cuts the tiny models to DEPTH blocks."""
    for models, name in ((mae_evolved.model.MODELS, "mae_vit_tiny_patch4"), (downstream.vit.MODELS, "vit_tiny_patch4")):
        models[name] = partial(models[name], depth=DEPTH)  # type: ignore[index, arg-type]


def run(main: Main, flags: str, output: Path, extra: Sequence[str] = ()) -> None:
    """One run, without what it says."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main([*f"{flags} --output_dir {output}".split(), *extra])


def metrics(output: Path) -> Percentages:
    """Scores of a finished run."""
    return json.loads((output / "result.json").read_text())["metrics"]


def write_idx(path: Path, values: np.ndarray) -> None:
    """A uint8 array as gzipped IDX."""
    header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))


def draw_data(source: Path, folder: Path, seed: int, train: int, val: int) -> None:
    """`train` training images drawn by the seed, and the first `val` test images."""
    folder.mkdir(parents=True)
    train_indices = np.sort(np.random.default_rng(seed).permutation(60000)[:train])
    for part, indices in (("train", train_indices), ("t10k", np.arange(val))):
        for kind in ("images-idx3", "labels-idx1"):
            write_idx(folder / f"{part}-{kind}-ubyte.gz", read_idx(source / f"{part}-{kind}-ubyte.gz")[indices])


def raw_pixels(folder: Path, labels: int, seed: int) -> Percentages:
    """Top-1 in percent of k-NN (votes as the probe's) and of logistic regression, on pixels 0..1."""
    parts = {
        part: (
            read_idx(folder / f"{part}-images-idx3-ubyte.gz").reshape(-1, 784) / 255,
            read_idx(folder / f"{part}-labels-idx1-ubyte.gz"),
        )
        for part in ("train", "t10k")
    }
    (images, targets), val = parts["train"], parts["t10k"]
    knn = KNeighborsClassifier(NEIGHBOURS, metric="cosine", weights=vote).fit(images, targets)
    labelled = np.random.default_rng(seed).permutation(len(images))[:labels]
    linear, small = (
        LogisticRegression(max_iter=300, C=0.05).fit(images[index], targets[index]) for index in (slice(None), labelled)
    )
    scores = (100 * model.score(*val) for model in (knn, linear, small))
    return dict(zip((*COLUMNS[:2], "linear, few labels"), scores, strict=True))


def vote(distances: np.ndarray) -> np.ndarray:
    """Weight of a neighbour at a cosine distance: exp((cosine - 1) / temperature)."""
    return np.exp(-distances / KNN_TEMPERATURE)


def evaluate_weights(common: str, weights: str, output: Path, layer_decay: float, flags: argparse.Namespace) -> Percentages:
    """Scores of all three kinds, from one checkpoint or from random weights."""
    run(linear_probe.main, f"{common} {TASKS} {PROBE} {weights}", output / "probe")
    tune = f"{FINETUNE} --epochs {flags.finetune_epochs} --eval_freq 1000 --subset {flags.labels} --layer_decay {layer_decay}"
    run(finetune.main, f"{common} {TASKS} {tune} {weights}", output / "finetune", FINETUNE_EXTRA)
    probe, tuned = metrics(output / "probe"), metrics(output / "finetune")
    layers = {key: value for key, value in probe.items() if "_layer" in key}
    return {"k-NN": probe[f"knn{NEIGHBOURS}"], "linear": probe["top1"], "fine-tuned": tuned["top1"], **layers}


def run_seed(flags: argparse.Namespace, seed: int, work: Path) -> dict[str, Percentages]:
    """All rows of the table for one seed."""
    torch.set_num_threads(1)
    make_shallow()
    start, folder = time.perf_counter(), work / f"data{seed}"
    draw_data(Path(flags.data_path), folder, seed, flags.train_images, flags.val_images)
    output, common = work / f"seed{seed}", f"{COMMON} --data_path {folder} --seed {seed}"
    run(main_pretrain.main, f"{common} {PRETRAIN} --epochs {flags.pretrain_epochs}", output / "pretrain")
    trained = time.perf_counter() - start
    checkpoint = f"--init_from {output / 'pretrain' / 'checkpoint-last.pth'}"
    rows = {
        "MAE, evolved masks": evaluate_weights(common, checkpoint, output / "pretrained", 0.75, flags),
        "random weights": evaluate_weights(common, "", output / "random", 1.0, flags),
        "raw pixels": raw_pixels(folder, flags.labels, seed),
    }
    rows["seconds"] = {"pre-training": trained, "all": time.perf_counter() - start}
    (output / "rows.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def cell(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(results: list[dict[str, Percentages]], flags: argparse.Namespace) -> str:
    """Markdown: mean and standard deviation over seeds, top-1 in percent."""
    lines = [
        f"Top-1 in percent on {flags.val_images} test images, mean ± standard deviation over {len(results)} seeds.\n",
        f"| features | {NEIGHBOURS}-NN, {flags.train_images} labels | linear, {flags.train_images} labels "
        f"| fine-tuned, {flags.labels} labels |",
        "|---|---|---|---|",
    ]
    for name in ("MAE, evolved masks", "random weights", "raw pixels"):
        cells = [cell([rows[name][column] for rows in results]) if column in results[0][name] else "-" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    few_labels = cell([rows["raw pixels"]["linear, few labels"] for rows in results])
    lines.append(f"\nLogistic regression of raw pixels with {flags.labels} labels: {few_labels}.\n")
    lines += ["| block | MAE: linear | k-NN | random: linear | k-NN |", "|---|---|---|---|---|"]
    for layer in range(DEPTH):
        cells = [
            cell([rows[name][f"{kind}_layer{layer}"] for rows in results])
            for name in ("MAE, evolved masks", "random weights")
            for kind in ("top1", f"knn{NEIGHBOURS}")
        ]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Sizes of the benchmark."""
    parser = argparse.ArgumentParser(prog="fashion_mnist", description="Short MAE pre-training on Fashion-MNIST, and its worth.")
    parser.add_argument("--data_path", default=str(DEBIAN_FASHION_MNIST), help="folder of the four .gz files [%(default)s]")
    parser.add_argument("--output_dir", default="", help="keeps checkpoints, logs and pictures; default: a temporary folder")
    for name, default, help in (
        ("train_images", 6000, "images of pre-training, and labelled ones of k-NN and linear classifiers"),
        ("val_images", 3000, "test images"),
        ("labels", 1000, "labelled images of fine-tuning"),
        ("pretrain_epochs", 6, "epochs of pre-training"),
        ("finetune_epochs", 8, "epochs of fine-tuning"),
        ("jobs", 2, "seeds run at once, one thread each"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{help} [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="[%(default)s]")
    flags = parser.parse_args(argv)
    if not (Path(flags.data_path) / "train-images-idx3-ubyte.gz").is_file():
        raise BadInput(f"--data_path {flags.data_path}: no train-images-idx3-ubyte.gz (apt-get install dataset-fashion-mnist)")
    return flags


def main(argv: Sequence[str]) -> None:
    """Runs all seeds and prints the tables."""
    flags, start = parse(argv), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(flags.output_dir or temporary)
        with ProcessPoolExecutor(flags.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(run_seed, flags, seed, work) for seed in flags.seeds]
            results = [future.result() for future in futures]
    print(table(results, flags))
    shares = cell([rows["seconds"]["pre-training"] for rows in results])
    print(f"\n{time.perf_counter() - start:.0f} s, {flags.jobs} at once; pre-training {shares} s a seed.")


if __name__ == "__main__":
    run_cli("fashion_mnist", main)
