"""Rules of other papers: each by values, against plain loops; and mask ratios drawn for each image."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.cited_masks import (
    INVERSE_BLOCK_DRAWS,
    inverse_block_masks,
    received_attention,
    semantic_probability,
    square_probability,
    squares_across,
)
from common.draws import Stream, hash_uniform
from common.evolved_mask import EvolvedMask, MaskConfig, check_for_encoder, select_masked
from common.masks import BLOCK_ATTEMPTS, BLOCK_DRAWS, block_masks, check_mask, mae_ids, unit_masks

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def uniforms(seed, *shape):
    return torch.rand(shape, generator=seeded(seed))


def masks_of(strategy, attention=None, grid=(5, 6), masked=20, epoch=0, ids=None, prefix=1, **options):
    ids = torch.arange(4 if attention is None else len(attention)) if ids is None else ids
    maker = EvolvedMask(
        grid, masked, 10, mask=strategy, seed=3, num_prefix_tokens=prefix, **{"num_parts": 5, "iterations": 3, **options}
    )
    maker.set_epoch(epoch)
    return maker(torch.arange(len(ids)), None if attention is None else lambda rows: attention[rows], ids)


# --- attn-high and attn-low -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "tokens"), [(1, 31), (3, 33), (0, 30)])
def test_received_attention_by_hand(prefix, tokens, random_attention):
    """From the class token where there are prefix tokens, else the mean over patches; heads and blocks averaged."""
    maps = [random_attention(seed, 3, tokens, heads=2).double().numpy() for seed in range(2)]
    received = received_attention([torch.from_numpy(one) for one in maps], prefix)
    for image, patch in itertools.product(range(3), range(30)):
        queries = range(1) if prefix else range(tokens)
        values = [one[image, head, query, prefix + patch] for one in maps for head in range(2) for query in queries]
        assert received[image, patch].item() == pytest.approx(np.mean(values), rel=1e-5)
    assert received.dtype == torch.float32


def test_received_attention_of_maps_without_heads(random_attention):
    """[B, T, T] is one head; negative scores count as 0, as in the patch graph."""
    scores = torch.randn(2, 1, 7, 7, generator=seeded(0))
    assert torch.equal(received_attention(scores[:, 0]), received_attention(scores))
    assert torch.equal(received_attention(scores), scores[:, 0, 0, 1:].clamp(min=0))


@pytest.mark.parametrize(
    ("attention", "message"),
    [(torch.zeros(2, 3, 4), "attention must be"), (torch.zeros(4, 4), "attention must be"), ([], "no attention")],
)
def test_received_attention_refuses(attention, message):
    """Maps of another shape, and none."""
    with pytest.raises(ValueError, match=message):
        received_attention(attention)


@pytest.mark.parametrize("epoch", [0, 7])
@pytest.mark.parametrize(("strategy", "descending"), [("attn-high", True), ("attn-low", False)])
def test_the_most_or_least_attended_are_masked(strategy, descending, epoch, random_attention):
    """The 20 patches that the class token attends to most (or least) over both heads, at every epoch."""
    attention = random_attention(1, 6, 31)
    made = masks_of(strategy, attention, epoch=epoch)
    ranked = attention[:, :, 0, 1:].mean(dim=1).argsort(dim=1, descending=descending)
    expected = [sorted(row[:20].tolist()) for row in ranked]
    assert [row.nonzero()[:, 0].tolist() for row in made.mask] == expected
    assert made.alpha == 1.0
    assert not made.skipped.any()


def test_patches_that_are_attended_alike_are_drawn():
    """Of 6 equal ones at the cut, each is masked as often as any other (4000 images, chi-square, seed 3)."""
    received = torch.tensor([5.0, 5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    attention = torch.zeros(4000, 1, 10, 10)
    attention[:, 0, 0, 1:] = received
    mask = masks_of("attn-high", attention, grid=(3, 3), masked=5).mask
    assert mask[:, :2].all()
    assert not mask[:, 8].any()
    counts = mask[:, 2:8].sum(dim=0).double().numpy()
    assert stats.chi2.sf(((counts - 2000) ** 2 / (4000 * 0.25)).sum() * 5 / 6, 5) > 1e-3


def test_what_ranking_needs(random_attention):
    """An attention function, maps of this grid, and no NaN, each missed by name."""
    with pytest.raises(ValueError, match="'attn-low' needs attention_fn"):
        masks_of("attn-low")
    with pytest.raises(ValueError, match=r"attention has 29 patch tokens.*5x6 = 30"):
        masks_of("attn-high", random_attention(0, 2, 30))
    broken = random_attention(0, 4, 31)
    broken[2, 0, 0, 4] = math.nan
    with pytest.raises(ValueError, match=r"the attention of image 2 has NaN"):
        masks_of("attn-high", broken)


# --- semantic ---------------------------------------------------------------------------------------------------


def semantic_by_loops(parts, part_draw, patch_draw, offset, masked, alpha):
    """SemMAE's schedule, one image and one part at a time."""
    patches, num_parts = len(parts), len(part_draw)
    members = [[i for i in range(patches) if parts[i] == k] for k in range(num_parts)]
    left, whole = masked, [0.0] * num_parts
    for k in sorted(range(num_parts), key=lambda k: -part_draw[k]):
        taken = min(left, len(members[k]))
        whole[k], left = taken / max(len(members[k]), 1), left - taken
    probability = np.zeros(patches)
    for k in range(num_parts):
        share = (1 - alpha) * masked / patches + alpha * whole[k]
        for rank, i in enumerate(sorted(members[k], key=lambda i: patch_draw[i])):
            probability[i] = share - (rank + offset[k]) / len(members[k])
    return probability


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_semantic_equals_plain_loops(alpha):
    """Empty parts, other counts for every image (12 images of 40 patches, up to 7 parts, seed 4)."""
    parts = torch.randint(7, (12, 40), generator=seeded(4))
    parts[parts == 3] = 2
    draws = [uniforms(5 + n, 12, size) for n, size in enumerate((7, 40, 7))]
    counts = torch.arange(5, 29, 2)
    made = semantic_probability(parts, *draws, counts, alpha)
    for image in range(12):
        numbers = [draw[image].double().numpy() for draw in draws]
        expected = semantic_by_loops(parts[image].tolist(), *numbers, int(counts[image]), alpha)
        np.testing.assert_allclose(made[image], expected, atol=1e-5)
    assert torch.equal(
        semantic_probability(parts, *draws, 20, alpha), semantic_probability(parts, *draws, torch.full((12,), 20), alpha)
    )


