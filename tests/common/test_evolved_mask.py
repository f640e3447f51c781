"""The front door: schedule, probabilities, the cut at m, and EvolvedMask with all strategies."""

import io
import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from common.draws import Stream, hash_uniform
from common.evolved_mask import (
    EvolvedMask,
    MaskConfig,
    alpha_at,
    blend,
    check_for_encoder,
    grid_probability,
    num_parts_at,
    part_probability,
    select_masked,
)
from common.mask_config import FORMER_DEFAULTS
from common.masks import BLOCK_ATTEMPTS, BLOCK_DRAWS, block_masks, check_mask, grid_classes

pytestmark = pytest.mark.filterwarnings("ignore:set_epoch was never called")  # most tests here look at one epoch

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)
BLENDED = ("evolved", "part", "grid", "random", "block", "grid-to-block")
RANKED = ("attn-high", "attn-low")  # decided by the attention alone, but for ties
STRATEGIES = (*BLENDED, "semantic", "inverse-block", "squares", *RANKED)
FROM_MODEL = ("evolved", "part", "semantic", *RANKED)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Encoder:
    """Stands for a model: image number -> its attention, remembering which images it was asked for."""

    def __init__(self, attention):
        self.attention, self.asked = attention, []

    def __call__(self, images):
        self.asked.append(images.tolist())
        return self.attention[images]


@pytest.fixture(scope="module")
def small(random_attention):
    """Attention of 12 images of 5x7 patches (seed 0)."""
    return random_attention(0, 12, 36)


@pytest.fixture(scope="module")
def full(random_attention):
    """Attention of 8 images of 14x14 patches (seed 0)."""
    return random_attention(0, 8, 197, heads=1)


# --- The schedule (Eq. 4, Sec. 4.1) -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epoch", "total", "gamma", "alpha"),
    [
        (0, 200, 2, 0.0), (100, 200, 2, 0.25), (200, 200, 2, 1.0), (50, 200, 0.5, 0.5),
        (30, 40, 1, 0.75), (2.5, 10, 1, 0.25), (0, 1, 8, 0.0),
    ],
)  # fmt: skip
def test_alpha_at(epoch, total, gamma, alpha):
    """alpha = (t / T)^gamma."""
    assert alpha_at(epoch, total, gamma) == alpha


def test_gamma_is_two_by_default():
    """Table 2's best gamma is the default."""
    assert alpha_at(60, 200) == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("epoch", "total", "gamma"), [(-1, 10, 2), (11, 10, 2), (0, 0, 2), (math.nan, 10, 2), (1, 10, 0), (1, 10, -1)]
)
def test_alpha_at_refuses(epoch, total, gamma):
    """Epochs outside 0..T and gamma not above 0 raise, by name."""
    with pytest.raises(ValueError, match="epoch" if gamma == 2 else "gamma"):
        alpha_at(epoch, total, gamma)


@SETTINGS
@given(st.integers(1, 1000), st.data(), st.integers(1, 200), st.integers(1, 200))
def test_num_parts_at_is_linear_and_rounded(total, data, start, end):
    """The exact line from start to end in rational arithmetic, rounded to the nearest, half up."""
    epoch = data.draw(st.integers(0, total))
    line = start + Fraction(end - start) * epoch / total
    assert num_parts_at(epoch, total, start, end) == math.floor(line + Fraction(1, 2))


def test_num_parts_at_values():
    """40 -> 10 by default: both ends, the middle, and halves up."""
    assert [num_parts_at(t, 200) for t in (0, 100, 200)] == [40, 25, 10]
    assert [num_parts_at(t, 60) for t in (1, 3)] == [40, 39]  # 39.5 and 38.5


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((-1, 10), "epoch"), ((11, 10), "epoch"), ((0, 0), "epoch"), ((1, 10, 0, 5), "parts"), ((1, 10, 5, 0), "parts")],
)
def test_num_parts_at_refuses(arguments, named):
    """Epochs outside 0..T and numbers of parts below 1 raise, by name."""
    with pytest.raises(ValueError, match=named):
        num_parts_at(*arguments)


# --- The probabilities (Eq. 5, 6, 17, 18) -----------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(14, 14), (5, 7), (4, 3), (3, 2)])
def test_grid_probability(height, width):
    """One number for each parity of row and column, four of them, other ones for every image (seed 0)."""
    probability = grid_probability(3, height, width, seeded(0)).reshape(3, height, width)
    drawn = torch.rand(3, 4, generator=seeded(0))
    for r in range(height):
        for c in range(width):
            assert torch.equal(probability[:, r, c], drawn[:, 2 * (r % 2) + c % 2])
    assert len(probability.unique()) == 12


def test_part_probability():
    """One number for each part and image, given to all its patches (seed 1)."""
    parts = torch.tensor([[0, 2, 2, 1, 0], [1, 1, 1, 1, 3]])
    drawn = torch.rand(2, 4, generator=seeded(1))
    expected = [[drawn[i, k].item() for k in row] for i, row in enumerate(parts.tolist())]
    assert part_probability(parts, 4, seeded(1)).tolist() == expected


