"""The runs behind a table of the paper, and which of them wait for which.

Every place of a table names an encoder and a stage (paper/tables.py); an encoder needs its pre-training, BEiT at tiny scale
its tokenizer too.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.training.checkpoint import LAST
from common.training.errors import BadInput
from common.training.runlog import RESULT
from paper import cost
from paper.experiments import MASKS, PretrainedEncoder, Stage
from paper.tables import TABLES, folder_of

Scale = Literal["full", "tiny"]
PROJECT = Path(__file__).resolve().parents[1]
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class PlannedRun:
    """A run of one module.

    Attributes:
        name: unique, and its folder under the root.
        module: that is run; `script` of this folder runs it on a cluster.
        folder: where it writes.
        recipe: TOML file of flags.
        flags: flags besides, which win.
        data_path: what the module's --data_path gets.
        effective_batch: images an update.
        batch_per_gpu: images that a GPU is taken to hold at once, where the site says nothing else.
        needs: names of runs that must have finished.
        cost: None where it is not estimated.
    """

    name: str
    module: str
    script: str
    folder: Path
    recipe: Path
    flags: tuple[str, ...]
    data_path: str
    effective_batch: int
    batch_per_gpu: int
    needs: tuple[str, ...] = ()
    cost: cost.TrainingCost | None = None

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    def command(self) -> list[str]:
        """The module's command line but for output_dir, data_path and the split of the batch."""
        return [self.module, "--config", str(self.recipe), *self.flags]


@dataclass(frozen=True)
class Setting:
    """Where the runs of a graph write and what they read.

    Attributes:
        root: folder of all results.
        data: "imagenet", "ade20k" and "coco" -> folder.
        tokenizer: of BEiT at full scale.
    """

    root: Path
    scale: Scale = "full"
    seeds: tuple[int, ...] = (0,)
    data: dict[str, str] = field(default_factory=dict)
    tokenizer: str = ""


def graph(tables: Iterable[str], setting: Setting, only: str = "") -> list[PlannedRun]:
    """The runs of these tables, each once, every run behind those that it needs.

    Args:
        only: leave out encoders in whose name this does not occur.

    Raises:
        BadInput: `only` leaves nothing.
    """
    places: dict[tuple[PretrainedEncoder, Stage], None] = {}
    for table in tables:
        for _, cell in TABLES[table].cells():
            if cell.encoder is not None and only in cell.encoder.name:
                places[cell.encoder, cell.stage] = None
    if not places:
        raise BadInput(f"--only {only}: no encoder of table {', '.join(tables)} has this in its name")
    runs: dict[str, PlannedRun] = {}
    for seed in setting.seeds:
        for encoder, stage in places:
            for run in (*_before(encoder, setting, seed), _downstream(encoder, stage, setting, seed)):
                runs.setdefault(run.name, run)
    return list(runs.values())


def data_of(run: PlannedRun, setting: Setting) -> str:
    """Which of the data sets a run reads, by the name of its flag."""
    return next(name for name, folder in setting.data.items() if folder == run.data_path)


# --- pre-training ---

MODULES = {
    "mae": ("mae_evolved", "main_pretrain", "mae_vit"),
    "beit": ("beit_evolved", "run_beit_pretraining", "beit"),
    "simmim": ("simmim_evolved", "main_simmim", "simmim_vit"),
}
EFFECTIVE = {"mae": 4096, "beit": 2048, "simmim": 2048}
TINY_BATCH, TINY_PIXELS = 32, "64"
TINY_RATES = {"mae": ("--blr", "1e-2"), "beit": ("--blr", "6.4e-2"), "simmim": ("--blr", "1e-2")}
"""High, for a handful of updates: those of each trainer's demo."""
TINY = ("--input_size", TINY_PIXELS, "--warmup_epochs", "0", "--num_workers", "0")


def _before(encoder: PretrainedEncoder, setting: Setting, seed: int) -> list[PlannedRun]:
    """Tokenizer and pre-training of an encoder."""
    if encoder.method == "none":
        return []
    tokenizer = [_tiny_tokenizer(setting, seed)] if encoder.method == "beit" and setting.scale == "tiny" else []
    return [*tokenizer, _pretraining(encoder, setting, seed, tokenizer)]


