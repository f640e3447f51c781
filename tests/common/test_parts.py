"""The EM cut: against scikit-learn and against mixtures written out here, its monotony, and its promises to callers."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

from common.parts import (
    PartsOptions,
    _kmeans_plus_plus,
    _lloyd,
    _random_patches,
    fit_parts,
    partition_parts,
    start_draws,
)

SETTINGS = settings(derandomize=True, deadline=None, max_examples=100)
COVARIANCES = ("diagonal", "spherical", "full")
MIXTURES = {
    "diagonal": {"covariance": "diagonal"},
    "spherical": {"covariance": "spherical"},
    "full": {"covariance": "full"},
    "vmf": {"estimator": "vmf"},
    "vmf-random": {"estimator": "vmf", "start": "random"},
    "random": {"start": "random"},
    "greedy": {"start": "greedy", "start_refine": 3},
}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def softmax_graph(seed, batch, patches, features=None, sharpness=3.0, dtype=torch.float32):
    scores = torch.randn(batch, patches, features or patches, generator=seeded(seed), dtype=torch.float64)
    return (scores * sharpness).softmax(dim=-1).to(dtype)


def some_labels(seed, batch, patches, parts):
    """A partition that uses every part."""
    labels = torch.arange(patches) % parts
    order = torch.rand(batch, patches, generator=seeded(seed)).argsort(dim=1)
    return labels[order]


def assert_never_falls(fit):
    """Each entry is at least the one before, to 1e-5 of its size.

    The log-density is a sum of N*D terms of order 1 that may cancel, so its size is taken as at least N*D.
    """
    values = fit.log_likelihood.double()
    size = values[1:].abs().clamp(min=fit.rows.shape[1] * fit.rows.shape[2])
    falls = (values[1:] < values[:-1] - 1e-5 * size) & ~fit.reseeded[1:]
    assert not falls.any(), values.T


def assert_valid(fit, parts):
    """Labels in 0..K-1 and the argmax of finite posteriors that sum to 1; finite weights, means and likelihood."""
    assert fit.labels.dtype == torch.int64
    assert fit.labels.min() >= 0
    assert fit.labels.max() < parts
    assert fit.posteriors.isfinite().all()
    assert (fit.posteriors.sum(dim=2) - 1).abs().max() < 1e-4
    assert torch.equal(fit.labels, fit.posteriors.argmax(dim=2))
    assert (fit.weights.sum(dim=1) - 1).abs().max() < 1e-4
    assert fit.means.isfinite().all()
    assert fit.log_likelihood.isfinite().all()


# --- Against scikit-learn ---------------------------------------------------------------------------------------


def blobs(seed, images, patches, features, parts):
    """Gaussian blobs with spreads of their own, and the blob of each point."""
    random = np.random.default_rng(seed)
    labels = random.integers(parts, size=(images, patches))
    centers = 3 * random.normal(size=(images, parts, features))
    spreads = random.uniform(0.5, 1.5, size=(images, parts, features))
    rows = np.arange(images)[:, None]
    return centers[rows, labels] + spreads[rows, labels] * random.normal(size=(images, patches, features)), labels


def sklearn_precisions(kind, covariances):
    if kind == "full":
        return np.linalg.inv(covariances)
    return 1 / covariances


def sklearn_fit(graph, kind, iterations, weights, means, covariances):
    name = {"diagonal": "diag"}.get(kind, kind)
    mixture = GaussianMixture(
        len(weights), covariance_type=name, tol=0, reg_covar=1e-12, max_iter=iterations, random_state=0,
        weights_init=weights, means_init=means, precisions_init=sklearn_precisions(kind, covariances),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(graph)


def in_graph_units(fit, image, kind):
    """Weights, means and covariances of one image, as of the graph and not of the standardised rows."""
    scale, center = fit.scale[image].double().numpy(), fit.center[image].double().numpy()
    covariances = fit.covariances[image].double().numpy() * (scale.item() ** 2)
    weights = fit.weights[image].double().numpy()
    return weights / weights.sum(), center + scale * fit.means[image].double().numpy(), covariances


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", COVARIANCES)
def test_equals_scikit_learn(kind, dtype):
    """From one start: the log-likelihood of every iteration to 1e-4, and the labels (2 images of 300 x 4, seed 0)."""
    values, planted = blobs(0, 2, 300, 4, 3)
    start = torch.from_numpy((planted + (np.random.default_rng(1).random(planted.shape) < 0.5)) % 3)
    graph, iterations = torch.from_numpy(values).to(dtype), 12
    options = {"covariance": kind, "start_labels": start, "covariance_floor": 1e-9}
    ours = fit_parts(graph, 3, iterations=iterations, **options)
    first = fit_parts(graph, 3, iterations=0, **options)
    assert not ours.reseeded.any()
    for image in range(2):
        data = graph[image].double().numpy()
        to_graph = data.size * np.log(ours.scale[image].item())  # density of the graph, not of the scaled rows
        for n in range(1, iterations + 1):
            theirs = sklearn_fit(data, kind, n, *in_graph_units(first, image, kind))
            expected = theirs.score(data) * len(data)
            assert ours.log_likelihood[n, image].item() - to_graph == pytest.approx(expected, rel=1e-4)
        assert ours.labels[image].tolist() == theirs.predict(data).tolist()
        tolerance = 1e-6 if dtype == torch.float64 else 2e-3
        weights, means, covariances = in_graph_units(ours, image, kind)
        np.testing.assert_allclose(weights, theirs.weights_, rtol=tolerance)
        np.testing.assert_allclose(means, theirs.means_, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(covariances, theirs.covariances_, rtol=tolerance, atol=tolerance)


def test_first_entry_is_the_likelihood_of_the_start():
    """Entry 0 belongs to the M-step of the start partition: the moments of its parts, by hand."""
    graph, labels = softmax_graph(3, 1, 30, 4, dtype=torch.float64), some_labels(3, 1, 30, 3)
    fit = fit_parts(graph, 3, iterations=0, start_labels=labels, covariance_floor=1e-12)
    rows = fit.rows[0].numpy()
    parts = [rows[(labels[0] == k).numpy()] for k in range(3)]
    joint = np.stack(
        [np.log(len(part) / 30) + stats.norm.logpdf(rows, part.mean(axis=0), part.std(axis=0)).sum(axis=1) for part in parts]
    )
    assert fit.log_likelihood.shape == (1, 1)
    assert fit.log_likelihood.item() == pytest.approx(logsumexp(joint, axis=0).sum())
    np.testing.assert_allclose(fit.posteriors[0].numpy(), np.exp(joint - logsumexp(joint, axis=0)).T, atol=1e-9)


# --- Against mixtures written out here, with the floor at work -------------------------------------------------


def standardised(graph):
    centred = graph - graph.mean(axis=0)
    return centred / np.sqrt((centred**2).mean())


def naive_covariance(kind, scatter, floor, old, accepted):
    """M-step of one part: clamped variances, or for `full` a ridge that is taken only if it does not lower the likelihood."""
    size = len(scatter)
    if kind == "diagonal":
        return np.diag(np.maximum(np.diag(scatter), floor))
    if kind == "spherical":
        return np.eye(size) * max(np.trace(scatter) / size, floor)
    ridged = scatter + floor * np.eye(size)
    if old is None:
        return ridged

    def cost(covariance):
        return np.linalg.slogdet(covariance)[1] + np.trace(np.linalg.solve(covariance, scatter))

    accepted.append(cost(ridged) <= cost(old))
    return ridged if accepted[-1] else old


def naive_em(rows, labels, parts, kind, floor, iterations):
    """EM of one image, part by part and in double precision."""
    posteriors = np.eye(parts)[labels]
    covariances, likelihood, accepted = [None] * parts, [], []
    for _ in range(iterations + 1):
        counts = posteriors.sum(axis=0)
        weights = counts / counts.sum()
        means = posteriors.T @ rows / counts[:, None]
        joint = []
        for k in range(parts):
            gaps = rows - means[k]
            scatter = (posteriors[:, k, None] * gaps).T @ gaps / counts[k]
            covariances[k] = naive_covariance(kind, scatter, floor, covariances[k], accepted)
            joint.append(np.log(weights[k]) + stats.multivariate_normal.logpdf(rows, means[k], covariances[k]))
        joint = np.stack(joint, axis=1)
        evidence = logsumexp(joint, axis=1)
        likelihood.append(evidence.sum())
        posteriors = np.exp(joint - evidence[:, None])
    return posteriors, weights, means, np.stack(covariances), np.array(likelihood), accepted


def as_matrices(covariances, features):
    """Any of the three covariances as [K, D, D]."""
    if covariances.ndim == 3:
        return covariances
    return np.stack([np.diag(np.broadcast_to(covariance, features)) for covariance in covariances])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", COVARIANCES)
def test_equals_naive_em_with_the_floor_active(kind, seed):
    """Softmax rows, N = D = 25, where variances reach the floor of 0.1: every estimate equals the naive EM."""
    graph, start = softmax_graph(seed, 2, 25, sharpness=2.0, dtype=torch.float64), some_labels(seed, 2, 25, 3)
    floor, ridges = {"spherical": 0.9}.get(kind, 0.1), []
    fit = fit_parts(graph, 3, covariance=kind, iterations=8, start_labels=start, covariance_floor=floor)
    assert not fit.reseeded.any()
    for image in range(2):
        rows = standardised(graph[image].numpy())
        posteriors, weights, means, covariances, likelihood, accepted = naive_em(
            rows, start[image].numpy(), 3, kind, floor, iterations=8
        )
        matrices = as_matrices(fit.covariances[image].numpy(), 25)
        np.testing.assert_allclose(fit.log_likelihood[:, image], likelihood, rtol=1e-8)
        np.testing.assert_allclose(fit.posteriors[image], posteriors, atol=1e-7)
        np.testing.assert_allclose(fit.weights[image], weights, atol=1e-8)
        np.testing.assert_allclose(fit.means[image], means, atol=1e-7)
        np.testing.assert_allclose(matrices, covariances, atol=1e-7)
        assert fit.labels[image].tolist() == posteriors.argmax(axis=1).tolist()
        ridges += accepted
        assert kind == "full" or np.isclose(np.diagonal(matrices, axis1=1, axis2=2), floor).any()
    assert kind != "full" or {True, False} == set(ridges)  # some ridged updates are taken, some are not


def naive_spherical_em(rows, means, kappa, iterations):
    """EM of a von Mises-Fisher mixture with equal weights; likelihood without the normalising constant."""
    likelihood = []
    for step in range(iterations + 1):
        joint = kappa * rows @ means.T - np.log(len(means))
        likelihood.append(logsumexp(joint, axis=1).sum())
        posteriors = np.exp(joint - logsumexp(joint, axis=1, keepdims=True))
        if step < iterations:
            means = posteriors.T @ rows
            means /= np.linalg.norm(means, axis=1, keepdims=True)
    return posteriors, means, np.array(likelihood)


@pytest.mark.parametrize("kappa", [5.0, 40.0])
@pytest.mark.parametrize("scaling", ["image", "none"])
def test_vmf_equals_naive_spherical_em(scaling, kappa):
    """Unit rows with scaling `image`, the rows as they are with `none` (softmax rows, N = 20, K = 4, seed 0)."""
    graph, start = softmax_graph(0, 2, 20, dtype=torch.float64), some_labels(0, 2, 20, 4)
    fit = fit_parts(graph, 4, estimator="vmf", kappa=kappa, scaling=scaling, iterations=10, start_labels=start)
    assert not fit.reseeded.any()
    assert fit.covariances is None
    for image in range(2):
        rows = graph[image].numpy()
        if scaling == "image":
            rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        means = np.stack([rows[start[image] == k].sum(axis=0) for k in range(4)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        posteriors, means, likelihood = naive_spherical_em(rows, means, kappa, 10)
        np.testing.assert_allclose(fit.log_likelihood[:, image], likelihood, rtol=1e-9)
        np.testing.assert_allclose(fit.posteriors[image], posteriors, atol=1e-8)
        np.testing.assert_allclose(fit.means[image], means, atol=1e-8)
        assert fit.weights[image].tolist() == [0.25] * 4


@pytest.mark.parametrize(("parts", "options"), [(5, {"kappa": 10.0}), (12, {"kappa": 60.0, "start": "random", "iterations": 0})])
def test_per_patch_label_by_hand(parts, options):
    """`per-patch` divides each part's posteriors by 1e-6 + their sum over the patches before the argmax; small parts gain."""
    graph, differ = softmax_graph(1, 6, 30, sharpness=1.5), 0
    options = {"estimator": "vmf", "iterations": 5, **options}
    fit = fit_parts(graph, parts, generator=seeded(1), **options)
    labels = partition_parts(graph, parts, generator=seeded(1), hard_label="per-patch", **options)
    for image in range(6):
        posteriors = fit.posteriors[image].double().numpy()
        shares = [[posteriors[i, k] / (1e-6 + posteriors[:, k].sum()) for k in range(parts)] for i in range(30)]
        assert labels[image].tolist() == np.argmax(shares, axis=1).tolist()
        differ += (labels[image] != fit.labels[image]).sum().item()
    assert differ > 0


