"""The options of the mask, the two recipes, and for each option the difference it makes."""

import math
import re
from dataclasses import FrozenInstanceError, asdict, fields

import numpy as np
import pytest
import torch

from common.attention import patch_graph
from common.draws import Stream, hash_uniform
from common.evolved_mask import EvolvedMask
from common.mask_config import RECIPES, WORDS, MaskConfig
from common.masks import grid_classes
from common.parts import PartsOptions, fit_parts, partition_parts, start_draws

PAPER = {
    "mask": "evolved",
    "gamma": 2.0,
    "alpha": None,
    "alpha_offset": 0,
    "schedule_epochs": None,
    "num_parts": None,
    "mask_unit": 2,
    "mask_ratio_range": None,
    "ratio_draw": "image",
    "parts_start": 40,
    "parts_end": 10,
    "parts_rounding": "nearest",
    "parts_jitter": 0,
    "graph": "attention",
    "similarity": "cosine",
    "remove_position": False,
    "layers": "all",
    "heads": "mean",
    "reduction": "mean",
    "attention_values": "softmax",
    "direction": "row",
    "estimator": "gaussian",
    "covariance": "diagonal",
    "covariance_floor": 0.3,
    "kappa": 40.0,
    "iterations": 10,
    "start": "greedy",
    "start_candidates": 16,
    "start_refine": 3,
    "start_draw": "image",
    "scaling": "image",
    "hard_label": "posterior",
    "reseed_empty": True,
    "smooth": 0.0,
    "grid_draw": "image",
    "ties": "random",
    "masked_end": "highest",
    "attention_from": "live",
    "ema_decay": 0.99996,
    "attention_mode": "eval",
    "shortcut": True,
}

AUTHORS = {
    **PAPER,
    "gamma": 0.5,
    "alpha_offset": 1,
    "schedule_epochs": 300,
    "parts_rounding": "down",
    "parts_jitter": 2,
    "reduction": "sum",
    "direction": "column",
    "estimator": "vmf",
    "iterations": 15,
    "start_refine": 0,
    "start": "random",
    "start_draw": "batch",
    "scaling": "none",
    "hard_label": "per-patch",
    "reseed_empty": False,
    "grid_draw": "batch",
    "ties": "raster",
    "attention_from": "ema",
    "attention_mode": "train",
}


# --- The options ------------------------------------------------------------------------------------------------


def test_recipe_paper():
    """The recipe `paper` is the defaults, all of them pinned."""
    assert asdict(MaskConfig()) == PAPER
    assert MaskConfig.from_recipe("paper") == MaskConfig()


def test_recipe_authors():
    """The recipe `authors` sets every row of the table at once, all of them pinned."""
    assert asdict(MaskConfig.from_recipe("authors")) == AUTHORS
    assert set(RECIPES) == {"paper", "best", "authors"}


def test_recipe_best():
    """The recipe `paper` but for the signal."""
    assert asdict(MaskConfig.from_recipe("best")) == {**PAPER, "graph": "keys"}


def test_recipe_with_options():
    """Single options change a recipe and leave its other rows."""
    config = MaskConfig.from_recipe("authors", ties="random", parts_start=20)
    assert asdict(config) == {**AUTHORS, "ties": "random", "parts_start": 20}


def test_recipe_refuses():
    """Unknown recipes and options are named, with the recipes there are."""
    with pytest.raises(ValueError, match=r"recipe.*paper, best, authors.*'beit'"):
        MaskConfig.from_recipe("beit")
    with pytest.raises(ValueError, match="unknown mask option gama, tie"):
        MaskConfig.from_recipe("paper", tie="raster", gama=2.0, gamma=2.0)


@pytest.mark.parametrize("name", sorted(WORDS))
def test_words(name):
    """An option that takes a word takes each of its words, and no other."""
    needed = {"graph": "tokens"} if name == "similarity" else {}  # attention has no vectors
    for word in WORDS[name]:
        assert getattr(MaskConfig(**{name: word}, **needed), name) == word
    with pytest.raises(ValueError, match="^" + re.escape(f"{name} must be one of {', '.join(WORDS[name])}, got 'wrong'")):
        MaskConfig(**{name: "wrong"})