def test_blend():
    """(1 - alpha) P_grid + alpha P_part, exactly one of the two at the ends."""
    p_grid, p_part = torch.tensor([[0.25, 0.5, 0.1]]), torch.tensor([[0.75, 0.0, 0.3]])
    assert blend(p_grid, p_part, 0.5)[0, :2].tolist() == [0.5, 0.25]
    assert blend(p_grid, p_part, 0.25)[0, :2].tolist() == [0.375, 0.375]
    assert torch.equal(blend(p_grid, p_part, 0.0), p_grid)
    assert torch.equal(blend(p_grid, p_part, 1.0), p_part)


# --- The cut (Eq. 2-3) ------------------------------------------------------------------------------------------


def test_select_masked_by_hand():
    """The most probable patches are masked, by rank and not by size; none and all are possible too."""
    probability = torch.tensor([[0.1, 0.9, 0.5, 0.4], [-3.0, 1e30, -1e30, 0.0]])
    chosen = [select_masked(probability, m, seeded(0)).int().tolist() for m in range(5)]
    assert chosen == [
        [[0, 0, 0, 0], [0, 0, 0, 0]],
        [[0, 1, 0, 0], [0, 1, 0, 0]],
        [[0, 1, 1, 0], [0, 1, 0, 1]],
        [[0, 1, 1, 1], [1, 1, 0, 1]],
        [[1, 1, 1, 1], [1, 1, 1, 1]],
    ]


@SETTINGS
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 8), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_select_masked_masks_the_highest(batch, patches, values, masked, seed):
    """With many ties: the exact count, and no visible patch is more probable than a masked one."""
    masked = masked % (patches + 1)
    probability = torch.randint(values, (batch, patches), generator=seeded(seed)).float()
    mask = select_masked(probability, masked, seeded(seed))
    check_mask(mask, masked)
    lowest = probability.masked_fill(~mask, math.inf).amin(dim=1)
    assert (probability.masked_fill(mask, -math.inf).amax(dim=1) <= lowest).all()


def test_ties_are_broken_uniformly():
    """Of 6 equal patches at the cut each set of 3 is masked as often as any other (chi-square over 20 sets, seed 2)."""
    row = torch.tensor([0.5, 0.9, 0.5, 0.5, 0.1, 0.5, 0.5, 0.5, 0.9])
    mask = select_masked(row.repeat(10000, 1), 5, seeded(2))
    assert mask[:, [1, 8]].all()
    assert not mask[:, 4].any()
    sets = (mask[:, row == 0.5].long() * 2 ** torch.arange(6)).sum(dim=1)
    counts = np.bincount(sets, minlength=64)
    assert np.count_nonzero(counts) == math.comb(6, 3)
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-3


@pytest.mark.parametrize("masked", [-1, 5])
def test_select_masked_refuses(masked):
    """A count outside 0..N raises."""
    with pytest.raises(ValueError, match=f"num_masked must be between 0 and the 4 patches, got {masked}"):
        select_masked(torch.zeros(1, 4), masked, seeded(0))


# --- The contract, for every strategy ---------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@SETTINGS
@given(data=st.data())
def test_contract(strategy, data, random_attention):
    """Any grid, count, epoch and K, with and without ids: the exact count, parts in range or -1, `skipped` as it was."""
    height, width = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)).filter(lambda size: math.prod(size) > 1))
    patches, batch, epoch = height * width, data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    masked, parts = data.draw(st.integers(1, patches - 1)), data.draw(st.integers(1, patches))
    ids = data.draw(st.none() | st.lists(st.integers(0, 10**7), min_size=batch, max_size=batch).map(torch.tensor))
    shortcut, seed, unit = data.draw(st.booleans()), data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 8))
    encoder, options = (
        Encoder(random_attention(seed, batch, patches + 1)),
        {"iterations": 2, "shortcut": shortcut, "mask_unit": unit},
    )
    maker = EvolvedMask((height, width), masked, 9, mask=strategy, num_parts=parts, seed=seed, **options)
    maker.set_epoch(epoch)
    made = maker(torch.arange(batch), encoder, ids)

    check_mask(made.mask, masked)
    assert made.num_parts == parts
    assert made.skipped.dtype == torch.bool
    assert made.parts.shape == made.mask.shape
    assert (made.parts[made.skipped] == -1).all()
    if strategy in RANKED:
        assert (made.parts == -1).all()
    else:
        assert ((made.parts[~made.skipped] >= 0) & (made.parts[~made.skipped] < parts)).all()
    wanted = (~made.skipped).nonzero()[:, 0].tolist()
    assert encoder.asked == ([wanted] if wanted else [])
    if strategy not in FROM_MODEL:
        assert made.skipped.all()
    elif not shortcut or strategy != "evolved":
        assert not made.skipped.any()


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_global_random_state_is_left_alone(strategy, with_ids, small):
    """No draw comes from, or changes, torch's own random state, and no gradient is taken."""
    before, images = torch.get_rng_state(), torch.arange(12)
    attention = small.clone().requires_grad_()
    maker = EvolvedMask((5, 7), 20, 10, mask=strategy, num_parts=5, alpha=0.7)
    maker(images, Encoder(attention), images if with_ids else None)
    assert torch.equal(torch.get_rng_state(), before)
    assert attention.grad is None


# --- What is masked ---------------------------------------------------------------------------------------------


