"""Detects and segments objects of COCO with a pre-trained encoder: `python -m downstream.detect --help`.

The parts are in detection/: flags, data and scores, model, evaluation, pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from common.training.checkpoint import find_resume
from common.training.data import Batch
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream.detection.coco import CocoSource, Jitter, ObjectBatch, collate_objects, count_training_images
from downstream.detection.config import DetectConfig
from downstream.detection.evaluation import DetectionEvaluation
from downstream.detection.mask_rcnn import MaskRCNN
from downstream.training import SupervisedTask, layerwise_adamw, make_encoder, parse_task, say_once, train_task
from downstream.vit import MODELS

PROGRAM = "detect"
DESCRIPTION = (
    "Train and evaluate Mask R-CNN with a plain ViT backbone (ViTDet) on data in COCO's layout. "
    "Defaults are ViTDet's recipe for ViT-B, 15 epochs; its effective batch is 64."
)


def build(config: DetectConfig, run: Run) -> SupervisedTask:
    """Mask R-CNN on COCO as the training loop takes it."""
    processes = run.processes
    if config.eval_only and find_resume(config) is None:
        raise BadInput("--eval_only: no trained detector; --resume PATH names its checkpoint")
    root = Path(config.data_path)
    if not root.is_dir():
        raise BadInput(f"--data_path {root}: no such folder")
    train, val = CocoSource(root, "train"), CocoSource(root, "val")
    if (train.category_ids, train.names) != (val.category_ids, val.names):
        raise BadInput(f"{val.file}: has other categories than {train.file.name}")
    say = say_once(processes)
    say(f"{len(train)} training images ({train.left_out} without objects left out), {len(val)} for validation")
    model = make_model(config, len(train.names), say)
    return SupervisedTask(
        run=run,
        config=config,
        kind="detection",
        model=model,
        source=train,
        transform=Jitter(config.image_size, config.jitter, config.flip, config.interpolation),
        objective=losses,
        evaluation=DetectionEvaluation(config, val, processes),
        metric="AP_box",
        optimizer=partial(layerwise_adamw, model, config),
        collate=collate_objects,
        facts={"classes": len(train.names), "validation_images": len(val)},
    )


def check_data(config: DetectConfig) -> int:
    """What a launcher checks before it asks for a GPU: training images. Raises BadInput: not COCO's layout, or no object."""
    root = Path(config.data_path)
    for split in ("train", "val"):
        for place in (root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"):
            if not place.exists():
                raise BadInput(f"--data_path {root}: no {place}")
    return count_images(config)


def count_images(config: DetectConfig) -> int:
    """Training images with objects. Raises BadInput: not COCO's layout."""
    return count_training_images(Path(config.data_path))


def make_model(config: DetectConfig, classes: int, say: Callable[[str], None]) -> MaskRCNN:
    """The model that the flags name, its encoder loaded."""
    depth: int = MODELS[config.model].keywords["depth"]
    last_of_quarters = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    encoder = make_encoder(config, say, class_token=False, window=config.window, global_blocks=last_of_quarters)
    try:
        return MaskRCNN(encoder, 1 + classes, config.pyramid_width, config.anchor_scale, config.box_samples)
    except ValueError as error:
        raise BadInput(f"--model {config.model}: {error}") from None


def losses(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """The five losses, which are summed."""
    assert isinstance(batch, ObjectBatch)
    named: dict[str, Tensor] = model(batch.images, batch.targets)
    return named


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config, taken = parse_task(DetectConfig, PROGRAM, DESCRIPTION, argv, count=count_images)
    train_task(config, partial(build, config), taken)


if __name__ == "__main__":
    run_cli(PROGRAM, main)
