"""Flags of segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.training.config import FormerFlag, Length, LrSchedule, RunConfig, option, with_default
from common.training.preset import SEGMENTATION, SmallData
from downstream.segmentation.data import MOST_CLASSES
from downstream.segmentation.upernet import NormKind
from downstream.training import TaskConfig, TunedEncoderConfig, is_small

FORMER_FLAGS = {
    name: FormerFlag(neutral, f"has no effect on segmentation: --{flag} says it")
    for name, neutral, flag in (
        ("dataset", "auto", "data_path"),
        ("download", False, "data_path"),
        ("crop_scale", (0.2, 1.0), "scale"),
        ("interpolation", "bicubic", "scale"),
        ("epochs", 100, "iterations"),
        ("warmup_epochs", 5.0, "warmup_iterations"),
        ("blr", 1.5e-4, "lr"),
        ("blr_batch", 256, "lr"),
    )
}


@dataclass(frozen=True)
class SegmentConfig(TunedEncoderConfig, TaskConfig):
    """Flags of segmentation.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    small: ClassVar[SmallData] = SEGMENTATION
    former_flags: ClassVar[dict[str, FormerFlag]] = FORMER_FLAGS
    evaluation_flags: ClassVar[tuple[str, ...]] = ("inference", "slide_stride", "test_scales", "test_flip")

    data_path: str = option(
        "", "folder in ADE20K's layout: images and annotations, training and validation in each", group="data"
    )
    input_size: str = with_default(RunConfig, "input_size", "512")
    classes: int = option(0, "number of classes; 0: as in classes.txt of --data_path, else ADE20K's 150", group="data")
    scale: tuple[float, float] = option((0.5, 2.0), "random scale before the crop; 1: shorter sides are equal", group="data")
    cat_max_ratio: float = option(
        0.75, "up to 10 crops are tried until no class has this share of the labelled pixels; 1: the first is taken", group="data"
    )
    photometric: bool = option(True, "random brightness, contrast, saturation and hue", group="data")

    batch_size: int = with_default(RunConfig, "batch_size", 16)
    iterations: int = option(80_000, "length of the run in updates", group="optimisation")
    warmup_iterations: int = option(1500, "updates of linear warm-up", group="optimisation")
    warmup_start: float = with_default(RunConfig, "warmup_start", 1e-6)
    lr: float | None = with_default(RunConfig, "lr", 1e-4)
    lr_schedule: LrSchedule = with_default(RunConfig, "lr_schedule", "poly")

    decoder_channels: int = option(0, "width of the decoder; 0: the encoder's", group="model")
    auxiliary_channels: int = option(256, "width of the auxiliary head", group="model")
    auxiliary_weight: float = option(0.4, "weight of the auxiliary head's loss", group="model")
    head_norm: NormKind = option(
        "batch",
        "norm of neck and heads; batch: over all GPUs (over each process on CPUs); group: of each image by itself",
        group="model",
    )
    head_dropout: float = option(0.1, "share of channels dropped before the classifiers", group="model")

    eval_freq: int = with_default(TaskConfig, "eval_freq", 8)
    inference: Literal["slide", "whole"] = option(
        "slide", "evaluate by windows of the input size, or on the image squeezed into it", group="run"
    )
    slide_stride: int = option(0, "pixels between windows; 0: two thirds of the input size (341 of 512)", group="run")
    test_scales: str = option("1", "slide: average over these scales, such as 1,1.25,1.5,1.75", group="run")
    test_flip: bool = option(False, "average with the prediction for the flipped image", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("data_path", bool(self.data_path), "must name a folder in ADE20K's layout")
        self._at_least(1, "iterations", "auxiliary_channels")
        self._at_least(0, "classes", "warmup_iterations", "auxiliary_weight", "decoder_channels", "slide_stride")
        self._require("classes", self.classes <= MOST_CLASSES, f"must be at most {MOST_CLASSES}")
        rule = f"is above --iterations {self.iterations} (give less, or --preset small, which works it out)"
        self._require("warmup_iterations", self.warmup_iterations <= self.iterations, rule)
        self._require("scale", 0 < self.scale[0] <= self.scale[1], "must be 0 < low <= high")
        self._require("cat_max_ratio", 0 < self.cat_max_ratio <= 1, "must be in (0, 1]")
        self._require("head_dropout", 0 <= self.head_dropout < 1, "must be in [0, 1)")
        self._require("slide_stride", self.slide_stride <= min(self.image_size), "must not be above --input_size")
        self._require("test_scales", bool(self.scales), "must be numbers above 0 such as 1,1.25,1.5")
        fits = self.inference == "slide" or self.scales == (1.0,)
        self._require("test_scales", fits, "needs --inference slide, for the encoder has one input size")

    @classmethod
    def input_size_from(cls, pretraining: tuple[int, int], patch: int) -> tuple[int, int] | None:
        """The default, 512, is for encoders of ImageNet's 224 pixels and more; those of smaller images keep their own size."""
        return pretraining if is_small(pretraining) else None

    @property
    def length(self) -> Length:
        return Length(self.iterations, self.warmup_iterations, "updates")

    @property
    def scales(self) -> tuple[float, ...]:
        """`test_scales` as numbers; empty if they cannot be read."""
        try:
            numbers = tuple(float(word) for word in self.test_scales.split(","))
        except ValueError:
            return ()
        return numbers if all(0 < number < float("inf") for number in numbers) else ()

    @property
    def strides(self) -> tuple[int, int]:
        """Pixels between windows, down and across."""
        down, across = self.image_size
        return (self.slide_stride,) * 2 if self.slide_stride else (max(1, down * 2 // 3), max(1, across * 2 // 3))
