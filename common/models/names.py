"""What is known of a model before it is built: from its name, and from its row in a table of models."""

from __future__ import annotations

import re
from typing import Any


def patch_size_of(name: str) -> int:
    """Patch size in pixels that a model's name states (...patch16...), without building it."""
    match = re.search(r"patch(\d+)", name)
    if not match:
        raise ValueError(f"model name {name!r} states no patch size")
    return int(match[1])


def depth_of(maker: Any) -> int:
    """Blocks of the encoder that an entry of a table MODELS makes: a `functools.partial` that says its `depth`."""
    return int(maker.keywords["depth"])


def patch_grid(input_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(H, W) of the patch grid of images of (height, width) pixels.

    Raises:
        ValueError: an input size that the patch size does not divide.
    """
    height, width = input_size
    if min(input_size) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"input_size {height}x{width} is not divisible by the patch size {patch_size}")
    return height // patch_size, width // patch_size
