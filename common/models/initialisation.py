"""Start values of weights, as the official code of each method draws them.

Numbers come from torch's global generator, which the commands seed: the same seed gives the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor, nn

from common.models.timm_layers import PatchEmbed, trunc_normal_

INIT_STD = 0.02


def reset_as_mae(model: nn.Module, patch_embed: PatchEmbed, tokens: Iterable[nn.Parameter]) -> None:
    """Xavier-uniform linear layers with zero biases (the patch embedding's weight counts as one), N(0, 0.02) tokens."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(patch_embed.proj.weight.data.flatten(1))
    for token in tokens:
        nn.init.normal_(token, std=INIT_STD)


def reset_as_beit(encoder: nn.Module, blocks: Iterable[nn.Module], tokens: Iterable[nn.Parameter]) -> None:
    """Normal weights cut at one standard deviation; branches of block i scaled by 1/sqrt(2i) (BEiT, Sec. 2.5)."""
    for module in encoder.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for token in tokens:
        init_normal(token)
    for number, block in enumerate(blocks, start=1):
        for name in ("attn.proj.weight", "mlp.fc2.weight"):
            block.get_parameter(name).data.div_(math.sqrt(2 * number))


def init_normal(weight: Tensor) -> None:
    """Normal with standard deviation 0.02, cut at one standard deviation as in the official code of both methods."""
    trunc_normal_(weight, std=INIT_STD, a=-INIT_STD, b=INIT_STD)
