"""Image files -> pixels, by torchvision.io where it gives what PIL gives.

Which files those are is read from the header, by PIL: JPEGs in colour or grey, and PNGs of 8 bits in colour or grey without
transparency. Everything else, and whatever torchvision.io cannot decode, is left to PIL: its pixels, and its words about files
that are broken. Neither applies the orientation that EXIF may give.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

_BIT_DEPTH = 24
"""Place of a PNG's bits a channel: in its first chunk, which has a fixed place and length."""


def decode_file(path: str) -> Tensor | None:
    """Pixels of an image file: uint8 [3, H, W], colours last in memory. None: left to PIL, or broken."""
    try:
        data = np.fromfile(path, np.uint8)
        return decode_bytes(data)
    except (OSError, RuntimeError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def decode_bytes(data: np.ndarray) -> Tensor | None:
    """The same of a file's content, uint8 [b].

    Raises:
        OSError, RuntimeError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: not an image, broken, or too large.
    """
    kind = kind_of(data)
    if kind == "JPEG":
        return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
    if kind == "PNG":
        return decode_png(torch.from_numpy(data), mode=ImageReadMode.RGB)
    return None


def kind_of(data: np.ndarray) -> str:
    """JPEG or PNG for what torchvision.io decodes as PIL does; empty for the rest.

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: see :func:`decode_bytes`.
    """
    with Image.open(io.BytesIO(data.data)) as header:
        kind, mode, info = header.format, header.mode, header.info
        plain = mode in ("RGB", "L") and "transparency" not in info and not getattr(header, "is_animated", False)
    if kind == "PNG" and data[_BIT_DEPTH] != 8:
        return ""
    return kind if plain and kind in ("JPEG", "PNG") else ""
