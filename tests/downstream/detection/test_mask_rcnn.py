"""The detector: pyramid, gradients, pasting, lower precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from downstream.detection.mask_rcnn import LEVELS, MaskRCNN, SimpleFeaturePyramid, paste, strides
from downstream.vit import BackboneViT
from tests.downstream.coco_folder import ellipse

SIDE = 64


def detector(method: str = "mae", window: int = 3, **options: Any) -> MaskRCNN:
    """8 x 8 patches, which windows of 3 do not divide."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"patch_size": 8, "width": 32, "depth": 4, "heads": 2, **options}
    encoder = BackboneViT(method, (SIDE, SIDE), class_token=False, window=window, global_blocks=(1, 3), **sizes)  # type: ignore[arg-type]
    return MaskRCNN(encoder, num_classes=4, channels=16, anchor_scale=4.0, box_samples=32)


def target(*boxes: tuple[int, int, int, int]) -> dict[str, Tensor]:
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    labels = torch.arange(1, len(boxes) + 1)
    return {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels, "masks": masks}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


def test_pyramid_is_that_of_the_paper() -> None:
    """Every level against the same operations written out on the weights."""
    torch.manual_seed(0)
    pyramid = SimpleFeaturePyramid(16, 8)
    for value in pyramid.parameters():
        torch.nn.init.normal_(value)
    last = torch.randn(2, 16, 6, 4)

    def norm(x: Tensor, layer: Any) -> Tensor:
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]

    def up(x: Tensor, layer: Any) -> Tensor:
        grown = torch.einsum("bchw,cdij->bdhiwj", x, layer.weight).flatten(4, 5).flatten(2, 3)
        return grown + layer.bias[:, None, None]

    levels: list[Any] = list(pyramid.levels)
    first = up(functional.gelu(norm(up(last, levels[0][0]), levels[0][1])), levels[0][3])
    starts = [first, up(last, levels[1][0]), last, last.unflatten(2, (3, 2)).unflatten(4, (2, 2)).amax(dim=(3, 5))]
    wanted = []
    for start, level in zip(starts, levels, strict=True):
        pointwise, norm1, spatial, norm2 = level[-4:]
        narrow = norm(torch.einsum("bchw,dc->bdhw", start, pointwise.weight[:, :, 0, 0]), norm1)
        wanted.append(norm(functional.conv2d(narrow, spatial.weight, padding=1), norm2))
    wanted.append(wanted[-1][:, :, ::2, ::2])
    made = list(pyramid(last).values())
    assert [level.shape[2:] for level in made] == [(24, 16), (12, 8), (6, 4), (3, 2), (2, 1)]
    for got, want in zip(made, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_strides_and_anchors() -> None:
    assert strides(16) == [4, 8, 16, 32, 64]
    model = detector()
    maps = list(model.features(images()).values())
    assert [SIDE // level.shape[2] for level in maps] == strides(8) == [2, 4, 8, 16, 32]
    generator = model.rpn.anchor_generator
    anchors = generator(ImageList(images(), [(SIDE, SIDE)] * 2), maps)[0]
    first = 0
    for stride, level in zip(strides(8), maps, strict=True):
        count = 3 * level.shape[2] * level.shape[3]
        boxes, first = anchors[first : first + count], first + count
        centres = (boxes[1::3, :2] + boxes[1::3, 2:]) / 2  # of the square ones
        torch.testing.assert_close(boxes[1::3, 2:] - boxes[1::3, :2], torch.full((count // 3, 2), 4.0 * stride))
        assert centres[:, 0].unique().tolist() == [stride * i for i in range(SIDE // stride)]
    assert first == len(anchors)


def test_map_is_the_tokens_in_their_places() -> None:
    """What the neck gets at row i and column j is token 8 i + j of the encoder, with windows that do not fit the grid."""
    model = detector().eval()
    seen: list[Tensor] = []
    model.neck.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.features(images())
        tokens = model.encoder(images(), layers=[-1])[0]
    for i, j in ((0, 0), (2, 7), (7, 1)):
        torch.testing.assert_close(seen[0][:, :, i, j], tokens[:, 8 * i + j])


@pytest.mark.parametrize("method", ["mae", "beit", "simmim"])
def test_every_parameter_has_a_gradient(method: str) -> None:
    model = detector(method)
    losses = model(images(), [target((4, 8, 30, 40), (33, 3, 60, 22)), target()])
    assert sorted(losses) == ["loss_box_reg", "loss_classifier", "loss_mask", "loss_objectness", "loss_rpn_box_reg"]
    sum(losses.values()).backward()
    still = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert still == []


def test_images_without_objects_give_zeros_and_not_nothing() -> None:
    """All ranks of a run must have a gradient for every parameter, also one that sees no object."""
    model = detector()
    losses = model(images(), [target(), target()])
    assert float(losses["loss_mask"].detach()) == float(losses["loss_box_reg"].detach()) == 0
    assert float(losses["loss_classifier"].detach()) > 0.1
    sum(losses.values()).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name
        if "mask" in name or "bbox_pred" in name:
            assert not value.grad.any(), name


def test_geometry_stays_in_float32_under_bf16() -> None:
    model = detector()
    kept: list[Any] = []
    model.rpn.register_forward_hook(lambda module, args, output: kept.append((args[1], output[0])))
    targets = [target((4, 8, 30, 40)), target((10, 10, 50, 60))]
    exact = {name: float(value.detach()) for name, value in model(images(), targets).items()}
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        losses = model(images(), targets)
        sum(losses.values()).backward()
        model.eval()
        with torch.no_grad():
            detections = model(images())
    assert all(level.dtype == torch.float32 for maps, _ in kept for level in maps.values())
    assert all(boxes.dtype == torch.float32 for _, proposals in kept for boxes in proposals)
    assert {objects[key].dtype for objects in detections for key in ("boxes", "scores", "masks")} == {torch.float32}
    for name, value in losses.items():
        assert float(value.detach()) == pytest.approx(exact[name], rel=0.3, abs=0.05), name
    assert all(value.grad.isfinite().all() for value in model.parameters() if value.grad is not None)


def test_pasting_is_bilinear_sampling() -> None:
    """Against torch's grid_sample, whose pixel centres are at halves."""
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(5, 1, 28, 28, generator=generator)
    low = torch.rand(5, 2, generator=generator) * 30 - 4
    boxes = torch.cat([low, low + 2 + torch.rand(5, 2, generator=generator) * 30], dim=1)
    size, scale = (37, 51), (1.25, 1.5)
    rows, columns = (torch.arange(side) + 0.5 for side in size)
    wanted = []
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
        y = (rows * scale[0] - 0.5 - y0) / (y1 - y0) * 2 - 1
        x = (columns * scale[1] - 0.5 - x0) / (x1 - x0) * 2 - 1
        grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), dim=-1)[None]
        wanted.append(functional.grid_sample(mask[None], grid, align_corners=False)[0, 0])
    torch.testing.assert_close(paste(masks, boxes, scale, size), torch.stack(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("radii", [(5.0, 7.0), (18.0, 11.0)])
def test_pasting_undoes_what_makes_the_targets(radii: tuple[float, float]) -> None:
    """A mask that goes through torchvision's target of 28 x 28 cells, predicted perfectly, comes back in its place."""
    true = torch.from_numpy(ellipse((64, 64), (30.0, 27.0), radii))
    rows, columns = np.nonzero(true.numpy())
    box = torch.tensor([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]).float()
    cells = project_masks_on_boxes(true[None].to(torch.uint8), box, torch.tensor([0]), 28)
    back = paste(cells[:, None], box, (1.0, 1.0), (64, 64))[0] >= 0.5
    assert (back & true).sum() / (back | true).sum() > 0.93


def test_refuses_what_has_no_strides() -> None:
    with pytest.raises(ValueError, match="class token"):
        MaskRCNN(BackboneViT("mae", (64, 64), 8, 32, 2, 2), 2)
    with pytest.raises(ValueError, match="patch size 14: must be a power of two"):
        MaskRCNN(BackboneViT("mae", (56, 56), 14, 32, 2, 2, class_token=False), 2)
    with pytest.raises(ValueError, match=r"input size \(64, 48\): both sides must be multiples of 32"):
        MaskRCNN(BackboneViT("mae", (64, 48), 8, 32, 2, 2, class_token=False), 2)
    assert len(strides(8)) == LEVELS
