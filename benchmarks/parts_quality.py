"""Which signal of the encoder gives parts that follow objects: the graph cut against the true object masks of scenes.

    python -m benchmarks.parts_quality RUN/checkpoint-*.pth --scenes SCENES            every signal x block, K 40, 20, 10
    python -m benchmarks.parts_quality RUN/checkpoint-last.pth --scenes SCENES --signals attention,tokens --parts 10
    python -m benchmarks.parts_quality STUDY --markdown TABLE.md --json TABLE.json --picture TABLE.png

Scenes are composed photographs whose objects are known to the pixel (`python -m scenes`; those of validation share no picture
with those of training). Each signal of each block of a pre-trained encoder, read as a training run with that `--graph` and
`--layers` would read it, is cut into K parts, and the parts are compared with the objects patch by patch (part_scores.py).
Controls, for each checkpoint: the same network untrained, patch coordinates, raw pixels, and random labels. Checkpoints of one
method, mask and epoch that differ in their seed are put together: mean and standard deviation over them.

B scenes   H, W patch grid   N = H*W patches   K parts   T tokens
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import beit_evolved.model
import mae_evolved.model
import simmim_evolved.model
from benchmarks.part_scores import SCORES, Scenes, mean_scores, patch_objects, read_scenes, score_parts
from benchmarks.skipped_passes import write_json
from common.attention import attention_mode
from common.mask_config import FORMER_DEFAULTS, MaskConfig
from common.models.names import patch_size_of
from common.parts import PartsOptions, partition_parts
from common.signals import signal_graph
from common.training.checkpoint import read_checkpoint
from common.training.data import IMAGENET_MEAN, IMAGENET_STD
from common.training.errors import BadInput, run_cli
from common.visualize import draw_parts
from common.visualize.captions import Group, Sheet

PROGRAM = "benchmarks.parts_quality"
PARTS = (40, 20, 10)
CONTROLS = ("coordinates", "pixels", "random labels")
BETAS = (1.0, 8.0, 32.0)
"""Weights of the neighbours (`--smooth`) that are tried on two signals."""
UNTRAINED = "untrained "
"""Before the name of a signal that an untrained network gave."""

_TRAINERS: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "MAE": dict(mae_evolved.model.MODELS),
    "BEiT": dict(beit_evolved.model.MODELS),
    "SimMIM": dict(simmim_evolved.model.MODELS),
}
_AT_ONCE = 50  # scenes of a pass


# --- Signals ------------------------------------------------------------------------------------------------------


def signals_of(depth: int) -> dict[str, MaskConfig]:
    """Name -> the mask options that a run with this signal would have; `tokens 5` is the output of block 5."""
    blocks = [str(block) for block in range(depth)]
    chosen = {f"attention {layers}": MaskConfig(layers=layers) for layers in ("all", *blocks)}
    chosen["attention all, heads concat"] = MaskConfig(heads="concat")
    chosen["attention all, heads select"] = MaskConfig(heads="select")
    for graph in ("tokens", "queries", "keys", "values"):
        for layers in ("all", *blocks):
            chosen[f"{graph} {layers}"] = MaskConfig(graph=graph, layers=layers)  # type: ignore[arg-type]
    for layers in blocks:
        chosen[f"tokens {layers}, vectors"] = MaskConfig(graph="tokens", layers=layers, similarity="vectors")
        chosen[f"tokens {layers}, no position"] = MaskConfig(graph="tokens", layers=layers, remove_position=True)
        chosen[f"keys {layers}, heads select"] = MaskConfig(graph="keys", layers=layers, heads="select")
    for beta in BETAS:
        chosen[f"attention all, smooth {beta:g}"] = MaskConfig(smooth=beta)
        chosen[f"tokens {blocks[-1]}, smooth {beta:g}"] = MaskConfig(graph="tokens", layers=blocks[-1], smooth=beta)
    chosen["attention all, cut of version 0.1.0"] = MaskConfig(**FORMER_DEFAULTS)
    chosen["attention all, recipe authors"] = MaskConfig.from_recipe("authors")
    return chosen


@torch.no_grad()
def graph_of(model: Any, images: Tensor, config: MaskConfig) -> Tensor:
    """Graph rows of whole images as the trainer makes them: float32 [B, N, D]."""
    with attention_mode(model):
        graphs = [
            signal_graph(model.signal(part, **config.signal), config.graph, model.num_prefix_tokens, **config.graph_options)
            for part in images.split(_AT_ONCE)
        ]
    return torch.cat(graphs)


def coordinates(images: int, grid_size: tuple[int, int]) -> Tensor:
    """Place of each patch: [B, N, 2]."""
    rows, columns = torch.meshgrid(torch.arange(grid_size[0]), torch.arange(grid_size[1]), indexing="ij")
    return torch.stack([rows.flatten(), columns.flatten()], dim=1).float().expand(images, -1, -1)


def raw_pixels(images: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Pixels of each patch: [B, 3, S, S] -> [B, N, D]."""
    size = images.shape[2] // grid_size[0], images.shape[3] // grid_size[1]
    return nn.functional.unfold(images, kernel_size=size, stride=size).transpose(1, 2)


