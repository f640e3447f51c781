"""What evolved masking costs beside the training step that it serves.

    python -m benchmarks.mask_cost
    python -m benchmarks.mask_cost --device cuda --amp bf16 --batch_train 64 --json cost.json
    python -m benchmarks.mask_cost --model mae_vit_tiny_patch8 --input_size 32 --images 16 --parts 6   (seconds)

Every stage runs on the same images in the same process, in turns, so that the ratios between stages do not depend
on what else the machine was doing. Images are noise and weights are fresh: the cost hardly depends on either.

B images   N patches   D width   h heads   L blocks   T = 1 + N tokens   K parts   m masked patches
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from benchmarks.skipped_passes import add_schedule_arguments, skipped_by_epoch, write_json
from benchmarks.timing import added_memory, machine, memory_method, seconds_of
from common.attention import attention_mode, patch_graph
from common.evolved_mask import EvolvedMask, MaskConfig, count_masked
from common.parts import DEFAULT_FLOOR, PartsFit, fit_parts, partition_parts
from common.training.optim import adamw
from mae_evolved.model import MODELS, MaskedAutoencoder

PROMISED = {"model": "mae_vit_base_patch16", "images": 64, "patches": 196, "parts": 40, "iterations": 15}
"""The sizes at which the targets are stated."""

EM_SHARE_TARGET = 0.03  # of a full-image forward pass, at most
SKLEARN_TARGET = 20.0  # times faster than scikit-learn, at least
SHORT = 0.5  # seconds: a shorter stage runs several times a turn
MOST_RUNS = 5  # a turn

# Names of the stages.
PASS = "attention pass, graph reduced as blocks come"
FORWARD = "encoder forward, full images, no mask"
REDUCTION = "graph reduction alone"
EM = "EM, diagonal Gaussian"
EM_GIVEN = "EM, diagonal Gaussian, start given"
EM_SPHERICAL = "EM, spherical Gaussian"
EM_VMF = "EM, vMF"
SELECTION = "draws and selection"
STEP = "training step"
SKLEARN_GIVEN = "scikit-learn, start given"
SKLEARN_PLUS = "scikit-learn, k-means++ start"
SKLEARN_KMEANS = "scikit-learn, k-means start"


# --- The work that is timed -------------------------------------------------------------------------------------


class Workload:
    """Everything that is measured, on one set of images.

    Args:
        model: the autoencoder, on its device.
        images: [B, 3, Hpx, Wpx].
        num_parts, iterations: of the EM.
        mask_ratio: share of masked patches.
        batch_train: images of a micro-batch of the training step.
        amp: run the network under bf16 autocast.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        images: Tensor,
        num_parts: int,
        iterations: int,
        mask_ratio: float,
        batch_train: int,
        amp: bool,
    ) -> None:
        self.model, self.images, self.num_parts, self.iterations = model, images, num_parts, iterations
        self.batch_train, self.amp = batch_train, amp
        self.patches = model.grid_size[0] * model.grid_size[1]
        self.sample_ids = torch.arange(len(images), device=images.device)
        config = MaskConfig(num_parts=num_parts, iterations=iterations)
        self.masker = EvolvedMask(model.grid_size, count_masked(self.patches, mask_ratio), 1, config)
        self.optimizer = adamw([{"params": list(model.parameters()), "weight_decay": 0.05}], 1e-4, (0.9, 0.95))
        self.mask = self.draws_and_selection()
        self.graph = self.attention_pass()
        with attention_mode(model), self._autocast():
            self.one_map = next(iter(model.attention_maps(images)))  # [B, h, T, T]
        drawn = fit_parts(self.graph, num_parts, iterations=0)
        self.start = fit_parts(self.graph, num_parts, iterations=0, start_labels=drawn.labels)

    def stages(self) -> dict[str, Callable[[], Any]]:
        """Name and function of every stage, in the order of a turn."""
        return {
            PASS: self.attention_pass,
            FORWARD: self.encoder_forward,
            REDUCTION: self.reduction,
            EM: self.cut,
            EM_GIVEN: lambda: self.cut(start_labels=self.start.labels),
            EM_SPHERICAL: lambda: self.cut(covariance="spherical"),
            EM_VMF: lambda: self.cut(estimator="vmf"),
            SELECTION: self.draws_and_selection,
            STEP: self.training_step,
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.images.device.type, dtype=torch.bfloat16, enabled=self.amp)

    def attention_pass(self) -> Tensor:
        """What a batch without the shortcut does before its EM: graph [B, N, N]."""
        with attention_mode(self.model), self._autocast():
            return patch_graph(self.model.attention_maps(self.images))

    @torch.no_grad()
    def encoder_forward(self) -> Tensor:
        """The encoder on whole images with nothing read: [B, T, D]."""
        with self._autocast():
            tokens = self.model.with_class_token(self.model.embed(self.images))
            for block in self.model.blocks:
                tokens = block(tokens)
            return self.model.norm(tokens)

    def reduction(self) -> Tensor:
        """The reduction of as many maps as the encoder has blocks (one map, again and again)."""
        return patch_graph(repeat(self.one_map, len(self.model.blocks)))

    def cut(self, **options: Any) -> Tensor:
        """The graph cut, with its own k-means++ start as in training unless `options` say otherwise: parts [B, N]."""
        return partition_parts(self.graph, self.num_parts, iterations=self.iterations, **options)

    def draws_and_selection(self) -> Tensor:
        """A whole call of EvolvedMask at alpha = 0, where it makes all draws but runs neither pass nor EM: [B, N]."""
        return self.masker(self.images, None, self.sample_ids).mask

    def training_step(self) -> None:
        """Forward, backward and AdamW on all images; the gradient is summed over micro-batches."""
        micro_batches = math.ceil(len(self.images) / self.batch_train)
        for images, mask in zip(self.images.split(self.batch_train), self.mask.split(self.batch_train), strict=True):
            with self._autocast():
                loss, _ = self.model(images, mask, mask)
            (loss / micro_batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def sklearn_stages(work: Workload) -> dict[str, Callable[[], Any]]:
    """scikit-learn's diagonal mixture looped over the images; nothing where scikit-learn is absent."""
    if importlib.util.find_spec("sklearn") is None:
        return {}
    return {
        SKLEARN_GIVEN: lambda: fit_with_sklearn(work.start, work.iterations, "given"),
        SKLEARN_PLUS: lambda: fit_with_sklearn(work.start, work.iterations, "k-means++"),
        SKLEARN_KMEANS: lambda: fit_with_sklearn(work.start, work.iterations, "kmeans"),
    }


def fit_with_sklearn(started: PartsFit, iterations: int, start: str) -> None:
    """K, rows (float32), iterations and threads are those of our EM; tol = 0 lets no image stop early.

    Args:
        started: our fit before its first iteration.
        start: "given" begins where `started` does; else what scikit-learn calls `init_params`.

    `reg_covar`, which keeps variances above 0 as our floor does, is added to variances, not their minimum: the work is the
    same, the parts not quite. That equal settings give equal results is tested in tests/common/test_parts.py.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture
    from threadpoolctl import threadpool_limits

    rows, num_parts = started.rows.cpu().numpy(), started.means.shape[1]
    with threadpool_limits(torch.get_num_threads()), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # tol = 0 never converges
        for image, image_rows in enumerate(rows):
            options = _start_of(started, image) if start == "given" else {"init_params": start}
            fixed = {"covariance_type": "diag", "tol": 0.0, "reg_covar": DEFAULT_FLOOR, "random_state": 0}
            GaussianMixture(num_parts, max_iter=iterations, **fixed, **options).fit_predict(image_rows)


def _start_of(started: PartsFit, image: int) -> dict[str, Any]:
    """Our start of one image as scikit-learn's arguments. All three are needed: without one it runs its own k-means first."""
    assert started.covariances is not None
    return {
        "weights_init": started.weights[image].cpu().numpy(),
        "means_init": started.means[image].cpu().numpy(),
        "precisions_init": started.covariances[image].reciprocal().cpu().numpy(),
    }


# --- Time and memory --------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """What one stage costs.

    Attributes:
        seconds: median over all runs after the warm-up.
        slowest, fastest: of the same runs.
        memory: bytes that the stage adds at its peak, or None where they cannot be read.
    """

    seconds: float
    fastest: float
    slowest: float
    runs: int
    memory: int | None


def measure_stages(stages: dict[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, Cost]:
    """Warms every stage up, reads its memory, then times all stages in turns."""
    runs: dict[str, int] = {}
    memory: dict[str, int | None] = {}
    times: dict[str, list[float]] = {name: [] for name in stages}
    for name, stage in stages.items():
        first = seconds_of(stage, device)
        runs[name] = 1 if first >= SHORT else min(MOST_RUNS, math.ceil(SHORT / max(first, 1e-6)))
    for name, stage in stages.items():
        memory[name] = added_memory(stage, device)
    for _ in range(repeats):
        for name, stage in stages.items():
            times[name] += [seconds_of(stage, device) for _ in range(runs[name])]
    return {
        name: Cost(statistics.median(taken), min(taken), max(taken), len(taken), memory[name]) for name, taken in times.items()
    }


# --- Ratios -----------------------------------------------------------------------------------------------------

EM_SHARE = "EM / full-image encoder forward"
PASS_SHARE = "attention pass / full-image encoder forward"
SPARED = "images spared the pass over the run"
MASK_SHARE = "evolved masking / training step, without the shortcut"
MASK_SHARE_SPARED = "evolved masking / training step, with the shortcut"
EM_SHARE_SPARED = "of which EM, with the shortcut"
SKLEARN_RATIOS = {
    f"{theirs} / {ours}": (theirs, ours) for theirs, ours in ((SKLEARN_GIVEN, EM_GIVEN), (SKLEARN_PLUS, EM), (SKLEARN_KMEANS, EM))
}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two costs of this run, and what the project promised of it.

    Attributes:
        value: of the median times.
        fastest: of the fastest runs; far from `value` on a machine that had other work to do.
        verdict: "met" or "missed" by the medians; empty where nothing was promised, "not at these sizes" elsewhere.
    """

    name: str
    value: float
    fastest: float
    target: str = ""
    verdict: str = ""


def ratio_values(seconds: dict[str, float], spared: float) -> dict[str, float]:
    """All ratios, from the seconds of each stage and the share of images that need no attention pass."""
    dear, step = seconds[PASS] + seconds[EM], seconds[STEP]
    compared = {name: seconds[theirs] / seconds[ours] for name, (theirs, ours) in SKLEARN_RATIOS.items() if theirs in seconds}
    return {
        EM_SHARE: seconds[EM] / seconds[FORWARD],
        **compared,
        PASS_SHARE: seconds[PASS] / seconds[FORWARD],
        SPARED: spared,
        MASK_SHARE: (dear + seconds[SELECTION]) / step,
        MASK_SHARE_SPARED: (dear * (1 - spared) + seconds[SELECTION]) / step,
        EM_SHARE_SPARED: seconds[EM] * (1 - spared) / step,
    }


def ratios(costs: dict[str, Cost], spared: float, promised: bool) -> list[Ratio]:
    """All ratios with their targets.

    Args:
        spared: share of the images of a run that need no attention pass.
        promised: whether the sizes are those at which the targets are stated.
    """
    median = ratio_values({name: cost.seconds for name, cost in costs.items()}, spared)
    fastest = ratio_values({name: cost.fastest for name, cost in costs.items()}, spared)
    return [Ratio(name, value, fastest[name], *_judge(name, value, promised)) for name, value in median.items()]


def _judge(name: str, value: float, promised: bool) -> tuple[str, str]:
    """Target and verdict, both empty where nothing was promised."""
    if name == EM_SHARE:
        target, met = f"at most {EM_SHARE_TARGET:.0%}", value <= EM_SHARE_TARGET
    elif name in SKLEARN_RATIOS:
        target, met = f"at least {SKLEARN_TARGET:g}x", value >= SKLEARN_TARGET
    else:
        return "", ""
    return target, ("met" if met else "missed") if promised else "not at these sizes"


# --- Report -----------------------------------------------------------------------------------------------------


def report_costs(costs: dict[str, Cost], images: int) -> str:
    """The table of stages."""
    width = max(map(len, costs))
    lines = [f"{'stage':<{width}}  {'seconds':>9}  {'from - to':>17}  {'images/s':>9}  {'of a step':>9}  {'adds MiB':>8}"]
    for name, cost in costs.items():
        memory = "-" if cost.memory is None else f"{cost.memory / 2**20:.0f}"
        extent = f"{cost.fastest:.4f} - {cost.slowest:.4f}"
        lines.append(
            f"{name:<{width}}  {cost.seconds:>9.4f}  {extent:>17}  {images / cost.seconds:>9.1f}  "
            f"{cost.seconds / costs[STEP].seconds:>9.2%}  {memory:>8}"
        )
    return "\n".join(lines)


def report_ratios(compared: Sequence[Ratio]) -> str:
    """The ratios, each beside its target."""
    width = max(len(ratio.name) for ratio in compared)
    lines = [f"{'ratio':<{width}}  {'medians':>8}  {'fastest runs':>12}"]
    for ratio in compared:
        value, fastest = (f"{x:.1f}x" if ratio.name in SKLEARN_RATIOS else f"{x:.2%}" for x in (ratio.value, ratio.fastest))
        verdict = f"   target {ratio.target}: {ratio.verdict}" if ratio.target else ""
        lines.append(f"{ratio.name:<{width}}  {value:>8}  {fastest:>12}{verdict}")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_cost", description=(__doc__ or "").split("\n")[0])
    add_schedule_arguments(parser)
    parser.add_argument("--model", choices=sorted(MODELS), default=PROMISED["model"], help="autoencoder (default %(default)s)")
    parser.add_argument("--input_size", type=int, default=224, help="pixels of the square images (default %(default)s)")
    parser.add_argument("--images", type=int, default=64, help="B, images of every stage (default %(default)s)")
    parser.add_argument("--parts", type=int, default=40, help="K, parts of an image (default %(default)s, the schedule's first)")
    parser.add_argument("--iterations", type=int, default=15, help="EM iterations (default %(default)s)")
    parser.add_argument("--batch_train", type=int, default=16, help="images of a training micro-batch (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns over all stages after the warm-up (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads of torch and scikit-learn (default: torch's own choice)")
    parser.add_argument("--amp", choices=("none", "bf16"), default="none", help="autocast of the network (default %(default)s)")
    return parser.parse_args(argv)


def build(args: argparse.Namespace, device: torch.device) -> Workload:
    """Model, images and mask of the command line."""
    torch.manual_seed(args.seed)
    model = MODELS[args.model](input_size=(args.input_size, args.input_size)).to(device)
    images = torch.randn(args.images, 3, args.input_size, args.input_size).to(device)
    return Workload(model, images, args.parts, args.iterations, args.mask_ratio, args.batch_train, args.amp == "bf16")


def spared_share(work: Workload, args: argparse.Namespace) -> float:
    """Share of the images of the run whose mask the grid alone decides (benchmarks/skipped_passes.py)."""
    fewer = {} if work.patches >= MaskConfig().most_parts else {"num_parts": args.parts}
    masker = EvolvedMask(
        work.model.grid_size, work.masker.num_masked, args.epochs, MaskConfig(gamma=args.gamma, **fewer), seed=args.seed
    )
    shares = skipped_by_epoch(masker, images=1000)
    return sum(shares) / len(shares)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark, prints it and returns its numbers."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    work = build(args, device)
    stages = work.stages() | sklearn_stages(work)
    costs = measure_stages(stages, args.repeats, device)
    asked = {name: getattr(args, name) for name in ("model", "images", "parts", "iterations")}
    sizes = asked | {"patches": work.patches}
    spared = spared_share(work, args)
    compared = ratios(costs, spared, promised=sizes == PROMISED)
    print(f"{sizes | {'amp': args.amp}}\n{machine(device)}\n")
    print(report_costs(costs, args.images))
    print(f"\nMemory: {memory_method(device)}.")
    print(f"Training step: {args.images} images in micro-batches of {args.batch_train}, one AdamW step.\n")
    print(report_ratios(compared))
    if SKLEARN_GIVEN not in costs:
        print("\nscikit-learn is not installed, so it was not compared: pip install scikit-learn")
    print(f"\nShares of a run: gamma {args.gamma:g}, {args.epochs} epochs, K = {args.parts} throughout (the schedule's K falls).")
    numbers = {
        "sizes": sizes | {"amp": args.amp, "batch_train": args.batch_train, "repeats": args.repeats},
        "machine": machine(device),
        "memory_is": memory_method(device),
        "stages": {name: asdict(cost) for name, cost in costs.items()},
        "ratios": [asdict(ratio) for ratio in compared],
    }
    write_json(args.json, numbers)
    return numbers


if __name__ == "__main__":
    main()
