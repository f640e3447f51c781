"""Labelled folders and small models for the tests of fine-tuning and probing."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.training.distributed import Processes
from downstream.vit import MODELS, BackboneViT

ONE = Processes(0, 1, 0, torch.device("cpu"))
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
SMALL = "--model vit_tiny_patch4 --input_size 16 --num_workers 0 --device cpu --warmup_epochs 1 "


def write_set(folder: Path, train: int = 4, val: int = 3, classes: tuple[str, ...] = CLASSES) -> Path:
    """train/ and val/ of noisy images that each have the colours of their class."""
    for part, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            generator = np.random.default_rng(1000 * label + len(part))
            colours = np.random.default_rng(label).integers(60, 196, (3, 3, 3))
            for index in range(count):
                small = np.clip(colours + generator.integers(-50, 51, (3, 3, 3)), 0, 255).astype(np.uint8)
                image = Image.fromarray(small).resize((26 - label, 20 + index), Image.Resampling.BICUBIC)
                image.save(folder / part / name / f"{index}.png")
    return folder


def shrink_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_tiny_patch4 becomes 24 wide and 3 deep."""
    monkeypatch.setitem(MODELS, "vit_tiny_patch4", partial(BackboneViT, patch_size=4, width=24, depth=3, heads=2))


def result(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def saved(output: Path) -> dict[str, Any]:
    return torch.load(output / "checkpoint-last.pth", weights_only=True)


def shake(model: nn.Module, seed: int = 0, size: float = 0.2) -> Any:
    """Moves every parameter, so that nothing stays at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(size * torch.randn(value.shape, generator=generator))
    return model


def assert_refused(output: Path, before: set[Path] = frozenset()) -> None:  # type: ignore[assignment]
    """Nothing was written to the output folder."""
    assert set(output.rglob("*") if output.exists() else ()) == before
