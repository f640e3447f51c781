"""Parts that are kept from visit to visit of an image, in the place of a fresh attention pass for every view.

Two ways to make them. `--parts_every R` (:class:`WholeImageParts`): the part map of every training image, cut on the whole
image, is kept and made anew every R epochs; a random crop takes its parts from it, cut out, scaled and mirrored as the
augmentation did with the pixels. `--attention_pass training` (:class:`StepParts`; BEiT and SimMIM): attention of the training
step itself makes the parts of the image's next visit, without any pass. Neither is the paper's method, whose parts are those of
every view at every step.

A row is N bytes an image. All ranks hold all rows: those that an update made are exchanged once it is done, and count from the
next one on. So neither the number of ranks nor a resume changes a mask; the rows are in the checkpoint.

B images of a rank and accumulation step   N = H*W patches   K parts   I images of the data set   R epochs that a row serves
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.evolved_mask import AttentionFn, EvolvedMask
from common.mask_config import MaskConfig
from common.training.config import TrainConfig
from common.training.distributed import Processes
from common.training.errors import BadInput
from common.training.geometry import GEOMETRY, LocatedBatch
from common.training.sources import Source

MOST_LABELS = 255
"""Parts of a row at the most, which is kept as bytes."""

_AREAS = 100  # over which the mean of a crop is taken
_PLACE_BYTES = 4
_GEOMETRY_BYTES = 4 * GEOMETRY


# --- How many parts a whole image has ----------------------------------------------------------------------------


def parts_in_a_crop(whole: float, crop_scale: tuple[float, float]) -> float:
    """Parts that a random crop of an image with `whole` parts holds, on average.

    Model: parts are cells of a square lattice, n = sqrt(K_whole) a side. An interval that is a share u of a side, uniform inside
    it, has n u of the lattice's lines in it on average, at most the n - 1 that there are, so that a crop of height u and width v
    meets

        min(1 + n u, n) min(1 + n v, n)

    cells. Its area a = u v is uniform in `crop_scale`, and u = v = sqrt(a) is taken: the aspect ratio changes the mean by less
    than 1 %. Parts that are not compact are met by more crops: docs/LOG.md has the counts.
    """
    (low, high), side = crop_scale, math.sqrt(whole)
    areas = [low + (high - low) * (step + 0.5) / _AREAS for step in range(_AREAS)]
    return sum(min(1 + side * math.sqrt(area), side) ** 2 for area in areas) / _AREAS


@cache
def whole_parts(num_parts: int, crop_scale: tuple[float, float], most: int = MOST_LABELS) -> int:
    """K of the whole image for which a random crop holds nearest to `num_parts` parts (:func:`parts_in_a_crop`).

    Args:
        num_parts: K that the schedule asks for in a crop, 1 or more.
        crop_scale: smallest and largest area of a crop, shares of the image.
        most: the result is not above it.
    """
    return min(range(1, most + 1), key=lambda whole: abs(parts_in_a_crop(whole, crop_scale) - num_parts))


# --- From one view of an image to another ------------------------------------------------------------------------


def carry_parts(
    rows: Tensor, geometry: Tensor, grid_size: tuple[int, int], made_in: Tensor | None = None, outside: int = -1
) -> Tensor:
    """Parts of views of images from the parts of other views: each patch takes the part in which its centre lies.

    Args:
        rows: int64 [B, N], parts of the views that were cut; -1 in all patches of an image without parts.
        geometry: float [B, 5] of the views that want parts (common/training/geometry.py).
        grid_size: (H, W) of both.
        made_in: float [B, 5], geometry of the views that were cut; None: the whole images.
        outside: part of patches whose centre the cut view did not show.

    Returns:
        int64 [B, N].
    """
    height, width = grid_size
    down = (torch.arange(height, device=rows.device) + 0.5) / height
    across = (torch.arange(width, device=rows.device) + 0.5) / width
    top, left, tall, wide, mirrored = geometry[:, :, None].unbind(1)  # each [B, 1]
    y, x = top + tall * down, left + wide * torch.where(mirrored > 0.5, 1 - across, across)  # [B, H], [B, W] in the image
    if made_in is not None:
        top, left, tall, wide, mirrored = made_in[:, :, None].unbind(1)
        y, x = (y - top) / tall, (x - left) / wide
        x = torch.where(mirrored > 0.5, 1 - x, x)
    row, column = (y * height).floor().long(), (x * width).floor().long()
    inside = ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]
    place = row.clamp(0, height - 1)[:, :, None] * width + column.clamp(0, width - 1)[:, None]  # [B, H, W]
    carried = rows.gather(1, place.flatten(1))
    return carried if made_in is None else torch.where(inside.flatten(1) | (carried < 0), carried, outside)


# --- The rows ----------------------------------------------------------------------------------------------------


def digest_names(source: Source) -> str:
    """SHA-256 of the number of images and their names below the folder that they have in common."""
    places = range(len(source))
    common = len(os.path.commonpath([min(map(source.name, places)), max(map(source.name, places))]))
    digest = hashlib.sha256(f"{len(source)}\n".encode())
    for place in places:
        digest.update(os.fsencode(f"{source.name(place)[common:]}\n"))
    return digest.hexdigest()


class PartStore:
    """Part maps of all images of a data set, the same on every rank.

    Args:
        images: I.
        patches: N.
        digest: of the images, see :func:`digest_names`; rows of other images are refused.
        with_geometry: each row has the geometry of the view that it was cut from.

    Attributes:
        rows: uint8 [I, N], on the CPU.
        made: int32 [I], epoch in which a row was made; -1: there is none.
        geometry: float32 [I, 5], or None.
    """

    def __init__(self, images: int, patches: int, digest: str, with_geometry: bool = False) -> None:
        self.rows = torch.zeros(images, patches, dtype=torch.uint8)
        self.made = torch.full((images,), -1, dtype=torch.int32)
        self.geometry = torch.zeros(images, GEOMETRY) if with_geometry else None
        self.digest = digest
        self._held: list[Tensor] = []  # a message for each accumulation step of the update

    def hold(self, places: Tensor, rows: Tensor, geometry: Tensor | None = None) -> None:
        """Keeps what an accumulation step made until :meth:`commit`. Called once in every step.

        Args:
            places: int64 [b], numbers of the images; those below 0 are not kept.
            rows: integers [b, N] in 0..255.
            geometry: float32 [b, 5], where the store has them.
        """
        words = [places.to(rows.device, torch.int32)[:, None].contiguous().view(torch.uint8), rows.to(torch.uint8)]
        if geometry is not None:
            words.insert(1, geometry.to(rows.device, torch.float32).contiguous().view(torch.uint8))
        self._held.append(torch.cat(words, dim=1))

    def commit(self, epoch: int, processes: Processes, steps: int, batch: int) -> None:
        """Exchanges what the ranks hold, and writes it.

        Of an image that was made more than once in the update, the first in the order of the update's samples counts.

        Args:
            epoch: in which the rows were made.
            steps: accumulation steps of an update.
            batch: images of a rank and step.
        """
        width = _PLACE_BYTES + self.rows.shape[1] + (0 if self.geometry is None else _GEOMETRY_BYTES)
        message = torch.full((steps, batch, width), 255, dtype=torch.uint8, device=processes.device)  # place -1
        for step, held in enumerate(self._held):
            message[step, : len(held)] = held
        self._held = []
        ranks = torch.stack(processes.gather_tensor(message))  # [ranks, steps, batch, bytes]
        self._write(epoch, ranks.transpose(0, 1).flatten(0, 2).cpu())

    def _write(self, epoch: int, records: Tensor) -> None:
        places = records[:, :_PLACE_BYTES].flatten().view(torch.int32).numpy()
        kept, first = np.unique(places, return_index=True)
        images, chosen = torch.from_numpy(kept[kept >= 0]).long(), records[torch.from_numpy(first[kept >= 0])]
        self.made[images] = epoch
        self.rows[images] = chosen[:, -self.rows.shape[1] :]
        if self.geometry is not None:
            words = chosen[:, _PLACE_BYTES : _PLACE_BYTES + _GEOMETRY_BYTES].flatten()
            self.geometry[images] = words.view(torch.float32).reshape(-1, GEOMETRY)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"rows": self.rows, "made": self.made, "geometry": self.geometry, "digest": self.digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the rows of a checkpoint.

        Raises:
            BadInput: they are of other images.
        """
        if len(state["made"]) != len(self.made) or state["digest"] != self.digest:
            raise BadInput(
                f"the checkpoint's kept parts are of other images ({len(state['made'])} with names {state['digest'][:12]}, "
                f"--data_path has {len(self.made)} with names {self.digest[:12]}); --resume none starts anew"
            )
        self.rows, self.made, self.geometry = state["rows"], state["made"], state["geometry"]


