"""Flags of SimMIM: official defaults, the step schedule, weight decay, errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.training.command_line import parse_arguments
from common.training.errors import BadInput
from common.training.optim import absolute_lr, make_optimizer
from simmim_evolved.main_simmim import PROGRAM, SimMIMConfig, build
from tests.conftest import ROOT, run_module
from tests.methods import lr_at

RECIPES = ROOT / "simmim_evolved" / "recipes"


def parse(words: str = "") -> SimMIMConfig:
    return parse_arguments(SimMIMConfig, PROGRAM, "", words.split())[0]


def test_official_recipe_is_the_default() -> None:
    """Rate 1e-4 x 2048/512, warmed up from 5e-7/1e-4 of it over 10 epochs, a tenth from 7/8 of the run on."""
    config = parse(f"--config {RECIPES}/official_simmim_base_800.toml")
    peak = absolute_lr(config, 2048)
    assert peak == pytest.approx(4e-4)
    assert lr_at(0, config, peak) == pytest.approx(5e-7 * 4)
    assert lr_at(5, config, peak) == pytest.approx((4e-4 + 2e-6) / 2)
    assert lr_at(10, config, peak) == lr_at(699.99, config, peak) == peak
    assert lr_at(700, config, peak) == lr_at(799.9, config, peak) == pytest.approx(4e-5)
    assert (config.beta1, config.beta2, config.weight_decay, config.clip_grad, config.drop_path) == (0.9, 0.999, 0.05, 5.0, 0.1)
    assert (config.crop_scale, config.interpolation, config.mask_ratio) == ((0.67, 1.0), "bilinear", 0.6)
    small = parse(f"--config {RECIPES}/table4_simmim_small_200.toml")
    assert lr_at(174.9, small, 1.0) == 1.0
    assert lr_at(175, small, 1.0) == pytest.approx(0.1)


def test_several_milestones() -> None:
    config = parse("--epochs 100 --lr_milestones 0.8,0.5 --lr_gamma 0.5")
    assert [lr_at(epoch, config, 1.0) for epoch in (49.9, 50, 79.9, 80)] == [1.0, 0.5, 0.5, 0.25]


def test_weight_decay_spares_what_the_official_code_spares() -> None:
    """Biases, norms, layer scale and the class token; the mask token and the position table decay."""
    config = parse("--model simmim_vit_tiny_patch4 --input_size 16")
    model = build(config).model
    names = {id(value): name for name, value in model.named_parameters()}
    plain, decayed = (
        [names[id(value)] for value in group["params"]] for group in make_optimizer(model, config, 1.0).param_groups
    )
    assert "encoder.cls_token" in plain
    assert {"encoder.mask_token", "encoder.rel_pos_bias.relative_position_bias_table"} <= set(decayed)
    assert all(name.endswith(("bias", "gamma_1", "gamma_2", "cls_token")) or ".norm" in name for name in plain)
    assert len(plain) + len(decayed) == len(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model mae_vit_tiny_patch4", "--model must be one of simmim_vit_tiny_patch4"),
        ("--input_size 100", "--input_size must be divisible by the patch size 16"),
        ("--drop_path 1", r"--drop_path must be in \[0, 1\), got 1.0"),
        ("--layer_scale_init_value -1", "--layer_scale_init_value must be 0 or more"),
        ("--lr_milestones 0.5,2", "--lr_milestones must be shares of the run"),
        ("--lr_milestones half", "--lr_milestones must be shares of the run"),
        ("--warmup_start 2", "--warmup_start must be between 0 and 1"),
        ("--mask_unit 0", "--mask_unit must be 1 or more"),
        ("--interpolation nearest", "invalid choice: 'nearest'"),
    ],
)
def test_bad_flags_are_named(words: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse(words)


def test_command_line(tmp_path: Path) -> None:
    """One line on stderr and exit code 2 where units do not fit the grid."""
    run = run_module(f"simmim_evolved.main_simmim --input_size 208 --mask official --output_dir {tmp_path}")
    assert run.returncode == 2
    assert run.stderr.startswith("main_simmim: error: --mask_unit 2 does not divide the patch grid 13x13")
    assert run.stderr.count("\n") == 1


def test_recipes_parse() -> None:
    for recipe in sorted(RECIPES.glob("*.toml")):
        parse(f"--config {recipe} --data_path images")
