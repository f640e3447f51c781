"""BEiT: state-dict table of the official code, values against transformers, order of the logits, odd grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BeitConfig, BeitForMaskedImageModeling

from beit_evolved.model import MODELS, BEiT
from common.models.names import patch_size_of

SIZES = {  # width, depth, patch, layer scale
    "beit_tiny_patch4_8k_vocab": (192, 12, 4, 0.1),
    "beit_tiny_patch8_8k_vocab": (192, 12, 8, 0.1),
    "beit_small_patch16_224_8k_vocab": (384, 12, 16, 0.1),
    "beit_base_patch16_224_8k_vocab": (768, 12, 16, 0.1),
    "beit_large_patch16_224_8k_vocab": (1024, 24, 16, 1e-5),
}
SMALL = {"input_size": (12, 20), "patch_size": 4, "width": 24, "depth": 3, "heads": 2, "vocabulary": 32}


def encoder_table(width: int, depth: int, patch: int, grid: tuple[int, int], heads: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the encoder in the official code, by rule."""
    tokens, rows = grid[0] * grid[1] + 1, (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
    block: dict[str, tuple[int, ...]] = {"gamma_1": (width,), "gamma_2": (width,)}
    for norm in ("norm1", "norm2"):
        block |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    block |= {"attn.q_bias": (width,), "attn.v_bias": (width,), "attn.qkv.weight": (3 * width, width)}
    for name, (out, into) in {
        "attn.proj": (width, width),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
    }.items():
        block |= {f"{name}.weight": (out, into), f"{name}.bias": (out,)}
    table: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "mask_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "rel_pos_bias.relative_position_bias_table": (rows, heads),
        "rel_pos_bias.relative_position_index": (tokens, tokens),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    return table | {f"blocks.{number}.{key}": shape for number in range(depth) for key, shape in block.items()}


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_is_the_official_one(name: str) -> None:
    width, depth, patch, scale = SIZES[name]
    assert patch_size_of(name) == patch
    with torch.device("meta"):
        model = MODELS[name](input_size=(14 * patch, 14 * patch))
    wanted = encoder_table(width, depth, patch, (14, 14), width // 64)
    wanted |= {"lm_head.weight": (8192, width), "lm_head.bias": (8192,)}
    assert shapes(model) == wanted
    assert model.grid_size == (14, 14)
    small = MODELS[name](input_size=(patch, patch), depth=1, vocabulary=4)
    assert torch.equal(small.blocks[0].gamma_1, torch.full((width,), scale))


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by the names of transformers, which keeps queries, keys and values apart."""
    renamed = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token", "rel_pos_bias": "shared_position_bias", "blocks": "layers",
        "norm1": "layernorm_before", "norm2": "layernorm_after", "gamma_": "lambda_", "attn.q_bias": "attention.q_proj.bias",
        "attn.v_bias": "attention.v_proj.bias", "attn.proj": "attention.o_proj",
    }  # fmt: skip
    made: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.startswith(("norm.", "lm_head.")):
            made[key.replace("norm.", "layernorm.")] = value
            continue
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        if key.endswith("attn.qkv.weight"):
            for name, part in zip("qkv", value.chunk(3), strict=True):
                made["beit." + key.replace("attn.qkv", f"attention.{name}_proj")] = part
        elif not key.endswith("relative_position_index"):
            made["beit." + key] = value
    return made


def paired() -> tuple[BEiT, BeitForMaskedImageModeling]:
    """Our model with random weights, and transformers' with the same ones, matched by what each tensor is."""
    torch.manual_seed(0)
    ours = BEiT(**{**SMALL, "input_size": (16, 16)}, drop_path=0.0)
    with torch.no_grad():
        for value in ours.parameters():
            value.add_(0.2 * torch.randn_like(value))
    config = BeitConfig(
        vocab_size=32, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96, layer_norm_eps=1e-6,
        image_size=16, patch_size=4, use_mask_token=True, use_absolute_position_embeddings=False,
        use_relative_position_bias=False, use_shared_relative_position_bias=True, layer_scale_init_value=0.1,
        drop_path_rate=0.0,
    )  # fmt: skip
    theirs = BeitForMaskedImageModeling(config)
    theirs.load_state_dict(to_transformers(ours.state_dict()))
    return ours, theirs


def test_logits_loss_and_gradients_equal_transformers() -> None:
    """An independent implementation with the same weights and masks."""
    ours, theirs = paired()
    images, mask = torch.randn(2, 3, 16, 16), torch.rand(2, 16) < 0.4
    labels = torch.randint(32, (int(mask.sum()),))
    made, other = ours(images, mask), theirs(images, bool_masked_pos=mask, labels=labels)
    torch.testing.assert_close(made, other.logits[mask], atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(made, labels)
    torch.testing.assert_close(loss, other.loss, atol=1e-5, rtol=0)
    loss.backward()
    other.loss.backward()
    mine = to_transformers({name: value.grad for name, value in ours.named_parameters() if value.grad is not None})
    for name, value in theirs.named_parameters():
        torch.testing.assert_close(mine[name], value.grad, atol=1e-4, rtol=0, msg=name)


def test_logits_are_row_major_over_the_batch() -> None:
    """Image by image in raster order; counts may differ between images; a non-square, odd grid."""
    torch.manual_seed(0)
    model = BEiT(**SMALL).eval()
    images, mask = torch.randn(2, 3, 12, 20), torch.zeros(2, 15, dtype=torch.bool)
    mask[0, [14, 2]] = mask[1, [0, 7, 9]] = True
    logits = model(images, mask)
    assert logits.shape == (5, 32)
    every = model.lm_head(model.encode(images, mask))
    assert torch.equal(logits, torch.stack([every[0, 2], every[0, 14], every[1, 0], every[1, 7], every[1, 9]]))


@pytest.mark.parametrize("counts", [(6, 6), (9, 2), (15, 0), (0, 0)])
def test_last_block_at_masked_patches_has_the_same_logits_and_gradients(counts: tuple[int, int]) -> None:
    """As if every patch went through the last block; even and uneven counts, all and none masked."""
    torch.manual_seed(0)
    model = BEiT(**SMALL, drop_path=0.0)
    torch.nn.init.normal_(model.rel_pos_bias.relative_position_bias_table)
    images, mask = torch.randn(2, 3, 12, 20), torch.zeros(2, 15, dtype=torch.bool)
    for image, count in enumerate(counts):
        mask[image, torch.randperm(15)[:count]] = True
    logits, whole = model(images, mask), model.lm_head(model.encode(images, mask)[mask])
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    weights, trained = torch.randn(logits.shape), dict(model.named_parameters())
    made, expected = (torch.autograd.grad((found * weights).sum(), list(trained.values())) for found in (logits, whole))
    for name, value, wanted in zip(trained, made, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-4, msg=name)


def test_images_of_a_batch_do_not_mix() -> None:
    model = BEiT(**SMALL).eval()
    images, mask = torch.randn(3, 3, 12, 20), torch.rand(3, 15) < 0.5
    mask[:, 0] = True
    alone = torch.cat([model(images[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(images, mask), alone, atol=1e-5, rtol=0)
