"""Random draws that belong to a sample, not to a worker, a rank or a step.

Every draw made for an image is a pure function of (seed, epoch, sample id, stream, position). The number of
workers, ranks or accumulation steps, and a resume in the middle of an epoch, can therefore change no draw.
The function is the 64-bit finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) applied once per key
word; it is exact integer arithmetic, so CPU and GPU agree to the bit.

B batch (images)   C draws an image
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


class Stream(IntEnum):
    """What a draw is for. Streams of one image are independent of each other; numbers must never be reused."""

    GRID = 1  # one value for each class of the 2x2 grid
    PARTS = 2  # one value for each part
    START = 3  # start of the EM
    TIES = 4  # order among equal probabilities
    BLOCK = 5  # rectangles of block-wise masking
    PATCHES = 6  # one value for each patch (random masking)
    NUM_PARTS = 7  # jitter of the number of parts (`--recipe authors`)
    RATIO = 8  # how many patches are masked (`--mask_ratio_range`)
    AUGMENT = 16  # crop, flip, colour
    ORDER = 17  # order of the samples in an epoch
    REPLACE = 18  # which sample stands in for an unreadable one
    MODEL = 19  # torch's own generator in a training step (dropout, drop-path)
    OFFICIAL = 20  # all global generators in an epoch of a patched official script
    OFFICIAL_MASK = 21  # the mask's generator in such an epoch
    DECODED = 22  # which masked patches are predicted (`--decode_share`)
    SCENE = 32  # one composed scene: background, cut-outs, places
    SHAPE = 33  # one drawn cut-out or background, where there are no photographs


def uniform_numbers(
    shape: tuple[int, ...],
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """The uniform numbers that an equation takes: those handed in, or else drawn.

    Args:
        shape: of the numbers.
        generator: draws float32 numbers in [0, 1) on its own device, where no `uniforms` are given.
        uniforms: the numbers themselves, in [0, 1).
        device: where they go; default: where they are.

    Raises:
        ValueError: neither is given, or `uniforms` have another shape.
    """
    if uniforms is None:
        if generator is None:
            raise ValueError("give a generator to draw from, or the uniform numbers themselves")
        uniforms = torch.rand(shape, generator=generator, device=generator.device)
    if uniforms.shape != shape:
        raise ValueError(f"uniforms must be {list(shape)}, got {list(uniforms.shape)}")
    return uniforms if device is None else uniforms.to(device)


class Draws(ABC):
    """Where a batch gets its uniform numbers from."""

    @abstractmethod
    def uniform(self, stream: Stream, count: int) -> Tensor:
        """`count` numbers in [0, 1) for every image: float32 [B, C]."""

    @abstractmethod
    def shared(self, stream: Stream, count: int) -> Tensor:
        """The same numbers for every image of the batch: float32 [B, C], all rows equal."""

    def draw(self, stream: Stream, count: int, each: Literal["image", "batch"]) -> Tensor:
        """Numbers of their own for every image, or the same ones for the batch: float32 [B, C]."""
        return self.uniform(stream, count) if each == "image" else self.shared(stream, count)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the int64 of the same bits."""
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word


def _mix_int(word: int) -> int:
    word = (word + _GOLDEN) & _MASK64
    word = ((word ^ (word >> 30)) * _MIX_1) & _MASK64
    word = ((word ^ (word >> 27)) * _MIX_2) & _MASK64
    return word ^ (word >> 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int64 words; torch's own shift copies the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    words = words + _signed(_GOLDEN)
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def hash_seed(seed: int, epoch: int, sample_id: int, stream: Stream) -> int:
    """A 63-bit seed for one sample's own generator, from the same hash as :func:`hash_uniform`."""
    word = 0
    for part in (seed, epoch, int(stream), sample_id):
        word = _mix_int(word ^ (part & _MASK64))
    return word >> 1


def hash_uniform(seed: int, epoch: int, sample_ids: Tensor, stream: Stream, count: int) -> Tensor:
    """Uniform numbers that depend on (seed, epoch, sample id, stream) alone.

    Args:
        sample_ids: int64 [B], the index of each image in the data set.
        count: numbers an image.

    Returns:
        float32 [B, C] in [0, 1), multiples of 2^-24, on the device of `sample_ids`.
    """
    word = 0
    for part in (seed, epoch, int(stream)):
        word = _mix_int(word ^ (part & _MASK64))
    keys = _mix(sample_ids.to(torch.int64) ^ _signed(word))  # [B]
    positions = torch.arange(1, count + 1, device=sample_ids.device, dtype=torch.int64)
    words = _mix(keys[:, None] + positions * _signed(_GOLDEN))  # [B, C]
    return _shift_right(words, 40).to(torch.float32) * 2.0**-24


class SampleDraws(Draws):
    """Draws of a batch from the hash: the same image gives the same numbers in any batch.

    :meth:`shared` takes the key of the first image of the batch, so that a batch draws alike on every resume.
    """

    def __init__(self, seed: int, epoch: int, sample_ids: Tensor) -> None:
        self.seed, self.epoch, self.sample_ids = seed, epoch, sample_ids

    def uniform(self, stream: Stream, count: int) -> Tensor:
        return hash_uniform(self.seed, self.epoch, self.sample_ids, stream, count)

    def shared(self, stream: Stream, count: int) -> Tensor:
        first = hash_uniform(self.seed, self.epoch, self.sample_ids[:1], stream, count)
        return first.expand(len(self.sample_ids), count)


class GeneratorDraws(Draws):
    """Draws of a batch from one explicit generator, for callers that do not know the index of an image."""

    def __init__(self, batch: int, generator: torch.Generator, device: torch.device) -> None:
        self.batch, self.generator, self.device = batch, generator, device

    def uniform(self, stream: Stream, count: int) -> Tensor:
        return self._rand(self.batch, count)

    def shared(self, stream: Stream, count: int) -> Tensor:
        return self._rand(1, count).expand(self.batch, count)

    def _rand(self, rows: int, count: int) -> Tensor:
        return uniform_numbers((rows, count), self.generator, device=self.device)


def batch_draws(
    inputs: Tensor, seed: int, epoch: int, sample_ids: Tensor | Sequence[int] | None, generator: torch.Generator
) -> Draws:
    """The draws of a batch, on the device of `inputs` [B, ...]: of its samples, or without ids of the generator.

    Args:
        sample_ids: [B] whole numbers: a tensor, an array of numpy, or a list.

    Raises:
        ValueError: `sample_ids` are not [B], or no whole numbers.
    """
    if sample_ids is None:
        return GeneratorDraws(len(inputs), generator, inputs.device)
    sample_ids = _whole_numbers(sample_ids)
    if sample_ids.shape != (len(inputs),):
        raise ValueError(f"sample_ids must be [{len(inputs)}], one for each input, got {list(sample_ids.shape)}")
    return SampleDraws(seed, epoch, sample_ids.to(inputs.device))


def _whole_numbers(sample_ids: Any) -> Tensor:
    try:
        ids = torch.as_tensor(sample_ids)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is None or (ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)):
        kind = type(sample_ids).__name__ if ids is None else f"{type(sample_ids).__name__} of {ids.dtype}"
        raise ValueError(f"sample_ids must be whole numbers, one for each input (a tensor, an array or a list), got a {kind}")
    return ids
