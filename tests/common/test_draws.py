"""Draws that belong to a sample: exact values, uniformity, independence."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.draws import GeneratorDraws, SampleDraws, Stream, hash_seed, hash_uniform

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100)
MASK64 = 2**64 - 1
INT64 = st.integers(-(2**63), 2**63 - 1)
IDS = torch.arange(4000)


def splitmix(state, count):
    """The SplitMix64 generator as published: the first `count` outputs from `state`."""
    outputs = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK64
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        outputs.append(z ^ (z >> 31))
    return outputs


def reference_key(seed, epoch, sample_id, stream):
    word = 0
    for part in (seed, epoch, int(stream), sample_id):
        word = splitmix(word ^ (part & MASK64), 1)[0]
    return word


def test_reference_is_published_splitmix():
    """The reference of this file gives the published outputs for state 1234567."""
    assert splitmix(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@SETTINGS
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), st.lists(INT64, min_size=1, max_size=4), st.sampled_from(Stream))
def test_tensor_hash_equals_integer_reference(seed, epoch, ids, stream):
    """Every number is the top 24 bits of SplitMix64 started at the key of the image, also for huge and negative words."""
    drawn = hash_uniform(seed, epoch, torch.tensor(ids), stream, 5)
    expected = [[word >> 40 for word in splitmix(reference_key(seed, epoch, i, stream), 6)[1:]] for i in ids]
    assert drawn.dtype == torch.float32
    assert (drawn.double() * 2**24).tolist() == expected


@SETTINGS
@given(st.integers(-(2**70), 2**70), st.integers(0, 2**31), INT64, st.sampled_from(Stream))
def test_hash_seed_is_the_same_key(seed, epoch, sample_id, stream):
    """The seed of a sample's own generator is its key, cut to 63 bits (what torch.Generator takes)."""
    value = hash_seed(seed, epoch, sample_id, stream)
    assert value == reference_key(seed, epoch, sample_id, stream) >> 1
    assert torch.Generator().manual_seed(value).initial_seed() == value


def test_golden_uniforms():
    """Recorded values: a change of the function changes every mask of every run ever made."""
    first = hash_uniform(0, 0, torch.tensor([0, 1]), Stream.GRID, 4) * 2**24
    assert first.tolist() == [[5475044, 8304876, 9101324, 3625446], [1365482, 5236539, 9750876, 11517201]]
    last = hash_uniform(7, 199, torch.tensor([1281166]), Stream.TIES, 4) * 2**24
    assert last.tolist() == [[13915598, 9319045, 6118401, 9417926]]


def test_golden_seeds():
    """Recorded values of the integer hash."""
    assert hash_seed(0, 0, 0, Stream.AUGMENT) == 7183620828946964588
    assert hash_seed(7, 199, 1281166, Stream.AUGMENT) == 1111676154758368214
    assert hash_seed(-1, 3, 5, Stream.ORDER) == 2786904282954622599


def test_stream_numbers_never_change():
    """A stream keeps its number for ever; new ones may be added, and no two share a number."""
    recorded = {
        "GRID": 1, "PARTS": 2, "START": 3, "TIES": 4, "BLOCK": 5, "PATCHES": 6, "NUM_PARTS": 7,
        "AUGMENT": 16, "ORDER": 17, "REPLACE": 18,
    }  # fmt: skip
    numbers = {name: int(stream) for name, stream in Stream.__members__.items()}
    assert recorded.items() <= numbers.items()
    assert len(set(numbers.values())) == len(numbers)


VARIED = {
    "ids": lambda i: hash_uniform(0, 0, IDS + 4000 * i, Stream.GRID, 1)[:, 0],
    "positions": lambda i: hash_uniform(0, 0, torch.tensor([i]), Stream.GRID, 4000)[0],
    "epochs": lambda i: torch.cat([hash_uniform(0, e, torch.tensor([i]), Stream.GRID, 1)[0] for e in range(2000)]),
    "seeds": lambda i: torch.cat([hash_uniform(s, 0, torch.tensor([i]), Stream.GRID, 1)[0] for s in range(2000)]),
}


