"""GPU-hours of the runs behind the paper's tables, by arithmetic. Nothing here was timed by this project on a GPU.

Multiply-adds (MACs) of a forward pass are counted from the sizes of the models; the backward pass costs two more. How many of
them a GPU does in a second is taken from the one run whose hours its authors published: fine-tuning ViT-B for 100 epochs in
7 h 11 min on 32 V100 (facebookresearch/mae, FINETUNE.md) is PUBLISHED_UTILISATION of what those GPUs state as their peak.

D width   L blocks   T tokens   N patches
"""

from __future__ import annotations

import math
from dataclasses import dataclass

IMAGENET, ADE20K_BATCH, COCO = 1_281_167, 16, 118_287
V100_PEAK, A100_PEAK = 125.0, 312.0
"""TFLOP/s of half-precision matrix products, NVIDIA's data sheets."""

WIDTH = {"small": 384, "base": 768}
DEPTH, PATCHES, PATCH_PIXELS, DECODER = 12, 196, 3 * 16 * 16, (512, 8)
MASKED = {"mae": 147, "beit": 75, "simmim": 117}
SPARED = 0.376
"""Share of attention passes that the schedule spares in a run with gamma 2: measured by benchmarks/skipped_passes.py."""

UPERNET_GMACS = {"small": 157.7, "base": 606.8}
"""Encoder, decoder and auxiliary head on one crop of 512 px: FlopCounterMode on downstream/segmentation/upernet.py (tested)."""

MASK_RCNN_HEADS_GMACS = 231.0
"""Pyramid, proposals and heads on one training image of 1024 px with 7 objects: torch's FlopCounterMode on
downstream/detection/mask_rcnn.py. It varies a little with the regions that are sampled."""


def vit_macs(width: int, depth: int, tokens: int) -> float:
    """Blocks of a ViT on one image: 12 T D^2 of linear layers and 2 T^2 D of attention in each."""
    return float(depth * (12 * tokens * width**2 + 2 * tokens**2 * width))


def encoder_macs(size: str, tokens: int = 1 + PATCHES, patches: int = PATCHES) -> float:
    """Encoder with its patch embedding."""
    return vit_macs(WIDTH[size], DEPTH, tokens) + patches * PATCH_PIXELS * WIDTH[size]


def pretraining_macs(method: str, size: str, evolved: bool) -> float:
    """Forward, backward and, with evolved masks, the attention pass: one image. The tokenizer of BEiT is left out."""
    width = WIDTH[size]
    if method == "mae":
        inner, depth = DECODER
        step = encoder_macs(size, 1 + PATCHES - MASKED["mae"])
        step += (
            vit_macs(inner, depth, 1 + PATCHES) + (1 + PATCHES - MASKED["mae"]) * width * inner + PATCHES * inner * PATCH_PIXELS
        )
    elif method == "beit":
        step = encoder_macs(size) + MASKED["beit"] * width * 8192
    else:
        step = encoder_macs(size) + PATCHES * width * PATCH_PIXELS
    return 3 * step + (encoder_macs(size) * (1 - SPARED) if evolved else 0.0)


def finetuning_macs(size: str) -> float:
    """Forward and backward: one image of 224 px."""
    return 3 * encoder_macs(size)


def linear_probe_macs(size: str) -> float:
    """Forward only: one image of 224 px."""
    return encoder_macs(size)


def segmentation_macs(size: str) -> float:
    """Forward and backward: one crop of 512 px."""
    return 3 * UPERNET_GMACS[size] * 1e9


def detection_macs(size: str, side: int = 64, window: int = 14) -> float:
    """Forward and backward: one image of 1024 px, attention over the whole grid in 4 of 12 blocks, in filled-up windows else."""
    width, tokens, global_blocks = WIDTH[size], side**2, 4
    windows = math.ceil(side / window) ** 2
    linear = width**2 * (DEPTH * 8 * tokens + 4 * (global_blocks * tokens + (DEPTH - global_blocks) * windows * window**2))
    attention = 2 * width * (global_blocks * tokens**2 + (DEPTH - global_blocks) * windows * window**4)
    return 3 * (linear + attention + tokens * PATCH_PIXELS * width + MASK_RCNN_HEADS_GMACS * 1e9)


PUBLISHED_UTILISATION = 2 * finetuning_macs("base") * IMAGENET * 100 / (32 * (7 + 11 / 60) * 3600 * V100_PEAK * 1e12)
"""Share of the peak that MAE's published fine-tuning reached: about 0.13."""

DEFAULT_TFLOPS = round(PUBLISHED_UTILISATION * A100_PEAK)
"""TFLOP/s of an A100 at that utilisation."""


@dataclass(frozen=True)
class TrainingCost:
    """What a run costs.

    Attributes:
        macs: for one image, forward, backward and what else it does.
        images: over the whole run.
    """

    macs: float
    images: float

    def gpu_hours(self, tflops: float) -> float:
        """Hours of one GPU that sustains so many TFLOP/s (a MAC is two FLOP)."""
        return 2 * self.macs * self.images / (tflops * 1e12) / 3600