# --- Who makes them ----------------------------------------------------------------------------------------------


class KeptParts(ABC):
    """Parts of views from rows that were made at earlier visits.

    Attributes:
        reads_step: rows are made from the attention of the training step.
    """

    reads_step: bool

    def __init__(self, mask: EvolvedMask, store: PartStore) -> None:
        self.mask, self.store = mask, store
        self.grid_size = (mask.height, mask.width)

    @property
    @abstractmethod
    def num_draws(self) -> int:
        """Numbers that Eq. 6 draws for an image at the mask's epoch: one for every part that a row may have."""

    @abstractmethod
    def wanted(self, sample_ids: Sequence[int]) -> list[bool]:
        """Which samples of a batch need the whole image beside the view."""

    @abstractmethod
    def parts(self, batch: LocatedBatch, attention_fn: AttentionFn) -> tuple[Tensor, int]:
        """Parts of the views of a batch, int64 [B, N], -1 for images without; and for how many images a pass was made."""

    @abstractmethod
    def describe(self) -> str:
        """For the start of a run, in a line."""

    @property
    def _size(self) -> str:
        return f"{self.store.rows.numel() / 1e6:.3g} MB on every rank and in checkpoints"

    def rows_of(self, places: Tensor, usable: Tensor) -> Tensor:
        """Rows of the images at `places` [B], -1 where they are not usable: int64 [B, N], on the CPU."""
        rows = self.store.rows[places.clamp(min=0)].long()
        return torch.where(usable[:, None], rows, -1)