@pytest.mark.parametrize("varied", VARIED)
@pytest.mark.parametrize("other", [0, 1, 2])
def test_uniform_along_each_key(varied, other):
    """Kolmogorov-Smirnov against the uniform law when one word of the key counts up and the rest stand still."""
    drawn = VARIED[varied](other)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3


NEIGHBOURS = {
    "stream": [hash_uniform(0, 0, IDS, stream, 1)[:, 0] for stream in Stream],
    "epoch": [hash_uniform(0, epoch, IDS, Stream.GRID, 1)[:, 0] for epoch in range(8)],
    "seed": [hash_uniform(seed, 0, IDS, Stream.GRID, 1)[:, 0] for seed in range(8)],
    "id": [hash_uniform(0, 0, IDS + shift, Stream.GRID, 1)[:, 0] for shift in range(8)],
    "position": list(hash_uniform(0, 0, IDS, Stream.GRID, 8).unbind(dim=1)),
    "seed and epoch swapped": [hash_uniform(1, 2, IDS, Stream.GRID, 1)[:, 0], hash_uniform(2, 1, IDS, Stream.GRID, 1)[:, 0]],
}


@pytest.mark.parametrize("key", NEIGHBOURS)
def test_neighbouring_keys_are_independent(key):
    """Draws of neighbouring keys do not correlate, and their pairs fill the unit square evenly (chi-square)."""
    for first, second in pairwise(NEIGHBOURS[key]):
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / len(IDS) ** 0.5
        counts = np.histogram2d(first, second, bins=8, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4


@SETTINGS
@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=12), st.randoms(use_true_random=False), st.integers(1, 5))
def test_draws_are_the_same_in_any_batch(ids, random, count):
    """However images are ordered and split into batches, each gets its own numbers."""
    whole = SampleDraws(3, 5, torch.tensor(ids)).uniform(Stream.PARTS, count)
    order = random.sample(range(len(ids)), len(ids))
    cut = random.randrange(len(ids) + 1)
    for part in (order[:cut], order[cut:]):
        drawn = SampleDraws(3, 5, torch.tensor([ids[i] for i in part], dtype=torch.int64)).uniform(Stream.PARTS, count)
        assert torch.equal(drawn, whole[part])


def test_more_numbers_begin_with_the_fewer():
    """A number depends on its position, not on how many are asked for: K may change and the first parts keep theirs."""
    ids = torch.arange(5)
    assert torch.equal(hash_uniform(1, 2, ids, Stream.PARTS, 40)[:, :10], hash_uniform(1, 2, ids, Stream.PARTS, 10))


def test_shared_sample_draws_are_those_of_the_first_image():
    """A draw for the whole batch takes the key of its first image."""
    ids = torch.tensor([9, 4, 7])
    shared = SampleDraws(1, 2, ids).shared(Stream.GRID, 4)
    assert torch.equal(shared, hash_uniform(1, 2, ids[:1], Stream.GRID, 4).repeat(3, 1))


def test_generator_draws_follow_the_generator():
    """Without sample ids the numbers are the generator's, in order; a shared draw takes one row of them."""
    draws = GeneratorDraws(3, torch.Generator().manual_seed(11), torch.device("cpu"))
    expected = torch.Generator().manual_seed(11)
    assert torch.equal(draws.uniform(Stream.GRID, 4), torch.rand(3, 4, generator=expected))
    assert torch.equal(draws.shared(Stream.GRID, 2), torch.rand(1, 2, generator=expected).repeat(3, 1))
    assert torch.equal(draws.uniform(Stream.TIES, 1), torch.rand(3, 1, generator=expected))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_ids_of_any_integer_type(dtype):
    """The index of an image counts, not the integer type it comes in."""
    ids = torch.tensor([0, 3, 200])
    assert torch.equal(hash_uniform(0, 1, ids.to(dtype), Stream.GRID, 2), hash_uniform(0, 1, ids, Stream.GRID, 2))