def test_all_words_are_options():
    """Every option that names its words is checked."""
    assert {name: words for name, words in WORDS.items() if name in ("mask", "direction", "ties")} == {
        "mask": (
            "evolved", "part", "grid", "random", "block", "grid-to-block", "random-units", "block-official",
            "attn-high", "attn-low", "semantic", "inverse-block", "squares", "official",
        ),
        "direction": ("row", "column", "symmetric"),
        "ties": ("random", "raster"),
    }  # fmt: skip
    assert set(WORDS) == {name for name, value in PAPER.items() if isinstance(value, str)} - {"layers"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0.0), ("gamma", -1.0), ("gamma", math.nan),
        ("alpha", -0.01), ("alpha", 1.01), ("alpha", math.nan),
        ("alpha_offset", -1), ("schedule_epochs", 0), ("schedule_epochs", -300),
        ("num_parts", 0), ("parts_start", 0), ("parts_end", 0), ("parts_end", -3), ("parts_jitter", -1),
        ("covariance_floor", 0.0), ("covariance_floor", -0.1), ("covariance_floor", math.nan),
        ("kappa", 0.0), ("kappa", math.nan), ("iterations", -1), ("smooth", -0.5), ("smooth", math.inf),
        ("ema_decay", 1.0), ("ema_decay", -0.1), ("ema_decay", math.nan),
        ("mask_ratio_range", "0.5"), ("mask_ratio_range", "0.9,0.5"), ("mask_ratio_range", "0,0.5"),
        ("mask_ratio_range", "0.5,1"), ("mask_ratio_range", "a,b"), ("mask_ratio_range", "nan,0.5"),
        ("layers", ""), ("layers", "first"), ("layers", "0,x"), ("layers", "1,,2"),
    ],
)  # fmt: skip
def test_bad_values(name, value):
    """Each value outside its range raises ValueError that begins with the name of the option."""
    with pytest.raises(ValueError, match=f"^{name} must"):
        MaskConfig(**{name: value})


def test_random_directions_need_averaged_heads():
    """Random directions are drawn for N features, so heads side by side are refused with them, and only with them."""
    with pytest.raises(ValueError, match=r"^heads must be mean or select with random directions"):
        MaskConfig(estimator="vmf", start="random", heads="concat")
    assert MaskConfig(estimator="vmf", heads="concat").heads == "concat"


@pytest.mark.parametrize(("alpha", "gamma", "parts"), [(0.0, 0.1, 1), (1.0, 8.0, 3), (0.5, 1.0, None)])
def test_values_at_the_ends_of_their_ranges(alpha, gamma, parts):
    """The ends of closed ranges are taken."""
    config = MaskConfig(alpha=alpha, gamma=gamma, num_parts=parts, ema_decay=0.0, iterations=0)
    assert (config.alpha, config.gamma, config.num_parts, config.ema_decay, config.iterations) == (alpha, gamma, parts, 0.0, 0)


def test_options_are_frozen_and_explained():
    """A configuration cannot change after its check, and every option has a line of help."""
    with pytest.raises(FrozenInstanceError):
        MaskConfig().gamma = -1.0
    assert all(len(option.metadata["help"]) > 10 for option in fields(MaskConfig))


@pytest.mark.parametrize(
    ("layers", "chosen"), [("all", "all"), ("last", "last"), ("3", [3]), ("0,5,11", [0, 5, 11]), ("-1, 2", [-1, 2])]
)
def test_chosen_layers(layers, chosen):
    """The words as they are, and a list of indices for numbers."""
    assert MaskConfig(layers=layers).chosen_layers == chosen


@pytest.mark.parametrize(
    ("options", "ends", "most"),
    [
        ({}, (40, 10), 40),
        ({"num_parts": 7}, (7, 7), 7),
        ({"parts_start": 5, "parts_end": 20, "parts_jitter": 2}, (5, 20), 22),
    ],
)
def test_parts_range(options, ends, most):
    """A fixed K is both ends of the schedule; jitter adds to the largest K."""
    config = MaskConfig(**options)
    assert config.parts_range == ends
    assert config.most_parts == most


def test_uses_attention():
    """Three strategies are made of parts, two rank the patches by the attention that they get; no other looks at the model."""
    assert [word for word in WORDS["mask"] if MaskConfig(mask=word).uses_parts] == ["evolved", "part", "semantic"]
    looking = [word for word in WORDS["mask"] if MaskConfig(mask=word).uses_attention]
    assert looking == ["evolved", "part", "attn-high", "attn-low", "semantic"]


# --- Rows of the table: what the graph is and how it is cut -----------------------------------------------------

BATCH, GRID, PATCHES, SEED, EPOCH = 6, (4, 5), 20, 3, 7
IDS = torch.arange(BATCH) + 100


@pytest.fixture(scope="module")
def maps(random_attention):
    """Attention of three blocks (seeds 0, 1, 2) of 6 images."""
    return [random_attention(seed, BATCH, PATCHES + 1, heads=2, sharpness=2.0) for seed in range(3)]


