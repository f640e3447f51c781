"""Flags that BEiT and SimMIM share: both train the encoder of common/models/mask_token_encoder.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from common.training.config import TrainConfig, option, with_default


@dataclass(frozen=True)
class MaskTokenConfig(TrainConfig):
    """Training flags of an encoder with a mask token. Every count of masked patches fits it, also uneven ones."""

    uneven_masks: ClassVar[bool] = True

    beta2: float = with_default(TrainConfig, "beta2", 0.999)
    drop_path: float = option(0.1, "drop path of the last block, growing linearly from 0 at the first", group="model")
    layer_scale_init_value: float | None = option(
        None, "first value of the layer scale, 0: none; default: 0.1, and 1e-5 for beit_large", group="model"
    )

    attention_pass: Literal["own", "training"] = option(
        "own",
        "what parts are made from: a pass of their own, or the attention of the training step, which sees every position, "
        "for the image's next visit (docs/method.md)",
        group="kept parts",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("drop_path", 0 <= self.drop_path < 1, "must be in [0, 1)")
        scale = self.layer_scale_init_value
        self._require("layer_scale_init_value", scale is None or scale >= 0, "must be 0 or more")

    @property
    def reads_step(self) -> bool:
        return self.attention_pass == "training"

    @property
    def encoder(self) -> dict[str, object]:
        """Arguments of the model that come from flags."""
        chosen: dict[str, object] = {"input_size": self.image_size, "drop_path": self.drop_path}
        if self.layer_scale_init_value is not None:
            chosen["layer_scale"] = self.layer_scale_init_value
        return chosen
