"""What the masks look like while they evolve from grid to parts, as a Markdown table.

    python -m benchmarks.mask_statistics
    python -m benchmarks.mask_statistics --grid 14x14 --mask_ratio 0.6

The attention is synthetic: patches attend to patches that are near and of similar colour in a smooth random colour
field, so that parts are contiguous blobs as in a photograph. All rows share the draws of the grid and the images.

B images   H, W patch grid   N = H*W patches   K parts   T = 1 + N tokens   m masked patches
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.pieces import count_pieces, label_pieces
from benchmarks.skipped_passes import add_schedule_arguments, grid_size, write_json
from common.evolved_mask import EvolvedMask, MaskBatch, MaskConfig, count_masked, num_parts_at

ALPHAS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
COLOUR_CELLS = 5  # coarse cells of the colour field across an image
COLOUR_SPREAD = 6.0  # a change of colour from one end of the range to the other counts as this many patches
OTHERS = ("random", "block", "inverse-block", "squares", "attn-high", "attn-low", "semantic")
"""Strategies in the last rows; semantic, which goes on with alpha, at its start (a share of every part)."""

REACH = 1.5  # distance, in patches, at which attention has fallen to exp(-1/2)


@dataclass(frozen=True)
class MaskStatistics:
    """Means over a batch of masks.

    Attributes:
        same_neighbours: share of horizontal and vertical neighbours that are both masked or both visible.
        visible_piece, masked_piece: patches of a connected piece (4-neighbourhood).
        next_to_visible: share of masked patches with a visible patch above, below, left or right.
        parts_masked, parts_visible, parts_mixed: shares of the parts that have any patch; they add up to 1.
        equal_to_grid: share of patches that the pure grid mask of the same draw treats alike.
    """

    same_neighbours: float
    visible_piece: float
    masked_piece: float
    next_to_visible: float
    parts_masked: float
    parts_visible: float
    parts_mixed: float
    equal_to_grid: float


TITLES = {
    "same_neighbours": "equal neighbours",
    "visible_piece": "visible piece (patches)",
    "masked_piece": "masked piece (patches)",
    "next_to_visible": "masked next to visible",
    "parts_masked": "parts masked",
    "parts_visible": "parts visible",
    "parts_mixed": "parts mixed",
    "equal_to_grid": "equal to grid mask",
}


# --- Attention whose parts are blobs ----------------------------------------------------------------------------


def blob_attention(images: int, height: int, width: int, seed: int) -> Tensor:
    """Attention that falls with distance in position and colour: [B, 1, T, T], a class token first, which attends to the patches
    as they do to each other on average.

    Colours are a coarse random field, enlarged smoothly: regions of like colour with soft borders.
    """
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(images, 3, COLOUR_CELLS, COLOUR_CELLS, generator=generator)
    colours = functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([row, column]).float().expand(images, -1, -1, -1)
    features = torch.cat([places, COLOUR_SPREAD * colours], dim=1).flatten(2).transpose(1, 2)  # [B, N, 5]
    edges = (-torch.cdist(features, features).square() / (2 * REACH**2)).softmax(dim=2)
    tokens = torch.cat([edges.mean(dim=1, keepdim=True), edges], dim=1)
    return functional.pad(tokens, (1, 0))[:, None]


# --- Statistics of masks ----------------------------------------------------------------------------------------


def equal_neighbours(maps: Tensor) -> float:
    """Share of horizontal and vertical neighbours with equal value in maps [B, H, W]."""
    pairs = [maps[:, 1:] == maps[:, :-1], maps[:, :, 1:] == maps[:, :, :-1]]
    return torch.cat([pair.flatten() for pair in pairs]).float().mean().item()


def piece_size(maps: Tensor) -> float:
    """True patches over connected pieces of them, in maps bool [B, H, W]."""
    pieces = label_pieces(maps.flatten(1).long(), (maps.shape[1], maps.shape[2])).reshape(maps.shape)
    return int(maps.sum()) / max(len(pieces[maps].unique()), 1)


def next_to_visible(masked: Tensor) -> float:
    """Share of the masked patches of maps bool [B, H, W] with a visible 4-neighbour."""
    visible = functional.pad(~masked, (1, 1, 1, 1))
    near = visible[:, :-2, 1:-1] | visible[:, 2:, 1:-1] | visible[:, 1:-1, :-2] | visible[:, 1:-1, 2:]
    return (near & masked).sum().item() / masked.sum().item()


def part_shares(mask: Tensor, parts: Tensor, num_parts: int) -> tuple[float, float, float]:
    """Shares of the non-empty parts that are wholly masked, wholly visible, and mixed; mask and parts [B, N]."""
    members = functional.one_hot(parts, num_parts)  # [B, N, K]
    size = members.sum(dim=1)
    hidden = (members * mask[..., None]).sum(dim=1)
    there = size > 0
    whole, none = (there & (hidden == size)).sum().item(), (there & (hidden == 0)).sum().item()
    count = there.sum().item()
    return whole / count, none / count, (count - whole - none) / count


def statistics(mask: Tensor, parts: Tensor, num_parts: int, grid_mask: Tensor, size: tuple[int, int]) -> MaskStatistics:
    """Statistics of masks [B, N] over parts [B, N]."""
    maps = mask.reshape(-1, *size)
    whole, none, mixed = part_shares(mask, parts, num_parts)
    return MaskStatistics(
        same_neighbours=equal_neighbours(maps),
        visible_piece=piece_size(~maps),
        masked_piece=piece_size(maps),
        next_to_visible=next_to_visible(maps),
        parts_masked=whole,
        parts_visible=none,
        parts_mixed=mixed,
        equal_to_grid=(mask == grid_mask).float().mean().item(),
    )


# --- The rows of the table --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: its name, the K of its parts, its numbers."""

    name: str
    num_parts: int
    numbers: MaskStatistics


