"""Pictures: the parts and masks of a few images over the training (the paper's Figure 4).

n images   N patches   H, W patch grid   P, Q image height and width in pixels
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.evolved_mask import EvolvedMask

MASKED_GREY = 0.5
_GOLDEN_ANGLE = 0.618033988749895


class _Source(Protocol):
    def __len__(self) -> int: ...

    def load(self, index: int) -> Any: ...

    def name(self, index: int) -> str: ...


def part_colours(count: int) -> np.ndarray:
    """Well separated colours: float [count, 3] in 0..1."""
    hues = [(k * _GOLDEN_ANGLE) % 1.0 for k in range(count)]
    return np.array([colorsys.hsv_to_rgb(hue, 0.55 + 0.4 * (k % 2), 0.95 - 0.3 * (k % 3 == 2)) for k, hue in enumerate(hues)])


def enlarge(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, ...] -> [P, Q, ...], each patch a block of pixels."""
    rows, columns = size[0] // patches.shape[0], size[1] // patches.shape[1]
    return patches.repeat(rows, axis=0).repeat(columns, axis=1)


def draw_parts(image: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Part map over the grey image, a colour for each part and dark lines between parts.

    Args:
        image: float [P, Q, 3] in 0..1.
        parts: int [H, W]; -1 where there are no parts.

    Returns:
        float [P, Q, 3].
    """
    labels = enlarge(parts, image.shape[:2])
    colours = part_colours(int(parts.max()) + 1)[labels] if parts.max() >= 0 else np.full_like(image, MASKED_GREY)
    grey = image.mean(axis=2, keepdims=True)
    picture = 0.65 * colours + 0.35 * grey
    edge = np.zeros(labels.shape, dtype=bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    picture[edge] *= 0.35
    return picture


def draw_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with masked patches grey: float [P, Q, 3] from [P, Q, 3] and bool [H, W]."""
    return np.where(enlarge(mask, image.shape[:2])[..., None], MASKED_GREY, image)


class MaskPictures:
    """Takes the part maps and masks of the same images at several epochs, and composes them into one figure.

    Every snapshot is a file of its own, so that a resumed run keeps the earlier ones.

    Args:
        folder: where snapshots and pictures go.
        source: images; the first one, the last one and some between are taken.
        transform: image -> tensor [3, P, Q] as the model takes it, without randomness.
        to_colours: such tensors [n, 3, P, Q] -> colours in 0..1.
        mask: the run's mask; a copy that never skips the attention pass draws the same masks.
        count: n.
    """

    def __init__(
        self,
        folder: Path,
        source: _Source,
        transform: Callable[[Any], Tensor],
        to_colours: Callable[[Tensor], Tensor],
        mask: EvolvedMask,
        count: int,
    ) -> None:
        self.folder, self.source, self.transform, self.to_colours = folder, source, transform, to_colours
        self.mask = EvolvedMask(
            (mask.height, mask.width), mask.num_masked, mask.total_epochs, replace(mask.config, shortcut=False),
            seed=mask.seed, num_prefix_tokens=mask.num_prefix_tokens,
        )  # fmt: skip
        self.indices = sorted({round(i * (len(source) - 1) / max(count - 1, 1)) for i in range(count)})

    def take(self, epoch: int, device: torch.device, attention_fn: Callable[[Tensor], Iterable[Tensor]]) -> np.ndarray:
        """Snapshot of `epoch`; returns a contact sheet uint8 [rows, columns, 3], a row an image: image, parts, mask."""
        ids, loaded = self._readable()
        images = torch.stack(loaded).to(device)
        self.mask.set_epoch(epoch)
        sample = self.mask(images, attention_fn, torch.tensor(ids, device=device))
        grid = (len(ids), self.mask.height, self.mask.width)
        colours = self.to_colours(images).permute(0, 2, 3, 1).cpu().numpy()
        parts, masks = sample.parts.reshape(grid).cpu().numpy(), sample.mask.reshape(grid).cpu().numpy()
        self.folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            self.folder / f"epoch_{epoch:04d}.npz",
            images=(colours * 255).round().astype(np.uint8), parts=parts, masks=masks,
            epoch=epoch, alpha=sample.alpha, num_parts=sample.num_parts,
        )  # fmt: skip
        rows = [
            np.concatenate([image, draw_parts(image, part), draw_mask(image, mask)], axis=1)
            for image, part, mask in zip(colours, parts, masks, strict=True)
        ]
        return (np.concatenate(rows) * 255).round().astype(np.uint8)

    def forget(self) -> None:
        """Removes the snapshots of an earlier run in the same folder, which are not this run's evolution."""
        for path in self.folder.glob("epoch_*.npz"):
            path.unlink()

    def compose(self) -> Path | None:
        """Figure of all snapshots, `evolution.png`; None without snapshots or without matplotlib."""
        files = sorted(self.folder.glob("epoch_*.npz"))
        if not files:
            return None
        try:
            return compose_evolution(files, self.folder / "evolution.png")
        except ImportError:
            return None

    def _readable(self) -> tuple[list[int], list[Tensor]]:
        """The images that can be read; an unreadable one is left out."""
        ids: list[int] = []
        images: list[Tensor] = []
        for index in self.indices:
            try:
                images.append(self.transform(self.source.load(index)))
                ids.append(index)
            except (OSError, ValueError, SyntaxError):
                continue
        return ids, images


def compose_evolution(snapshots: list[Path], output: Path) -> Path:
    """One figure of several snapshots: a row an image; the image, then parts and mask of each epoch, side by side."""
    from matplotlib.figure import Figure

    shots = [dict(np.load(path)) for path in snapshots]
    images = shots[-1]["images"] / 255.0
    columns = 1 + 2 * len(shots)
    figure = Figure(figsize=(1.55 * columns, 1.6 * len(images) + 0.55), dpi=110, layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for row, image in enumerate(images):
        _show(axes[row, 0], image, "image" if row == 0 else "")
        for place, shot in enumerate(shots):
            if row >= len(shot["parts"]):
                continue
            heading = f"epoch {shot['epoch']}: alpha {shot['alpha']:.2f}, K {shot['num_parts']}"
            _show(axes[row, 1 + 2 * place], draw_parts(image, shot["parts"][row]), heading if row == 0 else "", left=True)
            _show(axes[row, 2 + 2 * place], draw_mask(image, shot["masks"][row]), "")
    figure.suptitle("parts and masks over the training", fontsize=9)
    figure.savefig(output)
    return output


def _show(axis: Any, picture: np.ndarray, title: str, left: bool = False) -> None:
    axis.imshow(picture.clip(0, 1), interpolation="nearest")
    axis.set_title(title, fontsize=7, loc="left" if left else "center")
    axis.axis("off")
