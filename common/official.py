"""The official MAE, BEiT and SimMIM code: the calls that patches insert into it, and what lets it run today.

Patches (patches/README.md) insert single calls; all they do is here. In the order in which a patched script makes
them:

    prepare(upstream)                            before anything is imported that no longer imports: the shims
    add_small_model(module)                      ViT-S of the paper's Table 4 under an official name
    add_arguments(parser)                        --mask and the other flags of the method
    check_arguments(args)                        bad values die before data, model or GPU are touched
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
import contextlib
import functools
import importlib
import inspect
import os
import pathlib
import pickle
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import timm
import torch
from timm.models.registry import register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as transforms

from common.attention import Layers, Values, attention_mode, choose_layers, stream_attention
from common.draws import Stream, hash_seed
from common.evolved_mask import EvolvedMask
from common.mask_config import MaskConfig
from common.masks import count_masked, mae_ids
from common.training.config import add_mask_flags
from common.training.optim import EncoderEMA

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
    """Adds ViT-S (384 wide, 12 deep, 6 heads) to the official module of pre-training models.

    MAE looks its models up in the module; BEiT asks timm's registry. SimMIM takes sizes from its YAML file, see
    patches/configs.
    """
    sizes = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4}
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    if hasattr(module, "MaskedAutoencoderViT"):
        decoder = {"decoder_embed_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
        small = functools.partial(module.MaskedAutoencoderViT, **sizes, **decoder, norm_layer=norm)
        vars(module).setdefault("mae_vit_small_patch16", small)
        return

    def beit_small_patch16_224_8k_vocab(pretrained: bool = False, **options: Any) -> nn.Module:
        model: nn.Module = module.VisionTransformerForMaskedImageModeling(
            **sizes, qkv_bias=True, norm_layer=norm, vocab_size=8192, **options
        )
        return model

    if not hasattr(module, "beit_small_patch16_224_8k_vocab"):
        beit_small_patch16_224_8k_vocab.__module__ = module.__name__  # timm files it under the official module
        module.beit_small_patch16_224_8k_vocab = register_model(beit_small_patch16_224_8k_vocab)  # type: ignore[attr-defined]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the mask. Of those, the namespace holds only what was given."""
    add_mask_flags(parser)
    action = next(one for one in parser._actions if one.dest == "mask")
    action.choices = (*(action.choices or ()), OFFICIAL)
    action.help = f"{action.help}; {OFFICIAL}: the masks of the unpatched script, bit for bit"


def check_arguments(args: argparse.Namespace, config: Any = None) -> None:
    """Stops on an unusable value of a mask flag, with one line.

    Args:
        config: SimMIM's configuration, which its training loop gets in place of the arguments; the mask's choices
            are written into it, and so into its config.json and checkpoints.
    """
    mask_config(vars(args))
    if config is not None and not _wants_official(vars(args)):
        config.defrost()
        config.EVOLVED_MASK = type(config)(_mask_options(vars(args)))
        config.freeze()


def attach(upstream: str, model: nn.Module, settings: Any, optimizer: torch.optim.Optimizer) -> None:
    """Makes the masks of this run, unless --mask official.

    Args:
        upstream: "mae", "beit" or "simmim".
        model: the official model, on its device, without DistributedDataParallel.
        settings: the script's arguments (MAE, BEiT) or configuration (SimMIM).
        optimizer: of the run; its steps move the average of `--attention_from ema`.
    """
    wanted = READERS[upstream](settings)
    if _wants_official(wanted.options):
        return
    config = mask_config(wanted.options)
    encoder = encoder_of(model)
    for name in ("patch_embed", "cls_token", "blocks"):
        if not hasattr(encoder, name):
            _refuse(f"evolved masks need a ViT encoder, and {type(encoder).__name__} has no {name} (use --mask {OFFICIAL})")
    try:
        grid_size = _grid_size(encoder.patch_embed)
        num_masked = wanted.count(grid_size[0] * grid_size[1])
        mask = EvolvedMask(grid_size, num_masked, wanted.total_epochs, config, seed=wanted.seed)
    except ValueError as error:
        _refuse(str(error))
    run = PatchedRun(mask, encoder, wanted.autocast)
    if run.ema is not None:
        optimizer.register_step_post_hook(lambda *_: run.follow(encoder))
    if upstream == "mae":
        replace_random_masking(model, run)
    RUNS[model] = run
    _say(f"evolved masks: {config.mask}, {num_masked} of {grid_size[0]}x{grid_size[1]} patches, {wanted.total_epochs} epochs")


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
        lower: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.autocast is not None and images.is_cuda:
            lower = torch.autocast("cuda", dtype=self.autocast)
        with attention_mode(source, config.attention_mode), lower:
            return self.mask(
                images, lambda rows: attention_maps(source, rows, config.chosen_layers, config.attention_values)
            ).mask

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
            kept = state["ema"] if state is not None else None
            self.ema.model.load_state_dict(kept or encoder.state_dict(), strict=kept is not None)


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
class Wanted:
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


