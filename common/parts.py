"""Batched EM graph cut: patch graph -> parts (Eq. 10-16).

Patch i is described by its row of the graph, phi_i = w_i. Rows are drawn from a mixture of K parts; EM fits the
mixture to every image of the batch at once, and each patch goes to the part with the largest posterior.

With smooth = beta > 0 the parts z_i of neighbours are drawn to each other by a Potts prior, and E_ik of Eq. 12 becomes
q_ik, the mean-field posterior. E-step and M-step then both climb the (negative) variational free energy

    F = sum_ik q_ik log(pi_k p_k(v_i)) + beta sum_(i,j) sum_k q_ik q_jk - sum_ik q_ik log q_ik,

the second sum over the pairs of patches side by side or one above the other. F is a lower bound on the logarithm of
sum_z prod_i pi_(z_i) p_(z_i)(v_i) exp(beta * pairs in one part), the prior's own normalising constant left out; at beta = 0
it is the log-likelihood. q_i is proportional to pi_k p_k(v_i) exp(beta * sum of q_jk over the neighbours j). Patches of one
colour of the checkerboard have no neighbour among themselves, so that all of one colour, then all of the other, are
set to their maximum at once, and F never falls.

B batch (images)   H, W patch grid   N = H*W patches   D features of a row (N, or more with heads side by side)   K parts
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from .draws import uniform_numbers
from .precision import full_precision

Estimator = Literal["gaussian", "vmf"]
Covariance = Literal["diagonal", "spherical", "full"]
Start = Literal["greedy", "kmeans++", "random"]
Scaling = Literal["image", "none"]
HardLabel = Literal["posterior", "per-patch"]

_WORDS = {
    "estimator": get_args(Estimator),
    "covariance": get_args(Covariance),
    "start": get_args(Start),
    "scaling": get_args(Scaling),
    "hard_label": get_args(HardLabel),
}

DEFAULT_FLOOR = 0.3
"""Smallest variance of a part, as a share of the image's mean variance. docs/method.md says how it was chosen."""

DEFAULT_CANDIDATES = 16
"""Candidates of a greedy seed. docs/LOG.md compares other numbers."""

_EMPTY = 1e-3  # a part that explains less than this many patches is empty
_TINY = 1e-30
_TIED = 1e-5  # sums of a greedy seed's candidates that differ by less than this share are equal up to rounding
_ROUNDING = 1e-6  # spread below this share of the largest entry is rounding noise: the rows are constant


