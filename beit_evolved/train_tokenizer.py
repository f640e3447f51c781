"""Trains the discrete VAE that makes BEiT's visual tokens: `python -m beit_evolved.train_tokenizer --help`.

The discrete VAE is a task (common/training/task.py) of the loop that pre-training and the downstream tasks share.

B batch   V codes in the vocabulary   H, W code grid   P, Q pixels   n images drawn
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from beit_evolved.tokenizer import OWN_FILE, DiscreteVAE, codebook_usage, collapse_warning, to_plus_minus_one
from common.training.augment import RandomCrop, colours
from common.training.checkpoint import check_same_settings, read_checkpoint, save_atomically
from common.training.command_line import parse_flags
from common.training.config import AdamWConfig, EpochsConfig, LoaderConfig, Precision, RunConfig, option, with_default
from common.training.data import Batch, RankBatches, Samples, choose_loader
from common.training.errors import BadInput, run_cli
from common.training.loop import Loop
from common.training.optim import make_optimizer
from common.training.preset import TOKENIZER, SmallData
from common.training.task import Outcome, Run, Task, open_data_run

PROGRAM = "train_tokenizer"
DESCRIPTION = (
    "Train a discrete VAE (Gumbel softmax) as the visual tokenizer of BEiT. Defaults are the sizes that the official "
    "code's --discrete_vae_type customized loads: 8192 codes, 112-px images, 14x14 tokens."
)


@dataclass(frozen=True)
class TokenizerConfig(EpochsConfig, AdamWConfig, LoaderConfig, RunConfig):
    """Flags of the tokenizer's training. The schedules are DALL-E's in kind; its run is 3 million updates long."""

    small: ClassVar[SmallData] = TOKENIZER

    input_size: str = with_default(LoaderConfig, "input_size", "112")
    crop_scale: tuple[float, float] = with_default(LoaderConfig, "crop_scale", (0.08, 1.0))
    epochs: int = with_default(EpochsConfig, "epochs", 20)
    blr: float = with_default(EpochsConfig, "blr", 1e-3)
    warmup_epochs: float = with_default(EpochsConfig, "warmup_epochs", 1)
    weight_decay: float = with_default(RunConfig, "weight_decay", 0.0)
    beta2: float = with_default(AdamWConfig, "beta2", 0.999)
    precision: Precision = with_default(RunConfig, "precision", "fp32")
    clip_grad: float | None = with_default(RunConfig, "clip_grad", 1.0)

    vocabulary: int = option(8192, "codes", group="tokenizer")
    code_width: int = option(512, "width of a code's vector", group="tokenizer")
    layers: int = option(3, "each halves the image: 3 make one code of 8x8 pixels", group="tokenizer")
    width: int = option(256, "channels of the convolutions", group="tokenizer")
    temperature: tuple[float, float] = option((1.0, 0.0625), "Gumbel softmax at the first and last update", group="tokenizer")
    kl_weight: float = option(0.0, "weight of each place's divergence from uniform codes", group="tokenizer")
    usage_weight: float = option(0.05, "weight of the batch's divergence from uniform codes", group="tokenizer")
    pictures: int = option(8, "how many reconstructions are drawn each epoch", group="tokenizer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "vocabulary", "code_width", "layers", "width")
        self._at_least(0, "kl_weight", "usage_weight", "pictures")
        self._require("temperature", min(self.temperature) > 0, "must be above 0 at both ends")
        stride = 2**self.layers
        divisible = not any(size % stride for size in self.image_size)
        self._require("input_size", divisible, f"must be divisible by {stride}, the pixels of a code (--layers {self.layers})")


def temperature_at(share: float, ends: tuple[float, float]) -> float:
    """Temperature after a share of the run: half a cosine from the first value to the last."""
    first, last = ends
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * share))


def vae_loss(
    model: nn.Module, images: Tensor, temperature: float, kl_weight: float = 0.0, usage_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What is minimised, and the codes of the images.

    Args:
        kl_weight: of the divergence from uniform of each place's distribution over codes, as in DALL-E.
        usage_weight: of the divergence from uniform of the batch's mean distribution. Without it a short run ends
            with a handful of codes in use, and labels that say nothing.

    Returns:
        Squared error of the reconstruction plus those terms (a scalar), and the most probable codes, int64 [B, H, W].
    """
    reconstruction, logits = model(images, temperature)  # logits [B, V, H, W]
    loss = functional.mse_loss(reconstruction, to_plus_minus_one(images))
    if kl_weight:
        loss = loss + kl_weight * from_uniform(logits.log_softmax(dim=1)).mean()
    if usage_weight:
        mean = logits.softmax(dim=1).mean(dim=(0, 2, 3))[None]  # [1, V]
        loss = loss + usage_weight * from_uniform(mean.clamp(min=1e-12).log()).mean()
    return loss, logits.argmax(dim=1)


