"""The pre-training runs behind the paper's tables, by name.

A name such as `mae_small_200_evolved` says method, size, epochs and mask, and is the folder of its results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stage = Literal["finetune", "linear_probe", "segment", "detect"]


@dataclass(frozen=True)
class PretrainedEncoder:
    """A pre-trained encoder of the tables.

    Attributes:
        method: "mae", "beit" or "simmim"; "none" for random weights.
        size: "small" or "base".
        epochs: of pre-training.
        mask: a key of MASKS.
    """

    method: Literal["mae", "beit", "simmim", "none"]
    size: Literal["small", "base"] = "small"
    epochs: int = 0
    mask: str = ""

    def __post_init__(self) -> None:
        if self.method != "none" and self.mask not in MASKS:
            raise ValueError(f"unknown mask {self.mask!r}: one of {', '.join(MASKS)}")

    @property
    def name(self) -> str:
        """Folder of its results."""
        if self.method == "none":
            return f"random_weights_{self.size}"
        return f"{self.method}_{self.size}_{self.epochs}_{self.mask}"


MASKS: dict[str, tuple[str, ...]] = {
    "evolved": (),
    "official": ("--mask", "official"),
    "random": ("--mask", "random"),
    "grid": ("--mask", "grid"),
    "block": ("--mask", "block"),
    "grid_to_block": ("--mask", "grid-to-block"),
    **{f"alpha_{value}": ("--alpha", value) for value in ("0.5", "1")},
    **{f"gamma_{value}": ("--gamma", value) for value in ("0.2", "0.5", "1", "5")},
    **{f"parts_{value}": ("--num_parts", value) for value in ("5", "10", "30", "40")},
    **{
        f"parts_{start}_to_{end}": ("--parts_start", start, "--parts_end", end)
        for start, end in (("30", "5"), ("40", "5"), ("30", "10"))
    },
}
"""Name -> flags of the trainer. What the tables call gamma 2, dynamic alpha or K 40 -> 10 is `evolved`, the default; alpha 0
is the grid mask itself (equal to the bit, tested), and MAE's official mask is `random`."""