def expected_masks(maker, made, ids):
    """The masks of a batch from the published draws and the parts, image by image in numpy."""
    patches, alpha = maker.num_patches, maker.alpha
    drawn = {stream: hash_uniform(maker.seed, maker.epoch, ids, stream, count) for stream, count in (
        (Stream.GRID, 4), (Stream.PARTS, made.num_parts), (Stream.PATCHES, patches), (Stream.TIES, patches),
        (Stream.BLOCK, BLOCK_ATTEMPTS * BLOCK_DRAWS + patches),
    )}  # fmt: skip
    masks = np.zeros((len(ids), patches), dtype=bool)
    for image in range(len(ids)):
        grid = drawn[Stream.GRID][image][grid_classes(maker.height, maker.width)].numpy()
        if maker.config.mask in FROM_MODEL:
            second = drawn[Stream.PARTS][image].numpy()[made.parts[image].numpy()]
        elif "block" in maker.config.mask:
            second = block_masks(maker.height, maker.width, maker.num_masked, drawn[Stream.BLOCK])[image].float().numpy()
        else:
            second = drawn[Stream.PATCHES][image].numpy()
        probability = (1 - alpha) * grid + alpha * second
        masks[image, np.lexsort((drawn[Stream.TIES][image].numpy(), -probability))[: maker.num_masked]] = True
    return masks


@pytest.mark.parametrize("epoch", [0, 3, 6, 10])
@pytest.mark.parametrize("strategy", BLENDED)
def test_masks_follow_the_equations(strategy, epoch, small):
    """Eq. 2-6, 17 and 18 in numpy, from the published draws and the parts, give the same masks (seed 5)."""
    maker, ids = EvolvedMask((5, 7), 20, 10, mask=strategy, num_parts=6, seed=5, shortcut=False), torch.arange(12) * 1000
    maker.set_epoch(epoch)
    made = maker(torch.arange(12), Encoder(small), ids)
    assert np.array_equal(made.mask.numpy(), expected_masks(maker, made, ids))


@pytest.mark.parametrize(
    ("strategy", "options", "alphas"),
    [
        ("evolved", {}, [0.0, 0.25, 1.0]),
        ("evolved", {"gamma": 1.0}, [0.0, 0.5, 1.0]),
        ("evolved", {"alpha": 0.3}, [0.3, 0.3, 0.3]),
        ("evolved", {"alpha": 0.0}, [0.0, 0.0, 0.0]),
        ("part", {}, [1.0, 1.0, 1.0]),
        ("grid", {}, [0.0, 0.0, 0.0]),
        ("random", {}, [1.0, 1.0, 1.0]),
        ("block", {}, [1.0, 1.0, 1.0]),
        ("grid-to-block", {}, [0.0, 0.25, 1.0]),
        ("grid-to-block", {"gamma": 1.0}, [0.0, 0.5, 1.0]),
        ("semantic", {}, [0.0, 0.25, 1.0]),
        ("attn-high", {"alpha": 0.3}, [1.0, 1.0, 1.0]),
        ("inverse-block", {}, [1.0, 1.0, 1.0]),
        ("squares", {}, [1.0, 1.0, 1.0]),
    ],
)
def test_alpha_of_each_strategy(strategy, options, alphas, small):
    """At the first, middle and last epoch, as reported with the masks."""
    maker, measured = EvolvedMask((5, 7), 20, 10, mask=strategy, num_parts=4, **options), []
    for epoch in (0, 5, 10):
        maker.set_epoch(epoch)
        assert maker(torch.arange(2), Encoder(small)).alpha == maker.alpha
        measured.append(maker.alpha)
    assert measured == alphas


@pytest.mark.parametrize("shortcut", [True, False])
@pytest.mark.parametrize("strategy", ["evolved", "grid"])
def test_alpha_zero_masks_whole_grid_classes(strategy, shortcut, full):
    """MAE's 147 of 14x14 at alpha = 0: exactly three of the four classes, whole."""
    maker = EvolvedMask((14, 14), 147, 200, mask=strategy, iterations=1, shortcut=shortcut)
    maker.set_epoch(0)
    mask = maker(torch.arange(8), Encoder(full)).mask
    for image in mask:
        counts = [int(image[grid_classes(14, 14) == k].sum()) for k in range(4)]
        assert sorted(counts) == [0, 49, 49, 49]


@pytest.mark.parametrize(("masked", "whole", "rest"), [(117, 2, 19), (75, 1, 26), (98, 2, 0)])
def test_alpha_zero_splits_one_class_at_most(masked, whole, rest):
    """Other counts mask whole classes and a random part of one more, never the same one in every image (seed 0)."""
    mask = EvolvedMask((14, 14), masked, 200, mask="grid")(torch.zeros(400)).mask
    counts = torch.stack([mask[:, grid_classes(14, 14) == k].sum(dim=1) for k in range(4)], dim=1)
    expected = sorted([49] * whole + [rest] + [0] * (3 - whole))
    assert counts.sort(dim=1).values.tolist() == [expected] * 400
    assert stats.chisquare((counts == 49).sum(dim=0)).pvalue > 1e-3
    if rest:
        split = mask[counts[:, 0] == rest][:, grid_classes(14, 14) == 0]
        assert len(split.unique(dim=0)) == len(split)