def semantic_masks(epoch, images=400):
    """Masks and parts of many images whose 6 planted parts have 1 to 16 patches; alpha = 0 at epoch 0, 1 at epoch 10."""
    planted = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 2, 3, 4, 5, 15]))
    inside = (planted[:, None] == planted).float()
    attention = (inside / inside.sum(dim=1, keepdim=True)).expand(images, 1, 30, 30)
    options = {"num_parts": 6, "covariance_floor": 1e-3, "start": "greedy"}
    return masks_of("semantic", attention, masked=20, epoch=epoch, prefix=0, **options)


def test_semantic_begins_with_a_share_of_every_part():
    """At alpha = 0 each part has 2/3 of its patches masked but for the rounding of 6 parts; on average 2/3 whatever its size."""
    made = semantic_masks(0)
    for part in range(6):
        members = made.parts == part
        masked, size = (made.mask & members).sum(dim=1).double(), members.sum(dim=1).double()
        assert ((masked - 2 / 3 * size).abs() <= 1 + 6 * size / 30).all()
    shares = [made.mask[:, place].double().mean().item() for place in range(30)]
    assert max(abs(share - 2 / 3) for share in shares) < 5 * math.sqrt(2 / 9 / 400)


def test_semantic_ends_with_whole_parts():
    """At alpha = 1 at most one part of an image is masked in part, and it is the last by the draws of the parts."""
    made = semantic_masks(10)
    draws = hash_uniform(3, 10, torch.arange(400), Stream.PARTS, 6)
    for image in range(400):
        shares = [made.mask[image][made.parts[image] == k].double().mean().item() for k in range(6)]
        used = [k for k in range(6) if not math.isnan(shares[k])]
        ranked = [shares[k] for k in sorted(used, key=lambda k: -draws[image, k])]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(0 < share < 1 for share in ranked) <= 1


