"""Every choice of the method as a named option, and the recipes that set them together.

The paper leaves some questions open and the authors' released code answers some of them otherwise. Each row of
the table in docs/method.md is a field here. Defaults are the recipe `paper`; `MaskConfig.from_recipe("authors")`
is the released code (ZhanzhouFeng/Evolved-Part-Masking, commit 28228aa), and "best" what docs/parts.md found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .heads import Heads
from .masks import RULES, count_masked, count_masked_units
from .parts import DEFAULT_CANDIDATES, DEFAULT_FLOOR, PartsOptions, Start
from .signals import Graph, Similarity

Strategy = Literal[
    "evolved", "part", "grid", "random", "block", "grid-to-block", "random-units", "block-official",
    "attn-high", "attn-low", "semantic", "inverse-block", "squares", "official",
]  # fmt: skip


def option(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with a help text. `group` puts it under a heading of --help (common/flags.py)."""
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True)
class MaskConfig:
    """Options of the mask; checked when built.

    Raises:
        ValueError: a value outside its range, naming the option.
    """

    mask: Strategy = option(
        "evolved",
        "masking strategy: evolved (the paper's), part (alpha = 1), grid (alpha = 0), random, block (BEiT's rule with "
        "the exact count), grid-to-block (the appendix's baseline), random-units (SimMIM's: squares of mask_unit patches), "
        "block-official (BEiT's own, which may mask fewer), attn-high and attn-low (most or least attended patches: AttMask, "
        "MST), semantic (SemMAE's schedule from a share of every part to whole parts), inverse-block (one visible block: CAPI, "
        "Franca), squares (of mask_unit patches, any side and count: Pixio), official (the method's own: MAE random, BEiT "
        "block-official, SimMIM random-units)",
    )
    mask_unit: int = option(2, "patches across a square of random-units (SimMIM: 2, of 16 px each) or of squares (Pixio: 4)")
    mask_ratio_range: str | None = option(
        None,
        "LOW,HIGH, such as 0.6,0.9: how many patches are masked is drawn, each number between the two ratios alike, in place "
        "of mask_ratio (R2MAE)",
    )
    ratio_draw: Literal["image", "batch"] = option(
        "image", "one such number an image, or one a batch of a rank (R2MAE; MAE needs it, which cannot batch different counts)"
    )
    gamma: float = option(2.0, "exponent of alpha = (t/T)^gamma (Eq. 4, Table 2)")
    alpha: float | None = option(None, "fix alpha in 0..1 instead of letting it grow (Table 2)")
    alpha_offset: int = option(0, "added to the epoch in Eq. 4 (released code: 1)")
    schedule_epochs: int | None = option(None, "T of the alpha and K schedules; default: all epochs (released code: 300)")
    num_parts: int | None = option(None, "fix the number of parts K (Table 3); sets both ends of the schedule")
    parts_start: int = option(40, "number of parts K at the first epoch")
    parts_end: int = option(10, "number of parts K at the last epoch")
    parts_rounding: Literal["nearest", "down"] = option("nearest", "rounding of the scheduled K (released code: down)")
    parts_jitter: int = option(0, "add 0..J to K, drawn for each batch (released code: 2)")
    graph: Graph = option(
        "attention",
        "what makes the graph: attention of the encoder (Eq. 7), or the tokens that its blocks give, or their queries, keys or "
        "values, whose pass ends earlier and makes no attention maps",
    )
    similarity: Similarity = option(
        "cosine",
        "graph rows of tokens, queries, keys or values: the cosine similarity of a patch with all patches, or the vectors "
        "themselves; both without the mean over the image",
    )
    remove_position: bool = option(
        False,
        "take the mean over the batch at each position out of tokens, queries, keys or values. An image's mask then depends "
        "on the batch it is in, and so on ranks, batch size and shortcut; a batch of one image is left as it is",
    )
    layers: str = option("all", "blocks that make the graph: all, last, or indices such as 0,5,11")
    heads: Heads = option(
        "mean",
        "average the heads, keep them side by side, or average those of each image and block that separate groups of patches "
        "best (docs/method.md)",
    )
    reduction: Literal["mean", "sum"] = option("mean", "mean over blocks and heads, or their sum (released code)")
    attention_values: Literal["softmax", "scores"] = option(
        "softmax", "attention after the softmax, or the scores before it with negative ones cut to 0"
    )
    direction: Literal["row", "column", "symmetric"] = option(
        "row", "describe a patch by what it attends to (Eq. 7), by who attends to it (released code), or both"
    )
    estimator: Literal["gaussian", "vmf"] = option("gaussian", "mixture of the EM cut: Gaussian (Eq. 10-16) or spherical EM")
    covariance: Literal["diagonal", "spherical", "full"] = option("diagonal", "covariance of the Gaussian parts")
    covariance_floor: float = option(DEFAULT_FLOOR, "smallest variance of a part, as a share of the image's mean variance")
    kappa: float = option(40.0, "concentration of the vmf estimator")
    iterations: int = option(10, "EM iterations (released code: 15)")
    start: Start = option(
        "greedy",
        "start of the EM: greedy k-means++ seeds (the best of several candidates each), plain k-means++ seeds, or random "
        "(released code)",
    )
    start_candidates: int = option(DEFAULT_CANDIDATES, "candidates for each greedy seed")
    start_refine: int = option(3, "k-means steps between the seeds and the EM")
    start_draw: Literal["image", "batch"] = option("image", "one random start an image, or one a batch (released code)")
    scaling: Literal["image", "none"] = option(
        "image", "scale the graph rows of each image before the EM, or not (released code)"
    )
    hard_label: Literal["posterior", "per-patch"] = option(
        "posterior",
        "part of a patch: argmax of the posterior (Eq. 16), or of responsibilities normalised over patches (released code)",
    )
    reseed_empty: bool = option(True, "move a part that lost all its patches to the patch explained worst")
    smooth: float = option(
        0.0,
        "beta of a Potts prior that draws each patch to the parts of its neighbours, in nats a neighbour; 0: off "
        "(docs/method.md compares 0.5 to 32)",
    )
    grid_draw: Literal["image", "batch"] = option(
        "image", "one draw of the 2x2 grid an image, or one a batch and rank (released code)"
    )
    ties: Literal["random", "raster"] = option(
        "random", "order among equal probabilities: at random, or raster order (released code)"
    )
    masked_end: Literal["highest", "lowest"] = option(
        "highest", "mask the patches of highest probability, or of lowest (the appendix's pseudocode)"
    )
    attention_from: Literal["live", "ema"] = option(
        "live", "whose attention: the model being trained, or its moving average (released code)"
    )
    ema_decay: float = option(0.99996, "decay of that moving average, per optimiser step")
    attention_mode: Literal["eval", "train"] = option(
        "eval", "attention pass with dropout and drop-path off, or on (released code)"
    )
    shortcut: bool = option(
        True, "skip the attention pass of images whose mask the grid alone decides; masks are the same, but for remove_position"
    )

    def __post_init__(self) -> None:
        for name, words in WORDS.items():
            self._check(name, getattr(self, name) in words, f"must be one of {', '.join(words)}")
        self._check("gamma", self.gamma > 0, "must be above 0")
        self._check("alpha", self.alpha is None or 0 <= self.alpha <= 1, "must be between 0 and 1")
        self._check("alpha_offset", self.alpha_offset >= 0, "must be 0 or more")
        self._check("schedule_epochs", self.schedule_epochs is None or self.schedule_epochs > 0, "must be above 0")
        for name in ("num_parts", "parts_start", "parts_end"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "must be 1 or more")
        self._check("parts_jitter", self.parts_jitter >= 0, "must be 0 or more")
        self._check("covariance_floor", self.covariance_floor > 0, "must be above 0")
        self._check("mask_unit", self.mask_unit >= 1, "must be 1 or more")
        self._check("kappa", self.kappa > 0, "must be above 0")
        self._check("iterations", self.iterations >= 0, "must be 0 or more")
        self._check("start_candidates", self.start_candidates >= 1, "must be 1 or more")
        self._check("start_refine", self.start_refine >= 0, "must be 0 or more")
        self._check("smooth", 0 <= self.smooth < math.inf, "must be 0 or more and finite")
        self._check("ema_decay", 0 <= self.ema_decay < 1, "must be in [0, 1)")
        self._check_graph()
        self._check("mask_ratio_range", self._ratios_readable(), "must be LOW,HIGH with 0 < LOW <= HIGH < 1, such as 0.6,0.9")
        self._check("layers", self._layers_readable(), "must be 'all', 'last' or block indices such as 0,5,11")

    @classmethod
    def from_recipe(cls, recipe: str, **options: Any) -> MaskConfig:
        """The recipe `paper`, `authors` or `best` with some options changed.

        Raises:
            ValueError: an unknown recipe or option.
        """
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, not {recipe!r}")
        unknown = sorted(set(options) - {option.name for option in fields(cls)})
        if unknown:
            raise ValueError(f"unknown mask option {', '.join(unknown)}")
        return cls(**{**RECIPES[recipe], **options})

    @staticmethod
    def completed(saved: dict[str, Any]) -> dict[str, Any]:
        """Saved options, with the values of ADDED for those that are newer than the state."""
        return {**ADDED, **saved}

    def continuing(self, saved: dict[str, Any]) -> MaskConfig:
        """These options for a run that goes on from saved ones, given as they were saved.

        A run that began under FORMER_DEFAULTS keeps its masks when the project is updated under it: where neither side says
        anything but the default of its time, the saved value holds. In a state of today such a value was asked for by name.
        """
        if _CAME_WITH_THE_DEFAULTS in saved:
            return self
        before, today = self.completed(saved), {option.name: option.default for option in fields(self)}
        kept = {name for name, value in FORMER_DEFAULTS.items() if before[name] == value and getattr(self, name) == today[name]}
        return replace(self, **{name: before[name] for name in kept})

    @property
    def parts_range(self) -> tuple[int, int]:
        """K at the start and at the end of the schedule."""
        return (self.num_parts, self.num_parts) if self.num_parts else (self.parts_start, self.parts_end)

    @property
    def most_parts(self) -> int:
        """The largest K the schedule can give."""
        return max(self.parts_range) + self.parts_jitter

    @property
    def parts_options(self) -> PartsOptions:
        """The options of the graph cut among these."""
        return PartsOptions(**{option.name: getattr(self, option.name) for option in fields(PartsOptions)})

    @property
    def graph_options(self) -> dict[str, Any]:
        """The options of the graph's rows as `signal_graph` takes them."""
        return {name: getattr(self, name) for name in GRAPH_OPTIONS}

    @property
    def signal(self) -> dict[str, Any]:
        """What is read from the encoder, as `stream_signal` takes it."""
        return {"graph": self.graph, "layers": self.chosen_layers, "values": self.attention_values}

    @property
    def chosen_layers(self) -> Literal["all", "last"] | list[int]:
        """`layers` as AttentionTap takes it."""
        if self.layers == "all":
            return "all"
        if self.layers == "last":
            return "last"
        return [int(word) for word in self.layers.split(",")]

    @property
    def uses_attention(self) -> bool:
        """Whether this strategy ever looks at the model."""
        return RULES[self.mask].uses_attention

    @property
    def uses_parts(self) -> bool:
        """Whether this strategy cuts the attention into parts."""
        return RULES[self.mask].uses_parts

    @property
    def exact_count(self) -> bool:
        """Whether every image gets exactly the number of masked patches that it should."""
        return RULES[self.mask].exact_count

    @property
    def ratio_range(self) -> tuple[float, float] | None:
        """`mask_ratio_range` as two numbers."""
        if self.mask_ratio_range is None:
            return None
        low, high = map(float, self.mask_ratio_range.split(","))
        return low, high

    def check_even_counts(self) -> None:
        """For models that take as many masked patches from every image, as MAE does.

        Raises:
            ValueError: the strategy may mask fewer in some images, or each image draws its own number.
        """
        if self.ratio_range and self.ratio_draw == "image":
            raise ValueError(
                "mask_ratio_range masks another number of patches in every image, which this model cannot take; "
                "add ratio_draw batch, one number for each batch"
            )
        if not self.exact_count:
            raise ValueError(f"mask {self.mask} may mask fewer patches in some images, which this model cannot take; use block")

    def with_official(self, strategy: Strategy) -> MaskConfig:
        """The same options with `strategy` in the place of "official", the name that each method fills in."""
        return replace(self, mask=strategy) if self.mask == "official" else self

    def count_masked(self, grid_size: tuple[int, int], mask_ratio: float) -> int:
        """Masked patches of an image: floor(N * r), or all patches of ceil(units * r) units.

        Raises:
            ValueError: nothing or everything would be masked, or units do not fit the grid.
        """
        if self.mask == "random-units":
            return count_masked_units(*grid_size, mask_ratio, self.mask_unit)
        return count_masked(grid_size[0] * grid_size[1], mask_ratio)

    def _check_graph(self) -> None:
        """Refuses what means nothing together, and what nothing would read."""
        attention, vectors = self.graph == "attention", self.similarity == "vectors"
        ranked = RULES[self.mask].received is not None
        self._check("graph", attention or not ranked, f"must be attention with mask {self.mask}, which ranks patches by it")
        self._check("similarity", not (attention and vectors), "must be cosine with graph attention, which has no vectors")
        self._check("remove_position", not (attention and self.remove_position), "must be off with graph attention")
        for name, only in (("attention_values", "softmax"), ("direction", "row")):
            self._check(name, attention or getattr(self, name) == only, f"must be {only} with graph {self.graph}")
        self._check("reduction", not (vectors and self.reduction == "sum"), "must be mean with similarity vectors")
        if self.graph == "tokens":
            self._check("heads", self.heads == "mean", "must be mean with graph tokens, which have none")
        elif vectors:
            self._check("heads", self.heads != "mean", "must be concat or select with similarity vectors: bases of heads differ")
        if (self.estimator, self.start) == ("vmf", "random"):  # random directions are drawn for rows of N features
            random = "random directions (estimator vmf, start random)"
            self._check("heads", not (attention and self.heads == "concat"), f"must be mean or select with {random}")
            self._check("similarity", not vectors, f"must be cosine with {random}")

    def _ratios_readable(self) -> bool:
        try:
            ratios = self.ratio_range
        except ValueError:
            return False
        return ratios is None or 0 < ratios[0] <= ratios[1] < 1

    def _layers_readable(self) -> bool:
        try:
            return bool(self.chosen_layers)
        except ValueError:
            return False

    def _check(self, name: str, good: bool, rule: str) -> None:
        if not good:
            raise ValueError(f"{name} {rule}, got {getattr(self, name)!r}")


