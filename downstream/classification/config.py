"""Flags of fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.training.config import EpochsConfig, ImageSetConfig, RunConfig, option, with_default
from common.training.preset import FINETUNING, SmallData
from downstream.classification.labelled import is_rand_augment
from downstream.training import TaskConfig, TunedEncoderConfig


@dataclass(frozen=True)
class FinetuneConfig(EpochsConfig, TunedEncoderConfig, ImageSetConfig, TaskConfig):
    """Flags of fine-tuning."""

    small: ClassVar[SmallData] = FINETUNING

    pool: Literal["mean", "cls"] = option(
        "mean",
        "what is classified: the mean of the patch tokens, then a new norm; or the class token after the last norm",
        group="model",
    )
    subset: int = option(0, "train on so many images, drawn evenly over the classes by --seed; 0: all", group="data")
    batch_size: int = with_default(RunConfig, "batch_size", 128)
    epochs: int = with_default(EpochsConfig, "epochs", 100)
    warmup_epochs: float = with_default(EpochsConfig, "warmup_epochs", 5)
    blr: float = with_default(EpochsConfig, "blr", 5e-4)
    min_lr: float = with_default(RunConfig, "min_lr", 1e-6)
    crop_scale: tuple[float, float] = with_default(ImageSetConfig, "crop_scale", (0.08, 1.0))
    auto_augment: str = option("rand-m9-mstd0.5-inc1", "timm's RandAugment; empty: none", group="data")
    color_jitter: float = option(0.0, "brightness, contrast and saturation, where --auto_augment is empty", group="data")
    random_erasing: float = option(0.25, "share of images with a rectangle of noise", group="data")
    crop_pct: float = option(0.875, "validation: side of the middle crop as a share of the shorter side", group="data")
    mixup: float = option(0.8, "alpha of the beta distribution; 0: none", group="optimisation")
    cutmix: float = option(1.0, "alpha of the beta distribution; 0: none. With both, each batch draws one", group="optimisation")
    mix_prob: float = option(1.0, "share of batches that are mixed", group="optimisation")
    smoothing: float = option(0.1, "label smoothing", group="optimisation")
    model_ema: float = option(
        0.0, "decay of a moving average of the weights that is then evaluated, such as 0.9999; 0: none", group="run"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "subset", "mixup", "cutmix", "color_jitter")
        for name in ("random_erasing", "smoothing", "mix_prob"):
            self._require(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        known = not self.auto_augment or is_rand_augment(self.auto_augment)
        self._require("auto_augment", known, "must be a RandAugment of timm such as rand-m9-mstd0.5-inc1, or empty")
        self._require("crop_pct", 0 < self.crop_pct <= 1, "must be in (0, 1]")
        self._require("model_ema", 0 <= self.model_ema < 1, "must be in [0, 1)")