class Gallery:
    """Masks of the same images under any strategy, with the same draws of the grid.

    Args:
        size: (H, W) of the patch grid.
        num_masked: m.
        images: B.
        seed: of the colours and of all draws.
    """

    def __init__(self, size: tuple[int, int], num_masked: int, images: int, seed: int) -> None:
        self.size, self.num_masked, self.seed = size, num_masked, seed
        self.sample_ids = torch.arange(images)
        self.attention = blob_attention(images, *size, seed)
        self.grid_mask = self.masks(mask="grid").mask

    def masks(self, **options: Any) -> MaskBatch:
        """Masks of all images; `shortcut` is off, so that every image has parts."""
        config = MaskConfig(shortcut=False, **options)
        masker = EvolvedMask(self.size, self.num_masked, 1, config, seed=self.seed)
        return masker(self.sample_ids, lambda rows: self.attention[rows], self.sample_ids)

    def row(self, name: str, mask: Tensor, parts: Tensor, num_parts: int) -> Row:
        return Row(name, num_parts, statistics(mask, parts, num_parts, self.grid_mask, self.size))

    def evolved(self, alpha: float, num_parts: int) -> Row:
        """Evolved masks at a fixed alpha."""
        made = self.masks(alpha=alpha, num_parts=num_parts)
        return self.row(f"alpha = {alpha:g}", made.mask, made.parts, num_parts)

    def other(self, strategy: str, num_parts: int) -> Row:
        """Masks of another strategy, counted over the parts of alpha = 1."""
        parts = self.masks(mask="part", num_parts=num_parts).parts
        return self.row(strategy, self.masks(mask=strategy, num_parts=num_parts).mask, parts, num_parts)


def parts_at(alpha: float, gamma: float, epochs: int, most: int) -> int:
    """K at the epoch of the paper's schedule that has this alpha, at most `most`."""
    return min(num_parts_at(epochs * alpha ** (1 / gamma), epochs), most)


def table(gallery: Gallery, gamma: float, epochs: int) -> list[Row]:
    """All rows, other strategies last."""
    patches = gallery.size[0] * gallery.size[1]
    rows = [gallery.evolved(alpha, parts_at(alpha, gamma, epochs, patches)) for alpha in ALPHAS]
    return rows + [gallery.other(strategy, rows[-1].num_parts) for strategy in OTHERS]


def connected_parts(gallery: Gallery, num_parts: int) -> float:
    """Connected pieces of a part, on average: 1 if every part is one blob."""
    return count_pieces(gallery.masks(mask="part", num_parts=num_parts).parts, gallery.size).a_part


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    names = [column.name for column in fields(MaskStatistics)]
    lines = ["| mask | K | " + " | ".join(TITLES[name] for name in names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [_cell(name, getattr(row.numbers, name)) for name in names]
        lines.append(f"| {row.name} | {row.num_parts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(name: str, value: float) -> str:
    return f"{value:.1f}" if name.endswith("_piece") else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the table and returns its numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_statistics", description=(__doc__ or "").split("\n")[0])
    add_schedule_arguments(parser)
    parser.add_argument("--grid", type=grid_size, default=(14, 14), metavar="HxW", help="patch grid (default 14x14)")
    parser.add_argument("--images", type=int, default=256, help="images (default %(default)s)")
    args = parser.parse_args(argv)
    gallery = Gallery(args.grid, count_masked(args.grid[0] * args.grid[1], args.mask_ratio), args.images, args.seed)
    rows = table(gallery, args.gamma, args.epochs)
    pieces = connected_parts(gallery, rows[-1].num_parts)
    print(
        f"Synthetic attention (not a trained model's): {args.images} images, grid {args.grid[0]}x{args.grid[1]}, "
        f"{gallery.num_masked} patches masked, seed {args.seed}.\n"
        f"K follows alpha on the schedule with gamma {args.gamma:g}; other masks are counted over the parts of "
        f"alpha = 1.\nA part there has {pieces:.2f} connected pieces on average.\n"
    )
    print(markdown(rows))
    by_name = {row.name: {"num_parts": row.num_parts, **asdict(row.numbers)} for row in rows}
    numbers = {"images": args.images, "seed": args.seed, "pieces_of_a_part": pieces, "rows": by_name}
    write_json(args.json, numbers)
    return numbers


if __name__ == "__main__":
    main()
