"""What the tests of the method share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def random_attention() -> Callable[..., Tensor]:
    """Softmax attention maps from a seed: [batch, heads, tokens, tokens]."""

    def make(seed: int, batch: int, tokens: int, heads: int = 2, sharpness: float = 3.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, heads, tokens, tokens, generator=generator) * sharpness).softmax(dim=-1)

    return make