class WholeImageParts(KeptParts):
    """`--parts_every R`: part maps of whole images, that of image i made anew in epochs t with (t + i) mod R = 0.

    A row is made at the image's first visit that needs parts, and from then on at the first such visit in or after one of those
    epochs. So parts are never R epochs old, each epoch makes about a share 1/R of the rows, and none is made for an image whose
    mask the grid alone decides: masks.decided_by_grid, which is exact here too, and counts the same without `--shortcut`.

    Args:
        every: R.
        crop_scale: areas of the random crop, which decide K (:func:`whole_parts`).
    """

    reads_step = False

    def __init__(self, mask: EvolvedMask, store: PartStore, every: int, crop_scale: tuple[float, float]) -> None:
        super().__init__(mask, store)
        self.every, self.crop_scale = every, crop_scale

    def num_parts_in(self, epoch: int) -> int:
        """K of the whole images that are cut in an epoch."""
        most = min(MOST_LABELS, self.mask.num_patches)
        return whole_parts(self.mask.num_parts_in(epoch), self.crop_scale, most)

    @property
    def num_draws(self) -> int:
        epochs = range(max(self.mask.epoch - self.every + 1, 0), self.mask.epoch + 1)
        return max(self.num_parts_in(epoch) for epoch in epochs)

    def stale(self, places: Tensor) -> Tensor:
        """Whether the rows of these images are missing or due at the mask's epoch: bool [B]."""
        turn = self.mask.epoch - (self.mask.epoch + places) % self.every  # the last epoch of each in which its turn came
        made = self.store.made[places.clamp(min=0)]
        return (places < 0) | (made < 0) | (made < turn)

    def wanted(self, sample_ids: Sequence[int]) -> list[bool]:
        ids = torch.tensor(sample_ids)
        needed = ~self.mask.spared(ids, self.num_draws)
        return (needed & self.stale(ids % len(self.store.made))).tolist()

    def parts(self, batch: LocatedBatch, attention_fn: AttentionFn) -> tuple[Tensor, int]:
        places = torch.tensor(batch.places)
        stale = self.stale(places)
        rows = self.rows_of(places, ~stale).to(batch.images.device)
        served, first = self._to_make(batch, places, stale)
        fresh = self._cut(batch, places, first, attention_fn)
        made = torch.tensor([batch.whole_rows[index] for index in first], dtype=torch.int64)
        self.store.hold(places[made], fresh)
        for row, index in served:
            rows[row] = fresh[index]
        return carry_parts(rows, batch.geometry, self.grid_size), len(first)

    @staticmethod
    def _to_make(batch: LocatedBatch, places: Tensor, stale: Tensor) -> tuple[list[tuple[int, int]], list[int]]:
        """(row of the batch, which new row it takes) of each image whose row is made, and which of the whole images make them."""
        first: list[int] = []
        number: dict[int, int] = {}  # image -> its new row; crops of one image share it
        served = []
        for index, row in enumerate(batch.whole_rows):
            place = int(places[row])
            if not stale[row]:
                continue
            if place < 0 or place not in number:
                number[place] = len(first)
                first.append(index)
            served.append((row, number[place]))
        return served, first

    def _cut(self, batch: LocatedBatch, places: Tensor, chosen: list[int], attention_fn: AttentionFn) -> Tensor:
        """Parts of the chosen whole images: int64 [b, N]. Draws belong to the image, or of a stand-in to the sample."""
        if not chosen or batch.whole is None:
            return torch.zeros(0, self.mask.num_patches, dtype=torch.int64, device=batch.images.device)
        rows = torch.tensor([batch.whole_rows[index] for index in chosen], device=batch.images.device)
        own = places.to(rows.device)[rows]
        ids = torch.where(own < 0, batch.sample_ids[rows], own)
        whole = batch.whole if len(chosen) == len(batch.whole) else batch.whole[chosen]
        return self.mask.cut(whole, attention_fn, ids, self.num_parts_in(self.mask.epoch))

    def describe(self) -> str:
        first, last = self.num_parts_in(0), self.num_parts_in(self.mask.total_epochs - 1)
        turns = f"made anew every {self.every} epochs" if self.every > 1 else "made anew in every epoch"
        return f"parts of whole images are kept, {turns}; K {first} -> {last} of an image, for crops of it; {self._size}"