def test_posterior_label_is_the_default():
    """partition_parts gives the labels of fit_parts: argmax of the posterior."""
    graph = softmax_graph(2, 3, 20)
    fit = fit_parts(graph, 4, generator=seeded(0))
    assert torch.equal(partition_parts(graph, 4, generator=seeded(0)), fit.labels)
    assert torch.equal(fit.labels, fit.posteriors.argmax(dim=2))


# --- The likelihood never falls, and the partition is always valid ----------------------------------------------


@pytest.mark.parametrize("mixture", MIXTURES)
@SETTINGS
@given(st.integers(1, 14), st.integers(1, 3), st.data(), st.integers(0, 2**32 - 1), st.floats(0, 8))
def test_likelihood_never_falls(mixture, patches, wide, data, seed, sharpness):
    """Random softmax graphs from nearly uniform to nearly one-hot, K from 1 to N, also D > N (heads side by side)."""
    parts = data.draw(st.integers(1, patches))
    graph = softmax_graph(seed, 2, patches, wide * patches, sharpness)
    fit = fit_parts(graph, parts, generator=seeded(seed), iterations=8, **MIXTURES[mixture])
    assert_valid(fit, parts)
    assert_never_falls(fit)


@pytest.mark.parametrize("mixture", ["diagonal", "spherical", "vmf"])
@pytest.mark.parametrize("parts", [10, 40])
def test_likelihood_never_falls_at_full_size(mixture, parts):
    """196 patches, K of the schedule's two ends, 15 iterations (seed 0): and it rises."""
    fit = fit_parts(softmax_graph(0, 4, 196), parts, generator=seeded(0), **MIXTURES[mixture])
    assert_valid(fit, parts)
    assert_never_falls(fit)
    assert (fit.log_likelihood[-1] > fit.log_likelihood[0]).all()