# --- Checkpoints --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """An encoder and how it came about.

    Attributes:
        images: how many the run had seen.
        config: flags of the run.
        sizes: of :func:`sizes_of`.
    """

    model: Any
    method: str
    mask: str
    seed: int
    epoch: int
    images: int
    config: dict[str, Any]
    sizes: dict[str, int]

    @property
    def depth(self) -> int:
        """Blocks of the encoder."""
        return self.sizes["depth"]


def load_trained(path: Path) -> Trained:
    """The model of a pre-training checkpoint of ours; blocks are counted in the file, so that shallow models load too.

    Raises:
        BadInput: no such checkpoint, or not of one of the three methods.
    """
    state = read_checkpoint(path)
    config: dict[str, Any] = state.get("config", {})
    method = next((name for name, models in _TRAINERS.items() if config.get("model") in models), None)
    if method is None or "mask_config" not in state:
        raise BadInput(f"checkpoint {path}: is not of a pre-training run of this project")
    sizes = sizes_of(state["model"])
    model = build_untrained(method, config, sizes, seed=0)
    model.load_state_dict(state["model"])
    epoch = int(state["epoch"]) + 1  # epochs that are done; `epoch` there is the last of them, counted from 0
    images = epoch * int(state["samples"])
    return Trained(model, method, state["mask_config"]["mask"], int(config["seed"]), epoch, images, config, sizes)


def build_untrained(method: str, config: dict[str, Any], sizes: dict[str, int], seed: int) -> Any:
    """The same model before training; `sizes` are those of :func:`sizes_of`."""
    words = [int(word) for word in str(config["input_size"]).split("x")]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _TRAINERS[method][config["model"]](input_size=(words[0], words[-1]), **sizes)


def sizes_of(weights: dict[str, Tensor]) -> dict[str, int]:
    """What a model's name does not say: how many blocks the encoder has, and BEiT's vocabulary, which is the tokenizer's."""
    numbers = [re.match(r"(?:encoder\.)?blocks\.(\d+)\.", key) for key in weights]
    sizes = {"depth": 1 + max(int(number[1]) for number in numbers if number)}
    return {**sizes, "vocabulary": len(weights["lm_head.weight"])} if "lm_head.weight" in weights else sizes


# --- Measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Scores of one signal of one checkpoint at one K."""

    method: str
    mask: str
    seed: int
    epoch: int
    images: int
    signal: str
    num_parts: int
    scores: dict[str, float]

    @property
    def group(self) -> tuple[Any, ...]:
        """What rows that differ in their seed alone have in common."""
        return self.method, self.mask, self.epoch, self.images, self.signal, self.num_parts


def measure(path: Path, scenes: Scenes, wanted: Sequence[str], parts: Sequence[int]) -> Iterator[Row]:
    """Scores of a checkpoint: every wanted signal and control at every K.

    Args:
        wanted: how names of signals begin ("tokens", "tokens 5"); empty: all.
    """
    trained = load_trained(path)
    grid_size = trained.model.grid_size
    images = _normalised(scenes, trained.config)
    truth = [patch_objects(objects, grid_size) for objects in scenes.objects]
    untrained = build_untrained(trained.method, trained.config, trained.sizes, seed=1 + trained.seed)
    for name, graph, options in _graphs(trained, untrained, images, wanted):
        for num_parts in parts:
            cut = _cut(graph, num_parts, len(images), grid_size, options)
            scores = mean_scores([score_parts(labels, objects, grid_size) for labels, objects in zip(cut, truth, strict=True)])
            yield Row(trained.method, trained.mask, trained.seed, trained.epoch, trained.images, name, num_parts, asdict(scores))


