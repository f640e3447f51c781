"""Masked autoencoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

The encoder sees the visible patches only; a small decoder fills mask tokens in at the masked places and predicts
their pixels. Names and shapes of the state dict are those of the official `models_mae.py`
(facebookresearch/mae), so checkpoints move both ways.

B batch   H, W patch grid   N = H*W patches   m masked, V = N - m visible patches   Q predicted patches
D encoder width   E decoder width   p patch size in pixels   C = 3 colours
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.attention import Layers, Values
from common.masks import mae_ids, masked_places
from common.models.block import Attention, Block, LayerNorm, take
from common.models.initialisation import reset_as_mae
from common.models.names import patch_grid
from common.models.positions import sincos_positions
from common.models.timm_layers import PatchEmbed
from common.signals import Graph, stream_signal

ENCODER_FREE_PREFIXES = ("decoder_", "mask_token")
"""State-dict keys that an encoder-only checkpoint lacks begin with one of these."""


class MaskedAutoencoder(nn.Module):
    """MAE with a ViT encoder.

    Args:
        input_size: (height, width) of the images in pixels, multiples of `patch_size`.
        patch_size: p, pixels.
        width, depth, heads: of the encoder.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        norm_pix_loss: predict pixels normalised by the mean and variance of their own patch.

    Raises:
        ValueError: an input size that the patch size does not divide.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        input_size: tuple[int, int] = (224, 224),
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        norm_pix_loss: bool = True,
    ) -> None:
        super().__init__()
        self.grid_size = patch_grid(input_size, patch_size)
        self.patch_size, self.norm_pix_loss = patch_size, norm_pix_loss
        tokens = self.grid_size[0] * self.grid_size[1] + 1

        self.patch_embed = PatchEmbed(input_size, patch_size, 3, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width), requires_grad=False)
        self.blocks = _blocks(depth, width, heads)
        self.norm = LayerNorm(width)

        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width))
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, tokens, decoder_width), requires_grad=False)
        self.decoder_blocks = _blocks(decoder_depth, decoder_width, decoder_heads)
        self.decoder_norm = LayerNorm(decoder_width)
        self.decoder_pred = nn.Linear(decoder_width, patch_size**2 * 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers (the patch embedding counts as one), N(0, 0.02) tokens, fixed positions."""
        reset_as_mae(self, self.patch_embed, (self.cls_token, self.mask_token))
        for positions in (self.pos_embed, self.decoder_pos_embed):
            positions.data.copy_(sincos_positions(self.grid_size, positions.shape[2]))

    # --- images <-> patches ---

    def patchify(self, images: Tensor) -> Tensor:
        """[B, 3, H*p, W*p] -> [B, N, p*p*3], colours innermost."""
        (down, across), size = self.grid_size, self.patch_size
        cut = images.reshape(len(images), 3, down, size, across, size)
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, N, p*p*3] -> [B, 3, H*p, W*p]."""
        (down, across), size = self.grid_size, self.patch_size
        cut = patches.reshape(len(patches), down, across, size, size, 3)
        return cut.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), 3, down * size, across * size)

    # --- encoder ---

    def embed(self, images: Tensor) -> Tensor:
        """Patch embeddings with positions: [B, N, D]."""
        return self.patch_embed(images) + self.pos_embed[:, 1:]

    def embed_patches(self, patches: Tensor, ids_keep: Tensor) -> Tensor:
        """The embeddings of :meth:`embed`, made for some patches of :meth:`patchify` only: [B, V, D]."""
        weight = self.patch_embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # [D, p*p*3]
        tokens = functional.linear(take(patches, ids_keep), weight, self.patch_embed.proj.bias)
        return tokens + functional.embedding(ids_keep + 1, self.pos_embed[0])

    def with_class_token(self, tokens: Tensor) -> Tensor:
        """[B, V, D] -> [B, 1+V, D]."""
        first = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([first.expand(len(tokens), -1, -1), tokens], dim=1)

    def encode(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Latent of the class token and the visible patches `ids_keep` [B, V]: [B, 1+V, D]."""
        return self.encode_tokens(take(self.embed(images), ids_keep))

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Embeddings of the visible patches [B, V, D] -> latent [B, 1+V, D]."""
        tokens = self.with_class_token(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def attention_maps(self, images: Tensor, layers: Layers = "all", values: Values = "softmax") -> Iterator[Tensor]:
        """Attention of the encoder on whole images, one [B, heads, 1+N, 1+N] a block, as the blocks run."""
        return self.signal(images, "attention", layers, values)

    def signal(
        self, images: Tensor, graph: Graph = "attention", layers: Layers = "all", values: Values = "softmax"
    ) -> Iterator[Tensor]:
        """Attention, tokens, queries, keys or values of the encoder on whole images; see :func:`stream_signal`."""
        return stream_signal(self.blocks, self.with_class_token(self.embed(images)), graph, layers, values)

    # --- decoder ---

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Predicted pixels of every patch from the latent [B, 1+V, D]: [B, N, p*p*3]."""
        visible = self.decoder_embed(latent)
        absent = ids_restore.shape[1] + 1 - visible.shape[1]
        blank = self.mask_token.expand(len(visible), absent, -1)
        in_place = take(torch.cat([visible[:, 1:], blank.to(visible.dtype)], dim=1), ids_restore)
        tokens = torch.cat([visible[:, :1], in_place], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def decode_at(self, latent: Tensor, ids_keep: Tensor, places: Tensor) -> Tensor:
        """Predicted pixels of the patches `places` [B, Q] alone, from the latent of those in `ids_keep`: [B, Q, p*p*3].

        Attention does not ask for the order of its tokens, so the predicted patches stand at the end of the row: nothing is
        put in place, and the last block, the norm and the head run on the end alone. Patches in neither list are left out.
        """
        order = torch.cat([torch.zeros_like(ids_keep[:, :1]), ids_keep + 1], dim=1)  # class token, visible patches
        visible = self.decoder_embed(latent) + functional.embedding(order, self.decoder_pos_embed[0])
        blank = self.mask_token + functional.embedding(places + 1, self.decoder_pos_embed[0])
        tokens = torch.cat([visible, blank.to(visible.dtype)], dim=1)
        for block in self.decoder_blocks[:-1]:
            tokens = block(tokens)
        tokens = self.decoder_blocks[-1](tokens, None, slice(visible.shape[1], None))
        return self.decoder_pred(self.decoder_norm(tokens))

    def targets(self, images: Tensor) -> Tensor:
        """Pixels to predict: [B, N, p*p*3], normalised within each patch under `norm_pix_loss`."""
        return self.targets_of(self.patchify(images))

    def targets_of(self, patches: Tensor) -> Tensor:
        """The same from some of the patches of :meth:`patchify`."""
        if not self.norm_pix_loss:
            return patches
        return (patches - patches.mean(dim=2, keepdim=True)) / (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()

    def forward(self, images: Tensor, mask: Tensor, predicted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reconstructs the masked patches.

        Args:
            images: [B, 3, H*p, W*p].
            mask: bool [B, N], True = masked, the same count in every row (common/masks.py).
            predicted: bool [B, N], the masked patches that are predicted and compared, the same count Q in every row; None:
                all patches are predicted, the masked ones compared. The mask itself gives the same loss sooner. Masked
                patches that are not chosen are left out of the decoder.

        Returns:
            The mean squared error over the masked (or the chosen) patches, a scalar, and the prediction [B, N, p*p*3], or that
            of the chosen patches in raster order, [B, Q, p*p*3].
        """
        ids_keep, ids_restore = mae_ids(mask)
        if predicted is None:
            prediction = self.decode(self.encode(images, ids_keep), ids_restore)
            error = (prediction.float() - self.targets(images.float())).square().mean(dim=2)  # [B, N]
            return (error * mask).sum() / mask.sum(), prediction
        places, uneven = masked_places(predicted)
        if uneven is not None:
            raise ValueError("MAE needs the same number of predicted patches in every image")
        patches = self.patchify(images)  # once, for the visible patches and for the targets
        prediction = self.decode_at(self.encode_tokens(self.embed_patches(patches, ids_keep)), ids_keep, places)
        target = self.targets_of(take(patches, places).float())
        return (prediction.float() - target).square().mean(), prediction


def _blocks(depth: int, width: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(Block(Attention(width, heads, fused=True)) for _ in range(depth))


# The sizes of the official code, and ViT-S of the paper's Table 4 (384 wide, 12 deep, 6 heads). The tiny models
# are this project's, for 32-pixel images and for the demo.
MODELS: dict[str, Callable[..., MaskedAutoencoder]] = {
    "mae_vit_tiny_patch4": partial(
        MaskedAutoencoder, patch_size=4, width=192, depth=12, heads=3, decoder_width=128, decoder_depth=4, decoder_heads=4
    ),
    "mae_vit_tiny_patch8": partial(
        MaskedAutoencoder, patch_size=8, width=192, depth=12, heads=3, decoder_width=128, decoder_depth=4, decoder_heads=4
    ),
    "mae_vit_small_patch16": partial(MaskedAutoencoder, width=384, depth=12, heads=6),
    "mae_vit_base_patch16": partial(MaskedAutoencoder, width=768, depth=12, heads=12),
    "mae_vit_large_patch16": partial(MaskedAutoencoder, width=1024, depth=24, heads=16),
    "mae_vit_huge_patch14": partial(MaskedAutoencoder, patch_size=14, width=1280, depth=32, heads=16),
}