BASE = softmax_graph(0, 2, 12)
ODD = torch.arange(12)[None, :, None] % 2
WEIRD = {
    "constant": torch.full((2, 12, 12), 0.3),
    "zero": torch.zeros(2, 12, 12),
    "one row repeated": BASE[:, :1].repeat(1, 12, 1),
    "three rows repeated": BASE[:, [0, 1, 2] * 4],
    "huge": BASE * 1e30,
    "tiny": BASE * 1e-30,
    "denormal": BASE * 1e-42,
    "ends of float32": (BASE - BASE.median()).sign() * 3e38,
    "one huge row": torch.where(torch.arange(12)[:, None] == 5, BASE * 1e30, BASE),
    "one tiny row": torch.where(torch.arange(12)[:, None] == 5, BASE * 1e-30, BASE),
    "huge and tiny rows": torch.where(ODD == 0, BASE * 1e30, BASE * 1e-30),
    "every other row zero": BASE * ODD,
    "one-hot": torch.eye(12).repeat(2, 1, 1),
    "large offset": BASE + 1e4,
    "a single entry": torch.zeros(2, 12, 12).index_put((torch.tensor(0), torch.tensor(3), torch.tensor(4)), torch.tensor(1.0)),
}


@pytest.mark.parametrize("parts", [1, 2, 5, 12])
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("weird", WEIRD)
def test_weird_rows_give_a_valid_partition(weird, mixture, parts):
    """Constant, repeated, huge, tiny and zero rows: valid labels, finite estimates, and the likelihood never falls."""
    fit = fit_parts(WEIRD[weird], parts, generator=seeded(0), **MIXTURES[mixture])
    assert_valid(fit, parts)
    assert_never_falls(fit)


