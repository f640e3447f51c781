"""The official models, from clones of their repositories, as a benchmark runs them: unpatched.

B images   H, W patch grid   N = H*W patches
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.training.errors import BadInput
from patches import seam
from patches.apply import HERE, read_upstream

MARKS = {"mae": "models_mae.py", "beit": "modeling_pretrain.py", "simmim": "main_simmim.py"}
"""A file by which each method's folder of code is known."""

OfficialLoss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(images [B, 3, px, px], mask [B, N], labels of the masked patches or None) -> loss."""


def find_clones(paths: Sequence[str]) -> dict[str, Path]:
    """Folder of code of each method that a clone is given of.

    Raises:
        BadInput: a folder that is no clone of an official repository at the pinned commit, without changes.
    """
    found = {}
    for path in paths:
        for name, mark in MARKS.items():
            folder = read_upstream(name).folder
            for root in (Path(path), Path(path) / folder):
                if (root / mark).exists():
                    found[name] = root.resolve()
                    _check_pinned(name, root)
                    break
            else:
                continue
            break
        else:
            raise BadInput(f"--official {path}: no clone of {', '.join(read_upstream(name).url for name in MARKS)}")
    return found


def _check_pinned(name: str, folder: Path) -> None:
    pinned = read_upstream(name).commit
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    except (OSError, subprocess.CalledProcessError):
        raise BadInput(f"--official {folder}: git does not know it as a clone") from None
    if commit != pinned:
        raise BadInput(f"--official {folder}: at commit {commit[:12]}, not at the pinned {pinned[:12]}")
    if changed:
        raise BadInput(f"--official {folder}: changed files: {', '.join(line[2:].strip() for line in changed.splitlines())}")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def importing(folder: Path) -> Iterator[None]:
    """Modules of a clone can be imported inside; their names (`models`, `utils`, `config`) are free again after."""
    before, directory = dict(sys.modules), str(folder)
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        sys.path.remove(directory)
        for name in set(sys.modules) - set(before):
            if directory in str(getattr(sys.modules[name], "__file__", None)):
                del sys.modules[name]


def build_official(name: str, size: str, folder: Path) -> tuple[nn.Module, OfficialLoss]:
    """The official model of a method with the sizes of its own pre-training, and its loss.

    Args:
        name: mae, beit or simmim.
        size: "small" (the paper's ViT-S) or "base".
        folder: of the clone's code.
    """
    seam.prepare(name)
    with importing(folder):
        return {"mae": _mae, "beit": _beit, "simmim": _simmim}[name](size, folder)


def _mae(size: str, folder: Path) -> tuple[nn.Module, OfficialLoss]:
    models = importlib.import_module("models_mae")
    seam.add_small_model(models)
    model: nn.Module = vars(models)[f"mae_vit_{size}_patch16"](norm_pix_loss=True)

    def loss(images: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
        """MAE draws its masks itself, as many patches of each image as `mask` has."""
        made: Tensor = model(images, mask_ratio=float(mask[0].float().mean()))[0]
        return made

    return model, loss


def _beit(size: str, folder: Path) -> tuple[nn.Module, OfficialLoss]:
    seam.add_small_model(importlib.import_module("modeling_pretrain"))
    from timm.models import create_model

    options = {"use_shared_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1, "drop_path_rate": 0.1}
    model: nn.Module = create_model(f"beit_{size}_patch16_224_8k_vocab", **options)

    def loss(images: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        return functional.cross_entropy(model(images, mask).float(), labels)

    return model, loss


def _simmim(size: str, folder: Path) -> tuple[nn.Module, OfficialLoss]:
    get_config = importlib.import_module("config").get_config
    build_model: Any = importlib.import_module("models").build_model
    files = {
        "small": HERE / "configs/simmim_pretrain__vit_small__img224__200ep.yaml",
        "base": folder / "configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml",
    }
    model: nn.Module = build_model(get_config(SimpleNamespace(cfg=str(files[size]), opts=None, local_rank=0)))

    def loss(images: Tensor, mask: Tensor, labels: Tensor | None) -> Tensor:
        side = round(mask.shape[1] ** 0.5)
        made: Tensor = model(images, mask.reshape(-1, side, side).to(torch.int64))
        return made

    return model, loss
