"""Where a random crop lies in its image, and the whole image beside it, for parts that are kept from visit to visit.

`--parts_every` and `--attention_pass training` (common/training/kept_parts.py) carry parts from one view of an image to
another, and so need the parameters that the augmentation drew. Everything that a loader adds for them is here: transforms that
say what they drew, samples and batches that hold it, and keys that ask for whole images. Without those flags nothing here runs.

B images of a rank and accumulation step   w whole images among them   H, W size of a view in pixels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import functional

from common.training.augment import Box, RandomCrop, colours, normalise, whole
from common.training.config import ImageSetConfig, Loader, RunConfig, TrainConfig
from common.training.data import Batch, RankBatches, Samples, Transform, collate, stacked
from common.training.distributed import Processes
from common.training.sources import Source

GEOMETRY = 5
"""Numbers of a view's geometry: top, left, height and width as shares of the image, and 1 where the view is mirrored."""

MarkedKey = tuple[int, int, bool]
"""(epoch, index, whether the whole image is wanted too)."""


@dataclass(frozen=True)
class Located:
    """Views of an image, and where they lie in it.

    Attributes:
        views: what a transform of common/training/data.py gives.
        geometry: float32 [5], top, left, height, width as shares of the image as it is stored, and 1 where the view is mirrored.
        place: number of the image in its source; -1 for one that stands in for an unreadable one.
        whole: uint8 [3, H, W], the whole image at the size of the view; None where it is not wanted.
    """

    views: tuple[Tensor, ...]
    geometry: Tensor
    place: int = -1
    whole: Tensor | None = None


def geometry_of(box: Box, image: Any, flipped: bool, flipped_first: bool = False) -> Tensor:
    """A crop's box in pixels as shares of the image: float32 [5].

    Args:
        box: top, left, height, width.
        flipped_first: the image was mirrored before the crop: `box` lies in the mirrored image.
    """
    _, rows, columns = functional.get_dimensions(image)
    top, left, height, width = box
    if flipped and flipped_first:
        left = columns - left - width
    return torch.tensor([top / rows, left / columns, height / rows, width / columns, float(flipped)])


class LocatedCrop(RandomCrop):
    """A random crop with its geometry."""

    def __call__(self, image: Any) -> Located:  # type: ignore[override]
        """The view [3, H, W] and its place; random numbers come from torch's generator."""
        view, box, mirrored = self.located(image)
        return Located((view,), geometry_of(box, image, mirrored))


def crop_transform(config: TrainConfig) -> Transform:
    """Random resized crop and flip; with the place of the crop where parts are kept."""
    return LocatedCrop(config) if config.keeps_parts else RandomCrop(config)


class WholeImage:
    """The whole image at the size of a view, its sides scaled each by itself; nothing is random."""

    def __init__(self, config: ImageSetConfig) -> None:
        self.size, self.interpolation = config.image_size, config.interpolation

    def __call__(self, image: Any) -> Tensor:
        """uint8 [3, H, W]."""
        return whole(image, self.size, self.interpolation)


class LocatedSamples(Samples):
    """Samples whose transform gives :class:`Located` views, with the whole image where the key asks for it.

    The image is decoded once for both. A sample whose image cannot be read always has the whole image that stands in for it:
    nothing is kept of that one.

    Args:
        whole: image -> [3, H, W] without randomness; None: whole images are never wanted.
    """

    def __init__(
        self, source: Source, transform: Transform, seed: int, repeat: int, whole: WholeImage | None, loader: Loader = "pil"
    ) -> None:
        super().__init__(source, transform, seed, repeat, loader)
        self.whole = whole

    def __getitem__(self, key: Any) -> tuple[Any, int, str, list[str]]:
        epoch, index, wanted = key
        image, name, bad = self._readable(epoch, index)
        if image is None:
            return None, index, name, bad
        with self._draws(epoch, index):
            located: Located = self.transform(image)
        whole = self.whole(image) if self.whole is not None and (wanted or bad) else None
        place = -1 if bad else index % len(self.source)
        return replace(located, place=place, whole=whole), index, name, bad


@dataclass
class LocatedBatch(Batch):
    """A batch whose views have a place in their images.

    Attributes:
        geometry: float32 [B, 5], see :class:`Located`.
        whole: [w, 3, H, W], the whole images that were asked for; None without any.
        whole_rows: row in the batch of each of them. This and `places` stay on the CPU.
        places: number of each image in its source, -1 for a stand-in.
    """

    geometry: Tensor
    whole: Tensor | None
    whole_rows: list[int]
    places: list[int]

    def to(self, device: torch.device) -> LocatedBatch:
        moved = super().to(device)
        whole = None if self.whole is None else self.whole.to(device, non_blocking=True)
        geometry = self.geometry.to(device, non_blocking=True)
        return LocatedBatch(**vars(moved), geometry=geometry, whole=whole, whole_rows=self.whole_rows, places=self.places)

    def pin_memory(self) -> LocatedBatch:
        pinned = super().pin_memory()
        whole = None if self.whole is None else self.whole.pin_memory()
        geometry = self.geometry.pin_memory()
        return LocatedBatch(**vars(pinned), geometry=geometry, whole=whole, whole_rows=self.whole_rows, places=self.places)


def collate_located(samples: list[tuple[Any, int, str, list[str]]]) -> LocatedBatch:
    """Samples of :class:`LocatedSamples` -> batch; without views where an image was unreadable and so was all in its place."""
    plain = collate([(located and located.views, *rest) for located, *rest in samples])
    read: list[Located] = [located for located, *_ in samples if located is not None]
    wholes = [(row, located.whole) for row, located in enumerate(read) if located.whole is not None]
    return LocatedBatch(
        **vars(plain),
        geometry=torch.stack([located.geometry for located in read]) if read else torch.zeros(0, GEOMETRY),
        whole=stacked([whole for _, whole in wholes]) if wholes else None,
        whole_rows=[row for row, _ in wholes],
        places=[located.place for located in read],
    )


class MarkedBatches(RankBatches):
    """Batches of a rank, each key saying whether the whole image is wanted too.

    Args:
        wanted: indices of a batch -> which of them; asked when the loader fetches the batch, in the process that trains.
    """

    def __init__(self, length: int, config: RunConfig, processes: Processes, wanted: Callable[[list[int]], list[bool]]) -> None:
        super().__init__(length, config, processes)
        self.wanted = wanted

    def __iter__(self) -> Iterator[list[MarkedKey]]:  # type: ignore[override]
        for keys in super().__iter__():
            marks = self.wanted([index for _, index in keys])
            yield [(*key, mark) for key, mark in zip(keys, marks, strict=True)]


def as_inputs(batch: Batch) -> Batch:
    """A batch of bytes as the models take it: the first view and whole images normalised, the others as colours in 0..1."""
    first, *others = batch.views
    views = (normalise(first), *map(colours, others))
    if isinstance(batch, LocatedBatch) and batch.whole is not None:
        return replace(batch, views=views, whole=normalise(batch.whole))
    return replace(batch, views=views)