@pytest.mark.parametrize("weird", WEIRD)
def test_weird_rows_without_reseeding(weird):
    """The same without re-seeding, which then is never reported."""
    fit = fit_parts(WEIRD[weird], 5, generator=seeded(0), reseed_empty=False)
    assert_valid(fit, 5)
    assert_never_falls(fit)
    assert not fit.reseeded.any()


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("weird", WEIRD)
def test_weird_rows_with_a_small_floor(weird, kind):
    """A floor of a millionth of the variance, where float32 begins to round it away, still gives a valid partition."""
    assert_valid(fit_parts(WEIRD[weird], 5, generator=seeded(0), covariance=kind, covariance_floor=1e-6), 5)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_one_part_takes_all(mixture):
    """K = 1: label 0 everywhere, weight 1, and the mean is the mean of the rows."""
    fit = fit_parts(BASE, 1, generator=seeded(0), **MIXTURES[mixture])
    assert torch.equal(fit.labels, torch.zeros(2, 12, dtype=torch.int64))
    assert fit.weights.tolist() == [[1.0], [1.0]]
    mean = fit.rows.mean(dim=1, keepdim=True)
    expected = mean / mean.norm(dim=2, keepdim=True) if mixture.startswith("vmf") else mean
    assert torch.allclose(fit.means, expected, atol=1e-5)


@pytest.mark.parametrize("mixture", ["diagonal", "spherical", "full", "vmf", "random"])
def test_as_many_parts_as_patches(mixture):
    """K = N on distinct rows: the start makes every patch a part of its own."""
    fit = fit_parts(BASE, 12, generator=seeded(0), iterations=0, **MIXTURES[mixture])
    assert fit.labels.sort(dim=1).values.tolist() == [list(range(12))] * 2


def test_wide_rows_hold_the_heads_side_by_side():
    """D > N (4 heads of 12): planted parts that only the second head shows are found."""
    planted = torch.arange(12) % 3
    shown = (planted[:, None] == planted).double() / 4
    flat = torch.full((12, 12), 1 / 12, dtype=torch.float64)
    labels = partition_parts(torch.cat([flat, shown, flat, flat], dim=1)[None], 3)[0]
    assert adjusted_rand_score(planted, labels) == 1


# --- Re-seeding -------------------------------------------------------------------------------------------------


