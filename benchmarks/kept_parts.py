"""How far parts that are kept agree with fresh ones, and what keeping them does to short runs.

    python -m benchmarks.kept_parts SCENES                     MAE: agreement by age and R; runs with R = 1, 4, 8 beside none kept
    python -m benchmarks.kept_parts SCENES --method simmim     also the parts of the training step (--attention_pass training)
    python -m benchmarks.kept_parts SCENES --method beit --tokenizer TOKENIZER       the same; its held-out loss is not measured

SCENES is a folder of `python -m scenes`. A small model is trained with evolved masks, a checkpoint an epoch; parts of its own
training images are then cut with the weights of each epoch. Agreement is the adjusted Rand index and the normalised mutual
information, the mean over images, of two part maps:

    whole    the whole image with the weights of a epochs ago, and with those of now (another start of the EM)
    crop     the map of the whole image of a epochs ago, carried to a random crop, and the crop cut with the weights of now

each divided by that of two cuts of the same image with the same weights that differ in the start of the EM alone. Age a = 0 in
"crop" is what the way over the whole image costs by itself. With R, ages 0 .. R-1 are equally frequent. Ages are in epochs of
this run; a longer run changes less in an epoch.

I images   N patches   K parts   e epochs trained   a age of a part map in epochs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn

import beit_evolved.model
import mae_evolved.model
import simmim_evolved.model
from beit_evolved import run_beit_pretraining
from benchmarks.parts_quality import sizes_of
from benchmarks.skipped_passes import write_json
from common.attention import AttentionTap, attention_mode
from common.evolved_mask import EvolvedMask
from common.mask_config import MaskConfig
from common.training.augment import normalise
from common.training.checkpoint import read_checkpoint
from common.training.command_line import parse_arguments
from common.training.config import TrainConfig
from common.training.errors import BadInput, run_cli
from common.training.geometry import LocatedSamples, WholeImage, as_inputs, collate_located, crop_transform
from common.training.kept_parts import WholeImageParts, carry_parts, keep_parts, step_layers
from common.training.mask import make_mask
from common.training.sources import open_source
from mae_evolved import main_pretrain
from simmim_evolved import main_simmim

PROGRAM = "benchmarks.kept_parts"
DEPTH = 4
SIZE = 64
EVERY = (0, 1, 4, 8)
GOOD = 0.8
"""Share of the agreement of two fresh draws above which parts are said to agree."""

_FLAGS = (
    f"--input_size {SIZE} --batch_size 32 --warmup_epochs 2 --lr 1e-3 --crop_scale 0.2 1.0 --parts_start 13 --parts_end 3 "
    "--num_workers 0 --picture_epochs 0 --device cpu --resume none --save_freq 1"
)


@dataclass(frozen=True)
class Method:
    """A trainer with its small model.

    Attributes:
        blocks: model -> blocks of the encoder, where its training step sees every patch; None: it does not.
        pixels: whether the model gives a loss for images and mask.
    """

    model: str
    models: dict[str, Any]
    config: type[TrainConfig]
    main: Callable[[Sequence[str]], None]
    blocks: Callable[[Any], nn.ModuleList] | None = None
    pixels: bool = True


METHODS: dict[str, Method] = {
    "mae": Method("mae_vit_tiny_patch8", mae_evolved.model.MODELS, main_pretrain.MAEConfig, main_pretrain.main),
    "beit": Method(
        "beit_tiny_patch8_8k_vocab",
        beit_evolved.model.MODELS,
        run_beit_pretraining.BEiTConfig,
        run_beit_pretraining.main,
        blocks=lambda model: model.blocks,
        pixels=False,
    ),
    "simmim": Method(
        "simmim_vit_tiny_patch8",
        simmim_evolved.model.MODELS,
        main_simmim.SimMIMConfig,
        main_simmim.main,
        blocks=lambda model: model.encoder.blocks,
    ),
}


# --- Agreement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Adjusted Rand index and normalised mutual information, means over images."""

    rand: float
    information: float

    def over(self, reference: Agreement) -> Agreement:
        """As shares of another."""
        return Agreement(self.rand / reference.rand, self.information / reference.information)


def agree(first: Tensor, second: Tensor) -> Agreement:
    """Agreement of part maps int64 [I, N]."""
    pairs = list(zip(first.numpy(), second.numpy(), strict=True))
    return Agreement(
        float(np.mean([adjusted_rand_score(one, other) for one, other in pairs])),
        float(np.mean([normalized_mutual_info_score(one, other) for one, other in pairs])),
    )


def mean(agreements: Sequence[Agreement]) -> Agreement:
    """The mean of both."""
    return Agreement(*(float(np.mean([getattr(one, name) for one in agreements])) for name in ("rand", "information")))


