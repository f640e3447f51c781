"""The pre-trained encoders as backbones: one ViT for MAE, BEiT and SimMIM, on any grid, whole or in windows.

Names and shapes of the state dict are those of the official fine-tuning code of each method (facebookresearch/mae
`models_vit.py`, microsoft/unilm `beit/modeling_finetune.py`, microsoft/SimMIM `models/vision_transformer.py`),
without norm and head, which belong to the task. MAE has absolute positions; BEiT and SimMIM have a table of relative
position biases in every block, and layer scale. Windows: common/models/windows.py.

B batch   H, W patch grid   N = H*W patches   P prefix tokens (1 class token, or 0)   D width   h heads
w window side in patches
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.models.block import Attention, Block
from common.models.initialisation import reset_as_beit, reset_as_mae
from common.models.names import patch_grid
from common.models.positions import sincos_positions
from common.models.timm_layers import PatchEmbed
from common.models.windows import Windows

Method = Literal["mae", "beit", "simmim"]
METHODS: tuple[Method, ...] = get_args(Method)

LAYER_SCALE: dict[Method, float] = {"mae": 0.0, "beit": 0.1, "simmim": 0.1}
"""First value of gamma_1 and gamma_2 in the official fine-tuning code; 0: the method has none."""


class BackboneViT(nn.Module):
    """ViT of one of the three methods, without norm and head. Weights: `downstream.weights.load_encoder`.

    Args:
        method: "mae", "beit" or "simmim".
        input_size: (height, width) of the images in pixels, multiples of `patch_size`.
        patch_size: pixels.
        width, depth, heads: D, number of blocks, h.
        drop_path: rate at the last block; it grows linearly from 0 at the first. Acts in training mode.
        layer_scale: first value of the learned factors on the branches; None: that of the method, 0: no factors.
        class_token: a token before those of the patches (P = 1). Needs whole-grid attention in every block.
        window: w in patches, for all blocks that are not in `global_blocks`; 0: no windows.
        global_blocks: blocks (0-based) that attend over the whole grid.
        checkpointing: computes each block again in the backward pass instead of keeping what is inside it.
        name: what messages call the model.

    Raises:
        ValueError: sizes that do not fit, or options that do not go together.
    """

    no_weight_decay: tuple[str, ...] = ("cls_token", "pos_embed")
    """Parameters without weight decay besides biases and norms (common/training/optim.py)."""

    def __init__(
        self,
        method: Method,
        input_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        class_token: bool = True,
        window: int = 0,
        global_blocks: tuple[int, ...] = (),
        checkpointing: bool = False,
        name: str = "",
    ) -> None:
        super().__init__()
        scale = _checked(method, depth, layer_scale, class_token, window, global_blocks)
        self.name, self.method, self.checkpointing = name, method, checkpointing
        self.input_size, self.grid_size = input_size, patch_grid(input_size, patch_size)
        self.patch_size, self.width, self.depth, self.heads = patch_size, width, depth, heads
        self.num_prefix_tokens = int(class_token)

        self.patch_embed = PatchEmbed(input_size, patch_size, 3, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        tokens = self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]
        # Learned from the start values on, as in the official fine-tuning; fixed only in MAE's pre-training.
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, width)) if method == "mae" else None
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        sides = [0 if i in global_blocks else window for i in range(depth)]
        self.blocks = nn.ModuleList(Block(self._attention(side), scale, rate) for side, rate in zip(sides, rates, strict=True))
        self.reset_parameters()

    def _attention(self, window: int) -> Attention:
        """Fused attention over the whole grid or, for a window of 1 or more, in windows: maps are not read downstream."""
        biased = self.method != "mae"
        covered = (window, window) if window else self.grid_size
        return Attention(
            self.width,
            self.heads,
            key_bias=not biased,
            table_grid=covered if biased else None,
            prefix_tokens=self.num_prefix_tokens,
            windows=Windows(self.grid_size, window) if window else None,
            fused=True,
        )

    def reset_parameters(self) -> None:
        """Start values of the method's pre-training; positions are MAE's sine-cosine ones."""
        tokens = [] if self.cls_token is None else [self.cls_token]
        if self.pos_embed is None:
            reset_as_beit(self, self.blocks, tokens)
            return
        reset_as_mae(self, self.patch_embed, tokens)
        self.pos_embed.data.copy_(sincos_positions(self.grid_size, self.width)[:, 1 - self.num_prefix_tokens :])

    def embed(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> input of the first block [B, P+N, D]."""
        tokens = self.patch_embed(images)
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1)
        return tokens if self.pos_embed is None else tokens + self.pos_embed

    def forward(self, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Tokens after each of the blocks `layers`, in that order, before any final norm; no later block is run.

        Args:
            images: [B, 3, height, width] of the size given at construction.
            layers: 0-based, negative ones count from the end.

        Returns:
            [B, P+N, D] each; patches in raster order after the prefix tokens.

        Raises:
            ValueError: no layers, or one that does not exist.
        """
        wrong = [i for i in layers if not -self.depth <= i < self.depth]
        if wrong or not layers:
            raise ValueError(f"layers {list(layers)}: the encoder has blocks 0 to {self.depth - 1}, and one at least is needed")
        wanted = [i % self.depth for i in layers]
        tokens: Tensor = self.embed(images)
        kept: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(wanted) + 1]):
            again = self.checkpointing and torch.is_grad_enabled()
            tokens = checkpoint(block, tokens, use_reentrant=False) if again else block(tokens)
            if i in wanted:
                kept[i] = tokens
        return [kept[i] for i in wanted]


def _checked(
    method: str, depth: int, layer_scale: float | None, class_token: bool, window: int, global_blocks: tuple[int, ...]
) -> float:
    """The first value of layer scale, if the options go together."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    if method == "mae" and layer_scale:
        raise ValueError(f"MAE has no layer scale, got layer_scale {layer_scale}")
    if not all(0 <= i < depth for i in global_blocks):
        raise ValueError(f"global_blocks {list(global_blocks)}: the encoder has blocks 0 to {depth - 1}")
    if window < 0 or (window and class_token):
        raise ValueError(f"window {window}: needs a side of 1 or more and class_token=False, for a class token is in no window")
    return LAYER_SCALE[method] if layer_scale is None else layer_scale


MODELS: dict[str, partial[BackboneViT]] = {
    "vit_tiny_patch4": partial(BackboneViT, patch_size=4, width=192, depth=12, heads=3),
    "vit_tiny_patch8": partial(BackboneViT, patch_size=8, width=192, depth=12, heads=3),
    "vit_small_patch16": partial(BackboneViT, patch_size=16, width=384, depth=12, heads=6),
    "vit_base_patch16": partial(BackboneViT, patch_size=16, width=768, depth=12, heads=12),
    "vit_large_patch16": partial(BackboneViT, patch_size=16, width=1024, depth=24, heads=16),
    "vit_huge_patch14": partial(BackboneViT, patch_size=14, width=1280, depth=32, heads=16),
}
"""Sizes as in the trainers' own tables. BEiT's recipe for the large model starts layer scale at 1e-5: pass it."""


def build_encoder(name: str, method: Method, input_size: tuple[int, int] = (224, 224), **more: Any) -> BackboneViT:
    """The encoder of that name in MODELS; `more` as in :class:`BackboneViT`.

    Raises:
        ValueError: an unknown name, or what BackboneViT refuses.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(MODELS)}")
    return MODELS[name](method=method, input_size=input_size, name=name, **more)


def layer_of(name: str, depth: int) -> int:
    """Layer of a parameter for layer-wise learning rates: the rate is multiplied by decay^(depth + 1 - layer).

    Args:
        name: of a parameter of an encoder, or of a task model that holds one as `encoder`, at any depth.

    Returns:
        0 for the embeddings, i + 1 for block i, depth + 1 for everything else (norms, heads, decoders).
    """
    inner = re.sub(r"^(.*\.)?encoder\.", "", name.removeprefix("module."))
    if inner.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    block = re.match(r"blocks\.(\d+)\.", inner)
    return int(block[1]) + 1 if block else depth + 1
