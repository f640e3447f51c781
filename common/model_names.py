"""What the name of a model says."""

from __future__ import annotations

import re


def patch_size_of(name: str) -> int:
    """Patch size in pixels that a model's name states (...patch16...), without building it."""
    found = re.search(r"patch(\d+)", name)
    if not found:
        raise ValueError(f"model name {name!r} states no patch size")
    return int(found[1])
