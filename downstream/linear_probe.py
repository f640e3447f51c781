"""Linear probes and k-NN on frozen features: `python -m downstream.linear_probe --data_path IMAGENET --init_from CHECKPOINT`.

Defaults are MAE's protocol (He et al., CVPR 2022, Table 10; facebookresearch/mae, FINETUNE.md): LARS, effective batch
16384, 90 epochs, random resized crops, a batch norm without scale and shift before the linear layer. Any number of
layers is probed at once, each with a head of its own, from one pass of the encoder.

The parts are in probing/: flags, heads, features, neighbours, evaluation, optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import nn

from common.training.checkpoint import read_checkpoint
from common.training.data import training_transform
from common.training.errors import BadInput, run_cli
from common.training.task import Run
from downstream.classification.labelled import WithLabel, count_labelled, draw_subset, open_labelled, same_classes
from downstream.probing.config import ProbeConfig
from downstream.probing.evaluation import ProbeEvaluation
from downstream.probing.features import FeatureSource, as_is, extract
from downstream.probing.heads import Probes, probe_loss
from downstream.probing.lars import LARS
from downstream.probing.table import report
from downstream.training import SupervisedTask, make_encoder, parse_task, require_state_of, say_once, train_task
from downstream.vit import MODELS

PROGRAM = "linear_probe"
NAME = "linear probing"
DESCRIPTION = (
    "Train linear classifiers on frozen features of one or many layers, and classify by k nearest neighbours. "
    "Defaults: MAE's protocol, 90 epochs of LARS with an effective batch of 16384."
)


def build(config: ProbeConfig, run: Run) -> SupervisedTask:
    """The task as the training loop takes it: data, frozen features and heads.

    Raises:
        BadInput: data, checkpoint or flags that cannot be used.
    """
    train, val = open_labelled(config, train=True), open_labelled(config, train=False)
    same_classes(train, val, config.data_path)
    say = say_once(run.processes)
    say(f"training: {train.summary}")
    say(f"validation: {val.summary}")
    source = draw_subset(train, config.subset, config.seed)
    check_request(config, run.resumed_from, len(source))
    model = make_probes(config, len(train.classes), run)
    cached = extract(model, source, config, run) if config.cache or config.neighbours else None
    neighbours = cached if config.neighbours else None
    trained = not config.eval_only or run.resumed_from is not None
    validation = extract(model, val, config, run)
    features = FeatureSource(*cached, source.name) if config.cache and cached is not None else None
    return SupervisedTask(
        run=run,
        config=config,
        kind=NAME,
        model=model,
        source=features or source,
        transform=as_is if features else WithLabel(training_transform(config)),
        objective=probe_loss,
        evaluation=ProbeEvaluation(config, validation, neighbours, len(train.classes), run.processes, trained),
        metric="top1",
        optimizer=lambda lr: LARS(model.heads.parameters(), lr=lr, weight_decay=config.weight_decay),
        facts={"classes": len(train.classes), "validation_images": len(val)},
        report=report,
    )


def check_request(config: ProbeConfig, resumed: Path | None, images: int) -> None:
    """Raises BadInput for more neighbours than `images`, for nothing to evaluate, and for a checkpoint of another task."""
    if config.neighbours and max(config.neighbours) > images:
        raise BadInput(f"--knn {config.knn}: more neighbours than the {images} training images")
    if config.eval_only and resumed is None and not config.neighbours:
        raise BadInput("--eval_only: no trained heads (--resume) and no neighbours (--knn), nothing to evaluate")
    if resumed is not None:
        require_state_of(NAME, read_checkpoint(resumed), resumed)


def make_probes(config: ProbeConfig, classes: int, run: Run) -> Probes:
    """The encoder that the flags name, with new heads, on the device of the run.

    A run goes on with the encoder it began with, whatever --init_from says now: features are made before it is resumed.
    """
    last = config.layers[-1] == config.depth - 1
    norm = nn.LayerNorm(MODELS[config.model].keywords["width"], eps=1e-6) if config.norm and last else None
    weights = str(run.resumed_from or config.init_from)
    encoder = make_encoder(config, say_once(run.processes), norm if weights else None, weights=weights)
    return Probes(encoder, config.layers, config.pool, norm, classes).to(run.device)


count_images = count_labelled


def main(argv: Sequence[str]) -> None:
    """Parses the flags, extracts features, and trains the heads."""
    config, taken = parse_task(ProbeConfig, PROGRAM, DESCRIPTION, argv, count=count_images)
    train_task(config, partial(build, config), taken)


if __name__ == "__main__":
    run_cli(PROGRAM, main)
