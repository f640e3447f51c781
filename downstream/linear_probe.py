"""Linear probes and k-NN on frozen features: `python -m downstream.linear_probe --data_path IMAGENET --init_from CHECKPOINT`.

Defaults are MAE's protocol (He et al., CVPR 2022, Table 10; facebookresearch/mae, FINETUNE.md): LARS, effective batch
16384, 90 epochs, random resized crops, a batch norm without scale and shift before the linear layer. Any number of
layers is probed at once, each with a head of its own, from one pass of the encoder.

B images   L probed layers   D width   C classes   n training images   k neighbours
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.training.checkpoint import find_resume, read_checkpoint
from common.training.config import EpochsConfig, FormerFlag, ImageSetConfig, RunConfig, option, with_default
from common.training.data import Batch, training_transform
from common.training.distributed import Processes
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream.classification.labelled import WithLabel, draw_subset, middle, open_labelled, same_classes
from downstream.finetune import count_correct, pooled
from downstream.pictures import draw_layers
from downstream.probing.lars import LARS
from downstream.training import (
    Scores,
    SupervisedTask,
    TaskConfig,
    evaluation_batches,
    make_encoder,
    parse_task,
    require_state_of,
    say_once,
    train_task,
)
from downstream.vit import MODELS, BackboneViT

PROGRAM = "linear_probe"
NAME = "linear probing"
DESCRIPTION = (
    "Train linear classifiers on frozen features of one or many layers, and classify by k nearest neighbours. "
    "Defaults: MAE's protocol, 90 epochs of LARS with an effective batch of 16384."
)
KNN_TEMPERATURE = 0.07
"""Of the neighbours' votes, exp(cosine / temperature): Wu et al., CVPR 2018; DINO."""


