"""Semantic segmentation from a pre-trained encoder: `python -m downstream.segment --help`.

    python -m downstream.segment --data_path ADE20K --init_from CKPT --output_dir OUT
    python -m downstream.segment --data_path ADE20K --resume OUT/checkpoint-last.pth --eval_only --inference whole

Defaults are the paper's setting, UperNet on ADE20K for 80k updates (Sec. 4.1), with the numbers of mmsegmentation's
configuration of MAE (configs/mae, AdamW at 1e-4, layer decay 0.65) where the paper is silent; BEiT's own, for its
self-supervised ViT-B, differs from it in the rate, 7e-4. Polynomial decay counts from the start of the run, as in BEiT's.

The parts are in segmentation/: flags, data, model, loss, inference, evaluation, pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import nn

from common.training.checkpoint import find_resume
from common.training.distributed import Processes
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream.pictures import can_draw
from downstream.segmentation.config import SegmentConfig
from downstream.segmentation.data import SegmentationSource, TrainingTransform, class_names
from downstream.segmentation.evaluation import SegmentationEvaluation
from downstream.segmentation.loss import make_loss
from downstream.segmentation.upernet import UperNet
from downstream.training import SupervisedTask, layerwise_adamw, make_encoder, parse_task, say_once, train_task

PROGRAM = "downstream.segment"
DESCRIPTION = (
    "Train and evaluate semantic segmentation: UperNet on a pre-trained encoder. "
    "Defaults are ADE20K at 512 pixels for 80k updates of 16 images."
)


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
    say(training.summary)
    say(validation.summary)
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
        evaluation=SegmentationEvaluation(config, validation, names, processes),
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


def check_data(config: SegmentConfig) -> int:
    """What a launcher checks before it asks for a GPU: training images. Raises BadInput: not in ADE20K's layout."""
    return len(open_sets(config)[1])


count_images = check_data


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
    config, taken = parse_task(SegmentConfig, PROGRAM, DESCRIPTION, argv, count=count_images)
    train_task(config, partial(build, config), taken)


if __name__ == "__main__":
    run_cli(PROGRAM, main)
