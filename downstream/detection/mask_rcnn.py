"""Mask R-CNN on a plain ViT: the simple feature pyramid of ViTDet, and torchvision's two stages.

Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, Sec. 3 and Appendix A.2: all
levels are made from the encoder's last map; the proposal network has two convolutions, the box head four and one
fully-connected layer, the mask head four, with LayerNorm in the latter two. What is not there is torchvision's: RoIAlign
with 2 x 2 samples a cell, smooth L1 (beta 1/9) on boxes, non-maximum suppression at 0.5.

Strides follow the patch: a quarter, half, once, twice its side, and twice that for the level that only makes proposals.
With patches of 16 pixels these are ViTDet's 4, 8, 16, 32 and 64; with 8 pixels, meant for small images, 2 to 32.

B batch   D width of the encoder   C channels of a level   h, w patch grid   n objects of an image   R regions
K classes with background, which is 0   H, W image in pixels
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from downstream.vit import BackboneViT

ASPECT_RATIOS = (0.5, 1.0, 2.0)
LEVELS = 5
COARSEST = 4
"""Sides of an image must be multiples of so many patches, so that no level cuts anything off."""

_BOX_SIDE, _MASK_SIDE = 7, 28  # cells of a region in the box head's input, and in a predicted mask

_layer_norm = partial(LayerNorm2d, eps=1e-6)


class SimpleFeaturePyramid(nn.Module):
    """Five maps from the last one of a plain encoder.

    Args:
        width: D.
        channels: C.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels  # read by torchvision
        half, quarter = width // 2, width // 4
        larger4 = [_doubled(width, half), _layer_norm(half), nn.GELU(), _doubled(half, quarter)]
        steps: list[tuple[list[nn.Module], int]] = [
            (larger4, quarter),
            ([_doubled(width, half)], half),
            ([], width),
            ([nn.MaxPool2d(2)], width),
        ]
        self.levels = nn.ModuleList(nn.Sequential(*before, *_merged(width, channels)) for before, width in steps)

    def forward(self, last: Tensor) -> OrderedDict[str, Tensor]:
        """[B, D, h, w] -> [B, C, f*h, f*w], f = 4, 2, 1 and 1/2 for the levels "0" to "3", 1/4 for "pool"."""
        maps = OrderedDict((str(i), level(last)) for i, level in enumerate(self.levels))
        maps["pool"] = functional.max_pool2d(maps["3"], kernel_size=1, stride=2)
        return maps


