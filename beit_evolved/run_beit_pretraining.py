"""Pre-trains BEiT with evolved part masking: `python -m beit_evolved.run_beit_pretraining --help`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as pictures

from beit_evolved.model import MODELS
from beit_evolved.tokenizer import Tokenizer, collapse_warning, fingerprint, load_tokenizer
from common.mask_config import Strategy
from common.training.augment import Box, Jitter, cut, draw_crop, draw_flip
from common.training.command_line import parse_arguments
from common.training.config import option, with_default
from common.training.data import Batch, picture_transform
from common.training.engine import PretrainingMethod, pretrain
from common.training.errors import run_cli
from common.training.geometry import Located, geometry_of
from common.training.mask_token import MaskTokenConfig

PROGRAM = "run_beit_pretraining"
DESCRIPTION = (
    "Pre-train BEiT with evolved part masking, on a CPU, a GPU, or many under torchrun. It needs a tokenizer: "
    "OpenAI's encoder.pkl, or one of beit_evolved.train_tokenizer. "
    "Defaults are the paper's Table 4 recipe for ViT-S, 200 epochs; its effective batch is 2048."
)


@dataclass(frozen=True)
class BEiTConfig(MaskTokenConfig):
    """Flags of BEiT. Defaults: the official ImageNet-1K recipe; the learning rate is its 1.5e-3 at batch 2048."""

    models: ClassVar[Mapping[str, Any]] = MODELS
    official_mask: ClassVar[Strategy] = "block-official"

    model: str = option("beit_small_patch16_224_8k_vocab", f"one of {', '.join(MODELS)}", group="model")
    tokenizer: str = option(
        "",
        "OpenAI's encoder.pkl, a pytorch_model.bin of train_tokenizer, or a folder that holds one; needed",
        group="model",
    )
    mask_ratio: float = with_default(MaskTokenConfig, "mask_ratio", 0.383)  # floor(196 * 0.383) = 75
    color_jitter: float = option(0.4, "strength of the jitter of brightness, contrast and saturation", group="data")
    crop_scale: tuple[float, float] = with_default(MaskTokenConfig, "crop_scale", (0.08, 1.0))
    blr: float = with_default(MaskTokenConfig, "blr", 1.5e-3)
    blr_batch: int = with_default(MaskTokenConfig, "blr_batch", 2048)
    min_lr: float = with_default(MaskTokenConfig, "min_lr", 1e-5)
    warmup_epochs: float = with_default(MaskTokenConfig, "warmup_epochs", 10)
    clip_grad: float | None = with_default(MaskTokenConfig, "clip_grad", 3.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("tokenizer", bool(self.tokenizer), "must name a tokenizer's file or folder (see train_tokenizer)")
        self._at_least(0, "color_jitter")


class TwoViews:
    """One random crop at two sizes: for the encoder, and, by a Lanczos filter, for the tokenizer.

    Colour jitter and flip come first, as in the official code; where torch crops, the box is mirrored in their place, and
    only what lies in it takes new colours. All random numbers come from torch's generator.

    Args:
        config: sizes and strengths.
        second_size: (height, width) of the tokenizer's view.
    """

    draws_from_torch = True

    def __init__(self, config: BEiTConfig, second_size: tuple[int, int]) -> None:
        self.jitter, self.flip, self.scale = Jitter(config.color_jitter), config.flip, config.crop_scale
        self.located = config.keeps_parts
        self.first_size, self.second_size = config.image_size, second_size
        self.interpolation = config.interpolation

    def __call__(self, image: Image.Image | Tensor) -> tuple[Tensor, Tensor] | Located:
        """Views uint8 [3, H*p, W*p] and [3, H*stride, W*stride]; with their place where parts are kept."""
        drawn = self.jitter.draw()
        flipped = draw_flip(self.flip)
        if isinstance(image, Image.Image):
            image = self.jitter.whole(image, drawn)
            image = pictures.hflip(image) if flipped else image
        box = draw_crop(image, self.scale)
        views = self._of_picture(image, box) if isinstance(image, Image.Image) else self._of_bytes(image, box, flipped, drawn)
        return Located(views, geometry_of(box, image, flipped, flipped_first=True)) if self.located else views

    def _of_picture(self, image: Image.Image, box: Box) -> tuple[Tensor, Tensor]:
        return cut(image, box, self.first_size, self.interpolation), cut(image, box, self.second_size, "lanczos")

    def _of_bytes(self, image: Tensor, box: Box, mirrored: bool, drawn: list[tuple[str, float]]) -> tuple[Tensor, Tensor]:
        """The same of an image whose colours are still to be changed, and that is not mirrored yet."""
        top, left, height, width = box
        if mirrored:
            left = image.shape[2] - left - width
        if drawn:
            image, top, left = self.jitter.part(image, (top, left, height, width), drawn), 0, 0
        place = (top, left, height, width)
        first = cut(image, place, self.first_size, self.interpolation, mirrored)
        return first, cut(image, place, self.second_size, "lanczos", mirrored)


class TokenLoss:
    """Cross-entropy between the predicted and the tokenizer's codes of the masked patches, the mean over them.

    Under a strategy that masks fewer patches in some images, each rank averages over its own masked patches, as
    the official code does.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, model: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
        images, views = batch.views
        labels = self.labels(views)[mask]
        return functional.cross_entropy(model(images, mask).float(), labels)

    def labels(self, views: Tensor) -> Tensor:
        """Codes of the tokenizer's views, in full precision: int64 [B, N]."""
        tokenizer = self.tokenizer.to(views.device)
        with torch.autocast(views.device.type, enabled=False):
            return tokenizer.codes(views).flatten(1)


def build(config: BEiTConfig) -> PretrainingMethod:
    """BEiT as the training loop takes it. The head has as many outputs as the tokenizer has codes."""
    tokenizer = load_tokenizer(config.tokenizer)
    height, width = config.grid_size
    model = MODELS[config.model](vocabulary=tokenizer.vocabulary, **config.encoder)
    return PretrainingMethod(
        name="BEiT",
        model=model,
        loss=TokenLoss(tokenizer),
        transform=TwoViews(config, (height * tokenizer.stride, width * tokenizer.stride)),
        picture_transform=picture_transform(config),
        not_in_attention=("lm_head",),
        may_miss=("lm_head.",),
        notes=(collapse_warning(tokenizer.usage, tokenizer.vocabulary),),
        blocks=model.blocks,
        facts={"tokenizer_sha256": fingerprint(config.tokenizer), "vocabulary": tokenizer.vocabulary},
    )


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config, mask_config = parse_arguments(BEiTConfig, PROGRAM, DESCRIPTION, argv)
    pretrain(config, mask_config, lambda: build(config))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
