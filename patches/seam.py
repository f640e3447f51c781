"""The calls that patches insert into the official MAE, BEiT and SimMIM code.

Patches (patches/README.md) insert single calls; all they do is here. In the order in which a patched script makes
them:

    prepare(upstream)                            before anything is imported that no longer imports: shims.py
    add_small_model(module)                      ViT-S of the paper's Table 4 under an official name
    add_arguments(parser)                        --mask and the other flags of the method
    check_arguments(upstream, args)              bad values die before data, model or GPU are touched
    attach(upstream, model, settings, optimizer) makes the masks of this run
    load_state(model, checkpoint)                resume
    set_epoch(model, epoch)                      moves the schedule
    masks_for(model, images, mask)               this batch's masks in place of the drawn ones (BEiT, SimMIM)
    saved_state(model)                           what a checkpoint has to keep

With `--mask official` nothing is attached and every later call does nothing: the run is the unpatched one, bit for
bit. Code of the official repositories is not here; this file knows their names only.

B batch (images)   N patches   D width   h heads   T = 1 + N tokens   V visible patches
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from timm.models.registry import register_model
from torch import Tensor, nn
from torch.nn import functional

from common.attention import Layers, Values, attention_mode, choose_layers
from common.draws import Stream, hash_seed
from common.evolved_mask import EvolvedMask, check_for_encoder
from common.flags import add_mask_flags, mask_config_from, mask_options
from common.mask_config import MaskConfig
from common.masks import count_masked, mae_ids
from common.moving_average import EncoderEMA
from common.signals import Graph, qkv_bias, stream_signal
from patches.shims import SHIMS

CALLS = (
    "prepare", "add_small_model", "add_arguments", "check_arguments", "attach", "load_state", "set_epoch", "masks_for",
    "saved_state",
)  # fmt: skip
"""Names that patched scripts use as `seam.NAME`."""

OFFICIAL = "official"
"""Word of --mask that leaves the official code its own masks."""

STATE_KEY = "evolved_mask"
"""Key of the checkpoint under which :func:`saved_state` is kept."""


# --- The calls, as a patched script makes them -------------------------------------------------------------------


def prepare(upstream: str) -> None:
    """Applies the shims that `upstream` ("mae", "beit" or "simmim") needs on this machine."""
    for shim in SHIMS[upstream]:
        shim()


def add_small_model(module: types.ModuleType) -> None:
    """Adds ViT-S (384 wide, 12 deep, 6 heads) to an official module of models, beside the ViT-B there.

    MAE looks its models up in the module; BEiT asks timm's registry. SimMIM takes sizes from its YAML files, see
    patches/configs.
    """
    small = next(small for small in SMALL_MODELS if hasattr(module, small.beside))
    if hasattr(module, small.name):
        return

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = getattr(module, small.kind)(**SMALL, **small.options, **options)
        return model

    build.__name__, build.__module__ = small.name, module.__name__  # timm files it by name, under the official module
    setattr(module, small.name, register_model(build) if small.registered else build)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the mask. Of those, the namespace holds only what was given."""
    add_mask_flags(parser)
    action = next(flag for flag in parser._actions if flag.dest == "mask")
    action.help = f"{action.help}; in this script {OFFICIAL} is the unpatched run, bit for bit"


def check_arguments(upstream: str, args: argparse.Namespace, config: Any = None) -> None:
    """Stops on an unusable value of a mask flag, with one line.

    Args:
        upstream: "mae", "beit" or "simmim".
        config: SimMIM's configuration, which its training loop gets in place of the arguments; the mask's choices
            are written into it, and so into its config.json and checkpoints.
    """
    chosen = mask_config(vars(args))
    if upstream in EVEN_COUNTS:
        _checked_flags(chosen.check_even_counts)
    if config is not None and not _wants_official(vars(args)):
        config.defrost()
        config.EVOLVED_MASK = type(config)(mask_options(vars(args)))
        config.freeze()