def _pretraining(encoder: PretrainedEncoder, setting: Setting, seed: int, tokenizer: Sequence[PlannedRun]) -> PlannedRun:
    package, module, prefix = MODULES[encoder.method]
    folder = folder_of(setting.root, encoder, seed, "pretrain")
    flags = ["--seed", str(seed), *MASKS[encoder.mask]]
    if encoder.mask == "evolved":
        flags += ["--mask", "evolved"]  # some recipes are of the official mask
    if encoder.method == "beit":
        flags += ["--tokenizer", str(tokenizer[0].folder) if tokenizer else setting.tokenizer]
    recipe = PROJECT / package / "recipes" / _recipe(encoder)
    if setting.scale == "tiny":
        model = f"{prefix}_tiny_patch8" + ("_8k_vocab" if encoder.method == "beit" else "")
        epochs = max(encoder.epochs // 100, 1)
        flags += ["--model", model, *TINY, *TINY_RATES[encoder.method], "--epochs", str(epochs), "--picture_epochs", "2"]
        batch, batch_per_gpu = TINY_BATCH, TINY_BATCH
    else:
        flags += ["--epochs", str(encoder.epochs)]
        batch, batch_per_gpu = EFFECTIVE[encoder.method], 512 if encoder.method == "mae" else 128
    macs = cost.pretraining_macs(encoder.method, encoder.size, evolved="--mask" not in MASKS[encoder.mask])
    return PlannedRun(
        name=_name(encoder, seed, "pretrain"),
        module=f"{package}.{module}",
        script=f"pretrain_{encoder.method}",
        folder=folder,
        recipe=recipe,
        flags=tuple(flags),
        data_path=setting.data["imagenet"],
        effective_batch=batch,
        batch_per_gpu=batch_per_gpu,
        needs=tuple(run.name for run in tokenizer),
        cost=cost.TrainingCost(macs, cost.IMAGENET * encoder.epochs),
    )


def _recipe(encoder: PretrainedEncoder) -> str:
    if encoder.size == "small":
        return f"table4_{encoder.method}_small_200.toml"
    return "table5_mae_base_300.toml" if encoder.method == "mae" else f"official_{encoder.method}_base_800.toml"


def _tiny_tokenizer(setting: Setting, seed: int) -> PlannedRun:
    flags = ("--dataset", "folder", "--input_size", TINY_PIXELS, "--repeat", "1", "--epochs", "1", "--seed", str(seed))
    return PlannedRun(
        name=f"{TOKENIZER}/seed{seed}",
        module="beit_evolved.train_tokenizer",
        script="train_tokenizer",
        folder=setting.root / TOKENIZER / f"seed{seed}",
        recipe=PROJECT / "beit_evolved/recipes/demo_tokenizer.toml",
        flags=flags,
        data_path=setting.data["imagenet"],
        effective_batch=16,
        batch_per_gpu=16,
    )


# --- downstream ---

RECIPES: dict[Stage, dict[str, str]] = {
    "finetune": {"small": "table4_finetune_small.toml", "base": "table5_finetune_base.toml"},
    "linear_probe": {"small": "table5_linear_probe_base.toml", "base": "table5_linear_probe_base.toml"},
    "segment": {"small": "ade20k_upernet_80k.toml", "base": "ade20k_upernet_80k.toml"},
    "detect": {"small": "coco_mask_rcnn_15ep.toml", "base": "coco_mask_rcnn_15ep.toml"},
}
BATCHES: dict[Stage, tuple[int, int]] = {
    "finetune": (1024, 128), "linear_probe": (16384, 2048), "segment": (16, 4), "detect": (64, 4)
}  # fmt: skip
"""Effective batch of the recipe, and what a GPU is taken to hold."""
DATA: dict[Stage, str] = {"finetune": "imagenet", "linear_probe": "imagenet", "segment": "ade20k", "detect": "coco"}
TINY_FLAGS: dict[Stage, tuple[str, ...]] = {
    "finetune": ("--epochs", "2", "--blr", "8e-3"),
    "linear_probe": ("--epochs", "2", "--knn", "5", "--cache", "--blr", "10"),
    "segment": (
        "--lr",
        "1e-3",
        "--iterations",
        "8",
        "--warmup_iterations",
        "1",
        "--decoder_channels",
        "32",
        "--auxiliary_channels",
        "32",
    ),
    "detect": ("--epochs", "1", "--window", "4", "--pyramid_width", "32"),
}
TINY_BATCHES: dict[Stage, int] = {"finetune": 32, "linear_probe": 64, "segment": 8, "detect": 8}
PROBE_EPOCHS, TUNE_EPOCHS, DETECT_EPOCHS, SEGMENT_UPDATES = 90, 100, 15, 80_000


def _downstream(encoder: PretrainedEncoder, stage: Stage, setting: Setting, seed: int) -> PlannedRun:
    before = _before(encoder, setting, seed)
    pretrained = before[-1].folder / LAST if before else None
    flags = ["--seed", str(seed), "--init_from", str(pretrained)] if pretrained else ["--seed", str(seed)]
    if setting.scale == "tiny":
        flags += ["--model", "vit_tiny_patch8", "--input_size", TINY_PIXELS, "--num_workers", "0", *TINY_FLAGS[stage]]
        flags += [] if stage == "segment" else ["--warmup_epochs", "0"]
        batch = batch_per_gpu = TINY_BATCHES[stage]
    else:
        flags += ["--model", f"vit_{encoder.size}_patch16"]
        batch, batch_per_gpu = BATCHES[stage]
    return PlannedRun(
        name=_name(encoder, seed, stage),
        module=f"downstream.{stage}",
        script=stage,
        folder=folder_of(setting.root, encoder, seed, stage),
        recipe=PROJECT / "downstream/recipes" / RECIPES[stage][encoder.size],
        flags=tuple(flags),
        data_path=setting.data[DATA[stage]],
        effective_batch=batch,
        batch_per_gpu=batch_per_gpu,
        needs=tuple(run.name for run in before[-1:]),
        cost=_downstream_cost(encoder.size, stage),
    )


def _downstream_cost(size: str, stage: Stage) -> cost.TrainingCost:
    return {
        "finetune": cost.TrainingCost(cost.finetuning_macs(size), cost.IMAGENET * TUNE_EPOCHS),
        "linear_probe": cost.TrainingCost(cost.linear_probe_macs(size), cost.IMAGENET * PROBE_EPOCHS),
        "segment": cost.TrainingCost(cost.segmentation_macs(size), cost.ADE20K_BATCH * SEGMENT_UPDATES),
        "detect": cost.TrainingCost(cost.detection_macs(size), cost.COCO * DETECT_EPOCHS),
    }[stage]


def _name(encoder: PretrainedEncoder, seed: int, stage: str) -> str:
    return f"{encoder.name}/seed{seed}/{stage}"


def check_recipes(runs: Iterable[PlannedRun]) -> None:
    """Raises BadInput for a recipe that is not there or cannot be read."""
    for recipe in {run.recipe for run in runs}:
        try:
            tomllib.loads(recipe.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise BadInput(f"recipe {recipe}: {error}") from None
