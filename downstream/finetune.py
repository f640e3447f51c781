"""Fine-tuning for classification: `python -m downstream.finetune --data_path IMAGENET --init_from CHECKPOINT`.

Defaults are this project's recipe for the paper's Tables 1-4 (MAE's fine-tuning, He et al., CVPR 2022, Table 9, with batch
1024 and layer decay .65): the same for all three methods.

B images   D width   C classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from common.training.checkpoint import find_resume, read_checkpoint
from common.training.config import EpochsConfig, ImageSetConfig, RunConfig, option, with_default
from common.training.data import Batch, denormalise
from common.training.distributed import Processes
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream.classification.labelled import (
    LabelledImages,
    augmentation,
    draw_subset,
    is_rand_augment,
    middle,
    open_labelled,
    same_classes,
)
from downstream.confusion import confusion_matrix
from downstream.pictures import draw_confusion, draw_predictions
from downstream.training import (
    Scores,
    SupervisedTask,
    TaskConfig,
    TunedEncoderConfig,
    evaluation_batches,
    layerwise_adamw,
    make_encoder,
    parse_task,
    say_once,
    train_task,
)
from downstream.vit import MODELS, BackboneViT
from downstream.weights import find_encoder

PROGRAM = "finetune"
DESCRIPTION = (
    "Fine-tune a pre-trained encoder (MAE, BEiT or SimMIM, ours or official) for classification. Defaults: 100 epochs "
    "on ImageNet-1K with an effective batch of 1024 (batch_size x accum_iter x processes)."
)


@dataclass(frozen=True)
class FinetuneConfig(EpochsConfig, TunedEncoderConfig, ImageSetConfig, TaskConfig):
    """Flags of fine-tuning."""

    pool: Literal["mean", "cls"] = option(
        "mean",
        "what is classified: the mean of the patch tokens, then a new norm; or the class token after the last norm",
        group="model",
    )
    subset: int = option(0, "train on so many images, drawn evenly over the classes by --seed; 0: all", group="data")
    batch_size: int = with_default(RunConfig, "batch_size", 128)
    epochs: int = with_default(EpochsConfig, "epochs", 100)
    warmup_epochs: float = with_default(EpochsConfig, "warmup_epochs", 5)
    blr: float = with_default(EpochsConfig, "blr", 5e-4)
    min_lr: float = with_default(RunConfig, "min_lr", 1e-6)
    crop_scale: tuple[float, float] = with_default(ImageSetConfig, "crop_scale", (0.08, 1.0))
    auto_augment: str = option("rand-m9-mstd0.5-inc1", "timm's RandAugment; empty: none", group="data")
    color_jitter: float = option(0.0, "brightness, contrast and saturation, where --auto_augment is empty", group="data")
    random_erasing: float = option(0.25, "share of images with a rectangle of noise", group="data")
    crop_pct: float = option(0.875, "validation: side of the middle crop as a share of the shorter side", group="data")
    mixup: float = option(0.8, "alpha of the beta distribution; 0: none", group="optimisation")
    cutmix: float = option(1.0, "alpha of the beta distribution; 0: none. With both, each batch draws one", group="optimisation")
    mix_prob: float = option(1.0, "share of batches that are mixed", group="optimisation")
    smoothing: float = option(0.1, "label smoothing", group="optimisation")
    model_ema: float = option(
        0.0, "decay of a moving average of the weights that is then evaluated, such as 0.9999; 0: none", group="run"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "subset", "mixup", "cutmix", "color_jitter")
        for name in ("random_erasing", "smoothing", "mix_prob"):
            self._require(name, 0 <= getattr(self, name) <= 1, "must be between 0 and 1")
        known = not self.auto_augment or is_rand_augment(self.auto_augment)
        self._require("auto_augment", known, "must be a RandAugment of timm such as rand-m9-mstd0.5-inc1, or empty")
        self._require("crop_pct", 0 < self.crop_pct <= 1, "must be in (0, 1]")
        self._require("model_ema", 0 <= self.model_ema < 1, "must be in [0, 1)")


class Classifier(nn.Module):
    """Encoder, pooling, norm, linear layer.

    Args:
        encoder: with a class token where `pool` is "cls".
        classes: C.
        pool: "mean" or "cls".
        norm: for "cls", the last norm of pre-training; for "mean" a new one is made.
    """

    def __init__(self, encoder: BackboneViT, classes: int, pool: str, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.encoder, self.pool = encoder, pool
        self.fc_norm = norm
        self.head = nn.Linear(encoder.width, classes)
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # the first steps then change the encoder little
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, height, width] -> logits [B, C]."""
        (tokens,) = self.encoder(images, [-1])
        return self.head(self.fc_norm(pooled(tokens, self.encoder.num_prefix_tokens, self.pool)))


