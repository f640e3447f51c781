"""Typed configuration of a run, composed of parts.

A part is a frozen dataclass whose fields carry their help text. The same fields are the flags of a command line and the keys of a
TOML file (common/training/command_line.py), so that a default is written once. A command's configuration is the parts that it
uses: what has no effect on a command is no flag of it. Values are checked when the dataclass is built, before a model, a data set
or a GPU is touched.

Parts, and where they are used: data, optimisation and output in every run (:class:`RunConfig`); named sets of images and random
crops, a length in epochs with a rate that scales with the batch, and AdamW by those that have them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

from common.flags import option
from common.mask_config import Strategy
from common.models.names import depth_of, patch_size_of
from common.training.errors import BadInput
from common.training.preset import PRETRAINING, Preset, SmallData

__all__ = [
    "AdamWConfig", "DataConfig", "EpochsConfig", "Flags", "FormerFlag", "ImageSetConfig", "Interpolation", "Length", "Loader",
    "LoaderConfig", "LrSchedule",
    "OptimisationConfig", "OutputConfig", "Precision", "RunConfig", "TrainConfig", "option", "with_default",
]  # fmt: skip

Interpolation = Literal["bicubic", "bilinear"]
Loader = Literal["auto", "pil", "torchvision"]
LrSchedule = Literal["cosine", "multistep", "poly"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


class Length(NamedTuple):
    """Length of a run and of its warm-up, in epochs or in updates."""

    total: float
    warmup: float
    unit: Literal["epochs", "updates"]


class FormerFlag(NamedTuple):
    """A flag that a command showed without using it, or that its sisters have and it cannot have.

    Checkpoints of such a time hold it, and go on whatever it says, for it had no effect. A recipe or command line may still say
    the value at which nobody could think that it had one.

    Attributes:
        neutral: that value, the flag's default of that time.
        reason: the rest of the error line for any other value.
    """

    neutral: Any
    reason: str


@dataclass(frozen=True)
class Flags:
    """A part of a configuration: checks of values that name the flag.

    Parts that are put side by side have no field in common but those of a class that both are made from.

    Class attributes: `former_flags`, by name.
    """

    former_flags: ClassVar[dict[str, FormerFlag]] = {}

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                self._require(name, getattr(self, name) in get_args(hint), f"must be one of {', '.join(get_args(hint))}")

    def _at_least(self, bound: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= bound, f"must be {bound} or more")

    def _require(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise BadInput(f"--{name} {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class DataConfig(Flags):
    """Where images come from, and how they are read. Names are the official MAE flags where those exist.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    data_path: str = option("", "folder of images: train/<class>/*.jpg as ImageNet, or images directly in it", group="data")
    input_size: str = option("224", "image size in pixels: 224, or HEIGHTxWIDTH such as 192x256", group="data")
    flip: bool = option(True, "flip half of the images", group="data")
    repeat: int = option(1, "random crops taken of each image in an epoch (for small data sets)", group="data")
    on_bad_image: Literal["raise", "skip"] = option(
        "raise",
        "unreadable or truncated image: stop and name it, or put another in its place and count it in the log",
        group="data",
    )
    num_workers: int = option(
        -1, "loader processes a rank; -1: the cores of this machine shared by its ranks, at most 10", group="data"
    )
    pin_mem: bool = option(True, "page-locked host memory for copies to a GPU", group="data")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "repeat")
        self._at_least(-1, "num_workers")
        self._require("input_size", min(self.image_size) > 0, "must be SIZE or HEIGHTxWIDTH in pixels")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; (0, 0) if it cannot be read."""
        words = self.input_size.lower().split("x")
        if len(words) > 2 or not all(word.isdecimal() for word in words):
            return (0, 0)
        return (int(words[0]), int(words[-1]))


@dataclass(frozen=True)
class ImageSetConfig(DataConfig):
    """Named sets of images, and random crops of them."""

    dataset: Literal["auto", "folder", "photos", "cifar10", "cifar100", "stl10", "fashion-mnist"] = option(
        "auto",
        "auto: a folder if --data_path is given, else the photographs inside the scikit-image and scikit-learn wheels; "
        "photos: those, in the place of which --data_path on the command line puts a folder where a file says photos; "
        "the named sets are read by torchvision from --data_path",
        group="data",
    )
    download: bool = option(False, "let torchvision download the named data set into --data_path", group="data")
    crop_scale: tuple[float, float] = option((0.2, 1.0), "area of the random crop, as shares of the image", group="data")
    interpolation: Interpolation = option("bicubic", "how the random crop is resized", group="data")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop_scale
        self._require("crop_scale", 0 < low <= high <= 1, "must be two shares 0 < low <= high <= 1")
        if self.dataset not in ("auto", "photos", "fashion-mnist"):
            self._require("data_path", bool(self.data_path), f"is needed for --dataset {self.dataset}")
        if self.dataset == "photos":
            self._require("data_path", not self.data_path, "is not read by --dataset photos: leave one of them out")


@dataclass(frozen=True)
class LoaderConfig(ImageSetConfig):
    """Random crops that may be made on bytes."""

    loader: Loader = option(
        "auto",
        "who decodes and crops: pil, as the official code; torchvision, faster and nearly the same (docs/cost.md): JPEGs, with "
        "PIL for other files. auto: what the run began with; in a new one torchvision for files, pil for images in memory",
        group="data",
    )


@dataclass(frozen=True)
class OptimisationConfig(Flags):
    """Batch, learning rate and precision.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    batch_size: int = option(
        64, "images a rank and accumulation step; effective batch = batch_size * accum_iter * ranks", group="optimisation"
    )
    accum_iter: int = option(1, "accumulation steps before each update", group="optimisation")
    lr: float | None = option(None, "learning rate after the warm-up", group="optimisation")
    min_lr: float = option(0.0, "learning rate at the end of the cosine", group="optimisation")
    warmup_start: float = option(0.0, "where the warm-up starts, as a share of the learning rate", group="optimisation")
    lr_schedule: LrSchedule = option(
        "cosine",
        "after the warm-up: half a cosine or a polynomial of degree --lr_power down to --min_lr, or steps at --lr_milestones",
        group="optimisation",
    )
    lr_milestones: str = option(
        "0.875", "multistep: where the learning rate drops, as shares of the run such as 0.5,0.875", group="optimisation"
    )
    lr_gamma: float = option(0.1, "multistep: factor at each milestone", group="optimisation")
    lr_power: float = option(1.0, "poly: degree, counted from the start of the run", group="optimisation")
    weight_decay: float = option(0.05, "weight decay, not on biases and norms", group="optimisation")
    clip_grad: float | None = option(None, "clip the norm of the gradient to this", group="optimisation")
    precision: Precision = option(
        "auto", "auto: bf16 autocast on a GPU, fp32 on a CPU; fp16 uses a gradient scaler", group="optimisation"
    )
    compile: bool = option(
        False,
        "torch.compile the transformer blocks in training (a model without any: the whole of it); the attention pass and "
        "evaluation stay eager",
        group="optimisation",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "batch_size", "accum_iter")
        self._at_least(0, "min_lr", "weight_decay", "lr_gamma", "lr_power")
        for name in ("lr", "clip_grad"):
            value = getattr(self, name)
            self._require(name, value is None or (value > 0 and math.isfinite(value)), "must be above 0")
        self._require("warmup_start", 0 <= self.warmup_start <= 1, "must be between 0 and 1")
        self._require("lr_milestones", bool(self.milestones), "must be shares of the run inside (0, 1), such as 0.5,0.875")

    @property
    def milestones(self) -> tuple[float, ...]:
        """`lr_milestones` as ascending shares of the run; empty if they cannot be read."""
        try:
            shares = tuple(sorted(float(word) for word in self.lr_milestones.split(",")))
        except ValueError:
            return ()
        return shares if all(0 < share < 1 for share in shares) else ()