@pytest.mark.parametrize("num_masked", [147, 117, 75])
@pytest.mark.parametrize("strategy", ["part", "evolved"])
def test_alpha_one_masks_whole_parts_but_one(strategy, num_masked, full):
    """At alpha = 1 at most one part of an image is masked in part, and it is the least probable masked one."""
    maker = EvolvedMask((14, 14), num_masked, 200, mask=strategy, iterations=3)
    maker.set_epoch(200)
    made = maker(torch.arange(8), Encoder(full), torch.arange(8))
    assert not made.skipped.any()
    draws = hash_uniform(0, 200, torch.arange(8), Stream.PARTS, made.num_parts)
    for image in range(8):
        shares = [made.mask[image][made.parts[image] == k].double().mean().item() for k in range(made.num_parts)]
        used = [k for k, share in enumerate(shares) if not math.isnan(share)]
        ranked = [shares[k] for k in sorted(used, key=lambda k: -draws[image, k])]
        assert ranked == sorted(ranked, reverse=True)
        assert sum(0 < share < 1 for share in ranked) <= 1


def test_masks_move_from_the_grid_to_parts():
    """The share of pairs of one grid class that agree falls, that of pairs in one part rises (ten planted parts, seed 0)."""
    planted = torch.arange(196) // 20
    noise = torch.randn(8, 1, 196, 196, generator=torch.Generator().manual_seed(0))
    full = torch.nn.functional.pad(((planted[:, None] == planted) * 3.0 + noise).softmax(dim=-1), (1, 0, 1, 0))
    same_class = grid_classes(14, 14)[:, None] == grid_classes(14, 14)
    agree = []
    for epoch in (0, 140, 200):
        maker = EvolvedMask((14, 14), 147, 200, iterations=1, seed=1, shortcut=False)
        maker.set_epoch(epoch)
        made = maker(torch.arange(8), Encoder(full), torch.arange(8))
        equal = made.mask[:, :, None] == made.mask[:, None]
        same_part = made.parts[:, :, None] == made.parts[:, None]
        agree.append((equal[:, same_class].double().mean().item(), equal[same_part].double().mean().item()))
    by_class, by_part = zip(*agree, strict=True)
    assert 1.0 == by_class[0] > by_class[1] > by_class[2]
    assert by_part[0] < by_part[1] < by_part[2]


def test_block_strategies():
    """`block` is the block-wise mask of the BLOCK draws at every epoch; grid-to-block begins as grid and ends as block."""
    ids, images = torch.arange(20), torch.zeros(20)
    masks = {}
    for strategy in ("block", "grid", "grid-to-block"):
        maker = EvolvedMask((9, 8), 30, 10, mask=strategy, seed=4)
        for epoch in (0, 10):
            maker.set_epoch(epoch)
            masks[strategy, epoch] = maker(images, sample_ids=ids).mask
    for epoch in (0, 10):
        drawn = hash_uniform(4, epoch, ids, Stream.BLOCK, BLOCK_ATTEMPTS * BLOCK_DRAWS + 72)
        assert torch.equal(masks["block", epoch], block_masks(9, 8, 30, drawn))
    assert torch.equal(masks["grid-to-block", 0], masks["grid", 0])
    assert torch.equal(masks["grid-to-block", 10], masks["block", 10])


def test_random_strategy_masks_every_patch_alike():
    """Each patch is masked with the mask ratio, whatever its place (chi-square over 35 patches, seed 6)."""
    mask = EvolvedMask((5, 7), 20, 10, mask="random", seed=6)(torch.zeros(4000)).mask
    counts = mask.sum(dim=0).double().numpy()
    scaled = (counts - counts.mean()) ** 2 / (4000 * 20 / 35 * 15 / 35)
    assert stats.chi2.sf(scaled.sum() * 34 / 35, 34) > 1e-3


# --- The shortcut -----------------------------------------------------------------------------------------------

MANY = [
    ((14, 14), 147, {}),
    ((14, 14), 98, {"masked_end": "lowest"}),
    ((14, 14), 117, {}),
    ((14, 14), 49, {"grid_draw": "batch"}),
    ((5, 7), 12, {"ties": "raster"}),
    ((5, 7), 23, {}),
    ((5, 7), 26, {"masked_end": "lowest"}),
    ((4, 4), 12, {"parts_jitter": 2}),
    ((4, 4), 4, {"estimator": "vmf", "start": "random", "start_draw": "batch"}),
    ((1, 8), 4, {}),
    ((7, 1), 3, {"masked_end": "lowest"}),
    ((2, 2), 3, {}),
]


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(("grid", "masked", "options"), MANY)
def test_shortcut_changes_no_mask(grid, masked, options, with_ids, random_attention):
    """With and without the shortcut: the same masks to the bit at every epoch, the same parts where both have them,
    and the encoder is asked for the images that are not skipped and no others."""
    images, patches = torch.arange(8), math.prod(grid)
    attention = random_attention(patches, 8, patches + 1, heads=1)
    parts = {"parts_start": min(12, patches - 2), "parts_end": min(3, patches - 2)}
    made, encoders = {}, {}
    for shortcut in (True, False):
        maker = EvolvedMask(grid, masked, 12, iterations=2, seed=7, shortcut=shortcut, **parts, **options)
        encoders[shortcut], made[shortcut] = Encoder(attention), []
        for epoch in range(13):
            maker.set_epoch(epoch)
            made[shortcut].append(maker(images, encoders[shortcut], images * 17 if with_ids else None))
    for fast, slow in zip(made[True], made[False], strict=True):
        assert torch.equal(fast.mask, slow.mask)
        assert torch.equal(fast.parts[~fast.skipped], slow.parts[~fast.skipped])
        assert not slow.skipped.any()
    wanted = [(~batch.skipped).nonzero()[:, 0].tolist() for batch in made[True]]
    assert encoders[True].asked == [rows for rows in wanted if rows]
    assert encoders[False].asked == [images.tolist()] * 13
    assert made[True][0].skipped.all()
    assert any(batch.skipped.any() for batch in made[True][1:]) == (masked != 117)  # 117 is no sum of whole classes


