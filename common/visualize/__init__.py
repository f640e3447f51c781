"""Pictures: the parts and masks of a few images over the training (the paper's Figure 4).

n images   N patches   H, W patch grid   P, Q image height and width in pixels
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.evolved_mask import EvolvedMask
from common.mask_config import MaskConfig
from common.visualize.captions import Group, Key, Sheet
from common.visualize.colours import distinct_colours

MASKED_GREY = 0.5
EVOLUTION = "evolution.png"
_DPI = 200
_CELL = 200
"""Pixels of the longer side of an image in a figure, about: it is enlarged by a whole number."""


class _Source(Protocol):
    def __len__(self) -> int: ...

    def load(self, index: int) -> Any: ...

    def name(self, index: int) -> str: ...


def enlarge(patches: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, ...] -> [P, Q, ...], each patch a block of pixels."""
    rows, columns = size[0] // patches.shape[0], size[1] // patches.shape[1]
    return patches.repeat(rows, axis=0).repeat(columns, axis=1)


def borders(labels: np.ndarray) -> np.ndarray:
    """Pixels that have another label than the one above or to the left: bool, the shape of `labels` [P, Q]."""
    differs = np.zeros(labels.shape, dtype=bool)
    differs[1:] |= labels[1:] != labels[:-1]
    differs[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    return differs


def draw_parts(image: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Part map over the grey image, a colour for each part and dark lines between parts.

    Args:
        image: float [P, Q, 3] in 0..1.
        parts: int [H, W]; -1 where there are no parts.

    Returns:
        float [P, Q, 3].
    """
    labels = enlarge(parts, image.shape[:2])
    colours = distinct_colours(int(parts.max()) + 1)[labels] if parts.max() >= 0 else np.full_like(image, MASKED_GREY)
    grey = image.mean(axis=2, keepdims=True)
    picture = 0.65 * colours + 0.35 * grey
    picture[borders(labels)] *= 0.35
    return picture


def draw_mask(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The image with masked patches grey: float [P, Q, 3] from [P, Q, 3] and bool [H, W]."""
    return np.where(enlarge(mask, image.shape[:2])[..., None], MASKED_GREY, image)


def outline_mask(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A dark line between masked and visible patches, so that a grey photograph can be told from a mask: float [P, Q, 3]."""
    outlined = picture.copy()
    outlined[borders(enlarge(mask, picture.shape[:2]))] = 0
    return outlined


def describe_schedule(config: MaskConfig, alpha: float, num_parts: int, decimals: int = 2) -> str:
    """Of alpha and K those that shape this mask: "alpha 0.25, K 25", "K 10", "alpha 0.25", or nothing for a static mask."""
    words = []
    if config.mask in ("evolved", "grid-to-block", "semantic"):
        words.append(f"alpha {alpha:.{decimals}f}")
    if config.uses_parts:
        words.append(f"K {num_parts}")
    return ", ".join(words)


@dataclass(frozen=True)
class Snapshot:
    """Masks of a few images at one epoch, as in a file `epoch_0000.npz`.

    Attributes:
        epoch: epochs trained before it.
        alpha: weight of the parts.
        num_parts: K.
        images: uint8 [n, P, Q, 3].
        parts: int64 [n, H, W]; -1 for masks without parts.
        masks: bool [n, H, W], True = masked.
    """

    epoch: int
    alpha: float
    num_parts: int
    images: np.ndarray
    parts: np.ndarray
    masks: np.ndarray

    @classmethod
    def read(cls, path: Path) -> Snapshot | None:
        """The snapshot in a file; None where the file is not whole."""
        try:
            with np.load(path) as file:
                numbers = int(file["epoch"]), float(file["alpha"]), int(file["num_parts"])
                return cls(*numbers, file["images"], file["parts"], file["masks"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer, images=self.images, parts=self.parts, masks=self.masks,
            epoch=self.epoch, alpha=self.alpha, num_parts=self.num_parts,
        )  # fmt: skip
        _write_bytes(path, buffer.getvalue())

    def row_of(self, image: np.ndarray) -> int | None:
        """Row of an image uint8 [P, Q, 3]; None if it is not among these (a resumed run may show others)."""
        return next((row for row, own in enumerate(self.images) if np.array_equal(own, image)), None)


class MaskPictures:
    """Takes the part maps and masks of the same images at several epochs, and composes them into one figure.

    Every snapshot is a file of its own, so that a resumed run keeps the earlier ones. The figure, `evolution.png`, is
    composed anew with each of them: an interrupted run has the figure of the epochs so far.

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

    def take(self, epoch: int, device: torch.device, attention_fn: Callable[[Tensor], Iterable[Tensor]]) -> np.ndarray | None:
        """Writes the snapshot of `epoch` and the figure of all so far.

        Returns:
            The figure of this epoch alone, uint8 [height, width, 3]; None if no image can be read.
        """
        ids, loaded = self._readable()
        if not ids:
            return None
        images = torch.stack(loaded).to(device)
        self.mask.set_epoch(epoch)
        sample = self.mask(images, attention_fn, torch.tensor(ids, device=device))
        grid = (len(ids), self.mask.height, self.mask.width)
        colours = self.to_colours(images).permute(0, 2, 3, 1).cpu().numpy()
        snapshot = Snapshot(
            epoch, sample.alpha, sample.num_parts, (colours * 255).round().astype(np.uint8),
            sample.parts.reshape(grid).cpu().numpy(), sample.mask.reshape(grid).cpu().numpy(),
        )  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        snapshot.write(self.folder / f"epoch_{epoch:04d}.npz")
        self.compose()
        return self._figure([snapshot])

    def keep_until(self, epoch: int) -> None:
        """Removes what is not this run's evolution: snapshots after `epoch`, where the run starts; all of them below 0."""
        for path in self.folder.glob("epoch_*.npz"):
            if int(path.stem.removeprefix("epoch_")) > epoch:
                path.unlink()
        if self.compose() is None:
            (self.folder / EVOLUTION).unlink(missing_ok=True)

    def compose(self) -> Path | None:
        """Writes the figure of all snapshots, `evolution.png`; None without snapshots."""
        read = [Snapshot.read(path) for path in sorted(self.folder.glob("epoch_*.npz"))]
        snapshots = sorted((shot for shot in read if shot is not None), key=lambda shot: shot.epoch)
        if not snapshots:
            return None
        buffer = io.BytesIO()
        Image.fromarray(self._figure(snapshots)).save(buffer, format="PNG", dpi=(_DPI, _DPI))
        _write_bytes(self.folder / EVOLUTION, buffer.getvalue())
        return self.folder / EVOLUTION

    def _figure(self, snapshots: Sequence[Snapshot]) -> np.ndarray:
        """A row an image; the image, then parts (of masks that have them) and mask of each epoch: uint8 [height, width, 3]."""
        config = self.mask.config
        columns = ("parts", "mask") if config.uses_parts else ("mask",)
        groups = [Group(("image",))]
        for shot in snapshots:
            schedule = describe_schedule(config, shot.alpha, shot.num_parts)
            epoch = f"epoch {shot.epoch} of {self.mask.total_epochs}"
            groups.append(Group(columns, f"{epoch}: {schedule}" if schedule else epoch))
        sheet = Sheet(groups, self._heading(), self._legend())
        for image in snapshots[-1].images:
            cells: list[np.ndarray | None] = [_as_bytes(_enlarged(image))]
            for shot in snapshots:
                row = shot.row_of(image)
                cells += [None] * len(columns) if row is None else self._cells(image, shot, row)
            sheet.rows.append(cells)
        return sheet.draw()

    def _cells(self, image: np.ndarray, shot: Snapshot, row: int) -> list[np.ndarray]:
        large, mask = _enlarged(image), shot.masks[row]
        masked = _as_bytes(outline_mask(draw_mask(large, mask), mask))
        return [_as_bytes(draw_parts(large, shot.parts[row])), masked] if self.mask.config.uses_parts else [masked]

    def _heading(self) -> str:
        return f"{self.mask.config.mask} mask: {self.mask.describe_count()} of {self.mask.num_patches} patches masked"

    def _legend(self) -> list[Key]:
        keys = [Key([np.full(3, MASKED_GREY)], "masked: the model does not see it")]
        if self.mask.config.uses_parts:
            keys.insert(0, Key(list(distinct_colours(4)), "parts: a colour each, unrelated between pictures"))
        return keys

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


def _enlarged(image: np.ndarray) -> np.ndarray:
    """uint8 [P, Q, 3] -> float in 0..1, P and Q times the whole number that brings the longer one nearest to `_CELL`."""
    factor = max(1, round(_CELL / max(image.shape[:2])))
    return image.repeat(factor, axis=0).repeat(factor, axis=1) / 255.0


def _as_bytes(picture: np.ndarray) -> np.ndarray:
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _write_bytes(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise
