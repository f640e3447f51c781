"""What the training loop is given: a task, and the run that it is part of.

The loop (common/training/loop.py) knows updates, processes, precision, signals, checkpoints and the log. A task knows what is
trained and on what loss. Pre-training with masks (common/training/engine.py), the downstream tasks (downstream/training.py) and
BEiT's tokenizer (beit_evolved/train_tokenizer.py) are tasks; nothing is a kind of loop.

B images of a rank and accumulation step
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.training.checkpoint import find_resume, is_whole, read_checkpoint, resumable
from common.training.config import ImageSetConfig, RunConfig
from common.training.data import Batch, collate
from common.training.distributed import Processes, count_ranks, start_processes
from common.training.errors import BadInput
from common.training.lock import RunLock
from common.training.optim import EncoderEMA
from common.training.runlog import RunLog
from common.training.sources import ImageSource, open_source

Collate = Callable[[list[Any]], Batch]


class Run:
    """What surrounds a task: flags, processes, precision, the log, and the checkpoint that the run goes on from.

    Raises:
        BadInput: a precision that the device does not have.
    """

    def __init__(self, config: RunConfig, processes: Processes, lock: RunLock | None = None) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.lock = lock
        self.precision = choose_precision(config, self.device)
        self.log = RunLog(config, processes)
        self.resumed_from = processes.on_main(lambda: choose_resume(config, self.log.say))

    @property
    def output(self) -> Path:
        """Folder of the run."""
        return Path(self.config.output_dir)

    @property
    def place(self) -> str:
        """Devices and precision, for people."""
        return f"{self.device} x {self.processes.world}, {str(self.precision).removeprefix('torch.')}"

    def autocast(self) -> torch.autocast:
        """The precision of the run; graphs, losses and statistics that need more leave it by themselves."""
        lower = self.precision != torch.float32
        return torch.autocast(self.device.type, dtype=self.precision if lower else None, enabled=lower)


def choose_resume(config: RunConfig, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that the run goes on from, chosen by one rank for all, every byte of it checked; says what is damaged.

    Raises:
        BadInput: all that could be continued are damaged.
    """
    if config.resume != "auto":
        return find_resume(config)
    damaged: list[Path] = []
    for path in resumable(config):
        if is_whole(path, every_byte=True):
            if damaged:
                say(f"damaged, so {path.name} is continued in its place: {', '.join(map(str, damaged))}")
            return path
        damaged.append(path)
    if damaged:
        raise BadInput(f"checkpoint {damaged[0]}: is damaged, and no other one there is whole (--resume none starts anew)")
    return None


@contextmanager
def open_run(config: RunConfig, writes: bool = True) -> Iterator[Run]:
    """Joins the processes and holds the output folder; leaves both after the block, however it ends.

    Args:
        writes: whether the run is one that writes checkpoints and logs, and so has to be alone in its folder.

    Raises:
        BadInput: another run holds the folder, or it cannot be made; a device or precision that is not there.
    """
    processes = start_processes(config.device, config.dist_timeout)
    lock = RunLock(Path(config.output_dir)) if writes else None
    try:
        if lock is not None:
            processes.on_main(lock.acquire)
        run = Run(config, processes, lock)
        if lock is not None and lock.taken_from:
            run.log.say(lock.taken_from)
        yield run
    finally:
        if lock is not None:
            lock.release()
        processes.close()


@contextmanager
def open_data_run(config: RunConfig) -> Iterator[tuple[Run, ImageSource]]:
    """A run and its images. A single process looks for them before device and output folder; of several the main one, for all.

    Args:
        config: of a command with named sets of images too.

    Raises:
        BadInput: see :func:`open_run` and :func:`common.training.sources.open_source`.
    """
    assert isinstance(config, ImageSetConfig)
    alone = open_source(config) if count_ranks() == 1 else None
    with open_run(config) as run:
        yield run, alone or open_source(config, run.processes)


@dataclass
class Outcome:
    """What a finished run leaves.

    Attributes:
        metrics: the last numbers, for result.json.
        details: more entries of result.json.
        summary: a line with the numbers; empty: none.
        files: what to look at -> where it is, for the last lines on the screen.
    """

    metrics: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    files: dict[str, Path] = field(default_factory=dict)


