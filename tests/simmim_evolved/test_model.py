"""SimMIM: state-dict table of the official code, the loss by its definition, odd grids."""

from __future__ import annotations

import pytest
import torch

from common.models.names import patch_size_of
from simmim_evolved.model import MODELS, SimMIM, masked_l1
from tests.beit_evolved.test_model import encoder_table, shapes

SIZES = {
    "simmim_vit_tiny_patch4": (192, 12, 4),
    "simmim_vit_tiny_patch8": (192, 12, 8),
    "simmim_vit_small_patch16": (384, 12, 16),
    "simmim_vit_base_patch16": (768, 12, 16),
}


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_is_the_official_one(name: str) -> None:
    width, depth, patch = SIZES[name]
    assert patch_size_of(name) == patch
    with torch.device("meta"):
        model = MODELS[name](input_size=(14 * patch, 14 * patch))
    encoder = encoder_table(width, depth, patch, (14, 14), width // 64)
    wanted = {f"encoder.{key}": shape for key, shape in encoder.items()}
    wanted |= {"decoder.0.weight": (3 * patch**2, width, 1, 1), "decoder.0.bias": (3 * patch**2,)}
    assert shapes(model) == wanted


def test_loss_is_the_mean_over_masked_pixels() -> None:
    """By loops over a non-square, odd grid with different counts in the two images."""
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 3, 6, 10), torch.randn(2, 3, 6, 10)
    mask = torch.zeros(2, 15, dtype=torch.bool)
    mask[0, [0, 14]] = mask[1, 7] = True
    parts = []
    for image, place in ((0, 0), (0, 14), (1, 7)):
        top, left = 2 * (place // 5), 2 * (place % 5)
        cut = (image, slice(None), slice(top, top + 2), slice(left, left + 2))
        parts.append((prediction[cut] - target[cut]).abs().flatten())
    assert float(masked_l1(prediction, target, mask, (3, 5))) == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
    assert masked_l1(prediction, target, torch.zeros_like(mask), (3, 5)) == 0


def test_pixels_come_back_in_place() -> None:
    """A decoder that copies one feature of each patch paints that patch, on a non-square grid."""
    model = SimMIM(input_size=(12, 20), patch_size=4, width=24, depth=1, heads=2)
    with torch.no_grad():
        model.decoder[0].weight.zero_()
        model.decoder[0].bias.zero_()
        model.decoder[0].weight[:, 5, 0, 0] = 1.0
    images, mask = torch.randn(2, 3, 12, 20), torch.rand(2, 15) < 0.5
    model.eval()
    painted = model.reconstruct(images, mask).reshape(2, 3, 3, 4, 5, 4)
    feature = model.encoder.encode(images, mask)[:, :, 5].reshape(2, 1, 3, 1, 5, 1)
    torch.testing.assert_close(painted, feature.expand_as(painted))


def test_attention_maps_are_the_encoders() -> None:
    model = SimMIM(input_size=(8, 12), patch_size=4, width=24, depth=2, heads=2).eval()
    images = torch.randn(2, 3, 8, 12)
    for ours, encoders in zip(model.attention_maps(images), model.encoder.attention_maps(images), strict=True):
        assert torch.equal(ours, encoders)
    assert (model.grid_size, model.num_prefix_tokens) == ((2, 3), 1)


@pytest.mark.parametrize("counts", [(6, 6), (9, 2), (15, 0), (0, 0)])
def test_loss_on_masked_patches_alone_has_the_same_value_and_gradients(counts: tuple[int, int]) -> None:
    """Loss, prediction and every gradient as in the whole forward; even and uneven counts, all and none masked."""
    torch.manual_seed(0)
    model = SimMIM(input_size=(12, 20), patch_size=4, width=24, depth=3, heads=2, drop_path=0.0)
    torch.nn.init.normal_(model.encoder.rel_pos_bias.relative_position_bias_table)
    images, mask = torch.randn(2, 3, 12, 20), torch.zeros(2, 15, dtype=torch.bool)
    for image, count in enumerate(counts):
        mask[image, torch.randperm(15)[:count]] = True
    whole, prediction = model(images, mask)
    short, masked = model(images, mask, mask)
    torch.testing.assert_close(short, whole, atol=1e-6, rtol=1e-6)
    flat = model.patchify(prediction)
    for image, count in enumerate(counts):
        torch.testing.assert_close(masked[image, :count], flat[image, mask[image]], atol=1e-5, rtol=1e-5)
    trained = dict(model.named_parameters())
    expected, made = (torch.autograd.grad(loss, list(trained.values())) for loss in (whole, short))
    for name, value, wanted in zip(trained, made, expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=1e-4, msg=name)
    assert any(value.any() for value in expected) is any(counts)
