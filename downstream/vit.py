"""The pre-trained encoders as backbones: one ViT for MAE, BEiT and SimMIM, on any grid, whole or in windows.

Names and shapes of the state dict are those of the official fine-tuning code of each method (facebookresearch/mae
`models_vit.py`, microsoft/unilm `beit/modeling_finetune.py`, microsoft/SimMIM `models/vision_transformer.py`),
without norm and head, which belong to the task. MAE has absolute positions; BEiT and SimMIM have a table of relative
position biases in every block, and layer scale. Windows follow ViTDet (Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection", ECCV 2022, Sec. 3).

B batch   H, W patch grid   N = H*W patches   P prefix tokens (1 class token, or 0)   T = P + N   D width   h heads
d = D/h   w window side in patches   V windows of an image = ceil(H/w) * ceil(W/w)   S = V or 1
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from common.models.mask_token_encoder import reset_as_beit
from common.models.names import patch_grid
from common.models.relative_position import BiasedBlock, BiasedLinear, relative_position_index
from common.models.timm_layers import PatchEmbed
from mae_evolved.model import sincos_positions

Method = Literal["mae", "beit", "simmim"]
METHODS: tuple[Method, ...] = get_args(Method)

LAYER_SCALE: dict[Method, float] = {"mae": 0.0, "beit": 0.1, "simmim": 0.1}
"""First value of gamma_1 and gamma_2 in the official fine-tuning code; 0: the method has none."""


class GridAttention(nn.Module):
    """Multi-head attention over the whole grid, or within windows of it.

    Windows lie edge to edge from the top left. Where w does not divide the grid, the last ones are filled up with
    tokens that nothing attends to: their scores are -inf, and what they compute is cut off again.

    Args:
        width, heads: D, h.
        grid_size: (H, W).
        prefix: P; 0 where there are windows.
        window: w in patches, 0 for the whole grid.
        biased: as in BEiT and SimMIM, a table of relative position biases and no bias for keys; else as in timm.
    """

    relative_position_index: Tensor
    padded: Tensor

    def __init__(self, width: int, heads: int, grid_size: tuple[int, int], prefix: int, window: int, biased: bool) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.num_heads, self.grid_size, self.window, self.biased = heads, grid_size, window, biased
        self.reach = (window, window) if window else grid_size
        if biased:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
            rows = (2 * self.reach[0] - 1) * (2 * self.reach[1] - 1) + 3 * prefix
            self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
            # The class token is the first, and the last three rows of the table are its: both go together. Saved as
            # the official code does, but not where that has no such layout and a large grid would fill checkpoints.
            index = relative_position_index(*self.reach)[1 - prefix :, 1 - prefix :]
            self.register_buffer("relative_position_index", index.contiguous(), persistent=prefix > 0)
        self.qkv = BiasedLinear(width, 3 * width, bias=False) if biased else nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.fits = not window or not (grid_size[0] % window or grid_size[1] % window)
        if not self.fits:
            real = to_windows(torch.ones(1, grid_size[0] * grid_size[1], 1), grid_size, window)
            self.register_buffer("padded", real[:, None, None, :, 0] == 0, persistent=False)  # [V, 1, 1, w*w]

    def forward(self, tokens: Tensor, position_bias: None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. `position_bias` is there for the block that calls it; the bias is this module's own."""
        if not self.window:
            return self.attend(tokens)
        return from_windows(self.attend(to_windows(tokens, self.grid_size, self.window)), self.grid_size, self.window)

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention among all tokens of a row: [B*S, T, D] -> [B*S, T, D]."""
        rows, length, width = tokens.shape
        qkv = self._qkv(tokens).reshape(rows, length, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B*S, h, T, d]
        bias = self._score_bias(query)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.proj(mixed.transpose(1, 2).reshape(rows, length, width))

    def _qkv(self, tokens: Tensor) -> Tensor:
        if not self.biased:
            return self.qkv(tokens)
        return self.qkv(tokens, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]))

    def _score_bias(self, query: Tensor) -> Tensor | None:
        """What is added to the scores, [1 or B*S, h or 1, T or 1, T] in the type of `query`, or None."""
        bias = None
        if self.biased:
            # Gathered in the type and memory layout that the fast kernels take: at 64 x 64 patches this is what is large.
            bias = self.relative_position_bias_table.t().to(query.dtype)[:, self.relative_position_index][None]
        if self.fits:
            return bias
        # [V, h or 1, w*w or 1, w*w], one copy an image
        closed = torch.zeros_like(self.padded, dtype=query.dtype).masked_fill(self.padded, float("-inf"))
        closed = closed if bias is None else bias + closed
        return closed.repeat(len(query) // len(closed), 1, 1, 1)


def to_windows(tokens: Tensor, grid_size: tuple[int, int], window: int) -> Tensor:
    """[B, N, D] -> [B*V, w*w, D], windows of an image in raster order; zeros where the grid ends inside a window."""
    height, width = grid_size
    grid = tokens.reshape(len(tokens), height, width, -1)
    grid = functional.pad(grid, (0, 0, 0, -width % window, 0, -height % window))
    down, across = grid.shape[1] // window, grid.shape[2] // window
    cut = grid.reshape(-1, down, window, across, window, tokens.shape[2])
    return cut.transpose(2, 3).reshape(-1, window * window, tokens.shape[2])


def from_windows(windows: Tensor, grid_size: tuple[int, int], window: int) -> Tensor:
    """Inverse of :func:`to_windows`: [B*V, w*w, D] -> [B, N, D]."""
    height, width = grid_size
    down, across = -(-height // window), -(-width // window)
    cut = windows.reshape(-1, down, across, window, window, windows.shape[2]).transpose(2, 3)
    grid = cut.reshape(-1, down * window, across * window, windows.shape[2])
    return grid[:, :height, :width].flatten(1, 2)


class Encoder(nn.Module):
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
        self.blocks = nn.ModuleList()
        for i, rate in enumerate(torch.linspace(0, drop_path, depth, device="cpu").tolist()):
            side = 0 if i in global_blocks else window
            attention = GridAttention(width, heads, self.grid_size, self.num_prefix_tokens, side, biased=method != "mae")
            self.blocks.append(BiasedBlock(width, heads, scale, rate, attention))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of the method's pre-training; positions are MAE's sine-cosine ones."""
        if self.pos_embed is None:
            reset_as_beit(self, self.blocks, [] if self.cls_token is None else [self.cls_token])
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.data.flatten(1))
        if self.cls_token is not None:
            nn.init.normal_(self.cls_token, std=0.02)
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


MODELS: dict[str, partial[Encoder]] = {
    "vit_tiny_patch4": partial(Encoder, patch_size=4, width=192, depth=12, heads=3),
    "vit_tiny_patch8": partial(Encoder, patch_size=8, width=192, depth=12, heads=3),
    "vit_small_patch16": partial(Encoder, patch_size=16, width=384, depth=12, heads=6),
    "vit_base_patch16": partial(Encoder, patch_size=16, width=768, depth=12, heads=12),
    "vit_large_patch16": partial(Encoder, patch_size=16, width=1024, depth=24, heads=16),
    "vit_huge_patch14": partial(Encoder, patch_size=14, width=1280, depth=32, heads=16),
}
"""Sizes as in the trainers' own tables. BEiT's recipe for the large model starts layer scale at 1e-5: pass it."""


def build_encoder(name: str, method: Method, input_size: tuple[int, int] = (224, 224), **more: Any) -> Encoder:
    """The encoder of that name in MODELS; `more` as in :class:`Encoder`.

    Raises:
        ValueError: an unknown name, or what Encoder refuses.
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
