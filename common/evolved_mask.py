"""Evolved part masking (Feng and Zhang, CVPR 2023), in the order of the paper.

    image [B,3,Hpx,Wpx] -> embeddings [B,1+N,D] -> attention [B,h,1+N,1+N] -> graph [B,N,N]        Eq. 7
      -> parts [B,N] in 0..K-1                                                                     Eq. 10-16
      -> part probability [B,N]                     Eq. 6      --+
         2x2 grid probability [B,N]                 Eq. 17-18  --+-> blend(alpha) [B,N]            Eq. 4-5
      -> mask [B,N] bool, True = masked, the m most probable patches of every image                Eq. 2-3
      -> MAE: ids_keep / ids_restore | BEiT: bool tokens | SimMIM: [B,H,W]                         masks.py

    make_mask = EvolvedMask(grid_size=(14, 14), num_masked=147, total_epochs=200)
    make_mask.set_epoch(epoch)
    mask = make_mask(images, attention_fn, sample_ids).mask

Each equation is one function, and EvolvedMask calls these functions and no others. What is random in one is decided by
`uniforms`, numbers in [0, 1) that the caller hands in, or is drawn from `generator`; the results lie where the tensors
lie, whatever the generator's device. Eq. 7 is in attention.py, other signals than attention in signals.py, Eq. 10-16
in parts.py, the strategies of other papers in masks.py and cited_masks.py, every option in mask_config.py, checks and the
saved state in mask_state.py.

B batch (images)   H, W patch grid   N = H*W patches   K parts   h heads   m masked patches   T epochs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .attention import AttentionTap, attention_mode, choose_layers, patch_graph, stream_attention
from .cited_masks import Counts, received_attention, semantic_probability
from .draws import Draws, SampleDraws, Stream, batch_draws, uniform_numbers
from .mask_config import MaskConfig
from .mask_state import MaskState, check_epoch
from .masks import count_masked, decided_by_grid, grid_classes, mask_first
from .parts import PartsFit, PartsOptions, check_graph, fit_parts, partition_parts, start_draws
from .signals import signal_graph, stream_signal

__all__ = [
    "AttentionFn", "AttentionTap", "EvolvedMask", "MaskBatch", "MaskConfig", "PartsFit", "PartsOptions", "alpha_at",
    "attention_mode", "blend", "check_for_encoder", "choose_layers", "count_masked", "fit_parts", "grid_probability",
    "num_parts_at", "part_probability", "partition_parts", "patch_graph", "select_masked", "signal_graph", "stream_attention",
    "stream_signal",
]  # fmt: skip

AttentionFn = Callable[[Tensor], "Tensor | Iterable[Tensor]"]
"""Inputs of some images -> their attention: [b, h, 1+N, 1+N], or an iterable of such tensors, one a block.

