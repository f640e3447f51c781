"""What a whole training step costs: ours, with and without evolved masks, beside the unpatched official model's.

    python -m benchmarks.train_step --official PATH_OF_MAE PATH_OF_UNILM PATH_OF_SIMMIM
    python -m benchmarks.train_step --models small --only mae --repeats 3
    python -m benchmarks.train_step --device cuda --amp bf16 --batch_size 64 --json step.json --write docs/cost.md

A step is forward, backward, norm of the gradient, clipping where the method's recipe clips, and AdamW; both models take the same
images, labels and number of masked patches, in turns in one process, so that ratios do not depend on what else the machine
was doing. Ours is the step of the trainers; the official one has the optimiser of the official scripts. Neither is compiled
(--compile: ours). Images are noise and weights are fresh: the cost hardly depends on either.

An evolved step is our step and a call of the mask, without the spared passes, at the middle of each of --stages equal stages of
the schedule (K falls from 40 to 10); what the schedule spares of it is counted by benchmarks/skipped_passes.py, stage by stage.
With --parts_every R the mask from kept parts is measured too: parts carried from a kept map in every step, and for one image in
R a pass over the whole image and its cut. That the loader has to resize that image once more is not in it.

B images   H, W patch grid   N = H*W patches   M masked patches of the batch
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from beit_evolved.model import MODELS as BEIT_MODELS
from beit_evolved.run_beit_pretraining import BEiTConfig, TwoViews
from benchmarks import cost_page
from benchmarks.official_models import build_official, find_clones
from benchmarks.skipped_passes import skipped_by_epoch, write_json
from benchmarks.timing import CLOCKS, added_memory, machine, memory_method, seconds_of
from common.attention import attention_mode
from common.evolved_mask import EvolvedMask, MaskConfig, count_masked, select_masked
from common.models.block import compile_blocks
from common.training.augment import RandomCrop
from common.training.config import TrainConfig
from common.training.decode import decode_bytes
from common.training.errors import BadInput, run_cli
from common.training.kept_parts import carry_parts, whole_parts
from common.training.optim import make_optimizer
from mae_evolved.main_pretrain import MAEConfig
from mae_evolved.model import MODELS as MAE_MODELS
from simmim_evolved.main_simmim import SimMIMConfig
from simmim_evolved.model import MODELS as SIMMIM_MODELS

PROGRAM = "benchmarks.train_step"
METHODS = ("mae", "beit", "simmim")
SIZES = ("small", "base", "tiny")
NAMES = {
    "mae": {"tiny": "mae_vit_tiny_patch8", "small": "mae_vit_small_patch16", "base": "mae_vit_base_patch16"},
    "beit": {
        "tiny": "beit_tiny_patch8_8k_vocab",
        "small": "beit_small_patch16_224_8k_vocab",
        "base": "beit_base_patch16_224_8k_vocab",
    },
    "simmim": {"tiny": "simmim_vit_tiny_patch8", "small": "simmim_vit_small_patch16", "base": "simmim_vit_base_patch16"},
}
PIXELS = {"tiny": 32, "small": 224, "base": 224}
BATCH = {"tiny": 2, "small": 16, "base": 8}
VOCABULARY = 8192
JPEG_SIZE = (500, 375)  # the usual size of an image of ImageNet
SPARED_IMAGES = 1000  # of every epoch, to count spared passes


# --- The work ---------------------------------------------------------------------------------------------------


def config_of(method: str, size: str) -> TrainConfig:
    """The trainer's defaults, which are the recipe of the method."""
    common = {"model": NAMES[method][size], "input_size": str(PIXELS[size])}
    if method == "beit":
        return BEiTConfig(tokenizer="labels are drawn here", **common)
    return {"mae": MAEConfig, "simmim": SimMIMConfig}[method](**common)


def our_model(method: str, config: TrainConfig) -> Any:
    """The model of the trainer."""
    options: dict[str, Any] = {"input_size": config.image_size}
    return {"mae": MAE_MODELS, "beit": BEIT_MODELS, "simmim": SIMMIM_MODELS}[method][config.model](**options)