def test_empty_parts_move_to_the_worst_explained_patches():
    """Two parts empty at the start move to the two outliers, worst first, and are reported once."""
    rows = torch.zeros(1, 20, 2, dtype=torch.float64)
    rows[0, :, 0] = torch.linspace(-0.05, 0.05, 20)
    rows[0, 7], rows[0, 11] = torch.tensor([30.0, 0.0]), torch.tensor([0.0, 25.0])
    start = torch.zeros(1, 20, dtype=torch.int64)
    fit = fit_parts(rows, 3, start_labels=start, iterations=1, scaling="none", covariance="spherical")
    assert fit.reseeded[:, 0].tolist() == [False, True]
    assert fit.means[0, 1:].tolist() == [[30.0, 0.0], [0.0, 25.0]]
    kept = fit_parts(rows, 3, start_labels=start, iterations=1, scaling="none", covariance="spherical", reseed_empty=False)
    assert not kept.reseeded.any()
    assert not torch.equal(kept.means, fit.means)


@pytest.mark.parametrize(("reseed", "score"), [(True, 1.0), (False, 0.0)])
@pytest.mark.parametrize("kind", ["diagonal", "spherical"])
def test_only_reseeding_leaves_a_start_with_one_part(kind, reseed, score):
    """From a start that puts every patch in part 0, three planted parts are found with re-seeding, none without (seed 0)."""
    graph, planted = planted_graph(0, 1, 30, 3, noise=0.05)
    start = torch.zeros(1, 30, dtype=torch.int64)
    labels = partition_parts(graph, 3, start_labels=start, covariance=kind, reseed_empty=reseed)
    assert adjusted_rand_score(planted[0], labels[0]) == score


# --- Independence, equivariance, invariance ---------------------------------------------------------------------


@pytest.mark.parametrize("mixture", MIXTURES)
def test_parts_do_not_depend_on_the_batch(mixture):
    """An image has the same parts alone, in a batch and in a part of it, and so do the masks made of them."""
    graph = softmax_graph(5, 8, 25)
    features = start_draws(6, 25, PartsOptions(**MIXTURES[mixture]))
    uniforms = torch.rand(8, features, generator=seeded(5))
    whole = partition_parts(graph, 6, uniforms=uniforms, **MIXTURES[mixture])
    for rows in ([0], [3], [7], [6, 2], [1, 4, 5]):
        assert torch.equal(partition_parts(graph[rows], 6, uniforms=uniforms[rows], **MIXTURES[mixture]), whole[rows])


@pytest.mark.parametrize("mixture", ["diagonal", "spherical", "full", "vmf"])
def test_permuting_patches_permutes_parts(mixture):
    """Patches in another order, with the start in that order too, have the same parts (seed 6)."""
    graph, start = softmax_graph(6, 3, 20, dtype=torch.float64), some_labels(6, 3, 20, 4)
    order = torch.randperm(20, generator=seeded(6))
    moved = partition_parts(graph[:, order][:, :, order], 4, start_labels=start[:, order], **MIXTURES[mixture])
    assert torch.equal(moved, partition_parts(graph, 4, start_labels=start, **MIXTURES[mixture])[:, order])


@pytest.mark.parametrize("mixture", ["diagonal", "spherical", "full", "vmf"])
@pytest.mark.parametrize("factor", [1000.0, 1e-9, 2.0**-10])
def test_parts_do_not_depend_on_the_scale(mixture, factor):
    """The floor, and kappa, are relative to the image."""
    graph = softmax_graph(7, 4, 20, dtype=torch.float64)
    parts = partition_parts(graph, 5, generator=seeded(7), **MIXTURES[mixture])
    assert torch.equal(partition_parts(graph * factor, 5, generator=seeded(7), **MIXTURES[mixture]), parts)


@pytest.mark.parametrize("kind", COVARIANCES)
def test_parts_do_not_depend_on_a_constant_per_feature(kind):
    """Rows are centred, so what every patch shares is no part of the cut."""
    graph, constant = softmax_graph(8, 4, 20, dtype=torch.float64), torch.rand(4, 1, 20, generator=seeded(8)) * 5
    parts = partition_parts(graph, 5, generator=seeded(8), covariance=kind)
    assert torch.equal(partition_parts(graph + constant, 5, generator=seeded(8), covariance=kind), parts)


def test_without_scaling_the_floor_is_absolute():
    """`scaling="none"` leaves rows as they are: 196ths are far below the floor, and the variances all stand on it."""
    graph = softmax_graph(9, 1, 20, sharpness=0.5)
    fit = fit_parts(graph, 3, scaling="none", generator=seeded(9))
    assert torch.equal(fit.rows, graph)
    assert torch.equal(fit.covariances, torch.full((1, 3, 20), 0.3))
    assert fit_parts(graph, 3, generator=seeded(9)).covariances.max() > 0.3