def _doubled(width: int, to: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(width, to, kernel_size=2, stride=2)


def _merged(width: int, channels: int) -> list[nn.Module]:
    first, second = nn.Conv2d(width, channels, 1, bias=False), nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    return [first, _layer_norm(channels), second, _layer_norm(channels)]


class MaskRCNN(nn.Module):
    """Detector and segmenter of objects.

    Args:
        encoder: without class token; its input size is that of the images.
        num_classes: K.
        channels: C, of the pyramid and of the heads.
        anchor_scale: side of the square anchor of a level, in strides of the level.
        box_samples: regions of an image that the box head learns from; at most a quarter of them hold an object.

    Raises:
        ValueError: a class token, or an image size or patch that gives strides that are no whole powers of two.
    """

    def __init__(
        self, encoder: BackboneViT, num_classes: int, channels: int = 256, anchor_scale: float = 8.0, box_samples: int = 512
    ) -> None:
        super().__init__()
        _check(encoder)
        self.encoder = encoder
        self.neck = SimpleFeaturePyramid(encoder.width, channels)
        sizes = tuple((anchor_scale * stride,) for stride in strides(encoder.patch_size))
        convolutions = [channels] * 4
        built = TorchvisionMaskRCNN(
            self.neck,
            rpn_anchor_generator=AnchorGenerator(sizes, (ASPECT_RATIOS,) * LEVELS),
            rpn_head=_in_float32(RPNHead(channels, len(ASPECT_RATIOS), conv_depth=2)),
            box_head=FastRCNNConvFCHead((channels, _BOX_SIDE, _BOX_SIDE), convolutions, [4 * channels], _layer_norm),
            box_predictor=_in_float32(FastRCNNPredictor(4 * channels, num_classes)),
            box_batch_size_per_image=box_samples,
            mask_head=MaskRCNNHeads(channels, convolutions, 1, _layer_norm),
            mask_predictor=_in_float32(MaskRCNNPredictor(channels, channels, num_classes)),
        )
        # torchvision's own forward would resize the images and paste the masks; its two stages are all that is wanted.
        self.rpn, self.roi_heads = built.rpn, built.roi_heads

    def features(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """[B, 3, H, W] -> the maps of the pyramid in float32; anchors and RoIAlign take their type."""
        tokens = self.encoder(images, layers=[-1])[0]  # [B, h*w, D]
        last = tokens.transpose(1, 2).unflatten(2, self.encoder.grid_size)
        return OrderedDict((name, level.float()) for name, level in self.neck(last).items())

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training mode, objects in evaluation mode.

        Args:
            images: normalised, [B, 3, H, W].
            targets: for each image, in training: `boxes` float [n, 4] as x0, y0, x1, y1 in pixels, `labels` int64 [n]
                in 1..K-1, `masks` uint8 [n, H, W]. n may be 0.

        Returns:
            In training the five losses by name, to be summed. Else, for each image, `boxes` [n, 4], `labels` [n],
            `scores` [n] falling, and `masks` float [n, 1, 28, 28], the probability of the object in the cells of its box.
        """
        sizes = [(images.shape[2], images.shape[3])] * len(images)
        features = self.features(images)
        proposals, proposal_losses = self.rpn(ImageList(images, sizes), features, targets)
        objects, head_losses = self.roi_heads(features, proposals, sizes, targets)
        return {**proposal_losses, **head_losses} if self.training else objects


def strides(patch_size: int) -> list[int]:
    """Of the five levels, in pixels."""
    return [patch_size // 4 * 2**level for level in range(LEVELS)]


def paste(masks: Tensor, boxes: Tensor, scale: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Masks of boxes as masks of the whole image, in the size it had before it was resized.

    RoIAlign, which makes the targets, reads a map as if pixel i lay at i and not at i + 1/2. Pasting reads the cells in
    the same way, and so is its inverse. Bilinear on both axes, which is two small matrices; 0 outside the box.

    Args:
        masks: probabilities [n, 1, 28, 28].
        boxes: in pixels of the resized image, [n, 4].
        scale: resized size / original size, vertically and horizontally.
        size: (height, width) of the original.

    Returns:
        Probabilities [n, height, width].
    """
    down = _weights(boxes[:, 1], boxes[:, 3], scale[0], size[0], masks.shape[2])
    across = _weights(boxes[:, 0], boxes[:, 2], scale[1], size[1], masks.shape[3])
    return down @ masks[:, 0].float() @ across.transpose(1, 2)


def _weights(low: Tensor, high: Tensor, scale: float, size: int, cells: int) -> Tensor:
    """Share of each cell in each pixel along one axis: [n, size, cells]."""
    pixels = (torch.arange(size, device=low.device) + 0.5) * scale - 0.5
    side = (high - low).clamp(min=1.0)[:, None]  # RoIAlign takes no region for smaller than a pixel
    places = (pixels - low[:, None]) / side * cells - 0.5
    return (1 - (places[..., None] - torch.arange(cells, device=low.device)).abs()).clamp(min=0)


def _in_float32(head: nn.Module) -> nn.Module:
    """The same head, its outputs in float32: boxes of a large image do not fit into bf16."""
    head.register_forward_hook(_to_float32)
    return head


def _to_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_to_float32(module, inputs, element) for element in output)


def _check(encoder: BackboneViT) -> None:
    if encoder.cls_token is not None:
        raise ValueError("the encoder must have no class token")
    patch, step = encoder.patch_size, COARSEST * encoder.patch_size
    if patch < 4 or patch & (patch - 1):
        raise ValueError(f"patch size {patch}: must be a power of two, 4 or more, for RoIAlign's strides")
    if any(size % step for size in encoder.input_size):
        raise ValueError(f"input size {encoder.input_size}: both sides must be multiples of {step}, {COARSEST} patches")