def test_share_of_images_without_a_pass(full):
    """Over 200 epochs with gamma = 2 and MAE's 147 of 14x14, about 39 % of the images are skipped (3200 images, seed 0)."""
    maker, skipped = EvolvedMask((14, 14), 147, 200, iterations=0), 0
    for epoch in range(200):
        maker.set_epoch(epoch)
        skipped += maker(torch.arange(16) % 8, Encoder(full), torch.arange(16)).skipped.sum().item()
    assert 0.34 < skipped / 3200 < 0.42


def test_skipped_are_the_images_that_the_grid_decides(full):
    """Skipped exactly where (1 - alpha) * gap to the kept class exceeds alpha * range of the part draws, but for rounding."""
    maker, ids, images, seen = EvolvedMask((14, 14), 147, 50, iterations=0, seed=8), torch.arange(40), torch.arange(40) % 8, set()
    for epoch in range(1, 50, 4):
        maker.set_epoch(epoch)
        skipped, alpha = maker(images, Encoder(full), ids).skipped, (epoch / 50) ** 2
        grid = hash_uniform(8, epoch, ids, Stream.GRID, 4).double().sort(dim=1).values
        part = hash_uniform(8, epoch, ids, Stream.PARTS, maker.num_parts).double()
        room = (1 - alpha) * (grid[:, 1] - grid[:, 0]) - alpha * (part.amax(dim=1) - part.amin(dim=1))
        assert torch.equal(skipped[room.abs() > 1e-4], (room > 0)[room.abs() > 1e-4])
        seen |= set(skipped.tolist())
    assert seen == {True, False}


def test_no_pass_without_need():
    """While all images are skipped no attention function is needed; with the shortcut off, or later, it is missed."""
    maker = EvolvedMask((14, 14), 147, 200)
    assert maker(torch.zeros(3)).skipped.all()
    with pytest.raises(ValueError, match="'evolved' needs attention_fn"):
        EvolvedMask((14, 14), 147, 200, shortcut=False)(torch.zeros(3))
    maker.set_epoch(199)
    with pytest.raises(ValueError, match="attention_fn"):
        maker(torch.zeros(3))


# --- Where the draws come from ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("epoch", [2, 5, 9])
def test_masks_belong_to_the_sample(strategy, epoch, small):
    """With ids a mask does not depend on the order, the size or the other images of its batch, nor on calls before."""
    ids = torch.arange(12) * 31 + 5

    def maker():
        maker = EvolvedMask((5, 7), 24, 10, mask=strategy, num_parts=7, seed=9)
        maker.set_epoch(epoch)
        return maker

    whole, again = maker()(torch.arange(12), Encoder(small), ids), maker()
    for rows in ([3], [11, 0, 5, 2], list(range(11, -1, -1)), [4, 4]):
        rows = torch.tensor(rows)
        part = again(rows, Encoder(small), ids[rows])
        assert torch.equal(part.mask, whole.mask[rows])
        assert torch.equal(part.parts, whole.parts[rows])


@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {*RANKED}))
def test_masks_change_with_epoch_seed_and_id(strategy, small):
    """Another epoch, seed or index of the image gives other masks."""

    def masks(seed, epoch, shift):
        maker = EvolvedMask((5, 7), 20, 10, mask=strategy, num_parts=6, seed=seed)
        maker.set_epoch(epoch)
        return maker(torch.arange(12), Encoder(small), torch.arange(12) + shift).mask

    first = masks(1, 4, 0)
    assert torch.equal(first, masks(1, 4, 0))
    for other in ((2, 4, 0), (1, 5, 0), (1, 4, 100)):
        assert not torch.equal(first, masks(*other))


@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {*RANKED}))
def test_generator_decides_without_ids(strategy, small):
    """Without ids equal seeds draw equal sequences of masks, other seeds others, and no two batches are alike."""

    def sequence(seed):
        maker = EvolvedMask((5, 7), 20, 10, mask=strategy, num_parts=6, seed=seed)
        maker.set_epoch(6)
        return [maker(torch.arange(12), Encoder(small)).mask for _ in range(3)]

    first = sequence(3)
    assert all(torch.equal(*pair) for pair in zip(first, sequence(3), strict=True))
    assert not torch.equal(first[0], sequence(4)[0])
    assert not torch.equal(first[0], first[1])