With another `graph` than attention: that signal, tokens [b, 1+N, D], or queries, keys or values [b, h, 1+N, d]."""


# --- The schedule: how far the masks have evolved (Eq. 4, Sec. 4.1) ---------------------------------------------


def alpha_at(epoch: float, total_epochs: int, gamma: float = 2.0) -> float:
    """Weight of the parts, alpha = (t / T)^gamma (Eq. 4): 0 at the first epoch, 1 when `epoch` is T.

    Raises:
        ValueError: t outside 0..T, or gamma not above 0.
    """
    check_epoch(epoch, total_epochs)
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    return float((epoch / total_epochs) ** gamma)


def num_parts_at(
    epoch: float, total_epochs: int, start: int = 40, end: int = 10, rounding: Literal["nearest", "down"] = "nearest"
) -> int:
    """Number of parts K, linear from `start` to `end` over the run and rounded to the nearest (half up), or down.

    Raises:
        ValueError: t outside 0..T, or an end below 1.
    """
    check_epoch(epoch, total_epochs)
    if min(start, end) < 1:
        raise ValueError(f"the number of parts must be 1 or more, got {start} -> {end}")
    line = start + (end - start) * epoch / total_epochs
    return math.floor(line + (0.5 if rounding == "nearest" else 0.0))


# --- Attention -> graph -> parts: `patch_graph` (Eq. 7, attention.py; `signal_graph`, signals.py, calls it and has the other
#     signals), `partition_parts` (Eq. 10-16, parts.py) ----------------------------------------------------------


# --- Two probabilities for every patch (Eq. 6, 17, 18), and their blend (Eq. 5) ---------------------------------


def part_probability(
    parts: Tensor, num_parts: int, generator: torch.Generator | None = None, *, uniforms: Tensor | None = None
) -> Tensor:
    """One uniform number for each part and image, given to all patches of the part (Eq. 6): float32 [B, N].

    Args:
        parts: int64 [B, N] in 0..num_parts-1.
        uniforms: [B, K] instead of a generator.
    """
    part_draw = uniform_numbers((len(parts), num_parts), generator, uniforms, parts.device)
    return part_draw.gather(1, parts)


def grid_probability(
    batch: int,
    height: int,
    width: int,
    generator: torch.Generator | None = None,
    *,
    uniforms: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """One uniform number for each class of the 2x2 grid and image (Eq. 17-18): float32 [B, N].

    Args:
        uniforms: [B, 4] instead of a generator.
        device: of the result; default: that of the generator or of `uniforms`.
    """
    grid_draw = uniform_numbers((batch, 4), generator, uniforms, device)
    return grid_draw[:, grid_classes(height, width, grid_draw.device)]


def blend(p_grid: Tensor, p_part: Tensor, alpha: float) -> Tensor:
    """P = (1 - alpha) P_grid + alpha P_part (Eq. 5): [B, N]."""
    return (1 - alpha) * p_grid + alpha * p_part


# --- The m most probable patches are masked (Eq. 2-3) -----------------------------------------------------------


def select_masked(
    probability: Tensor, num_masked: Counts, generator: torch.Generator | None = None, *, uniforms: Tensor | None = None
) -> Tensor:
    """Masks the `num_masked` most probable patches of every image; ties are broken at random.

    Patches of one part have one probability. Where the cut runs through a part, the patches to mask are
    therefore a uniform draw from it, not its first ones in raster order.

    Args:
        probability: [B, N], finite.
        num_masked: m, or int64 [B], a number in 0..N for each image, which is not looked at.
        uniforms: [B, N] instead of a generator; of equal probabilities those with the smaller number go first.

    Returns:
        bool [B, N], exactly `num_masked` True in every row.

    Raises:
        ValueError: m outside 0..N.
    """
    batch, patches = probability.shape
    if not isinstance(num_masked, Tensor) and not 0 <= num_masked <= patches:
        raise ValueError(f"num_masked must be between 0 and the {patches} patches, got {num_masked}")
    tie_order = uniform_numbers((batch, patches), generator, uniforms, probability.device)
    shuffled = tie_order.argsort(dim=1, stable=True)
    ranked = probability.gather(1, shuffled).argsort(dim=1, descending=True, stable=True)
    return mask_first(shuffled.gather(1, ranked), num_masked)


# --- All of it, for a batch -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskBatch:
    """Masks of a batch, and how they came about.

    Attributes:
        mask: bool [B, N], True = masked; `num_masked` in every row, or at most that under "block-official", or with
            `mask_ratio_range` a drawn number.
        parts: int64 [B, N], part of each patch in 0..num_parts-1; -1 where there are none.
        alpha: weight of the parts in this batch.
        num_parts: K of this batch.
        skipped: bool [B], True for images that needed no attention pass.
    """

    mask: Tensor
    parts: Tensor
    alpha: float
    num_parts: int
    skipped: Tensor


class EvolvedMask(MaskState):
    """Makes the masks of a training run: evolved part masking, and the static masks behind the same call.

    Args:
        grid_size: (H, W), patches down and across.
        num_masked: m, masked patches of every image, inside 1..N-1; `count_masked(N, ratio)` gives it.
        total_epochs: T, length of the run.
        config: the choices of mask_config.py; single ones can be given as keywords instead.
        seed: of all draws.
        num_prefix_tokens: tokens before the patches in the attention maps.

    Raises:
        ValueError: an option outside its range, naming it, or K larger than N.
    """

    @property
    def alpha(self) -> float:
        """Weight of the second term of the blend at this epoch (Eq. 4, or fixed by the strategy)."""
        fixed = self.config.alpha if self.rule.alpha is None else self.rule.alpha
        if fixed is not None:
            return fixed
        schedule = self.config.schedule_epochs or self.total_epochs
        return alpha_at(min(self.epoch + self.config.alpha_offset, schedule), schedule, self.config.gamma)

    @property
    def num_parts(self) -> int:
        """Number of parts K at this epoch, before any jitter."""
        return self.num_parts_in(self.epoch)

    def num_parts_in(self, epoch: int) -> int:
        """Number of parts K at any epoch, before any jitter."""
        schedule = self.config.schedule_epochs or self.total_epochs
        return num_parts_at(min(epoch, schedule), schedule, *self.config.parts_range, self.config.parts_rounding)

    @torch.no_grad()
    def __call__(
        self,
        inputs: Tensor,
        attention_fn: AttentionFn | None = None,
        sample_ids: Tensor | Sequence[int] | None = None,
        *,
        parts: Tensor | None = None,
        num_parts: int | None = None,
    ) -> MaskBatch:
        """Masks for a batch.

        Args:
            inputs: any tensor with the batch first; only `inputs[rows]` is handed to `attention_fn`.
            attention_fn: gives the attention of those rows: [b, h, 1+N, 1+N], or an iterable of such tensors,
                one a block, reduced as they come; with another `graph`, that signal (signals.py). Only strategies that
                use attention call it.
            sample_ids: int64 [B], index of each image in the data set, as a tensor, an array or a list. With it every draw
                of an image depends on (seed, epoch, sample id) alone; without it draws come from this object's generator.
                Under `remove_position` the parts of an image depend on the other rows handed to `attention_fn` all the same.
            parts: int64 [B, N], made before (:meth:`cut`), in the place of those that attention would make; a row of -1 stands
                for an image without parts, all of whose patches then have the same number of Eq. 6.
            num_parts: with `parts`: how many numbers Eq. 6 draws, more than the largest of them; default: K of the epoch.

        Raises:
            ValueError: no `attention_fn` where there must be one, `parts` for a strategy without, or a signal or parts that do
                not fit the grid.

        Warns:
            UserWarning: once, if :meth:`set_epoch` was never called, for a mask that evolves.
        """
        self._warn_of_standing_still()
        if parts is not None:
            self._check_given(parts, len(inputs))
        alpha, draws = self.alpha, batch_draws(inputs, self.seed, self.epoch, sample_ids, self.generator)
        counts = self._counts(draws)
        grid_draw = draws.draw(Stream.GRID, 4, self.config.grid_draw)
        tie_order = draws.uniform(Stream.TIES, self.num_patches) if self.config.ties == "random" else self._raster_order(inputs)
        p_grid = grid_probability(len(inputs), self.height, self.width, uniforms=grid_draw)
        if not self.rule.uses_parts:
            return self._without_parts(inputs, attention_fn, draws, counts, p_grid, tie_order)
        num_parts = self._jittered_parts(draws) if parts is None else num_parts or self.num_parts
        part_draw = draws.uniform(Stream.PARTS, num_parts)
        skipped = self.decided_by_grid(grid_draw, part_draw, counts)
        if parts is None:
            parts = self._parts(inputs, attention_fn, ~skipped, num_parts, draws)
        p_part = part_probability(parts.clamp(min=0), num_parts, uniforms=part_draw)  # -1: the grid decides whatever it is
        probability = blend(p_grid, p_part, alpha)
        if self.rule.shares_of_parts:
            probability = self._shares_of_parts(draws, parts.clamp(min=0), part_draw, counts)
        elif self.config.masked_end == "lowest":
            probability = -probability
        return MaskBatch(select_masked(probability, counts, uniforms=tie_order), parts, alpha, num_parts, skipped)

    def cut(
        self, inputs: Tensor, attention_fn: AttentionFn, sample_ids: Tensor | None = None, num_parts: int | None = None
    ) -> Tensor:
        """Parts of every image, for callers that keep them: int64 [B, N] in 0..num_parts-1.

        Args:
            inputs, attention_fn, sample_ids: as in a call.
            num_parts: K; default: that of the epoch.
        """
        everyone = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        draws = batch_draws(inputs, self.seed, self.epoch, sample_ids, self.generator)
        return self._parts(inputs, attention_fn, everyone, num_parts or self.num_parts, draws)

    def spared(self, sample_ids: Tensor, num_parts: int | None = None) -> Tensor:
        """Images whose mask the grid alone decides at this epoch, from their draws, whatever `shortcut` says: bool [B].

        Args:
            sample_ids: int64 [B], all of a batch, in its order.
            num_parts: how many numbers Eq. 6 draws; default: K of the epoch.
        """
        draws = SampleDraws(self.seed, self.epoch, sample_ids)
        grid_draw = draws.draw(Stream.GRID, 4, self.config.grid_draw)
        part_draw = draws.uniform(Stream.PARTS, num_parts or self.num_parts)
        return self._decided_by_grid(grid_draw, part_draw, self._counts(draws))

    def decided_by_grid(self, grid_draw: Tensor, part_draw: Tensor, counts: Counts | None = None) -> Tensor:
        """Images that need no attention pass, by their draws [B, 4] and [B, K]: bool [B]. See masks.decided_by_grid."""
        if not self.config.shortcut:
            return torch.zeros(len(grid_draw), dtype=torch.bool, device=grid_draw.device)
        return self._decided_by_grid(grid_draw, part_draw, self.num_masked if counts is None else counts)

    def _decided_by_grid(self, grid_draw: Tensor, part_draw: Tensor, counts: Counts) -> Tensor:
        if self.rule.shares_of_parts:
            return torch.zeros(len(grid_draw), dtype=torch.bool, device=grid_draw.device)
        class_sizes = torch.bincount(grid_classes(self.height, self.width), minlength=4).to(grid_draw.device)
        lowest_first = self.config.masked_end == "lowest"
        return decided_by_grid(grid_draw, part_draw, class_sizes, counts, self.alpha, lowest_first)

    def _counts(self, draws: Draws) -> Counts:
        """Masked patches: m, or with a range of ratios int64 [B], each number in it alike."""
        if self.config.ratio_range is None:
            return self.num_masked
        span = self.most_masked - self.least_masked
        drawn = draws.draw(Stream.RATIO, 1, self.config.ratio_draw)[:, 0]
        return self.least_masked + (drawn * (span + 1)).long().clamp(max=span)

    def _shares_of_parts(self, draws: Draws, parts: Tensor, part_draw: Tensor, counts: Counts) -> Tensor:
        """SemMAE's schedule over these parts: [B, N]. The draws of PATCHES are the order within parts, then an offset a part."""
        patch_draw, offset = draws.uniform(Stream.PATCHES, parts.shape[1] + part_draw.shape[1]).tensor_split(
            [parts.shape[1]], dim=1
        )
        return semantic_probability(parts, part_draw, patch_draw, offset, counts, self.alpha)

    def _without_parts(
        self, inputs: Tensor, attention_fn: AttentionFn | None, draws: Draws, counts: Counts, p_grid: Tensor, tie_order: Tensor
    ) -> MaskBatch:
        """Masks of a strategy that makes no parts, with another second term of the blend."""
        p_other = self._other_probability(inputs, attention_fn, draws, counts)
        mask = p_other > 0  # what BEiT's own rule gives, as it is: it may fall short of num_masked
        if self.rule.exact_count:
            mask = select_masked(blend(p_grid, p_other, self.alpha), counts, uniforms=tie_order)
        skipped = mask.new_full((len(inputs),), not self.rule.uses_attention)
        return MaskBatch(mask, torch.full_like(mask, -1, dtype=torch.int64), self.alpha, self.num_parts, skipped)

    def _other_probability(self, inputs: Tensor, attention_fn: AttentionFn | None, draws: Draws, counts: Counts) -> Tensor:
        """The second term of the blend of a strategy that makes no parts: [B, N]."""
        if self.rule.received is None:
            return self.rule.probability(self.shape, draws.uniform(self.rule.stream, self.rule.draws(self.shape)), counts)
        received = received_attention(self._signal(inputs, attention_fn), self.num_prefix_tokens)
        self._check_patches(received)
        check_graph(received, name="attention")
        return self.rule.received(received)

    def _signal(self, inputs: Tensor, attention_fn: AttentionFn | None) -> Tensor | Iterable[Tensor]:
        if attention_fn is None:
            raise ValueError(f"mask {self.config.mask!r} needs attention_fn: it is made from the encoder's attention")
        return attention_fn(inputs)

    def _parts(self, inputs: Tensor, attention_fn: AttentionFn | None, needed: Tensor, num_parts: int, draws: Draws) -> Tensor:
        """Parts of the wanted images, -1 for the others: int64 [B, N]."""
        start_count = start_draws(num_parts, self.num_patches, self.parts_options)
        start_draw = draws.draw(Stream.START, start_count, self.config.start_draw)
        parts = torch.full((len(inputs), self.num_patches), -1, device=inputs.device)
        rows = needed.nonzero()[:, 0]
        if len(rows) == 0:
            return parts
        signal = self._signal(inputs if len(rows) == len(inputs) else inputs[rows], attention_fn)
        graph = signal_graph(signal, self.config.graph, self.num_prefix_tokens, **self.config.graph_options)
        self._check_patches(graph)
        check_graph(graph, rows)  # names images by their place in the batch
        start, grid_size = start_draw[rows], (self.height, self.width)
        parts[rows] = partition_parts(
            graph, num_parts, self.parts_options, uniforms=start, grid_size=grid_size, check_finite=False
        )
        return parts

    def _raster_order(self, inputs: Tensor) -> Tensor:
        """Numbers [B, N] with which select_masked leaves the first of equal patches in raster order visible."""
        descending = torch.arange(self.num_patches - 1, -1, -1, device=inputs.device) / self.num_patches
        return descending.expand(len(inputs), -1)

    def _jittered_parts(self, draws: Draws) -> int:
        if not self.config.parts_jitter:
            return self.num_parts
        return self.num_parts + int(draws.shared(Stream.NUM_PARTS, 1)[0, 0] * (self.config.parts_jitter + 1))


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
