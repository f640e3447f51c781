"""What a run of masks is besides its equations: size, options, epoch, what is refused, and the state that is saved.

B batch (images)   H, W patch grid   N = H*W patches   K parts   m masked patches   T epochs
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .mask_config import MaskConfig
from .masks import RULES, MaskShape, count_masked
from .states import differences


class MaskState(ABC):
    """Base of EvolvedMask (evolved_mask.py), where its arguments are explained.

    Attributes:
        epoch: t, where the schedule stands.
        rule: of the strategy (masks.py).
        least_masked, most_masked: both m, or the ends of `mask_ratio_range`.
        generator: of draws for samples without ids.
    """

    def __init__(
        self,
        grid_size: tuple[int, int],
        num_masked: int,
        total_epochs: int,
        config: MaskConfig | None = None,
        *,
        seed: int = 0,
        num_prefix_tokens: int = 1,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise ValueError("give either config or single options, not both")
        self.config = config or MaskConfig.from_recipe("paper", **options)
        self.parts_options = self.config.parts_options
        self.height, self.width = grid_size
        self.num_patches = self.height * self.width
        self.num_masked, self.total_epochs = _whole_count(num_masked, self.num_patches), total_epochs
        self.seed, self.num_prefix_tokens = seed, num_prefix_tokens
        self.shape = MaskShape(self.height, self.width, self.num_masked, self.config.mask_unit)
        self.rule = RULES[self.config.mask]
        self._check_shape()
        self.generator = torch.Generator().manual_seed(seed)
        self.set_epoch(0)
        self._was_told_epoch = False

    def _check_shape(self) -> None:
        patches = self.num_patches
        if not 0 < self.num_masked < patches:
            raise ValueError(f"num_masked must be inside 1..{patches - 1} for {patches} patches, got {self.num_masked}")
        if self.config.uses_parts and self.config.most_parts > patches:
            raise ValueError(f"K = {self.config.most_parts} parts is above the N = {patches} patches of an image")
        self.rule.check(self.shape)
        ratios = self.config.ratio_range
        if ratios and not self.rule.any_count:
            raise ValueError(f"mask_ratio_range draws numbers of patches that mask {self.config.mask!r} cannot all make")
        self.least_masked = self.most_masked = self.num_masked
        if ratios:
            self.least_masked, self.most_masked = (count_masked(patches, ratio) for ratio in ratios)

    @property
    @abstractmethod
    def alpha(self) -> float:
        """Weight of the second term of the blend at this epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Moves the schedule to epoch t, 0 <= t <= T."""
        check_epoch(epoch, self.total_epochs)
        if epoch != int(epoch):
            raise ValueError(f"epoch must be a whole number, got {epoch}")
        self.epoch = int(epoch)
        self._was_told_epoch = True

    def _warn_of_standing_still(self) -> None:
        """Once, where nobody moves a schedule: nothing fails then, and the masks stay those of the first epoch."""
        first_parts, last_parts = self.config.parts_range
        evolves = self.config.alpha is None and self.rule.alpha is None
        evolves |= self.config.uses_parts and first_parts != last_parts
        if not self._was_told_epoch and self.total_epochs > 1 and evolves:
            warnings.warn(
                f"set_epoch was never called: masks stay those of epoch 0 of {self.total_epochs} (alpha {self.alpha:g}); "
                "call set_epoch(epoch) at the start of every epoch, also of the first",
                stacklevel=4,  # through __call__ and torch.no_grad: the line that asked for masks
            )
            self._was_told_epoch = True

    def describe_count(self) -> str:
        """How many patches are masked, in words: "147", "at most 75", "117 to 176"."""
        if self.config.ratio_range:
            return f"{self.least_masked} to {self.most_masked}"
        return f"{'' if self.rule.exact_count else 'at most '}{self.num_masked}"

    def _check_patches(self, of_patches: Tensor) -> None:
        """Raises ValueError unless [B, N, ...] is of the patches of this grid."""
        if of_patches.shape[1] != self.num_patches:
            read = "attention has" if self.config.graph == "attention" else f"{self.config.graph} have"
            raise ValueError(
                f"the {read} {of_patches.shape[1]} patch tokens, "
                f"but the mask's grid is {self.height}x{self.width} = {self.num_patches}"
            )

    def _check_given(self, parts: Tensor, batch: int) -> None:
        if not self.rule.uses_parts:
            raise ValueError(f"mask {self.config.mask!r} makes no parts, so none can be given")
        if parts.shape != (batch, self.num_patches):
            raise ValueError(f"parts must be [{batch}, {self.num_patches}], got {list(parts.shape)}")

    # --- saved and continued ---

    def _settings(self) -> dict[str, Any]:
        counts = {"num_masked": self.num_masked, "total_epochs": self.total_epochs}
        return {"seed": self.seed, "grid_size": [self.height, self.width], **counts}

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to draw the same masks, as plain values and one tensor."""
        config, generator = asdict(self.config), self.generator.get_state()
        return {"epoch": self.epoch, **self._settings(), "config": config, "generator": generator}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`, with options that are at a default of its time and of today as they were then.

        Raises:
            ValueError: the state belongs to another configuration; names what differs.
        """
        settings = self._settings()
        saved, config = {name: state[name] for name in settings}, self.config.continuing(state["config"])
        differing = differences(saved, settings) + differences(MaskConfig.completed(state["config"]), asdict(config))
        if differing:
            raise ValueError(f"the saved masks were made with other settings: {'; '.join(differing)}")
        self.config, self.parts_options = config, config.parts_options
        self.set_epoch(state["epoch"])
        self.generator.set_state(state["generator"].cpu())


def check_epoch(epoch: float, total_epochs: int) -> None:
    """Raises ValueError unless 0 <= t <= T and T >= 1."""
    if total_epochs < 1 or not 0 <= epoch <= total_epochs:
        raise ValueError(f"epoch must be between 0 and total_epochs, got epoch {epoch} of {total_epochs}")


def _whole_count(num_masked: Any, patches: int) -> int:
    try:
        return operator.index(num_masked)
    except TypeError:
        raise ValueError(
            f"num_masked must be a number of patches (int), got {num_masked!r}; count_masked({patches}, ratio) is that of a ratio"
        ) from None