def from_uniform(log_shares: Tensor) -> Tensor:
    """Kullback-Leibler divergence of distributions over codes, dimension 1, from the uniform one."""
    return (log_shares.exp() * (log_shares + math.log(log_shares.shape[1]))).sum(dim=1)


class TokenizerTask(Task):
    """The discrete VAE, trained on colours in 0..1.

    Gumbel noise belongs to a rank's place in the run, and the usage term is of the batch of a rank and accumulation step: several
    ranks take the mean of what each of them makes of its images, which is not to the digit what one rank makes of all.

    Args:
        samples: the first ones are drawn with their reconstructions.
    """

    kind = "tokenizer"
    model: DiscreteVAE

    def __init__(self, run: Run, config: TokenizerConfig, model: DiscreteVAE, samples: Samples) -> None:
        super().__init__(run)
        self.config, self.samples, self.facts = config, samples, {}
        self.model = model.to(run.device)
        self.counts = self._no_counts()  # of the codes of this rank's images since the last update
        self.usage: dict[str, float] | None = None  # over the last whole epoch

    # --- start ---

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config, lr)

    def read_checkpoint(self, path: Path) -> dict[str, Any]:
        return read_state(path, len(self.samples))

    def check_same_run(self, state: dict[str, Any], path: Path, effective_batch: int, samples: int) -> None:
        check_same_settings(state, path, self.config, effective_batch, samples)

    def state_dict(self) -> dict[str, Any]:
        return self._tokenizer()  # the weights once more, as in OWN_FILE: --tokenizer reads a checkpoint too

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.usage = state.get("usage")  # older checkpoints do not say it

    def _tokenizer(self) -> dict[str, Any]:
        """What --tokenizer reads: the official code the weights alone, BEiT's start here also how many codes are in use."""
        return {"weights": self.model.state_dict(), "usage": self.usage}

    def record(self) -> dict[str, Any]:
        return {"method": "tokenizer"}

    def title(self) -> str:
        return f"tokenizer: {self.config.vocabulary} codes of {self.model.stride}x{self.model.stride} pixels"

    # --- updates ---

    def receive(self, batch: Batch) -> Batch:
        return replace(batch, views=(colours(batch.images),))

    def prepare(self, batch: Batch, epoch: float) -> float:
        """Temperature of the Gumbel softmax."""
        return temperature_at(epoch / self.config.epochs, self.config.temperature)

    def loss(self, model: nn.Module, batch: Batch, prepared: float) -> Tensor:
        loss, codes = vae_loss(model, batch.images, prepared, self.config.kl_weight, self.config.usage_weight)
        self.counts += codes.flatten().bincount(minlength=len(self.counts))
        return loss

    def tallies(self) -> dict[str, Tensor]:
        counts, self.counts = self.counts, self._no_counts()
        return {"code_counts": counts}

    def _no_counts(self) -> Tensor:
        return torch.zeros(self.config.vocabulary, dtype=torch.int64, device=self.run.device)

    # --- ends ---

    def after_epoch(self, epoch: int, line: dict[str, Any], sums: dict[str, Any], last: bool) -> str:
        """Writes the tokenizer, and its reconstructions of a few images."""
        self.usage = usage = codebook_usage(sums["code_counts"])
        temperature = temperature_at((epoch + 1) / self.config.epochs, self.config.temperature)
        line.update(temperature=temperature, **usage)
        self.run.processes.on_main(self._write)
        share, perplexity = usage["codes_used"], usage["perplexity"]
        used = f"codes used {share:.0%} of {self.config.vocabulary}, perplexity {perplexity:.0f}"
        return f"temperature {temperature:.3f}  {used}"

    def _write(self) -> None:
        self._draw()
        save_atomically(self._tokenizer(), self.run.output / OWN_FILE)

    def _draw(self) -> None:
        """Images above their reconstructions from hard codes, as a picture in the log and a file."""
        if not self.config.pictures:
            return
        count = min(self.config.pictures, len(self.samples))
        shown = [self.samples[(0, index)][0] for index in range(count)]
        readable = [views[0] for views in shown if views is not None]
        if not readable:
            return
        images = colours(torch.stack(readable).to(self.run.device))
        self.model.eval()
        rows = [torch.cat(list(row), dim=2) for row in (images, self.model.reconstruct(images))]  # each [3, P, n*Q]
        sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
        self.run.log.image("reconstructions", sheet)
        Image.fromarray(sheet).save(self.run.output / "reconstructions.png")

    def finish(self) -> Outcome:
        warning = collapse_warning(self.usage, self.config.vocabulary)
        return Outcome(
            metrics={"epoch": self.config.epochs - 1, **(self.usage or {})},
            details={"collapsed": bool(warning)},
            summary=warning,
            files={"tokenizer": self.run.output / OWN_FILE},
        )


