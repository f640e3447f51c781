"""Flags of the linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.training.config import EpochsConfig, FormerFlag, ImageSetConfig, RunConfig, option, with_default
from common.training.preset import PROBING, SmallData
from downstream.training import TaskConfig
from downstream.vit import MODELS


@dataclass(frozen=True)
class ProbeConfig(EpochsConfig, ImageSetConfig, TaskConfig):
    """Flags of the linear probe."""

    small: ClassVar[SmallData] = PROBING
    former_flags: ClassVar[dict[str, FormerFlag]] = {
        "drop_path": FormerFlag(0.0, "has no effect on linear probing: the encoder is frozen"),
        "layer_decay": FormerFlag(1.0, "has no effect on linear probing: the encoder is frozen"),
        "checkpointing": FormerFlag(False, "has no effect on linear probing: the encoder has no backward pass"),
        "beta1": FormerFlag(0.9, "has no effect on linear probing: LARS has no betas"),
        "beta2": FormerFlag(0.999, "has no effect on linear probing: LARS has no betas"),
    }

    layer: str = option(
        "-1",
        "blocks whose output is probed: numbers from 0, negative ones from the end, such as 5,8,-1; or all. Trap: the last "
        "block is not always the best one (BEiT's and SimMIM's is below the middle of the network), and a layer chosen by its "
        "validation accuracy is a selection to report as such",
        group="model",
    )
    pool: Literal["cls", "mean"] = option(
        "cls",
        "class token, or the mean of the patch tokens. Trap: numbers differ by points; MAE's published linear probes are of "
        "the class token, BEiT's of the mean",
        group="model",
    )
    norm: bool = option(
        True,
        "apply the last norm of pre-training to the last block's tokens before pooling. Trap: official fine-tuning with "
        "--pool mean drops this norm for a new one, linear probing keeps it; a fine-tuned checkpoint may not hold it",
        group="model",
    )
    cache: bool = option(
        False,
        "compute the features of each image once, from its middle, instead of from a new random crop in every epoch. Much "
        "faster, a little lower; say so beside the number",
        group="data",
    )
    knn: str = option(
        "20",
        "numbers of neighbours such as 10,20,100 (from the images' middles); empty: no k-NN. Like --cache, keeps 4 bytes x "
        "images x layers x width in memory on every rank: 4 GB for one layer of ViT-B on ImageNet",
        group="run",
    )
    subset: int = option(0, "train on so many images, drawn evenly over the classes by --seed; 0: all", group="data")
    crop_pct: float = option(0.875, "validation: side of the middle crop as a share of the shorter side", group="data")
    batch_size: int = with_default(RunConfig, "batch_size", 512)
    crop_scale: tuple[float, float] = with_default(ImageSetConfig, "crop_scale", (0.08, 1.0))
    blr: float = option(
        0.1,
        "base learning rate of LARS, for an effective batch of --blr_batch. Trap: it is for LARS and batch 16384; with a small "
        "batch or few epochs try more",
        group="optimisation",
    )
    epochs: int = with_default(EpochsConfig, "epochs", 90)
    warmup_epochs: float = with_default(EpochsConfig, "warmup_epochs", 10)
    weight_decay: float = option(0.0, "of LARS, not on biases", group="optimisation")
    pictures: int = option(4, "0: no curves of the training", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "subset")
        self._require("layer", bool(self.layers), f"must be all, or blocks of 0 to {self.depth - 1} such as 5,8,-1")
        alone = len(self.layers) == 1 or self.clip_grad is None
        self._require("clip_grad", alone, "must be left out for several layers: it would tie their heads together")
        self._require("knn", self.knn == "" or bool(self.neighbours), "must be counts such as 10,20, or empty")
        self._require("crop_pct", 0 < self.crop_pct <= 1, "must be in (0, 1]")

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return MODELS[self.model].keywords["depth"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks to probe, from 0, ascending; empty if they cannot be read."""
        if self.layer == "all":
            return tuple(range(self.depth))
        try:
            asked = [int(word) for word in self.layer.split(",")]
        except ValueError:
            return ()
        good = all(-self.depth <= block < self.depth for block in asked)
        return tuple(sorted({block % self.depth for block in asked})) if good else ()

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Values of k, ascending; empty if there are none."""
        words = [word.strip() for word in self.knn.split(",") if word.strip()]
        good = all(word.isdecimal() and int(word) > 0 for word in words)
        return tuple(sorted({int(word) for word in words})) if good else ()
