"""SimMIM's units and BEiT's own block rule, against plain loops; and what `official` stands for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from beit_evolved.run_beit_pretraining import BEiTConfig
from common.evolved_mask import EvolvedMask
from common.mask_config import MaskConfig
from common.masks import BLOCK_DRAWS, count_masked_units, mae_ids, official_block_draws, official_block_masks, unit_masks
from common.training.command_line import parse_arguments
from common.training.errors import BadInput
from mae_evolved import main_pretrain
from mae_evolved.main_pretrain import MAEConfig
from simmim_evolved.main_simmim import SimMIMConfig

IDS = torch.arange(400)


def blocks_by_loops(height: int, width: int, most: int, numbers: list[float]) -> set[tuple[int, int]]:
    """BEiT's rule, one image and one patch at a time, in the arithmetic of the batched one (float32)."""
    covered: set[tuple[int, int]] = set()
    position = failures = 0
    while failures < 10 and len(covered) < most:
        area, aspect, top, left = torch.tensor(numbers[position : position + BLOCK_DRAWS]).unbind()
        position += BLOCK_DRAWS
        missing = most - len(covered)
        size = (16 + (missing - 16) * area).clamp(min=1)
        ratio = torch.exp(math.log(0.3) * (1 - 2 * aspect))
        tall, wide = round(float((size * ratio).sqrt())), round(float((size / ratio).sqrt()))
        failures += 1
        if not (0 < tall < height and 0 < wide < width):
            continue
        first_row, first_column = int(top * (height - tall + 1)), int(left * (width - wide + 1))
        block = {(first_row + row, first_column + column) for row in range(tall) for column in range(wide)}
        if 0 < len(block - covered) <= missing:
            covered |= block
            failures = 0
    return covered


@pytest.mark.parametrize("grid", [(14, 14), (9, 15)])
def test_official_blocks_equal_plain_loops(grid: tuple[int, int]) -> None:
    height, width = grid
    uniforms = torch.rand(60, official_block_draws(40), generator=torch.Generator().manual_seed(1))
    masks = official_block_masks(height, width, 40, uniforms)
    for mask, numbers in zip(masks, uniforms.tolist(), strict=True):
        wanted = blocks_by_loops(height, width, 40, numbers)
        assert {divmod(int(place), width) for place in mask.nonzero()[:, 0]} == wanted


def test_official_blocks_stay_below_the_count() -> None:
    """At most 75, often fewer, never far off; an exact-count strategy beside it always has 75."""
    made = EvolvedMask((14, 14), 75, 10, mask="block-official")(IDS, None, IDS)
    counts = made.mask.sum(dim=1)
    assert counts.max() == 75
    assert 0.02 < (counts < 75).double().mean() < 0.9
    assert counts.double().mean() > 65
    assert (EvolvedMask((14, 14), 75, 10, mask="block")(IDS, None, IDS).mask.sum(dim=1) == 75).all()


def test_units_are_whole_and_uniform() -> None:
    """30 of 49 squares of 2x2 patches; each square is masked equally often."""
    made = EvolvedMask((14, 14), 120, 10, mask="random-units")(IDS, None, IDS)
    squares = made.mask.reshape(-1, 7, 2, 7, 2)
    first = squares[:, :, :1, :, :1]
    assert (squares == first).all()
    units = first.flatten(1)
    assert (units.sum(dim=1) == 30).all()
    share = units.double().mean(dim=0)
    assert ((share - 30 / 49).abs() < 5 * math.sqrt(0.25 / len(IDS))).all()
    assert len({tuple(row) for row in units.int().tolist()}) == len(IDS)


@settings(max_examples=40, deadline=None)
@given(some.integers(1, 5), some.integers(1, 5), some.integers(1, 4), some.floats(0.01, 0.99))
def test_unit_count_is_the_official_one(down: int, across: int, unit: int, ratio: float) -> None:
    """ceil(units * ratio) units on any grid they fill; masks have exactly that many patches."""
    units = down * across
    masked = math.ceil(units * ratio)
    if masked == units:
        with pytest.raises(ValueError, match="at least one must be kept"):
            count_masked_units(down * unit, across * unit, ratio, unit)
        return
    count = count_masked_units(down * unit, across * unit, ratio, unit)
    assert count == masked * unit**2
    made = unit_masks(down * unit, across * unit, count, unit, torch.rand(3, units))
    assert (made.sum(dim=1) == count).all()


@pytest.mark.parametrize("strategy", ["random-units", "block-official"])
def test_masks_belong_to_the_image(strategy: str) -> None:
    """The same image has the same mask in any batch, another one in another epoch."""
    mask = EvolvedMask((14, 14), 120, 10, mask=strategy)
    whole = mask(IDS, None, IDS).mask
    assert torch.equal(mask(IDS[:5], None, torch.tensor([7, 3, 399, 0, 12])).mask, whole[[7, 3, 399, 0, 12]])
    mask.set_epoch(1)
    assert not torch.equal(mask(IDS, None, IDS).mask, whole)


def test_what_cannot_be_made_is_refused() -> None:
    for options, size, count, words in (
        ({"mask": "official"}, (14, 14), 75, "stands for a method's own strategy"),
        ({"mask": "random-units"}, (13, 14), 52, "mask_unit 2 does not divide the patch grid 13x14"),
        ({"mask": "random-units"}, (14, 14), 117, "117 is not a multiple of the 4 patches"),
        ({"mask": "block-official"}, (4, 4), 8, "needs 16 masked patches or more"),
    ):
        with pytest.raises(ValueError, match=words):
            EvolvedMask(size, count, 10, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask_unit must be 1 or more, got 0"):
        MaskConfig(mask_unit=0)
    with pytest.raises(ValueError, match=r"mask_ratio must be inside \(0, 1\)"):
        count_masked_units(14, 14, 1.0, 2)
    with pytest.raises(ValueError, match="not a multiple"):
        unit_masks(4, 4, 6, 2, torch.rand(1, 4))


def test_mae_refuses_uneven_masks() -> None:
    """In the trainer by name, before anything is built, and in the form that MAE gathers by."""
    uneven = torch.tensor([[True, False, True], [True, False, False]])
    with pytest.raises(ValueError, match="same number of masked patches in every image, got 1 to 2"):
        mae_ids(uneven)
    with pytest.raises(BadInput, match="--mask block-official may mask fewer patches in some images"):
        main_pretrain.main(["--mask", "block-official", "--dataset", "photos", "--device", "cpu"])


@pytest.mark.parametrize(
    ("config", "needed", "strategy", "count"),
    [
        (MAEConfig, "", "random", 147),
        (BEiTConfig, "--tokenizer somewhere", "block-official", 75),
        (SimMIMConfig, "", "random-units", 120),
    ],
)
def test_official_is_each_methods_own(config: type[MAEConfig], needed: str, strategy: str, count: int) -> None:
    """--mask official, and the counts of the official recipes at 14x14."""
    flags, mask = parse_arguments(config, "program", "", f"--mask official {needed}".split())
    assert mask.mask == strategy
    assert mask.count_masked(flags.grid_size, flags.mask_ratio) == count
    evolved = parse_arguments(config, "program", "", needed.split())[1]
    assert evolved.count_masked((14, 14), flags.mask_ratio) == {120: 117}.get(count, count)
