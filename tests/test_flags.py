"""No command shows a flag that it ignores: each command is run, and which fields of its configuration are read is noted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import downstream.vit
from beit_evolved import train_tokenizer
from beit_evolved.run_beit_pretraining import BEiTConfig
from beit_evolved.train_tokenizer import TokenizerConfig
from common.mask_config import MaskConfig
from common.training.checkpoint import LAST
from common.training.command_line import make_parser, parse_flags
from common.training.config import Flags, RunConfig
from common.training.errors import BadInput
from downstream import detect, finetune, linear_probe, segment
from downstream.detect import DetectConfig
from downstream.finetune import FinetuneConfig
from downstream.linear_probe import ProbeConfig
from downstream.segment import SegmentConfig
from mae_evolved.main_pretrain import MAEConfig
from simmim_evolved.main_simmim import SimMIMConfig
from tests import methods
from tests.conftest import assert_same, write_images
from tests.downstream.coco_folder import write_coco
from tests.downstream.labelled_folder import write_set
from tests.downstream.segmentation.test_data import write_folder

RUN = "--num_workers 0 --device cpu"
TASK = f"{RUN} --model vit_tiny_patch4 --input_size 16 --batch_size 4 --pictures 1"
TINY = f"{RUN} --input_size 16 --batch_size 4 --epochs 2 --warmup_epochs 0 --parts_start 4 --parts_end 3 --picture_images 1"
PRETRAINING = (
    "--mask_ratio_range 0.5,0.9 --ratio_draw batch",
    "--lr_schedule poly --recipe authors",
    "--lr_schedule multistep --mask random-units",
    "--dataset cifar10",
)
SCHEDULES = ("", "--lr_schedule poly", "--lr_schedule multistep", "--lr_schedule cosine")


@dataclass(frozen=True)
class Command:
    """A command and runs of it that together read every flag: flags of all runs, and those of each."""

    main: Callable[[Sequence[str]], None]
    config: type[RunConfig]
    common: str
    variants: tuple[str, ...]


COMMANDS = {
    **{
        method: Command(methods.MAINS[method], config, TINY, PRETRAINING)
        for method, config in (("mae", MAEConfig), ("beit", BEiTConfig), ("simmim", SimMIMConfig))
    },
    "tokenizer": Command(
        train_tokenizer.main,
        TokenizerConfig,
        f"{RUN} --input_size 16 --batch_size 4 --epochs 1 --warmup_epochs 0 --vocabulary 8 --code_width 4 --layers 1 --width 4",
        (*SCHEDULES, "--dataset cifar10"),
    ),
    "finetune": Command(
        finetune.main,
        FinetuneConfig,
        f"{TASK} --epochs 1 --warmup_epochs 0",
        (*SCHEDULES, "--auto_augment=", "--dataset cifar10"),
    ),
    "linear_probe": Command(
        linear_probe.main, ProbeConfig, f"{TASK} --epochs 1 --warmup_epochs 0 --knn=", (*SCHEDULES, "--dataset cifar10")
    ),
    "segment": Command(
        segment.main,
        SegmentConfig,
        f"{TASK} --iterations 2 --warmup_iterations 1 --decoder_channels 8 --auxiliary_channels 8 --batch_size 2",
        SCHEDULES,
    ),
    "detect": Command(
        detect.main,
        DetectConfig,
        f"{RUN} --model vit_tiny_patch8 --input_size 32 --window 2 --pyramid_width 8 --box_samples 8 --batch_size 2 --epochs 1 "
        "--warmup_epochs 0 --pictures 1",
        SCHEDULES,
    ),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Small data in the layout of the command, one training image of which cannot be read: what to do then is a flag too."""
    name, root = request.getfixturevalue("name"), tmp_path / "data"
    if name in methods.MAINS or name == "tokenizer":
        write_images(root, 16)
        broken = root / "image_03.jpg"
    elif name == "segment":
        broken = write_folder(root) / "images/training/00.jpg"
    elif name == "detect":
        broken = sorted((write_coco(root) / "train2017").iterdir())[1]
    else:
        broken = write_set(root) / "train" / "ant" / "0.png"
    assert broken.exists(), sorted(root.rglob("*"))
    broken.write_bytes(b"broken")
    return root


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few blocks instead of twelve."""
    for models, name, model in list(methods.shallow_models()):
        monkeypatch.setitem(models, name, model)
    for name in ("vit_tiny_patch4", "vit_tiny_patch8"):
        monkeypatch.setitem(downstream.vit.MODELS, name, partial(downstream.vit.MODELS[name], depth=4))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the attributes that are read of a configuration, but for its own checks and for writing it down."""
    names: set[str] = set()

    def noted(self: Any, name: str) -> Any:
        if not _is_check(sys._getframe(1)):
            names.add(name)
        return object.__getattribute__(self, name)

    for kind in (Flags, MaskConfig):
        monkeypatch.setattr(kind, "__getattribute__", noted, raising=False)
    return names