@dataclass(frozen=True)
class EpochsConfig(OptimisationConfig):
    """Length in epochs, and a learning rate that scales with the batch."""

    epochs: int = option(200, "length of the run", group="optimisation")
    warmup_epochs: float = option(40, "epochs of linear warm-up", group="optimisation")
    lr: float | None = option(None, "absolute learning rate; default: blr * effective batch / blr_batch", group="optimisation")
    blr: float = option(1.5e-4, "base learning rate, for an effective batch of --blr_batch", group="optimisation")
    blr_batch: int = option(256, "effective batch that --blr is meant for", group="optimisation")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "epochs", "blr_batch")
        self._at_least(0, "blr", "warmup_epochs")
        rule = f"must not be above --epochs {self.epochs} (give less, or --preset small, which works it out)"
        self._require("warmup_epochs", self.warmup_epochs <= self.epochs, rule)

    @property
    def length(self) -> Length:
        """How long the run is."""
        return Length(self.epochs, self.warmup_epochs, "epochs")


@dataclass(frozen=True)
class AdamWConfig(OptimisationConfig):
    """What AdamW has besides a rate and weight decay."""

    beta1: float = option(0.9, "AdamW beta 1", group="optimisation")
    beta2: float = option(0.95, "AdamW beta 2", group="optimisation")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")