class StepParts(KeptParts):
    """`--attention_pass training`: parts of the view that was trained on, from the attention of that step, for the next visit.

    There is no pass. At its first visit an image has no parts, and the grid's term alone makes its mask. Later, patches whose
    centre the view before showed take its parts, and the others are one more part. Attention has seen mask tokens in the place
    of masked patches, with drop path on.
    """

    reads_step = True

    @property
    def num_draws(self) -> int:
        """The most parts of any epoch so far, and one for what the view before did not show."""
        return max(self.mask.num_parts_in(epoch) for epoch in range(self.mask.epoch + 1)) + 1

    def wanted(self, sample_ids: Sequence[int]) -> list[bool]:
        return [False] * len(sample_ids)

    def parts(self, batch: LocatedBatch, attention_fn: AttentionFn) -> tuple[Tensor, int]:
        assert self.store.geometry is not None
        places, device = torch.tensor(batch.places), batch.images.device
        known = (places >= 0) & (self.store.made[places.clamp(min=0)] >= 0)
        rows, seen = self.rows_of(places, known).to(device), self.store.geometry[places.clamp(min=0)].to(device)
        seen = torch.where(known[:, None].to(device), seen, batch.geometry)  # rows without parts: any place that is one
        return carry_parts(rows, batch.geometry, self.grid_size, seen, self.num_draws - 1), 0

    @torch.no_grad()
    def read(self, batch: LocatedBatch, maps: Sequence[Tensor]) -> None:
        """Makes the rows of a batch from the attention [B, h, 1+N, 1+N] of its training step, one map a block."""
        rows = self.mask.cut(batch.images, lambda _: maps, batch.sample_ids, self.mask.num_parts_in(self.mask.epoch))
        self.store.hold(torch.tensor(batch.places), rows, batch.geometry)

    def describe(self) -> str:
        return f"parts are those of the training step at an image's last visit, its first has the grid alone; {self._size}"