def test_standardised_rows_give_the_graph_back():
    """graph = center + scale * rows; the rows have mean 0 in every feature and mean square 1 an image."""
    graph = softmax_graph(10, 3, 15) * torch.tensor([1.0, 1e6, 1e-12])[:, None, None]
    fit = fit_parts(graph, 3)
    gap = (fit.center + fit.scale * fit.rows - graph).abs().amax(dim=(1, 2))
    assert (gap < 1e-6 * graph.amax(dim=(1, 2))).all()
    assert fit.rows.mean(dim=1).abs().max() < 1e-6
    assert torch.allclose(fit.rows.square().mean(dim=(1, 2)), torch.ones(3), rtol=1e-5)


def planted_graph(seed, batch, patches, parts, noise):
    """Attention that mostly stays inside planted parts, as a fresh random partition of each image."""
    labels = some_labels(seed, batch, patches, parts)
    inside = (labels[:, :, None] == labels[:, None]).double()
    shaken = inside / inside.sum(dim=2, keepdim=True)
    random = torch.rand(batch, patches, patches, generator=seeded(seed), dtype=torch.float64)
    return shaken * (1 + noise * (random - 0.5)) + noise * random / patches, labels


@pytest.mark.parametrize("mixture", ["diagonal", "spherical", "full", "vmf"])
def test_planted_parts_are_recovered(mixture):
    """At low noise the cut is the planted partition (adjusted Rand index above 0.99 on average, 8 images, seed 11)."""
    graph, planted = planted_graph(11, 8, 40, 4, noise=0.02)
    labels = partition_parts(graph.float(), 4, generator=seeded(11), **MIXTURES[mixture])
    assert np.mean([adjusted_rand_score(*pair) for pair in zip(planted, labels, strict=True)]) > 0.99


# --- The start --------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(2, 20), st.data(), st.integers(0, 2**32 - 1), st.sampled_from(["greedy", "kmeans++", "random"]))
def test_seeds_of_distinct_rows_are_distinct(patches, data, seed, start):
    """K distinct seeds give K parts at the start: none is empty."""
    parts = data.draw(st.integers(1, patches))
    graph = softmax_graph(seed, 2, patches, sharpness=2.0)
    fit = fit_parts(graph, parts, iterations=0, generator=seeded(seed), start=start, covariance_floor=1e-6)
    assert (fit.weights * patches).round().min() >= 1


def test_kmeans_plus_plus_follows_squared_distances():
    """First seed uniform, second in proportion to the squared distance from it (chi-square on all pairs, seed 12)."""
    points = torch.tensor([0.0, 1.0, 1.5, 4.0, 6.0], dtype=torch.float64)
    distances = (points[:, None] - points).square()
    drawn = _kmeans_plus_plus(distances.expand(20000, 5, 5), 2, torch.rand(20000, 2, generator=seeded(12), dtype=torch.float64))
    counts = np.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25)
    expected = 20000 / 5 * (distances / distances.sum(dim=1, keepdim=True)).flatten().numpy()
    assert counts[expected == 0].sum() == 0
    assert stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_kmeans_plus_plus_third_seed_measures_to_the_nearest():
    """The third seed is drawn by the distance to the nearer of the first two (chi-square, seed 13)."""
    points = torch.tensor([0.0, 1.0, 3.0, 7.0], dtype=torch.float64)
    distances = (points[:, None] - points).square()
    drawn = _kmeans_plus_plus(distances.expand(40000, 4, 4), 3, torch.rand(40000, 3, generator=seeded(13), dtype=torch.float64))
    third = drawn[(drawn[:, 0] == 0) & (drawn[:, 1] == 3), 2]
    assert stats.chisquare(np.bincount(third, minlength=4)[1:3], len(third) * np.array([1, 9]) / 10).pvalue > 1e-3
    assert set(third.tolist()) == {1, 2}


def candidates_by_hand(distances, seeds, draws):
    """What a greedy seed chooses from, in plain loops: each candidate, and the sum that it would leave."""
    closest = distances[seeds].min(axis=0)
    cumulative = closest.cumsum()
    places = [int(np.searchsorted(cumulative, draw * cumulative[-1], side="right")) for draw in draws]
    return {place: np.minimum(closest, distances[place]).sum() for place in places}