def attach(upstream: str, model: nn.Module, settings: Any, optimizer: torch.optim.Optimizer) -> None:
    """Makes the masks of this run, unless --mask official.

    Args:
        upstream: "mae", "beit" or "simmim".
        model: the official model, on its device, without DistributedDataParallel.
        settings: the script's arguments (MAE, BEiT) or configuration (SimMIM).
        optimizer: of the run; its steps move the average of `--attention_from ema`.
    """
    choices = READERS[upstream](settings)
    if _wants_official(choices.options):
        return
    config = mask_config(choices.options)
    encoder = encoder_of(model)
    for name in ("patch_embed", "cls_token", "blocks"):
        if not hasattr(encoder, name):
            _refuse(f"evolved masks need a ViT encoder, and {type(encoder).__name__} has no {name} (use --mask {OFFICIAL})")
    grid_size, even_counts = _grid_size(encoder.patch_embed), upstream in EVEN_COUNTS
    try:
        num_masked = choices.count(grid_size[0] * grid_size[1])
        check_for_encoder(config, depth=len(encoder.blocks), grid_size=grid_size, num_masked=num_masked, even_counts=even_counts)
        mask = EvolvedMask(grid_size, num_masked, choices.total_epochs, config, seed=choices.seed)
    except ValueError as error:
        _refuse(str(error))
    run = PatchedRun(mask, encoder, choices.autocast)
    if run.ema is not None:
        optimizer.register_step_post_hook(lambda *_: run.follow(encoder))
    if upstream == "mae":
        replace_random_masking(model, run)
    RUNS[model] = run
    masked = f"{mask.describe_count()} of {grid_size[0]}x{grid_size[1]} patches"
    _say(f"evolved masks: {config.mask}, {masked}, {choices.total_epochs} epochs")


