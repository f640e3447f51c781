"""The encoder that BEiT and SimMIM share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.attention import attention_mode
from common.models.mask_token_encoder import MaskTokenEncoder


def small_encoder(**options: object) -> MaskTokenEncoder:
    torch.manual_seed(0)
    made = MaskTokenEncoder(**{"input_size": (12, 20), "patch_size": 4, "width": 24, "depth": 3, "heads": 2, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return made


def test_attention_pass_uses_the_bias_and_restores_the_mode() -> None:
    """Maps are those of the training forward without drop-path; scores softmax to the maps; modes come back."""
    encoder = small_encoder(drop_path=0.9)
    encoder.train()
    encoder.blocks[1].eval()
    modes = [module.training for module in encoder.modules()]
    images = torch.randn(2, 3, 12, 20)
    with attention_mode(encoder):
        maps = list(encoder.attention_maps(images))
        scores = list(encoder.attention_maps(images, values="scores"))
        last = list(encoder.attention_maps(images, layers="last"))
    assert [module.training for module in encoder.modules()] == modes
    assert [attention.shape for attention in maps] == [(2, 2, 16, 16)] * 3
    for attention, score in zip(maps, scores, strict=True):
        torch.testing.assert_close(score.softmax(dim=-1), attention, atol=1e-6, rtol=0)
    torch.testing.assert_close(last[0], maps[2], atol=1e-6, rtol=0)  # blocks that are not read are fused
    with torch.no_grad():
        encoder.rel_pos_bias.relative_position_bias_table.zero_()
    with attention_mode(encoder):
        assert not torch.allclose(next(iter(encoder.attention_maps(images))), maps[0], atol=1e-3)


def test_drop_path_grows_with_depth_and_acts_in_training_only() -> None:
    encoder = small_encoder(drop_path=0.2)
    rates = [block.drop_path for block in encoder.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    images = torch.randn(8, 3, 12, 20)
    encoder.train()
    assert not torch.equal(encoder.encode(images), encoder.encode(images))
    encoder.eval()
    assert torch.equal(encoder.encode(images), encoder.encode(images))


def test_start_values() -> None:
    """Cut normal of 0.02; zero biases and bias table; branch i scaled by 1/sqrt(2i)."""
    torch.manual_seed(0)
    encoder = MaskTokenEncoder(input_size=(32, 32), patch_size=4, width=192, depth=4, heads=3)
    weights = encoder.state_dict()

    def spread(name: str) -> float:
        assert weights[name].abs().max() <= 0.02 + 1e-6
        return float(weights[name].std())

    plain = spread("blocks.0.attn.qkv.weight")
    assert plain == pytest.approx(0.02 * 0.5396, rel=0.02)  # a normal cut at one standard deviation has 0.54 of its spread
    for number in range(4):
        for name in ("attn.proj.weight", "mlp.fc2.weight"):
            assert spread(f"blocks.{number}.{name}") == pytest.approx(plain / (2 * (number + 1)) ** 0.5, rel=0.03)
    assert not weights["rel_pos_bias.relative_position_bias_table"].any()
    assert not weights["blocks.0.attn.q_bias"].any()
    assert not weights["patch_embed.proj.bias"].any()


def test_input_size_must_fit() -> None:
    with pytest.raises(ValueError, match="input_size 30x32 is not divisible by the patch size 4"):
        MaskTokenEncoder(input_size=(30, 32), patch_size=4)


def test_mask_token_stands_in_every_masked_place() -> None:
    encoder = small_encoder()
    images, mask = torch.randn(2, 3, 12, 20), torch.zeros(2, 15, dtype=torch.bool)
    mask[0, 3] = mask[1, 14] = True
    tokens: Tensor = encoder.embed(images, mask)
    assert torch.equal(tokens[:, 0], encoder.cls_token[0].expand(2, -1))
    replaced = (tokens[:, 1:] == encoder.mask_token).all(dim=2)
    assert torch.equal(replaced, mask)
    assert torch.equal(tokens[:, 1:][~mask], encoder.embed(images)[:, 1:][~mask])