def _words() -> dict[str, tuple[str, ...]]:
    hints = get_type_hints(MaskConfig)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


GRAPH_OPTIONS = ("similarity", "heads", "direction", "reduction", "remove_position")
"""Options that decide how a signal becomes graph rows."""

ADDED: dict[str, Any] = {
    "start_candidates": 16,
    "start_refine": 0,
    "smooth": 0.0,
    "mask_ratio_range": None,
    "ratio_draw": "image",
    "graph": "attention",
    "similarity": "cosine",
    "remove_position": False,
}
"""Options that states of version 0.1.0 may lack, with the values under which masks are what they were without them."""

FORMER_DEFAULTS: dict[str, Any] = {"start": "kmeans++", "start_refine": 0, "iterations": 15, "covariance_floor": 0.1}
"""Defaults of version 0.1.0 that are others now."""

_CAME_WITH_THE_DEFAULTS = "smooth"
"""An option that every state has which was written since those defaults changed."""

WORDS: dict[str, tuple[str, ...]] = _words()
"""Allowed words of each option that takes one of several."""

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "best": {"graph": "keys"},
    "authors": {
        "gamma": 0.5,
        "alpha_offset": 1,
        "schedule_epochs": 300,
        "parts_rounding": "down",
        "parts_jitter": 2,
        "reduction": "sum",
        "direction": "column",
        "estimator": "vmf",
        "iterations": 15,
        "start": "random",
        "start_refine": 0,
        "start_draw": "batch",
        "scaling": "none",
        "hard_label": "per-patch",
        "reseed_empty": False,
        "grid_draw": "batch",
        "ties": "raster",
        "attention_from": "ema",
        "attention_mode": "train",
    },
}
"""What each recipe sets apart from the defaults. `best` is the paper's mask with keys in the place of attention: in the study of
docs/parts.md their parts agree better with objects in BEiT and SimMIM, and no worse in MAE, without any attention map."""
