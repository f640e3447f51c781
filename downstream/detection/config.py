"""Flags of detection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from common.models.names import patch_size_of
from common.training.config import EpochsConfig, FormerFlag, Interpolation, LrSchedule, RunConfig, option, with_default
from common.training.preset import DETECTION, SmallData
from downstream.detection.mask_rcnn import COARSEST
from downstream.training import TaskConfig, TunedEncoderConfig, is_small


@dataclass(frozen=True)
class DetectConfig(EpochsConfig, TunedEncoderConfig, TaskConfig):
    """Flags of detection.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    small: ClassVar[SmallData] = DETECTION
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

    @classmethod
    def input_size_from(cls, pretraining: tuple[int, int], patch: int) -> tuple[int, int] | None:
        """The default, 1024, is for encoders of ImageNet's 224 pixels and more; others go up to what the pyramid divides."""
        step = COARSEST * patch
        height, width = (-(-side // step) * step for side in pretraining)
        return (height, width) if is_small(pretraining) else None