def _read_mae(args: Any) -> Wanted:
    return Wanted(vars(args), args.epochs, args.seed, lambda patches: count_masked(patches, args.mask_ratio), None)


def _read_beit(args: Any) -> Wanted:
    return Wanted(vars(args), args.epochs, args.seed, lambda patches: int(args.num_mask_patches), torch.float16)


def _read_simmim(config: Any) -> Wanted:
    """Without :func:`check_arguments` having written the choices, the masks stay the official ones."""
    options = dict(config.EVOLVED_MASK) if "EVOLVED_MASK" in config else {"mask": OFFICIAL}
    lower = None if config.AMP_OPT_LEVEL == "O0" else torch.bfloat16
    return Wanted(options, config.TRAIN.EPOCHS, config.SEED, lambda patches: count_masked(patches, config.DATA.MASK_RATIO), lower)


READERS: dict[str, Callable[[Any], Wanted]] = {"mae": _read_mae, "beit": _read_beit, "simmim": _read_simmim}


def _mask_options(options: dict[str, Any]) -> dict[str, Any]:
    """The mask's own entries among a script's arguments."""
    names = {"recipe", *(one.name for one in fields(MaskConfig))}
    return {name: value for name, value in options.items() if name in names}


def _wants_official(options: dict[str, Any]) -> bool:
    return options.get("mask") == OFFICIAL


def mask_config(options: dict[str, Any]) -> MaskConfig:
    """The mask's configuration from a script's arguments; stops on an unusable one with one line."""
    chosen = _mask_options(options)
    if _wants_official(chosen):
        del chosen["mask"]
    try:
        return MaskConfig.from_recipe(chosen.pop("recipe", "paper"), **chosen)
    except ValueError as error:
        _refuse(f"--{error}")


# --- Attention of the official encoders --------------------------------------------------------------------------


def encoder_of(model: nn.Module) -> Any:
    """The module with patch embedding, class token and blocks: SimMIM wraps it, MAE and BEiT are it."""
    return getattr(_bare(model), "encoder", _bare(model))


def _grid_size(patch_embed: Any) -> tuple[int, int]:
    """(H, W); timm and BEiT's descendants call their image and patch sizes alike."""
    (height, width), (down, across) = patch_embed.img_size, patch_embed.patch_size
    return height // down, width // across