# --- Resume -----------------------------------------------------------------------------------------------------


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("through", [lambda state: state, saved_and_loaded], ids=["as it is", "saved and loaded"])
@pytest.mark.parametrize("recipe", ["paper", "authors"])
def test_resume_draws_the_same_masks(recipe, through, small):
    """4 batches = 2, state_dict, a new object, load_state_dict, 2; also through a file with weights_only=True."""

    def maker():
        return EvolvedMask((5, 7), 20, 300, MaskConfig.from_recipe(recipe, parts_start=9, parts_end=3), seed=3)

    def batches(maker, epochs):
        masks = []
        for epoch in epochs:
            maker.set_epoch(epoch)
            masks.append(maker(torch.arange(12), Encoder(small)).mask)
        return masks

    expected, first, second = batches(maker(), [200, 201, 202, 203]), maker(), maker()
    assert all(torch.equal(*pair) for pair in zip(batches(first, [200, 201]), expected[:2], strict=True))
    state = through(first.state_dict())
    batches(first, [202])  # what the old object does later does not change its saved state
    second.load_state_dict(state)
    assert second.epoch == 201
    assert all(torch.equal(*pair) for pair in zip(batches(second, [202, 203]), expected[2:], strict=True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 4}, "seed 3 -> 4"),
        ({"grid_size": (7, 5)}, r"grid_size \[5, 7\] -> \[7, 5\]"),
        ({"num_masked": 21}, "num_masked 20 -> 21"),
        ({"total_epochs": 9}, "total_epochs 10 -> 9"),
        ({"gamma": 1.0}, "gamma 2.0 -> 1.0"),
        ({"mask": "part"}, "mask 'evolved' -> 'part'"),
        ({"ties": "raster", "kappa": 20.0}, "kappa 40.0 -> 20.0; ties 'random' -> 'raster'"),
    ],
)
def test_resume_refuses_other_settings(change, named):
    """A state of another configuration is refused, naming what differs and both values; the object stays as it was."""
    options = {"grid_size": (5, 7), "num_masked": 20, "total_epochs": 10, "seed": 3, "num_parts": 5}
    saved = EvolvedMask(**options)
    saved.set_epoch(8)
    other = EvolvedMask(**{**options, **change})
    before = other.generator.get_state()
    with pytest.raises(ValueError, match=f"other settings: {named}$"):
        other.load_state_dict(saved.state_dict())
    assert other.epoch == 0
    assert torch.equal(other.generator.get_state(), before)


def test_resume_refuses_a_state_without_an_option():
    """A state that lacks an option (of an older version) is refused by its name."""
    state = EvolvedMask((5, 7), 20, 10, num_parts=5).state_dict()
    del state["config"]["ties"]
    with pytest.raises(ValueError, match="ties None -> 'random'"):
        EvolvedMask((5, 7), 20, 10, num_parts=5).load_state_dict(state)


# --- What may come in -------------------------------------------------------------------------------------------


def test_attention_block_by_block(random_attention):
    """An iterable of maps, one a block, is their mean; a generator is as good as a list."""
    maps = [random_attention(seed, 4, 36) for seed in range(3)]

    def parts(attention_fn):
        maker = EvolvedMask((5, 7), 20, 10, num_parts=5, alpha=1.0)
        return maker(torch.arange(4), attention_fn, torch.arange(4)).parts

    listed = parts(lambda rows: [attention[rows] for attention in maps])
    assert torch.equal(parts(lambda rows: (attention[rows] for attention in maps)), listed)
    assert torch.equal(parts(lambda rows: torch.stack(maps).mean(dim=0)[rows]), listed)
    assert not torch.equal(parts(lambda rows: maps[0][rows]), listed)


@pytest.mark.parametrize("prefix", [0, 2])
def test_prefix_tokens(prefix, random_attention):
    """Any number of tokens may stand before the patches; they are dropped."""
    attention = random_attention(0, 4, 37)

    def parts(tokens_in_front, maps):
        maker = EvolvedMask((5, 7), 20, 10, num_parts=5, alpha=1.0, num_prefix_tokens=tokens_in_front)
        return maker(torch.arange(4), Encoder(maps), torch.arange(4)).parts

    cut = 2 - prefix
    assert torch.equal(parts(prefix, attention[..., cut:, cut:]), parts(1, attention[..., 1:, 1:]))


def test_inputs_of_any_shape(small):
    """The attention function gets rows of whatever the inputs are: images as well as numbers."""
    images = torch.arange(12.0).reshape(12, 1, 1, 1).expand(-1, 3, 4, 4)
    maker = EvolvedMask((5, 7), 20, 10, num_parts=5, alpha=1.0)
    made = maker(images, lambda rows: small[rows[:, 0, 0, 0].long()], torch.arange(12))
    assert torch.equal(made.parts, maker(torch.arange(12), Encoder(small), torch.arange(12)).parts)


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        (((4, 4), 12, 10), {}, "K = 40 parts is above the N = 16 patches"),
        (((4, 4), 12, 10), {"num_parts": 17}, "K = 17 .* N = 16"),
        (((4, 4), 12, 10), {"num_parts": 15, "parts_jitter": 2}, "K = 17 .* N = 16"),
        (((4, 4), 12, 10), {"parts_start": 4, "parts_end": 20, "mask": "part"}, "K = 20 .* N = 16"),
        (((4, 4), 0, 10), {"num_parts": 4}, r"num_masked must be inside 1\.\.15 for 16 patches, got 0"),
        (((4, 4), 16, 10), {"num_parts": 4}, "num_masked .* got 16"),
        (((4, 4), -3, 10), {"mask": "grid"}, "num_masked .* got -3"),
        (((4, 4), 12, 0), {"num_parts": 4}, "total_epochs"),
        (((4, 4), 12, 10), {"num_parts": 4, "gama": 1.0}, "unknown mask option gama"),
        (((4, 4), 12, 10), {"num_parts": 4, "gamma": -1.0}, "gamma must be above 0"),
        (((4, 4), 12, 10, MaskConfig()), {"num_parts": 4}, "either config or single options"),
    ],
)
def test_refused_when_built(arguments, options, named):
    """K above N, a count that masks nothing or all, and bad options raise before anything runs."""
    with pytest.raises(ValueError, match=named):
        EvolvedMask(*arguments, **options)


