"""The cut with a Potts prior: its bound, its E-step against plain loops, and that it follows the patch grid."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, xlogy

from common.evolved_mask import EvolvedMask
from common.parts import PartsOptions, _expectation, _free_energy, _mean_field, fit_parts, partition_parts, start_draws

SETTINGS = settings(derandomize=True, deadline=None, max_examples=60)
MIXTURES = {
    "diagonal": {"covariance": "diagonal"},
    "spherical": {"covariance": "spherical"},
    "full": {"covariance": "full"},
    "vmf": {"estimator": "vmf"},
    "plain seeds": {"start": "kmeans++", "start_refine": 0},
}
GRIDS = st.tuples(st.integers(1, 5), st.integers(1, 5))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def softmax_graph(seed, batch, patches, sharpness=3.0, dtype=torch.float64):
    return (torch.randn(batch, patches, patches, generator=seeded(seed), dtype=dtype) * sharpness).softmax(dim=-1)


def random_joint(seed, batch, patches, parts, spread=2.0):
    return spread * torch.randn(batch, patches, parts, generator=seeded(seed), dtype=torch.float64)


def pairs(grid):
    """Patches that are neighbours, each pair once."""
    height, width = grid
    across = [(r * width + c, r * width + c + 1) for r in range(height) for c in range(width - 1)]
    return across + [(r * width + c, (r + 1) * width + c) for r in range(height - 1) for c in range(width)]


def free_energy(joint, q, beta, grid):
    """F of one image, pair by pair."""
    agreement = sum(q[i] @ q[j] for i, j in pairs(grid))
    return (q * joint).sum() + beta * agreement - xlogy(q, q).sum()


# --- The bound --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", MIXTURES)
@SETTINGS
@given(grid=GRIDS, data=st.data(), seed=st.integers(0, 2**32 - 1), beta=st.floats(1e-3, 60), sharpness=st.floats(0, 8))
def test_the_bound_never_falls(mixture, grid, data, seed, beta, sharpness):
    """Random graphs on grids of any shape, K from 1 to N, weak to strong priors: each entry of F is at least the one before."""
    patches = grid[0] * grid[1]
    parts = data.draw(st.integers(1, patches))
    graph = softmax_graph(seed, 2, patches, sharpness)
    fit = fit_parts(graph, parts, generator=seeded(seed), iterations=6, smooth=beta, grid_size=grid, **MIXTURES[mixture])
    assert fit.log_likelihood.isfinite().all()
    rises = fit.log_likelihood.diff(dim=0)
    assert (rises[~fit.reseeded[1:]] >= -1e-9 * patches * (patches + beta)).all(), fit.log_likelihood.T
    assert (fit.posteriors.sum(dim=2) - 1).abs().max() < 1e-9
    assert torch.equal(fit.labels, fit.posteriors.argmax(dim=2))


@pytest.mark.parametrize("mixture", ["diagonal", "spherical", "vmf"])
def test_the_bound_never_falls_at_full_size(mixture):
    """196 patches in float32, K 40, beta 16 (seed 0): it rises, to within the rounding of a sum of N*D terms."""
    graph, options = softmax_graph(0, 3, 196, dtype=torch.float32), MIXTURES[mixture]
    fit = fit_parts(graph, 40, generator=seeded(0), smooth=16.0, grid_size=(14, 14), **options)
    rises = fit.log_likelihood.diff(dim=0)
    assert (rises[~fit.reseeded[1:]] >= -1e-5 * 196**2).all()
    assert (fit.log_likelihood[-1] > fit.log_likelihood[0]).all()


@pytest.mark.parametrize("beta", [1e-9, 0.3, 2.0])
@pytest.mark.parametrize("grid", [(2, 3), (1, 5), (3, 1)])
def test_the_bound_is_below_the_sum_over_all_partitions(grid, beta):
    """F is at most log sum_z prod pi p exp(beta pairs), summed over every partition into 3 parts; equal as beta goes to 0."""
    patches = grid[0] * grid[1]
    joint = random_joint(1, 4, patches, 3)
    _, _, bound = _expectation(joint, None, beta, grid)
    for image in range(4):
        values = [
            joint[image, range(patches), z].sum().item() + beta * sum(z[i] == z[j] for i, j in pairs(grid))
            for z in itertools.product(range(3), repeat=patches)
        ]
        exact = logsumexp(values)
        assert bound[image].item() <= exact + 1e-9
        assert beta > 1e-6 or bound[image].item() == pytest.approx(exact)


def test_each_half_of_an_update_raises_the_bound():
    """Patch by patch in plain loops, one colour after the other: the same posteriors, and F never falls at any patch."""
    grid, beta, parts = (3, 4), 1.7, 3
    joint = random_joint(2, 5, 12, parts)
    before = random_joint(3, 5, 12, parts).softmax(dim=2)
    updated = _mean_field(joint, before, beta, grid)
    near = {i: [j for pair in pairs(grid) for j in pair if i in pair and j != i] for i in range(12)}
    for image in range(5):
        q, scores = before[image].numpy().copy(), joint[image].numpy()
        bounds = [free_energy(scores, q, beta, grid)]
        for colour in (0, 1):
            for i in (i for i in range(12) if (i // 4 + i % 4) % 2 == colour):
                logits = scores[i] + beta * sum(q[j] for j in near[i])
                q[i] = np.exp(logits - logsumexp(logits))
                bounds.append(free_energy(scores, q, beta, grid))
        assert all(after >= earlier - 1e-12 for earlier, after in itertools.pairwise(bounds))
        assert bounds[-1] > bounds[0]
        np.testing.assert_allclose(updated[image], q, atol=1e-12)
        assert _free_energy(joint, updated, beta, grid)[image].item() == pytest.approx(bounds[-1])


def naive_em(rows, labels, parts, floor, iterations, beta, grid):
    """EM of one image with a diagonal Gaussian and the Potts prior, in plain loops."""
    q, started, bounds = np.eye(parts)[labels], False, []
    for _ in range(iterations + 1):
        counts = q.sum(axis=0)
        means = q.T @ rows / counts[:, None]
        variances = np.maximum(q.T @ rows**2 / counts[:, None] - means**2, floor)
        gaps = (rows[:, None] - means) ** 2 / variances + np.log(2 * np.pi * variances)
        joint = np.log(counts / counts.sum()) - 0.5 * gaps.sum(axis=2)
        if not started:
            q, started = np.exp(joint - logsumexp(joint, axis=1, keepdims=True)), True
        for colour in (0, 1):
            for i in (i for i in range(len(rows)) if (i // grid[1] + i % grid[1]) % 2 == colour):
                logits = joint[i] + beta * sum(q[a + b - i] for a, b in pairs(grid) if i in (a, b))
                q[i] = np.exp(logits - logsumexp(logits))
        bounds.append(free_energy(joint, q, beta, grid))
    return q, np.array(bounds)


@pytest.mark.parametrize("beta", [0.5, 4.0])
def test_equals_em_in_plain_loops(beta):
    """Posteriors and every entry of the bound, on 4 x 6 patches from a given start (seed 4)."""
    grid, start = (4, 6), torch.arange(24).roll(3).expand(2, -1) % 3
    graph = softmax_graph(4, 2, 24, 2.0)
    fit = fit_parts(graph, 3, iterations=5, start_labels=start, smooth=beta, grid_size=grid, covariance_floor=0.1)
    assert not fit.reseeded.any()
    for image in range(2):
        posteriors, bounds = naive_em(fit.rows[image].numpy(), start[image].numpy(), 3, 0.1, 5, beta, grid)
        np.testing.assert_allclose(fit.posteriors[image], posteriors, atol=1e-7)
        np.testing.assert_allclose(fit.log_likelihood[:, image], bounds, rtol=1e-8)


# --- What it does to parts --------------------------------------------------------------------------------------


def noisy_halves(seed, grid, noise):
    """Attention of patches that stay in the left or right half of a grid, shaken; and the halves."""
    height, width = grid
    half = (torch.arange(width) >= width // 2).long().repeat(height)
    tokens = torch.eye(2, dtype=torch.float64)[half] * 4
    tokens = tokens + noise * torch.randn(6, height * width, 2, generator=seeded(seed), dtype=torch.float64)
    return (tokens @ tokens.transpose(1, 2)).softmax(dim=2), half


def disagreeing(labels, grid):
    maps = labels.reshape(-1, *grid)
    return (maps[:, 1:] != maps[:, :-1]).sum().item() + (maps[:, :, 1:] != maps[:, :, :-1]).sum().item()


def test_neighbours_join():
    """Of noisy halves, 6 x 8 patches (seed 5): the stronger the prior, the fewer neighbours are in different parts."""
    graph, half = noisy_halves(5, (6, 8), 1.6)
    start = half.expand(6, -1)
    counts = [
        disagreeing(partition_parts(graph, 2, start_labels=start, smooth=beta, grid_size=(6, 8)), (6, 8)) for beta in (0, 5, 50)
    ]
    assert counts[0] > counts[1] > counts[2]


def test_the_grid_says_who_the_neighbours_are():
    """The same rows on 4 x 6 and on 6 x 4 are other parts, and transposing patches with their grid transposes the parts."""
    graph, start = softmax_graph(6, 4, 24, 1.0), torch.randint(3, (4, 24), generator=seeded(6))
    options = {"smooth": 8.0, "iterations": 3}
    wide = partition_parts(graph, 3, start_labels=start, grid_size=(4, 6), **options)
    assert not torch.equal(wide, partition_parts(graph, 3, start_labels=start, grid_size=(6, 4), **options))
    turn = torch.arange(24).reshape(4, 6).T.flatten()
    turned = partition_parts(graph[:, turn][:, :, turn], 3, start_labels=start[:, turn], grid_size=(6, 4), **options)
    assert torch.equal(turned, wide[:, turn])


@pytest.mark.parametrize("mixture", MIXTURES)
def test_no_prior_is_the_cut_without_it(mixture):
    """smooth = 0 gives every bit of the fit without a grid, and is the default."""
    graph = softmax_graph(7, 3, 20, dtype=torch.float32)
    plain = fit_parts(graph, 4, generator=seeded(7), **MIXTURES[mixture])
    off = fit_parts(graph, 4, generator=seeded(7), smooth=0.0, grid_size=(4, 5), **MIXTURES[mixture])
    assert torch.equal(off.posteriors, plain.posteriors)
    assert torch.equal(off.log_likelihood, plain.log_likelihood)
    assert not torch.equal(
        fit_parts(graph, 4, generator=seeded(7), smooth=1.0, grid_size=(4, 5), **MIXTURES[mixture]).posteriors, plain.posteriors
    )


def test_smooth_parts_do_not_depend_on_the_batch():
    """An image has the same parts alone and in a batch."""
    graph, options = softmax_graph(8, 6, 24, dtype=torch.float32), PartsOptions(smooth=4.0)
    uniforms = torch.rand(6, start_draws(5, 24, options), generator=seeded(8))
    whole = partition_parts(graph, 5, options, uniforms=uniforms, grid_size=(3, 8))
    for rows in ([0], [5, 2], [1, 3, 4]):
        assert torch.equal(partition_parts(graph[rows], 5, options, uniforms=uniforms[rows], grid_size=(3, 8)), whole[rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth": 1.0}, "smooth above 0 needs grid_size"),
        ({"smooth": 1.0, "grid_size": (3, 5)}, "grid_size 3x5 is not a grid of the 12 patches"),
        ({"grid_size": (-3, -4)}, "grid_size -3x-4 is not a grid of the 12 patches"),
        ({"smooth": -1.0}, "smooth must be 0 or more"),
        ({"smooth": math.nan}, "smooth must be 0 or more"),
        ({"smooth": math.inf}, "smooth must be 0 or more"),
    ],
)
def test_a_missing_grid_is_refused(options, message):
    """A prior without its grid, a grid of other patches and values that are no weight."""
    with pytest.raises(ValueError, match=message):
        partition_parts(softmax_graph(0, 1, 12), 3, **options)


def test_masks_hand_on_their_grid(random_attention):
    """EvolvedMask cuts with the prior on its own grid; states from before the option load as smooth = 0."""
    attention, ids = random_attention(9, 4, 24, sharpness=1.0), torch.arange(4)

    def maker(grid, **options):
        return EvolvedMask(grid, 12, 10, num_parts=4, alpha=1.0, num_prefix_tokens=0, **options)

    parts = {
        (grid, beta): maker(grid, smooth=beta)(ids, lambda rows: attention[rows], ids).parts
        for grid in ((4, 6), (6, 4))
        for beta in (0.0, 12.0)
    }
    assert torch.equal(parts[(4, 6), 0.0], parts[(6, 4), 0.0])
    assert not torch.equal(parts[(4, 6), 12.0], parts[(6, 4), 12.0])
    assert disagreeing(parts[(4, 6), 12.0], (4, 6)) < disagreeing(parts[(4, 6), 0.0], (4, 6))
    state = maker((4, 6)).state_dict()
    del state["config"]["smooth"]
    maker((4, 6)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"smooth 0\.0 -> 2\.0"):
        maker((4, 6), smooth=2.0).load_state_dict(state)
