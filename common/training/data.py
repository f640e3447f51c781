"""Training samples: what is drawn for an image depends on (seed, epoch, index) alone, and in what order they come.

A sample key is (epoch, index), index in 0..len-1 over the repeated data set. The loader's processes get keys,
so they need no state: crops are the same for any number of workers, ranks and accumulation steps, and after a
resume in the middle of an epoch.

B images of a rank and accumulation step
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common.draws import Stream, hash_seed
from common.training.config import DataConfig, ImageSetConfig, Loader, RunConfig
from common.training.distributed import Processes
from common.training.errors import BadInput, RankError
from common.training.interrupt import shield_worker
from common.training.sources import ImageSource, Source

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_REPLACEMENTS = 16  # how many images are tried in the place of an unreadable one

Key = tuple[int, int]
Transform = Callable[[Any], Any]


class RefusedSample(Exception):
    """A sample that can be read and does not go with the flags: no other one is to stand in its place."""


class Refusal(str):
    """Its message among the lines of :class:`Batch`, which travel from a loader's process to the rank's."""

    __slots__ = ()


@dataclass
class Batch:
    """Samples of one rank and accumulation step.

    Attributes:
        views: tensors with the batch first, what the transform returned; views[0] are the images [B, 3, H, W].
        sample_ids: int64 [B].
        names: file or record of each image.
        bad: one line for each image that could not be read.
    """

    views: tuple[Tensor, ...]
    sample_ids: Tensor
    names: list[str]
    bad: list[str]

    @property
    def images(self) -> Tensor:
        return self.views[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        views = tuple(view.to(device, non_blocking=True) for view in self.views)
        return Batch(views, self.sample_ids.to(device, non_blocking=True), self.names, self.bad)

    def pin_memory(self) -> Batch:
        """Called by the loader."""
        return Batch(tuple(view.pin_memory() for view in self.views), self.sample_ids.pin_memory(), self.names, self.bad)


class Samples(Dataset[Any]):
    """Random crops of the images of a source.

    Args:
        source: the images, or images with their labels; `load(i)` gives what the transform takes.
        transform: image -> tensor or tuple of tensors; its random numbers come from torch's CPU generator, which
            is seeded for each sample and put back; so are Python's and numpy's, unless it says `draws_from_torch = True`.
        repeat: crops of each image in an epoch.
        loader: pil, or torchvision: the source's `decode(i)` in the place of its `load(i)`. A resumed run sets that of
            its checkpoint.

    In the place of an unreadable image stands another one, and the batch says so: whether to go on is decided for
    all ranks together, by the training loop.
    """

    def __init__(self, source: Source, transform: Transform, seed: int, repeat: int = 1, loader: Loader = "pil") -> None:
        self.source, self.transform = source, transform
        self.seed, self.repeat, self.loader = seed, repeat, loader

    def __len__(self) -> int:
        return len(self.source) * self.repeat

    def __getitem__(self, key: Key) -> tuple[tuple[Tensor, ...] | None, int, str, list[str]]:
        epoch, index = key
        image, name, bad = self._readable(epoch, index)
        if image is None:
            return None, index, name, bad
        with self._draws(epoch, index):
            views = self.transform(image)
        return views if isinstance(views, tuple) else (views,), index, name, bad

    def _draws(self, epoch: int, index: int) -> AbstractContextManager[None]:
        """Random numbers of a sample inside."""
        torch_alone = bool(getattr(self.transform, "draws_from_torch", False))
        return seeded(hash_seed(self.seed, epoch, index, Stream.AUGMENT), torch_alone)

    def _readable(self, epoch: int, index: int) -> tuple[Any, str, list[str]]:
        """Image `index`, or another one drawn for this sample; and what could not be read."""
        bad: list[str] = []
        place, name = index % len(self.source), ""
        read = self.source.load if self.loader == "pil" else cast(ImageSource, self.source).decode
        for attempt in range(_REPLACEMENTS):
            name = self.source.name(place)
            try:
                return read(place), name, bad
            except RefusedSample as error:
                return None, name, [Refusal(error)]
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                bad.append(f"{name}: {error}")
            others = max(len(self.source) - 1, 1)
            place = (place + 1 + hash_seed(self.seed + attempt, epoch, index, Stream.REPLACE) % others) % len(self.source)
        return None, name, bad


def collate(samples: list[tuple[tuple[Tensor, ...] | None, int, str, list[str]]]) -> Batch:
    """Samples -> Batch; views are empty when an image was unreadable and so was all that was tried in its place."""
    read = [views for views, _, _, _ in samples if views is not None]
    whole = len(read) == len(samples)
    return Batch(
        views=tuple(stacked(view) for view in zip(*read, strict=True)) if whole else (),
        sample_ids=torch.tensor([index for _, index, _, _ in samples]),
        names=[name for _, _, name, _ in samples],
        bad=[line for _, _, _, lines in samples for line in lines],
    )


def stacked(views: Sequence[Tensor]) -> Tensor:
    """Views of a batch, [B, ...]. Bytes whose colours are last in memory keep them there: a copy in order is much faster."""
    if views[0].dtype == torch.uint8 and all(view.ndim == 3 and view.stride(0) == 1 for view in views):
        return torch.stack([view.permute(1, 2, 0) for view in views]).permute(0, 3, 1, 2)
    return torch.stack(list(views))


def check_usable(batch: Batch) -> None:
    """Raises RankError for a batch that has a refused sample, or one in whose place nothing readable was found."""
    refused = [line for line in batch.bad if isinstance(line, Refusal)]
    if refused:
        raise RankError(refused[0])
    if not batch.views:
        unreadable = list(dict.fromkeys(batch.bad))
        raise RankError(f"no readable image found, {len(unreadable)} were tried: {some_of(unreadable, '; ', 3)}")


def some_of(words: Sequence[str], separator: str = ", ", count: int = 8) -> str:
    """The first of many words, and how many more there are."""
    rest = len(words) - count
    return separator.join(words[:count]) + (f"{separator}and {rest} more" if rest > 0 else "")


@contextmanager
def seeded(seed: int, torch_alone: bool = False) -> Iterator[None]:
    """The global generators of torch (CPU), Python and numpy seeded inside, as they were outside.

    torchvision's transforms draw from the first, timm's RandAugment from the other two.

    Args:
        torch_alone: leaves the other two as they are; to save numpy's state takes a twentieth of the time of an image.
    """
    generator = torch.default_generator
    before = generator.get_state()
    others = None if torch_alone else (random.getstate(), np.random.get_state())
    generator.manual_seed(seed)
    if others is not None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        generator.set_state(before)
        if others is not None:
            random.setstate(others[0])
            np.random.set_state(others[1])


class RankBatches(Sampler[list[Key]]):
    """Keys of one rank, a list for each accumulation step; the order of an epoch is one shuffle shared by all.

    Update s of an epoch takes the samples s*G..(s+1)*G-1 of the shuffle (G = effective batch), accumulation step
    a of rank r the r-th part of their a-th part. One process with the batch of two sees the same images in each
    update as the two. Samples that do not fill an update are left out of the epoch.

    Raises:
        BadInput: an epoch would have no update at all.
    """

    def __init__(self, length: int, config: RunConfig, processes: Processes) -> None:
        self.length, self.seed = length, config.seed
        self.batch_size, self.accum_iter = config.batch_size, config.accum_iter
        self.rank, self.world = processes.rank, processes.world
        self.effective_batch = self.batch_size * self.accum_iter * self.world
        self.updates = length // self.effective_batch
        if self.updates == 0:
            preset = ", or let --preset small choose" if config.preset == "none" else ""
            raise BadInput(
                f"--batch_size {self.batch_size} x --accum_iter {self.accum_iter} x {self.world} ranks = {self.effective_batch} "
                f"images an update, but an epoch has {length}: nothing would ever be updated "
                f"(lower them, or raise --repeat {config.repeat}{preset})"
            )
        self.epoch, self.first_update = 0, 0

    def start_at(self, epoch: int, update: int = 0) -> None:
        """The next pass begins at this update of this epoch."""
        self.epoch, self.first_update = epoch, update

    def __len__(self) -> int:
        return (self.updates - self.first_update) * self.accum_iter

    def __iter__(self) -> Iterator[list[Key]]:
        generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch, 0, Stream.ORDER))
        order = torch.randperm(self.length, generator=generator).tolist()
        for step in range(self.first_update * self.accum_iter, self.updates * self.accum_iter):
            first = (step * self.world + self.rank) * self.batch_size
            yield [(self.epoch, index) for index in order[first : first + self.batch_size]]


def make_loader(
    samples: Samples,
    batches: Iterable[list[Key]],
    config: DataConfig,
    processes: Processes,
    collate_fn: Callable[[list[Any]], Batch] = collate,
) -> DataLoader[Any]:
    """Loader of this rank's batches."""
    workers = count_workers(config.num_workers)
    return DataLoader(
        samples,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=config.pin_mem and processes.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=shield_worker,
    )


