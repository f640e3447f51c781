"""--preset small: the arithmetic, what wins over it, what is said and recorded, and that its run is a plain run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from beit_evolved.train_tokenizer import TokenizerConfig
from common.mask_config import MaskConfig
from common.training.checkpoint import LAST
from common.training.command_line import parse_arguments, parse_flags
from common.training.config import RunConfig
from common.training.distributed import count_ranks
from common.training.errors import BadInput
from common.training.loop import Loop
from common.training.preset import (
    SmallData,
    batch_for,
    choose_settings,
    offer_parts,
    offer_preset,
    parts_for,
    repeats_for,
    share_batch,
)
from downstream import finetune
from downstream.classification.config import FinetuneConfig
from downstream.detection.config import DetectConfig
from downstream.probing.config import ProbeConfig
from downstream.segmentation.config import SegmentConfig
from mae_evolved.main_pretrain import MAEConfig
from slurm.plan import Resources, plan
from tests import methods
from tests.conftest import assert_same, read_log, write_images
from tests.downstream.labelled_folder import write_set

MAE = "mae_evolved.main_pretrain"
SMALL = "--model mae_vit_tiny_patch4 --input_size 16 --num_workers 0 --picture_epochs 0 --device cpu --preset small"


def parse(flags: str, images: int = 60, ranks: int = 1) -> tuple[MAEConfig, MaskConfig]:
    return parse_arguments(MAEConfig, "p", "", flags.split(), count=lambda config: images, ranks=ranks)


# --- arithmetic ---


@pytest.mark.parametrize(
    ("images", "batch"),
    [(1, 32), (60, 32), (1024, 32), (2047, 32), (2048, 64), (5000, 128), (8191, 128), (8192, 256), (1_281_167, 256)],
)
def test_batch_is_the_largest_power_of_two_of_which_the_images_hold_32(images: int, batch: int) -> None:
    assert batch_for(images, (32, 256)) == batch


@pytest.mark.parametrize(
    ("batch", "ranks", "most", "shares"),
    [(32, 1, 64, (32, 1)), (256, 1, 64, (64, 4)), (256, 4, 64, (64, 1)), (256, 3, 64, (43, 2)), (32, 48, 64, (1, 1))],
)
def test_ranks_share_the_batch(batch: int, ranks: int, most: int, shares: tuple[int, int]) -> None:
    """Never below the batch, and above it by less than one accumulation step of all ranks."""
    assert share_batch(batch, ranks, most) == shares
    assert batch <= shares[0] * shares[1] * ranks < batch + ranks * shares[1]


@pytest.mark.parametrize("images", [1, 14, 60, 66, 1000, 50_000])
@pytest.mark.parametrize("epochs", [1, 10, 200, 800])
def test_an_epoch_has_8_updates_and_a_run_as_many_as_asked(images: int, epochs: int) -> None:
    """And one repeat less would not do, unless there is but one."""
    batch = batch_for(images, (32, 256))
    repeat = repeats_for(images, batch, epochs, 500)
    an_epoch = images * repeat // batch
    assert an_epoch >= 8
    assert an_epoch * epochs >= 500
    fewer = images * (repeat - 1) / batch
    assert repeat == 1 or fewer < 8 or fewer < -(-500 // epochs)


@pytest.mark.parametrize(
    ("patches", "parts"), [(196, (40, 10)), (144, (29, 7)), (64, (13, 3)), (16, (3, 2)), (4, (2, 2)), (576, (40, 10))]
)
def test_parts_have_as_many_patches_as_the_papers(patches: int, parts: tuple[int, int]) -> None:
    """Those of the recipes of CIFAR (64) and STL-10 (144) among them."""
    assert parts_for(patches) == parts


# --- what it chooses, and what wins ---


def test_sixty_images_and_ten_epochs() -> None:
    config, mask = parse("--preset small --epochs 10 --model mae_vit_tiny_patch8 --input_size 64")
    assert (config.batch_size, config.accum_iter, config.repeat) == (32, 1, 27)  # 50 updates an epoch
    assert (config.warmup_epochs, config.lr) == (1.0, 1e-3)
    assert (mask.parts_start, mask.parts_end) == (13, 3)
    assert set(config.preset_chose) == {
        "batch_size", "accum_iter", "repeat", "warmup_epochs", "lr", "parts_start", "parts_end",
    }  # fmt: skip


def test_without_it_nothing_is_chosen_and_a_short_run_is_told_of_it() -> None:
    def never(config: Any) -> int:
        raise AssertionError("the images are not looked at")

    config, mask = parse_arguments(MAEConfig, "p", "", [], count=never)
    assert (config.preset, config.preset_chose, config.batch_size, config.repeat, config.lr) == ("none", (), 64, 1, None)
    assert mask == MaskConfig()
    with pytest.raises(BadInput, match=r"--warmup_epochs must not be above --epochs 10 \(.*--preset small.*\), got 40"):
        parse("--epochs 10")
    with pytest.raises(BadInput, match="--warmup_epochs must not be above --epochs 10"):
        parse("--epochs 10 --preset small --warmup_epochs 11")


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ("--batch_size 8", {"batch_size": 8, "accum_iter": 1, "repeat": 7}),
        ("--accum_iter 2", {"batch_size": 64, "accum_iter": 2, "repeat": 107}),
        ("--repeat 3", {"repeat": 3, "batch_size": 32}),
        ("--warmup_epochs 2.5", {"warmup_epochs": 2.5, "lr": 1e-3}),
        ("--lr 0.5", {"lr": 0.5}),
        ("--blr 0.5", {"lr": None, "blr": 0.5}),
        ("--blr_batch 99", {"lr": None, "blr_batch": 99}),
        ("--parts_start 9", {"parts_start": 9, "parts_end": 3}),
        ("--num_parts 5", {"num_parts": 5, "parts_start": 40, "parts_end": 10}),
        ("--mask random", {"parts_start": 40, "repeat": 27}),
        ("--recipe authors", {"parts_start": 13, "parts_jitter": 2}),
    ],
)
@pytest.mark.parametrize("from_recipe", [False, True])
def test_what_is_given_wins(tmp_path: Path, flags: str, kept: dict[str, Any], from_recipe: bool) -> None:
    """On the command line and in a recipe; the rest follows from it."""
    given = "--preset small --epochs 10 --model mae_vit_tiny_patch8 --input_size 64"
    if from_recipe:
        name, value = flags.removeprefix("--").split()
        (tmp_path / "mine.toml").write_text(f"{name} = {value}" if value[0].isdigit() else f'{name} = "{value}"')
        flags = f"--config {tmp_path}/mine.toml"
    config, mask = parse(f"{given} {flags}")
    for name, value in kept.items():
        assert getattr(config if hasattr(config, name) else mask, name) == value, name
    assert not set(config.preset_chose) & {name for name in kept if f"--{name} " in flags}


def test_the_ranks_of_the_environment_share_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert count_ranks() == 1
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert count_ranks() == 4
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert count_ranks() == 2
    config, _ = parse_arguments(MAEConfig, "p", "", ["--preset", "small"], count=lambda config: 60)
    assert (config.batch_size, config.accum_iter) == (16, 1)


DOWNSTREAM = [
    (FinetuneConfig, "--epochs 10", {"batch_size": 16, "repeat": 14, "warmup_epochs": 1.0, "lr": 1e-3}),
    (ProbeConfig, "--epochs 10", {"batch_size": 64, "repeat": 54, "warmup_epochs": 1.0, "lr": 1.0}),
    (SegmentConfig, "--iterations 500 --data_path x", {"batch_size": 4, "repeat": 1, "warmup_iterations": 50, "lr": 1e-4}),
    (DetectConfig, "--epochs 10 --data_path x", {"batch_size": 4, "repeat": 4, "warmup_epochs": 1.0, "lr": 1e-4}),
    (TokenizerConfig, "--epochs 10", {"batch_size": 16, "repeat": 27, "warmup_epochs": 1.0, "lr": 3e-3}),
]


@pytest.mark.parametrize(("config", "flags", "chosen"), DOWNSTREAM, ids=lambda value: getattr(value, "__name__", None))
def test_the_other_commands_choose_alike(config: type[RunConfig], flags: str, chosen: dict[str, Any]) -> None:
    """60 images; a segmentation's rate does not go by the batch, and its length is in updates."""
    made = parse_flags(config, "p", "", [*flags.split(), "--preset", "small"], count=lambda config: 60, ranks=1)
    assert {name: getattr(made, name) for name in chosen} == chosen
    assert set(made.preset_chose) <= {"batch_size", "accum_iter", "repeat", "warmup_epochs", "warmup_iterations", "lr"}


