"""The pre-training loop: the same for every method.

A trainer says what its model is and how a batch becomes a loss (:class:`Method`); order of the data, masks,
precision, accumulation, processes, checkpoints, log and pictures are here.

B images of a rank and accumulation step   N patches
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from common.attention import Layers, Values, attention_mode
from common.draws import Stream, hash_seed
from common.evolved_mask import AttentionFn, EvolvedMask, MaskBatch
from common.mask_config import MaskConfig
from common.training.checkpoint import (
    LAST,
    check_same_run,
    find_resume,
    load_weights,
    read_checkpoint,
    save_atomically,
)
from common.training.config import TrainConfig
from common.training.data import Batch, RankBatches, Samples, Transform, denormalise, make_loader
from common.training.distributed import Processes, start_processes
from common.training.errors import BadInput, NonFiniteLoss
from common.training.interrupt import Interrupted, Interruption
from common.training.optim import EncoderEMA, absolute_lr, lr_at, make_optimizer
from common.training.runlog import RunLog, progress, run_facts
from common.training.sources import open_source
from common.training.stopwatch import PHASES, Stopwatch
from common.visualize import MaskPictures

BEFORE_FAILURE = "checkpoint-before-nonfinite.pth"


class Encoder(Protocol):
    """What the mask asks of a model."""

    grid_size: tuple[int, int]
    num_prefix_tokens: int

    def attention_maps(self, images: Tensor, layers: Layers = "all", values: Values = "softmax") -> Iterable[Tensor]:
        """Attention of the encoder on whole images, one [B, heads, T, T] a block."""
        ...


@dataclass
class Method:
    """What a trainer adds to the machinery.

    Attributes:
        name: for titles and messages.
        model: an nn.Module that is an :class:`Encoder`.
        loss: (model, batch, mask [B, N]) -> scalar loss, the mean over the batch.
        transform: image -> view or views.
        picture_transform: image -> normalised [3, H, W] without randomness.
        not_in_attention: submodules that the attention pass does not run.
        may_miss: prefixes of state-dict keys that an encoder-only checkpoint lacks.
        facts: plain values that the targets depend on (which tokenizer, say); written to run.json and to checkpoints,
            and a resumed run must have the same.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module, Batch, Tensor], Tensor]
    transform: Transform
    picture_transform: Transform
    not_in_attention: tuple[str, ...] = ()
    may_miss: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


def reconstruction_loss(model: nn.Module, batch: Batch, mask: Tensor) -> Tensor:
    """Loss of a model that returns (loss, prediction) for images and mask."""
    loss, _ = model(batch.images, mask)
    return loss


def pretrain(config: TrainConfig, mask_config: MaskConfig, grid_size: tuple[int, int], build: Callable[[], Method]) -> None:
    """Trains from the command line's configuration to the last checkpoint.

    Args:
        grid_size: (H, W) of the patch grid.
        build: makes the method; called once the configuration, the data and the mask are known to be usable.

    Raises:
        BadInput: nothing usable in the data, the flags or the checkpoint.
        NonFiniteLoss: the loss or gradient became NaN or infinite.
    """
    mask = _make_mask(config, mask_config, grid_size)
    source = open_source(config)
    processes = start_processes(config.device, config.dist_timeout)
    try:
        batches = RankBatches(len(source) * config.repeat, config, processes)
        torch.manual_seed(config.seed)  # the same weights on every rank
        method = build()
        samples = Samples(source, method.transform, config.seed, config.repeat)
        Pretraining(config, mask_config, method, mask, samples, batches, processes).run()
    finally:
        processes.close()


def _make_mask(config: TrainConfig, mask_config: MaskConfig, grid_size: tuple[int, int]) -> EvolvedMask:
    height, width = grid_size
    if not (mask_config.exact_count or config.uneven_masks):
        raise BadInput(
            f"--mask {mask_config.mask} may mask fewer patches in some images, which this model cannot take; use block"
        )
    try:
        num_masked = mask_config.count_masked(grid_size, config.mask_ratio)
        return EvolvedMask(grid_size, num_masked, config.epochs, mask_config, seed=config.seed)
    except ValueError as error:
        raise BadInput(
            f"{error} (image {config.input_size}, patch grid {height}x{width}; see --mask_ratio, --parts_start)"
        ) from None


