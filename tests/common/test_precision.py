"""Products inside the graph and its cut are in float32, and nothing of a user's settings is lost."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from common.heads import cosine_similarity
from common.parts import fit_parts
from common.precision import full_precision

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(params=["highest", "high", "medium"])
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a user allows for the products of the training."""
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


def test_products_of_the_cut_are_in_float32(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from inside: in the cut, and in the similarity, under autocast too; the setting of before holds again afterwards."""
    seen: list[tuple[Any, ...]] = []
    original = Tensor.__matmul__

    def recorded(first: Tensor, second: Tensor) -> Tensor:
        seen.append((*(backend.fp32_precision for backend in BACKENDS), torch.is_autocast_enabled("cpu")))
        return original(first, second)

    monkeypatch.setattr(Tensor, "__matmul__", recorded)
    graph = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fit_parts(graph, 3)
        assert cosine_similarity(graph).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert len(seen) > 5
    assert set(seen) == {("ieee", "ieee", False)}
    assert torch.get_float32_matmul_precision() == allowed


def test_an_error_inside_puts_everything_back(allowed: str) -> None:
    before = [backend.fp32_precision for backend in BACKENDS]
    with pytest.raises(ZeroDivisionError), full_precision(torch.device("cpu")):
        raise ZeroDivisionError
    assert [backend.fp32_precision for backend in BACKENDS] == before
    assert torch.get_float32_matmul_precision() == allowed


def test_backends_that_were_set_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of the newer settings, whose state the older one cannot be read from."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with full_precision(torch.device("cpu")):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_older_versions_of_torch(allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 2.9 there was one setting for all."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    with full_precision(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == allowed
