"""How many images need no attention pass over a run, because the 2x2 grid alone decides their mask.

    python -m benchmarks.skipped_passes
    python -m benchmarks.skipped_passes --epochs 800 --gamma 1 --mask_ratio 0.5

The decision is EvolvedMask's own, on its own draws; only the attention, which it does not look at, is absent. The
same run makes the masks of a few images twice, with the shortcut and without, and stops if one differs.

I images   H, W patch grid   N = H*W patches   K parts   T epochs   V images whose masks are compared
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.draws import SampleDraws, Stream
from common.evolved_mask import AttentionFn, EvolvedMask, MaskConfig, count_masked

TENTHS = 10


def grid_size(text: str) -> tuple[int, int]:
    """'14x14' -> (14, 14), for argparse."""
    height, times, width = text.partition("x")
    if not times or not height.isdigit() or not width.isdigit() or int(height) * int(width) == 0:
        raise argparse.ArgumentTypeError(f"a grid is written HEIGHTxWIDTH in patches, such as 14x14, not {text!r}")
    return int(height), int(width)


def skipped_images(masker: EvolvedMask, sample_ids: Tensor) -> Tensor:
    """Images that the grid alone decides at the masker's epoch: bool [I].

    The draws are those of `EvolvedMask.__call__`, without the ones that the decision does not read.
    """
    draws = SampleDraws(masker.seed, masker.epoch, sample_ids)
    part_draw = draws.uniform(Stream.PARTS, masker.num_parts)
    return masker.decided_by_grid(draws.uniform(Stream.GRID, 4), part_draw)


def skipped_by_epoch(masker: EvolvedMask, images: int) -> list[float]:
    """Share of `images` images without an attention pass, for every epoch of the run."""
    shares = []
    for epoch in range(masker.total_epochs):
        masker.set_epoch(epoch)
        shares.append(skipped_images(masker, torch.arange(images)).float().mean().item())
    return shares


def tenths(masker: EvolvedMask, shares: Sequence[float]) -> list[dict[str, Any]]:
    """Shares averaged over each tenth of the run, with the epochs and alphas it covers. Short runs have fewer rows."""
    rows = []
    for part in range(TENTHS):
        first, past = (len(shares) * edge // TENTHS for edge in (part, part + 1))
        if first == past:
            continue
        alphas = []
        for epoch in (first, past - 1):
            masker.set_epoch(epoch)
            alphas.append(masker.alpha)
        rows.append({"epochs": [first, past - 1], "alpha": alphas, "skipped": sum(shares[first:past]) / (past - first)})
    return rows


def compare_masks(masker: EvolvedMask, images: int, epochs: int = TENTHS) -> dict[str, int]:
    """Makes masks from random attention with the shortcut and without, at `epochs` epochs spread over the run.

    Raises:
        AssertionError: a mask differs, or an image was skipped that `skipped_images` would not skip.
    """
    config = replace(masker.config, shortcut=False)
    plain = EvolvedMask((masker.height, masker.width), masker.num_masked, masker.total_epochs, config, seed=masker.seed)
    sample_ids = torch.arange(images)
    attention_fn = _random_attention(images, masker.num_patches, masker.seed)
    skipped = 0
    chosen = sorted({masker.total_epochs * step // epochs for step in range(epochs)})
    for epoch in chosen:
        masker.set_epoch(epoch)
        plain.set_epoch(epoch)
        quick, slow = masker(sample_ids, attention_fn, sample_ids), plain(sample_ids, attention_fn, sample_ids)
        if not torch.equal(quick.mask, slow.mask):
            raise AssertionError(f"epoch {epoch}: the shortcut changed a mask")
        if slow.skipped.any() or not torch.equal(quick.skipped, skipped_images(masker, sample_ids)):
            raise AssertionError(f"epoch {epoch}: other images were skipped than were counted")
        skipped += int(quick.skipped.sum())
    return {"masks": images * len(chosen), "skipped": skipped, "epochs": len(chosen)}


def _random_attention(images: int, patches: int, seed: int) -> AttentionFn:
    """Attention of the images with the given indices: [b, 1, 1+N, 1+N], always the same for an index."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(images, 1, 1 + patches, 1 + patches, generator=generator).softmax(dim=3)
    return lambda indices: maps[indices]


def measure(masker: EvolvedMask, images: int, compared: int) -> dict[str, Any]:
    """All numbers of this benchmark."""
    shares = skipped_by_epoch(masker, images)
    return {
        "skipped": sum(shares) / len(shares),
        "tenths": tenths(masker, shares),
        "by_epoch": shares,
        "comparison": compare_masks(masker, compared),
    }


def report(numbers: dict[str, Any]) -> str:
    """The numbers as text."""
    lines = ["| epochs | alpha | images without an attention pass |", "|---|---|---|"]
    for row in numbers["tenths"]:
        (first, last), (low, high) = row["epochs"], row["alpha"]
        lines.append(f"| {first}-{last} | {low:.3f}-{high:.3f} | {row['skipped']:.1%} |")
    lines.append(f"| all | | **{numbers['skipped']:.1%}** |")
    done = numbers["comparison"]
    lines.append(
        f"\nShortcut on and off: {done['masks']} masks over {done['epochs']} epochs are equal to the bit; "
        f"{done['skipped']} of them ran no attention pass."
    )
    return "\n".join(lines)


def add_schedule_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the schedule, the same in all benchmarks."""
    parser.add_argument("--epochs", type=int, default=200, help="T, epochs of the run (default %(default)s)")
    parser.add_argument("--gamma", type=float, default=2.0, help="exponent of alpha = (t/T)^gamma (default %(default)s)")
    parser.add_argument("--mask_ratio", type=float, default=0.75, help="share of masked patches (default %(default)s, MAE's)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers to FILE")


def write_json(path: Path | None, numbers: dict[str, Any]) -> None:
    """Writes the numbers where --json says, if it says anything."""
    if path is not None:
        path.write_text(json.dumps(numbers, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the benchmark, prints it and returns its numbers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.skipped_passes", description=(__doc__ or "").split("\n")[0])
    add_schedule_arguments(parser)
    parser.add_argument("--grid", type=grid_size, default=(14, 14), metavar="HxW", help="patch grid (default 14x14)")
    parser.add_argument("--images", type=int, default=2000, help="images of every epoch (default %(default)s)")
    parser.add_argument("--compared", type=int, default=8, help="V, images whose masks are made both ways (default %(default)s)")
    args = parser.parse_args(argv)
    masked = count_masked(args.grid[0] * args.grid[1], args.mask_ratio)
    masker = EvolvedMask(args.grid, masked, args.epochs, MaskConfig(gamma=args.gamma), seed=args.seed)
    numbers = measure(masker, args.images, args.compared)
    print(
        f"{args.images} images an epoch, {args.epochs} epochs, gamma {args.gamma:g}, grid {args.grid[0]}x{args.grid[1]}, "
        f"{masked} patches masked, seed {args.seed}\n"
    )
    print(report(numbers))
    write_json(args.json, numbers)
    return numbers


if __name__ == "__main__":
    main()