@dataclass(frozen=True)
class OutputConfig(Flags):
    """Where a run runs, what it writes, and what it goes on from.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    output_dir: str = option("./output_dir", "checkpoints, log.txt, run.json and pictures", group="run")
    log_dir: str = option("", "TensorBoard events; default: <output_dir>/tensorboard", group="run")
    resume: str = option(
        "auto",
        "auto: continue <output_dir>/checkpoint-last.pth if there is one (the one before it if that is damaged); none: start "
        "anew; or a checkpoint's path",
        group="run",
    )
    on_full_disk: Literal["stop", "continue"] = option(
        "stop",
        "no room for a checkpoint: stop with the last one intact, or train on and try again at the next",
        group="run",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="run")
    seed: int = option(0, "of weights, order, crops and masks", group="run")
    dist_timeout: float = option(30, "minutes that a rank waits for the others before it stops with an error", group="run")
    save_freq: int = option(
        20, "keep a numbered checkpoint every so many epochs (checkpoint-last.pth is written every epoch)", group="run"
    )
    save_steps: int = option(0, "also write checkpoint-last.pth every so many updates within an epoch; 0: never", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "seed", "save_steps")
        self._at_least(1, "save_freq")
        self._require("dist_timeout", 0 < self.dist_timeout < math.inf, "must be above 0")
        self._require("output_dir", bool(self.output_dir), "must name a folder")


@dataclass(frozen=True)
class RunConfig(OutputConfig, OptimisationConfig, DataConfig, ABC):
    """What every run of the loop (common/training/loop.py) has.

    Class attributes: `small`, what --preset small goes by.
    """

    small: ClassVar[SmallData]

    preset: Preset = option(
        "none",
        "small: batch, repeats, warm-up and learning rate for the number of images, K for the number of patches; what a recipe "
        "or a flag says wins (docs/small_data.md). none: the recipe of the paper",
        group="optimisation",
    )
    preset_chose: tuple[str, ...] = field(
        default=(), metadata={"help": "names of the flags that the preset filled in", "group": "optimisation", "hidden": True}
    )

    @property
    @abstractmethod
    def length(self) -> Length:
        """How long the run is."""


@dataclass(frozen=True)
class TrainConfig(EpochsConfig, AdamWConfig, LoaderConfig, RunConfig):
    """What every pre-training run has besides.

    Class attributes that a method sets: `models`, what --model takes, by name (empty: anything); `official_mask`, what
    `--mask official` stands for; `uneven_masks`, whether images may differ in their count of masked patches.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    small: ClassVar[SmallData] = PRETRAINING
    models: ClassVar[Mapping[str, Any]] = {}
    official_mask: ClassVar[Strategy] = "random"
    uneven_masks: ClassVar[bool] = False

    # model
    model: str = option("", "name of the model", group="model")
    mask_ratio: float = option(0.75, "share of patches that are masked, floor(N * ratio) of N", group="model")

    # mask
    parts_every: int = option(
        0,
        "keep the parts of every training image, cut on the whole image, and make them anew every so many epochs; crops take "
        "theirs from them (docs/method.md). 0: parts are made for every view anew",
        group="kept parts",
    )

    # run
    init_from: str = option("", "start from the weights of this checkpoint (ours or official) at epoch 0", group="run")
    picture_epochs: int = option(5, "how many times over the run parts and masks are drawn; 0: never", group="run")
    picture_images: int = option(4, "how many images those pictures show", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "picture_epochs", "picture_images", "parts_every")
        self._require("mask_ratio", 0 < self.mask_ratio < 1, "must be inside (0, 1)")
        if self.models:
            self._require("model", self.model in self.models, f"must be one of {', '.join(self.models)}")
            patch, (height, width) = patch_size_of(self.model), self.image_size
            divisible = height % patch == 0 and width % patch == 0
            self._require("input_size", divisible, f"must be divisible by the patch size {patch} of {self.model}")

    @property
    def grid_size(self) -> tuple[int, int]:
        """(H, W) of the patch grid."""
        patch = patch_size_of(self.model)
        return self.image_size[0] // patch, self.image_size[1] // patch

    @property
    def reads_step(self) -> bool:
        """Whether parts are made from the attention of the training step (BEiT and SimMIM)."""
        return False

    @property
    def keeps_parts(self) -> bool:
        """Whether parts are kept from visit to visit of an image."""
        return self.parts_every > 0 or self.reads_step

    @property
    def depth(self) -> int:
        """Blocks of the encoder that --model names, without building it."""
        return depth_of(self.models[self.model])


def with_default(config_class: type[Flags], name: str, default: Any) -> Any:
    """A flag of `config_class` again, with the default of a method's own recipe."""
    return field(default=default, metadata=next(flag.metadata for flag in fields(config_class) if flag.name == name))
