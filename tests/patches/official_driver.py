"""Runs an official script, patched or not, in a process of its own, and records what it did.

    python official_driver.py UPSTREAM RECORD SCRIPT [flags of the script]

The current folder is the clone's folder of code. The shims are applied first, which is all that an unpatched script
needs to run, and a model of a few thousand weights is added under the name tiny. RECORD (a .pt file) gets the loss
of every backward pass, the masks that were made, and the names of the generators' states at the end.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import sys
from typing import Any

import torch
from torch import nn

from common import evolved_mask
from patches import seam

TINY = {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4}


def add_tiny(upstream: str) -> None:
    """A small model that the script finds by name."""
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    if upstream == "mae":
        models = importlib.import_module("models_mae")
        decoder = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
        models.tiny = functools.partial(models.MaskedAutoencoderViT, **TINY, **decoder, norm_layer=norm)
    if upstream == "beit":
        models = importlib.import_module("modeling_pretrain")

        def tiny(pretrained: bool = False, **options: Any) -> nn.Module:
            return models.VisionTransformerForMaskedImageModeling(
                **TINY, qkv_bias=True, norm_layer=norm, vocab_size=8192, **options
            )

        importlib.import_module("timm.models.registry").register_model(tiny)


def record(log: dict[str, Any]) -> None:
    """Watches the losses and the masks."""
    backward, make = torch.Tensor.backward, evolved_mask.EvolvedMask.__call__

    def watched_backward(self: torch.Tensor, *args: Any, **options: Any) -> Any:
        log["losses"].append(self.item())
        return backward(self, *args, **options)

    def watched_make(self: Any, *args: Any, **options: Any) -> Any:
        made = make(self, *args, **options)
        log["masks"].append(made.mask.clone())
        log["parts"].append(made.parts.clone())
        log["epochs"].append(self.epoch)
        return made

    torch.Tensor.backward = watched_backward
    evolved_mask.EvolvedMask.__call__ = watched_make


def main() -> None:
    """See the module."""
    upstream, file, script, *flags = sys.argv[1:]
    torch.set_num_threads(1)
    sys.path.insert(0, os.getcwd())
    sys.argv = [script, *flags]
    seam.prepare(upstream)
    add_tiny(upstream)
    log: dict[str, Any] = {"losses": [], "masks": [], "parts": [], "epochs": []}
    record(log)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        log["next_random"] = torch.rand(4)  # equal only if both runs drew as much
        torch.save(log, file)


if __name__ == "__main__":
    main()
