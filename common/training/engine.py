"""Pre-training: the same for every method.

A trainer says what its model is and how a batch becomes a loss (:class:`Method`); masks and their pictures are here,
the loop itself is in common/training/loop.py.

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

from common.attention import Layers, Values, attention_mode
from common.evolved_mask import AttentionFn, EvolvedMask, MaskBatch
from common.mask_config import MaskConfig
from common.training.checkpoint import check_same_run, load_weights
from common.training.config import TrainConfig
from common.training.data import Batch, RankBatches, Samples, Transform, denormalise
from common.training.distributed import Processes, start_processes
from common.training.errors import BadInput
from common.training.loop import Loop
from common.training.optim import EncoderEMA
from common.training.runlog import run_facts
from common.training.sources import open_source
from common.training.stopwatch import Stopwatch
from common.visualize import MaskPictures, describe_schedule


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


class Pretraining(Loop):
    """One pre-training run: the loop with masks made by the model that is trained."""

    config: TrainConfig

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
        super().__init__(config, method.model, samples, batches, processes, method.facts)
        self.mask_config, self.method, self.mask = mask_config, method, mask
        self.last_loss = math.nan
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)  # images whose mask needed no attention
        if self.resumed_from is None and config.init_from:
            self.log.say(load_weights(self.model, Path(config.init_from), method.may_miss))
        if mask_config.attention_from == "ema" and mask_config.uses_attention:
            self.ema = EncoderEMA(self.model, mask_config.ema_decay, method.not_in_attention)
        self._resume()
        self.pictures = MaskPictures(
            Path(config.output_dir) / "masks", samples.source, method.picture_transform, denormalise, mask, config.picture_images
        )

    def _check_same_run(self, state: dict[str, Any], path: Path) -> None:
        check_same_run(state, path, self.config, self.mask_config, self.batches.effective_batch, len(self.samples))

    def _state_of_task(self) -> dict[str, Any]:
        return {"mask": self.mask.state_dict(), "mask_config": asdict(self.mask_config), "last_loss": self.last_loss}

    def _load_state_of_task(self, state: dict[str, Any]) -> None:
        self.mask.load_state_dict(state["mask"])
        self.last_loss = state.get("last_loss", math.nan)  # older checkpoints do not say it

    # --- the loop ---

    def _before_epoch(self, epoch: int) -> None:
        if self.first_update == 0:
            self._take_pictures(epoch)
        self.mask.set_epoch(epoch)

    def _loss(self, batch: Batch, watch: Stopwatch) -> Callable[[], Tensor]:
        masks = self._make_mask(batch)
        watch.lap("mask")
        self.skipped += masks.skipped.sum()
        return lambda: self.method.loss(self.trained, batch, masks.mask)

    def _tallies(self) -> dict[str, float]:
        skipped, self.skipped = self.skipped, torch.zeros_like(self.skipped)
        return {"skipped_attention": float(skipped)}

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

    # --- numbers ---

    def _postfix(self, watch: Stopwatch) -> str:
        schedule = describe_schedule(self.mask_config, self.mask.alpha, self.mask.num_parts)
        return ", ".join(filter(None, (super()._postfix(watch), schedule)))

    def _after_epoch(self, epoch: int, line: dict[str, Any]) -> None:
        spared = self.meters["skipped_attention"] / line["images"]
        self.last_loss = line["train_loss"]
        line.update(alpha=self.mask.alpha, num_parts=self.mask.num_parts, skipped_attention=spared)

    def _told(self, line: dict[str, Any]) -> str:
        words = describe_schedule(self.mask_config, self.mask.alpha, self.mask.num_parts, decimals=3).split(", ")
        if self.mask_config.uses_attention:
            words.append(f"spared attention passes {line['skipped_attention']:.0%}")
        return "  ".join(words)

    # --- what is written ---

    def _take_pictures(self, epoch: int) -> None:
        """Parts and masks of a few images as the model makes them now, at `picture_epochs` times over the run."""
        times = self.config.picture_epochs
        wanted = {round(self.config.epochs * i / max(times - 1, 1)) for i in range(times)}
        if not (self.processes.is_main and epoch in wanted and self.config.picture_images):
            return
        with self._attention_pass() as attention_fn:
            sheet = self.pictures.take(epoch, self.device, attention_fn)
        if sheet is not None:
            self.log.image("parts_and_masks", sheet, epoch * self.batches.updates)

    def _announce(self) -> None:
        facts = run_facts(
            self.config, self.mask_config, self.processes, self.resumed_from,
            method=self.method.name, effective_batch=self.batches.effective_batch, lr=self.peak_lr, precision=str(self.precision),
            samples=len(self.samples), updates_an_epoch=self.batches.updates, **self.method.facts,
        )  # fmt: skip
        self.log.open(facts, self.first_epoch, self.first_epoch * self.batches.updates + self.first_update)
        if self.processes.is_main:
            self.pictures.keep_until(self.first_epoch if self.resumed_from else -1)
        height, width = self.mask.height, self.mask.width
        self.log.say(
            f"{self.method.name} {self.config.model}, mask {self.mask_config.mask}: "
            f"{'' if self.mask_config.exact_count else 'at most '}{self.mask.num_masked} of {height}x{width} patches; "
            f"{len(self.samples)} samples an epoch, effective batch {self.batches.effective_batch}, lr {self.peak_lr:.3g}, "
            f"{self.device} x {self.processes.world}, {str(self.precision).removeprefix('torch.')}"
        )

    def _finish(self) -> None:
        self._take_pictures(self.config.epochs)
        picture = self.pictures.compose() if self.processes.is_main and self.config.picture_images else None
        self.log.close()
        self.log.result(
            "pre-training", self.config, {"epoch": self.epochs - 1, "train_loss": self.last_loss}, method=self.method.name,
            mask=asdict(self.mask_config), facts=self.facts,
        )  # fmt: skip
        self._say_where(picture)
        self.processes.barrier()