@pytest.mark.parametrize(("parts", "candidates"), [(1, 4), (2, 1), (6, 5), (12, 16)])
def test_greedy_seeds_equal_plain_loops(parts, candidates):
    """From the same uniform numbers, in float64 (30 points in 3 dimensions, 4 images, seed 17)."""
    points = torch.randn(4, 30, 3, generator=seeded(17), dtype=torch.float64)
    distances = torch.cdist(points, points).square()
    uniforms = torch.rand(4, 1 + (parts - 1) * candidates, generator=seeded(18), dtype=torch.float64)
    seeds = _kmeans_plus_plus(distances, parts, uniforms)
    for image in range(4):
        chosen, draws = seeds[image].tolist(), uniforms[image].numpy()
        assert chosen[0] == int(draws[0] * 30)
        for k in range(1, parts):
            left = candidates_by_hand(distances[image].numpy(), chosen[:k], draws[1 + (k - 1) * candidates :][:candidates])
            tied = [patch for patch, total in left.items() if total <= min(left.values()) * (1 + 1e-5)]
            assert chosen[k] == tied[0]  # two neighbours can leave the same sum: the one drawn first


def test_rounding_does_not_choose_greedy_seeds():
    """Graphs that differ by rounding have the same seeds, also where two patches are each other's nearest (seed 30)."""
    rows = torch.randn(64, 16, 16, generator=seeded(30))
    noisy = rows * (1 + 1e-6 * torch.randn(rows.shape, generator=seeded(31)))
    uniforms = torch.rand(64, 1 + 9 * 16, generator=seeded(32))
    seeds = [_kmeans_plus_plus(torch.cdist(points, points).square(), 10, uniforms) for points in (rows, noisy)]
    assert torch.equal(*seeds)


def test_greedy_seeds_leave_less_than_plain_ones():
    """Sum of squared distances to the nearest seed, mean of 200 draws on the same points (seed 19)."""
    points = torch.randn(1, 60, 4, generator=seeded(19)).expand(200, -1, -1)
    distances = torch.cdist(points, points).square()
    plain = _kmeans_plus_plus(distances, 8, torch.rand(200, 8, generator=seeded(20)))
    greedy = _kmeans_plus_plus(distances, 8, torch.rand(200, 1 + 7 * 8, generator=seeded(20)))
    left = [distances.gather(1, s[..., None].expand(-1, -1, 60)).amin(dim=1).sum(dim=1).mean() for s in (plain, greedy)]
    assert left[1] < 0.9 * left[0]


def test_lloyd_ends_where_scikit_learn_does():
    """Enough steps from one partition: the partition of KMeans from the same means (40 points, 5 parts, seed 21)."""
    rows = torch.randn(3, 40, 4, generator=seeded(21), dtype=torch.float64)
    labels = torch.randint(5, (3, 40), generator=seeded(22))
    refined = _lloyd(rows, labels, 5, 100)
    for image in range(3):
        means = np.stack([rows[image][labels[image] == part].mean(dim=0).numpy() for part in range(5)])
        theirs = KMeans(5, init=means, n_init=1, max_iter=100, tol=0).fit(rows[image].numpy())
        assert refined[image].tolist() == theirs.labels_.tolist()


def test_lloyd_never_raises_the_sum_and_leaves_empty_parts_empty():
    """Sum of squared distances to the means, step by step (seed 23); part 5 of 6 has no patch."""
    rows = torch.randn(8, 50, 6, generator=seeded(23), dtype=torch.float64)
    labels = torch.randint(5, (8, 50), generator=seeded(24))
    sums = []
    for steps in range(8):
        members = torch.nn.functional.one_hot(_lloyd(rows, labels, 6, steps), 6).double()
        means = members.transpose(1, 2) @ rows / members.sum(dim=1).clamp(min=1)[..., None]
        sums.append((rows - members @ means).square().sum(dim=(1, 2)))
        assert (members[..., 5] == 0).all()
    assert all((after <= before + 1e-9).all() for before, after in itertools.pairwise(sums))
    assert (sums[-1] < sums[0]).all()


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-24])
def test_seeds_at_the_ends_of_the_uniform_law(extreme):
    """Numbers of exactly 0 and of just below 1 still give K different seeds."""
    for start in ("greedy", "kmeans++", "random"):
        count = start_draws(6, 25, PartsOptions(start=start))
        fit = fit_parts(BASE, 6, iterations=0, uniforms=torch.full((2, count), extreme), start=start)
        assert (fit.weights > 0).all()


def test_random_start_draws_every_pair_alike():
    """The random start takes K different patches, each ordered pair as often as any other (chi-square, seed 14)."""
    drawn = _random_patches(5, torch.rand(20000, 2, generator=seeded(14)))
    counts = np.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25).reshape(5, 5)
    assert counts.trace() == 0
    assert stats.chisquare(counts[~np.eye(5, dtype=bool)]).pvalue > 1e-3


def test_random_directions_are_isotropic():
    """Random directions are unit vectors; in three dimensions each coordinate is uniform on [-1, 1] (seed 15)."""
    graph = softmax_graph(15, 500, 4, 3)
    means = fit_parts(graph, 4, estimator="vmf", start="random", iterations=0, generator=seeded(15)).means.reshape(-1, 3)
    assert torch.allclose(means.norm(dim=1), torch.ones(2000))
    for coordinate in means.T.numpy():
        assert stats.kstest(coordinate, "uniform", args=(-1, 2)).pvalue > 1e-3


