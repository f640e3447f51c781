"""UperNet: shapes, values of its parts, and a gradient for every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from downstream.segmentation.upernet import POOLS, NormKind, PyramidPooling, UperNet, feature_blocks, make_norm, resized
from downstream.vit import METHODS, BackboneViT, Method


def made(method: Method = "mae", norm: NormKind = "batch", **options: int) -> UperNet:
    torch.manual_seed(0)
    encoder = BackboneViT(method, (24, 32), patch_size=4, width=24, depth=4, heads=2)
    return UperNet(encoder, 5, norm=norm, **{"channels": 16, "auxiliary_channels": 8, **options})


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 24, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_shapes_and_a_gradient_for_every_parameter(method: Method, norm: NormKind) -> None:
    """A parameter without gradient would make DistributedDataParallel wait for it for ever."""
    model = made(method, norm)
    logits, auxiliary = model(images())
    assert logits.shape == (2, 5, 24, 32)  # 4 times the 6x8 patches
    assert auxiliary.shape == (2, 5, 6, 8)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        # A bias before a batch norm has a gradient of rounding errors only; being there is what counts.
        assert value.grad.isfinite().all(), name
    assert model.eval()(images())[1] is None


def test_maps_of_the_neck() -> None:
    model = made().eval()
    maps = model.neck(model.features(images()))
    assert [tuple(features.shape[1:]) for features in maps] == [(24, 24, 32), (24, 12, 16), (24, 6, 8), (24, 3, 4)]


@torch.no_grad()
def test_features_are_the_tokens_in_raster_order_without_the_class_token() -> None:
    model = made().eval()
    tokens = model.encoder(images(), model.blocks)
    for grid, rows in zip(model.features(images()), tokens, strict=True):
        for row in range(6):
            for column in range(8):
                assert torch.equal(grid[:, :, row, column], rows[:, 1 + row * 8 + column])


@torch.no_grad()
def test_up_and_down_by_the_neck() -> None:
    """The upsampled map by the definition of its deconvolution, the coarsest one by the maximum of 2x2."""
    model = made().eval()
    grids = model.features(images())
    maps = model.neck(grids)
    up = model.neck.scales[1]
    assert isinstance(up, nn.ConvTranspose2d)
    for row, column in ((0, 0), (3, 5), (11, 15)):
        pixel = grids[1][:, :, row // 2, column // 2]
        expected = pixel @ up.weight[:, :, row % 2, column % 2] + up.bias
        torch.testing.assert_close(maps[1][:, :, row, column], expected)
    assert torch.equal(maps[2], grids[2])
    assert torch.equal(maps[3][:, :, 1, 2], grids[3][:, :, 2:4, 4:6].amax(dim=(2, 3)))


@torch.no_grad()
def test_pyramid_pooling_averages() -> None:
    """Stage of one cell: the mean of the map everywhere; of 2x2: the means of its quarters; both through 1x1 convolutions."""
    torch.manual_seed(0)
    pooling = PyramidPooling(6, 4, "batch").eval()
    coarsest = torch.randn(2, 6, 4, 8)
    for number, side in ((0, 1), (1, 2)):
        stage = pooling.stages[number]
        assert isinstance(stage, nn.Sequential)
        assert isinstance(stage[1], nn.Sequential)
        made_map = stage(coarsest)
        cells = coarsest.reshape(2, 6, side, 4 // side, side, 8 // side).mean(dim=(3, 5))
        convolved = torch.einsum("oi,bihw->bohw", stage[1][0].weight[:, :, 0, 0], cells)
        norm = stage[1][1]
        expected = (convolved / (1 + norm.eps) ** 0.5).relu()  # running statistics are still 0 and 1
        torch.testing.assert_close(made_map, expected)
    assert [stage(coarsest).shape[-1] for stage in pooling.stages] == list(POOLS)
    assert pooling(coarsest).shape == (2, 4, 4, 8)


@torch.no_grad()
def test_decoder_by_its_equations() -> None:
    """Top down: each level is its lateral map plus the upsampled sum above it; then smoothed, fused, classified."""
    model = made().eval()
    maps = model.neck(model.features(images()))
    decoder = model.decoder
    level_4 = decoder.pooling(maps[3])
    level_3 = decoder.lateral[2](maps[2]) + resized(level_4, (6, 8))
    level_2 = decoder.lateral[1](maps[1]) + resized(level_3, (12, 16))
    level_1 = decoder.lateral[0](maps[0]) + resized(level_2, (24, 32))
    smooth = [decoder.smooth[i](level) for i, level in enumerate((level_1, level_2, level_3))]
    stacked = torch.cat([smooth[0], *(resized(level, (24, 32)) for level in (smooth[1], smooth[2], level_4))], dim=1)
    expected = functional.conv2d(decoder.fuse(stacked), decoder.classify.weight, decoder.classify.bias)
    torch.testing.assert_close(model(images())[0], expected)


@pytest.mark.parametrize(("depth", "blocks"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (32, (10, 15, 20, 31))])
def test_blocks_are_those_of_beits_configurations(depth: int, blocks: tuple[int, ...]) -> None:
    assert feature_blocks(depth) == blocks


def test_group_norm_leaves_images_apart() -> None:
    """The output for an image does not depend on the others of its batch; with batch norm in training it does."""
    for norm, alike in (("group", True), ("batch", False)):
        model = made(norm=norm).train()  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, nn.Dropout2d):
                module.p = 0.0
        both, first = model(images(3))[0][:2], model(images(3)[:2])[0]
        assert torch.allclose(both, first, atol=1e-5) == alike


@pytest.mark.parametrize(("channels", "groups"), [(768, 32), (256, 32), (64, 8), (32, 4), (24, 1), (8, 1), (5, 1)])
def test_groups(channels: int, groups: int) -> None:
    """With one channel a group, the pooled map of one cell would be nought whatever the image."""
    norm = make_norm("group", channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups
    cells = norm(torch.randn(3, channels, 1, 1))
    assert (cells[0] - cells[1]).abs().max() > 0.1


def test_too_few_patches() -> None:
    with pytest.raises(ValueError, match="patch grid of 1x4"):
        UperNet(BackboneViT("mae", (4, 16), patch_size=4, width=24, depth=4, heads=2), 5)
