"""The mask contract, masks that need no model and the table of strategies, and the form each model takes a mask in.

A mask is bool [B, N], row-major over an (H, W) patch grid, True = masked, with exactly `num_masked` True in
every row; where a mask ratio is drawn for each image, `num_masked` is a number for each, [B]. Grids need not be square, nor
even. One mask is outside the contract: BEiT's own block rule (:func:`official_block_masks`) may mask fewer.

B batch (images)   H, W patch grid   N = H*W patches   A attempts to place a rectangle   U units, squares of u*u patches
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional

from .cited_masks import (
    INVERSE_BLOCK_DRAWS,
    Counts,
    inverse_block_masks,
    square_probability,
    squares_across,
)
from .draws import Stream

BLOCK_ATTEMPTS = 48
BLOCK_DRAWS = 4  # numbers an attempt takes: area, aspect ratio, top, left
OFFICIAL_ATTEMPTS = 10  # attempts at one block before BEiT's own rule stops
MIN_BLOCK = 16  # patches of the smallest block, BEiT's value


def count_masked(num_patches: int, mask_ratio: float) -> int:
    """m = floor(N * r), exact for the decimal number that was written: N=100, r=0.29 gives 29.

    Raises:
        ValueError: r outside (0, 1), or so small or large that nothing or everything would be masked.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must be inside (0, 1), got {mask_ratio}")
    masked = math.floor(num_patches * Fraction(repr(float(mask_ratio))))
    if not 0 < masked < num_patches:
        raise ValueError(
            f"mask_ratio {mask_ratio} masks {masked} of {num_patches} patches: at least one must be masked and one kept"
        )
    return masked