def test_start_draws_counts():
    """1 + (K-1)*C numbers for greedy seeds, K for plain ones, 2*K*D for directions; `uniforms` of that size decide the start."""
    assert start_draws(5, 20) == 1 + 4 * 16
    assert start_draws(5, 20, PartsOptions(start="kmeans++")) == 5
    assert start_draws(5, 20, PartsOptions(start="random")) == 5
    assert start_draws(5, 20, PartsOptions(estimator="vmf", start="kmeans++")) == 5
    assert start_draws(5, 20, PartsOptions(estimator="vmf", start="random")) == 200
    assert start_draws(5, 20, PartsOptions(start="greedy", start_candidates=7)) == 1 + 4 * 7
    assert start_draws(1, 20, PartsOptions(start="greedy")) == 1
    uniforms = torch.rand(2, 65, generator=seeded(16))
    drawn = partition_parts(BASE, 5, generator=seeded(16))
    assert torch.equal(partition_parts(BASE, 5, uniforms=uniforms, generator=seeded(99)), drawn)


def test_start_labels_decide_the_start():
    """A given partition is the start, whatever the generator."""
    start = some_labels(17, 2, 12, 4)
    fit = fit_parts(BASE, 4, iterations=0, start_labels=start, generator=seeded(1))
    for k in range(4):
        assert torch.allclose(fit.means[0, k], fit.rows[0, start[0] == k].mean(dim=0), atol=1e-6)


# --- Promises to callers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_graph_names_the_image(bad):
    """NaN and infinity raise, naming the image; the check can be left out."""
    graph = softmax_graph(0, 4, 6)
    graph[2, 1, 3] = graph[3, 0, 0] = bad
    with pytest.raises(ValueError, match=r"image 2\b.*\[2, 3\]"):
        partition_parts(graph, 2)
    assert partition_parts(graph, 2, check_finite=False)[:2].max() < 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_parts": 0}, "num_parts"),
        ({"num_parts": 13}, "num_parts.*12 patches.*13"),
        ({"iterations": -1}, "iterations"),
        ({"estimator": "kmeans"}, "estimator.*'kmeans'"),
        ({"covariance": "tied"}, "covariance.*'tied'"),
        ({"start": "first"}, "start.*'first'"),
        ({"scaling": "batch"}, "scaling.*'batch'"),
        ({"hard_label": "soft"}, "hard_label.*'soft'"),
        ({"covariance_floor": -0.1}, "covariance_floor"),
        ({"covariance_floor": 0.0}, "covariance_floor"),
        ({"kappa": 0.0}, "kappa"),
        ({"uniforms": torch.zeros(2, 4)}, "uniforms"),
        ({"graph": torch.zeros(12, 12)}, "graph"),
    ],
)
def test_bad_arguments_are_named(options, named):
    """Each wrong argument raises ValueError naming it."""
    with pytest.raises(ValueError, match=named):
        partition_parts(**{"graph": BASE, "num_parts": 3, **options})


@pytest.mark.parametrize(
    ("given_type", "computed"),
    [
        (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_precision(given_type, computed):
    """EM runs in float32 at least, also inside autocast, and gives the parts of the widened graph."""
    graph = softmax_graph(0, 2, 10, dtype=given_type)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit = fit_parts(graph, 3, generator=seeded(0))
    outside = fit_parts(graph.to(computed), 3, generator=seeded(0))
    assert fit.posteriors.dtype == fit.means.dtype == fit.log_likelihood.dtype == computed
    assert torch.equal(fit.posteriors, outside.posteriors)


def test_no_gradient_and_no_change_of_the_input():
    """The cut is no part of the graph of gradients, and leaves its input as it was."""
    graph = softmax_graph(0, 2, 10).requires_grad_()
    before = graph.detach().clone()
    fit = fit_parts(graph, 3)
    assert not fit.posteriors.requires_grad
    assert torch.equal(graph, before)


def test_global_random_state_is_left_alone():
    """Randomness comes from the generator; without one the start is the same every time."""
    before = torch.get_rng_state()
    first = partition_parts(BASE, 4)
    assert torch.equal(partition_parts(BASE, 4, generator=seeded(0)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_entries_a_run():
    """One likelihood for the start and one after each M-step; estimates of the right size for each covariance."""
    sizes = {"diagonal": (2, 4, 12), "spherical": (2, 4), "full": (2, 4, 12, 12)}
    for kind, size in sizes.items():
        fit = fit_parts(BASE, 4, covariance=kind, iterations=3)
        assert fit.covariances.shape == size
        assert fit.log_likelihood.shape == fit.reseeded.shape == (4, 2)
