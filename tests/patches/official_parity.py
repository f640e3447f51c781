"""Our model with the weights of the official one: how far apart loss, gradients and signals are, for the same mask.

    python official_parity.py UPSTREAM CONFIGS

The current folder is the clone's folder of code, CONFIGS this project's patches/configs. Prints a JSON object:
{size: {"loss": relative difference, "gradient": largest difference as a share of the tensor's largest gradient, ...,
"signals": {signal: largest difference as a share of the block's largest value}}}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.evolved_mask import select_masked
from patches import seam

LossOf = Callable[[Tensor], Tensor]
BATCH, PATCHES, VOCABULARY = 2, 196, 8192


@dataclass
class Pair:
    """The official model and ours with the same weights, and their losses for a mask."""

    theirs: nn.Module
    ours: nn.Module
    official_loss: LossOf
    our_loss: LossOf
    num_masked: int

    def __post_init__(self) -> None:
        """Every weight is moved off its start, so that zeros and ones hide nothing; then copied, strictly."""
        torch.manual_seed(2)
        with torch.no_grad():
            for value in self.theirs.parameters():
                if value.requires_grad:
                    value.add_(torch.randn_like(value), alpha=0.02)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.theirs.eval()
        self.ours.eval()


def images() -> Tensor:
    return torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def mae(size: str) -> Pair:
    models = importlib.import_module("models_mae")
    from mae_evolved.model import MODELS

    seam.add_small_model(models)
    name = f"mae_vit_{size}_patch16"
    theirs, ours = vars(models)[name](norm_pix_loss=True), MODELS[name]()

    def official_loss(mask: Tensor) -> Tensor:
        theirs.random_masking = lambda tokens, ratio: seam.gather_visible(tokens, mask)
        return theirs(images())[0]

    return Pair(theirs, ours, official_loss, lambda mask: ours(images(), mask, mask)[0], 147)


def beit(size: str) -> Pair:
    seam.add_small_model(importlib.import_module("modeling_pretrain"))
    from timm.models import create_model

    from beit_evolved.model import MODELS

    name = f"beit_{size}_patch16_224_8k_vocab"
    theirs = create_model(name, use_shared_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1)
    ours = MODELS[name]()
    labels = torch.randint(VOCABULARY, (BATCH * 75,), generator=torch.Generator().manual_seed(3))

    def loss_of(model: nn.Module) -> LossOf:
        return lambda mask: functional.cross_entropy(model(images(), mask), labels)

    return Pair(theirs, ours, loss_of(theirs), loss_of(ours), 75)


def simmim(size: str) -> Pair:
    from config import get_config
    from models import build_model

    from simmim_evolved.model import MODELS

    files = {
        "small": Path(sys.argv[2]) / "simmim_pretrain__vit_small__img224__200ep.yaml",
        "base": Path("configs/vit_base__800ep/simmim_pretrain__vit_base__img224__800ep.yaml"),
    }
    options = type("Options", (), {"cfg": str(files[size]), "opts": None, "local_rank": 0})
    theirs, ours = build_model(get_config(options)), MODELS[f"simmim_vit_{size}_patch16"]()
    return Pair(
        theirs,
        ours,
        lambda mask: theirs(images(), mask.reshape(BATCH, 14, 14).long()),
        lambda mask: ours(images(), mask, mask)[0],
        117,
    )


def compare(pair: Pair) -> dict[str, Any]:
    """Differences of loss and of all gradients for one mask; and, as a control, with another mask for our model."""
    generator = torch.Generator().manual_seed(4)
    mask, other = (select_masked(torch.rand(BATCH, PATCHES, generator=generator), pair.num_masked, generator) for _ in range(2))
    expected, loss, control = pair.official_loss(mask), pair.our_loss(mask), pair.our_loss(other)
    theirs = gradients(pair.theirs, expected)
    return {
        "loss": abs(float(loss) - float(expected)) / abs(float(expected)),
        "gradient": furthest(theirs, gradients(pair.ours, loss)),
        "gradient_control": furthest(theirs, gradients(pair.ours, control)),
        "tensors": len(theirs),
        "signals": signal_differences(pair),
    }


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, values = zip(*[(name, value) for name, value in model.named_parameters() if value.requires_grad], strict=True)
    gradients = torch.autograd.grad(loss, values, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def furthest(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> float:
    """Largest difference, as a share of the largest gradient of the same tensor."""
    assert theirs.keys() == ours.keys()
    return max(
        float((gradient - ours[name]).abs().max() / gradient.abs().max().clamp(min=1e-12)) for name, gradient in theirs.items()
    )


def whole_pass(model: Any) -> None:
    """The official encoder's own forward pass over whole images."""
    nothing = torch.zeros(BATCH, PATCHES, dtype=torch.bool)
    if hasattr(model, "forward_encoder"):
        model.random_masking = lambda tokens, ratio: seam.gather_visible(tokens, nothing)
        model.forward_encoder(images(), 0.0)
    elif hasattr(model, "forward_features"):
        model.forward_features(images(), nothing)
    else:
        model.encoder(images(), nothing.reshape(BATCH, 14, 14).long())


@torch.no_grad()
def signal_differences(pair: Pair) -> dict[str, float]:
    """What the official pass computes in every block beside what is read: by the seam from it, and from our model."""
    blocks = list(seam.encoder_of(pair.theirs).blocks)
    outputs: list[Tensor] = []
    projected: dict[int, Tensor] = {}
    plain = functional.linear

    def watched(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        made = plain(input, weight, bias)
        projected.update({index: made for index, block in enumerate(blocks) if weight is block.attn.qkv.weight})
        return made

    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    functional.linear = watched
    try:
        whole_pass(pair.theirs)
    finally:
        functional.linear = plain
        for handle in handles:
            handle.remove()
    heads = blocks[0].attn.num_heads
    thirds = [projected[index].reshape(BATCH, PATCHES + 1, 3, heads, -1).permute(2, 0, 3, 1, 4) for index in range(len(blocks))]
    expected = {"tokens": outputs} | {
        name: [third[place] for third in thirds] for place, name in enumerate(("queries", "keys", "values"))
    }
    gaps = {}
    for name, wanted in expected.items():
        for who, read in (("seam", seam.encoder_signal(seam.encoder_of(pair.theirs), images(), name)),
                          ("ours", pair.ours.signal(images(), name))):  # fmt: skip
            pairs = zip(read, wanted, strict=True)
            gaps[f"{name} {who}"] = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    return gaps


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.path.insert(0, os.getcwd())
    upstream = sys.argv[1]
    seam.prepare(upstream)
    build = {"mae": mae, "beit": beit, "simmim": simmim}[upstream]
    print(json.dumps({size: compare(build(size)) for size in ("small", "base")}))


if __name__ == "__main__":
    main()