def count_masked_units(height: int, width: int, mask_ratio: float, unit: int) -> int:
    """Patches masked by SimMIM's rule: ceil(U * r) units of u*u patches (14x14, r=0.6, u=2: 30 of 49 units, 120 patches).

    The product is the floating-point one of the official code, so that the count is its count for every ratio.

    Raises:
        ValueError: a grid that units do not fill, or a ratio that masks nothing or everything.
    """
    if height % unit or width % unit:
        raise ValueError(f"mask_unit {unit} does not divide the patch grid {height}x{width}")
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio must be inside (0, 1), got {mask_ratio}")
    units = (height // unit) * (width // unit)
    masked = math.ceil(units * mask_ratio)
    if masked >= units:
        raise ValueError(f"mask_ratio {mask_ratio} masks all {units} units: at least one must be kept")
    return masked * unit**2


def check_mask(mask: Tensor, num_masked: Counts) -> None:
    """Raises ValueError unless `mask` keeps the contract: bool [B, N] with `num_masked` (int, or int64 [B]) True in every row."""
    if mask.dtype != torch.bool or mask.ndim != 2:
        raise ValueError(f"a mask is bool [batch, patches], got {mask.dtype} {list(mask.shape)}")
    counts = mask.sum(dim=1)
    wrong = (counts != num_masked).nonzero()[:, 0].tolist()
    if wrong:
        wanted = int(num_masked[wrong[0]]) if isinstance(num_masked, Tensor) else num_masked
        raise ValueError(f"image {wrong[0]} has {int(counts[wrong[0]])} masked patches, not {wanted}")


def grid_classes(height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Position of each patch in its cell of the 2x2 grid (Eq. 17): int64 [N] in 0..3.

    r(i) = 2 * (row mod 2) + (column mod 2). The paper writes i mod 2 for the second term, which is the parity of
    the column when W is even, and would give diagonals instead of a grid when W is odd.
    """
    rows = torch.arange(height, device=device) % 2
    columns = torch.arange(width, device=device) % 2
    return (2 * rows[:, None] + columns).flatten()


def block_masks(
    height: int, width: int, num_masked: Counts, uniforms: Tensor, *, min_patches: int = MIN_BLOCK, min_aspect: float = 0.3
) -> Tensor:
    """Block-wise masks in the manner of BEiT (Bao et al., Algorithm 1), with the exact count.

    Rectangles of random area (from `min_patches` to what is still missing) and aspect ratio (log-uniform between
    `min_aspect` and its inverse) are added while they bring new patches and not too many. What no rectangle can
    fill in the end is filled where most neighbours are masked, so that the count is exact and the mask stays
    made of blocks. BEiT's own generator stops short instead.

    Args:
        num_masked: m, or int64 [B].
        uniforms: [B, BLOCK_ATTEMPTS * BLOCK_DRAWS + N] numbers in [0, 1): the rectangles, then the last filling.

    Returns:
        bool [B, N].
    """
    batch, cells = uniforms.shape[0], height * width
    placing = uniforms[:, : BLOCK_ATTEMPTS * BLOCK_DRAWS].reshape(batch, BLOCK_ATTEMPTS, BLOCK_DRAWS)
    filling = uniforms[:, BLOCK_ATTEMPTS * BLOCK_DRAWS :]
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=uniforms.device)
    for attempt in range(BLOCK_ATTEMPTS):
        missing = num_masked - mask.sum(dim=(1, 2))
        rectangle = _rectangles(placing[:, attempt], missing, height, width, min_patches, min_aspect)
        new = (rectangle & ~mask).sum(dim=(1, 2))
        fits = (new > 0) & (new <= missing)
        mask |= rectangle & fits[:, None, None]
    density = functional.avg_pool2d(mask[:, None].float(), 3, stride=1, padding=1, count_include_pad=False)
    score = torch.where(mask, 2.0, density[:, 0]).reshape(batch, cells) + filling / cells
    return mask_first(score.argsort(dim=1, descending=True, stable=True), num_masked)


def mask_first(order: Tensor, num_masked: Counts) -> Tensor:
    """Masks the first patches of an order int64 [B, N], m of every image or `num_masked` [B] of each: bool [B, N]."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    taken = place < (num_masked[:, None] if isinstance(num_masked, Tensor) else num_masked)
    return torch.zeros_like(taken).scatter(1, order, taken)


def official_block_draws(num_masked: int) -> int:
    """Numbers an image that :func:`official_block_masks` can take at most."""
    return num_masked * OFFICIAL_ATTEMPTS * BLOCK_DRAWS


def official_block_masks(
    height: int, width: int, num_masked: int, uniforms: Tensor, *, min_patches: int = MIN_BLOCK, min_aspect: float = 0.3
) -> Tensor:
    """Block-wise masks by the rule of BEiT's released code: at most `num_masked`, often a few less.

    Rectangles as in :func:`block_masks`. Each has ten attempts to bring at least one and at most the missing number
    of new patches; the first that fails all ten ends the mask, whatever is missing.

    Args:
        uniforms: [B, official_block_draws(num_masked)] numbers in [0, 1), four an attempt.

    Returns:
        bool [B, N], rows of different counts.
    """
    batch = uniforms.shape[0]
    attempts = uniforms.reshape(batch, -1, BLOCK_DRAWS)
    mask = torch.zeros(batch, height, width, dtype=torch.bool, device=uniforms.device)
    failed = torch.zeros(batch, dtype=torch.int64, device=uniforms.device)  # attempts at the present block
    for attempt in range(attempts.shape[1]):
        missing = num_masked - mask.sum(dim=(1, 2))
        going = (missing > 0) & (failed < OFFICIAL_ATTEMPTS)
        if not going.any():
            break
        rectangle = _rectangles(attempts[:, attempt], missing, height, width, min_patches, min_aspect)
        new = (rectangle & ~mask).sum(dim=(1, 2))
        fits = going & (new > 0) & (new <= missing)
        mask |= rectangle & fits[:, None, None]
        failed = torch.where(fits, 0, failed + 1)
    return mask.flatten(1)


def unit_masks(height: int, width: int, num_masked: int, unit: int, uniforms: Tensor) -> Tensor:
    """Random squares of `unit` x `unit` patches (SimMIM): the units with the largest numbers are masked.

    Args:
        num_masked: patches, a multiple of unit*unit.
        uniforms: [B, U] numbers in [0, 1), U = (H/u)(W/u); equal ones are taken in raster order.

    Returns:
        bool [B, N].
    """
    masked_units = num_masked // unit**2
    if masked_units * unit**2 != num_masked:
        raise ValueError(f"num_masked {num_masked} is not a multiple of the {unit**2} patches of a unit")
    first = uniforms.argsort(dim=1, descending=True, stable=True)[:, :masked_units]
    units = torch.zeros(uniforms.shape, dtype=torch.bool, device=uniforms.device).scatter(1, first, True)
    return pixel_mask(units, height // unit, width // unit, unit).flatten(1)


def _rectangles(uniforms: Tensor, missing: Tensor, height: int, width: int, min_patches: int, min_aspect: float) -> Tensor:
    """One rectangle an image, bool [B, H, W]; empty where the drawn one is larger than the grid allows."""
    area = min_patches + (missing - min_patches) * uniforms[:, 0]
    area = area.clamp(min=1)
    aspect = torch.exp(math.log(min_aspect) * (1 - 2 * uniforms[:, 1]))
    tall = (area * aspect).sqrt().round()
    wide = (area / aspect).sqrt().round()
    fits = (tall < height) & (wide < width) & (tall > 0) & (wide > 0)
    top = (uniforms[:, 2] * (height - tall + 1)).floor()
    left = (uniforms[:, 3] * (width - wide + 1)).floor()
    row = torch.arange(height, device=uniforms.device)
    column = torch.arange(width, device=uniforms.device)
    inside_rows = (row >= top[:, None]) & (row < (top + tall)[:, None])  # [B, H]
    inside_columns = (column >= left[:, None]) & (column < (left + wide)[:, None])  # [B, W]
    return inside_rows[:, :, None] & inside_columns[:, None, :] & fits[:, None, None]


# --- The strategies of `--mask` ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskShape:
    """What the masks of a run have in common: H, W, m, and u, the patches across a unit (SimMIM)."""

    height: int
    width: int
    num_masked: int
    unit: int = 1

    @property
    def num_patches(self) -> int:
        """N."""
        return self.height * self.width


def _one_a_patch(shape: MaskShape) -> int:
    return shape.num_patches


def _as_drawn(shape: MaskShape, uniforms: Tensor, counts: Counts) -> Tensor:
    return uniforms


def _any_shape(shape: MaskShape) -> None:
    """Nothing to check."""


@dataclass(frozen=True)
class MaskRule:
    """How a strategy makes P_part of Eq. 5, the second term of the blend. A new strategy is an entry of :data:`RULES`.

    Attributes:
        alpha: weight of that term; None where it grows (Eq. 4).
        uses_attention: made from the encoder's attention, of its parts (Eq. 6) where no `received` says otherwise, instead of
            `draws` and `probability`.
        received: attention that each patch gets [B, N] -> [B, N], for strategies that rank patches by it and make no parts.
        shares_of_parts: SemMAE's schedule in the place of the blend: alpha goes from a share of every part to whole parts.
        exact_count: every image gets exactly m; otherwise the mask is where the probability is above 0.
        any_count: m can be any number inside 1..N-1, another one for each image.
        stream: what the draws are for.
        draws: shape -> C, the uniform numbers that an image takes.
        probability: shape, uniforms [B, C], counts (m, or int64 [B]) -> [B, N].
        check: raises ValueError where the strategy cannot make masks of this shape.
    """

    alpha: float | None = 1.0
    uses_attention: bool = False
    received: Callable[[Tensor], Tensor] | None = None
    shares_of_parts: bool = False
    exact_count: bool = True
    any_count: bool = True
    stream: Stream = Stream.PATCHES
    draws: Callable[[MaskShape], int] = _one_a_patch
    probability: Callable[[MaskShape, Tensor, Counts], Tensor] = _as_drawn
    check: Callable[[MaskShape], None] = _any_shape

    @property
    def uses_parts(self) -> bool:
        """Whether the attention is cut into parts."""
        return self.uses_attention and self.received is None


def _block_draws(shape: MaskShape) -> int:
    return BLOCK_ATTEMPTS * BLOCK_DRAWS + shape.num_patches


def _block_probability(shape: MaskShape, uniforms: Tensor, counts: Counts) -> Tensor:
    """1 inside the blocks, 0 outside."""
    return block_masks(shape.height, shape.width, counts, uniforms).float()


def _official_block_draws(shape: MaskShape) -> int:
    return official_block_draws(shape.num_masked)


def _official_block_probability(shape: MaskShape, uniforms: Tensor, counts: Counts) -> Tensor:
    return official_block_masks(shape.height, shape.width, shape.num_masked, uniforms).float()


def _check_official_block(shape: MaskShape) -> None:
    if shape.num_masked < MIN_BLOCK:
        raise ValueError(
            f"mask 'block-official' needs {MIN_BLOCK} masked patches or more, its smallest block, got {shape.num_masked}"
        )


def _unit_draws(shape: MaskShape) -> int:
    return shape.num_patches // shape.unit**2


def _unit_probability(shape: MaskShape, uniforms: Tensor, counts: Counts) -> Tensor:
    return unit_masks(shape.height, shape.width, shape.num_masked, shape.unit, uniforms).float()


def _check_units(shape: MaskShape) -> None:
    unit = shape.unit
    if shape.height % unit or shape.width % unit:
        raise ValueError(f"mask_unit {unit} does not divide the patch grid {shape.height}x{shape.width}")
    if shape.num_masked % unit**2:
        raise ValueError(f"num_masked {shape.num_masked} is not a multiple of the {unit**2} patches of a unit (mask_unit {unit})")


def _inverse_block_draws(shape: MaskShape) -> int:
    return INVERSE_BLOCK_DRAWS


def _inverse_block_probability(shape: MaskShape, uniforms: Tensor, counts: Counts) -> Tensor:
    """0 inside the visible block, 1 outside."""
    return inverse_block_masks(shape.height, shape.width, counts, uniforms).float()


def _square_draws(shape: MaskShape) -> int:
    return squares_across(shape.height, shape.unit) * squares_across(shape.width, shape.unit)


def _square_probability(shape: MaskShape, uniforms: Tensor, counts: Counts) -> Tensor:
    return square_probability(shape.height, shape.width, shape.unit, uniforms)


def _as_received(received: Tensor) -> Tensor:
    return received


def _refuse_official(shape: MaskShape) -> None:
    raise ValueError("mask 'official' stands for a method's own strategy: name it with config.with_official(...)")


_BLOCK = MaskRule(stream=Stream.BLOCK, draws=_block_draws, probability=_block_probability)
_OFFICIAL_BLOCK = MaskRule(
    stream=Stream.BLOCK,
    draws=_official_block_draws,
    probability=_official_block_probability,
    check=_check_official_block,
    exact_count=False,
    any_count=False,
)

RULES: dict[str, MaskRule] = {
    "evolved": MaskRule(alpha=None, uses_attention=True),
    "part": MaskRule(uses_attention=True),
    "grid": MaskRule(alpha=0.0),
    "random": MaskRule(),
    "block": _BLOCK,
    "grid-to-block": replace(_BLOCK, alpha=None),
    "random-units": MaskRule(draws=_unit_draws, probability=_unit_probability, check=_check_units, any_count=False),
    "block-official": _OFFICIAL_BLOCK,
    "attn-high": MaskRule(uses_attention=True, received=_as_received),
    "attn-low": MaskRule(uses_attention=True, received=torch.neg),
    "semantic": MaskRule(alpha=None, uses_attention=True, shares_of_parts=True),
    "inverse-block": MaskRule(stream=Stream.BLOCK, draws=_inverse_block_draws, probability=_inverse_block_probability),
    "squares": MaskRule(draws=_square_draws, probability=_square_probability),
    "official": MaskRule(check=_refuse_official),
}
"""The rule of each word that `--mask` takes."""


def decided_by_grid(
    grid_draw: Tensor, part_draw: Tensor, class_sizes: Tensor, num_masked: Counts, alpha: float, lowest_first: bool = False
) -> Tensor:
    """Images whose evolved mask is the same whatever their parts are.

    Classes of the grid are masked from the most probable down. If m is exactly the size of the first few classes,
    and the gap to the next class, (1 - alpha) * gap, is larger than all that the parts can add, alpha * (largest -
    smallest part draw), no part can move a patch across the cut. The margin covers the rounding of the blend, so the
    masks are equal to the bit.

    Args:
        grid_draw: [B, 4], the number of each class of the 2x2 grid (Eq. 18).
        part_draw: [B, K], the number of each part (Eq. 6).
        class_sizes: int64 [4], patches of each class.
        num_masked: m, or int64 [B].
        lowest_first: the lowest probabilities are masked.

    Returns:
        bool [B].
    """
    if alpha == 0:
        return torch.ones(len(grid_draw), dtype=torch.bool, device=grid_draw.device)
    ranked, order = grid_draw.sort(dim=1, descending=not lowest_first)
    filled = class_sizes[order].cumsum(dim=1)  # [B, 4] patches in the first classes
    gap = (ranked[:, :-1] - ranked[:, 1:]).abs()
    reach = part_draw.amax(dim=1) - part_draw.amin(dim=1)
    wide = (1 - alpha) * gap > alpha * reach[:, None] + 1e-5
    wanted = num_masked[:, None] if isinstance(num_masked, Tensor) else num_masked
    return ((filled[:, :-1] == wanted) & wide).any(dim=1)


# --- mask -> the form a model takes it in -----------------------------------------------------------------------


def mae_ids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Contract mask -> what MAE gathers by.

    Returns:
        ids_keep: int64 [B, N - m], positions of the visible patches in raster order.
        ids_restore: int64 [B, N], for each patch its place in the sequence (visible patches, then masked ones).

    Raises:
        ValueError: rows of different counts, which MAE cannot batch.
    """
    least, most = torch.stack(mask.sum(dim=1).aminmax()).tolist()  # one wait for the GPU
    if least != most:
        raise ValueError(f"MAE needs the same number of masked patches in every image, got {least} to {most}")
    visible = mask.shape[1] - most
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, :visible], order.argsort(dim=1)


def pixel_mask(mask: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Contract mask -> bool [B, H*p, W*p], True on the pixels of masked patches."""
    grid = mask.reshape(-1, height, width)
    return grid.repeat_interleave(patch_size, dim=1).repeat_interleave(patch_size, dim=2)


def share_of_masked(mask: Tensor, share: float, uniforms: Tensor) -> Tensor:
    """Some of the masked patches of each image, those with the largest numbers.

    Args:
        mask: bool [B, N], the same count m in every row.
        share: of m, inside (0, 1]; rounded, at least one patch.
        uniforms: [B, N] numbers in [0, 1).

    Returns:
        bool [B, N].
    """
    count = max(round(share * int(mask[0].sum())), 1)
    chosen = torch.where(mask, uniforms, -1.0).topk(count, dim=1).indices
    return torch.zeros_like(mask).scatter(1, chosen, True)


LENGTH_STEP = 16  # uneven counts are padded to a multiple of this, so that batches have few different lengths


def masked_places(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Contract mask -> where its masked patches are, for gathering them alone. Counts may differ between images.

    Returns:
        places: int64 [B, Q], masked patches of each image in raster order, then visible ones that fill the row up; Q is m
            where all images have m.
        real: bool [B, Q], False where the row is filled up; None where nothing is.
    """
    counts = mask.sum(dim=1)
    least, most = torch.stack(counts.aminmax()).tolist()  # one wait for the GPU
    if least == most:
        return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most], None
    length = min(-(-most // LENGTH_STEP) * LENGTH_STEP, mask.shape[1])
    places = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    return places, torch.arange(length, device=mask.device) < counts[:, None]
