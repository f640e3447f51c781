"""What the official MAE, BEiT and SimMIM code expects of libraries of its day, one function each.

Today is torch 2.14, numpy 2 and timm 0.4.12. Each shim looks first whether it is needed, and changes nothing if not;
a second call finds its own work and stops. :data:`SHIMS` says which upstream needs which.
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
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import auto_augment, mixup
from timm.models.vision_transformer import Block
from torch import nn
from torchvision.transforms import functional as transforms


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
    """Checkpoints hold the script's arguments, and BEiT's numpy numbers: torch.load refuses both since 2.6.

    Those plain classes are allowed, nothing else: a checkpoint still cannot run code. Can go when the upstreams
    save a dict and floats.
    """
    number = np.float64(0)
    make_number: Any = number.__reduce__()[0]
    before_numpy_2 = (make_number, "numpy.core.multiarray.scalar")
    torch.serialization.add_safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath])
    torch.serialization.add_safe_globals([make_number, before_numpy_2, np.dtype, type(number.dtype)])


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
    has_flag = any(word.split("=")[0] == "--local_rank" for word in sys.argv)
    if not has_flag and "LOCAL_RANK" in os.environ:
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


def shim_posterize() -> None:
    """Pillow 13 refuses to keep 0 bits of a colour, which timm's RandAugment asks for at its strongest: black, as before.

    With the magnitude 9 +- 0.5 of the official recipes for fine-tuning some images ask for it, and end the run. Can go
    when the upstreams use a timm that keeps one bit at least.
    """
    plain = auto_augment.posterize
    try:
        plain(Image.new("L", (1, 1)), 0)
    except ValueError:

        def posterize(image: Image.Image, bits_to_keep: int, **settings: Any) -> Image.Image:
            kept: Image.Image = plain(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)
            return kept

        auto_augment.posterize = posterize
        operations = auto_augment.NAME_TO_OP
        operations.update({name: posterize for name, operation in operations.items() if operation is plain})


@_without_cuda
def shim_mixup_device() -> None:
    """timm's mixup, which fine-tuning mixes labels with, puts them on CUDA unless told otherwise; no upstream tells it.

    Can go when the upstreams use a timm that asks where the labels are.
    """
    if not isinstance(mixup.mixup_target, functools.partial):
        mixup.mixup_target = functools.partial(mixup.mixup_target, device="cpu")


def _nothing(*args: Any, **options: Any) -> None:
    return None


def _same(value: Any, *args: Any, **options: Any) -> Any:
    return value


def shim_apex_amp() -> None:
    """SimMIM's mixed precision is `apex.amp`, deprecated (NVIDIA/apex#1214): bf16 autocast stands in where it is missing.

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
        shim_local_rank, shim_cuda_calls, shim_posterize, shim_mixup_device,
    ),
    "beit": (
        shim_torch_six, shim_numpy_aliases, shim_torch_load, shim_dall_e_load, shim_local_rank, shim_cuda_calls,
        shim_loss_scale, shim_posterize, shim_mixup_device,
    ),
    "simmim": (
        shim_torch_load_yacs, shim_required_local_rank, shim_cuda_calls, shim_cuda_only_script, shim_apex_amp,
        shim_posterize, shim_mixup_device,
    ),
}  # fmt: skip
"""The shims of each upstream, in the order in which they are applied."""