@pytest.mark.parametrize("strategy", ["grid", "random", "block", "grid-to-block", "inverse-block", "squares"])
def test_static_masks_take_any_number_of_parts(strategy):
    """K is not looked at by strategies that make no parts."""
    assert EvolvedMask((2, 3), 4, 10, mask=strategy)(torch.zeros(2)).mask.sum() == 8


@pytest.mark.parametrize("epoch", [-1, 11, math.nan])
def test_epoch_out_of_range(epoch):
    """Epochs outside 0..T are refused, and the epoch stays."""
    maker = EvolvedMask((4, 4), 12, 10, num_parts=4)
    maker.set_epoch(10)
    with pytest.raises(ValueError, match="epoch must be between 0 and total_epochs"):
        maker.set_epoch(epoch)
    assert maker.epoch == 10


def test_attention_of_another_grid(small):
    """Attention of 35 patches for a grid of 36 is refused with both sizes."""
    with pytest.raises(ValueError, match=r"attention has 35 patch tokens.*6x6 = 36"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0)(torch.arange(3), Encoder(small))


def test_attention_of_other_images(small):
    """An attention function that ignores the rows it was asked for is refused."""
    maker = EvolvedMask((5, 7), 20, 10, num_parts=5, alpha=1.0)
    with pytest.raises(ValueError, match="12"):
        maker(torch.arange(3), lambda rows: small, torch.arange(3))


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_attention_with_nan_names_the_image(alpha, full):
    """NaN in the attention of an image is refused, naming its place in the batch, also where others are skipped."""
    maker, images = EvolvedMask((14, 14), 147, 10, num_parts=5, alpha=alpha, iterations=0), torch.arange(8)
    skipped = maker(images, Encoder(full), images).skipped
    wrong = int((~skipped).nonzero()[-1])
    assert skipped[:wrong].any() == (alpha < 1)
    broken = full.clone()
    broken[wrong, 0, 5, 6] = math.nan
    with pytest.raises(ValueError, match=rf"image {wrong}\b"):
        maker(images, Encoder(broken), images)


@pytest.mark.parametrize("ids", [torch.arange(3), torch.arange(5), torch.zeros(4, 1, dtype=torch.int64)])
def test_ids_of_another_size(ids):
    """One id for each input, or none."""
    with pytest.raises(ValueError, match=r"sample_ids must be \[4\]"):
        EvolvedMask((4, 4), 12, 10, mask="grid")(torch.zeros(4), sample_ids=ids)


# --- What an encoder and the flags decide, before there are data ------------------------------------------------


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"layers": "0,99"}, {}, r"layers \[99\] do not exist: the encoder has 12 blocks"),
        ({"layers": "-13"}, {}, r"layers \[-13\] do not exist: the encoder has 12 blocks"),
        ({"layers": "11"}, {"depth": 11}, r"layers \[11\] do not exist: the encoder has 11 blocks"),
        ({"num_parts": 197}, {}, "K = 197 parts is above the N = 196 patches"),
        ({"parts_start": 196, "parts_jitter": 1}, {}, "K = 197 parts is above the N = 196 patches"),
        ({}, {"num_masked": 196}, r"num_masked must be inside 1\.\.195 for 196 patches, got 196"),
        ({"mask": "random-units"}, {"num_masked": 118}, "num_masked 118 is not a multiple of the 4 patches of a unit"),
        ({"mask": "random-units"}, {"grid_size": (13, 14)}, "mask_unit 2 does not divide the patch grid 13x14"),
        ({"mask": "block-official"}, {"num_masked": 15}, "needs 16 masked patches or more"),
        ({"mask": "block-official"}, {"even_counts": True}, "mask block-official may mask fewer patches in some images"),
        ({"mask": "official"}, {}, "mask 'official' stands for a method's own strategy"),
    ],
)
def test_what_an_encoder_cannot_mask_is_refused(options, changes, message):
    """Without images, without a pass, and whether or not the first epochs would look at the attention."""
    encoder = {"depth": 12, "grid_size": (14, 14), "num_masked": 120}
    with pytest.raises(ValueError, match=message):
        check_for_encoder(MaskConfig(**options), **{**encoder, **changes})


@pytest.mark.parametrize(
    ("options", "even_counts"),
    [({"layers": "0,-12,11"}, True), ({"mask": "grid", "layers": "0,99"}, True), ({"mask": "block-official"}, False)],
)
def test_what_an_encoder_can_mask_is_not_refused(options, even_counts):
    """Blocks are asked for by strategies that look at the attention only."""
    check_for_encoder(MaskConfig(**options), depth=12, grid_size=(14, 14), num_masked=120, even_counts=even_counts)


