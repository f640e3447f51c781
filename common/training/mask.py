"""The mask of a pre-training run, from its flags."""

from __future__ import annotations

from dataclasses import fields

from common.evolved_mask import EvolvedMask, check_for_encoder
from common.mask_config import MaskConfig
from common.training.config import TrainConfig
from common.training.errors import BadInput
from common.training.kept_parts import check_kept_parts
from common.visualize import describe_schedule


def make_mask(config: TrainConfig, mask_config: MaskConfig) -> EvolvedMask:
    """The mask of a run, with everything checked that model and flags decide of it, before there are data or a device.

    Raises:
        BadInput: a strategy, a ratio, blocks or a number of parts that do not fit the model or the grid.
    """
    check_kept_parts(config, mask_config)
    grid_size = height, width = config.grid_size
    try:
        num_masked = mask_config.count_masked(grid_size, config.mask_ratio)
        check_for_encoder(
            mask_config,
            depth=config.depth,
            grid_size=grid_size,
            num_masked=num_masked,
            even_counts=not config.uneven_masks,
        )
    except ValueError as error:
        if str(error).partition(" ")[0] in {option.name for option in fields(mask_config)}:
            raise BadInput(f"--{error} (--model {config.model})") from None
        where = f"image {config.input_size}, patch grid {height}x{width}; see --mask_ratio, --parts_start, --preset small"
        raise BadInput(f"{error} ({where})") from None
    return EvolvedMask(grid_size, num_masked, config.epochs, mask_config, seed=config.seed)


def describe_end(mask: EvolvedMask) -> str:
    """Where alpha and K will end in a run that is shorter than its schedule (Eq. 4 with T above the epochs); else empty.

    The released code's T is 300 whatever the run (--recipe authors).
    """
    config, last = mask.config, mask.total_epochs - 1
    length = config.schedule_epochs or mask.total_epochs
    evolves = mask.rule.alpha is None and config.alpha is None
    if not evolves or last + 1 >= length:
        return ""
    at_end = EvolvedMask((mask.height, mask.width), mask.num_masked, mask.total_epochs, config)
    at_end.set_epoch(last)
    ends = describe_schedule(config, at_end.alpha, at_end.num_parts)
    return (
        f"the schedule is for {length} epochs and this run has {last + 1}: {ends} in the last one "
        f"(--schedule_epochs {last + 1} fits it to the run)"
    )
