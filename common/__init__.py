"""Evolved part masking: the method, installed as `evolved_part_masking`; `evolved_mask` is its front door.

    from evolved_part_masking import AttentionTap, EvolvedMask

docs/api.md says which names are stable. In a checkout this folder is `common`, and holds beside the method what trainers
share, which is not installed. Names are imported when they are first asked for, so that commands without a model
(applying patches, composing scenes) do not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import AttentionTap, attention_mode, choose_layers, patch_graph, stream_attention
    from .evolved_mask import (
        EvolvedMask,
        MaskBatch,
        alpha_at,
        blend,
        grid_probability,
        num_parts_at,
        part_probability,
        select_masked,
    )
    from .mask_config import MaskConfig
    from .masks import check_mask, count_masked, mae_ids, pixel_mask
    from .parts import PartsFit, PartsOptions, fit_parts, partition_parts
    from .signals import signal_graph, stream_signal

__version__ = "0.1.0"

__all__ = [
    "AttentionTap", "EvolvedMask", "MaskBatch", "MaskConfig", "PartsFit", "PartsOptions", "__version__", "alpha_at",
    "attention_mode", "blend", "check_mask", "choose_layers", "count_masked", "fit_parts", "grid_probability", "mae_ids",
    "num_parts_at", "part_probability", "partition_parts", "patch_graph", "pixel_mask", "select_masked", "signal_graph",
    "stream_attention", "stream_signal",
]  # fmt: skip

_MODULES = {"check_mask": "masks", "mae_ids": "masks", "pixel_mask": "masks"}
"""Where a name is that the front door does not have."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES.get(name, 'evolved_mask')}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
