"""The block and the encoder that BEiT and SimMIM share, against definitions and timm's block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.attention import attention_mode
from common.models.mask_token_encoder import MaskTokenEncoder
from common.models.relative_position import BiasedAttention, BiasedBlock, RelativePositionBias, relative_position_index
from common.models.timm_layers import Block


def small_encoder(**options: object) -> MaskTokenEncoder:
    torch.manual_seed(0)
    made = MaskTokenEncoder(**{"input_size": (12, 20), "patch_size": 4, "width": 24, "depth": 3, "heads": 2, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for value in made.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return made


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (3, 5), (4, 2), (14, 14)])
def test_index_by_its_definition(grid: tuple[int, int]) -> None:
    """Same offset, same row; other offset, other row; three rows of their own for the class token."""
    height, width = grid
    index = relative_position_index(height, width)
    rows = (2 * height - 1) * (2 * width - 1) + 3
    places = [(row, column) for row in range(height) for column in range(width)]
    of_offset: dict[tuple[int, int], int] = {}
    for i, (row, column) in enumerate(places):
        for j, (other_row, other_column) in enumerate(places):
            value = int(index[1 + i, 1 + j])
            assert of_offset.setdefault((row - other_row, column - other_column), value) == value
    assert sorted(of_offset.values()) == list(range(rows - 3))
    assert index[0, 0] == rows - 1
    assert set(index[0, 1:].tolist()) == {rows - 3}
    assert set(index[1:, 0].tolist()) == {rows - 2}


def test_bias_is_looked_up_per_head() -> None:
    bias = RelativePositionBias((2, 3), heads=4)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    made = bias()
    assert made.shape == (4, 7, 7)
    query, key, head = 5, 2, 3  # patch 4 = (1, 1) looks at patch 1 = (0, 1): offset (1, 0)
    row = (1 + 1) * 5 + (0 + 2)
    assert made[head, query, key] == bias.relative_position_bias_table[row, head]


def test_block_without_extras_equals_timm() -> None:
    """No position bias, no layer scale, no key bias: timm's block with the same weights, values and gradients."""
    torch.manual_seed(0)
    ours, theirs = BiasedBlock(24, 3), Block(24, 3, qkv_bias=True, norm_layer=type(BiasedBlock(24, 3).norm1))
    theirs.norm1.eps = theirs.norm2.eps = 1e-6
    torch.nn.init.normal_(ours.attn.q_bias)
    torch.nn.init.normal_(ours.attn.v_bias)
    state = {key: value for key, value in ours.state_dict().items() if "_bias" not in key}
    state["attn.qkv.bias"] = torch.cat([ours.attn.q_bias, torch.zeros(24), ours.attn.v_bias])
    theirs.load_state_dict(state)
    tokens = torch.randn(2, 5, 24)
    first, second = ours(tokens), theirs(tokens)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)
    first.square().mean().backward()
    second.square().mean().backward()
    torch.testing.assert_close(ours.attn.qkv.weight.grad, theirs.attn.qkv.weight.grad, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.attn.q_bias.grad, theirs.attn.qkv.bias.grad[:24], atol=1e-5, rtol=0)


def test_layer_scale_and_position_bias_act() -> None:
    block = BiasedBlock(24, 3, layer_scale=0.1)
    assert torch.equal(block.gamma_1, torch.full((24,), 0.1))
    tokens, bias = torch.randn(2, 5, 24), torch.randn(3, 5, 5)
    assert not torch.allclose(block(tokens), block(tokens, bias))
    with torch.no_grad():
        block.gamma_1.zero_()
        block.gamma_2.zero_()
    assert torch.equal(block(tokens, bias), tokens)
    assert BiasedBlock(24, 3, layer_scale=0.0).gamma_1 is None
    with pytest.raises(ValueError, match="width 25 is not divisible by 3 heads"):
        BiasedAttention(25, 3)


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
    assert [one.shape for one in maps] == [(2, 2, 16, 16)] * 3
    for one, score in zip(maps, scores, strict=True):
        torch.testing.assert_close(score.softmax(dim=-1), one, atol=1e-6, rtol=0)
    assert torch.equal(last[0], maps[2])
    with torch.no_grad():
        encoder.rel_pos_bias.relative_position_bias_table.zero_()
    with attention_mode(encoder):
        assert not torch.allclose(next(iter(encoder.attention_maps(images))), maps[0], atol=1e-3)


def test_drop_path_grows_with_depth_and_acts_in_training_only() -> None:
    encoder = small_encoder(drop_path=0.2)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in encoder.blocks]
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