@dataclass
class Step:
    """A training step of a model: forward, backward, norm and clipping of the gradient, update."""

    model: nn.Module
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    clip: float | None
    autocast: Callable[[], torch.autocast]

    def __call__(self) -> float:
        """Runs the step; its loss."""
        with self.autocast():
            loss = self.loss()
        loss.backward()
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class Workload:
    """A method and size: both models, and the batch that they share.

    Args:
        method, size: of NAMES.
        clone: folder of the official code, or None.
        args: of the command line.
    """

    def __init__(self, method: str, size: str, clone: Path | None, args: argparse.Namespace) -> None:
        torch.manual_seed(args.seed)
        self.method, self.size, self.args, self.device = method, size, args, torch.device(args.device)
        self.config = config_of(method, size)
        self.batch = args.batch_size or BATCH[size]
        self.model = our_model(method, self.config).to(self.device).train()
        height, width = self.config.grid_size
        self.images = torch.randn(self.batch, 3, *self.config.image_size).to(self.device)
        few = {"num_parts": min(8, height * width // 2)} if size == "tiny" else {}
        masked = count_masked(height * width, self.config.mask_ratio)
        self.maskers = [
            EvolvedMask(
                (height, width), masked, args.epochs, MaskConfig(gamma=args.gamma, shortcut=shortcut, **few), seed=args.seed
            )
            for shortcut in (False, True)
        ]
        generator = torch.Generator().manual_seed(args.seed)
        self.mask = select_masked(torch.rand(self.batch, height * width, generator=generator), masked, generator).to(self.device)
        self.labels = torch.randint(VOCABULARY, (self.batch * masked,), generator=generator).to(self.device)
        self.step = Step(
            self.model, self._our_loss, make_optimizer(self.model, self.config, 1e-4), self.config.clip_grad, self.autocast
        )
        if args.compile:
            compile_blocks(self.model)
        self.official = None if clone is None else self._official_step(clone)

    def autocast(self) -> torch.autocast:
        """bf16 where --amp asks for it."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.args.amp == "bf16")

    def _our_loss(self) -> Tensor:
        if self.method == "beit":
            return functional.cross_entropy(self.model(self.images, self.mask).float(), self.labels)
        loss: Tensor = self.model(self.images, self.mask, self.mask)[0]
        return loss

    def _official_step(self, clone: Path) -> Step:
        model, loss = build_official(self.method, self.size, clone)
        model = model.to(self.device).train()
        spared = [value for value in model.parameters() if value.requires_grad and value.ndim <= 1]
        decayed = [value for value in model.parameters() if value.requires_grad and value.ndim > 1]
        groups = [{"params": spared, "weight_decay": 0.0}, {"params": decayed, "weight_decay": self.config.weight_decay}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4)
        return Step(model, lambda: loss(self.images, self.mask, self.labels), optimizer, self.config.clip_grad, self.autocast)

    def make_masks(self, epoch: int, shortcut: bool) -> Tensor:
        """A call of the mask at an epoch: without the shortcut, every image takes the attention pass and the cut."""
        masker = self.maskers[shortcut]
        masker.set_epoch(epoch)
        with attention_mode(self.model), self.autocast():
            sample_ids = torch.arange(self.batch, device=self.device)
            return masker(self.images, self.model.attention_maps, sample_ids).mask

    def carry_masks(self, epoch: int) -> Tensor:
        """A call of the mask with parts from kept rows: no pass."""
        masker = self.maskers[False]
        masker.set_epoch(epoch)
        num_parts = whole_parts(masker.num_parts, self.config.crop_scale)
        rows = (torch.arange(masker.num_patches, device=self.device) % num_parts).expand(self.batch, -1)
        geometry = torch.tensor([0.2, 0.3, 0.6, 0.5, 1.0], device=self.device).expand(self.batch, -1)
        parts = carry_parts(rows, geometry, (masker.height, masker.width))
        ids = torch.arange(self.batch, device=self.device)
        return masker(self.images, sample_ids=ids, parts=parts, num_parts=num_parts).mask

    def cut_whole(self, epoch: int) -> Tensor:
        """Pass over whole images and their cut, as kept rows are made."""
        masker = self.maskers[False]
        masker.set_epoch(epoch)
        with attention_mode(self.model), self.autocast():
            ids = torch.arange(self.batch, device=self.device)
            num_parts = min(whole_parts(masker.num_parts, self.config.crop_scale), masker.num_patches)
            return masker.cut(self.images, self.model.attention_maps, ids, num_parts)

    def evolved_step(self) -> None:
        """Masks with the attention pass for every image, then the step."""
        self.make_masks(self.args.epochs // 2, shortcut=False)
        self.step()

    def make_data(self) -> None:
        """What one loader process does for a batch: a JPEG of ImageNet's usual size is decoded and augmented B times."""
        transform: Any = RandomCrop(self.config)
        if isinstance(self.config, BEiTConfig):
            transform = TwoViews(self.config, tuple(size // 2 for size in self.config.image_size))  # type: ignore[arg-type]
        for _ in range(self.batch):
            transform(decode_bytes(np.frombuffer(bytearray(_jpeg()), np.uint8)))


def _jpeg(made: list[bytes] = []) -> bytes:  # noqa: B006 - made once
    """A smooth random photograph-like JPEG."""
    if not made:
        small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize(JPEG_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made[0]


# --- Measuring --------------------------------------------------------------------------------------------------

OURS, OFFICIAL, DRAWS, DATA = "our step", "official step", "draws and selection", "data"


def stage_epochs(epochs: int, stages: int) -> list[tuple[int, int, int]]:
    """(first, past the last, middle) epoch of each of the equal stages of a run; short runs have fewer."""
    edges = [epochs * edge // stages for edge in range(stages + 1)]
    return [(first, past, (first + past) // 2) for first, past in itertools.pairwise(edges) if past > first]


def measure(work: Workload) -> dict[str, Any]:
    """Everything that is measured of a method and size."""
    stages = stage_epochs(work.args.epochs, work.args.stages)
    runs: dict[str, Callable[[], Any]] = {OURS: work.step}
    if work.official is not None:
        runs[OFFICIAL] = work.official
    masks = {f"mask at epoch {middle}": middle for _, _, middle in stages}
    runs |= {name: (lambda middle=middle: work.make_masks(middle, False)) for name, middle in masks.items()}  # type: ignore[misc]
    if work.args.parts_every:
        runs |= {f"carried at epoch {middle}": (lambda middle=middle: work.carry_masks(middle)) for middle in masks.values()}  # type: ignore[misc]
        runs |= {f"whole at epoch {middle}": (lambda middle=middle: work.cut_whole(middle)) for middle in masks.values()}  # type: ignore[misc]
    runs |= {DRAWS: lambda: work.make_masks(0, True), DATA: work.make_data}
    for run in runs.values():
        run()  # warm
    memory = {OURS: added_memory(work.step, work.device), "evolved step": added_memory(work.evolved_step, work.device)}
    if work.official is not None:
        memory[OFFICIAL] = added_memory(work.official, work.device)
    times = take_turns(runs, work.device, work.args)
    by_epoch = skipped_by_epoch(work.maskers[1], SPARED_IMAGES)
    spared = [sum(by_epoch[first:past]) / (past - first) for first, past, _ in stages]
    return {
        "method": work.method, "size": work.size, "model": work.config.model, "batch": work.batch,
        "masked": work.maskers[0].num_masked, "seconds": times, "memory": memory, "stages": [list(stage) for stage in stages],
        "spared": spared, "spared_overall": sum(by_epoch) / len(by_epoch), "compiled": work.args.compile,
        "parts_every": work.args.parts_every,
    }  # fmt: skip


def take_turns(runs: dict[str, Callable[[], Any]], device: torch.device, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every run in every turn. The order is turned round every other time; drop path draws alike in a turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.repeats):
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            torch.manual_seed(args.seed + turn)
            times[name].append(seconds_of(runs[name], device, args.clock))
    return times


@dataclass(frozen=True)
class Ratio:
    """A ratio of times of the same turn: the median over the turns, and the least and largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, above: Sequence[float], below: Sequence[float]) -> Ratio:
        """From the times of each turn."""
        found = [first / second for first, second in zip(above, below, strict=True)]
        return cls(statistics.median(found), min(found), max(found))


@dataclass
class Summary:
    """The ratios of a measurement.

    Attributes:
        plain: our plain step / the official plain step.
        evolved: our evolved step, averaged over the schedule / the official plain step.
        added: time of the mask, averaged over the schedule / our plain step.
        share: the same / our evolved step: the share of pre-training time, as the paper counts.
        pass_added: time of a mask without the spared passes, at the middle of the run / our plain step.
        kept: mask's share of the time with --parts_every R.
        data: seconds that one loader process needs for a batch / our evolved step.
        memory: by how much the peak of an evolved step exceeds that of a plain one / the latter; None: not known.
    """

    added: Ratio
    share: Ratio
    pass_added: Ratio
    data: Ratio
    plain: Ratio | None = None
    evolved: Ratio | None = None
    kept: Ratio | None = None
    memory: float | None = None
    official_memory: float | None = field(default=None)


def summarise(numbers: dict[str, Any]) -> Summary:
    """The ratios of what :func:`measure` returned."""
    seconds, ours = numbers["seconds"], numbers["seconds"][OURS]
    mask = mask_seconds(numbers)
    whole = [step + extra for step, extra in zip(ours, mask, strict=True)]
    middle = numbers["stages"][len(numbers["stages"]) // 2][2]
    summary = Summary(
        Ratio.of(mask, ours),
        Ratio.of(mask, whole),
        Ratio.of(seconds[f"mask at epoch {middle}"], ours),
        Ratio.of(seconds[DATA], whole),
    )
    if every := numbers["parts_every"]:
        kept = mask_seconds(numbers, every)
        summary.kept = Ratio.of(kept, [step + extra for step, extra in zip(ours, kept, strict=True)])
    memory = numbers["memory"]
    if memory[OURS] and memory["evolved step"] is not None:
        summary.memory = max(memory["evolved step"] - memory[OURS], 0) / memory[OURS]
    if OFFICIAL in seconds:
        summary.plain, summary.evolved = Ratio.of(ours, seconds[OFFICIAL]), Ratio.of(whole, seconds[OFFICIAL])
        if memory[OURS] and memory[OFFICIAL]:
            summary.official_memory = memory[OURS] / memory[OFFICIAL]
    return summary


def mask_seconds(numbers: dict[str, Any], parts_every: int = 0) -> list[float]:
    """Seconds of a mask averaged over the schedule, in each turn: spared images take the draws and selection alone.

    Args:
        parts_every: R, of kept parts: a pass over the whole image for one image in R, and a map that is carried for each.
    """
    stages, seconds = numbers["stages"], numbers["seconds"]
    epochs = sum(past - first for first, past, _ in stages)
    totals = [0.0] * len(seconds[DRAWS])
    for (first, past, middle), spared in zip(stages, numbers["spared"], strict=True):
        made = seconds[f"mask at epoch {middle}"]
        if parts_every:
            parts = zip(seconds[f"whole at epoch {middle}"], seconds[f"carried at epoch {middle}"], strict=True)
            made = [whole / parts_every + carried for whole, carried in parts]
        for turn, (needed, draws) in enumerate(zip(made, seconds[DRAWS], strict=True)):
            totals[turn] += (past - first) / epochs * ((1 - spared) * needed + spared * draws)
    return totals


# --- Command line -----------------------------------------------------------------------------------------------


def words_of(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Reads a flag that takes some of these words, with commas between them."""

    def read(text: str) -> list[str]:
        words = text.split(",")
        if wrong := [word for word in words if word not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)} is none of {', '.join(allowed)}")
        return words

    return read


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--only", type=words_of(METHODS), default=list(METHODS), help="methods, such as mae,beit (default: all three)")
    add("--models", type=words_of(SIZES), default=["small", "base"], help="sizes: small,base (default: both), or tiny")
    add("--official", nargs="+", default=[], metavar="CLONE", help="clones of the official repositories, at the pinned commits")
    add("--batch_size", type=int, help="B (default: 16 for ViT-S, 8 for ViT-B)")
    add("--repeats", type=int, default=5, help="turns after a warm-up (default %(default)s)")
    add("--stages", type=int, default=3, help="stages of the schedule at whose middle a mask is made (default %(default)s)")
    add("--epochs", type=int, default=200, help="T, epochs of the run (default %(default)s)")
    add("--parts_every", type=int, default=0, metavar="R", help="also the mask from parts kept for R epochs (default: not)")
    add("--gamma", type=float, default=2.0, help="exponent of alpha = (t/T)^gamma (default %(default)s)")
    add("--seed", type=int, default=0, help="of weights, batch and masks (default %(default)s)")
    add("--device", default="cpu", help="cpu, cuda or cuda:1 (default %(default)s)")
    add("--threads", type=int, help="CPU threads (default: torch's own choice)")
    clock = "wall, or processor: the time that other processes took does not count; for a shared machine, with --threads 1"
    add("--clock", choices=tuple(CLOCKS), default="wall", help=f"{clock} (default %(default)s)")
    add("--amp", choices=("none", "bf16"), default="none", help="autocast of both models (default %(default)s)")
    add("--compile", action="store_true", help="torch.compile the blocks of our model")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")
    add("--write", type=Path, metavar="PAGE", help="put the tables into PAGE (docs/cost.md), in the place of those there")
    args = parser.parse_args(argv)
    for name in ("batch_size", "repeats", "stages", "epochs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} must be 1 or more, got {getattr(args, name)}")
    if args.parts_every < 0:
        raise BadInput(f"--parts_every must be 0 or more, got {args.parts_every}")
    if args.write is not None and not args.write.parent.is_dir():
        raise BadInput(f"--write {args.write}: no such folder")
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark, prints it and returns its numbers. What is written grows case by case: a run cut short leaves some."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    clones = find_clones(args.official)
    if "tiny" in args.models and clones:
        raise BadInput("--models tiny: the official repositories have no such model")
    record = start_record(args, sys.argv[1:] if argv is None else argv)
    for size in args.models:
        for method in args.only:
            numbers = measure(Workload(method, size, clones.get(method), args))
            record["cases"].append({**numbers, "summary": asdict(summarise(numbers))})
            record["machine"]["load_at_end"] = os.getloadavg()[0]
            print(cost_page.line(record["cases"][-1]), file=sys.stderr)
            write_json(args.json, record)
            if args.write is not None:
                cost_page.write(args.write, record)
    print(cost_page.render(record))
    return record


def start_record(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """What the numbers are of, without any."""
    device = torch.device(args.device)
    words = [Path(word).name if Path(word).is_absolute() else word for word in argv]  # where clones lie is nobody's business
    return {
        "command": " ".join(["python -m", PROGRAM, *words]),
        "machine": {**machine(device), "load_at_start": os.getloadavg()[0]},
        "schedule": {"epochs": args.epochs, "gamma": args.gamma, "stages": args.stages, "parts_every": args.parts_every},
        "precision": "bf16 autocast" if args.amp == "bf16" else "fp32",
        "memory_is": memory_method(device),
        "clock": args.clock,
        "cases": [],
    }


if __name__ == "__main__":
    run_cli(PROGRAM, lambda argv: main(argv) and None)