def test_semantic_moves_between_them():
    """The spread of the masked shares of an image's parts grows from epoch to epoch."""
    spreads = []
    for epoch in (0, 5, 8, 10):
        made = semantic_masks(epoch, 100)
        members = torch.nn.functional.one_hot(made.parts, 6).double()
        sizes = members.sum(dim=1)
        share = (members * made.mask[..., None]).sum(dim=1) / sizes
        spreads.append(((sizes * (share - 2 / 3) ** 2).sum(dim=1) / 30).mean().item())
    assert spreads == sorted(spreads)
    assert spreads[-1] > 4 * spreads[0]


# --- inverse-block ----------------------------------------------------------------------------------------------


def inverse_block_by_hand(height, width, visible, numbers):
    """The visible patches, one at a time."""
    aspect = 0.5 ** (1 - 2 * numbers[0])
    tall = round(math.sqrt(visible * aspect))
    tall = max(1, min(max(tall, math.ceil(visible / width)), height, visible))
    wide = math.ceil(visible / tall)
    cells = [(row, column) for column in range(wide) for row in range(tall)][:visible]  # column by column: the last one is short
    corner, top, left = int(numbers[3] * 4), int(numbers[1] * height), int(numbers[2] * width)
    if corner % 2:
        cells = [(tall - 1 - row, column) for row, column in cells]
    if corner // 2:
        cells = [(row, wide - 1 - column) for row, column in cells]
    return {((row + top) % height) * width + (column + left) % width for row, column in cells}


@SETTINGS
@given(st.integers(1, 12), st.integers(1, 12), st.data(), st.integers(0, 2**32 - 1))
def test_inverse_block_by_hand(height, width, data, seed):
    """Any grid and count: the visible patches are those of one rectangle, short at a corner, rolled over the edges."""
    masked = data.draw(st.integers(0, height * width - 1))
    numbers = uniforms(seed, 3, INVERSE_BLOCK_DRAWS)
    masks = inverse_block_masks(height, width, masked, numbers)
    for mask, row in zip(masks, numbers.tolist(), strict=True):
        expected = inverse_block_by_hand(height, width, height * width - masked, row)
        assert set((~mask).nonzero()[:, 0].tolist()) == expected
        assert len(expected) == height * width - masked


def test_the_roll_shows_every_patch_alike():
    """Over all places of one block each patch of 5 x 6 is visible equally often; blocks run over the edges."""
    places = torch.tensor(list(itertools.product(range(5), range(6)))).float()
    numbers = torch.stack([torch.full((30,), 0.4), (places[:, 0] + 0.5) / 5, (places[:, 1] + 0.5) / 6, torch.zeros(30)], dim=1)
    masks = inverse_block_masks(5, 6, 20, numbers)
    assert (~masks).sum(dim=0).tolist() == [10] * 30
    assert any({0, 5} <= set((~mask).reshape(5, 6).any(dim=0).nonzero()[:, 0].tolist()) for mask in masks)


def test_inverse_block_is_the_strategy():
    """The masks of the call are those of the BLOCK draws, at every epoch."""
    for epoch in (0, 6):
        drawn = hash_uniform(3, epoch, torch.arange(4), Stream.BLOCK, INVERSE_BLOCK_DRAWS)
        assert torch.equal(masks_of("inverse-block", epoch=epoch).mask, inverse_block_masks(5, 6, 20, drawn))


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_inverse_block_at_the_ends_of_the_uniform_law(extreme):
    """Draws of all 0 and all just below 1 keep the count."""
    check_mask(inverse_block_masks(14, 14, 127, torch.full((2, INVERSE_BLOCK_DRAWS), extreme)), 127)


