"""The training loop: updates over accumulated batches, on one process or many, with exact resume.

What is trained is a task (common/training/task.py). Order of the data, precision, accumulation, processes, signals, non-finite
losses, checkpoints and log are here, once.

B images of a rank and accumulation step
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.draws import Stream, hash_seed
from common.models.block import compile_blocks
from common.training.checkpoint import FORMAT, LAST, PREVIOUS, check_finite, loader_of, save_atomically, upgraded
from common.training.config import Loader
from common.training.data import Batch, RankBatches, Samples, check_usable, make_loader, some_of
from common.training.errors import BadInput, NonFiniteLoss
from common.training.files import NoRoom
from common.training.interrupt import Interrupted, Interruption
from common.training.optim import Schedule, absolute_lr
from common.training.pace import Pace
from common.training.preset import describe_choice, offer_preset, preset_record
from common.training.runlog import progress, run_facts
from common.training.stopwatch import PHASES, Stopwatch
from common.training.task import Outcome, Run, Task, flatten_tallies, losses_by_name, split_tallies

BEFORE_FAILURE = "checkpoint-before-nonfinite.pth"

MOST_NAMED = 20
"""Unreadable images that a run names; a disk that fails would fill its log with them."""


@dataclass
class Accumulated:
    """What this rank saw in the accumulation steps of an update.

    Attributes:
        losses: of each step, detached.
        names: files of each step.
        unreadable: a line for each image that could not be read.
        terms: name -> mean over the steps, where the loss has named terms.
        broken: what was NaN or infinite before there was a loss, a line each.
    """

    losses: list[Tensor] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    terms: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class UpdateNumbers:
    """An update's numbers, the same on every rank.

    Attributes:
        loss: mean over ranks and accumulation steps.
        grad_norm: before clipping.
        lr: of the group whose factor is 1.
        unreadable: images of all ranks that could not be read.
        tallies: the task's, summed over ranks.
    """

    loss: float
    grad_norm: float
    lr: float
    unreadable: float
    tallies: dict[str, Any]


@final
class Loop:
    """One run of a task: its state, and the loop over it.

    Args:
        run: flags, processes and log.
        task: what is trained, its model with the weights that a new run starts from.
        samples: of the training set.
        batches: which of them make an update.

    Raises:
        BadInput: a checkpoint to resume that cannot be read, or that is of a run with other settings.
    """

    def __init__(self, run: Run, task: Task, samples: Samples, batches: RankBatches) -> None:
        self.run, self.task, self.samples, self.batches = run, task, samples, batches
        self.config, self.processes, self.device, self.log = run.config, run.processes, run.device, run.log
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == torch.float16)
        self.peak_lr = absolute_lr(self.config, batches.effective_batch)
        self.schedule = Schedule(self.config, batches.updates, self.peak_lr)
        self.optimizer = task.make_optimizer(self.peak_lr)
        self.first_epoch = self.first_update = 0
        self.meters: dict[str, Any] = {}
        self.pace = Pace(0)
        self.trains_on_without_room = self.config.on_full_disk == "continue"
        self.unreadable: set[str] = set()  # lines of images that were named in this run
        self.interruption, self.asked_to_stop = Interruption(), False
        if run.resumed_from is not None:
            self._load_checkpoint(run.resumed_from)
        self.trained = self._wrapped()

    # --- start ---

    def _load_checkpoint(self, path: Path) -> None:
        state = upgraded(self.task.read_checkpoint(path), path)
        self.task.check_same_run(state, path, self.batches.effective_batch, len(self.samples))
        if state["facts"] != self.task.facts:
            raise BadInput(f"checkpoint {path}: made with {state['facts']}, this run has {self.task.facts}")
        check_finite(state["model"], path)
        self.task.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.task.ema is not None:
            self.task.ema.load_state_dict(state["ema"])
        self.task.load_state_dict(state)
        self._take_loader(loader_of(state))
        self.first_epoch, self.first_update = state["epoch"] + 1, state["update"]
        self.meters = dict(state["meters"])
        self.log.say(f"resumed {path} at epoch {self.first_epoch}, update {self.first_update}")

    def _take_loader(self, began: Loader) -> None:
        """Goes on with the loader that the run began with."""
        if self.samples.loader != began:
            self.log.say(f"the run began with --loader {began} and goes on with it")
        self.samples.loader = began

    def _wrapped(self) -> nn.Module:
        """The model as it is trained: compiled, and with gradients averaged over the ranks.

        What is compiled is inside what averages, so that a block's gradients travel while the next block's are computed.
        """
        wrapped = self.task.model
        if self.config.compile:
            compile_blocks(wrapped)
        if self.processes.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            wrapped = DistributedDataParallel(wrapped, device_ids=ids)
        return wrapped

    def _announce(self) -> None:
        """Opens the log, and says what is about to run."""
        numbers: dict[str, Any] = {
            "effective_batch": self.batches.effective_batch, "lr": self.peak_lr, "precision": str(self.run.precision),
            "samples": len(self.samples), "updates_an_epoch": self.batches.updates, "updates": self.schedule.total_updates,
        }  # fmt: skip
        record = self.task.record()
        numbers["loader"] = self.samples.loader
        numbers["preset"] = preset_record(self.config, record.get("mask"))
        facts = run_facts(self.config, self.processes, self.run.resumed_from, **numbers, **record, **self.task.facts)
        self.log.open(facts, self.first_epoch, self.first_epoch * self.batches.updates + self.first_update)
        self.unreadable.update(line for entry in [*self.log.lines(), self.meters] for line in entry.get("unreadable", []))
        chosen = describe_choice(self.config, record.get("mask"), len(self.samples.source))
        offer = offer_preset(self.config, self.batches.updates, self.schedule.total_updates, self.peak_lr)
        for line in (self._summary(), chosen, *self.task.notes(), offer):
            if line:
                self.log.say(line)

    def _summary(self) -> str:
        """What the run will be, in one line."""
        epochs, updates = self.schedule.epochs, self.batches.updates
        repeats = f" x {self.config.repeat} crops" if self.config.repeat > 1 else ""
        return (
            f"{self.task.title()}; {len(self.samples.source)} images{repeats}, {epochs} epoch{'s' * (epochs != 1)} of {updates} "
            f"update{'s' * (updates != 1)} of {self.batches.effective_batch} images = {self.schedule.total_updates} updates, "
            f"lr {self.peak_lr:.3g}, {self.run.place}"
        )

    # --- the loop ---

    def train(self) -> None:
        """Trains the epochs that are left.

        Raises:
            BadInput: an unreadable image, unless --on_bad_image says to go on.
            NonFiniteLoss: the loss or gradient became NaN or infinite; the state before the update is saved.
            Interrupted: a rank got a signal to stop (common/training/interrupt.py), and the state is saved.
        """
        with self.interruption:
            self._announce()
            if self.first_epoch < self.schedule.epochs:
                self.log.forget_result()
            loader = make_loader(self.samples, self.batches, self.config, self.processes, self.task.collate)
            self.pace = Pace(self.schedule.total_updates - self.first_epoch * self.batches.updates - self.first_update)
            for epoch in range(self.first_epoch, self.schedule.epochs):
                self.log.update = epoch * self.batches.updates
                self.task.before_epoch(epoch, self.first_update)
                self._train_epoch(epoch, loader)
            self.log.update = self.schedule.total_updates
            self._finish(self.task.finish())

    def _train_epoch(self, epoch: int, loader: Iterable[Batch]) -> None:
        self.batches.start_at(epoch, self.first_update)
        self.task.model.train()
        watch = Stopwatch(self.device)
        stream = iter(loader)
        last = self.schedule.updates_in(epoch)
        updates = range(self.first_update, last)
        bar = progress(updates, last, f"epoch {epoch + 1}/{self.schedule.epochs}", self.log, self.pace)
        for update in bar:
            self._train_update(epoch, update, stream, watch)
            if estimate := self.pace.update_done():
                self.log.say(estimate)
            bar.set_postfix_str(self._progress(watch))
            if update + 1 < last:
                self._between_updates(epoch, update + 1)
        self._end_epoch(epoch, watch)

    def _train_update(self, epoch: int, update: int, stream: Iterator[Batch], watch: Stopwatch) -> None:
        """One optimiser step over `accum_iter` batches."""
        self._seed(epoch, update)
        lr = self._set_lr(epoch, update)
        seen = self._accumulate(epoch + update / self.batches.updates, stream, watch)
        norm = self._gradient_norm()
        numbers = self._agree(seen, float(norm), lr)
        self._stop_if_unusable(epoch, update, seen, numbers)
        self._step(norm)
        self.task.after_update()
        watch.lap("model")
        watch.settle()
        self._count(epoch, update, seen, numbers)
        if numbers.unreadable:
            self._name_unreadable(seen)

    def _seed(self, epoch: int, update: int) -> None:
        """Dropout and other noise of the model belong to the rank's place in the run, not to what was drawn before."""
        position = update * self.processes.world + self.processes.rank
        torch.manual_seed(hash_seed(self.config.seed, epoch, position, Stream.MODEL))

    def _set_lr(self, epoch: int, update: int) -> float:
        lr = self.schedule.lr_at(epoch, update)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr

    def _accumulate(self, epoch: float, stream: Iterator[Batch], watch: Stopwatch) -> Accumulated:
        """Gradients of this rank's batches of an update."""
        seen = Accumulated()
        for step in range(self.config.accum_iter):
            watch.start()
            batch = self._next(stream)
            watch.lap("data", host=True)
            prepared = self.task.prepare(batch, epoch)
            watch.lap("mask")
            broken, places = self.task.nonfinite()
            loss = self._backward(batch, prepared, seen, last=step == self.config.accum_iter - 1)
            watch.lap("model")
            seen.losses.append(loss.new_tensor(math.nan) if broken else loss)  # which ends the run on every rank
            seen.names.append(batch.names if places is None else [batch.names[place] for place in places])
            seen.broken += [broken] if broken else []
            seen.unreadable += batch.bad
        return seen

    def _next(self, stream: Iterator[Batch]) -> Batch:
        batch = next(stream)
        check_usable(batch)
        return self.task.receive(batch.to(self.device))

    def _backward(self, batch: Batch, prepared: Any, seen: Accumulated, last: bool) -> Tensor:
        """Adds this batch's gradient; ranks exchange gradients on the last accumulation step only."""
        waits = isinstance(self.trained, DistributedDataParallel) and not last
        with self.trained.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with self.run.autocast():
                loss, terms = losses_by_name(self.task.loss(self.trained, batch, prepared))
            self.scaler.scale(loss / self.config.accum_iter).backward()  # type: ignore[no-untyped-call]
        for name, value in terms.items():
            seen.terms[name] = seen.terms.get(name, 0.0) + float(value.detach()) / self.config.accum_iter
        return loss.detach().float()

    def _gradient_norm(self) -> Tensor:
        self.scaler.unscale_(self.optimizer)
        gradients = [value.grad for value in self.task.model.parameters() if value.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _agree(self, seen: Accumulated, norm: float, lr: float) -> UpdateNumbers:
        """Sums over the ranks, in one exchange: losses, unreadable images, requests to stop, the task's tallies."""
        tallies = self.task.tallies()
        own = [float(torch.stack(seen.losses).mean()), len(seen.unreadable), self.interruption.requested]
        numbers = torch.tensor(own, dtype=torch.float64, device=self.device)
        sums = self.processes.sum(torch.cat([numbers, flatten_tallies(tallies).to(numbers)]))
        loss, unreadable, signals, *summed = sums.tolist()
        self.asked_to_stop = signals > 0
        return UpdateNumbers(loss / self.processes.world, norm, lr, unreadable, split_tallies(tallies, summed))

    def _step(self, norm: Tensor) -> None:
        if self.config.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(self.task.model.parameters(), self.config.clip_grad, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.task.ema is not None:
            self.task.ema.update(self.task.model)

    def _between_updates(self, epoch: int, done: int) -> None:
        """With `done` updates of an epoch done: saves where --save_steps or a signal says so."""
        if self.asked_to_stop or (self.config.save_steps and done % self.config.save_steps == 0):
            self._save(LAST, epoch - 1, done)
        self._leave_if_asked(epoch, done)

    def _leave_if_asked(self, epoch: int, update: int) -> None:
        """Called with the state saved. All ranks leave after the same update, the main one having written the file."""
        if self.asked_to_stop:
            self.processes.barrier()
            self.log.close()
            path = self.run.output / LAST
            raise Interrupted(f"asked to stop; saved {path} at epoch {epoch}, update {update}; the same command continues")

    # --- what ends a run early ---

    def _stop_if_unusable(self, epoch: int, update: int, seen: Accumulated, numbers: UpdateNumbers) -> None:
        """All ranks stop together, before the update. A scaler of fp16 steps over gradients that overflow."""
        if numbers.unreadable and self.config.on_bad_image == "raise":
            everywhere = [line for rank in self.processes.gather(seen.unreadable) for line in rank]
            listed = some_of(list(dict.fromkeys(everywhere)), "; ")
            raise BadInput(f"unreadable image {listed} (--on_bad_image skip puts another in its place)")
        overflows = self.run.precision != torch.float16 and not math.isfinite(numbers.grad_norm)
        if not math.isfinite(numbers.loss) or overflows:
            self._stop_nonfinite(epoch, update, seen, numbers)

    def _stop_nonfinite(self, epoch: int, update: int, seen: Accumulated, numbers: UpdateNumbers) -> None:
        """Keeps the state before this update, and says where it happened and on which images.

        Weights that are not finite themselves, as the update before may have left them, are no image's fault.
        """
        place = f"at epoch {epoch}, update {update} (step {epoch * self.batches.updates + update})"
        weights = [name for name, value in self.task.model.named_parameters() if not bool(value.isfinite().all())]
        if weights:
            raise NonFiniteLoss(f"weights were NaN or infinite already {place}, before its images were seen: {some_of(weights)}")
        images = self._suspects(seen)
        path = self._save(BEFORE_FAILURE, epoch - 1, update)
        loss, norm = numbers.loss, numbers.grad_norm
        broken = [line for rank in self.processes.gather(seen.broken) for line in rank]
        if broken:
            raise NonFiniteLoss(f"{broken[0]} {place}; state before it: {path}; images: {some_of(images)}")
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient norm became {norm} (loss {loss:.4f})"
        raise NonFiniteLoss(f"{what} {place}; state before it: {path}; images: {some_of(images)}")

    def _suspects(self, seen: Accumulated) -> list[str]:
        """Images of all ranks in batches whose loss is not finite, each once; of all batches where none is."""
        batches = list(zip(seen.losses, seen.names, strict=True))
        bad = [name for loss, names in batches if not loss.isfinite() for name in names]
        ranks = self.processes.gather((bad, [name for _, names in batches for name in names]))
        blamed = [name for bad, _ in ranks for name in bad] or [name for _, names in ranks for name in names]
        return list(dict.fromkeys(blamed))

    # --- numbers ---

    def _add(self, **amounts: Any) -> None:
        """Adds to the sums of this epoch's log line."""
        for key, value in amounts.items():
            self.meters[key] = self.meters.get(key, 0.0) + value

    def _count(self, epoch: int, update: int, seen: Accumulated, numbers: UpdateNumbers) -> None:
        finite = math.isfinite(numbers.grad_norm)
        norm = numbers.grad_norm if finite else 0.0
        self._add(updates=1, loss=numbers.loss, lr=numbers.lr, bad_images=numbers.unreadable, grad_norm=norm)
        self._add(overflows=float(not finite), **numbers.tallies, **seen.terms)
        place = epoch * self.batches.updates + update
        for key in ("loss", "lr", "grad_norm"):
            self.log.scalar(f"train/{key}", getattr(numbers, key), place)

    def _name_unreadable(self, seen: Accumulated) -> None:
        """Says the first unreadable images of the run, each once, and keeps them for the epoch's line in log.txt."""
        for line in dict.fromkeys(line for rank in self.processes.gather(seen.unreadable) for line in rank):
            if line in self.unreadable or len(self.unreadable) == MOST_NAMED:
                continue
            self.unreadable.add(line)
            self.meters.setdefault("unreadable", []).append(line)
            self.log.say(f"unreadable, another image is in its place: {line}")
            if len(self.unreadable) == MOST_NAMED:
                self.log.say(f"{MOST_NAMED} unreadable images are named; others of this run are only counted")

    def _progress(self, watch: Stopwatch) -> str:
        trained = self.meters["updates"] - self.first_update
        rate = trained * self.batches.effective_batch / watch.total
        loss, more = self.meters["loss"] / self.meters["updates"], self.task.progress()
        return f"loss {loss:.4f}, {rate:.0f} img/s ({watch.shares()})" + (f", {more}" if more else "")

    def _end_epoch(self, epoch: int, watch: Stopwatch) -> None:
        """Log line first, then the checkpoint: a run cut off between them writes the line again."""
        self.processes.on_main(self._check_lock)
        line = self._epoch_line(epoch, watch)
        speed = f"loss {line['train_loss']:.4f}  {line['images_per_second']:.0f} img/s ({watch.shares()})"
        self.log.update = self.schedule.updates_after(epoch) - 1  # its last one: the next is where a resumed run's events begin
        more = self.task.after_epoch(epoch, line, self.meters, last=epoch + 1 == self.schedule.epochs)
        self.processes.on_main(lambda: self.log.epoch(line))
        unreadable = f"unreadable images {line['bad_images']}" if line["bad_images"] else ""
        words = [f"epoch {epoch + 1}/{self.schedule.epochs}", speed, more, unreadable]
        self.log.say("  ".join(word for word in words if word))
        self.meters, self.first_update = {}, 0
        self._save(LAST, epoch, 0)
        if (epoch + 1) % self.config.save_freq == 0 or epoch + 1 == self.schedule.epochs:
            self._save(f"checkpoint-{epoch}.pth", epoch, 0)
        if epoch + 1 < self.schedule.epochs:
            self._leave_if_asked(epoch + 1, 0)

    def _epoch_line(self, epoch: int, watch: Stopwatch) -> dict[str, Any]:
        """The epoch's numbers for log.txt, as far as they are the same for every task."""
        sums, updates = self.meters, self.meters["updates"]
        here = (updates - self.first_update) * self.batches.effective_batch
        return {
            "epoch": epoch,
            "train_loss": sums["loss"] / updates,
            "train_lr": sums["lr"] / updates,
            "grad_norm": sums["grad_norm"] / max(updates - sums["overflows"], 1),
            "overflows": int(sums["overflows"]),
            "bad_images": int(sums["bad_images"]),
            "images": int(updates * self.batches.effective_batch),
            "images_per_second": here / watch.total,
            "seconds": {phase: round(watch.seconds[phase], 3) for phase in PHASES},
            **{name: value / updates for name, value in sums.items() if name.startswith("loss_")},
            **({"unreadable": sums["unreadable"]} if "unreadable" in sums else {}),
        }

    # --- what is written ---

    def _save(self, name: str, epoch: int, update: int) -> Path:
        """Writes a checkpoint. Raises BadInput on all ranks: no room, or another run has taken the folder over."""
        path = self.run.output / name
        self.processes.on_main(lambda: self._write(path, epoch, update))
        return path

    def _write(self, path: Path, epoch: int, update: int) -> None:
        self._check_lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_atomically(self._state(epoch, update), path, path.with_name(PREVIOUS) if path.name == LAST else None)
        except NoRoom as error:
            if not self.trains_on_without_room or self.asked_to_stop:
                raise
            self.log.say(f"{error}; training goes on (--on_full_disk continue)")

    def _check_lock(self) -> None:
        """Raises BadInput if another run has taken the folder over: nothing more is written there."""
        if self.run.lock is not None:
            self.run.lock.check()

    def _state(self, epoch: int, update: int) -> dict[str, Any]:
        return {
            "model": self.task.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "update": update,
            "meters": dict(self.meters) if update else {},
            "ema": self.task.ema.state_dict() if self.task.ema is not None else None,
            "config": asdict(self.config),
            "effective_batch": self.batches.effective_batch,
            "samples": len(self.samples),
            "loader": self.samples.loader,
            "facts": self.task.facts,
            "format": FORMAT,
            **self.task.state_dict(),
        }

    def _finish(self, outcome: Outcome) -> None:
        """result.json, and the last lines of a run: where everything is."""
        self.log.close()
        result = self.log.result(self.task.kind, self.config, outcome.metrics, **outcome.details, facts=self.task.facts)
        if outcome.summary:
            self.log.say(outcome.summary)
        self.log.say(f"checkpoint   {self.run.output / LAST}")
        self.log.say(f"log          {self.run.output / 'log.txt'}, {self.run.output / 'run.json'}")
        self.log.say(f"TensorBoard  tensorboard --logdir {self.log.tensorboard_folder}")
        for name, path in {**outcome.files, "result": result}.items():
            self.log.say(f"{name:<12} {path}")
        self.processes.barrier()