def make_masks(maps, images=BATCH, **options):
    """Masks of the images 100, 101, ... at epoch 7 of 10, parts of all of them, alpha 0.5 unless told."""
    maker = EvolvedMask(GRID, 8, 10, seed=SEED, **{"num_parts": 6, "alpha": 0.5, "shortcut": False, **options})
    maker.set_epoch(EPOCH)
    rows = torch.arange(images)
    return maker(rows, lambda images: [attention[images] for attention in maps], sample_ids=IDS[rows])


def cut_directly(maps, graph=None, num_parts=6, **cut):
    """The same parts from the functions themselves and the published draws."""
    start = start_draws(num_parts, PATCHES, PartsOptions(**cut))
    uniforms = hash_uniform(SEED, EPOCH, IDS, Stream.START, start)
    return partition_parts(patch_graph(maps, **(graph or {})), num_parts, uniforms=uniforms, grid_size=GRID, **cut)


VMF = {"estimator": "vmf"}
FEW = {"num_parts": 2, "covariance_floor": 0.5}  # two parts of 20 patches: here EM moves patches away from the start
ROWS = {
    "which map": ({"reduction": "sum"}, VMF | {"scaling": "none"}, {"reduction": "sum"}),
    "direction column": ({"direction": "column"}, {}, {"direction": "column"}),
    "direction symmetric": ({"direction": "symmetric"}, {}, {"direction": "symmetric"}),
    "heads": ({"heads": "concat"}, {}, {"heads": "concat"}),
    "mixture": (VMF, {}, {}),
    "covariance spherical": ({"covariance": "spherical"}, FEW, {}),
    "covariance full": ({"covariance": "full"}, FEW, {}),
    "covariance floor": ({"covariance_floor": 2.0}, {}, {}),
    "kappa": ({"kappa": 2.0}, VMF, {}),
    "iterations": ({"iterations": 0}, FEW, {}),
    "start": ({"start": "random"}, {}, {}),
    "start kmeans++": ({"start": "kmeans++"}, {}, {}),
    "candidates": ({"start_candidates": 1}, {}, {}),
    "refining steps": ({"start_refine": 0}, {"start": "kmeans++"}, {}),
    "scale": ({"scaling": "none"}, VMF, {}),
    "hard label": ({"hard_label": "per-patch"}, VMF | {"kappa": 2.0}, {}),
    "neighbours": ({"smooth": 5.0}, {}, {}),
    "empty parts": ({"reseed_empty": False}, VMF | {"start": "random", "num_parts": 12}, {}),
}


@pytest.mark.parametrize("row", ROWS)
def test_option_reaches_the_cut(row, maps):
    """The option gives the parts that the functions give with it, and they are not those without it."""
    option, base, graph = ROWS[row]
    cut = {name: value for name, value in (base | option).items() if name not in graph}
    parts = make_masks(maps, **base, **option).parts
    assert torch.equal(parts, cut_directly(maps, graph, **cut))
    assert not torch.equal(parts, make_masks(maps, **base).parts)


def test_direction_row_and_column_are_transposed(maps):
    """Columns of the maps are the rows of the transposed maps."""
    turned = [attention.transpose(2, 3) for attention in maps]
    assert torch.equal(make_masks(maps, direction="column").parts, make_masks(turned, direction="row").parts)
    assert torch.equal(make_masks(maps, direction="symmetric").parts, make_masks(turned, direction="symmetric").parts)


def test_sum_is_the_mean_times_blocks_and_heads(maps):
    """`sum` is 3 blocks x 2 heads times the mean: kappa 6 times as large does the same to the mean."""
    options = VMF | {"scaling": "none", "iterations": 2}
    summed = make_masks(maps, **options, reduction="sum", kappa=40.0).parts
    assert torch.equal(summed, make_masks(maps, **options, kappa=240.0).parts)


def test_prefix_tokens_play_no_part(maps):
    """Whatever the class token attends to, and whoever attends to it, changes nothing."""
    other = [attention.clone() for attention in maps]
    for attention in other:
        attention[:, :, 0], attention[:, :, :, 0] = 9.0, 5.0
    assert torch.equal(make_masks(other).parts, make_masks(maps).parts)


