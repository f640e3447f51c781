"""Pre-trains SimMIM with evolved part masking: `python -m simmim_evolved.main_simmim --help`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.mask_config import Strategy
from common.training.command_line import parse_arguments
from common.training.config import Interpolation, LrSchedule, option, with_default
from common.training.data import picture_transform
from common.training.engine import PretrainingMethod, pretrain, reconstruction_loss
from common.training.errors import run_cli
from common.training.geometry import crop_transform
from common.training.mask_token import MaskTokenConfig
from simmim_evolved.model import MODELS

PROGRAM = "main_simmim"
DESCRIPTION = (
    "Pre-train SimMIM (ViT) with evolved part masking, on a CPU, a GPU, or many under torchrun. "
    "Defaults are the paper's Table 4 recipe for ViT-S, 200 epochs; its effective batch is 2048."
)


@dataclass(frozen=True)
class SimMIMConfig(MaskTokenConfig):
    """Flags of SimMIM. Defaults: the official ViT recipe (800 epochs, step at 700), its shares kept at 200 epochs."""

    models: ClassVar[Mapping[str, Any]] = MODELS
    official_mask: ClassVar[Strategy] = "random-units"

    model: str = option("simmim_vit_small_patch16", f"one of {', '.join(MODELS)}", group="model")
    mask_ratio: float = option(
        0.6, "share of patches that are masked; with --mask random-units, of units, rounded up", group="model"
    )
    crop_scale: tuple[float, float] = with_default(MaskTokenConfig, "crop_scale", (0.67, 1.0))
    interpolation: Interpolation = with_default(MaskTokenConfig, "interpolation", "bilinear")
    blr: float = with_default(MaskTokenConfig, "blr", 1e-4)
    blr_batch: int = with_default(MaskTokenConfig, "blr_batch", 512)
    warmup_epochs: float = with_default(MaskTokenConfig, "warmup_epochs", 10)
    warmup_start: float = with_default(MaskTokenConfig, "warmup_start", 0.005)
    lr_schedule: LrSchedule = with_default(MaskTokenConfig, "lr_schedule", "multistep")
    clip_grad: float | None = with_default(MaskTokenConfig, "clip_grad", 5.0)


def build(config: SimMIMConfig) -> PretrainingMethod:
    """SimMIM as the training loop takes it."""
    model = MODELS[config.model](**config.encoder)
    return PretrainingMethod(
        name="SimMIM",
        model=model,
        loss=reconstruction_loss,
        transform=crop_transform(config),
        picture_transform=picture_transform(config),
        not_in_attention=("decoder",),
        may_miss=("decoder.",),
        blocks=model.encoder.blocks,
    )


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config, mask_config = parse_arguments(SimMIMConfig, PROGRAM, DESCRIPTION, argv)
    pretrain(config, mask_config, lambda: build(config))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