@dataclass(frozen=True)
class PartsOptions:
    """Options of the graph cut; checked when built. The defaults are the paper's reading (docs/method.md).

    Attributes:
        estimator: "gaussian" (Eq. 10-11) or "vmf", von Mises-Fisher with equal weights and a fixed concentration
            (spherical EM, Banerjee et al. 2005, the paper's reference 1).
        covariance: of the Gaussian. "full" needs memory for several [B, K, D, D].
        covariance_floor: variances (for "full", a ridge) are not allowed below this, in units of the scaled rows.
            Below about 1e-6 the rounding of float32 takes over.
        kappa: concentration of vmf.
        iterations: M-steps, 0 or more.
        start: "greedy" k-means++ seeds: of several candidates for a seed, the one that leaves the smallest sum of squared
            distances; "kmeans++" seeds, one candidate each; "random" patches for the Gaussian, random directions for vmf.
        start_candidates: of each greedy seed.
        start_refine: steps of Lloyd's k-means from the seeds' partition to the one that EM starts from (not from random
            directions).
        scaling: "image" centres the rows of an image and divides by their spread (gaussian) or makes them unit
            vectors (vmf), so that floors and kappa are relative; "none" takes them as they are (entries whose
            squares overflow are then the caller's problem).
        hard_label: "posterior" takes the part with the largest E_ik (Eq. 16). "per-patch" first divides each
            part's posteriors by their sum over the patches, as the authors' released code does.
        reseed_empty: move a part that lost all its patches to the patch explained worst.
        smooth: beta, in nats: what it is worth that two neighbours of the patch grid belong to one part, a Potts prior. 0 cuts
            each patch by its row alone, as the paper does. At the top of this file is the bound
            that EM then climbs.

    Raises:
        ValueError: an unknown word or a value outside its range, naming the option.
    """

    estimator: Estimator = "gaussian"
    covariance: Covariance = "diagonal"
    covariance_floor: float = DEFAULT_FLOOR
    kappa: float = 40.0
    iterations: int = 10
    start: Start = "greedy"
    start_candidates: int = DEFAULT_CANDIDATES
    start_refine: int = 3
    scaling: Scaling = "image"
    hard_label: HardLabel = "posterior"
    reseed_empty: bool = True
    smooth: float = 0.0

    def __post_init__(self) -> None:
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(f"{name} must be one of {', '.join(words)}, not {getattr(self, name)!r}")
        for name, least in (("iterations", 0), ("start_refine", 0), ("start_candidates", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.covariance_floor <= 0 or self.kappa <= 0:
            raise ValueError(f"covariance_floor and kappa must be above 0, got {self.covariance_floor} and {self.kappa}")
        if not 0 <= self.smooth < math.inf:
            raise ValueError(f"smooth must be 0 or more and finite, got {self.smooth}")


@dataclass(frozen=True)
class PartsFit:
    """A mixture fitted to each image of a batch.

    Means and covariances are in the units of `rows`, the standardised graph: graph = center + scale * rows.
    Vectors keep the dtype of the graph (float32, or float64 if the graph was float64).

    Attributes:
        labels: int64 [B, N], argmax of the posterior (Eq. 16), values in 0..K-1; a part may stay empty.
        posteriors: [B, N, K], E_ik of Eq. 12, or with smooth > 0 its mean-field form; rows sum to 1.
        weights: [B, K], pi_k of Eq. 13.
        means: [B, K, D], psi_k of Eq. 14.
        covariances: C_k of Eq. 15: [B, K, D] diagonal, [B, K] spherical, [B, K, D, D] full, None for vmf.
        log_likelihood: [iterations + 1, B], of the start and after each M-step. For vmf the normalising
            constant of the density, the same for all parts, is left out. With smooth > 0 it is not a log-likelihood but the
            bound F at the top of this file.
        reseeded: bool [iterations + 1, B], True where an empty part was re-seeded just before that entry.
        rows, center, scale: [B, N, D], [B, 1, D], [B, 1, 1].
    """

    labels: Tensor
    posteriors: Tensor
    weights: Tensor
    means: Tensor
    covariances: Tensor | None
    log_likelihood: Tensor
    reseeded: Tensor
    rows: Tensor
    center: Tensor
    scale: Tensor


def partition_parts(
    graph: Tensor,
    num_parts: int,
    options: PartsOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    start_labels: Tensor | None = None,
    grid_size: tuple[int, int] | None = None,
    check_finite: bool = True,
    **choices: Any,
) -> Tensor:
    """Cuts each graph into `num_parts` parts.

    Args:
        graph: [B, N, D], a row for each patch; D = N for a patch graph. Finite.
        num_parts: K, 1 to N.
        options, choices, generator, uniforms, start_labels, grid_size, check_finite: see :func:`fit_parts`.

    Returns:
        int64 [B, N] in 0..K-1.

    Raises:
        ValueError: see :func:`fit_parts`.
    """
    options = _chosen(options, choices)
    fit = fit_parts(
        graph,
        num_parts,
        options,
        generator=generator,
        uniforms=uniforms,
        start_labels=start_labels,
        grid_size=grid_size,
        check_finite=check_finite,
    )
    if options.hard_label == "per-patch":
        return (fit.posteriors / (fit.posteriors.sum(dim=1, keepdim=True) + 1e-6)).argmax(dim=2)
    return fit.labels


@torch.no_grad()
def fit_parts(
    graph: Tensor,
    num_parts: int,
    options: PartsOptions | None = None,
    *,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    start_labels: Tensor | None = None,
    grid_size: tuple[int, int] | None = None,
    check_finite: bool = True,
    **choices: Any,
) -> PartsFit:
    """Fits the mixture of Eq. 10-15 by EM, and returns everything that was estimated.

    Args:
        graph: [B, N, D], finite. Computed in float32, or in float64 if it is float64.
        num_parts: K, 1 to N.
        options: of the mixture and of EM; single ones can be given as keywords instead (`choices`).
        generator: randomness of the start; without it (and without `uniforms`) a generator seeded 0 is used.
        uniforms: numbers in [0, 1) that decide the start instead of `generator`: [B, start_draws(...)].
        start_labels: int64 [B, N]; start from this partition instead.
        grid_size: (H, W) of the patch grid, row by row; needed where smooth > 0.
        check_finite: look for NaN and infinity (one reduction, and on a GPU one synchronisation).

    Raises:
        ValueError: K outside 1..N, a wrong shape or option, a grid that is missing or is not one of N patches, or NaN or infinity
            in the graph, naming the image.
        TypeError: a keyword that is no option.
    """
    options = _chosen(options, choices)
    _check_graph_shape(graph, num_parts)
    _check_grid(graph.shape[1], grid_size, options.smooth)
    if check_finite:
        check_graph(graph)
    with full_precision(graph.device):
        rows, center, scale = _standardise(graph, options)
        density = _density(rows, options)
        if start_labels is not None:
            _check_start(start_labels, rows, num_parts)
            density.maximise(_one_hot(start_labels, num_parts, rows))
        else:
            _start(density, rows, num_parts, options, _start_uniforms(rows, num_parts, options, generator, uniforms))
        return _expectation_maximisation(density, rows, center, scale, options, grid_size)


def start_draws(num_parts: int, features: int, options: PartsOptions | None = None) -> int:
    """How many uniform numbers an image's start takes.

    K for seeds, 1 + (K - 1) * candidates for greedy ones, 2*K*D for random directions.
    """
    options = options or PartsOptions()
    if (options.estimator, options.start) == ("vmf", "random"):
        return 2 * num_parts * features
    return 1 + (num_parts - 1) * options.start_candidates if options.start == "greedy" else num_parts


def _chosen(options: PartsOptions | None, choices: dict[str, Any]) -> PartsOptions:
    if options is not None and choices:
        raise ValueError(f"give either options or single ones, not both: {', '.join(choices)}")
    return options or PartsOptions(**choices)


# --- EM: E-step (Eq. 12), M-step (Eq. 13-15), hard label (Eq. 16) ----------------------------------------------


def _expectation_maximisation(
    density: _Density, rows: Tensor, center: Tensor, scale: Tensor, options: PartsOptions, grid_size: tuple[int, int] | None
) -> PartsFit:
    batch = rows.shape[0]
    log_likelihood: list[Tensor] = []
    reseeded = [torch.zeros(batch, dtype=torch.bool, device=rows.device)]
    posteriors: Tensor | None = None
    for step in range(options.iterations + 1):
        joint = density.log_joint()  # log(pi_k p_k(v_i)), [B, N, K]
        posteriors, evidence, bound = _expectation(joint, posteriors, options.smooth, grid_size)
        log_likelihood.append(bound)
        if step == options.iterations:
            break
        density.maximise(posteriors)
        empty = posteriors.sum(dim=1) < _EMPTY  # [B, K]
        if options.reseed_empty and _may_hold_one(empty):
            density.reseed(empty, _worst_explained(rows, evidence, empty))
        reseeded.append(empty.any(dim=1) & options.reseed_empty)
    assert posteriors is not None
    return PartsFit(
        labels=posteriors.argmax(dim=2),
        posteriors=posteriors,
        weights=density.weights,
        means=density.means,
        covariances=density.covariances,
        log_likelihood=torch.stack(log_likelihood),
        reseeded=torch.stack(reseeded),
        rows=rows,
        center=center,
        scale=scale,
    )


def _expectation(
    joint: Tensor, before: Tensor | None, smooth: float, grid_size: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """E-step: posteriors [B, N, K], log-sum-exp of `joint` over the parts [B, N], and what EM climbs [B].

    Args:
        joint: log(pi_k p_k(v_i)), [B, N, K].
        before: posteriors of the step before; those of a Potts prior go on from there.
    """
    posteriors = joint.softmax(dim=2)  # Eq. 12
    evidence = joint.amax(dim=2) - posteriors.amax(dim=2).log()
    if smooth == 0 or grid_size is None:
        return posteriors, evidence, evidence.sum(dim=1)
    posteriors = _mean_field(joint, posteriors if before is None else before, smooth, grid_size)
    return posteriors, evidence, _free_energy(joint, posteriors, smooth, grid_size)


def _mean_field(joint: Tensor, posteriors: Tensor, beta: float, grid_size: tuple[int, int]) -> Tensor:
    """Every patch set to its maximum of F given its neighbours, one colour of the checkerboard after the other: [B, N, K].

    One turn of both is enough: EM goes on from its result, and more turns gave the same parts (docs/LOG.md).
    """
    height, width = grid_size
    rows = torch.arange(height, device=joint.device)[:, None]
    columns = torch.arange(width, device=joint.device)
    colour = ((rows + columns) % 2).flatten()[:, None]  # [N, 1]
    for turn in (0, 1):
        updated = torch.add(joint, _neighbours(posteriors, grid_size), alpha=beta).softmax(dim=2)
        posteriors = torch.where(colour == turn, updated, posteriors)
    return posteriors


def _neighbours(posteriors: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Sum over the patches above, below, left and right: [B, N, K]."""
    maps = posteriors.reshape(len(posteriors), *grid_size, -1)  # [B, H, W, K]
    total = torch.zeros_like(maps)
    total[:, 1:] += maps[:, :-1]
    total[:, :-1] += maps[:, 1:]
    total[:, :, 1:] += maps[:, :, :-1]
    total[:, :, :-1] += maps[:, :, 1:]
    return total.flatten(1, 2)


def _free_energy(joint: Tensor, posteriors: Tensor, beta: float, grid_size: tuple[int, int]) -> Tensor:
    """The bound F: [B]. Every pair of neighbours is met from both its ends, hence the half."""
    agreement = 0.5 * beta * _neighbours(posteriors, grid_size)
    return (posteriors * (joint + agreement) + torch.special.entr(posteriors)).sum(dim=(1, 2))


def _may_hold_one(empty: Tensor) -> bool:
    """False where surely no part is empty. Only the CPU looks: elsewhere a look would be a synchronisation."""
    return empty.device.type != "cpu" or bool(empty.any())


def _worst_explained(rows: Tensor, evidence: Tensor, empty: Tensor) -> Tensor:
    """A row for each part, [B, K, D]: the n-th empty part of an image gets its n-th worst explained patch."""
    worst = evidence.topk(min(empty.shape[1], evidence.shape[1]), dim=1, largest=False).indices  # [B, K]
    turn = (empty.cumsum(dim=1) - 1).clamp(min=0)  # which empty part this one is
    chosen = worst.gather(1, turn)
    return rows.gather(1, chosen[..., None].expand(-1, -1, rows.shape[2]))


class _Density(Protocol):
    """Parameters omega_k of the parts of a batch, and what EM asks of them."""

    means: Tensor

    @property
    def weights(self) -> Tensor: ...

    @property
    def covariances(self) -> Tensor | None: ...

    def log_joint(self) -> Tensor:
        """log(pi_k p_k(v_i | omega_k)): [B, N, K]."""
        ...

    def maximise(self, posteriors: Tensor) -> None:
        """M-step."""
        ...

    def reseed(self, empty: Tensor, rows: Tensor) -> None:
        """Start the parts marked in `empty` [B, K] again, from `rows` [B, K, D]."""
        ...


class _Gaussian:
    """What the three covariances share: weights (Eq. 13), means (Eq. 14), re-seeding."""

    def __init__(self, rows: Tensor, floor: float) -> None:
        self.rows, self.floor = rows, floor
        self.weights = self.means = rows.new_zeros(0)
        centred = rows - rows.mean(dim=1, keepdim=True)
        self.spread = centred.square().mean(dim=(1, 2)).clamp(min=floor)  # variance a re-seeded part gets, [B]

    def _weights_and_means(self, posteriors: Tensor) -> Tensor:
        """Eq. 13 and 14; returns the (never zero) number of patches of each part, [B, K]."""
        counts = posteriors.sum(dim=1)
        self.weights = counts / counts.sum(dim=1, keepdim=True)
        counts = counts.clamp(min=_TINY)
        self.means = posteriors.transpose(1, 2) @ self.rows / counts[..., None]
        return counts

    def _reseed_means(self, empty: Tensor, rows: Tensor) -> None:
        weights = torch.where(empty, 1.0 / self.rows.shape[1], self.weights)
        self.weights = weights / weights.sum(dim=1, keepdim=True)
        self.means = torch.where(empty[..., None], rows, self.means)

    def _log_weights(self) -> Tensor:
        return self.weights.clamp(min=_TINY).log()


class DiagonalGaussian(_Gaussian):
    """C_k = diag(variances). Raising a variance to the floor is the constrained maximum, so EM stays monotone."""

    def __init__(self, rows: Tensor, floor: float) -> None:
        super().__init__(rows, floor)
        self.squares_and_rows = torch.cat([rows.square(), rows], dim=2)  # [B, N, 2D]: one product serves both
        self.variances = rows.new_zeros(0)

    @property
    def covariances(self) -> Tensor:
        return self.variances

    def maximise(self, posteriors: Tensor) -> None:
        counts = posteriors.sum(dim=1)
        self.weights = counts / counts.sum(dim=1, keepdim=True)
        moments = (posteriors.transpose(1, 2) @ self.squares_and_rows).div_(counts.clamp(min=_TINY)[..., None])
        second, self.means = moments.chunk(2, dim=2)
        self.variances = torch.addcmul(second, self.means, self.means, value=-1).clamp_(min=self.floor)

    def log_joint(self) -> Tensor:
        precision = self.variances.reciprocal()
        slopes = torch.cat([-0.5 * precision, self.means * precision], dim=2)  # [B, K, 2D]
        constant = self._log_weights() - 0.5 * (
            self.means.square() * precision + self.variances.log() + math.log(2 * math.pi)
        ).sum(dim=2)
        return torch.baddbmm(constant[:, None], self.squares_and_rows, slopes.transpose(1, 2))

    def reseed(self, empty: Tensor, rows: Tensor) -> None:
        self._reseed_means(empty, rows)
        self.variances = torch.where(empty[..., None], self.spread[:, None, None], self.variances)


class SphericalGaussian(_Gaussian):
    """C_k = variance_k * I."""

    def __init__(self, rows: Tensor, floor: float) -> None:
        super().__init__(rows, floor)
        self.norms = rows.square().sum(dim=2)  # [B, N]
        self.variances = rows.new_zeros(0)

    @property
    def covariances(self) -> Tensor:
        return self.variances

    def maximise(self, posteriors: Tensor) -> None:
        counts = self._weights_and_means(posteriors)
        second = (self.norms[:, None] @ posteriors)[:, 0] / counts
        self.variances = ((second - self.means.square().sum(dim=2)) / self.rows.shape[2]).clamp(min=self.floor)

    def log_joint(self) -> Tensor:
        product = self.rows @ self.means.transpose(1, 2)
        distance = self.norms[..., None] - 2 * product + self.means.square().sum(dim=2)[:, None]
        volume = self.rows.shape[2] * (self.variances.log() + math.log(2 * math.pi))
        return (self._log_weights() - 0.5 * volume)[:, None] - 0.5 * distance / self.variances[:, None]

    def reseed(self, empty: Tensor, rows: Tensor) -> None:
        self._reseed_means(empty, rows)
        self.variances = torch.where(empty, self.spread[:, None], self.variances)


class FullGaussian(_Gaussian):
    """C_k with all entries, plus `floor` on the diagonal.

    The ridge makes C_k invertible where a part has fewer patches than features, but the ridged covariance is not
    the maximiser of the likelihood. An update that would lower the expected log-likelihood is therefore not
    taken (generalised EM), which keeps the sequence monotone without an eigendecomposition.
    """

    def __init__(self, rows: Tensor, floor: float) -> None:
        super().__init__(rows, floor)
        self.precision: Tensor | None = None  # C_k^-1, [B, K, D, D]
        self.log_det = rows.new_zeros(0)  # log |C_k|, [B, K]
        self._covariances = rows.new_zeros(0)
        self.identity = torch.eye(rows.shape[2], dtype=rows.dtype, device=rows.device)

    @property
    def covariances(self) -> Tensor:
        return self._covariances

    def maximise(self, posteriors: Tensor) -> None:
        counts = self._weights_and_means(posteriors)
        weighted = posteriors.transpose(1, 2)[:, :, None] * self.rows.transpose(1, 2)[:, None]  # [B, K, D, N]
        second = weighted @ self.rows[:, None] / counts[..., None, None]
        scatter = second - self.means[..., None] * self.means[..., None, :]  # [B, K, D, D]
        covariances = (scatter + scatter.transpose(2, 3)) / 2 + self.floor * self.identity
        factor, failed = torch.linalg.cholesky_ex(covariances)
        factor = torch.where((failed == 0)[..., None, None], factor, self.identity)  # replaced by the old one below
        precision = torch.cholesky_inverse(factor)
        log_det = 2 * factor.diagonal(dim1=2, dim2=3).log().sum(dim=2)
        better = (failed == 0) & log_det.isfinite()
        if self.precision is None:
            spread = self.spread[:, None, None, None]
            old = spread * self.identity, self.identity / spread, self.rows.shape[2] * self.spread.log()[:, None]
        else:
            old = self._covariances, self.precision, self.log_det
            better = better & (_cost(precision, log_det, scatter) <= _cost(old[1], old[2], scatter))
        keep = better[..., None, None]
        self._covariances = torch.where(keep, covariances, old[0])
        self.precision = torch.where(keep, precision, old[1])
        self.log_det = torch.where(better, log_det, old[2])

    def log_joint(self) -> Tensor:
        assert self.precision is not None
        slopes = self.rows[:, None] @ self.precision  # [B, K, N, D]
        square = (slopes * self.rows[:, None]).sum(dim=3)
        offset = (self.precision @ self.means[..., None])[..., 0]  # [B, K, D]
        cross = (self.rows @ offset.transpose(1, 2)).transpose(1, 2)  # [B, K, N]
        distance = square - 2 * cross + (offset * self.means).sum(dim=2)[..., None]
        volume = self.log_det + self.rows.shape[2] * math.log(2 * math.pi)
        return ((self._log_weights() - 0.5 * volume)[..., None] - 0.5 * distance).transpose(1, 2)

    def reseed(self, empty: Tensor, rows: Tensor) -> None:
        self._reseed_means(empty, rows)
        assert self.precision is not None
        mark, spread = empty[..., None, None], self.spread[:, None, None, None]
        self._covariances = torch.where(mark, spread * self.identity, self._covariances)
        self.precision = torch.where(mark, self.identity / spread, self.precision)
        self.log_det = torch.where(empty, self.rows.shape[2] * self.spread.log()[:, None], self.log_det)


def _cost(precision: Tensor, log_det: Tensor, scatter: Tensor) -> Tensor:
    """Twice the negative expected log-likelihood a patch, without constants: log|C| + tr(C^-1 S), [B, K]."""
    return log_det + (precision * scatter).sum(dim=(2, 3))


class _VonMisesFisher:
    """Unit means, one fixed concentration, equal weights: log density = kappa * v_i . psi_k + constant."""

    def __init__(self, rows: Tensor, kappa: float) -> None:
        self.rows, self.kappa = rows, kappa
        self.means = rows.new_zeros(0)

    @property
    def weights(self) -> Tensor:
        batch, parts, _ = self.means.shape
        return self.means.new_full((batch, parts), 1.0 / parts)

    @property
    def covariances(self) -> None:
        return None

    def maximise(self, posteriors: Tensor) -> None:
        self.means = _unit(posteriors.transpose(1, 2) @ self.rows)

    def log_joint(self) -> Tensor:
        return self.kappa * (self.rows @ self.means.transpose(1, 2)) - math.log(self.means.shape[1])

    def reseed(self, empty: Tensor, rows: Tensor) -> None:
        self.means = torch.where(empty[..., None], _unit(rows), self.means)


def _density(rows: Tensor, options: PartsOptions) -> _Density:
    if options.estimator == "vmf":
        return _VonMisesFisher(rows, options.kappa)
    return _GAUSSIANS[options.covariance](rows, options.covariance_floor)


_GAUSSIANS: dict[str, type[DiagonalGaussian] | type[SphericalGaussian] | type[FullGaussian]] = {
    "diagonal": DiagonalGaussian,
    "spherical": SphericalGaussian,
    "full": FullGaussian,
}


# --- The start --------------------------------------------------------------------------------------------------


def _start(density: _Density, rows: Tensor, num_parts: int, options: PartsOptions, uniforms: Tensor) -> None:
    """Gives the mixture its first parameters: those of the partition by seeds, or random directions."""
    if (options.estimator, options.start) == ("vmf", "random"):
        density.means = _random_directions(rows, num_parts, uniforms)
    else:
        labels = _nearest_seed(rows, num_parts, uniforms, options.start)
        labels = _lloyd(rows, labels, num_parts, options.start_refine)
        density.maximise(_one_hot(labels, num_parts, rows))


def _one_hot(labels: Tensor, num_parts: int, rows: Tensor) -> Tensor:
    """Posteriors of a partition: [B, N, K]."""
    return torch.nn.functional.one_hot(labels, num_parts).to(rows.dtype)


def _start_uniforms(
    rows: Tensor, num_parts: int, options: PartsOptions, generator: torch.Generator | None, uniforms: Tensor | None
) -> Tensor:
    batch, _, features = rows.shape
    count = start_draws(num_parts, features, options)
    generator = generator or torch.Generator().manual_seed(0)
    return uniform_numbers((batch, count), generator, uniforms, rows.device).to(rows.dtype)


def _nearest_seed(rows: Tensor, num_parts: int, uniforms: Tensor, start: Start) -> Tensor:
    """Each patch goes to its nearest seed: int64 [B, N]."""
    distances = _squared_distances(rows)  # [B, N, N]
    random = start == "random"
    seeds = _random_patches(rows.shape[1], uniforms) if random else _kmeans_plus_plus(distances, num_parts, uniforms)
    to_seeds = distances.gather(2, seeds[:, None].expand(-1, rows.shape[1], -1))  # [B, N, K]
    return to_seeds.argmin(dim=2)


def _kmeans_plus_plus(distances: Tensor, num_parts: int, uniforms: Tensor) -> Tensor:
    """k-means++ seeds (Arthur and Vassilvitskii 2007), each the best of C candidates: int64 [B, K].

    Candidates are drawn in proportion to their squared distance from the seeds so far, and the one is taken after which the
    squared distances to the nearest seed sum up to the least. A single candidate (C = 1, the plain form) likes outliers,
    which lie far from everything; the sum does not. Of two patches that are each other's nearest, either leaves the same sum, so
    sums that are equal up to rounding count as tied, and the candidate drawn first is taken: rounding is not to decide.
    Where every patch already lies on a seed, the remaining ones are patch 0.

    Args:
        uniforms: [B, 1 + (K - 1) * C].
    """
    patches, candidates = distances.shape[1], (uniforms.shape[1] - 1) // max(num_parts - 1, 1)
    seeds = [(uniforms[:, :1] * patches).long().clamp(max=patches - 1)]
    closest = _rows_of(distances, seeds[0])[:, 0]  # [B, N], squared distance to the nearest seed
    for k in range(num_parts - 1):
        cumulative = closest.cumsum(dim=1)
        targets = uniforms[:, 1 + k * candidates : 1 + (k + 1) * candidates] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, targets, right=True) % patches  # [B, C]
        left = torch.minimum(_rows_of(distances, drawn), closest[:, None])  # [B, C, N]
        sums = left.sum(dim=2)  # [B, C]
        tied = sums <= sums.amin(dim=1, keepdim=True) * (1 + _TIED)
        best = tied.int().argmax(dim=1, keepdim=True)  # [B, 1], the first of them
        seeds.append(drawn.gather(1, best))
        closest = _rows_of(left, best)[:, 0]
    return torch.cat(seeds, dim=1)


def _rows_of(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows `index` [B, C] of each matrix [B, M, N]: [B, C, N]."""
    return matrix.gather(1, index[..., None].expand(-1, -1, matrix.shape[2]))


def _lloyd(rows: Tensor, labels: Tensor, num_parts: int, steps: int) -> Tensor:
    """`steps` of k-means (Lloyd 1982) from a partition; a part without patches stays so: int64 [B, N]."""
    for _ in range(steps):
        members = _one_hot(labels, num_parts, rows)
        counts = members.sum(dim=1)  # [B, K]
        means = members.transpose(1, 2) @ rows / counts.clamp(min=1)[..., None]
        nearness = torch.baddbmm(-0.5 * means.square().sum(dim=2)[:, None], rows, means.transpose(1, 2))  # [B, N, K]
        labels = nearness.masked_fill((counts == 0)[:, None], -math.inf).argmax(dim=2)
    return labels


def _random_patches(patches: int, uniforms: Tensor) -> Tensor:
    """K different patches, each as likely as any other (the first K steps of a shuffle): int64 [B, K]."""
    batch, num_parts = uniforms.shape
    order = torch.arange(patches, device=uniforms.device).repeat(batch, 1)
    for k in range(num_parts):
        partner = k + (uniforms[:, k : k + 1] * (patches - k)).long().clamp(max=patches - k - 1)
        first, second = order[:, k : k + 1].clone(), order.gather(1, partner)
        order.scatter_(1, partner, first)
        order[:, k : k + 1] = second
    return order[:, :num_parts]


def _random_directions(rows: Tensor, num_parts: int, uniforms: Tensor) -> Tensor:
    """K random unit vectors (normal numbers by Box and Muller, normalised): [B, K, D]."""
    radius, angle = uniforms.reshape(rows.shape[0], 2, num_parts, rows.shape[2]).unbind(dim=1)
    normal = (-2 * (1 - radius).clamp(min=_TINY).log()).sqrt() * (2 * math.pi * angle).cos()
    return _unit(normal)


def _squared_distances(rows: Tensor) -> Tensor:
    """Between the rows of each image: [B, N, N], exactly 0 where rows are equal up to rounding."""
    norms = rows.square().sum(dim=2)
    sums = norms[:, :, None] + norms[:, None, :]
    distances = sums - 2 * rows @ rows.transpose(1, 2)
    return torch.where(distances > 4 * _ROUNDING * sums, distances, 0.0)


# --- Units and checks -------------------------------------------------------------------------------------------


def _standardise(graph: Tensor, options: PartsOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in units of their image: rows, center [B, 1, D], scale [B, 1, 1], with graph = center + scale * rows.

    Division by the largest entry comes first, so that squares of huge or tiny entries stay finite. Unit
    vectors (vmf) have a scale of their own each; there `center` is 0 and `scale` 1.
    """
    if graph.dtype != torch.float64:
        graph = graph.float()
    batch, _, features = graph.shape
    center, scale = graph.new_zeros(batch, 1, features), graph.new_ones(batch, 1, 1)
    if options.scaling == "none":
        return graph, center, scale
    if options.estimator == "vmf":
        return _unit(graph), center, scale
    largest = graph.abs().amax(dim=(1, 2), keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    rows = graph / largest
    center = rows.mean(dim=1, keepdim=True)
    rows = rows - center
    spread = rows.square().mean(dim=(1, 2), keepdim=True).sqrt()
    constant = spread <= _ROUNDING
    rows = torch.where(constant, 0.0, rows / spread.clamp(min=_ROUNDING))
    scale = largest * torch.where(constant, 1.0, spread)
    return rows, center * largest, scale


def _unit(vectors: Tensor) -> Tensor:
    """Vectors divided by their length; zero stays zero. Safe for huge and tiny entries."""
    largest = vectors.abs().amax(dim=-1, keepdim=True)
    vectors = vectors / torch.where(largest > 0, largest, 1.0)
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=_TINY)


def _check_graph_shape(graph: Tensor, num_parts: int) -> None:
    if graph.ndim != 3:
        raise ValueError(f"graph must be [batch, patches, features], got {list(graph.shape)}")
    if not 1 <= num_parts <= graph.shape[1]:
        raise ValueError(f"num_parts must be between 1 and the {graph.shape[1]} patches, got {num_parts}")


def _check_grid(patches: int, grid_size: tuple[int, int] | None, smooth: float) -> None:
    if grid_size is None and smooth > 0:
        raise ValueError("smooth above 0 needs grid_size, (H, W) of the patch grid, to know which patches are neighbours")
    if grid_size is not None and (min(grid_size) < 1 or grid_size[0] * grid_size[1] != patches):
        raise ValueError(f"grid_size {grid_size[0]}x{grid_size[1]} is not a grid of the {patches} patches of the graph")


def _check_start(labels: Tensor, rows: Tensor, num_parts: int) -> None:
    if labels.shape != rows.shape[:2] or not bool(((labels >= 0) & (labels < num_parts)).all()):
        raise ValueError(f"start_labels must be {list(rows.shape[:2])} in 0..{num_parts - 1}, got {list(labels.shape)}")


class NonFiniteGraph(ValueError):
    """What an encoder gave for the mask has NaN or infinite entries.

    Attributes:
        images: whose.
    """

    def __init__(self, message: str, images: list[int]) -> None:
        super().__init__(message)
        self.images = images


def check_graph(graph: Tensor, images: Tensor | None = None, name: str = "patch graph") -> None:
    """Raises NonFiniteGraph for NaN or infinite entries, naming the images.

    Args:
        graph: [B, N, D], or any other numbers of B images.
        images: int64 [B], the number under which to name each graph; default 0..B-1.
        name: what the numbers are.
    """
    finite = graph.isfinite().flatten(1).all(dim=1)
    if not bool(finite.all()):
        wrong = (~finite).nonzero()[:, 0]
        named = (wrong if images is None else images[wrong]).tolist()
        message = f"the {name} of image {named[0]} has NaN or infinite entries (images {named[:8]} of the batch)"
        raise NonFiniteGraph(message, named)