def _is_check(frame: FrameType | None) -> bool:
    """Whether an attribute is read by `dataclasses` or while a configuration is built."""
    assert frame is not None
    if frame.f_code.co_filename.endswith("dataclasses.py"):
        return True
    while frame is not None:
        if frame.f_code.co_name == "__post_init__" and issubclass(type(frame.f_locals.get("self")), (Flags, MaskConfig)):
            return True
        frame = frame.f_back
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.usefixtures("shallow")
def test_every_flag_is_read(name: str, data: Path, read: set[str], tmp_path: Path) -> None:
    """Over a few runs; one flag that is taken away from the code that uses it would be left over here."""
    command = COMMANDS[name]
    common = f"{command.common} --data_path {data} --on_bad_image skip"
    if name in methods.MAINS:
        common += f" --model {methods.MODELS[name]}"
    if name == "beit":
        common += f" --tokenizer {methods.write_tokenizer(tmp_path / 'tokenizer')}"
    for number, variant in enumerate(command.variants):
        flags = f"{common} --output_dir {tmp_path / str(number)} {variant}"
        if "cifar10" in variant:
            with pytest.raises(BadInput, match="--dataset cifar10: cannot be read"):
                command.main(flags.split())
        else:
            command.main(flags.split())
    shown = {flag.name for flag in (*fields(command.config), *(fields(MaskConfig) if name in methods.MAINS else ()))}
    assert shown - read == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_fields_and_nothing_else(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = COMMANDS[name].config
    parser = make_parser(config, "program", "")
    parser.print_help()
    shown = {word.removeprefix("--") for word in capsys.readouterr().out.replace(",", " ").split() if word.startswith("--")}
    assert {flag.name for flag in fields(config) if not flag.metadata.get("hidden")} <= shown
    assert "preset_chose" not in shown  # what the preset fills in, for the record
    assert not shown & config.former_flags.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_parts_do_not_undo_each_other(name: str) -> None:
    """Of two parts that are put side by side the later one must not bring back what the other has changed."""
    config = COMMANDS[name].config
    for flag in fields(config):
        owner = next(kind for kind in config.__mro__ if flag.name in vars(kind).get("__annotations__", {}))
        assert flag.default == vars(owner).get(flag.name), flag.name
        assert flag.metadata["help"] == next(own for own in fields(owner) if own.name == flag.name).metadata["help"], flag.name


FORMER = [(name, flag) for name, command in COMMANDS.items() for flag in command.config.former_flags]


def test_there_are_former_flags() -> None:
    assert {name for name, _ in FORMER} == {"segment", "detect", "linear_probe", "mae"}
    for name, flag in FORMER:
        assert flag not in {own.name for own in fields(COMMANDS[name].config)}


@pytest.mark.parametrize(("name", "flag"), FORMER)
def test_a_former_flag_is_refused_unless_it_says_nothing(name: str, flag: str, tmp_path: Path) -> None:
    """On the command line and in a recipe: its neutral value is passed over, any other refused in one line with the reason."""
    config, former = COMMANDS[name].config, COMMANDS[name].config.former_flags[flag]
    neutral, file = former.neutral, tmp_path / "recipe.toml"
    written = {bool: lambda value: str(value).lower(), str: repr, tuple: lambda pair: str(list(pair))}.get(type(neutral), str)

    def parse(value: Any) -> None:
        words = ["--no_" + flag if value is False else "--" + flag] if isinstance(value, bool) else ["--" + flag]
        words += [] if isinstance(value, bool) else [str(part) for part in (value if isinstance(value, tuple) else (value,))]
        file.write_text(f"{flag} = {written(value)}\n")
        for flags in (words, ["--config", str(file)]):
            parse_flags(config, "program", "", [*flags, "--data_path", "somewhere"])

    parse(neutral)
    others: dict[type, Any] = {bool: neutral is False, str: "cifar10", tuple: (0.3, 0.4), int: 7, float: 7.5}
    with pytest.raises(BadInput, match=f"^--{flag} {former.reason[:20]}") as refused:
        parse(others[type(neutral)])
    assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("shallow")
def test_a_checkpoint_with_former_flags_goes_on(tmp_path: Path) -> None:
    """Whatever they say, for they had no effect; another flag that this command does not have is still named."""
    images = write_set(tmp_path / "images")
    flags = f"{TASK} --epochs 2 --warmup_epochs 0 --knn= --save_freq 1 --data_path {images}"
    whole, old = tmp_path / "whole", tmp_path / "old"
    linear_probe.main(f"{flags} --output_dir {whole}".split())
    state = torch.load(whole / "checkpoint-0.pth", weights_only=True)
    state["config"] |= {"drop_path": 0.0, "layer_decay": 1.0, "checkpointing": True, "beta1": 0.8, "beta2": 0.7}
    old.mkdir()
    torch.save(state, old / LAST)
    linear_probe.main(f"{flags} --output_dir {old}".split())
    first, second = (torch.load(folder / LAST, weights_only=True) for folder in (whole, old))
    for key in ("model", "optimizer", "scores", "best"):
        assert_same(first[key], second[key])
    state["config"]["mixup"] = 0.8
    torch.save(state, old / LAST)
    with pytest.raises(BadInput, match=r"other settings: --mixup 0.8 -> None"):
        linear_probe.main(f"{flags} --output_dir {old}".split())
