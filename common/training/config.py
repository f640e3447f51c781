"""Typed configuration, and a command line made from it.

A configuration is a frozen dataclass whose fields carry their help text. The same fields are the flags of the
command line and the keys of a TOML file, so that a default is written once. Values are checked when the
dataclass is built, before a model, a data set or a GPU is touched.
"""

from __future__ import annotations

import argparse
import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from common.flags import WideHelp, add_flag, add_mask_flags, mask_config_from, mask_options, scalar_type
from common.flags import option as option  # commands import it from here
from common.mask_config import MaskConfig, Strategy
from common.models.names import patch_size_of
from common.training.errors import BadInput, Parser

Interpolation = Literal["bicubic", "bilinear"]
LrSchedule = Literal["cosine", "multistep", "poly"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


class Length(NamedTuple):
    """Length of a run and of its warm-up, in epochs or in updates."""

    total: float
    warmup: float
    unit: Literal["epochs", "updates"]


@dataclass(frozen=True)
class RunConfig:
    """What every run that trains something has. Names are the official MAE flags where those exist.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    # data
    data_path: str = option("", "folder of images: train/<class>/*.jpg as ImageNet, or images directly in it", group="data")
    dataset: Literal["auto", "folder", "photos", "cifar10", "cifar100", "stl10", "fashion-mnist"] = option(
        "auto",
        "auto: a folder if --data_path is given, else the photographs inside the scikit-image and scikit-learn wheels; "
        "the named sets are read by torchvision from --data_path",
        group="data",
    )
    download: bool = option(False, "let torchvision download the named data set into --data_path", group="data")
    input_size: str = option("224", "image size in pixels: 224, or HEIGHTxWIDTH such as 192x256", group="data")
    crop_scale: tuple[float, float] = option((0.2, 1.0), "area of the random crop, as shares of the image", group="data")
    interpolation: Interpolation = option("bicubic", "how the random crop is resized", group="data")
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

    # optimisation
    batch_size: int = option(
        64, "images a rank and accumulation step; effective batch = batch_size * accum_iter * ranks", group="optimisation"
    )
    accum_iter: int = option(1, "accumulation steps before each update", group="optimisation")
    epochs: int = option(200, "length of the run", group="optimisation")
    lr: float | None = option(None, "absolute learning rate; default: blr * effective batch / blr_batch", group="optimisation")
    blr: float = option(1.5e-4, "base learning rate, for an effective batch of --blr_batch", group="optimisation")
    blr_batch: int = option(256, "effective batch that --blr is meant for", group="optimisation")
    min_lr: float = option(0.0, "learning rate at the end of the cosine", group="optimisation")
    warmup_epochs: float = option(40, "epochs of linear warm-up", group="optimisation")
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
    weight_decay: float = option(0.05, "AdamW weight decay, not on biases and norms", group="optimisation")
    beta1: float = option(0.9, "AdamW beta 1", group="optimisation")
    beta2: float = option(0.95, "AdamW beta 2", group="optimisation")
    clip_grad: float | None = option(None, "clip the norm of the gradient to this", group="optimisation")

    # run
    output_dir: str = option("./output_dir", "checkpoints, log.txt, run.json and pictures", group="run")
    log_dir: str = option("", "TensorBoard events; default: <output_dir>/tensorboard", group="run")
    resume: str = option(
        "auto",
        "auto: continue <output_dir>/checkpoint-last.pth if there is one; none: start anew; or a checkpoint's path",
        group="run",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", group="run")
    seed: int = option(0, "of weights, order, crops and masks", group="run")
    dist_timeout: float = option(30, "minutes that a rank waits for the others before it stops with an error", group="run")

    def __post_init__(self) -> None:
        self._at_least(1, "batch_size", "accum_iter", "epochs", "repeat", "blr_batch")
        self._at_least(0, "blr", "min_lr", "warmup_epochs", "weight_decay", "seed", "lr_gamma", "lr_power")
        self._at_least(-1, "num_workers")
        self._require("dist_timeout", 0 < self.dist_timeout < math.inf, "must be above 0")
        for name in ("lr", "clip_grad"):
            value = getattr(self, name)
            self._require(name, value is None or (value > 0 and math.isfinite(value)), "must be above 0")
        for name in ("beta1", "beta2"):
            self._require(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
        low, high = self.crop_scale
        self._require("crop_scale", 0 < low <= high <= 1, "must be two shares 0 < low <= high <= 1")
        self._require("warmup_epochs", self.warmup_epochs <= self.epochs, f"must not be above --epochs {self.epochs}")
        self._require("warmup_start", 0 <= self.warmup_start <= 1, "must be between 0 and 1")
        self._require("lr_milestones", bool(self.milestones), "must be shares of the run inside (0, 1), such as 0.5,0.875")
        self._require("output_dir", bool(self.output_dir), "must name a folder")
        self._require("input_size", min(self.image_size) > 0, "must be SIZE or HEIGHTxWIDTH in pixels")
        if self.dataset != "auto" and self.dataset not in ("photos", "fashion-mnist"):
            self._require("data_path", bool(self.data_path), f"is needed for --dataset {self.dataset}")
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                self._require(name, getattr(self, name) in get_args(hint), f"must be one of {', '.join(get_args(hint))}")

    @property
    def length(self) -> Length:
        """How long the run is."""
        return Length(self.epochs, self.warmup_epochs, "epochs")

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels; (0, 0) if it cannot be read."""
        words = self.input_size.lower().split("x")
        if len(words) > 2 or not all(word.isdecimal() for word in words):
            return (0, 0)
        return (int(words[0]), int(words[-1]))

    @property
    def milestones(self) -> tuple[float, ...]:
        """`lr_milestones` as ascending shares of the run; empty if they cannot be read."""
        try:
            shares = tuple(sorted(float(word) for word in self.lr_milestones.split(",")))
        except ValueError:
            return ()
        return shares if all(0 < share < 1 for share in shares) else ()

    def _at_least(self, bound: float, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._require(name, math.isfinite(value) and value >= bound, f"must be {bound} or more")

    def _require(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise BadInput(f"--{name} {rule}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class LoopConfig(RunConfig):
    """What every run of the loop (common/training/loop.py) has besides.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    precision: Precision = option(
        "auto", "auto: bf16 autocast on a GPU, fp32 on a CPU; fp16 uses a gradient scaler", group="optimisation"
    )
    compile: bool = option(False, "torch.compile the training step (the attention pass stays eager)", group="optimisation")
    save_freq: int = option(
        20, "keep a numbered checkpoint every so many epochs (checkpoint-last.pth is written every epoch)", group="run"
    )
    save_steps: int = option(0, "also write checkpoint-last.pth every so many updates within an epoch; 0: never", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "save_freq")
        self._at_least(0, "save_steps")


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """What every pre-training run has besides.

    Class attributes that a method sets: `models`, the names that --model takes (empty: any); `official_mask`, what
    `--mask official` stands for; `uneven_masks`, whether images may differ in their count of masked patches.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    models: ClassVar[tuple[str, ...]] = ()
    official_mask: ClassVar[Strategy] = "random"
    uneven_masks: ClassVar[bool] = False

    # model
    model: str = option("", "name of the model", group="model")
    mask_ratio: float = option(0.75, "share of patches that are masked, floor(N * ratio) of N", group="model")

    # run
    init_from: str = option("", "start from the weights of this checkpoint (ours or official) at epoch 0", group="run")
    picture_epochs: int = option(5, "how many times over the run parts and masks are drawn; 0: never", group="run")
    picture_images: int = option(4, "how many images those pictures show", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "picture_epochs", "picture_images")
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


Config = TypeVar("Config", bound=TrainConfig)
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)


def with_default(config_class: type[RunConfig], name: str, default: Any) -> Any:
    """A flag of `config_class` again, with the default of a method's own recipe."""
    return field(default=default, metadata=next(one.metadata for one in fields(config_class) if one.name == name))


def parse_flags(config_class: type[AnyConfig], program: str, description: str, argv: Sequence[str]) -> AnyConfig:
    """Command line -> checked configuration of a run without masks.

    Precedence, the later wins: defaults, then --config, then the flags.

    Raises:
        BadInput: an unknown flag or key, an unreadable file, or a value outside its range.
    """
    given = vars(_parser(config_class, program, description).parse_args(argv))
    file = given.pop("config", None)
    return config_class(**{**(_read_toml(file, get_type_hints(config_class)) if file else {}), **given})


def parse_arguments(config_class: type[Config], program: str, description: str, argv: Sequence[str]) -> tuple[Config, MaskConfig]:
    """Command line -> checked configuration.

    Precedence, the later wins: defaults, then --recipe, then --config, then the flags.

    Raises:
        BadInput: an unknown flag or key, an unreadable file, or a value outside its range.
    """
    parser = _parser(config_class, program, description)
    add_mask_flags(parser)
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    hints = {**get_type_hints(config_class), **get_type_hints(MaskConfig), "recipe": str}
    values = {**(_read_toml(file, hints) if file else {}), **given}
    try:
        mask = mask_config_from(values).with_official(config_class.official_mask)
    except ValueError as error:
        raise BadInput(f"--{error}") from None
    for name in mask_options(values):
        del values[name]
    return config_class(**values), mask


def _parser(config_class: type[RunConfig], program: str, description: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=program, description=description, allow_abbrev=False, formatter_class=WideHelp, usage=f"{program} [flags]"
    )
    parser.add_argument(
        "--config", default=argparse.SUPPRESS, metavar="FILE", help="TOML file of flags, such as those in recipes/"
    )
    groups: dict[str, Any] = {}
    for one in fields(config_class):
        heading = one.metadata.get("group", "model")
        groups.setdefault(heading, parser.add_argument_group(heading) if heading not in groups else None)
        add_flag(groups[heading], one, get_type_hints(config_class)[one.name])
    return parser


def _read_toml(file: str, hints: dict[str, Any]) -> dict[str, Any]:
    """Keys and values of a recipe file, types checked."""
    try:
        values = tomllib.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"--config {file}: {error}") from None
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise BadInput(f"--config {file}: unknown key {', '.join(unknown)}")
    return {key: _typed(value, hints[key], f"--config {file}: {key}") for key, value in values.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not (isinstance(value, list) and len(value) == 2 and all(type(one) in (int, float) for one in value)):
            raise BadInput(f"{where} must be two numbers, got {value!r}")
        return tuple(map(float, value))
    wanted = str if get_origin(hint) is Literal else scalar_type(hint)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and type(value) is int:
        return str(value)
    if type(value) is not wanted:
        raise BadInput(f"{where} must be {wanted.__name__}, got {value!r}")
    return value
