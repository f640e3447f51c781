"""Full precision where labels are decided: in products of the patch graph and of its cut.

Training may use bf16 autocast, and TensorFloat-32 in products of float32 matrices. A part's label is an argmax, and both change
it for patches near a boundary, so neither holds in here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Autocast off, and products of float32 matrices in float32; what the caller had set holds again afterwards."""
    with torch.autocast(device_type=device.type, enabled=False), _no_reduced_products():
        yield


@contextmanager
def _no_reduced_products() -> Iterator[None]:
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    if not all(hasattr(backend, "fp32_precision") for backend in backends):  # torch before 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    with contextlib.ExitStack() as stack:
        for backend in backends:  # each by itself: the one setting for all cannot be read where a user has set them apart
            stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
            backend.fp32_precision = "ieee"
        yield
