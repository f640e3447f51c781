"""The downstream encoder against timm's ViT and transformers' BEiT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.models.timm_layers import Block
from downstream.vit import METHODS, MODELS, BackboneViT, Method, build_encoder, layer_of

SIZES = {"patch_size": 4, "width": 24, "depth": 3, "heads": 2}
WINDOWS: dict[str, Any] = {"class_token": False, "window": 3, "global_blocks": (1,)}


def shaken(encoder: nn.Module, seed: int = 0) -> Any:
    """With every parameter moved, so that no bias or table stays at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in encoder.parameters():
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return encoder.eval()


def made(method: Method, input_size: tuple[int, int] = (20, 28), **options: Any) -> BackboneViT:
    torch.manual_seed(0)
    return shaken(BackboneViT(method, input_size, **{**SIZES, **options}))


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_windowed_encoder_keeps_to_windows_but_in_global_blocks(method: Method) -> None:
    """A changed pixel is seen in its own window after block 0, everywhere after the global block 1."""
    encoder = made(method, **WINDOWS)
    images = torch.randn(1, 3, 20, 28)
    changed = images.clone()
    changed[..., 0, 0] += 1
    pairs = zip(encoder(images, [0, 1]), encoder(changed, [0, 1]), strict=True)
    first, second = (((before - after)[0].abs().amax(dim=1) > 1e-6).reshape(5, 7) for before, after in pairs)
    assert first[:3, :3].all()
    assert first.sum() == 9
    assert second.all()


@torch.no_grad()
def test_mae_equals_timm() -> None:
    """Same names, same shapes, same values as timm's ViT with the same weights; norm and head aside."""
    from timm.models.vision_transformer import VisionTransformer

    theirs = shaken(
        VisionTransformer(
            (20, 28), 4, embed_dim=24, depth=3, num_heads=2, num_classes=0, norm_layer=lambda n: nn.LayerNorm(n, eps=1e-6)
        )
    )
    encoder = made("mae")
    weights = {key: value for key, value in theirs.state_dict().items() if not key.startswith("norm.")}
    encoder.load_state_dict(weights)
    blocks: list[Tensor] = []
    for block in theirs.blocks:
        assert isinstance(block, Block)
        block.register_forward_hook(lambda module, args, output: blocks.append(output))
    images = torch.randn(2, 3, 20, 28)
    theirs(images)
    for ours, expected in zip(encoder(images, [0, 1, 2]), blocks, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


RENAMED = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection", "cls_token": "embeddings.cls_token", "blocks.": "layers.",
    "attn.proj": "attention.o_proj", "attn.q_bias": "attention.q_proj.bias", "attn.v_bias": "attention.v_proj.bias",
    "attn.relative_position": "relative_position_bias.relative_position", "norm1": "layernorm_before",
    "norm2": "layernorm_after", "gamma": "lambda",
}  # fmt: skip
"""Our names (those of the official code) -> the names of transformers' BEiT."""


@torch.no_grad()
@pytest.mark.parametrize("method", ["beit", "simmim"])
def test_biased_encoder_equals_transformers(method: Method) -> None:
    """transformers' BEiT with a table in every block, weights copied by name: tokens agree after every block."""
    from transformers import BeitConfig, BeitModel

    config = BeitConfig(
        image_size=20, patch_size=4, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96,
        use_relative_position_bias=True, use_mask_token=False, layer_norm_eps=1e-6, drop_path_rate=0.0,
    )  # fmt: skip
    encoder, theirs = made(method, (20, 20)), BeitModel(config, add_pooling_layer=False).eval()
    copied = {}
    for key, value in encoder.state_dict().items():
        for name, other in RENAMED.items():
            key = key.replace(name, other)
        if key.endswith("attn.qkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            copied |= {key.replace("attn.qkv", f"attention.{letter}_proj"): part for letter, part in parts}
        elif not key.endswith("index"):
            copied[key] = value
    differs = theirs.load_state_dict(copied, strict=False)
    assert not differs.unexpected_keys
    assert set(differs.missing_keys) <= {"layernorm.weight", "layernorm.bias"}
    images = torch.randn(2, 3, 20, 20)  # square: theirs mixes up the sides of the table when it is not
    hidden = theirs(images, output_hidden_states=True).hidden_states
    for ours, expected in zip(encoder(images, [0, 1, 2]), hidden[1:], strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"class_token": False}, WINDOWS])
def test_every_parameter_learns(method: Method, options: dict[str, Any]) -> None:
    """From the patch tokens of the last block, which is what tasks read: no parameter is unused."""
    encoder = made(method, **options)
    tokens = encoder(torch.randn(2, 3, 20, 28), [-1])[0][:, encoder.num_prefix_tokens :]
    tokens.square().sum().backward()
    assert [name for name, value in encoder.named_parameters() if value.grad is None or not value.grad.any()] == []
    rows = {name: len(value) for name, value in encoder.named_parameters() if "table" in name}
    whole = 9 * 13 + 3 * encoder.num_prefix_tokens
    per_block = [] if method == "mae" else [whole] * 3 if not options.get("window") else [25, whole, 25]
    assert list(rows.values()) == per_block


