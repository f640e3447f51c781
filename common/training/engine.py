"""Pre-training: the same for every method.

A trainer says what its model is and how a batch becomes a loss (:class:`PretrainingMethod`); masks and their pictures are here,
as a task (common/training/task.py) for the loop in common/training/loop.py.

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

from common.attention import AttentionTap, Layers, Values, attention_mode
from common.draws import SampleDraws, Stream
from common.evolved_mask import AttentionFn, EvolvedMask, MaskBatch
from common.mask_config import MaskConfig
from common.masks import share_of_masked
from common.parts import NonFiniteGraph
from common.signals import Graph
from common.training.checkpoint import check_same_run, load_weights
from common.training.config import TrainConfig
from common.training.data import Batch, RankBatches, Samples, Transform, choose_loader, denormalise
from common.training.distributed import Processes
from common.training.geometry import LocatedBatch, LocatedSamples, MarkedBatches, WholeImage, as_inputs, collate_located
from common.training.kept_parts import KeptParts, StepParts, keep_parts, step_layers
from common.training.loop import Loop
from common.training.mask import describe_end, make_mask
from common.training.optim import EncoderEMA, make_optimizer
from common.training.preset import offer_parts
from common.training.sources import ImageSource, Source
from common.training.task import Outcome, Run, Task, open_data_run
from common.visualize import MaskPictures, describe_schedule


class AttentionSource(Protocol):
    """What the mask asks of a model."""

    grid_size: tuple[int, int]
    num_prefix_tokens: int

    def signal(
        self, images: Tensor, graph: Graph = "attention", layers: Layers = "all", values: Values = "softmax"
    ) -> Iterable[Tensor]:
        """What the graph is made from, of whole images, one tensor a block; see :func:`common.signals.stream_signal`."""
        ...


@dataclass
class PretrainingMethod:
    """What a trainer adds to the machinery.

    Attributes:
        name: for titles and messages.
        model: an nn.Module that is an :class:`AttentionSource`.
        loss: (model, batch, mask [B, N]) -> scalar loss, the mean over the batch. Below a decode_share of 1 a fourth argument,
            bool [B, N], says which masked patches are predicted.
        transform: image -> view or views, uint8: the first is normalised on the device, the others become colours in 0..1.
        picture_transform: image -> normalised [3, H, W] without randomness.
        not_in_attention: submodules that the attention pass does not run.
        may_miss: prefixes of state-dict keys that an encoder-only checkpoint lacks.
        facts: plain values that the targets depend on (which tokenizer, say); written to run.json and to checkpoints,
            and a resumed run must have the same.
        notes: lines for the user that the start of a run says.
        decode_share: share of the masked patches of an image that are predicted, drawn anew in each epoch.
        blocks: of the encoder, where it sees every position in training: their attention can make parts; else None.
    """

    name: str
    model: nn.Module
    loss: Callable[..., Tensor]
    transform: Transform
    picture_transform: Transform
    not_in_attention: tuple[str, ...] = ()
    may_miss: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    decode_share: float = 1.0
    blocks: nn.ModuleList | None = None


def reconstruction_loss(model: nn.Module, batch: Batch, mask: Tensor, decoded: Tensor | None = None) -> Tensor:
    """Loss of a model that returns (loss, prediction) for images and mask; nothing is predicted that is not compared.

    Args:
        decoded: bool [B, N], the masked patches that are predicted; None: all of them.
    """
    loss, _ = model(batch.images, mask, mask if decoded is None else decoded)
    return loss


def pretrain(config: TrainConfig, mask_config: MaskConfig, build: Callable[[], PretrainingMethod]) -> None:
    """Trains from the command line's configuration to the last checkpoint.

    Args:
        build: makes the method; called once the configuration, the data and the mask are known to be usable.

    Raises:
        BadInput: nothing usable in the data, the flags or the checkpoint; another run in the output folder.
        NonFiniteLoss: the loss or gradient became NaN or infinite.
    """
    mask = make_mask(config, mask_config)
    with open_data_run(config) as (run, source):
        run.log.say(source.summary)
        kept = keep_parts(config, mask, source)
        batches = make_batches(len(source) * config.repeat, config, run.processes, kept)
        torch.manual_seed(config.seed)  # the same weights on every rank
        method = build()
        samples = make_samples(source, method.transform, config, kept)
        Loop(run, PretrainingTask(run, config, method, mask, samples.source, kept), samples, batches).train()


def make_batches(length: int, config: TrainConfig, processes: Processes, kept: KeptParts | None) -> RankBatches:
    """Batches of a rank; where parts are kept, with the whole images that those need."""
    if kept is None:
        return RankBatches(length, config, processes)
    return MarkedBatches(length, config, processes, kept.wanted)


def make_samples(source: ImageSource, transform: Transform, config: TrainConfig, kept: KeptParts | None) -> Samples:
    """Samples; where parts are kept, with the place of each view in its image."""
    loader = choose_loader(config.loader, source)
    if kept is None:
        return Samples(source, transform, config.seed, config.repeat, loader)
    whole = None if kept.reads_step else WholeImage(config)
    return LocatedSamples(source, transform, config.seed, config.repeat, whole, loader)


class PretrainingTask(Task):
    """Pre-training by a method, with masks made by the model that is trained.

    Args:
        method: its model starts from --init_from where that is given and the run is a new one.
        source: images for the pictures.
        kept: parts that are kept from visit to visit; None: they are made anew for every view.
    """

    kind = "pre-training"

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        method: PretrainingMethod,
        mask: EvolvedMask,
        source: Source,
        kept: KeptParts | None = None,
    ) -> None:
        super().__init__(run)
        self.config, self.method, self.mask, self.kept = config, method, mask, kept
        if kept is not None:
            self.collate = collate_located
        self.model, self.facts = method.model.to(run.device), method.facts
        self.last_loss, self.began = math.nan, False
        self.broken: NonFiniteGraph | None = None  # why the last batch has no masks of its own
        self.skipped = torch.zeros((), dtype=torch.int64, device=run.device)  # images whose mask needed no attention
        if run.resumed_from is None and config.init_from:
            run.log.say(load_weights(self.model, Path(config.init_from), method.may_miss))
        if mask.config.attention_from == "ema" and mask.config.uses_attention:
            self.ema = EncoderEMA(self.model, mask.config.ema_decay, method.not_in_attention)
        folder = run.output / "masks"
        self.pictures = MaskPictures(folder, source, method.picture_transform, denormalise, mask, config.picture_images)

    @property
    def mask_config(self) -> MaskConfig:
        """Options of the mask: those of the flags, or of an older run that is continued."""
        return self.mask.config

    # --- start ---

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config, lr)

    def check_same_run(self, state: dict[str, Any], path: Path, effective_batch: int, samples: int) -> None:
        check_same_run(state, path, self.config, self.mask_config, effective_batch, samples)

    def state_dict(self) -> dict[str, Any]:
        kept = {} if self.kept is None else {"kept_parts": self.kept.store.state_dict()}
        return {"mask": self.mask.state_dict(), "mask_config": asdict(self.mask_config), "last_loss": self.last_loss, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        before = asdict(self.mask_config)
        self.mask.load_state_dict(state["mask"])
        kept = {name: value for name, value in asdict(self.mask_config).items() if value != before[name]}
        if kept:
            words = " ".join(f"--{name} {value}" for name, value in kept.items())
            self.run.log.say(f"this run began when other defaults held, and goes on with them: {words}")
        self.last_loss = state.get("last_loss", math.nan)  # older checkpoints do not say it
        if self.kept is not None:
            self.kept.store.load_state_dict(state["kept_parts"])

    def record(self) -> dict[str, Any]:
        return {"method": self.method.name, "mask": self.mask_config}

    def title(self) -> str:
        patches = f"{self.mask.describe_count()} of {self.mask.height}x{self.mask.width} patches"
        first, last = self.mask_config.parts_range
        parts = f", K {first} -> {last}" if self.mask_config.uses_parts else ""
        return f"{self.method.name} {self.config.model}, mask {self.mask_config.mask}: {patches}{parts}"

    def notes(self) -> list[str]:
        patches = self.mask.height * self.mask.width
        lines = [*self.method.notes, describe_end(self.mask), offer_parts(self.config, self.mask_config, patches)]
        lines += [] if self.kept is None else [self.kept.describe()]
        return [line for line in lines if line]

    # --- updates ---

    def before_epoch(self, epoch: int, update: int) -> None:
        if not self.began and self.run.processes.is_main:
            self.pictures.keep_until(epoch if self.run.resumed_from else -1)
        self.began = True
        if update == 0:
            self._take_pictures(epoch)
        self.mask.set_epoch(epoch)

    def receive(self, batch: Batch) -> Batch:
        return as_inputs(batch)

    def prepare(self, batch: Batch, epoch: float) -> MaskBatch:
        """The masks of a batch, from one pass of the encoder over the images whose mask needs it, or from kept parts."""
        self.broken = None
        try:
            return self._masks(batch)
        except NonFiniteGraph as error:
            self.broken = error
            mask = torch.zeros(len(batch.images), self.mask.num_patches, dtype=torch.bool, device=batch.images.device)
            mask[:, : self.mask.num_masked] = True  # any: this update ends the run
            no_parts = torch.full_like(mask, -1, dtype=torch.int64)
            return MaskBatch(mask, no_parts, self.mask.alpha, self.mask.num_parts, ~mask[:, 0])

    def nonfinite(self) -> tuple[str, list[int] | None]:
        if self.broken is None:
            return "", None
        return (
            f"{self.mask_config.graph} of the encoder became NaN or infinite",
            self.broken.images if self.kept is None else None,
        )

    def _masks(self, batch: Batch) -> MaskBatch:
        with self._attention_pass() as attention_fn:
            if self.kept is None:
                masks = self.mask(batch.images, attention_fn, batch.sample_ids)
                self.skipped += masks.skipped.sum()
                return masks
            assert isinstance(batch, LocatedBatch)
            parts, passes = self.kept.parts(batch, attention_fn)
        self.skipped += len(batch.sample_ids) - passes
        return self.mask(batch.images, sample_ids=batch.sample_ids, parts=parts, num_parts=self.kept.num_draws)

    def loss(self, model: nn.Module, batch: Batch, prepared: MaskBatch) -> Tensor:
        if not isinstance(self.kept, StepParts):
            return self._loss(model, batch, prepared)
        assert isinstance(batch, LocatedBatch)
        assert self.method.blocks is not None
        blocks = self.method.blocks
        with AttentionTap(blocks, step_layers(self.mask_config, len(blocks))) as tap:
            loss = self._loss(model, batch, prepared)
        self.kept.read(batch, tap.maps)
        return loss

    def _loss(self, model: nn.Module, batch: Batch, prepared: MaskBatch) -> Tensor:
        if self.method.decode_share == 1:
            return self.method.loss(model, batch, prepared.mask)
        draws = SampleDraws(self.mask.seed, self.mask.epoch, batch.sample_ids).uniform(Stream.DECODED, self.mask.num_patches)
        decoded = share_of_masked(prepared.mask, self.method.decode_share, draws)
        return self.method.loss(model, batch, prepared.mask, decoded)

    def after_update(self) -> None:
        if self.kept is not None:
            config = self.config
            self.kept.store.commit(self.mask.epoch, self.run.processes, config.accum_iter, config.batch_size)

    def tallies(self) -> dict[str, Tensor]:
        skipped, self.skipped = self.skipped, torch.zeros_like(self.skipped)
        return {"skipped_attention": skipped}

    def progress(self) -> str:
        return describe_schedule(self.mask_config, self.mask.alpha, self.mask.num_parts)

    @contextlib.contextmanager
    def _attention_pass(self) -> Iterator[AttentionFn]:
        """Signal of the encoder that the masks are made from, in the mode and precision of the attention pass."""
        source: Any = self.ema.model if self.ema is not None else self.model
        with attention_mode(source, self.mask_config.attention_mode), self.run.autocast():
            yield lambda images: source.signal(images, **self.mask_config.signal)

    # --- ends ---

    def after_epoch(self, epoch: int, line: dict[str, Any], sums: dict[str, Any], last: bool) -> str:
        spared = sums["skipped_attention"] / line["images"]
        self.last_loss = line["train_loss"]
        line.update(alpha=self.mask.alpha, num_parts=self.mask.num_parts, skipped_attention=spared)
        words = describe_schedule(self.mask_config, self.mask.alpha, self.mask.num_parts, decimals=3).split(", ")
        if self.mask_config.uses_attention:
            words.append(f"spared attention passes {spared:.0%}")
        return "  ".join(words)

    def _take_pictures(self, epoch: int) -> None:
        """Parts and masks of a few images as the model makes them now, at `picture_epochs` times over the run."""
        times = self.config.picture_epochs
        wanted = {round(self.config.epochs * i / max(times - 1, 1)) for i in range(times)}
        if not (self.run.processes.is_main and epoch in wanted and self.config.picture_images):
            return
        with self._attention_pass() as attention_fn:
            sheet = self.pictures.take(epoch, self.run.device, attention_fn)
        if sheet is not None:
            self.run.log.image("parts_and_masks", sheet)

    def finish(self) -> Outcome:
        self._take_pictures(self.config.epochs)
        drawn = self.pictures.compose() if self.run.processes.is_main and self.config.picture_images else None
        return Outcome(
            metrics={"epoch": self.config.epochs - 1, "train_loss": self.last_loss},
            details={"method": self.method.name, "mask": asdict(self.mask_config)},
            files={"pictures": drawn} if drawn else {},
        )
