"""BEiT (Bao et al., "BEiT: BERT Pre-Training of Image Transformers", ICLR 2022).

The encoder sees a mask token in the place of every masked patch; a linear head predicts the visual token of each,
a class of the tokenizer's codebook. Names and shapes of the state dict are those of the official
`modeling_pretrain.py` (microsoft/unilm, folder beit), so checkpoints move both ways.

B batch   H, W patch grid   N = H*W patches   Q most masked patches of an image   M those of the whole batch
D width   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from common.masks import masked_places
from common.models.initialisation import init_normal
from common.models.mask_token_encoder import MaskTokenEncoder

VOCABULARY = 8192
"""Codes of the DALL-E tokenizer, and of BEiT's own."""


class BEiT(MaskTokenEncoder):
    """Masked patches -> logits over visual tokens.

    Args:
        vocabulary: V, codes of the tokenizer.
        encoder: sizes of the encoder, see :class:`MaskTokenEncoder`.
    """

    def __init__(self, vocabulary: int = VOCABULARY, **encoder: Any) -> None:
        super().__init__(**encoder)
        self.lm_head = nn.Linear(self.width, vocabulary)
        init_normal(self.lm_head.weight)
        nn.init.zeros_(self.lm_head.bias)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predicts the visual tokens of the masked patches.

        Args:
            images: [B, 3, H*p, W*p].
            mask: bool [B, N], True = masked; counts may differ between images.

        Returns:
            Logits [M, V]: the masked patches of the first image in raster order, then those of the second, ...
        """
        places, real = masked_places(mask)
        tokens = self.encode(images, mask, places)  # [B, Q, D]
        return self.lm_head(tokens.flatten(0, 1) if real is None else tokens[real])


# BEiT-B and -L as in the official code (its recipe for -L starts layer scale at 1e-5), and ViT-S of the paper's
# Table 4. The tiny model is this project's, for 32-pixel images and for the demo.
MODELS: dict[str, Callable[..., BEiT]] = {
    "beit_tiny_patch4_8k_vocab": partial(BEiT, patch_size=4, width=192, depth=12, heads=3),
    "beit_tiny_patch8_8k_vocab": partial(BEiT, patch_size=8, width=192, depth=12, heads=3),
    "beit_small_patch16_224_8k_vocab": partial(BEiT, patch_size=16, width=384, depth=12, heads=6),
    "beit_base_patch16_224_8k_vocab": partial(BEiT, patch_size=16, width=768, depth=12, heads=12),
    "beit_large_patch16_224_8k_vocab": partial(BEiT, patch_size=16, width=1024, depth=24, heads=16, layer_scale=1e-5),
}