def pooled(tokens: Tensor, prefix: int, pool: str) -> Tensor:
    """The class token (`pool` "cls") or the mean of the patch tokens ("mean"): [B, P+N, D] -> [B, D], P = `prefix`."""
    return tokens[:, prefix:].mean(dim=1) if pool == "mean" else tokens[:, 0]


class MixedLoss:
    """Cross-entropy on mixed images and labels.

    One draw a batch (of a rank and accumulation step): mixup or cutmix with equal chances, and the share lam. Image i is
    mixed with image i - 1; where timm's Mixup takes the batch in reverse order, the targets are the same: lam * y_i +
    (1 - lam) * y_j, then (1 - smoothing) * target + smoothing / C. Draws come from torch's generator of the CPU, which
    the loop seeds for each update.
    """

    def __init__(self, config: FinetuneConfig, classes: int) -> None:
        mixes: list[Any] = [v2.MixUp(alpha=config.mixup, num_classes=classes)] if config.mixup else []
        mixes += [v2.CutMix(alpha=config.cutmix, num_classes=classes)] if config.cutmix else []
        self.mix = v2.RandomApply([v2.RandomChoice(mixes)], p=config.mix_prob) if mixes else None
        self.smoothing = config.smoothing

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the batch."""
        images, labels = batch.views
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        return functional.cross_entropy(model(images).float(), labels, label_smoothing=self.smoothing)


class Evaluation:
    """Accuracy over a validation set, each image counted once over all ranks."""

    def __init__(self, config: FinetuneConfig, val: LabelledImages, processes: Processes) -> None:
        self.config, self.val, self.processes = config, val, processes
        self.transform = middle(config)
        # Drawn: images spread over the set, whose order is by class, that this rank sees.
        own = range(processes.rank, len(val), processes.world)
        count = min(config.pictures, len(own)) if processes.is_main else 0
        self.drawn = {own[place * len(own) // count] for place in range(count)}

    def __call__(self, model: nn.Module) -> Scores:
        """Top-1 and top-5 in percent (top-5 where there are more than five classes), mean cross-entropy, pictures."""
        classes, device = len(self.val.classes), self.processes.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=device)  # true class, predicted class
        drawn: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in evaluation_batches(self.val, self.transform, self.config, self.processes):
            images, labels = batch.views
            logits = model(images).float()
            sums += count_correct(logits, labels)
            matrix += confusion_matrix(logits.argmax(dim=1), labels, classes, ignored=None)
            for place in (place for place, index in enumerate(batch.sample_ids.tolist()) if index in self.drawn):
                drawn.append((images[place].cpu(), labels[place].cpu(), logits[place].cpu()))
        images_seen, top1, top5, loss = self.processes.sum(sums).tolist()
        numbers = {"top1": 100 * top1 / images_seen, "top5": 100 * top5 / images_seen, "val_loss": loss / images_seen}
        if classes <= 5:
            del numbers["top5"]
        return Scores(numbers, self._pictures(self.processes.sum(matrix), drawn))

    def _pictures(self, matrix: Tensor, drawn: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Any]:
        if not drawn:
            return {}
        images, labels, logits = (torch.stack(one) for one in zip(*drawn, strict=True))
        predictions = draw_predictions(denormalise(images), labels, logits.softmax(dim=1), self.val.classes)
        return {**predictions, **draw_confusion(matrix.cpu(), self.val.classes)}


def count_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Images, those right first, those right among the first five, sum of cross-entropies: float64 [4]."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [B, 5]
    hits = best == labels[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="sum")
    counts = [torch.tensor(len(labels), device=logits.device), hits[:, 0].sum(), hits.any(dim=1).sum(), loss]
    return torch.stack([one.double() for one in counts])


def make_task(config: FinetuneConfig, run: Run) -> SupervisedTask:
    """Data, model and loss of fine-tuning."""
    processes = run.processes
    train, val = open_labelled(config, train=True), open_labelled(config, train=False)
    same_classes(train, val, config.data_path)

    model = make_classifier(config, len(train.classes), say_once(processes))
    return SupervisedTask(
        run=run,
        config=config,
        kind="fine-tuning",
        model=model,
        source=draw_subset(train, config.subset, config.seed),
        transform=augmentation(config),
        objective=MixedLoss(config, len(train.classes)),
        evaluation=Evaluation(config, val, processes),
        metric="top1",
        optimizer=partial(layerwise_adamw, model, config),
        ema_decay=config.model_ema,
        facts={"classes": len(train.classes), "validation_images": len(val)},
    )


def make_classifier(config: FinetuneConfig, classes: int, say: Callable[[str], None]) -> Classifier:
    """The model with the weights of --init_from; under --eval_only its head too, unless --resume finds a run's.

    Raises:
        BadInput: a checkpoint that does not fit, or that has no head of `classes` classes under --eval_only; or under
            --eval_only two checkpoints that could be meant.
    """
    norm = nn.LayerNorm(MODELS[config.model].keywords["width"], eps=1e-6)
    resumed = find_resume(config) if config.eval_only else None
    path = Path(config.init_from) if config.init_from and resumed is None else None
    if resumed is not None and config.init_from and config.resume == "auto" and _has_head(Path(config.init_from)):
        raise BadInput(f"--eval_only: {resumed} or --init_from {config.init_from}? Give --resume none, or --resume PATH")
    pretrained = path is not None and config.pool == "cls" and not config.eval_only
    encoder = make_encoder(config, say, norm if pretrained else None, weights=str(path or ""))
    model = Classifier(encoder, classes, config.pool, norm)
    if config.eval_only and path is not None:
        load_head(model, path)
        say(f"loaded {path}: head and norm")
    return model


def _has_head(path: Path) -> bool:
    return find_encoder(read_checkpoint(path), path).named("head.weight") is not None


def load_head(model: Classifier, path: Path) -> None:
    """Norm and head of a fine-tuned checkpoint, ours or official (there the norm is `fc_norm` or, for the class token, `norm`).

    Raises:
        BadInput: not in the checkpoint, of other shapes, or trained with another --pool.
    """
    state = read_checkpoint(path)
    found, flags = find_encoder(state, path), state.get("config")
    name = "fc_norm" if found.named("fc_norm.weight") is not None else "norm"
    said = flags.get("pool") if isinstance(flags, dict) else None
    pool = said or ("mean" if name == "fc_norm" else "cls")
    if found.named("head.weight") is not None and pool != model.pool:
        raise BadInput(f"--init_from {path}: was fine-tuned with --pool {pool}, not {model.pool}")
    for module, key in ((model.fc_norm, name), (model.head, "head")):
        held = {part: found.named(f"{key}.{part}") for part in ("weight", "bias")}
        for part, mine in module.state_dict().items():
            value = held[part]
            if value is None:
                raise BadInput(f"--init_from {path}: has no {key}.{part}; --eval_only needs a fine-tuned checkpoint")
            if value.shape != mine.shape:
                raise BadInput(f"--init_from {path}: {key}.{part} is {list(value.shape)} instead of {list(mine.shape)}")
        module.load_state_dict(held)


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config = parse_task(FinetuneConfig, PROGRAM, DESCRIPTION, argv)
    train_task(config, lambda run: make_task(config, run))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