def attention_maps(encoder: Any, images: Tensor, layers: Layers = "all", values: Values = "softmax") -> Iterable[Tensor]:
    """Attention of an official encoder on whole images, nothing masked: one [B, h, T, T] for each chosen block.

    Position embeddings are added where the model has them, the shared relative position bias likewise.
    """
    patches = encoder.patch_embed(images)  # [B, N, D]
    tokens = torch.cat([encoder.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    shared_bias = getattr(encoder, "rel_pos_bias", None)
    inputs = {} if shared_bias is None else {"rel_pos_bias": shared_bias()}
    if values == "scores":
        return _stream_scores(encoder.blocks, tokens, layers, inputs)
    return stream_attention(encoder.blocks, tokens, layers, values, **inputs)


def _stream_scores(blocks: Iterable[Any], tokens: Tensor, layers: Layers, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
    """Scaled dot products of each chosen block.

    Computed from the weights: BEiT and SimMIM use those of `attn.qkv` without calling it, so that a hook on it
    would see nothing.
    """
    every = list(blocks)
    chosen = choose_layers(layers, len(every))
    for index, block in enumerate(every[: chosen[-1] + 1]):
        if index in chosen:
            yield _scores(block.attn, block.norm1(tokens))
        if index < chosen[-1]:
            tokens = block(tokens, **inputs)


def _scores(attention: Any, tokens: Tensor) -> Tensor:
    """[B, T, D] -> [B, h, T, T]."""
    bias = attention.qkv.bias
    if getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias])
    joined = functional.linear(tokens, attention.qkv.weight, bias)
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


# --- Shims: what the official code expects of libraries of its day -----------------------------------------------
#
# Each looks first whether it is needed, and changes nothing if not; a second call finds its own work and stops.


def shim_torch_six() -> None:
    """`from torch._six import inf` (facebookresearch/mae#149): torch 1.13 took the module away.

    Can go when the upstream imports `inf` from torch or math.
    """
    try:
        importlib.import_module("torch._six")
    except ImportError:
        stand_in = types.ModuleType("torch._six")
        stand_in.inf = float("inf")  # type: ignore[attr-defined]
        sys.modules["torch._six"] = stand_in


class _Version(str):
    """A version that is also equal to the one an assert asks for; it prints, sorts and splits as what it is."""

    asked_for = "0.3.2"

    def __eq__(self, other: object) -> bool:
        return other == self.asked_for or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


def shim_timm_version() -> None:
    """`assert timm.__version__ == "0.3.2"` (facebookresearch/mae#17, #58): that timm imports torch._six itself.

    Can go when the upstream drops the assert.
    """
    if timm.__version__ != _Version.asked_for:
        timm.__version__ = _Version(timm.__version__)


def shim_qk_scale() -> None:
    """`Block(..., qk_scale=None)` (facebookresearch/mae#58, #219): timm 0.4.12 has no such argument.

    None is the default it always had, and is dropped; any other value is refused. Can go when the upstream does
    not pass it.
    """
    if "qk_scale" in inspect.signature(Block.__init__).parameters:
        return
    plain = Block.__init__

    def init(self: Any, *args: Any, qk_scale: None = None, **options: Any) -> None:
        if qk_scale is not None:
            raise TypeError(f"timm {timm.__version__} has no qk_scale, got {qk_scale!r}")
        plain(self, *args, **options)

    Block.__init__ = init


def shim_numpy_aliases() -> None:
    """`np.float`, `np.int` (facebookresearch/mae pull request 202): gone since numpy 1.24; they were Python's own.

    Can go when the upstream writes float and int.
    """
    for name, plain in (("float", float), ("int", int)):
        if name not in vars(np):
            setattr(np, name, plain)


def shim_image_size() -> None:
    """MAE's linear probe calls torchvision's private `_get_image_size`, which has been `get_image_size` since 0.13.

    Can go when the upstream uses the public name.
    """
    if not hasattr(transforms, "_get_image_size"):
        vars(transforms)["_get_image_size"] = transforms.get_image_size


def shim_torch_load() -> None:
    """Checkpoints hold the script's arguments, which torch.load refuses since 2.6 (weights_only).

    Those plain classes are allowed, nothing else: a checkpoint still cannot run code. Can go when the upstream
    saves a dict.
    """
    torch.serialization.add_safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath])


def shim_dall_e_load() -> None:
    """DALL-E's tokenizer is published as a pickled network, refused by torch.load since 2.6: its classes are allowed.

    They are imported from BEiT's own folder `dall_e`. Can go when BEiT loads a state dict.
    """
    try:
        names = [importlib.import_module(f"dall_e.{name}") for name in ("encoder", "decoder", "utils")]
    except ImportError:  # not in BEiT's folder, or without its requirements: its own import will say so
        return
    parts = [vars(module)[name] for module in names for name in DALL_E_CLASSES if name in vars(module)]
    layers = (nn.Sequential, nn.ReLU, nn.Identity, nn.MaxPool2d, nn.Upsample)
    torch.serialization.add_safe_globals([*parts, *layers])


DALL_E_CLASSES = ("Encoder", "EncoderBlock", "Decoder", "DecoderBlock", "Conv2d")


class _ListedUnpickler(pickle.Unpickler):
    """Reads tensors, plain containers and SimMIM's configuration; any other global in the file is refused."""

    listed = frozenset((
        ("collections", "OrderedDict"), ("collections", "Counter"), ("collections", "defaultdict"),
        ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"), ("yacs.config", "CfgNode"),
        ("__builtin__", "set"), ("builtins", "set"),
    ))  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.listed:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")


def shim_torch_load_yacs() -> None:
    """SimMIM's checkpoints hold a yacs configuration, a dict of a kind that torch.load cannot be told to allow.

    So its torch.load reads with a list of its own, on which nothing can run code. Can go when SimMIM saves a dict.
    """
    plain = torch.load
    if getattr(plain, "shim", False):
        return
    listed = types.ModuleType("listed_pickle")
    vars(listed).update({**vars(pickle), "__name__": "listed_pickle", "Unpickler": _ListedUnpickler})

    @functools.wraps(plain)
    def load(file: Any, *args: Any, **options: Any) -> Any:
        if not args and not {"weights_only", "pickle_module"} & set(options):
            options |= {"weights_only": False, "pickle_module": listed}
        return plain(file, *args, **options)

    load.shim = True  # type: ignore[attr-defined]
    torch.load = load  # type: ignore[assignment]