@pytest.mark.parametrize("estimator", ["gaussian", "vmf"])
@pytest.mark.parametrize(("start_draw", "alike"), [("batch", True), ("image", False)])
def test_start_draw(start_draw, alike, estimator, maps):
    """Six copies of one image are cut alike from one start a batch, and not from a start of their own each."""
    copies = [attention[:1].expand(BATCH, -1, -1, -1) for attention in maps]
    parts = make_masks(copies, estimator=estimator, start="random", start_draw=start_draw).parts
    assert (parts == parts[:1]).all() == alike
    first = make_masks(copies, estimator=estimator, start="random", images=1).parts
    assert torch.equal(parts[:1], first)


# --- Rows of the table: the schedule ----------------------------------------------------------------------------


def schedule(recipe, epochs, **options):
    """(alpha, K) of each epoch of a run."""
    maker = EvolvedMask((14, 14), 147, epochs, MaskConfig.from_recipe(recipe, **options))
    rows = []
    for epoch in range(epochs):
        maker.set_epoch(epoch)
        rows.append((maker.alpha, maker.num_parts))
    return rows


def test_alpha_and_parts_of_the_paper():
    """(t/T)^2 and 40 -> 10 rounded, over the length of the run."""
    expected = [((t / 200) ** 2, math.floor(40 - 30 * t / 200 + 0.5)) for t in range(200)]
    assert schedule("paper", 200) == expected


@pytest.mark.parametrize("epochs", [200, 300])
def test_alpha_and_parts_of_the_authors(epochs):
    """((t+1)/300)^0.5 and int(40 -> 10), over 300 epochs however long the run."""
    scheduled = schedule("authors", epochs)
    assert [alpha for alpha, _ in scheduled] == pytest.approx([((t + 1) / 300) ** 0.5 for t in range(epochs)])
    assert [parts for _, parts in scheduled] == [int(30 * (300 - t) / 300 + 10) for t in range(epochs)]


def test_schedule_longer_than_its_epochs_stays_at_the_end():
    """Past `schedule_epochs` alpha stays 1 and K at its end."""
    assert schedule("paper", 30, schedule_epochs=10)[10:] == [(1.0, 10)] * 20
    assert schedule("authors", 302)[299:] == [(1.0, 10)] * 3


@pytest.mark.parametrize(("rounding", "parts"), [("nearest", [4, 4, 3, 3, 2]), ("down", [4, 3, 3, 2, 2])])
def test_parts_rounding(rounding, parts):
    """4 -> 2 over 4 epochs, 4 3.5 3 2.5 2: to the nearest (half up), or down."""
    maker = EvolvedMask(GRID, 8, 4, parts_start=4, parts_end=2, parts_rounding=rounding)
    scheduled = []
    for epoch in range(5):
        maker.set_epoch(epoch)
        scheduled.append(maker.num_parts)
    assert scheduled == parts


@pytest.mark.parametrize("with_ids", [True, False])
def test_parts_jitter(with_ids, maps):
    """0, 1 or 2 is added to K, one number a batch, each about as often (300 batches, seed 3); parts reach up to it."""
    maker = EvolvedMask(GRID, 8, 300, seed=SEED, num_parts=4, parts_jitter=2, alpha=1.0, iterations=0)
    extra, images = [], torch.arange(2)
    for epoch in range(300):
        maker.set_epoch(epoch)
        made = maker(images, lambda rows: maps[0][rows], sample_ids=images if with_ids else None)
        extra.append(made.num_parts - 4)
        assert made.parts.max() == made.num_parts - 1
    assert min(np.bincount(extra, minlength=3)) > 75
    assert len(np.bincount(extra)) == 3


def test_no_jitter_by_default(maps):
    """The paper's K is the scheduled one in every batch."""
    assert make_masks(maps).num_parts == 6


# --- Rows of the table: the draws and the cut -------------------------------------------------------------------


@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize(("grid_draw", "different"), [("image", 6), ("batch", 1)])
def test_grid_draw(grid_draw, different, with_ids):
    """Two whole classes of a 4x4 grid: all 6 choices among 64 images with a draw each, one with a draw a batch."""
    maker = EvolvedMask((4, 4), 8, 10, mask="grid", grid_draw=grid_draw)
    masks = maker(torch.zeros(64), sample_ids=torch.arange(64) if with_ids else None).mask
    assert len(masks.unique(dim=0)) == different


def blended(made, options=None):
    """Blended probability of 6 images from the published draws, in raster order: [6, 20]."""
    options = options or {}
    first = IDS[:1].expand(BATCH) if options.get("grid_draw") == "batch" else IDS
    p_grid = hash_uniform(SEED, EPOCH, first, Stream.GRID, 4)[:, grid_classes(*GRID)]
    p_part = hash_uniform(SEED, EPOCH, IDS, Stream.PARTS, made.num_parts).gather(1, made.parts)
    return ((1 - made.alpha) * p_grid + made.alpha * p_part).numpy()


