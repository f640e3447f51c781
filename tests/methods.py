"""The three trainers with tiny models, for tests that all of them must pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import beit_evolved.model
import mae_evolved.model
import simmim_evolved.model
from beit_evolved import run_beit_pretraining
from beit_evolved.tokenizer import OWN_FILE, DiscreteVAE
from common.training.config import RunConfig
from common.training.optim import Schedule
from mae_evolved import main_pretrain
from simmim_evolved import main_simmim

MAINS: dict[str, Callable[[Sequence[str]], None]] = {
    "mae": main_pretrain.main,
    "beit": run_beit_pretraining.main,
    "simmim": main_simmim.main,
}
MODELS = {"mae": "mae_vit_tiny_patch4", "beit": "beit_tiny_patch4_8k_vocab", "simmim": "simmim_vit_tiny_patch4"}
COMMON = "--input_size 16 --batch_size 4 --epochs 4 --warmup_epochs 1 --num_workers 0 --parts_start 8 --parts_end 3 "
COMMON += "--picture_epochs 0 --device cpu --lr 1e-3"


def lr_at(epoch: float, config: RunConfig, peak: float) -> float:
    """Learning rate of an update that begins at that many epochs, of 1000 updates each."""
    done = round(epoch * 1000)
    return Schedule(config, 1000, peak).lr_at(done // 1000, done % 1000)


def shallow_models() -> Iterator[tuple[dict[str, Any], str, Any]]:
    """(MODELS, name, model) with 3 blocks instead of 12 for each tiny model, which is all that these tests need."""
    for module in (mae_evolved.model, beit_evolved.model, simmim_evolved.model):
        for name in MODELS.values():
            if name in module.MODELS:
                yield module.MODELS, name, partial(module.MODELS[name], depth=3)


def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    """A random tokenizer of 16 codes of 2x2 pixels, in a folder of its own."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": DiscreteVAE(16, 8, 1, 8).state_dict()}, folder / OWN_FILE)
    return folder


def flags(method: str, images: Path, work: Path) -> str:
    """Flags of a tiny run of `method`; BEiT's tokenizer is made in `work`."""
    needed = f"--tokenizer {write_tokenizer(work / 'tokenizer')}" if method == "beit" else ""
    return f"--model {MODELS[method]} {COMMON} --data_path {images} {needed}"