@dataclass(frozen=True)
class ProbeConfig(EpochsConfig, ImageSetConfig, TaskConfig):
    """Flags of the linear probe."""

    former_flags: ClassVar[dict[str, FormerFlag]] = {
        "drop_path": FormerFlag(0.0, "has no effect on linear probing: the encoder is frozen"),
        "layer_decay": FormerFlag(1.0, "has no effect on linear probing: the encoder is frozen"),
        "checkpointing": FormerFlag(False, "has no effect on linear probing: the encoder has no backward pass"),
        "beta1": FormerFlag(0.9, "has no effect on linear probing: LARS has no betas"),
        "beta2": FormerFlag(0.999, "has no effect on linear probing: LARS has no betas"),
    }

    layer: str = option(
        "-1",
        "blocks whose output is probed: numbers from 0, negative ones from the end, such as 5,8,-1; or all. Trap: the last "
        "block is not always the best one (BEiT's and SimMIM's is below the middle of the network), and a layer chosen by its "
        "validation accuracy is a selection to report as such",
        group="model",
    )
    pool: Literal["cls", "mean"] = option(
        "cls",
        "class token, or the mean of the patch tokens. Trap: numbers differ by points; MAE's published linear probes are of "
        "the class token, BEiT's of the mean",
        group="model",
    )
    norm: bool = option(
        True,
        "apply the last norm of pre-training to the last block's tokens before pooling. Trap: official fine-tuning with "
        "--pool mean drops this norm for a new one, linear probing keeps it; a fine-tuned checkpoint may not hold it",
        group="model",
    )
    cache: bool = option(
        False,
        "compute the features of each image once, from its middle, instead of from a new random crop in every epoch. Much "
        "faster, a little lower; say so beside the number",
        group="data",
    )
    knn: str = option(
        "20",
        "numbers of neighbours such as 10,20,100 (from the images' middles); empty: no k-NN. Like --cache, keeps 4 bytes x "
        "images x layers x width in memory on every rank: 4 GB for one layer of ViT-B on ImageNet",
        group="run",
    )
    subset: int = option(0, "train on so many images, drawn evenly over the classes by --seed; 0: all", group="data")
    crop_pct: float = option(0.875, "validation: side of the middle crop as a share of the shorter side", group="data")
    batch_size: int = with_default(RunConfig, "batch_size", 512)
    crop_scale: tuple[float, float] = with_default(ImageSetConfig, "crop_scale", (0.08, 1.0))
    blr: float = option(
        0.1,
        "base learning rate of LARS, for an effective batch of --blr_batch. Trap: it is for LARS and batch 16384; with a small "
        "batch or few epochs try more",
        group="optimisation",
    )
    epochs: int = with_default(EpochsConfig, "epochs", 90)
    warmup_epochs: float = with_default(EpochsConfig, "warmup_epochs", 10)
    weight_decay: float = option(0.0, "of LARS, not on biases", group="optimisation")
    pictures: int = option(4, "0: no curves of the training", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "subset")
        self._require("layer", bool(self.layers), f"must be all, or blocks of 0 to {self.depth - 1} such as 5,8,-1")
        alone = len(self.layers) == 1 or self.clip_grad is None
        self._require("clip_grad", alone, "must be left out for several layers: it would tie their heads together")
        self._require("knn", self.knn == "" or bool(self.neighbours), "must be counts such as 10,20, or empty")
        self._require("crop_pct", 0 < self.crop_pct <= 1, "must be in (0, 1]")

    @property
    def depth(self) -> int:
        """Blocks of the model."""
        return MODELS[self.model].keywords["depth"]

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks to probe, from 0, ascending; empty if they cannot be read."""
        if self.layer == "all":
            return tuple(range(self.depth))
        try:
            asked = [int(word) for word in self.layer.split(",")]
        except ValueError:
            return ()
        good = all(-self.depth <= one < self.depth for one in asked)
        return tuple(sorted({one % self.depth for one in asked})) if good else ()

    @property
    def neighbours(self) -> tuple[int, ...]:
        """Values of k, ascending; empty if there are none."""
        words = [word.strip() for word in self.knn.split(",") if word.strip()]
        good = all(word.isdecimal() and int(word) > 0 for word in words)
        return tuple(sorted({int(word) for word in words})) if good else ()


class Probes(nn.Module):
    """A frozen encoder with a batch norm and a linear layer on each probed block.

    Args:
        layers: blocks, ascending.
        pool: "cls" or "mean".
        norm: applied to the last block's tokens, or None.
    """

    def __init__(self, encoder: BackboneViT, layers: tuple[int, ...], pool: str, norm: nn.LayerNorm | None, classes: int) -> None:
        super().__init__()
        self.encoder, self.layers, self.pool, self.norm = encoder, layers, pool, norm
        self.encoder.requires_grad_(False).eval()
        if norm is not None:
            norm.requires_grad_(False)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(encoder.width, affine=False, eps=1e-6), nn.Linear(encoder.width, classes))
            for _ in layers
        )
        for head in self.heads:
            nn.init.trunc_normal_(head[1].weight, std=0.01)  # type: ignore[index]
            nn.init.zeros_(head[1].bias)  # type: ignore[index]

    def train(self, mode: bool = True) -> Probes:
        """The encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> pooled features [B, L, D]."""
        outputs = self.encoder(images, self.layers)
        if self.norm is not None and self.layers[-1] == self.encoder.depth - 1:
            outputs[-1] = self.norm(outputs[-1])
        prefix = self.encoder.num_prefix_tokens
        return torch.stack([pooled(tokens, prefix, self.pool) for tokens in outputs], dim=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Images [B, 3, height, width], or their features [B, L, D] -> logits [B, L, C]."""
        features = inputs if inputs.ndim == 3 else self.features(inputs)
        return torch.stack([head(features[:, place]) for place, head in enumerate(self.heads)], dim=1)


class FeatureSource:
    """Features and classes in memory, as samples."""

    def __init__(self, features: Tensor, labels: Tensor, name: Callable[[int], str]) -> None:
        self.features, self.labels, self.name = features, labels, name

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Tensor, Tensor]:
        """([L, D], class)."""
        return self.features[index], self.labels[index]


