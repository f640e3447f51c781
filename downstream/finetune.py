"""Fine-tuning for classification: `python -m downstream.finetune --data_path IMAGENET --init_from CHECKPOINT`.

Defaults are this project's recipe for the paper's Tables 1-4 (MAE's fine-tuning, He et al., CVPR 2022, Table 9, with batch
1024 and layer decay .65): the same for all three methods.

The parts are in classification/: flags, model, loss, evaluation, and the labelled images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from common.training.errors import run_cli
from common.training.task import Run
from downstream.classification.config import FinetuneConfig
from downstream.classification.evaluation import ClassificationEvaluation
from downstream.classification.labelled import augmentation, count_labelled, draw_subset, open_labelled, same_classes
from downstream.classification.loss import MixedLoss
from downstream.classification.model import make_classifier
from downstream.training import SupervisedTask, layerwise_adamw, parse_task, say_once, train_task

PROGRAM = "finetune"
DESCRIPTION = (
    "Fine-tune a pre-trained encoder (MAE, BEiT or SimMIM, ours or official) for classification. Defaults: 100 epochs "
    "on ImageNet-1K with an effective batch of 1024 (batch_size x accum_iter x processes)."
)


def build(config: FinetuneConfig, run: Run) -> SupervisedTask:
    """Data, model and loss of fine-tuning."""
    processes = run.processes
    train, val = open_labelled(config, train=True), open_labelled(config, train=False)
    same_classes(train, val, config.data_path)
    say = say_once(processes)
    say(f"training: {train.summary}")
    say(f"validation: {val.summary}")
    model = make_classifier(config, len(train.classes), say)
    return SupervisedTask(
        run=run,
        config=config,
        kind="fine-tuning",
        model=model,
        source=draw_subset(train, config.subset, config.seed),
        transform=augmentation(config),
        objective=MixedLoss(config, len(train.classes)),
        evaluation=ClassificationEvaluation(config, val, processes),
        metric="top1",
        optimizer=partial(layerwise_adamw, model, config),
        ema_decay=config.model_ema,
        facts={"classes": len(train.classes), "validation_images": len(val)},
    )


count_images = count_labelled


def main(argv: Sequence[str]) -> None:
    """Parses the flags and trains."""
    config, taken = parse_task(FinetuneConfig, PROGRAM, DESCRIPTION, argv, count=count_images)
    train_task(config, partial(build, config), taken)


if __name__ == "__main__":
    run_cli(PROGRAM, main)