def lowest_kept(probability, masked):
    """The released code's rule: sort ascending (raster order among equals), keep the first N - m, mask the rest."""
    kept = np.argsort(probability, axis=1, kind="stable")[:, : probability.shape[1] - masked]
    mask = np.ones(probability.shape, dtype=bool)
    np.put_along_axis(mask, kept, False, axis=1)
    return mask


def test_ties_raster(maps):
    """`raster` is the order of argsort in the released code: of a part that straddles the cut its first patches are kept."""
    made = make_masks(maps, mask="part", ties="raster")
    assert np.array_equal(made.mask.numpy(), lowest_kept(blended(made), 8))


def test_ties_random(maps):
    """`random` orders equal patches by the TIES draws of the image."""
    made = make_masks(maps, mask="part")
    ties = hash_uniform(SEED, EPOCH, IDS, Stream.TIES, PATCHES).numpy()
    expected = np.zeros((BATCH, PATCHES), dtype=bool)
    for image, row in enumerate(blended(made)):
        expected[image, np.lexsort((ties[image], -row))[:8]] = True
    assert np.array_equal(made.mask.numpy(), expected)
    assert not np.array_equal(expected, make_masks(maps, mask="part", ties="raster").mask.numpy())


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_masked_end(alpha, maps):
    """Masking the lowest of P is masking the highest of 1 - P with the same order among equals; it is another mask."""
    ties = hash_uniform(SEED, EPOCH, IDS, Stream.TIES, PATCHES).numpy()
    lowest = make_masks(maps, alpha=alpha, masked_end="lowest")
    expected = np.zeros((BATCH, PATCHES), dtype=bool)
    for image, row in enumerate(1 - blended(lowest).astype(np.float64)):
        expected[image, np.lexsort((ties[image], -row))[:8]] = True
    assert np.array_equal(lowest.mask.numpy(), expected)
    assert not torch.equal(lowest.mask, make_masks(maps, alpha=alpha).mask)


# --- The recipe of the authors, whole ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authors_run(maps):
    """One batch of the recipe `authors` at epoch 7."""
    config = MaskConfig.from_recipe("authors", parts_start=9, parts_end=4)
    maker = EvolvedMask(GRID, 8, 300, config, seed=SEED)
    maker.set_epoch(EPOCH)
    return maker(torch.arange(BATCH), lambda rows: [attention[rows] for attention in maps], sample_ids=IDS)


def released_parts(maps, num_parts):
    """Parts as the released code makes them, in double precision: columns of the summed maps, 15 rounds, kappa 40."""
    graph = sum(attention[:, :, 1:, 1:].double().sum(dim=1) for attention in maps).transpose(1, 2).numpy()
    uniforms = hash_uniform(
        SEED, EPOCH, IDS[:1], Stream.START, start_draws(num_parts, PATCHES, PartsOptions(estimator="vmf", start="random"))
    )
    nothing = torch.zeros(1, PATCHES, PATCHES)
    begin = fit_parts(nothing, num_parts, estimator="vmf", start="random", iterations=0, uniforms=uniforms)
    labels = []
    for rows in graph:
        means = begin.means[0].double().numpy()
        for step in range(16):
            kernel = np.exp(40 * rows @ means.T - (40 * rows @ means.T).max(axis=1, keepdims=True))
            shares = kernel / kernel.sum(axis=1, keepdims=True)
            shares = shares / (1e-6 + shares.sum(axis=0))
            if step < 15:
                means = shares.T @ rows
                means = means / (1e-6 + np.linalg.norm(means, axis=1, keepdims=True))
        labels.append(shares.argmax(axis=1))
    return np.stack(labels)


def test_authors_parts_equal_the_released_rules(authors_run, maps):
    """From the same random directions the recipe gives the parts of the released code's rules."""
    scheduled = int((9 - 4) * (300 - EPOCH) / 300 + 4)
    assert authors_run.num_parts - scheduled in (0, 1, 2)
    assert authors_run.alpha == pytest.approx(((EPOCH + 1) / 300) ** 0.5)
    assert authors_run.parts.tolist() == released_parts(maps, authors_run.num_parts).tolist()


def test_authors_mask_equals_the_released_rules(authors_run):
    """From the same draws the recipe masks the patches that the released code masks."""
    probability = blended(authors_run, {"grid_draw": "batch"})
    assert np.array_equal(authors_run.mask.numpy(), lowest_kept(probability, 8))
