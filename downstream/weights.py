"""Loads a pre-trained or fine-tuned checkpoint, ours or the official one, into a :class:`BackboneViT`, strictly.

Every tensor of the encoder is found in the checkpoint, in its shape or after one of the changes below, and every
tensor of the checkpoint is used or listed in LEFT_OUT; anything else is an error that names it.

* A position bias that all blocks share becomes a copy in each block.
* Positions for another grid are interpolated: bicubic, align_corners=False, as MAE's own fine-tuning does.
* Tables of relative biases for another grid or window are interpolated likewise, on the plane of offsets. The official
  BEiT and SimMIM code uses splines over offsets in geometric progression, which keeps the bias between neighbours as it
  is; but it is defined for square grids that grow, while windows shrink it and images need not be square. Here one
  rule serves all, offsets scale with the grid, and absolute and relative positions are treated alike.
* Without a class token, its position and the last three rows of the tables are dropped.
* Indices into the tables follow from the grid and are never read.

B batch   D width   h heads   h x w grid of the checkpoint   H x W grid (or window) of the model
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.models.block import Attention
from common.training.checkpoint import check_finite, read_checkpoint
from common.training.errors import BadInput
from downstream.vit import BackboneViT, Method

TASKS = ("head.", "heads.", "fc_norm.", "norm.", "decoder.", "auxiliary.", "neck.", "rpn.", "roi_heads.")
"""What a fine-tuned model has besides its encoder."""

LEFT_OUT: dict[Method, tuple[str, ...]] = {
    "mae": ("mask_token", "decoder_embed.", "decoder_pos_embed", "decoder_blocks.", "decoder_norm.", "decoder_pred.", *TASKS),
    "beit": ("mask_token", "lm_head.", *TASKS),
    "simmim": ("mask_token", *TASKS),
}
"""Names that a checkpoint may hold and the encoder does not want begin with one of these. No name of the encoder may
be missing. `norm.` is the last norm of pre-training, which :func:`load_encoder` loads on demand."""

WRAPPERS = ("model", "module", "state_dict")
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
TABLE, INDEX = ".relative_position_bias_table", "relative_position_index"
TITLES: dict[Method, str] = {"mae": "MAE", "beit": "BEiT", "simmim": "SimMIM"}


@dataclass(frozen=True)
class Sizes:
    """Sizes of an encoder; heads are None where they are not known: the shapes of MAE's weights do not tell them."""

    width: int
    depth: int
    heads: int | None
    patch_size: int

    def __str__(self) -> str:
        heads = "" if self.heads is None else f"{self.heads} heads, "
        return f"{self.width} wide, {self.depth} deep, {heads}patch {self.patch_size}"

    def as_told_by(self, shapes: Sizes) -> Sizes:
        """The same without heads, if those shapes do not tell them."""
        return self if shapes.heads is not None else replace(self, heads=None)

    def are_of(self, model: Sizes) -> bool:
        """Whether a model of those sizes may have weights of these."""
        return self == model.as_told_by(self)