# --- From the flags ----------------------------------------------------------------------------------------------


def keep_parts(config: TrainConfig, mask: EvolvedMask, source: Source) -> KeptParts | None:
    """What the flags ask for; None: parts are made anew for every view."""
    if not config.keeps_parts:
        return None
    store = PartStore(len(source), mask.num_patches, digest_names(source), with_geometry=config.reads_step)
    if config.reads_step:
        return StepParts(mask, store)
    return WholeImageParts(mask, store, config.parts_every, config.crop_scale)


def check_kept_parts(config: TrainConfig, mask: MaskConfig) -> None:
    """Refuses what cannot be kept.

    Raises:
        BadInput: options that mean nothing together, naming them.
    """
    if not config.keeps_parts:
        return
    flag = "--attention_pass training" if config.reads_step else f"--parts_every {config.parts_every}"
    of_batch = "parts would depend on the batch that they were made in"
    _refuse(not mask.uses_parts, flag, f"--mask {mask.mask}", "it makes no parts")
    _refuse(mask.remove_position, flag, "--remove_position", of_batch)
    _refuse(mask.start_draw == "batch", flag, "--start_draw batch", of_batch)
    _refuse(mask.parts_jitter > 0, flag, f"--parts_jitter {mask.parts_jitter}", of_batch)
    if config.reads_step:
        _check_step_parts(config, mask, flag)


def _check_step_parts(config: TrainConfig, mask: MaskConfig, flag: str) -> None:
    last = mask.layers == "last" or (mask.layers != "all" and {-1, config.depth - 1} & set(mask.chosen_layers))
    _refuse(config.parts_every > 0, flag, f"--parts_every {config.parts_every}", "one or the other makes the parts")
    _refuse(mask.graph != "attention", flag, f"--graph {mask.graph}", "attention alone is read from a step")
    _refuse(mask.attention_values != "softmax", flag, f"--attention_values {mask.attention_values}", "use softmax")
    _refuse(mask.attention_from != "live", flag, f"--attention_from {mask.attention_from}", "the step is the live model's")
    _refuse(bool(last), flag, f"--layers {mask.layers}", "the last block of a step need not see every patch")
    _refuse(config.compile, flag, "--compile", "a compiled step shows no attention")
    _refuse(mask.most_parts >= MOST_LABELS, flag, f"K = {mask.most_parts}", f"{MOST_LABELS - 1} parts at the most")


def _refuse(wrong: bool, flag: str, other: str, reason: str) -> None:
    if wrong:
        raise BadInput(f"{flag} cannot be with {other}: {reason}")


def step_layers(mask: MaskConfig, depth: int) -> list[int]:
    """Blocks whose attention a training step gives: those of `--layers`, but for the last, which `all` leaves out."""
    chosen = mask.chosen_layers
    return list(range(depth - 1)) if isinstance(chosen, str) else chosen
