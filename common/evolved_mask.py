"""Evolved part masking (Feng and Zhang, CVPR 2023), in the order of the paper.

    image [B,3,Hpx,Wpx] -> embeddings [B,1+N,D] -> attention [B,h,1+N,1+N] -> graph [B,N,N]        Eq. 7
      -> parts [B,N] in 0..K-1                                                                     Eq. 10-16
      -> part probability [B,N]                     Eq. 6      --+
         2x2 grid probability [B,N]                 Eq. 17-18  --+-> blend(alpha) [B,N]            Eq. 4-5
      -> mask [B,N] bool, True = masked, the m most probable patches of every image                Eq. 2-3
      -> MAE: ids_keep / ids_restore | BEiT: bool tokens | SimMIM: [B,H,W]                         common/masks.py

    from common.evolved_mask import AttentionTap, EvolvedMask

    make_mask = EvolvedMask(grid_size=(14, 14), num_masked=147, total_epochs=200)
    make_mask.set_epoch(epoch)
    mask = make_mask(images, attention_fn, sample_ids).mask

B batch (images)   H, W patch grid   N = H*W patches   K parts   h heads   m masked patches   T epochs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from common.attention import AttentionTap, attention_mode, choose_layers, graph_from_blocks, patch_graph
from common.draws import Draws, GeneratorDraws, SampleDraws, Stream
from common.mask_config import MaskConfig
from common.masks import (
    BLOCK_ATTEMPTS,
    BLOCK_DRAWS,
    MIN_BLOCK,
    block_masks,
    count_masked,
    grid_classes,
    official_block_draws,
    official_block_masks,
    unit_masks,
)
from common.parts import PartsFit, check_graph, fit_parts, partition_parts, start_draws

__all__ = [
    "AttentionTap", "EvolvedMask", "MaskBatch", "MaskConfig", "PartsFit", "alpha_at", "attention_mode", "blend",
    "check_for_encoder", "choose_layers", "count_masked", "fit_parts", "grid_probability", "num_parts_at", "part_probability",
    "partition_parts", "patch_graph", "select_masked",
]  # fmt: skip

AttentionFn = Callable[[Tensor], "Tensor | Iterable[Tensor]"]

FIXED_ALPHA = {"grid": 0.0, "part": 1.0, "random": 1.0, "block": 1.0, "random-units": 1.0, "block-official": 1.0}
"""Weight of the second term of the blend, for strategies in which it does not grow."""


# --- The schedule: how far the masks have evolved (Eq. 4, Sec. 4.1) ---------------------------------------------


def alpha_at(epoch: float, total_epochs: int, gamma: float = 2.0) -> float:
    """Weight of the parts, alpha = (t / T)^gamma (Eq. 4): 0 at the first epoch, 1 when `epoch` is T.

    Raises:
        ValueError: t outside 0..T, or gamma not above 0.
    """
    _check_epoch(epoch, total_epochs)
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    return float((epoch / total_epochs) ** gamma)


def num_parts_at(epoch: float, total_epochs: int, start: int = 40, end: int = 10) -> int:
    """Number of parts K, linear from `start` to `end` over the run and rounded to the nearest (half up).

    Raises:
        ValueError: t outside 0..T, or an end below 1.
    """
    return math.floor(_parts_line(epoch, total_epochs, start, end) + 0.5)


def _parts_line(epoch: float, total_epochs: int, start: int, end: int) -> float:
    _check_epoch(epoch, total_epochs)
    if min(start, end) < 1:
        raise ValueError(f"the number of parts must be 1 or more, got {start} -> {end}")
    return start + (end - start) * epoch / total_epochs


def _check_epoch(epoch: float, total_epochs: int) -> None:
    if total_epochs < 1 or not 0 <= epoch <= total_epochs:
        raise ValueError(f"epoch must be between 0 and total_epochs, got epoch {epoch} of {total_epochs}")


# --- Two probabilities for every patch (Eq. 6, 17, 18) ----------------------------------------------------------


def grid_probability(batch: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """One uniform number for each class of the 2x2 grid and image (Eq. 17-18): float32 [B, N]."""
    drawn = torch.rand(batch, 4, generator=generator, device=generator.device)
    return drawn[:, grid_classes(height, width, generator.device)]


def part_probability(parts: Tensor, num_parts: int, generator: torch.Generator) -> Tensor:
    """One uniform number for each part and image, given to all patches of the part (Eq. 6): float32 [B, N].

    Args:
        parts: int64 [B, N] in 0..num_parts-1.
    """
    drawn = torch.rand(parts.shape[0], num_parts, generator=generator, device=generator.device)
    return drawn.to(parts.device).gather(1, parts)


def blend(p_grid: Tensor, p_part: Tensor, alpha: float) -> Tensor:
    """P = (1 - alpha) P_grid + alpha P_part (Eq. 5): [B, N]."""
    return (1 - alpha) * p_grid + alpha * p_part


# --- The m most probable patches are masked (Eq. 2-3) -----------------------------------------------------------


def select_masked(probability: Tensor, num_masked: int, generator: torch.Generator) -> Tensor:
    """Masks the `num_masked` most probable patches of every image; ties are broken at random.

    Patches of one part have one probability. Where the cut runs through a part, the patches to mask are
    therefore a uniform draw from it, not its first ones in raster order.

    Args:
        probability: [B, N], finite.

    Returns:
        bool [B, N], exactly `num_masked` True in every row.
    """
    order = torch.rand(probability.shape, generator=generator, device=generator.device)
    return _mask_highest(probability, num_masked, order.to(probability.device))


def _mask_highest(probability: Tensor, num_masked: int, tie_order: Tensor | None) -> Tensor:
    """As :func:`select_masked`, ties by ascending `tie_order` [B, N]; without it the first in raster order are kept."""
    batch, patches = probability.shape
    if not 0 <= num_masked <= patches:
        raise ValueError(f"num_masked must be between 0 and the {patches} patches, got {num_masked}")
    if tie_order is None:
        chosen = probability.argsort(dim=1, stable=True)[:, patches - num_masked :]
    else:
        shuffled = tie_order.argsort(dim=1, stable=True)
        ranked = probability.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
        chosen = shuffled.gather(1, ranked[:, :num_masked])
    mask = torch.zeros(batch, patches, dtype=torch.bool, device=probability.device)
    return mask.scatter(1, chosen, True)


# --- All of it, for a batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskBatch:
    """Masks of a batch, and how they came about.

    Attributes:
        mask: bool [B, N], True = masked; `num_masked` in every row, or at most that under "block-official".
        parts: int64 [B, N], part of each patch in 0..num_parts-1; -1 for images without an attention pass.
        alpha: weight of the parts in this batch.
        num_parts: K of this batch.
        skipped: bool [B], True for images that needed no attention pass.
    """

    mask: Tensor
    parts: Tensor
    alpha: float
    num_parts: int
    skipped: Tensor


class EvolvedMask:
    """Makes the masks of a training run: evolved part masking, and the static masks behind the same call.

    Args:
        grid_size: (H, W), patches down and across.
        num_masked: m, masked patches of every image, inside 1..N-1; `count_masked(N, ratio)` gives it.
        total_epochs: T, length of the run.
        config: the choices of common/mask_config.py; single ones can be given as keywords instead.
        seed: of all draws.
        num_prefix_tokens: tokens before the patches in the attention maps.

    Raises:
        ValueError: an option outside its range, naming it, or K larger than N.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        num_masked: int,
        total_epochs: int,
        config: MaskConfig | None = None,
        *,
        seed: int = 0,
        num_prefix_tokens: int = 1,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ValueError("give either config or single options, not both")
        self.config = config or MaskConfig.from_recipe("paper", **options)
        self.height, self.width = grid_size
        self.num_patches = self.height * self.width
        self.num_masked, self.total_epochs = num_masked, total_epochs
        self.seed, self.num_prefix_tokens = seed, num_prefix_tokens
        if not 0 < num_masked < self.num_patches:
            raise ValueError(
                f"num_masked must be inside 1..{self.num_patches - 1} for {self.num_patches} patches, got {num_masked}"
            )
        if self.config.uses_attention and self.config.most_parts > self.num_patches:
            raise ValueError(f"K = {self.config.most_parts} parts is above the N = {self.num_patches} patches of an image")
        self._check_strategy()
        self.generator = torch.Generator().manual_seed(seed)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Moves the schedule to epoch t, 0 <= t <= T."""
        _check_epoch(epoch, self.total_epochs)
        if epoch != int(epoch):
            raise ValueError(f"epoch must be a whole number, got {epoch}")
        self.epoch = int(epoch)

    @property
    def alpha(self) -> float:
        """Weight of the second term of the blend at this epoch (Eq. 4, or fixed by the strategy)."""
        fixed = FIXED_ALPHA.get(self.config.mask, self.config.alpha)
        if fixed is not None:
            return fixed
        schedule = self.config.schedule_epochs or self.total_epochs
        return alpha_at(min(self.epoch + self.config.alpha_offset, schedule), schedule, self.config.gamma)

    @property
    def num_parts(self) -> int:
        """Number of parts K at this epoch, before any jitter."""
        schedule = self.config.schedule_epochs or self.total_epochs
        line = _parts_line(min(self.epoch, schedule), schedule, *self.config.parts_range)
        return math.floor(line + (0.5 if self.config.parts_rounding == "nearest" else 0.0))

    @torch.no_grad()
    def __call__(self, inputs: Tensor, attention_fn: AttentionFn | None = None, sample_ids: Tensor | None = None) -> MaskBatch:
        """Masks for a batch.

        Args:
            inputs: any tensor with the batch first; only `inputs[rows]` is handed to `attention_fn`.
            attention_fn: gives the attention of those rows: [b, h, 1+N, 1+N], or an iterable of such tensors,
                one a block, reduced as they come. Only the strategies "evolved" and "part" call it.
            sample_ids: int64 [B], index of each image in the data set. With it every draw of an image depends on
                (seed, epoch, sample id) alone; without it draws come from this object's generator.
        """
        batch, device = inputs.shape[0], inputs.device
        draws = self._draws(batch, sample_ids, device)
        alpha = self.alpha
        p_grid = self._grid_draw(draws)  # [B, 4]
        by_grid = p_grid[:, grid_classes(self.height, self.width, device)]  # [B, N]
        tie_order = draws.uniform(Stream.TIES, self.num_patches) if self.config.ties == "random" else None
        if not self.config.uses_attention:
            second = self._static_probability(draws)
            mask = second > 0  # what BEiT's own rule gives, as it is: it may fall short of num_masked
            if self.config.exact_count:
                mask = _mask_highest(blend(by_grid, second, alpha), self.num_masked, tie_order)
            nobody = torch.full((batch, self.num_patches), -1, device=device)
            return MaskBatch(mask, nobody, alpha, self.num_parts, torch.ones(batch, dtype=torch.bool, device=device))
        num_parts = self._jittered_parts(draws)
        by_part = draws.uniform(Stream.PARTS, num_parts)  # [B, K]
        start = self._start_draw(draws, num_parts)
        skipped = self._decided_by_grid(p_grid, by_part, alpha)
        parts = self._parts(inputs, attention_fn, start, num_parts, ~skipped)
        second = by_part.gather(1, parts.clamp(min=0))
        probability = blend(by_grid, second, alpha)
        if self.config.masked_end == "lowest":
            probability = -probability
        mask = _mask_highest(probability, self.num_masked, tie_order)
        return MaskBatch(mask, parts, alpha, num_parts, skipped)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same masks, as plain values and one tensor."""
        return {
            "epoch": self.epoch,
            "seed": self.seed,
            "grid_size": [self.height, self.width],
            "num_masked": self.num_masked,
            "total_epochs": self.total_epochs,
            "config": asdict(self.config),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

        Raises:
            ValueError: the state belongs to another configuration; names what differs.
        """
        mine = self.state_dict()
        differs = [
            f"{key} {state[key]!r} -> {mine[key]!r}"
            for key in ("seed", "grid_size", "num_masked", "total_epochs")
            if state[key] != mine[key]
        ]
        differs += [
            f"{key} {state['config'].get(key)!r} -> {value!r}"
            for key, value in mine["config"].items()
            if state["config"].get(key) != value
        ]
        if differs:
            raise ValueError(f"the saved masks were made with other settings: {'; '.join(differs)}")
        self.set_epoch(state["epoch"])
        self.generator.set_state(state["generator"].cpu())

    def _check_strategy(self) -> None:
        """Raises ValueError where a strategy cannot make masks of this grid and count."""
        unit = self.config.mask_unit
        if self.config.mask == "official":
            raise ValueError("mask 'official' stands for a method's own strategy: name it with config.with_official(...)")
        if self.config.mask == "block-official" and self.num_masked < MIN_BLOCK:
            raise ValueError(
                f"mask 'block-official' needs {MIN_BLOCK} masked patches or more, its smallest block, got {self.num_masked}"
            )
        if self.config.mask != "random-units":
            return
        if self.height % unit or self.width % unit:
            raise ValueError(f"mask_unit {unit} does not divide the patch grid {self.height}x{self.width}")
        if self.num_masked % unit**2:
            raise ValueError(
                f"num_masked {self.num_masked} is not a multiple of the {unit**2} patches of a unit (mask_unit {unit})"
            )

    def _draws(self, batch: int, sample_ids: Tensor | None, device: torch.device) -> Draws:
        if sample_ids is None:
            return GeneratorDraws(batch, self.generator, device)
        if sample_ids.shape != (batch,):
            raise ValueError(f"sample_ids must be [{batch}], one for each input, got {list(sample_ids.shape)}")
        return SampleDraws(self.seed, self.epoch, sample_ids.to(device))

    def _grid_draw(self, draws: Draws) -> Tensor:
        draw = draws.uniform if self.config.grid_draw == "image" else draws.shared
        return draw(Stream.GRID, 4)

    def _start_draw(self, draws: Draws, num_parts: int) -> Tensor:
        draw = draws.uniform if self.config.start_draw == "image" else draws.shared
        return draw(Stream.START, start_draws(num_parts, self.num_patches, self.config.estimator, self.config.start))

    def _jittered_parts(self, draws: Draws) -> int:
        if not self.config.parts_jitter:
            return self.num_parts
        extra = int(draws.shared(Stream.NUM_PARTS, 1)[0, 0] * (self.config.parts_jitter + 1))
        return self.num_parts + extra

    def _static_probability(self, draws: Draws) -> Tensor:
        """Second term of the blend of the strategies that ask no model: [B, N]."""
        if self.config.mask in ("block", "grid-to-block"):
            drawn = draws.uniform(Stream.BLOCK, BLOCK_ATTEMPTS * BLOCK_DRAWS + self.num_patches)
            return block_masks(self.height, self.width, self.num_masked, drawn).float()
        if self.config.mask == "block-official":
            drawn = draws.uniform(Stream.BLOCK, official_block_draws(self.num_masked))
            return official_block_masks(self.height, self.width, self.num_masked, drawn).float()
        if self.config.mask == "random-units":
            drawn = draws.uniform(Stream.PATCHES, self.num_patches // self.config.mask_unit**2)
            return unit_masks(self.height, self.width, self.num_masked, self.config.mask_unit, drawn).float()
        return draws.uniform(Stream.PATCHES, self.num_patches)

    def _decided_by_grid(self, p_grid: Tensor, by_part: Tensor, alpha: float) -> Tensor:
        """Images whose mask is the same whatever their parts are: bool [B].

        Classes of the grid are masked from the most probable down. If m is exactly the size of the first few
        classes, and the gap to the next class, (1 - alpha) * gap, is larger than all that the parts can add,
        alpha * (largest - smallest part draw), no part can move a patch across the cut. The margin covers the
        rounding of the blend, so the masks are equal to the bit.
        """
        if alpha == 0 or not self.config.shortcut:
            return torch.full((len(p_grid),), alpha == 0 and self.config.shortcut, device=p_grid.device)
        sizes = torch.bincount(grid_classes(self.height, self.width), minlength=4).to(p_grid.device)
        lowest_first = self.config.masked_end == "lowest"
        ranked, order = p_grid.sort(dim=1, descending=not lowest_first)
        filled = sizes[order].cumsum(dim=1)  # [B, 4] patches in the first classes
        gap = (ranked[:, :-1] - ranked[:, 1:]).abs()
        reach = by_part.amax(dim=1) - by_part.amin(dim=1)
        wide = (1 - alpha) * gap > alpha * reach[:, None] + 1e-5
        return ((filled[:, :-1] == self.num_masked) & wide).any(dim=1)

    def _parts(self, inputs: Tensor, attention_fn: AttentionFn | None, start: Tensor, num_parts: int, wanted: Tensor) -> Tensor:
        """Parts of the wanted images, -1 for the others: int64 [B, N]."""
        parts = torch.full((len(inputs), self.num_patches), -1, device=inputs.device)
        rows = wanted.nonzero()[:, 0]
        if len(rows) == 0:
            return parts
        if attention_fn is None:
            raise ValueError(f"mask {self.config.mask!r} needs attention_fn: it is made from the encoder's attention")
        everything = len(rows) == len(inputs)
        graph = self._graph(attention_fn(inputs if everything else inputs[rows]))
        check_graph(graph, rows)
        parts[rows] = partition_parts(
            graph,
            num_parts,
            estimator=self.config.estimator,
            covariance=self.config.covariance,
            iterations=self.config.iterations,
            hard_label=self.config.hard_label,
            uniforms=start[rows],
            start=self.config.start,
            scaling=self.config.scaling,
            covariance_floor=self.config.covariance_floor,
            kappa=self.config.kappa,
            reseed_empty=self.config.reseed_empty,
            check_finite=False,
        )
        return parts

    def _graph(self, attention: Tensor | Iterable[Tensor]) -> Tensor:
        graph = graph_from_blocks(
            attention,
            num_prefix_tokens=self.num_prefix_tokens,
            direction=self.config.direction,
            heads=self.config.heads,
            reduction=self.config.reduction,
        )
        if graph.shape[1] != self.num_patches:
            raise ValueError(
                f"the attention has {graph.shape[1]} patch tokens, "
                f"but the mask's grid is {self.height}x{self.width} = {self.num_patches}"
            )
        return graph


def check_for_encoder(
    config: MaskConfig, *, depth: int, grid_size: tuple[int, int], num_masked: int, even_counts: bool = False
) -> None:
    """Everything about a mask that an encoder and the flags decide, before there are data or a device.

    Args:
        depth: blocks of the encoder.
        grid_size: (H, W), patches down and across.
        num_masked: m, masked patches of every image.
        even_counts: whether the model needs the same number of masked patches in every image, as MAE does.

    Raises:
        ValueError: blocks that the encoder lacks, K above N, a count or grid that the strategy cannot mask, uneven counts
            where even ones are needed; names the option.
    """
    if even_counts:
        config.check_even_counts()
    if config.uses_attention:
        choose_layers(config.chosen_layers, depth)
    EvolvedMask(grid_size, num_masked, total_epochs=1, config=config)
