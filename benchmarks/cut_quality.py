"""How well the graph cut finds parts that are known: planted graphs, beside scikit-learn's mixtures.

    python -m benchmarks.cut_quality                                        (about a minute on one core)
    python -m benchmarks.cut_quality --seeds 1 --graphs 4 --settings 2      (seconds)
    python -m benchmarks.cut_quality --diagnose                             what start, iterations and floor do
    python -m benchmarks.cut_quality --smooth                               what a Potts prior does (a few minutes)
    python -m benchmarks.cut_quality --time                                 the whole cut beside scikit-learn's

A planted graph is attention whose parts are known. Regions of a patch grid are drawn (the cells of random centres); every
region has a random prototype, every patch the prototype of its region plus noise, and the graph is the softmax of the
scaled dot products of all pairs. Scores are adjusted Rand indices (1: the planted partition, 0: as good as chance),
the mean over graphs and then over seeds, and the standard deviation over seeds.

B graphs   H, W patch grid   N = H*W patches   D = N features of a row   K parts   d width of a prototype
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.mask_cost import fit_with_sklearn
from benchmarks.pieces import count_pieces
from benchmarks.skipped_passes import write_json
from common.mask_config import FORMER_DEFAULTS
from common.parts import PartsOptions, fit_parts

WIDTH = 16
"""d, numbers of a prototype."""

MIXTURES = [(init, floor) for init in ("k-means++", "kmeans") for floor in (0.01, 0.1)]
SKLEARN = {**{f"GaussianMixture, {init}, {floor}": (init, floor) for init, floor in MIXTURES}, "KMeans": None}
"""Columns of scikit-learn: start and smallest variance of a mixture, None for k-means."""

BETAS = (0.0, 0.5, 1.0, 2.0, 8.0, 32.0)
"""Weights of the prior that --smooth compares."""

FOUR_TIMES = "ours, a quarter of the images with four times the patches"

TOLERANCE = 0.03  # below scikit-learn's best, at most, in every row


@dataclass(frozen=True)
class Planted:
    """A family of graphs.

    Attributes:
        regions: how many parts there are.
        num_parts: how many are asked for (K).
        noise: standard deviation of a patch around its prototype, whose numbers have deviation 1.
        grid: (H, W).
        background: one region is so many times as likely to own a patch as its distance alone would make it.
    """

    regions: int
    num_parts: int
    noise: float
    grid: tuple[int, int] = (14, 14)
    background: float = 1.0

    def __str__(self) -> str:
        height, width = self.grid
        uneven = ", one large" if self.background > 1 else ""
        return f"{self.regions} regions{uneven}, K {self.num_parts}, noise {self.noise}, {height}x{width}"


SETTINGS = (
    Planted(6, 6, 0.7),
    Planted(6, 10, 0.7),
    Planted(10, 10, 0.7),
    Planted(10, 40, 0.7),
    Planted(10, 10, 1.0),
    Planted(10, 10, 0.3),
    Planted(20, 10, 0.5),
    Planted(10, 10, 0.5, (13, 11)),
    Planted(6, 10, 0.5, (7, 20)),
    Planted(8, 10, 0.5, (14, 14), background=2.5),
    Planted(8, 20, 0.5, (16, 16), background=2.5),
)


def plant(setting: Planted, graphs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Graphs float32 [B, N, N], and the region of every patch int64 [B, N]."""
    generator = torch.Generator().manual_seed(seed)
    height, width = setting.grid
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).expand(graphs, -1, -1)  # [B, N, 2]
    centres = torch.rand(graphs, setting.regions, 2, generator=generator) * torch.tensor([height, width])
    distances = torch.cdist(places, centres)  # [B, N, regions]
    distances[..., 0] /= setting.background
    regions = distances.argmin(dim=2)
    prototypes = torch.randn(graphs, setting.regions, WIDTH, generator=generator)
    patches = prototypes.gather(1, regions[..., None].expand(-1, -1, WIDTH))
    patches = patches + setting.noise * torch.randn(patches.shape, generator=generator)
    return (patches @ patches.transpose(1, 2) / math.sqrt(WIDTH)).softmax(dim=-1), regions


# --- The cuts that are compared -----------------------------------------------------------------------------------

Cut = Callable[[Tensor, int, int], Tensor]
"""(graphs [B, N, N], K, seed) -> parts int64 [B, N]."""