def choose_loader(asked: Loader, source: ImageSource) -> Loader:
    """What --loader is in a new run: auto is torchvision for files, and pil for images in memory, where nothing is decoded."""
    if asked != "auto":
        return asked
    return "pil" if source.in_memory else "torchvision"


def count_workers(asked: int) -> int:
    """--num_workers, or this rank's share of the usable cores, at most 10."""
    if asked >= 0:
        return asked
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(10, int(os.environ["SLURM_CPUS_PER_TASK"]))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(10, len(os.sched_getaffinity(0)) // ranks)


def training_transform(config: ImageSetConfig) -> Transform:
    """Random resized crop, flip, ImageNet normalisation, by torchvision's transforms: the official augmentation of MAE.

    Pre-training has the same on bytes, normalised on the device: common/training/augment.py.
    """
    interpolation = InterpolationMode(config.interpolation)
    crop = transforms.RandomResizedCrop(config.image_size, scale=config.crop_scale, interpolation=interpolation)
    flip = [transforms.RandomHorizontalFlip()] if config.flip else []
    return transforms.Compose([crop, *flip, *_to_tensor()])


def picture_transform(config: DataConfig) -> Transform:
    """The middle of an image, for pictures."""
    height, width = config.image_size
    middle = [
        transforms.Resize(max(height, width), interpolation=InterpolationMode.BICUBIC),
        transforms.CenterCrop((height, width)),
    ]
    return transforms.Compose([*middle, *_to_tensor()])


def _to_tensor() -> list[Any]:
    return [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]


def denormalise(images: Tensor) -> Tensor:
    """Normalised images [..., 3, H, W] -> values in 0..1."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images * std + mean).clamp(0, 1)