def test_a_state_from_before_an_option_goes_on():
    """An option added since counts as its value of before; with another value it is named."""
    state = EvolvedMask((6, 6), 20, 10, num_parts=5).state_dict()
    del state["config"]["smooth"]
    EvolvedMask((6, 6), 20, 10, num_parts=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"smooth 0.0 -> 0.5"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, smooth=0.5).load_state_dict(state)


def test_a_run_keeps_the_defaults_under_which_it_began(random_attention):
    """Masks of a state of version 0.1.0 go on as they were, though defaults have changed; what is said otherwise is refused."""
    attention, images, ids = random_attention(0, 4, 37), torch.arange(4), torch.arange(4)
    began = EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0, **FORMER_DEFAULTS)
    state = began.state_dict()
    for added in ("start_candidates", "start_refine", "smooth", "graph"):
        del state["config"][added]
    today = EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0)
    changed = [not torch.equal(*(maker(images, Encoder(attention), ids).parts for maker in (began, today)))]
    today.load_state_dict(state)
    assert changed == [True]
    assert today.config == began.config
    assert torch.equal(*(maker(images, Encoder(attention), ids).parts for maker in (began, today)))
    with pytest.raises(ValueError, match="iterations 15 -> 3"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0, iterations=3).load_state_dict(state)
    late = EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0).state_dict()
    with pytest.raises(ValueError, match=r"start 'greedy' -> 'kmeans\+\+'"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0, start="kmeans++").load_state_dict(late)
    asked = EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0, iterations=15).state_dict()  # of today: said by name
    with pytest.raises(ValueError, match="iterations 15 -> 10"):
        EvolvedMask((6, 6), 20, 10, num_parts=5, alpha=1.0).load_state_dict(asked)


# --- What callers get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, True),
        ({"mask": "part"}, True),
        ({"mask": "grid-to-block"}, True),
        ({"alpha": 0.5}, True),
        ({"mask": "random"}, False),
        ({"alpha": 0.5, "num_parts": 6}, False),
    ],
)
def test_a_mask_that_nobody_moves_warns_once(
    random_attention: Callable[..., Tensor], options: dict[str, Any], warned: bool
) -> None:
    """Without set_epoch an evolving mask stays that of epoch 0, which nothing else would show. Seed 0."""
    mask = EvolvedMask((4, 4), 12, 10, MaskConfig(parts_start=8, parts_end=3, **options))
    images, attention = torch.zeros(3, 1), random_attention(0, 3, 17)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            mask(images, lambda rows: attention[: len(rows)])
    assert len(seen) == int(warned)
    if warned:
        assert "set_epoch was never called: masks stay those of epoch 0 of 10" in str(seen[0].message)
        assert seen[0].filename == __file__


def test_no_warning_where_the_epoch_is_known() -> None:
    """Told by set_epoch or a loaded state, or the only one there is."""
    told, loaded, short = (EvolvedMask((4, 4), 12, total, parts_start=8, parts_end=3, seed=0) for total in (10, 10, 1))
    told.set_epoch(0)
    loaded.load_state_dict(told.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in (told, loaded, short):
            mask(torch.zeros(2, 1), lambda rows: torch.full((len(rows), 1, 17, 17), 1 / 17))


@pytest.mark.parametrize("wrong", [0.75, 147.0, "147", None])
def test_a_ratio_in_the_place_of_a_count_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"num_masked must be a number of patches \(int\), got .*; count_masked\(196, ratio\)"):
        EvolvedMask((14, 14), wrong, 10)


@pytest.mark.parametrize("count", [np.int64(147), torch.tensor(147)])
def test_a_count_of_any_whole_kind_becomes_an_int(count: Any) -> None:
    mask = EvolvedMask((14, 14), count, 10)
    mask.set_epoch(0)
    assert type(mask.state_dict()["num_masked"]) is int
    assert int(mask(torch.zeros(1, 1), lambda rows: torch.full((1, 1, 197, 197), 1 / 197)).mask.sum()) == 147


def test_sample_ids_may_be_a_list_or_an_array() -> None:
    """They draw what a tensor draws; what are no whole numbers is refused with what is wanted."""
    mask, images = EvolvedMask((4, 4), 12, 10, mask="random", seed=3), torch.zeros(3, 1)
    expected = mask(images, sample_ids=torch.tensor([7, 1, 2])).mask
    for ids in ([7, 1, 2], (7, 1, 2), np.array([7, 1, 2], dtype=np.int32), torch.tensor([7, 1, 2], dtype=torch.int32)):
        assert torch.equal(mask(images, sample_ids=ids).mask, expected)  # type: ignore[arg-type]
    floats, words, truths = [7.0, 1, 2], ["a", "b", "c"], np.ones(3, bool)
    for wrong, kind in ((floats, "list of torch.float32"), (words, "list"), (truths, "ndarray of torch.bool")):
        with pytest.raises(ValueError, match=f"sample_ids must be whole numbers, one for each input .*, got a {kind}$"):
            mask(images, sample_ids=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sample_ids must be \[3\], one for each input, got \[2\]"):
        mask(images, sample_ids=[7, 1])
