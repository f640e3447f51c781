"""Counts, grid classes, block-wise masks, and the forms models take masks in."""

from decimal import ROUND_FLOOR, Decimal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.masks import (
    BLOCK_ATTEMPTS,
    BLOCK_DRAWS,
    block_masks,
    check_mask,
    count_masked,
    grid_classes,
    mae_ids,
    masked_places,
    pixel_mask,
    share_of_masked,
)

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100)


# --- How many are masked ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "ratio", "expected"),
    [
        (100, 0.29, 29),  # 100 * 0.29 is 28.999999999999996 in floating point
        (100, 0.57, 57),
        (100, 0.58, 58),
        (10, 0.7, 7),
        (1000, 0.001, 1),
        (196, 0.75, 147),
        (196, 0.6, 117),
        (196, 0.4, 78),
        (196, np.float64(0.75), 147),
    ],
)
def test_count_masked_values(patches, ratio, expected):
    """floor(N r) of the decimal number that was written."""
    assert count_masked(patches, ratio) == expected


@SETTINGS
@given(st.integers(2, 5000), st.integers(1, 9999))
def test_count_masked_is_exact(patches, ten_thousandths):
    """Equal to exact decimal arithmetic for every ratio of up to four digits."""
    ratio = f"0.{ten_thousandths:04d}"
    expected = int((patches * Decimal(ratio)).to_integral_value(rounding=ROUND_FLOOR))
    if expected == 0:
        with pytest.raises(ValueError, match="mask_ratio"):
            count_masked(patches, float(ratio))
    else:
        assert count_masked(patches, float(ratio)) == expected


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, float("nan"), float("inf"), 1e-9])
def test_count_masked_refuses(ratio):
    """Ratios outside (0, 1), and those that mask nothing, are refused by name."""
    with pytest.raises(ValueError, match="mask_ratio"):
        count_masked(196, ratio)


def test_count_masked_keeps_one_and_masks_one():
    """Two patches have one answer, a single patch has none."""
    assert count_masked(2, 0.99) == 1
    with pytest.raises(ValueError, match="at least one must be masked"):
        count_masked(1, 0.5)


def test_check_mask_names_the_image():
    """A mask within the contract passes; one with a wrong row is refused, naming the row and its count."""
    mask = torch.tensor([[True, False, True], [True, False, False]])
    check_mask(mask[:1], 2)
    with pytest.raises(ValueError, match="image 1 has 1 masked patches, not 2"):
        check_mask(mask, 2)


@pytest.mark.parametrize("mask", [torch.ones(2, 4), torch.ones(4, dtype=torch.bool), torch.ones(1, 2, 2, dtype=torch.bool)])
def test_check_mask_refuses_other_tensors(mask):
    """Only bool [B, N] is a mask."""
    with pytest.raises(ValueError, match="a mask is bool"):
        check_mask(mask, 4)


