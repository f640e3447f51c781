"""Detects and segments objects of COCO with a pre-trained encoder: `python -m downstream.detect --help`.

mask_rcnn.py is the model, coco.py the data and the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from common.models.names import patch_size_of
from common.training.checkpoint import find_resume
from common.training.config import EpochsConfig, FormerFlag, Interpolation, LrSchedule, RunConfig, option, with_default
from common.training.data import Batch
from common.training.distributed import Processes
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from common.visualize.captions import Group, Sheet, write_label
from common.visualize.colours import distinct_colours, text_colour
from downstream.detection.coco import (
    MASK_THRESHOLD,
    CocoScores,
    CocoSource,
    Detections,
    Fit,
    Jitter,
    ObjectBatch,
    collate_objects,
    decoded,
    fitted,
)
from downstream.detection.mask_rcnn import COARSEST, MaskRCNN, paste
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
from downstream.vit import MODELS

PROGRAM = "detect"
DESCRIPTION = (
    "Train and evaluate Mask R-CNN with a plain ViT backbone (ViTDet) on data in COCO's layout. "
    "Defaults are ViTDet's recipe for ViT-B, 15 epochs; its effective batch is 64."
)
DRAWN_SCORE = 0.5
_PICTURE_SIDE = 384
_COLOURS = tuple(tuple(round(255 * value) for value in colour) for colour in distinct_colours(10).tolist())


@dataclass(frozen=True)
class DetectConfig(EpochsConfig, TunedEncoderConfig, TaskConfig):
    """Flags of detection.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    former_flags: ClassVar[dict[str, FormerFlag]] = {
        "dataset": FormerFlag("auto", "does not go with detection, which reads COCO's layout in --data_path"),
        "download": FormerFlag(False, "does not go with detection, which reads COCO's layout in --data_path"),
        "crop_scale": FormerFlag((0.2, 1.0), "does not go with detection, where --jitter cuts the images"),
    }

    window: int = option(14, "side of attention windows in patches, in all blocks but four; 0: no windows", group="model")
    pyramid_width: int = option(256, "channels of the feature pyramid and the heads", group="model")
    anchor_scale: float = option(
        8.0,
        "side of a level's square anchor in strides of the level; at patch 16 the levels' strides are 4 to 64 and 8 gives "
        "32 to 512 pixels, at patch 8 half of that: 4 suits objects of 8 pixels and more",
        group="model",
    )
    box_samples: int = option(512, "regions an image that the box head learns from, a quarter of them objects", group="model")
    jitter: tuple[float, float] = option(
        (0.1, 2.0), "large-scale jitter: size of the image against that which fits --input_size", group="data"
    )
    input_size: str = with_default(RunConfig, "input_size", "1024")
    interpolation: Interpolation = option("bilinear", "how images are resized", group="data")
    layer_decay: float = with_default(TunedEncoderConfig, "layer_decay", 0.7)
    batch_size: int = with_default(RunConfig, "batch_size", 8)
    epochs: int = with_default(EpochsConfig, "epochs", 15)
    blr: float = with_default(EpochsConfig, "blr", 1e-4)
    blr_batch: int = with_default(EpochsConfig, "blr_batch", 64)
    weight_decay: float = with_default(RunConfig, "weight_decay", 0.1)
    warmup_epochs: float = with_default(EpochsConfig, "warmup_epochs", 0.1366)
    warmup_start: float = with_default(RunConfig, "warmup_start", 0.001)
    lr_schedule: LrSchedule = with_default(RunConfig, "lr_schedule", "multistep")
    lr_milestones: str = with_default(RunConfig, "lr_milestones", "0.8889,0.963")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "window")
        self._at_least(4, "pyramid_width", "box_samples")
        self._require("anchor_scale", self.anchor_scale > 0, "must be above 0")
        low, high = self.jitter
        self._require("jitter", 0 < low <= high < float("inf"), "must be two factors 0 < low <= high")
        self._require("data_path", bool(self.data_path), "must name a folder in COCO's layout (annotations, train2017, val2017)")
        patch = patch_size_of(self.model)
        self._require(
            "model", not patch & (patch - 1), f"must have patches of a power of two, not {patch}, for RoIAlign's strides"
        )
        step = COARSEST * patch
        fits = not any(side % step for side in self.image_size)
        self._require("input_size", fits, f"must be divisible by {step}, {COARSEST} patches of {self.model}")


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
        evaluation=Evaluation(config, val, processes),
        metric="AP_box",
        optimizer=partial(layerwise_adamw, model, config),
        collate=collate_objects,
        facts={"classes": len(train.names), "validation_images": len(val)},
    )


def check_data(config: DetectConfig) -> None:
    """What a launcher checks before it asks for a GPU: the files, not what is in them. Raises BadInput: not COCO's layout."""
    root = Path(config.data_path)
    for split in ("train", "val"):
        for place in (root / f"{split}2017", root / "annotations" / f"instances_{split}2017.json"):
            if not place.exists():
                raise BadInput(f"--data_path {root}: no {place}")


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