def _graphs(
    trained: Trained, untrained: Any, images: Tensor, wanted: Sequence[str]
) -> Iterator[tuple[str, Tensor | None, PartsOptions]]:
    """Signals, then the controls, each with the options of its cut; None stands for random labels."""
    paper = PartsOptions()
    signals = signals_of(trained.depth)
    for name, config in signals.items():
        if not wanted or any(_begins(name, start) for start in wanted):
            yield name, graph_of(trained.model, images, config), config.parts_options
    for name in ("attention all", f"tokens {trained.depth - 1}"):
        yield UNTRAINED + name, graph_of(untrained, images, signals[name]), paper
    grid_size = trained.model.grid_size
    yield "coordinates", coordinates(len(images), grid_size), paper
    yield "pixels", raw_pixels(images, grid_size), paper
    yield "random labels", None, paper


def _begins(name: str, start: str) -> bool:
    """Whether `start` is the name or its first words: "tokens 1" is not "tokens 10"."""
    return name == start or name.startswith((f"{start} ", f"{start},"))


def _cut(
    graph: Tensor | None, num_parts: int, images: int, grid_size: tuple[int, int], options: PartsOptions | None = None
) -> np.ndarray:
    """Parts int64 [B, N], by default by the recipe's cut; every image's start is its own draw (seed 0)."""
    generator = torch.Generator().manual_seed(0)
    if graph is None:
        return torch.randint(num_parts, (images, grid_size[0] * grid_size[1]), generator=generator).numpy()
    return partition_parts(graph, num_parts, options, generator=generator, grid_size=grid_size).numpy()


