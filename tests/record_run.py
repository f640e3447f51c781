"""Runs trainers and keeps the loss of each step and the mask of each image: `python -m tests.record_run FILE`.

Each line of FILE is a method and its flags.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from common.evolved_mask import MaskBatch
from common.training.data import Batch
from common.training.engine import PretrainingTask
from common.training.loop import Loop, UpdateNumbers
from tests.methods import MAINS, shallow_models

losses: list[float] = []
masks: dict[tuple[int, int], torch.Tensor] = {}

_prepare, _count = PretrainingTask.prepare, Loop._count


def prepare(self: PretrainingTask, batch: Batch, epoch: float) -> MaskBatch:
    """The mask as it is made, and a copy by (epoch, image)."""
    made = _prepare(self, batch, epoch)
    for index, mask in zip(batch.sample_ids.tolist(), made.mask, strict=True):
        masks[self.mask.epoch, index] = mask.clone()
    return made


def count(self: Loop, epoch: int, update: int, seen: Any, numbers: UpdateNumbers) -> None:
    """The step's numbers as they are counted, and a copy of the loss."""
    losses.append(numbers.loss)
    _count(self, epoch, update, seen, numbers)


def main(file: Path) -> None:
    """Runs every line of `file`."""
    for models, name, model in list(shallow_models()):
        models[name] = model
    port = int(os.environ.get("MASTER_PORT", "0"))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # each run meets at a port of its own, not at the launcher's
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        os.environ["MASTER_PORT"] = str(port + number)
        method, *arguments = line.split()
        losses.clear()
        masks.clear()
        MAINS[method](arguments)
        output = Path(arguments[arguments.index("--output_dir") + 1])
        torch.save({"losses": losses, "masks": masks}, output / f"record-{os.environ.get('RANK', '0')}.pth")


if __name__ == "__main__":
    PretrainingTask.prepare = prepare  # type: ignore[method-assign]
    Loop._count = count  # type: ignore[method-assign]
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