class Pretraining:
    """One run: its state, and the loop over it."""

    def __init__(
        self,
        config: TrainConfig,
        mask_config: MaskConfig,
        method: Method,
        mask: EvolvedMask,
        samples: Samples,
        batches: RankBatches,
        processes: Processes,
    ) -> None:
        self.config, self.mask_config, self.method = config, mask_config, method
        self.mask, self.samples, self.batches, self.processes = mask, samples, batches, processes
        self.device = processes.device
        self.log = RunLog(config, processes)
        self.model = method.model.to(self.device)
        self.precision = _precision(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        self.peak_lr = absolute_lr(config, batches.effective_batch)
        self.optimizer = make_optimizer(self.model, config, self.peak_lr)
        self.ema: EncoderEMA | None = None
        self.first_epoch = self.first_update = 0
        self.meters: dict[str, float] = {}
        self.interruption, self.asked_to_stop = Interruption(), False
        self.resumed_from = find_resume(config)
        self._load()
        self.trained = self._wrapped()
        self.pictures = MaskPictures(
            Path(config.output_dir) / "masks", samples.source, method.picture_transform, denormalise, mask, config.picture_images
        )

    # --- start ---

    def _load(self) -> None:
        """Weights and state by the order that :func:`find_resume` writes down."""
        if self.resumed_from is None and self.config.init_from:
            self.log.say(load_weights(self.model, Path(self.config.init_from), self.method.may_miss))
        if self.mask_config.attention_from == "ema" and self.mask_config.uses_attention:
            self.ema = EncoderEMA(self.model, self.mask_config.ema_decay, self.method.not_in_attention)
        if self.resumed_from is None:
            return
        state = read_checkpoint(self.resumed_from)
        check_same_run(state, self.resumed_from, self.config, self.mask_config, self.batches.effective_batch, len(self.samples))
        if state["facts"] != self.method.facts:
            raise BadInput(f"checkpoint {self.resumed_from}: made with {state['facts']}, this run has {self.method.facts}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.mask.load_state_dict(state["mask"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.first_epoch, self.first_update = state["epoch"] + 1, state["update"]
        self.meters = dict(state["meters"])
        self.log.say(f"resumed {self.resumed_from} at epoch {self.first_epoch}, update {self.first_update}")

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
            self._run()

    def _run(self) -> None:
        self._announce()
        if self.resumed_from is None and self.processes.is_main:
            self.pictures.forget()
        loader = make_loader(self.samples, self.batches, self.config, self.processes)
        for epoch in range(self.first_epoch, self.config.epochs):
            if self.first_update == 0:
                self._take_pictures(epoch)
            self._train_epoch(epoch, loader)
        self._take_pictures(self.config.epochs)
        self._finish()

    def _train_epoch(self, epoch: int, loader: Iterable[Batch]) -> None:
        self.mask.set_epoch(epoch)
        self.batches.start_at(epoch, self.first_update)
        self.model.train()
        watch = Stopwatch(self.device)
        stream = iter(loader)
        updates = range(self.first_update, self.batches.updates)
        bar = progress(updates, len(updates), f"epoch {epoch + 1}/{self.config.epochs}", self.processes.is_main)
        for update in bar:
            self._train_update(epoch, update, stream, watch)
            bar.set_postfix_str(self._postfix(watch))
            done = update + 1
            if done < self.batches.updates:
                if self.asked_to_stop or (self.config.save_steps and done % self.config.save_steps == 0):
                    self._save(LAST, epoch - 1, done)
                self._leave_if_asked(epoch, done)
        self._end_epoch(epoch, watch)

    def _train_update(self, epoch: int, update: int, stream: Iterator[Batch], watch: Stopwatch) -> None:
        """One optimiser step over `accum_iter` batches."""
        position = update * self.processes.world + self.processes.rank
        torch.manual_seed(hash_seed(self.config.seed, epoch, position, Stream.MODEL))
        lr = lr_at(epoch + update / self.batches.updates, self.config, self.peak_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses: list[Tensor] = []
        names: list[list[str]] = []
        bad: list[str] = []
        skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        for step in range(self.config.accum_iter):
            watch.start()
            batch = self._next(stream)
            watch.lap("data", host=True)
            masks = self._make_mask(batch)
            watch.lap("mask")
            losses.append(self._backward(batch, masks.mask, last=step == self.config.accum_iter - 1))
            watch.lap("model")
            names.append(batch.names)
            bad += batch.bad
            skipped += masks.skipped.sum()
        total_norm = self._gradient_norm()
        norm = float(total_norm)
        mine = [float(torch.stack(losses).mean()), int(skipped), len(bad), self.interruption.requested]
        sums = torch.tensor(mine, dtype=torch.float64, device=self.device)
        loss_sum, skipped_sum, bad_sum, signals = self.processes.sum(sums).tolist()
        self.asked_to_stop = signals > 0
        loss = loss_sum / self.processes.world
        if bad_sum and self.config.on_bad_image == "raise":
            self._stop_unreadable(bad)
        if not math.isfinite(loss) or (self.precision != torch.float16 and not math.isfinite(norm)):
            self._stop_nonfinite(epoch, update, losses, names, loss, norm)
        self._step(total_norm)
        watch.lap("model")
        watch.settle()
        self._count(epoch, update, loss, norm, lr, skipped_sum, bad_sum)

    def _next(self, stream: Iterator[Batch]) -> Batch:
        batch = next(stream)
        if not batch.views:
            raise BadInput(f"no readable image was found in the place of {batch.bad[0]}")
        return batch.to(self.device)

    def _make_mask(self, batch: Batch) -> MaskBatch:
        with self._attention_pass() as attention_fn:
            return self.mask(batch.images, attention_fn, batch.sample_ids)

    @contextlib.contextmanager
    def _attention_pass(self) -> Iterator[AttentionFn]:
        """Attention of the encoder that the masks are made from, in the mode and precision of the attention pass."""
        source: Any = self.ema.model if self.ema is not None else self.model
        layers, values = self.mask_config.chosen_layers, self.mask_config.attention_values
        with attention_mode(source, self.mask_config.attention_mode), self._autocast():
            yield lambda images: source.attention_maps(images, layers, values)

    def _backward(self, batch: Batch, mask: Tensor, last: bool) -> Tensor:
        """Adds this batch's gradient; ranks exchange gradients on the last accumulation step only."""
        waits = isinstance(self.trained, DistributedDataParallel) and not last
        with self.trained.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with self._autocast():
                loss = self.method.loss(self.trained, batch, mask)
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

    # --- numbers ---

    def _count(self, epoch: int, update: int, loss: float, norm: float, lr: float, skipped: float, bad: float) -> None:
        adds = {
            "updates": 1, "loss": loss, "lr": lr, "skipped_attention": skipped, "bad_images": bad,
            "grad_norm": norm if math.isfinite(norm) else 0.0, "overflows": float(not math.isfinite(norm)),
        }  # fmt: skip
        for key, value in adds.items():
            self.meters[key] = self.meters.get(key, 0.0) + value
        number = epoch * self.batches.updates + update
        for key, value in (("loss", loss), ("lr", lr), ("grad_norm", norm)):
            self.log.scalar(f"train/{key}", value, number)

    def _postfix(self, watch: Stopwatch) -> str:
        trained = self.meters["updates"] - self.first_update
        rate = trained * self.batches.effective_batch / watch.total
        loss = self.meters["loss"] / self.meters["updates"]
        return f"loss {loss:.4f}, {rate:.0f} img/s ({watch.shares()}), alpha {self.mask.alpha:.2f}, K {self.mask.num_parts}"

    def _end_epoch(self, epoch: int, watch: Stopwatch) -> None:
        """Log line first, then the checkpoint: a run cut off between them writes the line again."""
        updates = self.meters["updates"]
        images = updates * self.batches.effective_batch
        here = (updates - self.first_update) * self.batches.effective_batch
        line = {
            "epoch": epoch,
            "train_loss": self.meters["loss"] / updates,
            "train_lr": self.meters["lr"] / updates,
            "grad_norm": self.meters["grad_norm"] / max(updates - self.meters["overflows"], 1),
            "overflows": int(self.meters["overflows"]),
            "alpha": self.mask.alpha,
            "num_parts": self.mask.num_parts,
            "skipped_attention": self.meters["skipped_attention"] / images,
            "bad_images": int(self.meters["bad_images"]),
            "images": int(images),
            "images_per_second": here / watch.total,
            "seconds": {phase: round(watch.seconds[phase], 3) for phase in PHASES},
        }
        self.log.epoch(line, (epoch + 1) * self.batches.updates)
        self.log.say(
            f"epoch {epoch + 1}/{self.config.epochs}  loss {line['train_loss']:.4f}  {line['images_per_second']:.0f} img/s "
            f"({watch.shares()})  "
            f"alpha {self.mask.alpha:.3f}  K {self.mask.num_parts}  spared attention passes {line['skipped_attention']:.0%}"
            + (f"  unreadable images {line['bad_images']}" if line["bad_images"] else "")
        )
        self.meters, self.first_update = {}, 0
        self._save(LAST, epoch, 0)
        if (epoch + 1) % self.config.save_freq == 0 or epoch + 1 == self.config.epochs:
            self._save(f"checkpoint-{epoch}.pth", epoch, 0)
        if epoch + 1 < self.config.epochs:
            self._leave_if_asked(epoch + 1, 0)

    def _leave_if_asked(self, epoch: int, update: int) -> None:
        """Called with the state saved. All ranks leave after the same update, the main one having written the file."""
        if self.asked_to_stop:
            self.processes.barrier()
            self.log.close()
            path = Path(self.config.output_dir) / LAST
            raise Interrupted(f"asked to stop; saved {path} at epoch {epoch}, update {update}; the same command continues")

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
            "mask": self.mask.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
            "config": asdict(self.config),
            "mask_config": asdict(self.mask_config),
            "effective_batch": self.batches.effective_batch,
            "samples": len(self.samples),
            "facts": self.method.facts,
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

    def _take_pictures(self, epoch: int) -> None:
        """Parts and masks of a few images as the model makes them now, at `picture_epochs` times over the run."""
        times = self.config.picture_epochs
        wanted = {round(self.config.epochs * i / max(times - 1, 1)) for i in range(times)}
        if not (self.processes.is_main and epoch in wanted and self.config.picture_images):
            return
        with self._attention_pass() as attention_fn:
            sheet = self.pictures.take(epoch, self.device, attention_fn)
        self.log.image("parts_and_masks", sheet, epoch * self.batches.updates)

    def _announce(self) -> None:
        facts = run_facts(
            self.config, self.mask_config, self.processes, self.resumed_from,
            method=self.method.name, effective_batch=self.batches.effective_batch, lr=self.peak_lr, precision=str(self.precision),
            samples=len(self.samples), updates_an_epoch=self.batches.updates, **self.method.facts,
        )  # fmt: skip
        self.log.open(facts, self.first_epoch, self.first_epoch * self.batches.updates + self.first_update)
        height, width = self.mask.height, self.mask.width
        self.log.say(
            f"{self.method.name} {self.config.model}, mask {self.mask_config.mask}: "
            f"{'' if self.mask_config.exact_count else 'at most '}{self.mask.num_masked} of {height}x{width} patches; "
            f"{len(self.samples)} samples an epoch, effective batch {self.batches.effective_batch}, lr {self.peak_lr:.3g}, "
            f"{self.device} x {self.processes.world}, {str(self.precision).removeprefix('torch.')}"
        )

    def _finish(self) -> None:
        picture = self.pictures.compose() if self.processes.is_main and self.config.picture_images else None
        self.log.close()
        folder = Path(self.config.output_dir)
        self.log.say(f"checkpoint   {folder / LAST}")
        self.log.say(f"log          {folder / 'log.txt'}, {folder / 'run.json'}")
        self.log.say(f"TensorBoard  tensorboard --logdir {self.log.tensorboard_folder}")
        if picture:
            self.log.say(f"pictures     {picture}")
        self.processes.barrier()


def _precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    if config.precision == "fp16" and device.type != "cuda":
        raise BadInput("--precision fp16 needs a GPU (its gradient scaler does); use bf16 or fp32")
    if config.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.precision]