def probe_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Sum over layers of the mean cross-entropy: each head then learns as if it were alone."""
    inputs, labels = batch.views
    logits = model(inputs).float()  # [B, L, C]
    each = functional.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="none")
    return each.reshape(logits.shape[:2]).mean(dim=0).sum()


@torch.no_grad()
def extract(model: Probes, source: Any, config: ProbeConfig, run: Run) -> tuple[Tensor, Tensor]:
    """Features float32 [n, L, D] and classes [n] of all images' middles, in the order of the set, on the CPU of every rank."""
    model.eval()
    processes, found = run.processes, []
    for batch in evaluation_batches(source, middle(config), config, processes):
        with run.autocast():
            features = model.features(batch.images)
        found.append((batch.sample_ids.cpu(), features.float().cpu(), batch.views[1].cpu()))
    mine = tuple(torch.cat(parts) for parts in zip(*found, strict=True)) if found else None
    everyone = [part for part in processes.gather(mine) if part is not None]
    ids, features, labels = (torch.cat(parts) for parts in zip(*everyone, strict=True))
    order = ids.argsort()
    return features[order], labels[order]


def knn_votes(bank: Tensor, labels: Tensor, queries: Tensor, k: int, classes: int, chunk: int = 256) -> Tensor:
    """Votes of the k most similar training images, each weighted by exp(cosine / 0.07).

    Args:
        bank: features of the training images [n, D].
        labels: their classes [n].
        queries: [B, D].
        chunk: queries compared at once.

    Returns:
        [B, C], higher is better.
    """
    bank, queries = functional.normalize(bank, dim=1), functional.normalize(queries, dim=1)
    votes = torch.zeros(len(queries), classes, dtype=queries.dtype, device=queries.device)
    for first in range(0, len(queries), chunk):
        near = (queries[first : first + chunk] @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = ((near.values - 1) / KNN_TEMPERATURE).exp()  # minus one: no overflow, and the same order
        votes[first : first + chunk].scatter_add_(1, labels[near.indices], weights)
    return votes


class Evaluation:
    """Accuracy of every probed layer on cached validation features, and of k-NN once.

    Args:
        val: features [n, L, D] and classes [n] of the validation images.
        train: those of the training images, or None without k-NN.
        trained: whether the heads are worth a number; else there are only those of k-NN.
    """

    def __init__(
        self,
        config: ProbeConfig,
        val: tuple[Tensor, Tensor],
        train: tuple[Tensor, Tensor] | None,
        classes: int,
        processes: Processes,
        trained: bool = True,
    ) -> None:
        self.config, self.processes, self.classes, self.trained = config, processes, classes, trained
        mine = slice(processes.rank, None, processes.world)
        self.features, self.labels = val[0][mine], val[1][mine]
        self.knn = self._knn(*train) if train is not None else {}

    def __call__(self, model: nn.Module) -> Scores:
        """top1 and top5 are those of the last probed layer; with several layers each has a number of its own besides."""
        assert isinstance(model, Probes)
        device, names = self.processes.device, [f"_layer{layer}" for layer in model.layers]
        sums = torch.zeros(len(names), 4, dtype=torch.float64, device=device)
        for first in range(0, len(self.labels), self.config.batch_size):
            here = slice(first, first + self.config.batch_size)
            logits, labels = model(self.features[here].to(device)).float(), self.labels[here].to(device)
            sums += torch.stack([count_correct(logits[:, place], labels) for place in range(len(names))])
        shares = self.processes.sum(sums)
        shares = 100 * shares[:, 1:3] / shares[:, :1]  # [L, (top-1, top-5)]
        numbers = self._named(shares, names) if self.trained else {}
        curves = {**({"linear": shares[:, 0].tolist()} if self.trained else {}), **self._curves()}
        drawn = draw_layers(list(model.layers), curves) if len(names) > 1 and self.processes.is_main else {}
        return Scores({**numbers, **self.knn}, drawn)

    def _named(self, shares: Tensor, names: list[str]) -> dict[str, float]:
        numbers: dict[str, float] = {}
        for column, kind in enumerate(("top1", "top5") if self.classes > 5 else ("top1",)):
            numbers[kind] = float(shares[-1, column])
            if len(names) > 1:
                numbers |= {f"{kind}{name}": float(value) for name, value in zip(names, shares[:, column], strict=True)}
        return numbers

    def _knn(self, bank: Tensor, labels: Tensor) -> dict[str, float]:
        """Top-1 in percent: `knn20` of the last layer, and `knn20_layer5` of each where there are several."""
        numbers: dict[str, float] = {}
        for k in self.config.neighbours:
            shares = [self._knn_share(bank[:, place], labels, place, k) for place in range(len(self.config.layers))]
            numbers[f"knn{k}"] = shares[-1]
            if len(shares) > 1:
                numbers |= {f"knn{k}_layer{layer}": one for layer, one in zip(self.config.layers, shares, strict=True)}
        return numbers

    def _knn_share(self, bank: Tensor, labels: Tensor, place: int, k: int) -> float:
        near, bank, labels = (one.to(self.processes.device) for one in (self.features[:, place], bank, labels))
        votes = knn_votes(bank, labels, near, k, self.classes)
        counts = torch.tensor([int((votes.argmax(dim=1).cpu() == self.labels).sum()), len(self.labels)], dtype=torch.float64)
        right, seen = self.processes.sum(counts.to(self.processes.device)).tolist()
        return 100 * right / seen

    def _curves(self) -> dict[str, list[float]]:
        return {
            f"{k}-NN": [self.knn[f"knn{k}_layer{layer}"] for layer in self.config.layers]
            for k in self.config.neighbours
            if self.knn and len(self.config.layers) > 1
        }


def make_task(config: ProbeConfig, run: Run) -> SupervisedTask:
    """Data, frozen features and heads."""
    processes = run.processes
    train, val = open_labelled(config, train=True), open_labelled(config, train=False)
    same_classes(train, val, config.data_path)
    source: Any = draw_subset(train, config.subset, config.seed)
    if config.neighbours and max(config.neighbours) > len(source):
        raise BadInput(f"--knn {config.knn}: more neighbours than the {len(source)} training images")
    resumed = find_resume(config)
    if config.eval_only and resumed is None and not config.neighbours:
        raise BadInput("--eval_only: no trained heads (--resume) and no neighbours (--knn), nothing to evaluate")
    if resumed is not None:
        require_state_of(NAME, read_checkpoint(resumed), resumed)
    last = config.layers[-1] == config.depth - 1
    norm = nn.LayerNorm(MODELS[config.model].keywords["width"], eps=1e-6) if config.norm and last else None
    # A run goes on with the encoder it began with, whatever --init_from says now: features are made before it is resumed.
    weights = str(resumed or config.init_from)
    encoder = make_encoder(config, say_once(processes), norm if weights else None, weights=weights)
    model = Probes(encoder, config.layers, config.pool, norm, len(train.classes)).to(processes.device)
    trained = [value for value in model.parameters() if value.requires_grad]
    cached = extract(model, source, config, run) if config.cache or config.neighbours else None
    evaluate = Evaluation(
        config,
        extract(model, val, config, run),
        cached if config.neighbours else None,
        len(train.classes),
        processes,
        trained=not config.eval_only or resumed is not None,
    )
    if config.cache and cached is not None:
        data: Any = FeatureSource(*cached, source.name)
        transform: Any = _as_is
    else:
        data, transform = source, WithLabel(training_transform(config))
    return SupervisedTask(
        run=run,
        config=config,
        kind=NAME,
        model=model,
        source=data,
        transform=transform,
        objective=probe_loss,
        evaluation=evaluate,
        metric="top1",
        optimizer=lambda lr: LARS(trained, lr=lr, weight_decay=config.weight_decay),
        facts={"classes": len(train.classes), "validation_images": len(val)},
    )


def _as_is(sample: Any) -> Any:
    return sample


def main(argv: Sequence[str]) -> None:
    """Parses the flags, extracts features, and trains the heads."""
    config = parse_task(ProbeConfig, PROGRAM, DESCRIPTION, argv)
    train_task(config, lambda run: make_task(config, run))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
