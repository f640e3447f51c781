"""`--preset small`: settings for data much smaller than ImageNet, from the number of images and of patches.

The recipe of the paper is for 1.28 million images in batches of thousands. With a few hundred images its warm-up is longer than
the run, its rate shrinks with the batch until nothing moves, an epoch is an update or none, and 40 parts of 64 patches are hardly
parts. The rules below are rules of thumb (docs/small_data.md gives the reasons, and what was tried); what a recipe or the command
line says wins over each of them. All is arithmetic on plain numbers, and what comes out is a plain configuration: a checkpoint
knows nothing of rules, and a resumed run is the run it was.

n images   B images an update   K parts   N patches
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from common.mask_config import MaskConfig
    from common.training.config import RunConfig

Preset = Literal["none", "small"]

UPDATES_AN_EPOCH = 8
"""Updates that an epoch has at least: alpha, K, the log and the checkpoints go by epochs."""

WARMUP_SHARE = 0.1
"""Of the run. MAE warms up over 0.2 of its 200 epochs here, BEiT and SimMIM over 0.05."""

PAPER_PATCHES, PAPER_PARTS = 196, (40, 10)
"""N and K of Sec. 4.1: about 5 patches a part at the start, 20 at the end."""


class SmallData(NamedTuple):
    """What differs between the kinds of training.

    Attributes:
        batches: smallest and largest B; between them the largest power of two of which n holds 32.
        updates: that a run whose length is in epochs has at least.
        lr: after the warm-up, for every B; None: that of the recipe, which does not change with B.
    """

    batches: tuple[int, int]
    updates: int
    lr: float | None


PRETRAINING = SmallData((32, 256), 500, 1e-3)
TOKENIZER = SmallData((16, 64), 1000, 3e-3)
FINETUNING = SmallData((16, 128), 500, 1e-3)
PROBING = SmallData((64, 512), 500, 1.0)  # LARS: its rates are relative to the weights
SEGMENTATION = SmallData((4, 16), 0, None)
DETECTION = SmallData((4, 16), 500, 1e-4)


# --- Rules ------------------------------------------------------------------------------------------------------------


def batch_for(images: int, batches: tuple[int, int]) -> int:
    """B: the largest power of two of which the images hold 32, within bounds that are powers of two."""
    smallest, largest = batches
    fitting = 2 ** int(math.log2(max(images // 32, 1)))
    return min(max(fitting, smallest), largest)


def share_batch(batch: int, ranks: int, most: int) -> tuple[int, int]:
    """(batch_size, accum_iter) of a rank for an effective batch of B, or the next one that the ranks can share.

    Args:
        most: largest batch_size.
    """
    share = -(-batch // ranks)
    steps = -(-share // most)
    return -(-share // steps), steps


def repeats_for(images: int, batch: int, epochs: int | None, updates: int) -> int:
    """Crops of each image an epoch, so that an epoch has UPDATES_AN_EPOCH and the run `updates` of them.

    Args:
        epochs: length of the run; None: its length is in updates.
    """
    needed = max(UPDATES_AN_EPOCH, -(-updates // epochs) if epochs else 0)
    return max(1, -(-needed * batch // images))


def parts_for(patches: int) -> tuple[int, int]:
    """(first, last) K: the paper's parts have as many patches here, but there are 2 at least and not more than the paper's."""
    first, last = (min(max(math.floor(parts * patches / PAPER_PATCHES + 0.5), 2), parts) for parts in PAPER_PARTS)
    return first, last


# --- What they give for a run -----------------------------------------------------------------------------------------


def choose_parts(config: MaskConfig, patches: int, given: Collection[str]) -> dict[str, Any]:
    """K's options that were not given, for a mask with parts; nothing where one K was given for all epochs."""
    if not config.uses_parts or config.num_parts is not None:
        return {}
    chosen = dict(zip(("parts_start", "parts_end"), parts_for(patches), strict=True))
    return {name: value for name, value in chosen.items() if name not in given}


def choose_settings(config: RunConfig, images: int, ranks: int, given: Collection[str]) -> dict[str, Any]:
    """Batch, repeats, warm-up and learning rate that were not given, for pre-training and the tasks downstream alike.

    Args:
        config: with the values that were given, and any for the others.
        images: n, of the training set.
        ranks: processes of the run.
    """
    rules, length, chosen = config.small, config.length, dict[str, Any]()
    if not {"batch_size", "accum_iter"} & set(given):
        at_once = next(int(flag.default) for flag in fields(config) if flag.name == "batch_size")  # type: ignore[arg-type]
        chosen["batch_size"], chosen["accum_iter"] = share_batch(batch_for(images, rules.batches), ranks, at_once)
    batch = chosen.get("batch_size", config.batch_size) * chosen.get("accum_iter", config.accum_iter) * ranks
    in_epochs = length.unit == "epochs"
    chosen["repeat"] = repeats_for(images, batch, int(length.total) if in_epochs else None, rules.updates)
    warmup = length.total * WARMUP_SHARE
    chosen[warmup_flag(config)] = round(warmup, 6) if in_epochs else round(warmup)
    if rules.lr is not None and not {"blr", "blr_batch"} & set(given):
        chosen["lr"] = rules.lr
    return {name: value for name, value in chosen.items() if name not in given}


def warmup_flag(config: RunConfig | type[RunConfig]) -> str:
    """Name of the flag of the warm-up, in epochs or in updates."""
    names = {flag.name for flag in fields(config)}
    return next(name for name in ("warmup_epochs", "warmup_iterations") if name in names)


# --- What is said of them ---------------------------------------------------------------------------------------------


def preset_record(config: RunConfig, mask: MaskConfig | None) -> dict[str, Any]:
    """Entry of run.json: the preset's name, and the values that it chose by flag."""
    values = {**(asdict(mask) if mask else {}), **asdict(config)}
    return {"name": config.preset, "chose": {name: values[name] for name in config.preset_chose}}


def describe_choice(config: RunConfig, mask: MaskConfig | None, images: int) -> str:
    """What the preset chose, as flags; empty without a preset."""
    if config.preset == "none":
        return ""
    flags = " ".join(f"--{name} {value}" for name, value in preset_record(config, mask)["chose"].items())
    return f"--preset {config.preset} chose for {images} images: {flags or 'nothing, all was given'}"


FEW_UPDATES, LOW_RATE, FEW_IN_AN_EPOCH = 1000, 2e-4, 4


def offer_preset(config: RunConfig, updates_an_epoch: int, updates: int, lr: float) -> str:
    """A line that offers the preset by name where data are few and none is on; else empty.

    Few: an epoch of less than 4 updates, or a run of less than 1000 at a rate below 2e-4. AdamW moves a weight by about its rate
    an update, so that such a run ends near its random start.
    """
    short = updates_an_epoch < FEW_IN_AN_EPOCH
    slow = config.length.unit == "epochs" and updates < FEW_UPDATES and lr < LOW_RATE
    if config.preset != "none" or not (short or slow):
        return ""
    found = f"{updates_an_epoch} update{'s' * (updates_an_epoch != 1)} an epoch, {updates} in all, lr {lr:.3g}"
    return f"few data for these settings ({found}): --preset small chooses batch, repeats, warm-up and rate for them"


def offer_parts(config: RunConfig, mask: MaskConfig, patches: int) -> str:
    """The same where a part has less than 3 patches at the start, of which the paper's have 5."""
    first = mask.parts_range[0]
    if config.preset != "none" or not mask.uses_parts or patches >= 3 * first:
        return ""
    return f"K = {first} parts of {patches} patches: --preset small sets K {' -> '.join(map(str, parts_for(patches)))}"
