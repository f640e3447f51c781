"""The training loop: updates over accumulated batches, on one process or many, with exact resume.

Pre-training (common/training/engine.py) and the downstream tasks (downstream/training.py) fill in what a batch's
loss is, and what happens at the ends of epochs; order of the data, precision, accumulation, processes, signals,
non-finite losses, checkpoints and log are here.

B images of a rank and accumulation step
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.draws import Stream, hash_seed
from common.training.checkpoint import LAST, find_resume, read_checkpoint, save_atomically
from common.training.config import LoopConfig
from common.training.data import Batch, RankBatches, Samples, collate, make_loader
from common.training.distributed import Processes
from common.training.errors import BadInput, NonFiniteLoss
from common.training.interrupt import Interrupted, Interruption
from common.training.optim import EncoderEMA, absolute_lr, lr_after, make_optimizer
from common.training.runlog import RunLog, progress
from common.training.stopwatch import PHASES, Stopwatch

BEFORE_FAILURE = "checkpoint-before-nonfinite.pth"

Collate = Callable[[list[Any]], Batch]


class Loop:
    """One run: its state, and the loop over it.

    Args:
        model: what is trained.
        facts: plain values that the run depends on besides its flags; a resumed run must have the same.
    """

    collate: Collate = staticmethod(collate)

    def __init__(
        self,
        config: LoopConfig,
        model: nn.Module,
        samples: Samples,
        batches: RankBatches,
        processes: Processes,
        facts: dict[str, Any],
    ) -> None:
        self.config, self.samples, self.batches, self.processes, self.facts = config, samples, batches, processes, facts
        self.device = processes.device
        self.log = RunLog(config, processes)
        self.model = model.to(self.device)
        self.precision = choose_precision(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.peak_lr = absolute_lr(config, batches.effective_batch)
        self.optimizer = self._make_optimizer()
        self.ema: EncoderEMA | None = None
        self.first_epoch = self.first_update = 0
        self.meters: dict[str, float] = {}
        self.interruption, self.asked_to_stop = Interruption(), False
        self.resumed_from = find_resume(config)

    # --- what a kind of run fills in ---

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        """Raises BadInput unless the checkpoint belongs to a run with these settings."""
        raise NotImplementedError

    def _announce(self) -> None:
        """Opens the log, and says what is about to run."""
        raise NotImplementedError

    def _loss(self, batch: Batch, watch: Stopwatch) -> Callable[[], Tensor]:
        """Prepares a batch outside autocast, and returns what computes its loss, the mean over the batch, inside."""
        raise NotImplementedError

    def _tallies(self) -> dict[str, float]:
        """This rank's numbers since the last call, to be summed over ranks and updates for the epoch's log line."""
        return {}

    def _before_epoch(self, epoch: int) -> None:
        """Called at the start of an epoch, also of one that is taken up in its middle."""

    def _after_epoch(self, epoch: int, line: dict[str, Any]) -> None:
        """May add numbers to the epoch's log line; called before it is written."""

    def _finish(self) -> None:
        """Called after the last epoch."""

    def _state_of_task(self) -> dict[str, Any]:
        """More for the checkpoint."""
        return {}

    def _load_state_of_task(self, state: dict[str, Any]) -> None:
        """Takes it back."""

    def _make_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config, self.peak_lr)

    # --- start ---

    @property
    def total_updates(self) -> int:
        """Length of the run in updates."""
        return self.config.epochs * self.batches.updates

    @property
    def epochs(self) -> int:
        """Length of the run in epochs; the last one may be cut short by `total_updates`."""
        return -(-self.total_updates // self.batches.updates)

    def _updates_in(self, epoch: int) -> int:
        return min(self.batches.updates, self.total_updates - epoch * self.batches.updates)

    def _updates_after(self, epoch: int) -> int:
        """Updates of the run that are done when this epoch is."""
        return epoch * self.batches.updates + self._updates_in(epoch)

    def _resume(self) -> None:
        """Takes up the checkpoint that :func:`find_resume` chose, if there is one; then wraps the model for training."""
        if self.resumed_from is not None:
            self._load_checkpoint(self.resumed_from)
        self.trained = self._wrapped()

    def _load_checkpoint(self, path: Path) -> None:
        state = read_checkpoint(path)
        self._check_same_run(state, path)
        if state["facts"] != self.facts:
            raise BadInput(f"checkpoint {path}: made with {state['facts']}, this run has {self.facts}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self._load_state_of_task(state)
        self.first_epoch, self.first_update = state["epoch"] + 1, state["update"]
        self.meters = dict(state["meters"])
        self.log.say(f"resumed {path} at epoch {self.first_epoch}, update {self.first_update}")

    def _wrapped(self) -> nn.Module:
        """The model as it is trained: compiled, and with gradients averaged over the ranks."""
        wrapped: nn.Module = self.model
        if self.processes.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(wrapped, device_ids=ids)
        if self.config.compile:
            wrapped = torch.compile(wrapped)  # type: ignore[assignment]
        return wrapped

    # --- the loop ---

    def run(self) -> None:
        """Trains the epochs that are left.

        Raises:
            Interrupted: a rank got a signal to stop (common/training/interrupt.py), and the state is saved.
        """
        with self.interruption:
            self._announce()
            if self.first_epoch < self.epochs:
                self.log.forget_result()
            loader = make_loader(self.samples, self.batches, self.config, self.processes, self.collate)
            for epoch in range(self.first_epoch, self.epochs):
                self._before_epoch(epoch)
                self._train_epoch(epoch, loader)
            self._finish()

    def _train_epoch(self, epoch: int, loader: Iterable[Batch]) -> None:
        self.batches.start_at(epoch, self.first_update)
        self.model.train()
        watch = Stopwatch(self.device)
        stream = iter(loader)
        last = self._updates_in(epoch)
        updates = range(self.first_update, last)
        bar = progress(updates, len(updates), f"epoch {epoch + 1}/{self.epochs}", self.processes.is_main)
        for update in bar:
            self._train_update(epoch, update, stream, watch)
            bar.set_postfix_str(self._postfix(watch))
            done = update + 1
            if done < last:
                if self.asked_to_stop or (self.config.save_steps and done % self.config.save_steps == 0):
                    self._save(LAST, epoch - 1, done)
                self._leave_if_asked(epoch, done)
        self._end_epoch(epoch, watch)

    def _train_update(self, epoch: int, update: int, stream: Iterator[Batch], watch: Stopwatch) -> None:
        """One optimiser step over `accum_iter` batches."""
        position = update * self.processes.world + self.processes.rank
        torch.manual_seed(hash_seed(self.config.seed, epoch, position, Stream.MODEL))
        lr = self._set_lr(epoch, update)
        losses: list[Tensor] = []
        names: list[list[str]] = []
        bad: list[str] = []
        for step in range(self.config.accum_iter):
            watch.start()
            batch = self._next(stream)
            watch.lap("data", host=True)
            loss_fn = self._loss(batch, watch)
            losses.append(self._backward(loss_fn, last=step == self.config.accum_iter - 1))
            watch.lap("model")
            names.append(batch.names)
            bad += batch.bad
        total_norm = self._gradient_norm()
        norm = float(total_norm)
        tallies = self._tallies()
        mine = [float(torch.stack(losses).mean()), len(bad), self.interruption.requested, *tallies.values()]
        sums = torch.tensor(mine, dtype=torch.float64, device=self.device)
        loss_sum, bad_sum, signals, *summed = self.processes.sum(sums).tolist()
        self.asked_to_stop = signals > 0
        loss = loss_sum / self.processes.world
        if bad_sum and self.config.on_bad_image == "raise":
            self._stop_unreadable(bad)
        if not math.isfinite(loss) or (self.precision != torch.float16 and not math.isfinite(norm)):
            self._stop_nonfinite(epoch, update, losses, names, loss, norm)
        self._step(total_norm)
        watch.lap("model")
        watch.settle()
        self._count(epoch, update, loss, norm, lr, bad_sum)
        self._add(**dict(zip(tallies, summed, strict=True)))

    def _set_lr(self, epoch: int, update: int) -> float:
        lr = self._lr_at(epoch + update / self.batches.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _lr_at(self, epoch: float) -> float:
        return lr_after(epoch, self.config.warmup_epochs, self.config.epochs, self.config, self.peak_lr)

    def _next(self, stream: Iterator[Batch]) -> Batch:
        batch = next(stream)
        if not batch.views:
            raise BadInput(f"no readable image was found in the place of {batch.bad[0]}")
        return batch.to(self.device)

    def _backward(self, loss_fn: Callable[[], Tensor], last: bool) -> Tensor:
        """Adds this batch's gradient; ranks exchange gradients on the last accumulation step only."""
        waits = isinstance(self.trained, DistributedDataParallel) and not last
        with self.trained.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with self._autocast():
                loss = loss_fn()
            self.scaler.scale(loss / self.config.accum_iter).backward()  # type: ignore[no-untyped-call]
        return loss.detach().float()

    def _gradient_norm(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        gradients = [value.grad for value in self.model.parameters() if value.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _step(self, norm: Tensor) -> None:
        if self.config.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)

    def _autocast(self) -> torch.autocast:
        lower = self.precision != torch.float32
        return torch.autocast(self.device.type, dtype=self.precision if lower else None, enabled=lower)

    def _leave_if_asked(self, epoch: int, update: int) -> None:
        """Called with the state saved. All ranks leave after the same update, the main one having written the file."""
        if self.asked_to_stop:
            self.processes.barrier()
            self.log.close()
            path = Path(self.config.output_dir) / LAST
            raise Interrupted(f"asked to stop; saved {path} at epoch {epoch}, update {update}; the same command continues")

    # --- numbers ---

    def _add(self, **amounts: float) -> None:
        """Adds to the sums of this epoch's log line."""
        for key, value in amounts.items():
            self.meters[key] = self.meters.get(key, 0.0) + value

    def _count(self, epoch: int, update: int, loss: float, norm: float, lr: float, bad: float) -> None:
        finite = math.isfinite(norm)
        self._add(updates=1, loss=loss, lr=lr, bad_images=bad, grad_norm=norm if finite else 0.0, overflows=float(not finite))
        number = epoch * self.batches.updates + update
        for key, value in (("loss", loss), ("lr", lr), ("grad_norm", norm)):
            self.log.scalar(f"train/{key}", value, number)

    def _postfix(self, watch: Stopwatch) -> str:
        trained = self.meters["updates"] - self.first_update
        rate = trained * self.batches.effective_batch / watch.total
        loss = self.meters["loss"] / self.meters["updates"]
        return f"loss {loss:.4f}, {rate:.0f} img/s ({watch.shares()})"

    def _end_epoch(self, epoch: int, watch: Stopwatch) -> None:
        """Log line first, then the checkpoint: a run cut off between them writes the line again."""
        updates = self.meters["updates"]
        here = (updates - self.first_update) * self.batches.effective_batch
        line: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": self.meters["loss"] / updates,
            "train_lr": self.meters["lr"] / updates,
            "grad_norm": self.meters["grad_norm"] / max(updates - self.meters["overflows"], 1),
            "overflows": int(self.meters["overflows"]),
            "bad_images": int(self.meters["bad_images"]),
            "images": int(updates * self.batches.effective_batch),
            "images_per_second": here / watch.total,
            "seconds": {phase: round(watch.seconds[phase], 3) for phase in PHASES},
        }
        said = (
            f"epoch {epoch + 1}/{self.epochs}  loss {line['train_loss']:.4f}  {line['images_per_second']:.0f} img/s "
            f"({watch.shares()})"
        )
        self._after_epoch(epoch, line)
        self.log.epoch(line, self._updates_after(epoch))
        told = self._told(line)
        bad = f"  unreadable images {line['bad_images']}" if line["bad_images"] else ""
        self.log.say(said + (f"  {told}" if told else "") + bad)
        self.meters, self.first_update = {}, 0
        self._save(LAST, epoch, 0)
        if (epoch + 1) % self.config.save_freq == 0 or epoch + 1 == self.epochs:
            self._save(f"checkpoint-{epoch}.pth", epoch, 0)
        if epoch + 1 < self.epochs:
            self._leave_if_asked(epoch + 1, 0)

    def _told(self, line: dict[str, Any]) -> str:
        """What the line on the screen says besides loss and speed."""
        return ""

    # --- what is written ---

    def _save(self, name: str, epoch: int, update: int) -> Path:
        path = Path(self.config.output_dir) / name
        if self.processes.is_main:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_atomically(self._state(epoch, update), path)
        return path

    def _state(self, epoch: int, update: int) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "update": update,
            "meters": dict(self.meters) if update else {},
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "config": asdict(self.config),
            "effective_batch": self.batches.effective_batch,
            "samples": len(self.samples),
            "facts": self.facts,
            **self._state_of_task(),
        }

    def _stop_unreadable(self, bad: list[str]) -> None:
        """All ranks stop together, before the update, and name the images that any of them could not read."""
        everywhere = [line for rank in self.processes.gather(bad) for line in rank]
        raise BadInput(f"unreadable image {'; '.join(everywhere)} (--on_bad_image skip puts another in its place)")

    def _stop_nonfinite(
        self, epoch: int, update: int, losses: list[Tensor], names: list[list[str]], loss: float, norm: float
    ) -> None:
        """Keeps the state before this update, and says where it happened and on which images."""
        suspects = [name for one, batch in zip(losses, names, strict=True) if not one.isfinite() for name in batch]
        suspects = [name for rank in self.processes.gather(suspects) for name in rank]
        everyone = [name for rank in self.processes.gather([name for batch in names for name in batch]) for name in rank]
        path = self._save(BEFORE_FAILURE, epoch - 1, update)
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient norm became {norm} (loss {loss:.4f})"
        raise NonFiniteLoss(
            f"{what} at epoch {epoch}, update {update} (step {epoch * self.batches.updates + update}); "
            f"state before it: {path}; images: {', '.join(suspects or everyone)}"
        )

    def _say_where(self, pictures: Path | None = None) -> None:
        """The last lines of a run: where everything is."""
        folder = Path(self.config.output_dir)
        self.log.say(f"checkpoint   {folder / LAST}")
        self.log.say(f"log          {folder / 'log.txt'}, {folder / 'run.json'}")
        self.log.say(f"TensorBoard  tensorboard --logdir {self.log.tensorboard_folder}")
        if pictures:
            self.log.say(f"pictures     {pictures}")


def choose_precision(config: LoopConfig, device: torch.device) -> torch.dtype:
    """The type that --precision names for this device.

    Raises:
        BadInput: fp16 without a GPU.
    """
    if config.precision == "fp16" and device.type != "cuda":
        raise BadInput("--precision fp16 needs a GPU (its gradient scaler does); use bf16 or fp32")
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
