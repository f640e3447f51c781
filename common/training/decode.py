"""JPEG files -> pixels, by torchvision.io where it gives what PIL gives.

Which files those are is read from the header, by PIL: JPEGs in colour or grey. Everything else, and whatever torchvision.io
cannot decode, is left to PIL: its pixels, and its words about files that are broken. Neither applies the orientation that EXIF
may give.

PNGs are PIL's too: torchvision 0.29.1 dies of a segmentation fault on broken ones, where a run has to count and name them.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg


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
    if not is_plain_jpeg(data):
        return None
    return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)


def is_plain_jpeg(data: np.ndarray) -> bool:
    """Whether PIL finds a JPEG in colour or grey in these bytes.

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: see :func:`decode_bytes`.
    """
    with Image.open(io.BytesIO(data.data)) as header:
        return header.format == "JPEG" and header.mode in ("RGB", "L")