class Task(ABC):
    """What is trained, and on what loss.

    In the order in which the loop calls them: :meth:`make_optimizer`; on resume :meth:`read_checkpoint`,
    :meth:`check_same_run` and :meth:`load_state_dict`; :meth:`record`, :meth:`title` and :meth:`notes`; for each epoch
    :meth:`before_epoch`; for each batch :meth:`receive`, :meth:`prepare` and :meth:`loss`; for an update
    :meth:`tallies`, once it is made :meth:`after_update`, then :meth:`progress`; after an epoch :meth:`after_epoch`,
    then :meth:`state_dict`; at the end :meth:`finish`.

    Attributes:
        kind: what result.json says that it is the result of.
        model: on the device of the run.
        ema: moving average of the model, which the loop updates and saves, or None.
        facts: plain values that the run depends on besides its flags; a resumed run must have the same.
        collate: samples -> batch.
    """

    kind: str
    model: nn.Module
    ema: EncoderEMA | None = None
    facts: dict[str, Any]
    collate: Collate = staticmethod(collate)

    def __init__(self, run: Run) -> None:
        self.run = run

    # --- start ---

    @abstractmethod
    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        """The optimiser, `lr` being the rate after the warm-up; groups may have a factor `lr_scale`."""

    def read_checkpoint(self, path: Path) -> dict[str, Any]:
        """The state in `path`, in a layout of common/training/checkpoint.py."""
        return read_checkpoint(path)

    @abstractmethod
    def check_same_run(self, state: dict[str, Any], path: Path, effective_batch: int, samples: int) -> None:
        """Raises BadInput, naming what differs, unless the checkpoint belongs to a run with these settings.

        Args:
            effective_batch: images an update.
            samples: images an epoch.
        """

    def state_dict(self) -> dict[str, Any]:
        """More entries of the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - many tasks keep nothing
        """Takes them back; `state` is the whole checkpoint."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """More entries of run.json."""

    @abstractmethod
    def title(self) -> str:
        """What is about to run, for people."""

    def notes(self) -> list[str]:
        """More lines for people at the start: warnings, and what else they should know."""
        return []

    # --- updates ---

    def before_epoch(self, epoch: int, update: int) -> None:  # noqa: B027 - many tasks prepare nothing
        """Called at the start of an epoch, also of one that is taken up at a later `update`."""

    def receive(self, batch: Batch) -> Batch:
        """The batch as training takes it, on the device: what need not be done by the loader's processes."""
        return batch

    def prepare(self, batch: Batch, epoch: float) -> Any:
        """What :meth:`loss` needs besides the batch, made in full precision and without gradients.

        Args:
            epoch: where the run stands, with the share of the epoch that is done.
        """
        return None

    def nonfinite(self) -> tuple[str, list[int] | None]:
        """What :meth:`prepare` found NaN or infinite in the last batch ("": nothing), and in which of its images if it is known.

        `prepare` goes on with something finite then, so that all ranks reach the end of the update together.
        """
        return "", None

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, prepared: Any) -> Tensor | dict[str, Tensor]:
        """Mean over the batch, computed in the precision of the run.

        Several losses by names that begin with `loss_` are summed, and each stands in the epoch's log line.

        Args:
            model: `self.model` as it is trained: compiled, and averaging gradients over the ranks.
        """

    def tallies(self) -> dict[str, Tensor]:
        """Name -> this rank's number or counts [n] since the last call, to be summed over ranks and updates of the epoch."""
        return {}

    def after_update(self) -> None:  # noqa: B027 - many tasks keep nothing
        """Called on every rank once the weights are updated; not for an update that is given up."""

    def progress(self) -> str:
        """What the progress bar shows besides loss and speed."""
        return ""

    # --- ends ---

    def after_epoch(self, epoch: int, line: dict[str, Any], sums: dict[str, Any], last: bool) -> str:
        """Called before the epoch's log line is written.

        Args:
            last: whether the run ends with this epoch.
            line: of the log; numbers may be added.
            sums: of the epoch's tallies.

        Returns:
            What the line on the screen says besides loss and speed.
        """
        return ""

    @abstractmethod
    def finish(self) -> Outcome:
        """Called after the last epoch."""


def losses_by_name(losses: Tensor | dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum, terms) of what :meth:`Task.loss` returned; a single loss has no terms."""
    if isinstance(losses, Tensor):
        return losses, {}
    return torch.stack(list(losses.values())).sum(), losses


def flatten_tallies(tallies: dict[str, Tensor]) -> Tensor:
    """All numbers in a row: float64 [n]."""
    return torch.cat([value.detach().double().flatten() for value in tallies.values()]) if tallies else torch.zeros(0)


def split_tallies(tallies: dict[str, Tensor], summed: Sequence[float]) -> dict[str, Any]:
    """Undoes :func:`flatten_tallies`: a float for each number, float64 [n] on the CPU for each row of counts."""
    named, first = dict[str, Any](), 0
    for name, value in tallies.items():
        part = summed[first : first + value.numel()]
        named[name] = torch.tensor(part, dtype=torch.float64) if value.ndim else part[0]
        first += value.numel()
    return named


def choose_precision(config: RunConfig, device: torch.device) -> torch.dtype:
    """The type that --precision names for this device.

    Raises:
        BadInput: fp16 without a GPU.
    """
    if config.precision == "fp16" and device.type != "cuda":
        raise BadInput("--precision fp16 needs a GPU (its gradient scaler does); use bf16 or fp32")
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