@dataclass(frozen=True)
class EncoderWeights:
    """What a checkpoint holds: tensors of the encoder by their names in it, tensors besides, and what it says of itself."""

    path: Path
    tensors: dict[str, Tensor]
    others: dict[str, Tensor]
    methods: tuple[Method, ...]
    input_size: tuple[int, int] | None

    @property
    def prefix(self) -> int:
        """Number of class tokens."""
        return int("cls_token" in self.tensors)

    def named(self, key: str) -> Tensor | None:
        """A tensor of the encoder; of norms and head also one that stands beside a nested encoder."""
        return self.tensors.get(key, self.others.get(key) if key.startswith(("norm.", "fc_norm.", "head.")) else None)

    @property
    def patch_size(self) -> int:
        return self.tensors["patch_embed.proj.weight"].shape[-1]

    @property
    def sizes(self) -> Sizes:
        """As the shapes tell them."""
        width, _, patch, _ = self.tensors["patch_embed.proj.weight"].shape
        depth = 1 + max(int(key.split(".")[1]) for key in self.tensors if key.startswith("blocks."))
        tables = [value.shape[1] for key, value in self.tensors.items() if key.endswith(TABLE) or key == SHARED_TABLE]
        return Sizes(width, depth, tables[0] if tables else None, patch)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels that the encoder was trained at; None if neither its flags nor its shapes tell."""
        try:
            height, width = self._grid()
        except BadInput:
            return None
        return height * self.patch_size, width * self.patch_size

    def _grid(self) -> tuple[int, int]:
        """(h, w) by the positions, or by the last block's table, which is of the whole grid also where others have windows."""
        if "pos_embed" in self.tensors:
            return self.sides(self.tensors["pos_embed"].shape[1] - self.prefix, offsets=False)
        key = SHARED_TABLE if SHARED_TABLE in self.tensors else f"blocks.{self.sizes.depth - 1}.attn{TABLE}"
        if key not in self.tensors:
            raise BadInput(f"checkpoint {self.path}: has neither positions nor {key}")
        offsets = self.sides(len(self.tensors[key]) - 3 * self.prefix, offsets=True)
        return (offsets[0] + 1) // 2, (offsets[1] + 1) // 2

    def sides(self, count: int, offsets: bool) -> tuple[int, int]:
        """(h, w) of a plane of `count` patches, or of (2h-1)(2w-1) offsets: as the checkpoint's flags say, else a square."""
        if self.input_size is not None:
            height, width = (size // self.patch_size for size in self.input_size)
            plane = (2 * height - 1, 2 * width - 1) if offsets else (height, width)
            if plane[0] * plane[1] == count:
                return plane
        side = math.isqrt(max(count, 0))
        if side**2 != count or (offsets and side % 2 == 0):
            what = "relative offsets" if offsets else "positions"
            raise BadInput(f"checkpoint {self.path}: {count} {what} are of no square grid, and no input_size in it says which")
        return side, side


def load_encoder(encoder: BackboneViT, path: Path, method: Method | None = None, norm: nn.LayerNorm | None = None) -> str:
    """Loads the encoder of a checkpoint. Nothing is changed if it does not fit.

    Args:
        encoder: of any grid, with or without class token and windows.
        path: a checkpoint of pre-training or fine-tuning, official or ours.
        method: that the checkpoint must be of; by default the encoder's.
        norm: takes the last norm of pre-training, `norm.weight` and `norm.bias`.

    Returns:
        One line: what was loaded, what was interpolated, what was left out.

    Raises:
        BadInput: not readable, of another method or size, with names missing or left over, or with values that are
            not finite; one line that says which.
    """
    checkpoint = find_encoder(read_checkpoint(path), path)
    asked = method or encoder.method
    require_method(checkpoint, asked)
    _check_sizes(encoder, checkpoint, asked)
    last = {} if norm is None else {f"norm.{name}": value for name, value in norm.state_dict().items()}
    left_out = _check_names(encoder, checkpoint, asked, last)
    fitted, notes = _fit(encoder, checkpoint)
    norm_weights = {name: checkpoint.named(name) for name in last}
    check_finite({**fitted, **norm_weights}, path)
    encoder.load_state_dict(fitted)
    if norm is not None:
        norm.load_state_dict({name.removeprefix("norm."): value for name, value in norm_weights.items()})
    parts = [f"loaded {path}: {TITLES[asked]} encoder, {len(fitted) + len(last)} tensors", *notes]
    return "; ".join([*parts, f"left out: {left_out}"] if left_out else parts)


def require_method(checkpoint: EncoderWeights, asked: Method) -> None:
    """Raises BadInput if the encoder is of another method than the one asked for."""
    if asked not in checkpoint.methods:
        titles = " or ".join(TITLES[name] for name in checkpoint.methods)
        raise BadInput(f"checkpoint {checkpoint.path}: holds a {titles} encoder, but the method asked for is {TITLES[asked]}")


def find_encoder(state: dict[str, Any], path: Path) -> EncoderWeights:
    """Unwraps a checkpoint and tells whose encoder it is.

    Raises:
        BadInput: no weights, or no ViT encoder among them.
    """
    unwrapped: Any = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not unwrapped or not all(isinstance(value, Tensor) for value in unwrapped.values()):
        raise BadInput(f"checkpoint {path}: holds no weights, neither under {', '.join(WRAPPERS)} nor at top level")
    tensors = {key.removeprefix("module."): value for key, value in unwrapped.items()}
    inside = {key.removeprefix("encoder."): value for key, value in tensors.items() if key.startswith("encoder.")}
    others = {key: value for key, value in tensors.items() if not key.startswith("encoder.")} if inside else {}
    weights = inside or tensors
    if not {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= weights.keys():
        raise BadInput(f"checkpoint {path}: holds no ViT encoder (no patch_embed.proj.weight with blocks.0.attn.qkv.weight)")
    flags = _flags(state)
    return EncoderWeights(path, weights, others, _methods(weights, others, flags), _input_size(flags))


def _flags(state: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run that wrote the checkpoint: ours, or the official MAE's and BEiT's."""
    flags = state.get("config", state.get("args"))
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    return flags if isinstance(flags, dict) else {}


def _methods(weights: dict[str, Tensor], others: dict[str, Tensor], flags: dict[str, Any]) -> tuple[Method, ...]:
    """Method of an encoder; fine-tuned, BEiT and SimMIM have the same names, and only a flag `method` tells them apart."""
    if "blocks.0.attn.q_bias" not in weights:
        return ("mae",)
    if "lm_head.weight" in weights:
        return ("beit",)
    if SHARED_TABLE in weights and others:
        return ("simmim",)
    said = flags.get("method")
    return (said,) if said in ("beit", "simmim") else ("beit", "simmim")


def _input_size(flags: dict[str, Any]) -> tuple[int, int] | None:
    """(height, width) of the flag input_size: a number, or a word such as 192x256."""
    words = str(flags.get("input_size", "")).lower().split("x")
    if len(words) > 2 or not all(word.isdecimal() for word in words):
        return None
    return int(words[0]), int(words[-1])


def _check_sizes(encoder: BackboneViT, checkpoint: EncoderWeights, method: Method) -> None:
    """Raises BadInput that says in words how the checkpoint's encoder differs from the model."""
    theirs = checkpoint.sizes
    ours = Sizes(encoder.width, encoder.depth, encoder.heads, encoder.patch_size)
    if not theirs.are_of(ours):
        name = f"the model {encoder.name}" if encoder.name else "the model"
        holds = f"checkpoint {checkpoint.path}: holds a {TITLES[method]} encoder {theirs}"
        raise BadInput(f"{holds}; {name} is {ours.as_told_by(theirs)}")


def _check_names(encoder: BackboneViT, checkpoint: EncoderWeights, method: Method, last: dict[str, Tensor]) -> str:
    """Accounts for every name on both sides, and says what is left out, by kind."""
    mine = encoder.state_dict() | last
    shared = SHARED_TABLE in checkpoint.tensors
    wanted = {key for key in mine if not key.endswith(INDEX)}
    copied = {key for key in wanted if key.endswith(TABLE)} if shared else set()
    missing = [key for key in mine if key in wanted - copied and checkpoint.named(key) is None]
    shapes = [
        f"{key} {list(tensor.shape)} instead of {list(mine[key].shape)}"
        for key in mine
        if key in wanted and (tensor := checkpoint.named(key)) is not None
        for first in [-1 if key.endswith((TABLE, "pos_embed")) else 0]  # of these, interpolated later, only the width counts
        if tensor.shape[first:] != mine[key].shape[first:]
    ]
    used = wanted - copied | ({SHARED_TABLE} if shared else set())
    rest = [key for key in checkpoint.tensors if key not in used and not key.endswith(INDEX)]
    rest += [key for key in checkpoint.others if key not in last]
    allowed = LEFT_OUT[method] if encoder.cls_token is not None else (*LEFT_OUT[method], "cls_token")
    left_over = [key for key in rest if not key.startswith(allowed)]
    problems = {"missing": missing, "not of this model": left_over, "of another shape": shapes}
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise BadInput(f"checkpoint {checkpoint.path}: does not fit the {TITLES[method]} encoder ({listed})")
    return ", ".join(f"{kind} ({count})" for kind, count in Counter(key.split(".")[0] for key in rest).items())


def _fit(encoder: BackboneViT, checkpoint: EncoderWeights) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's new state dict, and a note for each kind of change."""
    fitted, notes = {}, dict[str, None]()
    for key, mine in encoder.state_dict().items():
        if key.endswith(INDEX):
            fitted[key] = mine
        elif key == "pos_embed":
            fitted[key], note = _fit_positions(encoder, checkpoint)
            notes[note] = None
        elif key.endswith(TABLE):
            table = checkpoint.tensors[SHARED_TABLE if SHARED_TABLE in checkpoint.tensors else key]
            attention = encoder.get_submodule(key.removesuffix(TABLE))
            assert isinstance(attention, Attention)
            assert attention.table_grid is not None
            fitted[key], note = _fit_table(table, encoder, checkpoint, attention.table_grid)
            notes[note] = None
        else:
            fitted[key] = checkpoint.tensors[key]
    if SHARED_TABLE in checkpoint.tensors:
        notes["shared position bias copied to each block"] = None
    return fitted, [note for note in notes if note]


def _fit_positions(encoder: BackboneViT, checkpoint: EncoderWeights) -> tuple[Tensor, str]:
    """[1, P+h*w, D] of the checkpoint -> [1, P+H*W, D] of the model."""
    positions = checkpoint.tensors["pos_embed"]
    source = checkpoint.sides(positions.shape[1] - checkpoint.prefix, offsets=False)
    patches = resized(positions[0, checkpoint.prefix :], source, encoder.grid_size)
    made = torch.cat([positions[0, : encoder.num_prefix_tokens], patches])[None]
    return made, _note("positions", source, encoder.grid_size)


def _fit_table(table: Tensor, encoder: BackboneViT, checkpoint: EncoderWeights, grid: tuple[int, int]) -> tuple[Tensor, str]:
    """[(2h-1)(2w-1) + 3P, heads] of the checkpoint -> [(2H-1)(2W-1) + 3P, heads] for a grid or window H x W."""
    offsets = len(table) - 3 * checkpoint.prefix
    source, target = checkpoint.sides(offsets, offsets=True), (2 * grid[0] - 1, 2 * grid[1] - 1)
    made = torch.cat([resized(table[:offsets], source, target), table[offsets : offsets + 3 * encoder.num_prefix_tokens]])
    return made, _note("relative offsets", source, target)


def resized(plane: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Bicubic interpolation of a raster [h*w, D] to another [H*W, D]; the same tensor if the sizes are equal."""
    if source == target:
        return plane
    grid = plane.float().reshape(1, *source, -1).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return grid[0].flatten(1).T.to(plane.dtype)


def _note(what: str, source: tuple[int, int], target: tuple[int, int]) -> str:
    return "" if source == target else f"{what} {source[0]}x{source[1]} interpolated to {target[0]}x{target[1]}"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