def _normalised(scenes: Scenes, config: dict[str, Any]) -> Tensor:
    """Pictures as the network takes them: float32 [B, 3, S, S].

    Raises:
        BadInput: scenes of another size than the run's images.
    """
    side = scenes.pictures[0].shape[0]
    if str(config["input_size"]) not in (str(side), f"{side}x{side}") or side % patch_size_of(config["model"]):
        raise BadInput(f"--scenes: are {side} pixels wide, the run had --input_size {config['input_size']}")
    pictures = torch.from_numpy(np.stack(scenes.pictures)).permute(0, 3, 1, 2) / 255
    return (pictures - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


# --- Tables -------------------------------------------------------------------------------------------------------


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds of each method, mask, age, signal and K."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    summary = []
    for (method, mask, epoch, images, signal, num_parts), members in groups.items():
        values = {name: [row.scores[name] for row in members] for name in SCORES}
        means = {name: statistics.fmean(numbers) for name, numbers in values.items()}
        spreads = {name: statistics.stdev(numbers) if len(numbers) > 1 else 0.0 for name, numbers in values.items()}
        facts = {"method": method, "mask": mask, "epoch": epoch, "images": images, "signal": signal, "num_parts": num_parts}
        summary.append({**facts, "seeds": len(members), "mean": means, "spread": spreads})
    return summary


def best_blocks(summary: Sequence[dict[str, Any]], score: str = "information") -> list[dict[str, Any]]:
    """Of rows that differ in the block alone, the one with the best mean `score`, for every method, mask, age and K.

    The block is chosen on the very scenes that the score is of: the more blocks, the more luck is in it.
    """
    best: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in summary:
        family = re.sub(r" (all|\d+)(,|$)", r"\2", row["signal"], count=1)
        key = (row["method"], row["mask"], row["epoch"], row["num_parts"], family)
        if key not in best or row["mean"][score] > best[key]["mean"][score]:
            best[key] = row
    return list(best.values())


def markdown(summary: Sequence[dict[str, Any]]) -> str:
    """A table for each method, mask and age, signals down and scores across, for each K."""
    lines: list[str] = []
    runs = {(row["method"], row["mask"], row["epoch"], row["images"]): row["seeds"] for row in summary}
    for (method, mask, epoch, images), seeds in runs.items():
        lines.append(f"\n### {method}, mask {mask}, {images} images ({epoch} epochs), seeds: {seeds}\n")
        members = [row for row in summary if (row["method"], row["mask"], row["epoch"]) == (method, mask, epoch)]
        lines.append("| K | signal | " + " | ".join(SCORES) + " |\n|" + "---|" * (len(SCORES) + 2))
        for num_parts in sorted({row["num_parts"] for row in members}, reverse=True):
            for row in members:
                if row["num_parts"] == num_parts:
                    cells = [f"{row['mean'][name]:.3f} ± {row['spread'][name]:.3f}" for name in SCORES]
                    lines.append(f"| {num_parts} | {row['signal']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- Picture ------------------------------------------------------------------------------------------------------


def picture(path: Path, scenes: Scenes, num_parts: int, count: int = 6) -> np.ndarray:
    """The same scenes cut by each signal side by side: uint8 [height, width, 3]."""
    trained = load_trained(path)
    some = Scenes(scenes.pictures[:count], scenes.objects[:count])
    images, grid_size, last = _normalised(some, trained.config), trained.model.grid_size, trained.depth - 1
    names = ["attention all", f"attention {last}", f"tokens {last}", f"queries {last}", f"keys {last}", f"values {last}"]
    chosen = signals_of(last + 1)
    graphs = {name: graph_of(trained.model, images, chosen[name]) for name in names}
    graphs |= {"pixels": raw_pixels(images, grid_size), "coordinates": coordinates(count, grid_size)}
    cuts = {name: _cut(graph, num_parts, count, grid_size) for name, graph in graphs.items()}
    heading = f"{trained.method}, mask {trained.mask}, {trained.images} images, K = {num_parts}"
    sheet = Sheet([Group(("scene", "objects", *cuts))], heading)
    for index, colours in enumerate(some.pictures):
        shown, objects = colours / 255, patch_objects(some.objects[index], grid_size).reshape(grid_size)
        parts = [draw_parts(shown, labels) for labels in (objects, *(cut[index].reshape(grid_size) for cut in cuts.values()))]
        sheet.rows.append([_enlarged(cell) for cell in (shown, *parts)])
    return sheet.draw()


def _enlarged(cell: np.ndarray, factor: int = 2) -> np.ndarray:
    pixels = (cell * 255).round().clip(0, 255).astype(np.uint8)
    return pixels.repeat(factor, axis=0).repeat(factor, axis=1)


# --- Command line -------------------------------------------------------------------------------------------------


def find_checkpoints(paths: Sequence[Path]) -> list[Path]:
    """Checkpoints among files, and the last one of every run below folders.

    Raises:
        BadInput: a path without any.
    """
    chosen: list[Path] = []
    for path in paths:
        files = sorted(path.glob("**/checkpoint-last.pth")) if path.is_dir() else [path]
        if not files:
            raise BadInput(f"{path}: has no checkpoint-last.pth in it")
        chosen += [file for file in files if "tokenizer" not in file.parent.name]
    return chosen


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Prints the tables as Markdown and returns their rows."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="CHECKPOINT", help="checkpoints, or folders with runs in them")
    parser.add_argument("--scenes", type=Path, required=True, help="folder that `python -m scenes` wrote")
    parser.add_argument("--count", type=int, default=200, help="validation scenes [%(default)s]")
    parser.add_argument("--parts", default=",".join(map(str, PARTS)), help="K, comma-separated [%(default)s]")
    parser.add_argument("--signals", default="", help="only signals that begin like these, comma-separated")
    parser.add_argument("--best", action="store_true", help="tables with the best block of each signal, by mutual information")
    parser.add_argument("--json", type=Path, help="also write all rows to this file")
    parser.add_argument("--markdown", type=Path, help="also write the tables to this file")
    parser.add_argument(
        "--picture", type=Path, help="also write a PNG: the same scenes cut by each signal of the first checkpoint"
    )
    args = parser.parse_args(argv)
    parts, wanted = _numbers(args.parts), [word.strip() for word in args.signals.split(",") if word.strip()]
    checkpoints, scenes = find_checkpoints(args.paths), read_scenes(args.scenes, args.count)
    rows: list[Row] = []
    for place, path in enumerate(checkpoints, 1):
        print(f"{place}/{len(checkpoints)} {path}", file=sys.stderr, flush=True)
        rows += measure(path, scenes, wanted, parts)
    summary = summarise(rows)
    text = markdown(best_blocks(summary) if args.best else summary)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    if args.json:
        write_json(args.json, {"scenes": args.count, "rows": [asdict(row) for row in rows], "summary": summary})
    if args.picture:
        Image.fromarray(picture(checkpoints[0], scenes, parts[-1])).save(args.picture)
    return summary


def _numbers(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise BadInput(f"--parts must be numbers above 0 such as 40,20,10, got {text!r}")
    return [int(word) for word in words]


if __name__ == "__main__":
    run_cli(PROGRAM, main)