@pytest.mark.parametrize("options", [{}, WINDOWS])
def test_checkpointing_changes_no_gradient(options: dict[str, Any]) -> None:
    """Also with drop path, which draws again from the same random state. Each block runs twice."""
    gradients, runs = [], []
    for again in (False, True):
        encoder = made("beit", drop_path=0.5, checkpointing=again, **options).train()
        calls: list[int] = []
        for block in encoder.blocks:
            block.mlp.fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[misc]
        torch.manual_seed(1)
        sum(tokens.square().mean() for tokens in encoder(torch.randn(4, 3, 20, 28), [0, 2])).backward()  # type: ignore[union-attr]
        gradients.append([value.grad for value in encoder.parameters()])
        runs.append(len(calls))
    assert runs == [3, 6]
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, recomputed, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_layers_are_those_asked_for() -> None:
    encoder = made("simmim")
    images = torch.randn(2, 3, 20, 28)
    last, first = encoder(images, [-1, 0])
    tokens = encoder.embed(images)
    assert torch.equal(first, encoder.blocks[0](tokens))
    for block in encoder.blocks:
        tokens = block(tokens)
    assert torch.equal(last, tokens)
    ran: list[int] = []
    encoder.blocks[2].register_forward_hook(lambda *_: ran.append(2))
    encoder(images, [1])
    assert ran == []


def test_drop_path_grows_and_acts_in_training_only() -> None:
    encoder = made("mae", drop_path=0.4)
    assert [block.drop_path for block in encoder.blocks] == pytest.approx([0.0, 0.2, 0.4])
    images = torch.randn(8, 3, 20, 28)
    assert torch.equal(*(encoder(images, [2])[0] for _ in range(2)))
    encoder.train()
    assert not torch.equal(*(encoder(images, [2])[0] for _ in range(2)))


@torch.no_grad()
@pytest.mark.parametrize("method", ["mae", "beit"])
def test_half_precision_is_near(method: Method) -> None:
    encoder, images = made(method, **WINDOWS), torch.randn(2, 3, 20, 28)
    exact = encoder(images, [2])[0]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = encoder(images, [2])[0].float()
    assert 0 < (rounded - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_layer_of_every_parameter() -> None:
    """Embeddings first, then blocks, the task last, wherever the encoder is nested."""
    encoder = made("mae")
    for prefix in ("", "encoder.", "module.encoder.", "backbone.encoder.", "module."):
        layers = {name: layer_of(prefix + name, 3) for name, _ in encoder.named_parameters()}
        assert {name for name, layer in layers.items() if layer == 0} == {
            "cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias",
        }  # fmt: skip
        assert {layer for name, layer in layers.items() if name.startswith("blocks.2.")} == {3}
    task = ("head.weight", "fc_norm.bias", "norm.weight", "decoder.blocks.0.weight", "decoder.patch_embed.weight", "neck.0.bias")
    assert {layer_of(name, 3) for name in task} == {4}


def test_named_models() -> None:
    encoder = build_encoder("vit_tiny_patch8", "beit", (32, 48), drop_path=0.1)
    assert (encoder.name, encoder.grid_size) == ("vit_tiny_patch8", (4, 6))
    assert (encoder.width, encoder.depth, encoder.heads) == (192, 12, 3)
    assert torch.equal(encoder.get_parameter("blocks.0.gamma_1"), torch.full((192,), 0.1))
    assert "blocks.0.gamma_1" not in build_encoder("vit_tiny_patch8", "simmim", (32, 32), layer_scale=0.0).state_dict()
    sizes = {name: model.keywords["width"] for name, model in MODELS.items()}
    assert sizes["vit_small_patch16"] == 384
    with pytest.raises(ValueError, match="unknown model 'vit_tiny': one of vit_tiny_patch4, "):
        build_encoder("vit_tiny", "mae")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dino"}, "method must be one of mae, beit, simmim, not 'dino'"),
        ({"input_size": (21, 28)}, "input_size 21x28 is not divisible"),
        ({"window": 3}, "window 3: needs a side of 1 or more and class_token=False"),
        ({"global_blocks": (3,)}, r"global_blocks \[3\]: the encoder has blocks 0 to 2"),
        ({"layer_scale": 0.1}, "MAE has no layer scale"),
        ({"heads": 5}, "width 24 is not divisible by 5 heads"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BackboneViT(**{"method": "mae", "input_size": (20, 28), **SIZES, **options})


@pytest.mark.parametrize("layers", [[], [3], [-4]])
def test_layers_that_do_not_exist(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="the encoder has blocks 0 to 2"):
        made("mae")(torch.randn(1, 3, 20, 28), layers)