# --- squares ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "unit"), [((5, 7), 2), ((5, 7), 4), ((6, 6), 3), ((3, 4), 9), ((4, 5), 1)])
def test_squares_by_hand(grid, unit):
    """Patch (r, c) has the number of square (r // u, c // u), also where the last squares are cut off."""
    height, width = grid
    across = squares_across(width, unit)
    assert across == len({column // unit for column in range(width)})
    numbers = uniforms(6, 2, squares_across(height, unit) * across)
    made = square_probability(height, width, unit, numbers)
    for row, column in itertools.product(range(height), range(width)):
        expected = numbers[:, row // unit * across + column // unit]
        assert torch.equal(made[:, row * width + column], expected)


def test_squares_are_random_units_where_those_exist():
    """Squares that fill the grid and a count of whole squares: the masks of random-units from the same numbers."""
    numbers = uniforms(7, 50, 12)
    units = unit_masks(6, 8, 24, 2, numbers)
    assert torch.equal(select_masked(square_probability(6, 8, 2, numbers), 24, seeded(0)), units)
    ids = torch.arange(50)
    masks = {name: masks_of(name, grid=(6, 8), masked=24, ids=ids).mask for name in ("squares", "random-units")}
    assert torch.equal(masks["squares"], masks["random-units"])


def test_squares_take_any_count_and_grid():
    """7 x 5 patches and 17 masked in squares of 3: at most one square is masked in part."""
    mask = masks_of("squares", grid=(7, 5), masked=17, mask_unit=3, ids=torch.arange(60)).mask.reshape(60, 7, 5)
    check_mask(mask.flatten(1), 17)
    for image in mask:
        shares = [image[r : r + 3, c : c + 3].double().mean().item() for r in range(0, 7, 3) for c in range(0, 5, 3)]
        assert sum(0 < share < 1 for share in shares) <= 1


# --- A mask ratio for each image --------------------------------------------------------------------------------

RANGED = (
    "evolved",
    "part",
    "grid",
    "random",
    "block",
    "grid-to-block",
    "attn-high",
    "attn-low",
    "semantic",
    "inverse-block",
    "squares",
)


@pytest.mark.parametrize("epoch", [0, 4, 10])
@pytest.mark.parametrize("strategy", RANGED)
def test_counts_are_drawn_for_each_image(strategy, epoch, random_attention):
    """By (seed, epoch, id) alone: floor(30 * 0.3) = 9 to floor(30 * 0.8) = 24, with and without the other images of the batch."""
    attention, ids = random_attention(2, 12, 31), torch.arange(12) * 5
    made = masks_of(strategy, attention, epoch=epoch, ids=ids, mask_ratio_range="0.3,0.8")
    drawn = hash_uniform(3, epoch, ids, Stream.RATIO, 1)[:, 0]
    expected = 9 + (drawn * 16).long()
    check_mask(made.mask, expected)
    assert len(expected.unique()) > 3
    alone = masks_of(strategy, attention[4:6], epoch=epoch, ids=ids[4:6], mask_ratio_range="0.3,0.8")
    assert torch.equal(alone.mask, made.mask[4:6])


@pytest.mark.parametrize("strategy", RANGED)
def test_a_range_of_one_ratio_is_that_ratio(strategy, random_attention):
    """LOW = HIGH gives the masks of the plain count, to the bit."""
    attention = random_attention(3, 8, 31)
    plain = masks_of(strategy, attention, masked=18, epoch=6)
    assert torch.equal(masks_of(strategy, attention, epoch=6, mask_ratio_range="0.6,0.6").mask, plain.mask)


def test_every_count_is_drawn_alike():
    """15 to 27 of 30 patches, 13 numbers (5200 images, chi-square, seed 3)."""
    counts = masks_of("random", ids=torch.arange(5200), mask_ratio_range="0.5,0.9").mask.sum(dim=1)
    assert (counts.min(), counts.max()) == (15, 27)
    assert stats.chisquare(np.bincount(counts - 15)).pvalue > 1e-3


@pytest.mark.parametrize("with_ids", [True, False])
def test_one_count_a_batch(with_ids, random_attention):
    """ratio_draw batch: the images of a batch have one number, that of the first one's draw, and MAE can gather them."""
    maker = EvolvedMask((5, 6), 20, 40, mask="random", seed=3, mask_ratio_range="0.3,0.8", ratio_draw="batch")
    seen = set()
    for epoch in range(30):
        maker.set_epoch(epoch)
        mask = maker(torch.arange(6), None, torch.arange(6) if with_ids else None).mask
        keep, _ = mae_ids(mask)
        seen.add(30 - keep.shape[1])
        if with_ids:
            assert 30 - keep.shape[1] == 9 + int(hash_uniform(3, epoch, torch.arange(1), Stream.RATIO, 1)[0, 0] * 16)
    assert len(seen) > 5
    assert 9 <= min(seen) <= max(seen) <= 24


def test_shortcut_changes_no_mask_of_any_count(random_attention):
    """Counts that are whole grid classes for some images only: the same masks with and without the shortcut."""
    attention, spared = random_attention(4, 40, 31), 0
    for epoch in (1, 2, 4):
        options = {"epoch": epoch, "mask_ratio_range": "0.3,0.8"}
        fast, slow = (masks_of("evolved", attention, shortcut=shortcut, **options) for shortcut in (True, False))
        assert torch.equal(fast.mask, slow.mask)
        spared += fast.skipped.sum().item()
    assert 0 < spared < 60


def test_blocks_of_any_count():
    """block_masks with a number for each image are those of each number alone (seed 8)."""
    numbers = uniforms(8, 20, BLOCK_ATTEMPTS * BLOCK_DRAWS + 9 * 8)
    counts = torch.arange(10, 70, 3)
    masks = block_masks(9, 8, counts, numbers)
    for image, count in enumerate(counts.tolist()):
        assert torch.equal(masks[image : image + 1], block_masks(9, 8, count, numbers[image : image + 1]))


@pytest.mark.parametrize("strategy", ["random-units", "block-official"])
def test_counts_that_a_strategy_cannot_make(strategy):
    """Whole units, and a rule that falls short, have no range."""
    with pytest.raises(ValueError, match=f"mask_ratio_range draws numbers of patches that mask '{strategy}' cannot all make"):
        EvolvedMask((6, 6), 20, 10, mask=strategy, mask_ratio_range="0.5,0.7")


def test_models_that_need_even_counts():
    """Refused with a way out where each image has its own number, taken with one a batch; the count in words."""
    ranged = MaskConfig(mask_ratio_range="0.6,0.9")
    encoder = {"depth": 12, "grid_size": (14, 14), "num_masked": 147}
    with pytest.raises(ValueError, match=r"^mask_ratio_range masks another number .* add ratio_draw batch"):
        check_for_encoder(ranged, **encoder, even_counts=True)
    check_for_encoder(ranged, **encoder)
    check_for_encoder(MaskConfig(mask_ratio_range="0.6,0.9", ratio_draw="batch"), **encoder, even_counts=True)
    assert EvolvedMask((14, 14), 147, 10, ranged).describe_count() == "117 to 176"
    assert EvolvedMask((14, 14), 147, 10).describe_count() == "147"
    assert EvolvedMask((14, 14), 75, 10, mask="block-official").describe_count() == "at most 75"


def test_states_from_before_the_range_go_on():
    """Without the options a saved state means none; with a range it is named."""
    state = EvolvedMask((6, 6), 20, 10, num_parts=5).state_dict()
    for name in ("mask_ratio_range", "ratio_draw"):
        del state["config"][name]
    EvolvedMask((6, 6), 20, 10, num_parts=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"mask_ratio_range None -> '0\.5,0\.7'"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, mask_ratio_range="0.5,0.7").load_state_dict(state)