@dataclass
class Evaluation:
    """Scores of a model on the validation images, shared by the ranks."""

    config: DetectConfig
    source: CocoSource
    processes: Processes

    def __post_init__(self) -> None:
        self.judge = CocoScores(self.source) if self.processes.is_main else None

    def __call__(self, model: nn.Module) -> Scores:
        config = self.config
        transform = Fit(config.image_size, config.interpolation)
        mine: list[Detections] = []
        for batch in evaluation_batches(self.source, transform, config, self.processes, collate_objects):
            assert isinstance(batch, ObjectBatch)
            for target, one in zip(batch.targets, model(batch.images), strict=True):
                mine.append(self.found(int(target["place"]), one))
        everywhere = [one for rank in self.processes.gather(mine) for one in rank]
        numbers = self.judge(everywhere) if self.judge is not None else {}
        pictures = self.pictures(everywhere) if self.processes.is_main else {}
        return Scores(self.processes.gather(numbers)[0], pictures)

    def found(self, place: int, one: dict[str, Tensor]) -> Detections:
        """Objects of an image as the model sees it -> of the image as it is in its file."""
        record = self.source.records[place]
        size = (record["height"], record["width"])
        resized = fitted(size, self.config.image_size)
        down, across = resized[0] / size[0], resized[1] / size[1]
        edges = one["boxes"].new_tensor([resized[1], resized[0], resized[1], resized[0]])
        inside = one["boxes"].minimum(edges)  # what was filled up is no part of the image
        kept = (inside[:, 2:] > inside[:, :2]).all(dim=1)
        boxes, masks = inside[kept], one["masks"][kept]
        scale = boxes.new_tensor([across, down, across, down])
        packed = pack(paste(masks, one["boxes"][kept], (down, across), size) >= MASK_THRESHOLD, self.source.tools)
        labels, scores = (one[key][kept].cpu().numpy() for key in ("labels", "scores"))
        return Detections(place, (boxes / scale).cpu().numpy(), labels, scores, packed)

    def pictures(self, everything: list[Detections]) -> dict[str, np.ndarray]:
        """The first images: truth on the left, what was found with a score above one half on the right."""
        shown = sorted((one for one in everything if one.place < self.config.pictures), key=lambda one: one.place)
        if not shown:
            return {}
        columns = Group(("true objects", f"detected, score {DRAWN_SCORE} or more"))
        return {"detections": Sheet([columns], rows=[self.drawn(one) for one in shown]).draw()}

    def drawn(self, one: Detections) -> tuple[np.ndarray, np.ndarray]:
        """Truth and outcome of an image."""
        record, tools = self.source.records[one.place], self.source.tools
        image, size = self.source.load(one.place).image, (record["height"], record["width"])
        objects = [truth for truth in self.source.annotations if truth["image_id"] == record["id"] and not truth.get("iscrowd")]
        names = [self.source.names[self.source.category_ids.index(truth["category_id"])] for truth in objects]
        true_boxes = np.array([truth["bbox"] for truth in objects], dtype=float).reshape(-1, 4)
        true_boxes[:, 2:] += true_boxes[:, :2]
        truth = draw(image, true_boxes, [decoded(truth["segmentation"], size, tools) for truth in objects], names)
        sure = np.flatnonzero(one.scores >= DRAWN_SCORE)
        said = [f"{self.source.names[one.labels[i] - 1]} {one.scores[i]:.2f}" for i in sure]
        return truth, draw(image, one.boxes[sure], [tools.decode(one.masks[i]) for i in sure], said)


def pack(masks: Tensor, tools: Any) -> list[dict[str, Any]]:
    """Masks [n, h, w] as pycocotools' run lengths."""
    planes = masks.cpu().numpy().astype(np.uint8).transpose(1, 2, 0)
    packed: list[dict[str, Any]] = tools.encode(np.asfortranarray(planes))
    return packed


def draw(image: Image.Image, boxes: np.ndarray, masks: list[np.ndarray], words: list[str]) -> np.ndarray:
    """An image with boxes, masks and words on it, its longer side 384 pixels: uint8 [height, width, 3]."""
    height, width = fitted((image.height, image.width), (_PICTURE_SIDE, _PICTURE_SIDE))
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    if not len(boxes):
        return pixels.permute(1, 2, 0).numpy()
    scaled = torch.from_numpy(boxes * ([width / image.width, height / image.height] * 2)).float()
    planes = torch.from_numpy(np.stack(masks))[:, None].float()
    planes = nn.functional.interpolate(planes, size=(height, width), mode="nearest-exact")[:, 0] > 0
    colours: list[Any] = [_COLOURS[i % len(_COLOURS)] for i in range(len(boxes))]
    pixels = draw_segmentation_masks(pixels, planes, alpha=0.45, colors=colours)
    pixels = draw_bounding_boxes(pixels, scaled, colors=colours, width=2)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    pen = ImageDraw.Draw(picture)
    for box, text, colour in zip(scaled.tolist(), words, colours, strict=True):  # above all boxes, on the colour of its own
        write_label(pen, (round(box[0]), round(box[1])), text, text_colour(np.array(colour) / 255), colour)
    return np.array(picture)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config = parse_task(DetectConfig, PROGRAM, DESCRIPTION, argv)
    train_task(config, partial(build, config))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