def shim_local_rank() -> None:
    """torch.distributed.launch passes --local-rank since 2.0, and the official parsers know --local_rank.

    (pengzhiliang/MAE-pytorch#101.) Can go when the upstreams accept both.
    """
    sys.argv[1:] = [
        word.replace("--local-rank", "--local_rank", 1) if word.split("=")[0] == "--local-rank" else word for word in sys.argv[1:]
    ]


def shim_required_local_rank() -> None:
    """SimMIM requires --local_rank, which torchrun gives in the environment. Can go when SimMIM reads it there."""
    shim_local_rank()
    given = any(word.split("=")[0] == "--local_rank" for word in sys.argv)
    if not given and "LOCAL_RANK" in os.environ:
        sys.argv.append(f"--local_rank={os.environ['LOCAL_RANK']}")


def _without_cuda(change: Callable[[], None]) -> Callable[[], None]:
    """A shim for machines without a GPU only: with one, nothing is touched."""

    @functools.wraps(change)
    def shim() -> None:
        if not torch.cuda.is_available():
            change()

    return shim


@_without_cuda
def shim_cuda_calls() -> None:
    """`torch.cuda.synchronize()` after every step raises without a GPU. Can go when the upstreams ask first."""
    torch.cuda.synchronize = _nothing


@_without_cuda
def shim_loss_scale() -> None:
    """BEiT logs `scaler.state_dict()["scale"]`, which a scaler that is off (no GPU) does not have."""
    plain = torch.amp.GradScaler.state_dict
    if getattr(plain, "shim", False):
        return

    def state_dict(self: torch.amp.GradScaler) -> dict[str, Any]:
        return plain(self) or {"scale": 1.0}

    state_dict.shim = True  # type: ignore[attr-defined]
    torch.amp.GradScaler.state_dict = state_dict  # type: ignore[method-assign]


@_without_cuda
def shim_cuda_only_script() -> None:
    """SimMIM's main moves to CUDA without asking, and joins its processes by NCCL: on a CPU stay, and use gloo."""
    torch.cuda.set_device = _nothing
    torch.Tensor.cuda = nn.Module.cuda = _same  # type: ignore[assignment, method-assign]
    parallel, join = nn.parallel.DistributedDataParallel, torch.distributed.init_process_group
    if getattr(join, "shim", False):
        return
    wrap = parallel.__init__

    def init(self: Any, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        wrap(self, module, **options)

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        join("gloo" if backend == "nccl" else backend, **options)

    init_process_group.shim = True  # type: ignore[attr-defined]
    parallel.__init__ = init  # type: ignore[method-assign, assignment]
    torch.distributed.init_process_group = init_process_group  # type: ignore[assignment]


def _nothing(*args: Any, **options: Any) -> None:
    return None


def _same(value: Any, *args: Any, **options: Any) -> Any:
    return value


def shim_apex_amp() -> None:
    """SimMIM's mixed precision is `apex.amp`, which NVIDIA gave up: bf16 autocast stands in where it is missing.

    bf16 has the range of fp32, so there is no loss scale to keep. On a machine without a GPU precision stays fp32.
    Can go when SimMIM uses torch.amp.
    """
    try:
        importlib.import_module("apex.amp")
    except ImportError:
        apex, amp = types.ModuleType("apex"), types.ModuleType("apex.amp")
        vars(amp).update(
            initialize=_amp_initialize,
            scale_loss=lambda loss, optimizer: contextlib.nullcontext(loss),
            master_params=lambda optimizer: (value for group in optimizer.param_groups for value in group["params"]),
            state_dict=dict,
            load_state_dict=_nothing,
        )
        apex.amp = amp  # type: ignore[attr-defined]
        sys.modules.update({"apex": apex, "apex.amp": amp})


def _amp_initialize(model: nn.Module, optimizer: torch.optim.Optimizer, opt_level: str = "O1") -> tuple[Any, Any]:
    plain = model.forward

    def forward(*args: Any, **options: Any) -> Any:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
            return plain(*args, **options)

    model.forward = forward
    return model, optimizer


SHIMS: dict[str, tuple[Callable[[], None], ...]] = {
    "mae": (
        shim_torch_six, shim_timm_version, shim_qk_scale, shim_numpy_aliases, shim_image_size, shim_torch_load,
        shim_local_rank, shim_cuda_calls,
    ),
    "beit": (
        shim_torch_six, shim_numpy_aliases, shim_torch_load, shim_dall_e_load, shim_local_rank, shim_cuda_calls,
        shim_loss_scale,
    ),
    "simmim": (shim_torch_load_yacs, shim_required_local_rank, shim_cuda_calls, shim_cuda_only_script, shim_apex_amp),
}  # fmt: skip
"""The shims of each upstream, in the order in which they are applied."""
