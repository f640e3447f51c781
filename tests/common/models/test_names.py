"""What is known of a model before it is built is what the built model has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import beit_evolved.model
import downstream.vit
import mae_evolved.model
import simmim_evolved.model
from common.models.names import depth_of, patch_size_of

TABLES: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    (mae_evolved.model.MODELS, {}),
    (simmim_evolved.model.MODELS, {}),
    (beit_evolved.model.MODELS, {"vocabulary": 16}),
    ({**downstream.vit.MODELS}, {"method": "mae"}),
)


@pytest.mark.parametrize(
    ("name", "maker", "needed"), [(name, maker, needed) for table, needed in TABLES for name, maker in table.items()]
)
def test_depth_and_patch_size_are_those_of_the_built_model(name: str, maker: Callable[..., Any], needed: dict[str, Any]) -> None:
    """Every named model, built without memory for its weights: its blocks, and the grid of its images."""
    patch = patch_size_of(name)
    with torch.device("meta"):
        model = maker(input_size=(2 * patch, 3 * patch), **needed)
    assert depth_of(maker) == len(getattr(model, "encoder", model).blocks)  # SimMIM keeps its encoder apart
    assert model.grid_size == (2, 3)