# --- The grid ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(14, 14), (3, 5), (1, 7), (5, 1), (1, 1), (2, 3)])
def test_grid_classes_by_row_and_column_parity(height, width):
    """r(i) = 2 (row mod 2) + (column mod 2), on odd widths too."""
    expected = [2 * (i // width % 2) + i % width % 2 for i in range(height * width)]
    assert grid_classes(height, width).tolist() == expected


def test_grid_classes_equal_the_paper_on_even_widths():
    """Eq. 17 as printed, (i // W mod 2) * 2 + i mod 2, wherever W is even."""
    index = np.arange(6 * 8)
    assert grid_classes(6, 8).tolist() == (index // 8 % 2 * 2 + index % 2).tolist()


# --- Blocks -----------------------------------------------------------------------------------------------------


def block_uniforms(seed, batch, patches):
    return torch.rand(batch, BLOCK_ATTEMPTS * BLOCK_DRAWS + patches, generator=torch.Generator().manual_seed(seed))


def same_neighbours(mask, height, width):
    """Pairs of horizontal and vertical neighbours that are both masked or both visible, mean over images."""
    grid = mask.reshape(-1, height, width)
    down, across = grid[:, 1:] == grid[:, :-1], grid[:, :, 1:] == grid[:, :, :-1]
    return (down.sum() + across.sum()).item() / len(mask)


def random_masks(seed, batch, patches, masked):
    order = torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < masked


@SETTINGS
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 80), st.integers(0, 2**32 - 1))
def test_block_masks_have_the_exact_count(height, width, masked, seed):
    """Any grid and count, up to all patches: bool [B, N] with the exact count."""
    masked = masked % (height * width + 1)
    check_mask(block_masks(height, width, masked, block_uniforms(seed, 3, height * width)), masked)


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_block_masks_at_the_ends_of_the_uniform_law(extreme):
    """Draws of all 0 and all just below 1 place no rectangle outside the grid and keep the count."""
    uniforms = torch.full((2, BLOCK_ATTEMPTS * BLOCK_DRAWS + 12 * 10), extreme)
    check_mask(block_masks(12, 10, 70, uniforms), 70)


@pytest.mark.parametrize("masked", [75, 117, 147])
def test_block_masks_are_blocky(masked):
    """Masks of 14x14 have far more equal neighbours than random masks of the same count (seed 0)."""
    blocks = same_neighbours(block_masks(14, 14, masked, block_uniforms(0, 64, 196)), 14, 14)
    scattered = same_neighbours(random_masks(0, 64, 196, masked), 14, 14)
    most = 2 * 14 * 13
    assert most - blocks < 0.6 * (most - scattered)


def test_block_masks_cover_the_grid():
    """Over 4000 images (seed 1) every cell is masked at times and visible at times, the corners least, no side favoured."""
    share = block_masks(14, 14, 75, block_uniforms(1, 4000, 196)).double().mean(dim=0)
    assert share.mean().item() == pytest.approx(75 / 196)
    assert share.min() > 0.03
    assert share.max() < 0.8
    symmetric = share.reshape(14, 14)
    for mirrored in (symmetric.flip(0), symmetric.flip(1)):
        assert (symmetric - mirrored).abs().max() < 0.06  # more than 5 standard errors of the difference of two shares


def test_block_mask_is_one_rectangle_when_the_first_takes_all():
    """A first rectangle of the whole missing area (12 x 9 on 14 x 14, aspect 4/3) is the mask, where it was placed."""
    uniforms = torch.zeros(1, BLOCK_ATTEMPTS * BLOCK_DRAWS + 196)
    aspect = 0.5 * (1 - np.log(12 / 9) / np.log(0.3))
    uniforms[0, :BLOCK_DRAWS] = torch.tensor([1 - 1e-6, aspect, 0.5, 0.5])
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[1:13, 3:12] = True  # top = floor(0.5 * 3), left = floor(0.5 * 6)
    assert torch.equal(block_masks(14, 14, 108, uniforms)[0].reshape(14, 14), expected)


def test_block_masks_fill_up_where_neighbours_are_masked():
    """After 12 x 9 of 110, rectangles of 16 bring too much: the last 2 go where most of the cells around are masked.

    Along the edge of the grid that is half of the 6 cells around, elsewhere 3 of 9; the filling draws choose there.
    """
    uniforms = torch.zeros(1, BLOCK_ATTEMPTS * BLOCK_DRAWS + 196)
    uniforms[0, :BLOCK_DRAWS] = torch.tensor([1 - 0.02, 0.5 * (1 - np.log(12 / 9) / np.log(0.3)), 0.5, 0.5])
    filling = uniforms[:, BLOCK_ATTEMPTS * BLOCK_DRAWS :].reshape(14, 14)
    filling[7, 2] = filling[0, 2] = 0.99  # 3 of 9, and 1 of 6
    filling[13, 5], filling[0, 10] = 0.6, 0.5
    expected = torch.zeros(14, 14, dtype=torch.bool)
    expected[1:13, 3:12] = expected[13, 5] = expected[0, 10] = True
    assert torch.equal(block_masks(14, 14, 110, uniforms)[0].reshape(14, 14), expected)


def test_block_masks_place_no_rectangle_that_brings_too_much():
    """3 x 3 drawn for 7 missing patches would be 2 too many: it is not placed, and the filling draws choose all 7."""
    uniforms = torch.zeros(1, BLOCK_ATTEMPTS * BLOCK_DRAWS + 196)
    uniforms[0, :BLOCK_DRAWS] = torch.tensor([1 - 2**-24, 0.5, 0.5, 0.5])
    chosen = torch.tensor([0, 13, 30, 60, 100, 150, 195])
    uniforms[0, BLOCK_ATTEMPTS * BLOCK_DRAWS + chosen] = 0.9
    assert block_masks(14, 14, 7, uniforms)[0].nonzero()[:, 0].tolist() == chosen.tolist()


def test_block_masks_on_a_grid_too_small_for_rectangles_are_random():
    """On 2x2 no rectangle fits, and the one masked cell is each cell alike (chi-square, seed 3)."""
    counts = block_masks(2, 2, 1, block_uniforms(3, 4000, 4)).sum(dim=0)
    assert stats.chisquare(counts).pvalue > 1e-3


# --- The forms models take --------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(1, 5), st.integers(2, 30), st.integers(1, 29), st.integers(0, 2**32 - 1))
def test_mae_ids_gather_and_restore(batch, patches, masked, seed):
    """ids_keep are the visible patches in raster order; ids_restore undoes (visible, masked) back to raster order."""
    masked = min(masked, patches - 1)
    mask = random_masks(seed, batch, patches, masked)
    keep, restore = mae_ids(mask)
    for row in range(batch):
        visible, hidden = (~mask[row]).nonzero()[:, 0], mask[row].nonzero()[:, 0]
        assert keep[row].tolist() == visible.tolist()
        assert torch.cat([visible, hidden])[restore[row]].tolist() == list(range(patches))


def test_mae_ids_give_the_official_mask():
    """MAE builds its float mask as ones with zeros in front, gathered by ids_restore: that is the contract mask."""
    mask = random_masks(4, 3, 16, 12)
    keep, restore = mae_ids(mask)
    official = torch.ones(3, 16)
    official[:, : keep.shape[1]] = 0
    assert torch.equal(official.gather(1, restore).bool(), mask)


@pytest.mark.parametrize(("height", "width", "patch"), [(2, 3, 4), (3, 1, 2), (4, 4, 1)])
def test_pixel_mask(height, width, patch):
    """Pixel (y, x) is masked as patch (y // p, x // p)."""
    mask = random_masks(5, 2, height * width, 2)
    pixels = pixel_mask(mask, height, width, patch)
    expected = np.kron(mask.reshape(2, height, width).numpy(), np.ones((1, patch, patch), dtype=bool))
    assert pixels.dtype == torch.bool
    assert np.array_equal(pixels.numpy(), expected)


@pytest.mark.parametrize(("counts", "length"), [((5, 5, 5), 5), ((3, 0, 17), 32), ((1, 2, 40), 40), ((0, 0, 0), 0)])
def test_masked_places(counts, length):
    """In raster order, each image's own; rows of uneven counts are filled up with visible patches, to a multiple of 16."""
    mask = torch.zeros(3, 40, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for image, count in enumerate(counts):
        mask[image, torch.randperm(40, generator=generator)[:count]] = True
    places, real = masked_places(mask)
    assert places.shape == (3, length)
    assert (real is None) == (len(set(counts)) == 1)
    for image, count in enumerate(counts):
        assert places[image, :count].tolist() == mask[image].nonzero()[:, 0].tolist()
        assert not mask[image, places[image, count:]].any()
        assert real is None or real[image].tolist() == [i < count for i in range(length)]


@pytest.mark.parametrize(("share", "count"), [(1.0, 10), (0.5, 5), (0.25, 2), (0.01, 1)])
def test_share_of_masked(share, count):
    """That many of the masked patches, those with the largest numbers; each with the same chance (2000 images, seed 0)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(2000, 24, dtype=torch.bool)
    mask[:, torch.randperm(24, generator=generator)[:10]] = True
    uniforms = torch.rand(2000, 24, generator=generator)
    chosen = share_of_masked(mask, share, uniforms)
    assert (chosen.sum(dim=1) == count).all()
    assert not (chosen & ~mask).any()
    assert (torch.where(chosen, uniforms, 2).amin(dim=1) >= torch.where(mask & ~chosen, uniforms, -1).amax(dim=1)).all()
    assert stats.chisquare(chosen.sum(dim=0)[mask[0]].numpy()).pvalue > 0.01 or share == 1