class Maps:
    """Part maps of the same images by the weights of each epoch of a run.

    Args:
        output: folder of a run with a checkpoint an epoch.
        count: how many training images.
    """

    def __init__(self, method: Method, flags: str, output: Path, count: int) -> None:
        self.config, self.mask_config = parse_arguments(method.config, PROGRAM, "", f"{flags} --parts_every 1".split())
        self.method, self.output = method, output
        self.mask = make_mask(self.config, self.mask_config)
        source = open_source(self.config)
        kept = keep_parts(self.config, self.mask, source)
        assert isinstance(kept, WholeImageParts)
        self.kept = kept
        chosen = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
        samples = LocatedSamples(source, crop_transform(self.config), self.config.seed, 1, WholeImage(self.config))
        self.views = [as_inputs(collate_located([samples[visit, index, True] for index in chosen])) for visit in (0, 1)]
        self._done: dict[tuple[Any, ...], Tensor] = {}

    def model(self, epochs: int) -> Any:
        """With the weights after that many epochs."""
        return load(self.method, self.config, self.output / f"checkpoint-{epochs - 1}.pth")

    def at(self, epochs: int, start: int) -> EvolvedMask:
        """The run's mask at an epoch, with a start of the EM of its own."""
        mask = EvolvedMask(
            (self.mask.height, self.mask.width), self.mask.num_masked, self.mask.total_epochs, self.mask_config, seed=start
        )
        mask.set_epoch(epochs)
        return mask

    def cut(self, epochs: int, what: str, start: int, visit: int = 0) -> Tensor:
        """Parts of the whole images or of the crops by the weights of an epoch: int64 [I, N]."""
        key = (epochs, what, start, visit)
        if key not in self._done:
            batch, mask = self.views[visit], self.at(epochs, start)
            assert batch.whole is not None
            images = batch.whole if what == "whole" else batch.images
            parts = self.kept.num_parts_in(epochs) if what == "whole" else mask.num_parts
            model = self.model(epochs)
            with torch.no_grad():
                self._done[key] = mask.cut(
                    images, lambda rows: model.signal(rows, **self.mask_config.signal), batch.sample_ids, parts
                )
        return self._done[key]

    def carried(self, epochs: int, visit: int = 0) -> Tensor:
        """Parts of the crops from the maps of the whole images."""
        whole = self.cut(epochs, "whole", 0, visit)
        return carry_parts(whole, self.views[visit].geometry, self.kept.grid_size)


def load(method: Method, config: TrainConfig, path: Path) -> Any:
    """The small model with the weights of a checkpoint."""
    weights = read_checkpoint(path)["model"]
    model: Any = method.models[method.model](input_size=config.image_size, **sizes_of(weights))
    model.load_state_dict(weights)
    return model.eval()


def by_age(maps: Maps, now: Sequence[int], ages: Sequence[int]) -> list[dict[str, Any]]:
    """A row an age: agreement, and as a share of that of two fresh draws, means over the epochs `now`."""
    rows = []
    for age in ages:
        found: dict[str, list[Agreement]] = {name: [] for name in ("whole", "whole_share", "crop", "crop_share")}
        for epochs in now:
            whole = agree(maps.cut(epochs - age, "whole", 0), maps.cut(epochs, "whole", 1))
            crop = agree(maps.carried(epochs - age), maps.cut(epochs, "crop", 1))
            found["whole"].append(whole)
            found["crop"].append(crop)
            for name, value in (("whole", whole), ("crop", crop)):
                reference = agree(maps.cut(epochs, name, 0), maps.cut(epochs, name, 1))
                found[f"{name}_share"].append(value.over(reference))
        rows.append({"age": age, **{name: vars(mean(values)) for name, values in found.items()}})
    return rows