def load_state(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Continues the masks of a checkpoint; without them in it, the average starts from the loaded weights."""
    run = _run_of(model)
    if run is None:
        return
    state = checkpoint.get(STATE_KEY)
    try:
        run.load_state_dict(state, encoder_of(model))
    except ValueError as error:
        _refuse(str(error))
    if state is None:
        _say("the checkpoint has no state of evolved masks: they go on with the schedule of the epoch")


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Moves the masks to an epoch, and seeds every generator of this process from (seed, epoch, rank).

    The official scripts save at the end of an epoch, and no state of a generator. Seeded here, crops and masks of
    an epoch are the same whether the run was resumed before it or not.
    """
    run = _run_of(model)
    if run is None:
        return
    run.start_epoch(epoch)
    _say(f"evolved masks: epoch {epoch}, alpha {run.mask.alpha:.4f}, K {run.mask.num_parts}")


def masks_for(model: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
    """Masks of a batch, in the shape and type of the official `mask`; under --mask official that one itself."""
    run = _run_of(model)
    if run is None:
        return mask
    return run.make(encoder_of(_bare(model)), images).reshape(mask.shape).to(mask.dtype)


def saved_state(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint needs besides the official entries: {} under --mask official."""
    run = _run_of(model)
    return {} if run is None else {STATE_KEY: run.state_dict()}


# --- ViT-S beside the official models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallModel:
    """A ViT-S that an official module lacks.

    Attributes:
        name: under which scripts find it.
        beside: the official ViT-B of the same kind, by which the module is known.
        kind: the official class.
        options: of that class, besides the sizes.
        registered: with timm, instead of being looked up in the module.
    """

    name: str
    beside: str
    kind: str
    options: dict[str, Any]
    registered: bool = False


SMALL: dict[str, Any] = {
    "patch_size": 16,
    "embed_dim": 384,
    "depth": 12,
    "num_heads": 6,
    "mlp_ratio": 4,
    "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
}
DECODER = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
BIASED = {"qkv_bias": True}
SMALL_MODELS = (
    SmallModel("mae_vit_small_patch16", "mae_vit_base_patch16", "MaskedAutoencoderViT", DECODER),
    SmallModel("vit_small_patch16", "vit_base_patch16", "VisionTransformer", BIASED),
    SmallModel(
        "beit_small_patch16_224_8k_vocab",
        "beit_base_patch16_224_8k_vocab",
        "VisionTransformerForMaskedImageModeling",
        BIASED | {"vocab_size": 8192},
        registered=True,
    ),
    SmallModel("beit_small_patch16_224", "beit_base_patch16_224", "VisionTransformer", BIASED, registered=True),
)
"""For pre-training and fine-tuning with MAE, then with BEiT."""


# --- A run's masks -----------------------------------------------------------------------------------------------


class PatchedRun:
    """The masks of one patched run.

    Args:
        mask: draws from its own generator: a patched script does not know the index of an image.
        encoder: the official encoder, for `--attention_from ema`.
        autocast: precision of the attention pass on a GPU; None leaves it as it is where the masks are made.
    """

    def __init__(self, mask: EvolvedMask, encoder: nn.Module, autocast: torch.dtype | None) -> None:
        self.mask, self.autocast = mask, autocast
        self.ema: EncoderEMA | None = None
        if mask.config.attention_from == "ema" and mask.config.uses_attention:
            unused = [name for name in UNUSED_BY_ATTENTION if hasattr(encoder, name)]
            self.ema = EncoderEMA(encoder, mask.config.ema_decay, unused)

    def follow(self, encoder: nn.Module) -> None:
        """Moves the average after a step of the optimiser."""
        if self.ema is not None:
            self.ema.update(encoder)

    def start_epoch(self, epoch: int) -> None:
        """See :func:`set_epoch`."""
        self.mask.set_epoch(epoch)
        self.mask.generator.manual_seed(hash_seed(self.mask.seed, epoch, _rank(), Stream.OFFICIAL_MASK))
        seed = hash_seed(self.mask.seed, epoch, _rank(), Stream.OFFICIAL)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    def make(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Masks of a batch: bool [B, N]."""
        config, source = self.mask.config, self.ema.model if self.ema is not None else encoder
        with attention_mode(source, config.attention_mode), self._precision(images):
            return self.mask(images, lambda rows: encoder_signal(source, rows, **config.signal)).mask

    def _precision(self, images: Tensor) -> torch.autocast:
        """Autocast of the attention pass, without its cache.

        MAE makes the mask inside its own autocast. Earlier releases of torch keep the weights that are cast there
        without gradient for the training pass of the same step, which then has no gradient either.
        """
        kind = images.device.type
        asked = self.autocast if images.is_cuda else None
        dtype = asked or torch.get_autocast_dtype(kind)
        enabled = asked is not None or torch.is_autocast_enabled(kind)
        return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {"mask": self.mask.state_dict(), "ema": None if self.ema is None else self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any] | None, encoder: nn.Module) -> None:
        """Continues from :meth:`state_dict`, or, with None, from the encoder alone.

        Raises:
            ValueError: the state belongs to another configuration; names what differs.
        """
        if state is not None:
            self.mask.load_state_dict(state["mask"])
        if self.ema is not None:
            average = state["ema"] if state is not None else None
            self.ema.model.load_state_dict(average or encoder.state_dict(), strict=average is not None)


RUNS: weakref.WeakKeyDictionary[nn.Module, PatchedRun] = weakref.WeakKeyDictionary()
"""The run of each attached model. Kept apart from the model, so that its state dict and copies stay the official ones."""

UNUSED_BY_ATTENTION = ("decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred", "lm_head")


def _run_of(model: nn.Module) -> PatchedRun | None:
    return RUNS.get(_bare(model))


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0


def _say(line: str) -> None:
    if _rank() == 0:
        print(line, flush=True)


def _refuse(message: str) -> NoReturn:
    """One line on stderr and exit code 2. The stream is written to because MAE mutes print on all ranks but the first."""
    sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: error: {message}\n")
    raise SystemExit(2)


# --- What each official script was told --------------------------------------------------------------------------


@dataclass(frozen=True)
class ScriptSettings:
    """What the masks need to know of a script's settings.

    Attributes:
        options: mask flags that were given, `mask` and `recipe` among them.
        total_epochs: T.
        seed: of the run.
        count: N -> m.
        autocast: precision of the attention pass on a GPU, see :class:`PatchedRun`.
    """

    options: dict[str, Any]
    total_epochs: int
    seed: int
    count: Callable[[int], int]
    autocast: torch.dtype | None


def _read_mae(args: Any) -> ScriptSettings:
    return ScriptSettings(vars(args), args.epochs, args.seed, lambda patches: count_masked(patches, args.mask_ratio), None)


def _read_beit(args: Any) -> ScriptSettings:
    return ScriptSettings(vars(args), args.epochs, args.seed, lambda patches: int(args.num_mask_patches), torch.float16)


def _read_simmim(config: Any) -> ScriptSettings:
    """Without :func:`check_arguments` having written the choices, the masks stay the official ones."""
    options = dict(config.EVOLVED_MASK) if "EVOLVED_MASK" in config else {"mask": OFFICIAL}
    lower = None if config.AMP_OPT_LEVEL == "O0" else torch.bfloat16
    return ScriptSettings(
        options, config.TRAIN.EPOCHS, config.SEED, lambda patches: count_masked(patches, config.DATA.MASK_RATIO), lower
    )


EVEN_COUNTS = frozenset({"mae"})
"""Upstreams whose model needs the same number of masked patches in every image."""

READERS: dict[str, Callable[[Any], ScriptSettings]] = {"mae": _read_mae, "beit": _read_beit, "simmim": _read_simmim}


def _wants_official(options: dict[str, Any]) -> bool:
    return options.get("mask") == OFFICIAL


def mask_config(options: dict[str, Any]) -> MaskConfig:
    """The mask's configuration from a script's arguments; stops on an unusable one with one line."""
    chosen = mask_options(options)
    if _wants_official(chosen):
        del chosen["mask"]
    return _checked_flags(lambda: mask_config_from(chosen))


def _checked_flags(call: Callable[[], Any]) -> Any:
    """What `call` gives; its ValueError, which begins with the name of a flag, stops the script with one line."""
    try:
        return call()
    except ValueError as error:
        _refuse(f"--{error}")


# --- Signal of the official encoders -----------------------------------------------------------------------------


def encoder_of(model: nn.Module) -> Any:
    """The module with patch embedding, class token and blocks: SimMIM wraps it, MAE and BEiT are it."""
    return getattr(_bare(model), "encoder", _bare(model))


def _grid_size(patch_embed: Any) -> tuple[int, int]:
    """(H, W); timm and BEiT's descendants call their image and patch sizes alike."""
    (height, width), (down, across) = patch_embed.img_size, patch_embed.patch_size
    return height // down, width // across


def encoder_signal(
    encoder: Any, images: Tensor, graph: Graph = "attention", layers: Layers = "all", values: Values = "softmax"
) -> Iterable[Tensor]:
    """Signal of an official encoder on whole images, nothing masked: one tensor for each chosen block, see `stream_signal`.

    Position embeddings are added where the model has them, the shared relative position bias likewise.
    """
    patches = encoder.patch_embed(images)  # [B, N, D]
    tokens = torch.cat([encoder.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    shared_bias = getattr(encoder, "rel_pos_bias", None)
    inputs = {} if shared_bias is None else {"rel_pos_bias": shared_bias()}
    if graph == "attention" and values == "scores":
        return _stream_scores(encoder.blocks, tokens, layers, inputs)
    return stream_signal(encoder.blocks, tokens, graph, layers, values, **inputs)


def _stream_scores(blocks: Iterable[Any], tokens: Tensor, layers: Layers, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """Scaled dot products of each chosen block.

    Computed from the weights: BEiT and SimMIM use those of `attn.qkv` without calling it, so that a hook on it
    would see nothing.
    """
    encoder = list(blocks)
    chosen = choose_layers(layers, len(encoder))
    for index, block in enumerate(encoder[: chosen[-1] + 1]):
        if index in chosen:
            yield _scores(block.attn, block.norm1(tokens))
        if index < chosen[-1]:
            tokens = block(tokens, **inputs)


def _scores(attention: Any, tokens: Tensor) -> Tensor:
    """[B, T, D] -> [B, h, T, T]."""
    joined = functional.linear(tokens, attention.qkv.weight, qkv_bias(attention))
    query, key, _ = joined.reshape(*tokens.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return query @ key.transpose(-2, -1) * attention.scale


def replace_random_masking(model: Any, run: PatchedRun) -> None:
    """MAE draws its mask inside the model: `random_masking` of this one model is replaced.

    It is given embeddings, and the mask is made from images (an averaged encoder embeds them itself), so the
    images are kept on the way in.
    """
    encode = model.forward_encoder
    batch: list[Tensor] = []

    def forward_encoder(images: Tensor, mask_ratio: float) -> Any:
        batch[:] = [images]
        return encode(images, mask_ratio)

    def random_masking(tokens: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        return gather_visible(tokens, run.make(model, batch.pop()))

    model.forward_encoder, model.random_masking = forward_encoder, random_masking


def gather_visible(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the official MAE's `random_masking` returns, for a given mask bool [B, N].

    Returns:
        visible tokens [B, V, D], float mask [B, N] with 1 = masked, ids_restore int64 [B, N].
    """
    ids_keep, ids_restore = mae_ids(mask)
    visible = tokens.gather(1, ids_keep[..., None].expand(-1, -1, tokens.shape[2]))
    return visible, mask.float(), ids_restore