def ours(**options: Any) -> Cut:
    """The cut of this project with its defaults, and other options on top."""

    def cut(graphs: Tensor, num_parts: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return fit_parts(graphs, num_parts, PartsOptions(**options), generator=generator).labels

    return cut


def sklearn_mixture(init: str, floor: float) -> Cut:
    """scikit-learn's GaussianMixture on the same standardised rows, to convergence; a graph at a time."""
    from sklearn.mixture import GaussianMixture

    return _each_graph(
        lambda num_parts, seed: GaussianMixture(
            num_parts, covariance_type="diag", init_params=init, reg_covar=floor, random_state=seed
        )
    )


def sklearn_kmeans() -> Cut:
    """scikit-learn's KMeans, one start, on the same standardised rows."""
    from sklearn.cluster import KMeans

    return _each_graph(lambda num_parts, seed: KMeans(num_parts, n_init=1, random_state=seed))


def _each_graph(make: Callable[[int, int], Any]) -> Cut:
    def cut(graphs: Tensor, num_parts: int, seed: int) -> Tensor:
        standardised = fit_parts(graphs, 1, iterations=0).rows.numpy()  # one part: no seeds to look for
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of runs that end before they converge
            labels = [make(num_parts, seed).fit_predict(rows) for rows in standardised]
        return torch.from_numpy(np.stack(labels)).long()

    return cut


def compared() -> dict[str, Cut]:
    """Every column of the table."""
    theirs = {name: sklearn_mixture(*chosen) if chosen else sklearn_kmeans() for name, chosen in SKLEARN.items()}
    return {"ours": ours(), "version 0.1.0": ours(**FORMER_DEFAULTS), **theirs}


def diagnosed() -> dict[str, Cut]:
    """The cut with one choice changed at a time: start, refining steps, iterations, floor."""
    return {
        "default": ours(),
        "start k-means++": ours(start="kmeans++"),
        "start random": ours(start="random"),
        "no refining": ours(start_refine=0),
        "10 refining": ours(start_refine=10),
        "0 iterations": ours(iterations=0),
        "2 iterations": ours(iterations=2),
        "15 iterations": ours(iterations=15),
        "40 iterations": ours(iterations=40),
        "floor 1e-6": ours(covariance_floor=1e-6),
        "floor 0.01": ours(covariance_floor=0.01),
        "floor 0.1": ours(covariance_floor=0.1),
        "floor 1": ours(covariance_floor=1.0),
        "spherical": ours(covariance="spherical"),
        "vmf": ours(estimator="vmf"),
        "1 candidate": ours(start_candidates=1),
        "4 candidates": ours(start_candidates=4),
        "8 candidates": ours(start_candidates=8),
        "32 candidates": ours(start_candidates=32),
    }


def rand_index(truth: Tensor, parts: Tensor) -> float:
    """Mean adjusted Rand index over the graphs."""
    from sklearn.metrics import adjusted_rand_score

    return statistics.fmean(adjusted_rand_score(*pair) for pair in zip(truth.numpy(), parts.numpy(), strict=True))


# --- Tables -------------------------------------------------------------------------------------------------------


def score(settings: Sequence[Planted], cuts: dict[str, Cut], graphs: int, seeds: int) -> list[dict[str, Any]]:
    """A row for each setting: its name, and for each cut the scores of all seeds."""
    table = []
    for setting in settings:
        scores: dict[str, list[float]] = {name: [] for name in cuts}
        for seed in range(seeds):
            planted, truth = plant(setting, graphs, seed)
            for name, cut in cuts.items():
                scores[name].append(rand_index(truth, cut(planted, setting.num_parts, seed)))
        table.append({"setting": str(setting), "scores": scores})
        print(_line(table[-1]), flush=True)
    return table


def _line(row: dict[str, Any]) -> str:
    cells = [f"{statistics.fmean(values):.3f} ± {_spread(values):.3f}" for values in row["scores"].values()]
    return f"| {row['setting']} | " + " | ".join(cells) + " |"


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judge(table: list[dict[str, Any]]) -> dict[str, Any]:
    """How far below scikit-learn's best ours is at most, and in how many settings it is above."""
    gaps = []
    for row in table:
        means = {name: statistics.fmean(values) for name, values in row["scores"].items()}
        gaps.append(means["ours"] - max(value for name, value in means.items() if name in SKLEARN))
    return {"worst_gap": min(gaps), "above": sum(gap > 0 for gap in gaps), "settings": len(gaps)}


def score_smooth(settings: Sequence[Planted], graphs: int, seeds: int) -> list[dict[str, Any]]:
    """A row for each setting and beta: adjusted Rand index, pieces a part and share of single-patch parts of every seed."""
    table = []
    for setting in settings:
        rows = [{"setting": str(setting), "beta": beta, "rand": [], "pieces": [], "single": []} for beta in BETAS]
        for seed in range(seeds):
            planted, truth = plant(setting, graphs, seed)
            for row in rows:
                options, generator = PartsOptions(smooth=row["beta"]), torch.Generator().manual_seed(seed)
                fit = fit_parts(planted, setting.num_parts, options, generator=generator, grid_size=setting.grid)
                pieces = count_pieces(fit.labels, setting.grid)
                for name, value in (
                    ("rand", rand_index(truth, fit.labels)),
                    ("pieces", pieces.a_part),
                    ("single", pieces.single_parts),
                ):
                    row[name].append(value)
        table += rows
        print(_smooth_line(rows), flush=True)
    return table


def _smooth_line(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        f"{statistics.fmean(row['rand']):.3f} ± {_spread(row['rand']):.3f} / {statistics.fmean(row['pieces']):.2f} / "
        f"{statistics.fmean(row['single']):.2f}"
        for row in rows
    ]
    return f"| {rows[0]['setting']} | " + " | ".join(cells) + " |"


def time_cut(images: int, grid: tuple[int, int], num_parts: int, turns: int) -> dict[str, float]:
    """Seconds of the whole cut, of the former one, and of scikit-learn's mixture from our start: medians, in turns.

    Also of a quarter of the images with four times the patches, as four times the pixels give.
    """
    graphs, _ = plant(Planted(10, num_parts, 0.7, grid), images, 0)
    large, _ = plant(Planted(10, num_parts, 0.7, (2 * grid[0], 2 * grid[1])), max(images // 4, 1), 0)
    started = fit_parts(graphs, num_parts, iterations=0)
    cuts = {
        "ours": lambda: fit_parts(graphs, num_parts),
        FOUR_TIMES: lambda: fit_parts(large, num_parts),
        "ours, smooth": lambda: fit_parts(graphs, num_parts, smooth=BETAS[-1], grid_size=grid),
        "version 0.1.0": lambda: fit_parts(graphs, num_parts, **FORMER_DEFAULTS),
        "greedy start alone": lambda: fit_parts(graphs, num_parts, iterations=0),
        "scikit-learn, start given": lambda: fit_with_sklearn(started, PartsOptions().iterations, "given"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cuts}
    for _ in range(turns):
        for name, cut in cuts.items():
            began = time.perf_counter()
            cut()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table as Markdown and returns its numbers."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cut_quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--graphs", type=int, default=32, help="planted graphs of each setting and seed [%(default)s]")
    parser.add_argument("--seeds", type=int, default=5, help="0 to N-1: of the graphs, and of every start [%(default)s]")
    parser.add_argument("--settings", type=int, default=len(SETTINGS), help="only the first N settings")
    parser.add_argument("--diagnose", action="store_true", help="one choice of ours changed at a time, without scikit-learn")
    parser.add_argument("--smooth", action="store_true", help="a Potts prior of several weights, without scikit-learn")
    parser.add_argument("--time", action="store_true", help="seconds of the cut instead of its quality")
    parser.add_argument("--images", type=int, default=64, help="with --time [%(default)s]")
    parser.add_argument("--parts", type=int, default=40, help="with --time [%(default)s]")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.time:
        numbers: dict[str, Any] = {"seconds": time_cut(args.images, (14, 14), args.parts, turns=5)}
        for name, value in numbers["seconds"].items():
            print(f"{name}: {value:.3f} s, {value / numbers['seconds']['ours']:.2f} of ours")
        numbers["four_times"] = 4 * numbers["seconds"][FOUR_TIMES] / numbers["seconds"]["ours"]
        print(f"an image of four times the patches: {numbers['four_times']:.1f} times as long")
    elif args.smooth:
        print("adjusted Rand index ± spread over seeds / connected pieces a part / share of parts of a single patch\n")
        print("| planted | " + " | ".join(f"beta {beta:g}" for beta in BETAS) + " |\n|" + "---|" * (len(BETAS) + 1))
        numbers = {"table": score_smooth(SETTINGS[: args.settings], args.graphs, args.seeds)}
    else:
        cuts = diagnosed() if args.diagnose else compared()
        print("| planted | " + " | ".join(cuts) + " |\n|" + "---|" * (len(cuts) + 1))
        table = score(SETTINGS[: args.settings], cuts, args.graphs, args.seeds)
        numbers = {"table": table, **({} if args.diagnose else judge(table))}
        if not args.diagnose:
            print(
                f"\nours against scikit-learn's best: above it in {numbers['above']} of {numbers['settings']} settings, "
                f"at worst {numbers['worst_gap']:+.3f} (allowed {-TOLERANCE:+.2f})"
            )
    if args.json:
        write_json(args.json, numbers)
    return numbers


if __name__ == "__main__":
    main()
