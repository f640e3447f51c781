"""Pre-trains a masked autoencoder with evolved part masking: `python -m mae_evolved.main_pretrain --help`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from common.training.command_line import parse_arguments
from common.training.config import FormerFlag, TrainConfig, option
from common.training.data import picture_transform
from common.training.engine import PretrainingMethod, pretrain
from common.training.engine import reconstruction_loss as _loss
from common.training.errors import run_cli
from common.training.geometry import crop_transform
from mae_evolved.model import ENCODER_FREE_PREFIXES, MODELS

PROGRAM = "main_pretrain"
DESCRIPTION = (
    "Pre-train a masked autoencoder (MAE) with evolved part masking, on a CPU, a GPU, or many under torchrun. "
    "Defaults are the paper's Table 4 recipe for ViT-S, 200 epochs; its effective batch is 4096."
)


@dataclass(frozen=True)
class MAEConfig(TrainConfig):
    """Flags of MAE."""

    models: ClassVar[Mapping[str, Any]] = MODELS
    former_flags: ClassVar[dict[str, FormerFlag]] = {
        "attention_pass": FormerFlag("own", "is for BEiT and SimMIM: MAE's training step does not see masked patches"),
    }

    model: str = option("mae_vit_small_patch16", f"one of {', '.join(MODELS)}", group="model")
    norm_pix_loss: bool = option(True, "predict pixels normalised within their patch", group="model")
    decode_share: float = option(
        1.0,
        "share of an image's masked patches that the decoder sees and predicts, drawn anew in each epoch; below 1 the step is "
        "cheaper and no longer MAE's (docs/method.md)",
        group="model",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("decode_share", 0 < self.decode_share <= 1, "must be above 0 and at most 1")


def build(config: MAEConfig) -> PretrainingMethod:
    """MAE as the training loop takes it."""
    return PretrainingMethod(
        name="MAE",
        model=MODELS[config.model](input_size=config.image_size, norm_pix_loss=config.norm_pix_loss),
        loss=_loss,
        transform=crop_transform(config),
        picture_transform=picture_transform(config),
        not_in_attention=("decoder_embed", "decoder_blocks", "decoder_norm", "decoder_pred"),
        may_miss=ENCODER_FREE_PREFIXES,
        decode_share=config.decode_share,
    )


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config, mask_config = parse_arguments(MAEConfig, PROGRAM, DESCRIPTION, argv)
    pretrain(config, mask_config, lambda: build(config))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
