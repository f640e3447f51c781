"""Trains the discrete VAE that makes BEiT's visual tokens: `python -m beit_evolved.train_tokenizer --help`.

One process. Order of the data and crops are those of the pre-training machinery; a run resumes at the last
finished epoch and goes on as if it had not stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from beit_evolved.tokenizer import OWN_FILE, DiscreteVAE, to_plus_minus_one
from common.draws import Stream, hash_seed
from common.training.checkpoint import FREE_TO_CHANGE, LAST, differences, find_resume, read_checkpoint, save_atomically
from common.training.config import RunConfig, option, parse_flags, with_default
from common.training.data import Batch, RankBatches, Samples, colour_transform, make_loader
from common.training.distributed import Processes, start_processes
from common.training.errors import BadInput, NonFiniteLoss, run_cli
from common.training.interrupt import Interrupted, Interruption
from common.training.optim import absolute_lr, lr_at, make_optimizer
from common.training.runlog import RunLog, progress, run_facts
from common.training.sources import open_source

PROGRAM = "train_tokenizer"
DESCRIPTION = (
    "Train a discrete VAE (Gumbel softmax) as the visual tokenizer of BEiT. Defaults are the sizes that the official "
    "code's --discrete_vae_type customized loads: 8192 codes, 112-px images, 14x14 tokens."
)


@dataclass(frozen=True)
class TokenizerConfig(RunConfig):
    """Flags of the tokenizer's training. The schedules are DALL-E's in kind; its run is 3 million updates long."""

    input_size: str = with_default(RunConfig, "input_size", "112")
    crop_scale: tuple[float, float] = with_default(RunConfig, "crop_scale", (0.08, 1.0))
    epochs: int = with_default(RunConfig, "epochs", 20)
    blr: float = with_default(RunConfig, "blr", 1e-3)
    warmup_epochs: float = with_default(RunConfig, "warmup_epochs", 1)
    weight_decay: float = with_default(RunConfig, "weight_decay", 0.0)
    beta2: float = with_default(RunConfig, "beta2", 0.999)
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


def codebook_usage(counts: Tensor) -> dict[str, float]:
    """How much of the vocabulary is in use, from counts of the codes [V]: share used at all, and perplexity."""
    shares = counts.double() / counts.sum()
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum()
    return {"codes_used": float((counts > 0).double().mean()), "perplexity": float(entropy.exp())}


class TokenizerTraining:
    """One run: its state, and the loop over it."""

    def __init__(self, config: TokenizerConfig, processes: Processes) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        source = open_source(config)
        self.samples = Samples(source, colour_transform(config), config.seed, config.repeat)
        self.batches = RankBatches(len(self.samples), config, processes)
        torch.manual_seed(config.seed)
        self.model = DiscreteVAE(config.vocabulary, config.code_width, config.layers, config.width).to(self.device)
        self.peak_lr = absolute_lr(config, self.batches.effective_batch)
        self.optimizer = make_optimizer(self.model, config, self.peak_lr)
        self.log = RunLog(config, processes)
        self.resumed_from = find_resume(config)
        self.first_epoch = self._load() if self.resumed_from else 0

    def _load(self) -> int:
        assert self.resumed_from is not None
        state = read_checkpoint(self.resumed_from)
        if "config" not in state or "optimizer" not in state:
            raise BadInput(f"checkpoint {self.resumed_from}: has no training state to resume")
        differs = differences(state["config"], asdict(self.config), FREE_TO_CHANGE - {"batch_size", "accum_iter"})
        if differs:
            raise BadInput(f"checkpoint {self.resumed_from}: made with other settings: {'; '.join(differs)}")
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"]) + 1

    def run(self) -> None:
        """Trains the epochs that are left, and writes the tokenizer after each."""
        facts = run_facts(
            self.config, None, self.processes, self.resumed_from,
            method="tokenizer", lr=self.peak_lr, samples=len(self.samples), updates_an_epoch=self.batches.updates,
        )  # fmt: skip
        self.log.open(facts, self.first_epoch, self.first_epoch * self.batches.updates)
        loader = make_loader(self.samples, self.batches, self.config, self.processes)
        with Interruption() as interruption:
            for epoch in range(self.first_epoch, self.config.epochs):
                self._train_epoch(epoch, loader)
                if interruption.requested and epoch + 1 < self.config.epochs:
                    raise Interrupted(f"asked to stop; saved {self.config.output_dir} after epoch {epoch + 1}")
        self.log.close()
        self.log.result("tokenizer", self.config, {"epoch": self.config.epochs - 1})
        folder = Path(self.config.output_dir)
        self.log.say(f"tokenizer    {folder / OWN_FILE}")
        self.log.say(f"TensorBoard  tensorboard --logdir {self.log.tensorboard_folder}  (reconstructions, codebook usage)")

    def _train_epoch(self, epoch: int, loader: Any) -> None:
        self.model.train()
        self.batches.start_at(epoch)
        counts = torch.zeros(self.config.vocabulary, dtype=torch.int64, device=self.device)
        losses: list[float] = []
        stream = iter(loader)
        bar = progress(range(self.batches.updates), self.batches.updates, f"epoch {epoch + 1}", self.processes.is_main)
        for update in bar:
            torch.manual_seed(hash_seed(self.config.seed, epoch, update, Stream.MODEL))  # of the Gumbel noise
            losses.append(self._update(epoch, update, stream, counts))
            bar.set_postfix_str(f"loss {losses[-1]:.4f}")
        self._end_epoch(epoch, sum(losses) / len(losses), counts)

    def _update(self, epoch: int, update: int, stream: Any, counts: Tensor) -> float:
        done = epoch + update / self.batches.updates
        temperature = temperature_at(done / self.config.epochs, self.config.temperature)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(done, self.config, self.peak_lr)
        total = 0.0
        for _ in range(self.config.accum_iter):
            images = self._next(stream)
            loss, codes = vae_loss(self.model, images, temperature, self.config.kl_weight, self.config.usage_weight)
            torch.autograd.backward(loss / self.config.accum_iter)
            total += loss.item() / self.config.accum_iter
            counts += codes.flatten().bincount(minlength=len(counts))
        if not math.isfinite(total):
            raise NonFiniteLoss(f"loss became {total} at epoch {epoch}, update {update}; lower --blr")
        if self.config.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def _next(self, stream: Any) -> Tensor:
        batch: Batch = next(stream)
        if batch.bad and (self.config.on_bad_image == "raise" or not batch.views):
            raise BadInput(f"unreadable image {'; '.join(batch.bad)} (--on_bad_image skip puts another in its place)")
        return batch.to(self.device).images

    def _end_epoch(self, epoch: int, loss: float, counts: Tensor) -> None:
        usage = codebook_usage(counts)
        temperature = temperature_at((epoch + 1) / self.config.epochs, self.config.temperature)
        line = {"epoch": epoch, "train_loss": loss, "temperature": temperature, **usage}
        update = (epoch + 1) * self.batches.updates
        self.log.epoch(line, update)
        self._draw(update)
        self.log.say(
            f"epoch {epoch + 1}/{self.config.epochs}  loss {loss:.4f}  temperature {temperature:.3f}  "
            f"codes used {usage['codes_used']:.0%} of {self.config.vocabulary}, perplexity {usage['perplexity']:.0f}"
        )
        self._save(epoch)

    def _draw(self, update: int) -> None:
        """Images above their reconstructions from hard codes, as a picture in the log and a file."""
        if not self.config.pictures:
            return
        count = min(self.config.pictures, len(self.samples))
        shown = [self.samples[(0, index)][0] for index in range(count)]
        images = torch.stack([views[0] for views in shown if views is not None]).to(self.device)
        self.model.eval()
        rows = [torch.cat(list(row), dim=2) for row in (images, self.model.reconstruct(images))]  # each [3, P, n*Q]
        sheet = (torch.cat(rows, dim=1).permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy()
        self.log.image("reconstructions", sheet, update)
        Image.fromarray(sheet).save(Path(self.config.output_dir) / "reconstructions.png")

    def _save(self, epoch: int) -> None:
        folder = Path(self.config.output_dir)
        weights = self.model.state_dict()
        save_atomically({"weights": weights}, folder / OWN_FILE)
        state = {"weights": weights, "optimizer": self.optimizer.state_dict(), "epoch": epoch, "config": asdict(self.config)}
        save_atomically(state, folder / LAST)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config = parse_flags(TokenizerConfig, PROGRAM, DESCRIPTION, argv)
    processes = start_processes(config.device, config.dist_timeout)
    try:
        if processes.world > 1:
            raise BadInput(f"the tokenizer trains in one process, not in {processes.world}")
        TokenizerTraining(config, processes).run()
    finally:
        processes.close()


if __name__ == "__main__":
    run_cli(PROGRAM, main)
