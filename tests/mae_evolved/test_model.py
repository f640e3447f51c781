"""The MAE model: layout of its state dict, values against an independent implementation, what can influence what."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from common.attention import AttentionTap
from common.evolved_mask import EvolvedMask, select_masked
from common.masks import mae_ids, pixel_mask
from common.models.names import patch_size_of
from mae_evolved.model import MODELS, MaskedAutoencoder

SIZES = {  # width, depth, heads, patch, then the same of the decoder
    "mae_vit_tiny_patch4": (192, 12, 3, 4, 128, 4, 4),
    "mae_vit_tiny_patch8": (192, 12, 3, 8, 128, 4, 4),
    "mae_vit_small_patch16": (384, 12, 6, 16, 512, 8, 16),
    "mae_vit_base_patch16": (768, 12, 12, 16, 512, 8, 16),
    "mae_vit_large_patch16": (1024, 24, 16, 16, 512, 8, 16),
    "mae_vit_huge_patch14": (1280, 32, 16, 14, 512, 8, 16),
}


def expected_shapes(
    width: int, depth: int, heads: int, patch: int, inner: int, inner_depth: int, _: int
) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the official models_mae.py, written down as a rule."""
    tokens = (224 // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "mask_token": (1, 1, inner),
        "decoder_pos_embed": (1, tokens, inner),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    linear = {"decoder_embed": (inner, width), "decoder_pred": (patch * patch * 3, inner)}
    norms = {"norm": width, "decoder_norm": inner}
    for stem, size, count in (("blocks", width, depth), ("decoder_blocks", inner, inner_depth)):
        for index in range(count):
            block = f"{stem}.{index}"
            norms |= {f"{block}.norm1": size, f"{block}.norm2": size}
            linear |= {f"{block}.attn.qkv": (3 * size, size), f"{block}.attn.proj": (size, size)}
            linear |= {f"{block}.mlp.fc1": (4 * size, size), f"{block}.mlp.fc2": (size, 4 * size)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes


@pytest.mark.parametrize("name", SIZES)
def test_state_dict_layout_is_the_official_one(name: str) -> None:
    with torch.device("meta"):
        model = MODELS[name].func(**MODELS[name].keywords)  # type: ignore[attr-defined]
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected_shapes(*SIZES[name])
    assert model.blocks[0].attn.num_heads == SIZES[name][2]
    assert model.decoder_blocks[0].attn.num_heads == SIZES[name][6]
    assert patch_size_of(name) == SIZES[name][3] == model.patch_size
    assert all(block.norm1.eps == 1e-6 for block in model.blocks)


@pytest.fixture
def small() -> MaskedAutoencoder:
    """A 5 x 7 grid; weights from seed 0."""
    torch.manual_seed(0)
    return MaskedAutoencoder((20, 28), 4, width=32, depth=3, heads=4, decoder_width=16, decoder_depth=2, decoder_heads=2)


def make_mask(model: MaskedAutoencoder, batch: int, masked: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    patches = math.prod(model.grid_size)
    return select_masked(torch.rand(batch, patches, generator=generator), masked, generator)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_prediction_and_gradients_equal_transformers(norm_pix: bool) -> None:
    """transformers' ViTMAE with our weights and our mask (given as noise): an implementation that is not ours."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    ours = MaskedAutoencoder((32, 32), 8, width=32, depth=3, heads=4, decoder_width=16, decoder_depth=2, decoder_heads=2)
    ours.norm_pix_loss = norm_pix
    theirs = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
            decoder_num_attention_heads=2, decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_intermediate_size=64,
            mask_ratio=0.75, norm_pix_loss=norm_pix, layer_norm_eps=1e-6,
        )
    )  # fmt: skip
    renamed = to_transformers(ours)
    missing, unexpected = theirs.load_state_dict(renamed, strict=False)
    assert not missing
    assert not unexpected
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    mask = make_mask(ours, 3, 12)
    loss, prediction = ours(images, mask)
    result = theirs(pixel_values=images, noise=mask.float() + torch.linspace(0, 0.5, 16))
    assert torch.equal(result.mask.bool(), mask)
    assert loss.item() == pytest.approx(result.loss.item(), abs=1e-5)
    assert torch.allclose(prediction, result.logits, atol=1e-5)
    loss.backward()
    result.loss.backward()
    theirs_grad = {key: value.grad for key, value in theirs.named_parameters()}
    with torch.no_grad():
        gradients = copy.deepcopy(ours)
        for value, source in zip(gradients.parameters(), ours.parameters(), strict=True):
            value.copy_(source.grad if source.grad is not None else torch.zeros_like(value))
    compared = 0
    for key, value in to_transformers(gradients).items():
        if theirs_grad.get(key) is not None:
            assert torch.allclose(value, theirs_grad[key], atol=1e-6, rtol=1e-4), key
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_on_masked_patches_alone_has_the_same_value_and_gradients(small: MaskedAutoencoder, norm_pix: bool) -> None:
    """With nothing predicted that is not compared: loss, prediction and every gradient as in the whole forward."""
    small.norm_pix_loss = norm_pix
    images = torch.randn(3, 3, 20, 28, generator=torch.Generator().manual_seed(2))
    mask = make_mask(small, 3, 20)
    whole, prediction = small(images, mask)
    short, masked = small(images, mask, mask)
    torch.testing.assert_close(short, whole, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(masked, prediction[mask].reshape(3, 20, -1), atol=1e-5, rtol=1e-5)
    trained = {name: value for name, value in small.named_parameters() if value.requires_grad}
    expected, made = (torch.autograd.grad(loss, list(trained.values())) for loss in (whole, short))
    for name, value, wanted in zip(trained, made, expected, strict=True):
        assert wanted.any(), name
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-4, msg=name)


def test_patches_that_are_not_chosen_are_left_out(small: MaskedAutoencoder) -> None:
    """The loss of a share of the masked patches: that of a decoder that never sees the others, worked out on a smaller mask."""
    images = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(3))
    mask = make_mask(small, 2, 20)
    chosen = mask & (mask.cumsum(dim=1) % 2 == 0)
    loss, prediction = small(images, mask, chosen)
    assert prediction.shape == (2, 10, 48)
    ids_keep, _ = mae_ids(mask)
    latent = small.encode(images, ids_keep)
    tokens = torch.cat([latent[:, :1], torch.zeros(2, 35, 32)], dim=1)
    tokens = small.decoder_embed(tokens)
    tokens[:, 1:] = small.mask_token
    for image in range(2):
        tokens[image, 1 + ids_keep[image]] = small.decoder_embed(latent[image, 1:])
    tokens = (tokens + small.decoder_pos_embed)[torch.cat([torch.ones(2, 1).bool(), ~mask | chosen], dim=1)].reshape(2, 26, -1)
    for block in small.decoder_blocks:
        tokens = block(tokens)
    pixels = small.decoder_pred(small.decoder_norm(tokens))[:, 1:]
    expected = torch.zeros(2, 35, 48).masked_scatter((~mask | chosen)[..., None].expand(-1, -1, 48), pixels)
    torch.testing.assert_close(prediction, expected[chosen].reshape(2, 10, 48), atol=1e-5, rtol=1e-5)
    error = (expected - small.targets(images)).square().mean(dim=2)[chosen].mean()
    torch.testing.assert_close(loss, error)
    chosen[0, mask[0].nonzero()[0]] = True
    with pytest.raises(ValueError, match="the same number of predicted patches"):
        small(images, mask, chosen)


TRANSFORMERS_NAMES = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "attn.proj": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}


def to_transformers(model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Our state dict under the names of transformers' ViTMAE (release of requirements-dev.txt)."""
    renamed: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        stem, kind = (key, "") if key in TRANSFORMERS_NAMES or "." not in key else key.rsplit(".", 1)
        where = stem.split(".", 2)
        if where[0] in ("blocks", "decoder_blocks"):
            layer = ("vit.layers." if where[0] == "blocks" else "decoder.decoder_layers.") + where[1]
            if where[2] == "attn.qkv":
                for part, chunk in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{layer}.attention.{part}_proj.{kind}"] = chunk
                continue
            name = f"{layer}.{TRANSFORMERS_NAMES.get(where[2], where[2])}"
        else:
            name = TRANSFORMERS_NAMES.get(stem, f"decoder.{stem}")
        renamed[f"{name}.{kind}".rstrip(".")] = value
    return renamed


def test_loss_by_hand(small: MaskedAutoencoder) -> None:
    """Mean over masked patches of the squared error on pixels normalised in their patch (unbiased variance)."""
    images = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(3))
    mask = make_mask(small, 2, 20)
    loss, prediction = small(images, mask)
    total, count = 0.0, 0
    for image in range(2):
        for patch in range(35):
            if not mask[image, patch]:
                continue
            row, column = divmod(patch, 7)
            pixels = images[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].permute(1, 2, 0).flatten()
            target = (pixels - pixels.mean()) / (pixels.var() + 1e-6).sqrt()
            total += (prediction[image, patch] - target).square().mean().item()
            count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_masked_pixels_never_reach_the_prediction(small: MaskedAutoencoder) -> None:
    """The prediction's gradient is exactly 0 on masked pixels, and not 0 on visible ones."""
    images = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(4), requires_grad=True)
    mask = make_mask(small, 2, 20)
    small(images, mask)[1].square().sum().backward()
    hidden = pixel_mask(mask, 5, 7, 4)[:, None].expand_as(images)
    assert images.grad is not None
    assert images.grad[hidden].abs().max() == 0
    assert images.grad[~hidden].abs().min() > 0


def test_evolved_switched_off_is_the_plain_method(small: MaskedAutoencoder) -> None:
    """--mask random through EvolvedMask gives the loss of a uniform random mask drawn by hand from the same numbers."""
    images = torch.randn(4, 3, 20, 28, generator=torch.Generator().manual_seed(5))
    made = EvolvedMask((5, 7), 20, 10, mask="random", seed=7)(images).mask
    generator = torch.Generator().manual_seed(7)
    torch.rand(4, 4, generator=generator)  # grid draw
    torch.rand(4, 35, generator=generator)  # ties
    noise = torch.rand(4, 35, generator=generator)
    by_hand = torch.zeros(4, 35, dtype=torch.bool).scatter(1, noise.argsort(dim=1, descending=True)[:, :20], True)
    assert torch.equal(made, by_hand)
    assert torch.equal(small(images, made)[0], small(images, by_hand)[0])


def test_ids_put_every_patch_in_its_place() -> None:
    mask = torch.tensor([[True, False, True, True, False, True]])
    ids_keep, ids_restore = mae_ids(mask)
    assert ids_keep.tolist() == [[1, 4]]
    assert ids_restore.tolist() == [[2, 0, 3, 4, 1, 5]]


def test_patches_are_row_major_with_colours_innermost(small: MaskedAutoencoder) -> None:
    images = torch.arange(2 * 3 * 20 * 28, dtype=torch.float32).reshape(2, 3, 20, 28)
    patches = small.patchify(images)
    assert patches[1, 9, 5 * 3 + 2] == images[1, 2, 4 + 1, 8 + 1]  # patch 9: row 1, column 2; its pixel 5: row 1, column 1
    assert torch.equal(small.unpatchify(patches), images)


def test_attention_maps_are_those_of_a_whole_forward_pass(small: MaskedAutoencoder) -> None:
    """Streamed block by block, all or some: equal to taps on a full pass, rows sum to 1; blocks that are not read are fused."""
    images = torch.randn(2, 3, 20, 28, generator=torch.Generator().manual_seed(6))
    with AttentionTap(small.blocks) as tap:
        tokens = small.with_class_token(small.embed(images))
        for block in small.blocks:
            tokens = block(tokens)
    streamed = list(small.attention_maps(images))
    assert len(streamed) == 3
    assert all(torch.equal(ours, tapped) for ours, tapped in zip(streamed, tap.maps, strict=True))
    assert torch.allclose(streamed[0].sum(dim=-1), torch.ones(2, 4, 36))
    torch.testing.assert_close(next(iter(small.attention_maps(images, "last"))), tap.maps[2], atol=1e-6, rtol=0)
    some = list(small.attention_maps(images, [0, -2]))
    assert torch.equal(some[0], tap.maps[0])
    torch.testing.assert_close(some[1], tap.maps[1], atol=1e-6, rtol=0)
    assert all(block.attn.fused_attn for block in small.blocks)


def test_input_that_patches_do_not_divide() -> None:
    with pytest.raises(ValueError, match="input_size 30x28 is not divisible by the patch size 4"):
        MaskedAutoencoder((30, 28), 4)