def read_state(path: Path, samples: int) -> dict[str, Any]:
    """A checkpoint of the tokenizer's training.

    Until this training shared the loop of the others, its checkpoints were written at the ends of epochs by one process, in fp32,
    with the keys `weights`, `optimizer`, `epoch` and `config`. Such a run goes on here as it would have.

    Args:
        samples: images an epoch, which those checkpoints do not say.

    Raises:
        BadInput: no training state.
    """
    state = read_checkpoint(path)
    if "config" not in state or "optimizer" not in state:
        raise BadInput(f"checkpoint {path}: has no training state to resume")
    if "model" in state:
        return state
    config = state["config"]
    return {
        **state,
        **{"model": state["weights"], "scaler": {}, "ema": None, "facts": {}, "meters": {}, "update": 0, "samples": samples},
        "effective_batch": config["batch_size"] * config["accum_iter"],
    }


def check_checkpoint(config: TokenizerConfig, path: Path, effective_batch: int) -> None:
    """What a launcher checks before it asks for a GPU. Raises BadInput: a checkpoint of a run with other settings."""
    state = read_state(path, 0)
    check_same_settings(state, path, config, effective_batch, state["samples"])


def train(config: TokenizerConfig) -> None:
    """Trains from the command line's configuration to the last tokenizer.

    Raises:
        BadInput, NonFiniteLoss, Interrupted: see :class:`common.training.loop.Loop`.
    """
    with open_data_run(config) as (run, source):
        run.log.say(source.summary)
        samples = Samples(source, RandomCrop(config), config.seed, config.repeat, choose_loader(config.loader, source))
        batches = RankBatches(len(samples), config, run.processes)
        torch.manual_seed(config.seed)  # the same weights on every rank
        model = DiscreteVAE(config.vocabulary, config.code_width, config.layers, config.width)
        Loop(run, TokenizerTask(run, config, model, samples), samples, batches).train()


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    train(parse_flags(TokenizerConfig, PROGRAM, DESCRIPTION, argv))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