def by_every(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each R: shares averaged over the ages 0 .. R-1, which must all be among `rows`."""
    table = []
    for every in range(1, len(rows) + 1):
        shares = {name: float(np.mean([row[f"{name}_share"]["rand"] for row in rows[:every]])) for name in ("whole", "crop")}
        table.append({"every": every, **shares})
    return table


def largest(table: Sequence[dict[str, Any]], name: str) -> int:
    """The largest R whose parts agree; 0: none does."""
    return max((row["every"] for row in table if row[name] > GOOD), default=0)


def parts_in_crops(maps: Maps, now: Sequence[int]) -> list[dict[str, float]]:
    """How many parts a crop holds of its image's, beside the scheduled number and the fresh cut's."""
    rows = []
    for epochs in now:
        filled = [
            float(np.mean([len(row.unique()) for row in parts])) for parts in (maps.carried(epochs), maps.cut(epochs, "crop", 0))
        ]
        scheduled, whole = maps.at(epochs, 0).num_parts, maps.kept.num_parts_in(epochs)
        rows.append({"epochs": epochs, "scheduled": scheduled, "whole": whole, "carried": filled[0], "fresh": filled[1]})
    return rows


# --- Parts of the training step -----------------------------------------------------------------------------------


def step_parts(maps: Maps, epochs: int, visit: int) -> Tensor:
    """Parts of the crops from the attention of a training step, under the masks of that epoch: int64 [I, N]."""
    batch, mask, model = maps.views[visit], maps.at(epochs, 0), maps.model(epochs)
    masks = mask(batch.images, lambda rows: model.signal(rows, **maps.mask_config.signal), batch.sample_ids).mask
    assert maps.method.blocks is not None
    torch.manual_seed(0)  # of drop path
    with attention_mode(model, "train"), AttentionTap(maps.method.blocks(model), step_layers(maps.mask_config, DEPTH)) as tap:
        model(batch.images, masks)
    return mask.cut(batch.images, lambda _: tap.maps, batch.sample_ids)


def step_agreement(maps: Maps, now: Sequence[int]) -> dict[str, Any]:
    """Parts of the step against fresh ones without masks: of the same view and weights, and of the next visit's crop."""
    same, after, seen = [], [], []
    for epochs in now:
        reference = agree(maps.cut(epochs, "crop", 0), maps.cut(epochs, "crop", 1))
        same.append(agree(step_parts(maps, epochs, 0), maps.cut(epochs, "crop", 1)).over(reference))
        before, view = maps.views[0].geometry, maps.views[1].geometry
        carried = carry_parts(step_parts(maps, epochs - 1, 0), view, maps.kept.grid_size, before, outside=255)
        reference = agree(maps.cut(epochs, "crop", 0, 1), maps.cut(epochs, "crop", 1, 1))
        after.append(agree(carried, maps.cut(epochs, "crop", 1, 1)).over(reference))
        seen.append(float((carried != 255).float().mean()))
    return {"same_view": vars(mean(same)), "next_visit": vars(mean(after)), "patches_seen_before": float(np.mean(seen))}


# --- Runs ---------------------------------------------------------------------------------------------------------


def train(method: Method, flags: str, output: Path) -> list[dict[str, Any]]:
    """Lines of the log of one run."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        method.main(f"{flags} --output_dir {output}".split())
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def evaluate(method: Method, flags: str, output: Path, scenes: Path, seed: int) -> dict[str, float | None]:
    """Of the last weights: loss on held-out scenes under random masks that are the same for all runs, and a linear probe.

    The loss is None for a model that does not give it.
    """
    config, _ = parse_arguments(method.config, PROGRAM, "", flags.split())
    model = load(method, config, output / "checkpoint-last.pth")
    sets = {split: read_set(config, scenes / "imagenet" / split) for split in ("train", "val")}
    loss = held_out_loss(model, sets["val"][0], config.grid_size, seed) if method.pixels else None
    features = {split: encode(model, images) for split, (images, _) in sets.items()}
    probe = LogisticRegression(max_iter=2000).fit(features["train"], sets["train"][1])
    return {"held_out_loss": loss, "probe": float(probe.score(features["val"], sets["val"][1]))}


@torch.no_grad()
def held_out_loss(model: Any, images: Tensor, grid_size: tuple[int, int], seed: int) -> float:
    """Loss on images [I, 3, P, Q] under random masks of three quarters."""
    patches = grid_size[0] * grid_size[1]
    random = EvolvedMask(grid_size, round(0.75 * patches), 1, MaskConfig(mask="random"), seed=seed)
    return float(model(images, random(images, sample_ids=torch.arange(len(images))).mask)[0])


def read_set(config: TrainConfig, folder: Path) -> tuple[Tensor, list[str]]:
    """Whole images [I, 3, P, Q] of a folder of classes, and their classes."""
    source = open_source(replace(config, data_path=str(folder)))
    whole = WholeImage(config)
    names = [Path(source.name(index)).parent.name for index in range(len(source))]
    return normalise(torch.stack([whole(source.load(index)) for index in range(len(source))])), names


@torch.no_grad()
def encode(model: Any, images: Tensor) -> np.ndarray:
    """Mean of the last block's patch tokens, standardised: float [I, D]."""
    tokens = torch.cat([next(iter(model.signal(some, "tokens", "last")))[:, 1:].mean(dim=1) for some in images.split(64)])
    return ((tokens - tokens.mean(dim=0)) / tokens.std(dim=0)).numpy()


def compare_runs(method: Method, flags: str, work: Path, scenes: Path, seed: int, step: bool) -> list[dict[str, Any]]:
    """A row for each run: none kept, R = 1, 4, 8, and the parts of the step."""
    kinds = {("fresh" if every == 0 else f"R = {every}"): f"--parts_every {every}" for every in EVERY}
    if step:
        kinds["step"] = "--attention_pass training"
    rows = []
    for name, more in kinds.items():
        output = work / name.replace(" ", "")
        log = train(method, f"{flags} {more}", output)
        passes = float(np.mean([1 - line["skipped_attention"] for line in log]))
        seconds = {phase: sum(line["seconds"][phase] for line in log) for phase in ("mask", "model")}
        rows.append(
            {
                "run": name,
                "loss": log[-1]["train_loss"],
                "passes": passes,
                "mask_share": seconds["mask"] / (seconds["mask"] + seconds["model"]),
                **evaluate(method, flags, output, scenes, seed),
            }
        )
    return rows


# --- Command line -------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The tables."""
    lines = ["| age | whole: ARI, NMI | share of two fresh draws | crop: ARI, NMI | share |", "|---|---|---|---|---|"]
    for row in result["ages"]:
        cells = [
            f"{row[name]['rand']:.3f}, {row[name]['information']:.3f}" for name in ("whole", "whole_share", "crop", "crop_share")
        ]
        lines.append(f"| {row['age']} | {' | '.join(cells)} |")
    lines += ["", "| R | ARI share, whole | crop |", "|---|---|---|"]
    lines += [f"| {row['every']} | {row['whole']:.3f} | {row['crop']:.3f} |" for row in result["every"]]
    lines += ["", f"Largest R above {GOOD}: whole {result['largest']['whole']}, crop {result['largest']['crop']} (0: none)."]
    lines += ["", "| epochs | K scheduled | K of the whole image | parts in a crop, carried | fresh |", "|---|---|---|---|---|"]
    for row in result["parts"]:
        lines.append(f"| {row['epochs']} | {row['scheduled']} | {row['whole']} | {row['carried']:.1f} | {row['fresh']:.1f} |")
    if result["step"]:
        lines += ["", f"Parts of the step, shares: {json.dumps(result['step'])}"]
    lines += ["", "| run | passes an image and epoch | mask's share of mask and model | last loss | held out | probe |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in result["runs"]:
        lines.append(
            f"| {row['run']} | {row['passes']:.2f} | {row['mask_share']:.2f} | {row['loss']:.4f} | "
            f"{'' if row['held_out_loss'] is None else format(row['held_out_loss'], '.4f')} | {row['probe']:.3f} |"
        )
    return "\n".join(lines)


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everything about one method."""
    name, epochs, count, seed, scenes = args.method, args.epochs, args.count, args.seed, args.scenes
    method = METHODS[name]
    flags = f"{_FLAGS} --model {method.model} --epochs {epochs} --seed {seed} --data_path {scenes}/imagenet"
    flags += f" --tokenizer {args.tokenizer}" if args.tokenizer else ""
    with shallow(method):
        runs = compare_runs(method, flags, work, scenes, seed, step=method.blocks is not None)
        maps = Maps(method, flags, work / "fresh", count)
        oldest = min(8, epochs // 2)
        now = sorted({epochs - 1, (3 * epochs) // 4, max(epochs // 2, oldest + 1)})
        ages = by_age(maps, now, range(oldest))
        step = step_agreement(maps, now) if method.blocks is not None else None
        table = by_every(ages)
        return {
            "method": name, "epochs": epochs, "images": count, "seed": seed, "now": now, "ages": ages, "every": table,
            "largest": {kind: largest(table, kind) for kind in ("whole", "crop")},
            "parts": parts_in_crops(maps, now), "step": step, "runs": runs,
        }  # fmt: skip


@contextlib.contextmanager
def shallow(method: Method) -> Iterator[None]:
    """The small model cut to a few blocks."""
    before = method.models[method.model]
    method.models[method.model] = partial(before, depth=DEPTH)
    try:
        yield
    finally:
        method.models[method.model] = before


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the tables as Markdown and returns the numbers."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, metavar="SCENES", help="folder that `python -m scenes` wrote")
    parser.add_argument("--method", choices=sorted(METHODS), default="mae", help="[%(default)s]")
    parser.add_argument("--tokenizer", type=Path, help="of BEiT, for images of 64 pixels in patches of 8")
    parser.add_argument("--epochs", type=int, default=16, help="length of the runs [%(default)s]")
    parser.add_argument("--count", type=int, default=48, help="training images whose parts are compared [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    parser.add_argument("--json", type=Path, help="also write all numbers to this file")
    args = parser.parse_args(argv)
    if not (args.scenes / "imagenet" / "train").is_dir():
        raise BadInput(f"{args.scenes}: no scenes there; make them by `python -m scenes {args.scenes}`")
    if args.epochs < 4:
        raise BadInput(f"--epochs must be 4 or more, got {args.epochs}")
    if (args.method == "beit") != (args.tokenizer is not None):
        raise BadInput("--tokenizer must be given with --method beit, and with no other")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, Path(folder))
    print(markdown(result))
    if args.json:
        write_json(args.json, result)
    return result


if __name__ == "__main__":
    run_cli(PROGRAM, main)
