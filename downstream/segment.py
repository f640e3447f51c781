"""Semantic segmentation from a pre-trained encoder: `python -m downstream.segment --help`.

    python -m downstream.segment --data_path ADE20K --init_from CKPT --output_dir OUT
    python -m downstream.segment --data_path ADE20K --resume OUT/checkpoint-last.pth --eval_only --inference whole

Defaults are the paper's setting, UperNet on ADE20K for 80k updates (Sec. 4.1), with the numbers of mmsegmentation's
configuration of MAE (configs/mae, AdamW at 1e-4, layer decay 0.65) where the paper is silent; BEiT's own, for its
self-supervised ViT-B, differs from it in the rate, 7e-4. Polynomial decay counts from the start of the run, as in BEiT's.

B batch   C classes   H, W height and width of an image   h, w those of the encoder's input (--input_size)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.training.checkpoint import find_resume
from common.training.config import FormerFlag, Length, LrSchedule, RunConfig, option, with_default
from common.training.data import Batch
from common.training.distributed import Processes
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream.confusion import IGNORED, confusion_matrix, scores_of
from downstream.pictures import can_draw, draw_confusion
from downstream.segmentation.data import (
    MOST_CLASSES,
    SegmentationSource,
    TrainingTransform,
    class_names,
    collate_whole,
    validation_transform,
)
from downstream.segmentation.inference import Predictor
from downstream.segmentation.pictures import Triptych, draw_sheet, triptych
from downstream.segmentation.upernet import NormKind, UperNet, resized
from downstream.training import (
    Scores,
    SupervisedTask,
    TaskConfig,
    TunedEncoderConfig,
    evaluation_batches,
    layerwise_adamw,
    make_encoder,
    parse_task,
    say_once,
    train_task,
)

PROGRAM = "downstream.segment"
DESCRIPTION = (
    "Train and evaluate semantic segmentation: UperNet on a pre-trained encoder. "
    "Defaults are ADE20K at 512 pixels for 80k updates of 16 images."
)

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
        self._require("warmup_iterations", self.warmup_iterations <= self.iterations, f"is above --iterations {self.iterations}")
        self._require("scale", 0 < self.scale[0] <= self.scale[1], "must be 0 < low <= high")
        self._require("cat_max_ratio", 0 < self.cat_max_ratio <= 1, "must be in (0, 1]")
        self._require("head_dropout", 0 <= self.head_dropout < 1, "must be in [0, 1)")
        self._require("slide_stride", self.slide_stride <= min(self.image_size), "must not be above --input_size")
        self._require("test_scales", bool(self.scales), "must be numbers above 0 such as 1,1.25,1.5")
        fits = self.inference == "slide" or self.scales == (1.0,)
        self._require("test_scales", fits, "needs --inference slide, for the encoder has one input size")

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


# --- training ---


def make_loss(config: SegmentConfig, processes: Processes) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy, that of the auxiliary head weighted, on logits upsampled to the input: the mean over labelled pixels.

    Labelled pixels are counted over all ranks, and what the ranks' average makes of it is the mean over all of them.
    Accumulation steps are averaged as they are. Without any labelled pixel the loss is 0.
    """

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch.views
        logits, auxiliary = model(images)
        labelled = processes.sum((labels != IGNORED).sum()).clamp(min=1)
        summed = pixel_loss(logits, labels) + config.auxiliary_weight * pixel_loss(auxiliary, labels)
        return summed * (processes.world / labelled)

    return loss


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy summed over labelled pixels, in fp32.

    Args:
        logits: [B, C, ...] of any size, upsampled to that of the labels.
        labels: 0..C-1 or 255 [B, h, w].
    """
    full = resized(logits.float(), labels.shape[-2:])
    return functional.cross_entropy(full, labels.long(), ignore_index=IGNORED, reduction="sum")


# --- evaluation ---


class Evaluation:
    """Scores of a model on the validation images, the same on every rank."""

    def __init__(self, config: SegmentConfig, source: SegmentationSource, names: list[str], processes: Processes) -> None:
        self.config, self.source, self.names, self.processes = config, source, names, processes
        slide = config.inference == "slide"
        self.predict = Predictor(config.image_size, config.strides, slide, config.scales, config.test_flip, config.batch_size)

    def __call__(self, model: nn.Module) -> Scores:
        """Raises BadInput if no pixel of the validation images is labelled."""
        classes, device = len(self.names), self.processes.device
        confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        rows: dict[int, Triptych] = {}
        for batch in evaluation_batches(self.source, validation_transform, self.config, self.processes, collate_whole):
            images, labels = batch.views[0::2], batch.views[1::2]
            predictions = self.predict(model, images)
            for index, image, truth, predicted in zip(batch.sample_ids.tolist(), images, labels, predictions, strict=True):
                confusion += confusion_matrix(predicted, truth, classes)
                if index < self.config.pictures:
                    rows[index] = triptych(image, truth, predicted, classes)
        return self._scores(self.processes.sum(confusion), rows)

    def _scores(self, confusion: Tensor, rows: dict[int, Triptych]) -> Scores:
        if not confusion.any():
            raise BadInput(f"--data_path {self.config.data_path}: no pixel of the validation annotations is labelled")
        found = scores_of(confusion)
        numbers = {"mIoU": 100 * found.miou, "mAcc": 100 * found.macc, "aAcc": 100 * found.aacc}
        pictures: dict[str, np.ndarray] = {}
        everyones = {index: row for part in self.processes.gather(rows) for index, row in part.items()}
        if everyones:
            pictures["validation"] = draw_sheet([everyones[index] for index in sorted(everyones)], self.names)
            pictures |= draw_confusion(confusion.cpu(), self.names)
        return Scores(numbers, pictures)


# --- the task ---


def build(config: SegmentConfig, run: Run) -> SupervisedTask:
    """The task as the training loop takes it.

    Raises:
        BadInput: data, checkpoint or flags that cannot be used.
    """
    processes = run.processes
    if config.eval_only and find_resume(config) is None:
        raise BadInput("--eval_only needs a trained model: --resume CHECKPOINT, or one in --output_dir")
    names, training, validation = open_sets(config)
    say = say_once(processes)
    if config.pictures and not can_draw():
        say("no picture of the confusion matrix: matplotlib is not installed (requirements-demo.txt)")
    model = make_model(config, len(names), processes, say)
    crop = TrainingTransform(config.image_size, config.scale, config.cat_max_ratio, config.flip, config.photometric)
    return SupervisedTask(
        run=run,
        config=config,
        kind="segmentation",
        model=model,
        source=training,
        transform=crop,
        objective=make_loss(config, processes),
        evaluation=Evaluation(config, validation, names, processes),
        metric="mIoU",
        optimizer=partial(layerwise_adamw, model, config),
        facts={"classes": names, "feature_blocks": list(model.blocks)},
    )


def open_sets(config: SegmentConfig) -> tuple[list[str], SegmentationSource, SegmentationSource]:
    """Names of the classes, training and validation set.

    Raises:
        BadInput: not in ADE20K's layout.
    """
    root = Path(config.data_path)
    if not root.is_dir():
        raise BadInput(f"--data_path {root}: no such folder")
    names = class_names(root, config.classes)
    return names, SegmentationSource(root, "training", len(names)), SegmentationSource(root, "validation", len(names))


def check_data(config: SegmentConfig) -> None:
    """What a launcher checks before it asks for a GPU. Raises BadInput: not in ADE20K's layout."""
    open_sets(config)


def make_model(config: SegmentConfig, classes: int, processes: Processes, say: Callable[[str], None]) -> UperNet:
    """UperNet with the encoder that the flags name; batch norm over all ranks where there are several GPUs."""
    synchronised = processes.world > 1 and processes.device.type == "cuda"
    if config.head_norm == "batch" and config.batch_size == 1 and not synchronised:
        raise BadInput("--batch_size 1 leaves batch norm nothing to average over: 2 or more, or --head_norm group")
    try:
        model = UperNet(
            make_encoder(config, say),
            classes,
            config.decoder_channels,
            config.auxiliary_channels,
            config.head_norm,
            config.head_dropout,
        )
    except ValueError as error:
        raise BadInput(f"--input_size {config.input_size}: {error}") from None
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronised else model  # type: ignore[no-untyped-call]


def main(argv: Sequence[str]) -> None:
    """Parses the flags, trains and evaluates."""
    config = parse_task(SegmentConfig, PROGRAM, DESCRIPTION, argv)
    train_task(config, lambda run: build(config, run))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