def test_fine_tuning_counts_its_labelled_images(tmp_path: Path) -> None:
    images = write_set(tmp_path / "set")
    count = len(list((images / "train").rglob("*.png")))
    for flags, number in (("", count), ("--subset 3", 3)):
        config = parse_flags(FinetuneConfig, "p", "", f"--data_path {images} {flags}".split())
        assert finetune.count_images(config) == number


# --- order, record, resume ---


def test_the_mask_is_refused_before_the_images_are_counted(tmp_path: Path) -> None:
    for flags, message in (("--layers 99", r"--layers \[99\]"), ("--parts_start 17", "K = 17 parts")):
        with pytest.raises(BadInput, match=message):
            methods.MAINS["mae"](f"{SMALL} --data_path {tmp_path}/nowhere {flags}".split())
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        methods.MAINS["mae"](f"{SMALL} --data_path {tmp_path}/nowhere".split())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset's run is 24 updates of 4 images."""
    monkeypatch.setattr(MAEConfig, "small", SmallData((4, 8), 24, 1e-3))


@pytest.mark.usefixtures("few")
def test_a_run_says_and_records_what_was_chosen_and_resumes_to_the_bit(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same values without the preset are the same run, and continue its checkpoint (seed 0)."""
    train = methods.MAINS["mae"]
    flags = f"{SMALL} --data_path {image_folder} --epochs 3 --output_dir {tmp_path}/"
    train(f"{flags}whole".split())
    said = capsys.readouterr().out.splitlines()
    chosen = "--batch_size 4 --accum_iter 1 --repeat 2 --warmup_epochs 0.3 --lr 0.001 --parts_start 3 --parts_end 2"
    assert f"--preset small chose for 16 images: {chosen}" in said
    assert "K 3 -> 2; 16 images x 2 crops, 3 epochs of 8 updates of 4 images = 24 updates, lr 0.001, cpu x 1" in "\n".join(said)
    facts = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert facts["preset"]["name"] == "small"
    assert " ".join(f"--{name} {value}" for name, value in facts["preset"]["chose"].items()) == chosen
    assert facts["config"]["repeat"] == 2

    original = Loop._train_update

    def cut(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == (1, 5):
            raise KeyboardInterrupt
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_update", cut)
        with pytest.raises(KeyboardInterrupt):
            train(f"{flags}parts --save_steps 2".split())
    train(f"{flags}parts --save_steps 2".split())
    plain = f"{flags}plain {chosen}".replace(" --preset small", "")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_update", cut)
        with pytest.raises(KeyboardInterrupt):
            train(f"{flags}plain --save_steps 2".split())
    train(plain.split())
    for other in ("parts", "plain"):
        whole, again = (torch.load(tmp_path / name / LAST, weights_only=True) for name in ("whole", other))
        for key in ("model", "optimizer", "epoch", "update", "mask", "mask_config"):
            assert_same(whole[key], again[key])
        assert read_log(tmp_path / "whole") == read_log(tmp_path / other)


@pytest.mark.usefixtures("few")
def test_the_plan_chooses_as_the_trainer_does(image_folder: Path, tmp_path: Path) -> None:
    """With the batch of the launcher and its ranks; the run that comes of it is continued by a plan with the same flags."""
    flags = f"{SMALL} --data_path {image_folder} --epochs 3 --output_dir {tmp_path}/run".split()
    words = plan(MAE, flags, Resources(1, 1, 64, 64))  # more than the images: the preset repeats them
    assert words[-4:] == ["--batch_size", "64", "--accum_iter", "1"]
    words = plan(MAE, flags, Resources(1, 1, 4, 4))
    methods.MAINS["mae"]([*words, "--epochs", "1"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["repeat"] == 6  # 24 updates in one epoch
    assert plan(MAE, [*flags, "--epochs", "1"], Resources(1, 1, 4, 4))
    with pytest.raises(BadInput, match="--repeat 6 -> 2"):
        plan(MAE, flags, Resources(1, 1, 4, 4))
    without = [word if word != "small" else "none" for word in flags]
    with pytest.raises(BadInput, match="or let --preset small choose it"):
        plan(MAE, [*without, *["--warmup_epochs", "0", "--num_parts", "2"]], Resources(1, 1, 64, 64))


# --- the offer ---


@pytest.mark.parametrize(
    ("an_epoch", "updates", "lr", "offered"),
    [
        (1, 200, 3.75e-5, True),  # 66 photographs under the defaults
        (3, 9000, 1e-3, True),
        (4, 999, 1.9e-4, True),
        (4, 999, 2e-4, False),
        (14, 140, 1.25e-3, False),  # the demo
        (312, 62_400, 2.4e-3, False),  # ImageNet
    ],
)
def test_the_preset_is_offered_where_data_are_few(an_epoch: int, updates: int, lr: float, offered: bool) -> None:
    line = offer_preset(MAEConfig(), an_epoch, updates, lr)
    assert ("--preset small" in line) == offered
    assert not offer_preset(parse("--preset small")[0], an_epoch, updates, lr)


@pytest.mark.parametrize(("patches", "offered"), [(196, False), (144, False), (120, False), (119, True), (64, True)])
def test_it_is_offered_where_parts_are_a_patch_or_two(patches: int, offered: bool) -> None:
    assert bool(offer_parts(MAEConfig(), MaskConfig(), patches)) == offered
    assert not offer_parts(MAEConfig(), MaskConfig(mask="random"), patches)
    assert not offer_parts(MAEConfig(), MaskConfig(num_parts=10), patches)


def test_a_run_on_few_images_offers_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """66 photographs, defaults: one update an epoch at 3.75e-5; and 60, which do not fill one."""
    write_images(tmp_path / "images", 6)
    train: Callable[[list[str]], None] = methods.MAINS["mae"]
    flags = f"{SMALL} --preset none --data_path {tmp_path}/images --epochs 1 --warmup_epochs 0 --parts_start 3 --parts_end 2"
    with pytest.raises(BadInput, match=r"nothing would ever be updated .*--preset small"):
        train(f"{flags} --output_dir {tmp_path}/none".split())
    train(f"{flags} --batch_size 4 --output_dir {tmp_path}/out".split())
    said = [line for line in capsys.readouterr().out.splitlines() if "--preset small" in line]
    assert said == [
        "few data for these settings (1 update an epoch, 1 in all, lr 2.34e-06): "
        "--preset small chooses batch, repeats, warm-up and rate for them"
    ]


def test_choices_are_plain_values() -> None:
    """Whatever the numbers, as TOML and JSON write them."""
    config = parse("--preset small")[0]
    assert all(type(value) in (int, float) for value in choose_settings(config, 77, 3, ()).values())
