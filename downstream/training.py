"""What fine-tuning, segmentation and detection share: flags, layer-wise learning rates, evaluation, result.json.

The loop itself is common/training/loop.py, the same as in pre-training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.models.names import patch_size_of
from common.training.checkpoint import FREE_TO_CHANGE, check_finite, check_same_settings, differences, find_resume, upgraded
from common.training.command_line import Count, parse_flags
from common.training.config import AdamWConfig, RunConfig, option, with_default
from common.training.data import Batch, RankBatches, Refusal, Samples, Transform, collate, make_loader, some_of
from common.training.distributed import Processes
from common.training.errors import BadInput
from common.training.files import written_whole
from common.training.loop import Loop
from common.training.optim import EncoderEMA, adamw
from common.training.task import Collate, Outcome, Run, Task, open_run
from downstream.from_checkpoint import Taken, take
from downstream.pictures import draw_curves
from downstream.vit import MODELS, BackboneViT, Method, build_encoder, layer_of
from downstream.weights import load_encoder


@dataclass(frozen=True)
class TaskConfig(RunConfig):
    """Flags of every downstream task.

    Raises:
        BadInput: a value outside its range, naming the flag.
    """

    evaluation_flags: ClassVar[tuple[str, ...]] = ()
    """Flags of a task that change how a model is judged and not how it is trained: a resumed run may change them."""

    model: str = option(
        "vit_small_patch16", f"size of the encoder, without --init_from, which says it: {', '.join(MODELS)}", group="model"
    )
    method: Literal["auto", "mae", "beit", "simmim"] = option(
        "auto", "whose encoder; auto: read from --init_from, mae without one", group="model"
    )
    init_from: str = option("", "pre-trained checkpoint, ours or official; empty: random weights", group="model")
    layer_scale: float | None = option(
        None,
        "BEiT, SimMIM: first value of the factors on branches, without --init_from (default: 0.1; official BEiT-L: 1e-5); "
        "0: there are none, nor in --init_from",
        group="model",
    )
    eval_freq: int = option(1, "evaluate every so many epochs, and after the last", group="run")
    eval_only: bool = option(
        False,
        "evaluate and leave: the checkpoint that --resume finds, else --init_from. Flags of optimisation and run may then differ",
        group="run",
    )
    pictures: int = option(4, "how many validation images are drawn with predictions; 0: none", group="run")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "eval_freq")
        self._at_least(0, "pictures")
        if self.layer_scale is not None:
            self._at_least(0, "layer_scale")
        self._require("model", self.model in MODELS, f"must be one of {', '.join(MODELS)}")
        patch = patch_size_of(self.model)
        divisible = not any(size % patch for size in self.image_size)
        self._require("input_size", divisible, f"must be divisible by the patch size {patch} of {self.model}")

    @classmethod
    def input_size_from(cls, pretraining: tuple[int, int], patch: int) -> tuple[int, int] | None:
        """Input size, where none is given, of a run that starts from a checkpoint; None: the default of --input_size.

        Args:
            pretraining: (height, width) in pixels of the run that wrote it.
            patch: its patch size in pixels.
        """
        return pretraining

    @property
    def encoder_options(self) -> dict[str, Any]:
        """Arguments of the encoder besides its size and method."""
        return {} if self.layer_scale is None else {"layer_scale": self.layer_scale}


IMAGENET_SIDE = 224


def is_small(size: tuple[int, int]) -> bool:
    """Whether images of (height, width) have fewer pixels than those that ImageNet's recipes pre-train on."""
    return size[0] * size[1] < IMAGENET_SIDE**2


@dataclass(frozen=True)
class TunedEncoderConfig(AdamWConfig):
    """Flags of a task that trains the encoder, and not only a head on it."""

    drop_path: float = option(0.1, "rate at the last block, growing linearly from 0", group="model")
    checkpointing: bool = option(False, "compute each block again in the backward pass: less memory, more time", group="model")
    layer_decay: float = option(
        0.65, "each block's learning rate is this times that of the next one; 1: all alike", group="optimisation"
    )
    beta2: float = with_default(AdamWConfig, "beta2", 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("drop_path", 0 <= self.drop_path < 1, "must be in [0, 1)")
        self._require("layer_decay", 0 < self.layer_decay <= 1, "must be in (0, 1]")

    @property
    def encoder_options(self) -> dict[str, Any]:
        """Arguments of the encoder besides its size and method."""
        others: dict[str, Any] = super().encoder_options  # type: ignore[misc]
        return {**others, "drop_path": self.drop_path, "checkpointing": self.checkpointing}


AnyTask = TypeVar("AnyTask", bound=TaskConfig)


@dataclass
class Scores:
    """Outcome of an evaluation.

    Attributes:
        numbers: metric -> value; percentages are 0 to 100.
        pictures: name -> uint8 [height, width, 3].
    """

    numbers: dict[str, float]
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


FREE_IN_A_TASK = frozenset(("eval_freq", "eval_only", "pictures", "checkpointing"))
"""Flags besides FREE_TO_CHANGE that a resumed run may change."""

FREE_IN_EVALUATION = frozenset(("init_from", "drop_path", "checkpointing", "layer_decay"))
"""Flags of the model that do not matter to the scores of given weights; nor do all that are not of the model, but two."""


def check_same_task(state: dict[str, Any], path: Path, config: TaskConfig, effective_batch: int, samples: int) -> None:
    """Raises BadInput, naming what differs, unless the checkpoint belongs to a run of a task with these settings.

    Under --eval_only, unless it holds the same model: how it was trained, and on how many ranks, may differ.
    """
    if not config.eval_only:
        free = FREE_TO_CHANGE | FREE_IN_A_TASK | set(config.evaluation_flags)
        check_same_settings(state, path, config, effective_batch, samples, free=free)
        return
    differs = differences(state["config"], config, _free_in_evaluation(config))
    if differs:
        needs = "evaluation needs the same model"
        raise BadInput(f"checkpoint {path}: made with other settings: {'; '.join(differs)} ({needs})")


@dataclass(eq=False)
class SupervisedTask(Task):
    """A task with labels, and evaluation at the ends of epochs.

    Attributes:
        run: what surrounds it.
        config: flags.
        kind: for titles and result.json.
        model: with the encoder as `encoder`.
        source: training samples.
        transform: sample -> views.
        objective: (model, batch) -> the mean over the batch; or several by names that begin with `loss_`, which are summed.
        evaluation: model in evaluation mode -> scores, the same on every rank.
        metric: the number that says which epoch was best; higher is better.
        optimizer: learning rate -> the optimiser.
        collate: samples -> batch.
        facts: see :class:`common.training.task.Task`.
        ema_decay: of the moving average of the weights that is evaluated; 0: the weights themselves are.
        report: the last scores -> lines to say of them besides, and entries of result.json.
    """

    run: Run
    config: TaskConfig
    kind: str
    model: nn.Module
    source: Any
    transform: Transform
    objective: Callable[[nn.Module, Batch], Tensor | dict[str, Tensor]]
    evaluation: Callable[[nn.Module], Scores]
    metric: str
    optimizer: Callable[[float], torch.optim.Optimizer]
    collate: Collate = collate
    facts: dict[str, Any] = field(default_factory=dict)
    ema_decay: float = 0.0
    report: Callable[[dict[str, float]], tuple[list[str], dict[str, Any]]] = lambda numbers: ([], {})

    def __post_init__(self) -> None:
        self.model.to(self.run.device)
        self.ema = EncoderEMA(self.model, self.ema_decay) if self.ema_decay else None
        self.scores: dict[str, float] = {}
        self.best: dict[str, float] = {}

    # --- start ---

    def make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        return self.optimizer(lr)

    def check_same_run(self, state: dict[str, Any], path: Path, effective_batch: int, samples: int) -> None:
        require_state_of(self.kind, state, path)
        check_same_task(state, path, self.config, effective_batch, samples)

    def state_dict(self) -> dict[str, Any]:
        return {"task": self.kind, "scores": self.scores, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.best = dict(state["scores"]), dict(state["best"])

    def record(self) -> dict[str, Any]:
        return {"task": self.kind}

    def title(self) -> str:
        method, start = self.model.encoder.method, self.config.init_from or "random weights"  # type: ignore[union-attr]
        return f"{self.kind}: {self.config.model} ({method}) from {start}"

    # --- updates and ends ---

    def loss(self, model: nn.Module, batch: Batch, prepared: None) -> Tensor | dict[str, Tensor]:
        return self.objective(model, batch)

    def after_epoch(self, epoch: int, line: dict[str, Any], sums: dict[str, Any], last: bool) -> str:
        if (epoch + 1) % self.config.eval_freq and not last:
            return ""
        scores = self.evaluate()
        line.update(scores.numbers)
        self.scores = {"epoch": epoch, **scores.numbers}
        if self.scores[self.metric] > self.best.get(self.metric, float("-inf")):
            self.best = self.scores
        self._draw(scores)
        return shown(scores.numbers)

    def evaluate(self) -> Scores:
        """Scores of the model, or of its moving average where there is one."""
        judged = self.ema.model if self.ema is not None else self.model
        judged.eval()
        self.run.processes.share(judged.buffers())  # each rank has its own statistics of batch norms
        with torch.no_grad(), self.run.autocast():
            scores = self.evaluation(judged)
        self.model.train()
        return scores

    def _draw(self, scores: Scores) -> None:
        for name, picture in scores.pictures.items():
            self.run.log.image(name, picture)
            if self.run.processes.is_main:
                save_picture(self.run.output / f"{name}.png", picture)

    def finish(self) -> Outcome:
        if self.config.pictures and self.run.processes.is_main:
            self._draw(Scores({}, draw_curves(self.run.log.lines(), self.metric)))
        numbers = {key: value for key, value in self.scores.items() if key != "epoch"}
        lines, entries = self.report(numbers)
        return Outcome(self.scores, {"best": self.best, **entries}, "\n".join([f"{self.kind}: {shown(numbers)}", *lines]))

    # --- evaluation alone ---

    def evaluate_only(self) -> None:
        """Evaluates the checkpoint that --resume finds, or the weights as they are; says the numbers, and writes pictures."""
        if self.run.resumed_from is not None:
            self._load_weights(self.run.resumed_from)
        scores = self.evaluate()
        for line in (f"{self.kind}: {shown(scores.numbers)}", *self.report(scores.numbers)[0]):
            self.run.log.say(line)
        if self.run.processes.is_main and scores.pictures:
            try:
                self.run.output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise BadInput(f"--output_dir {self.config.output_dir}: {error.strerror}") from None
            self._draw(scores)

    def _load_weights(self, path: Path) -> None:
        state = upgraded(self.read_checkpoint(path), path)
        self.check_same_run(state, path, 0, 0)  # batch and samples are not looked at
        kept = {"validation_images"}  # another validation set may be evaluated
        if any(state["facts"].get(key) != value for key, value in self.facts.items() if key not in kept):
            raise BadInput(f"checkpoint {path}: made with {state['facts']}, this evaluation has {self.facts}")
        check_finite(state["model"], path)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.run.log.say(f"evaluating {path}, epoch {state['epoch'] + 1}, update {state['update']}")


def _free_in_evaluation(config: TaskConfig) -> frozenset[str]:
    """Flags that may differ from those of the run whose weights are evaluated."""
    others = {flag.name for flag in fields(config) if flag.metadata["group"] != "model"}
    return frozenset(others - {"input_size", "model_ema"}) | FREE_IN_EVALUATION


def parse_task(
    config_class: type[AnyTask],
    program: str,
    description: str,
    argv: Sequence[str],
    *,
    count: Count,
    ranks: int | None = None,
    pending: bool = False,
) -> tuple[AnyTask, str]:
    """Command line -> checked configuration, in it what the checkpoint says where no flag does; and a line that says what.

    Args:
        count: training images of a configuration, which --preset asks for.
        ranks: processes of the run; default: as the environment says.
        pending: --init_from may still have to be written by another run; until then defaults stand in its place.

    Raises:
        BadInput: see `parse_flags`, and :func:`downstream.from_checkpoint.take`.
    """
    found = [Taken()]

    def complete(given: dict[str, Any]) -> dict[str, Any]:
        found[0] = take(config_class, given, pending)
        return {**given, **found[0].values}

    config = parse_flags(config_class, program, description, argv, count=count, ranks=ranks, complete=complete)
    if config.eval_only and not pending and not config.init_from and find_resume(config) is None:
        raise BadInput("--eval_only: no weights to evaluate; give --resume PATH or --init_from PATH")
    if config.method == "auto" and not pending:
        config = replace(config, method="mae")
    return config, found[0].line(config.model, config.image_size)


def train_task(config: TaskConfig, build: Callable[[Run], SupervisedTask], taken: str = "") -> None:
    """Trains, or evaluates under --eval_only, from the command line's configuration to result.json.

    Args:
        taken: a line that says what of the configuration is the checkpoint's; empty: none.
        build: makes the task; the weights it starts from are drawn from --seed or loaded by it.

    Raises:
        BadInput: nothing usable in the data, the flags or the checkpoint; another run in the output folder.
        NonFiniteLoss: the loss or gradient became NaN or infinite.
        Interrupted: a rank got a signal to stop, and the state is saved.
    """
    with open_run(config, writes=not config.eval_only) as run:
        if taken:
            run.log.say(taken)
        torch.manual_seed(config.seed)  # the same weights on every rank
        task = build(run)
        samples = Samples(task.source, task.transform, config.seed, config.repeat)
        batches = RankBatches(len(samples), config, run.processes)
        if config.eval_only:
            task.evaluate_only()
        else:
            Loop(run, task, samples, batches).train()


def require_state_of(task: str, state: dict[str, Any], path: Path) -> None:
    """Raises BadInput unless a checkpoint is of a run of the task that bears this name."""
    if "scores" not in state or state.get("task") != task:
        raise BadInput(f"checkpoint {path}: has no state of {task} to resume; --init_from takes its encoder")


def make_encoder(
    config: TaskConfig,
    say: Callable[[str], None],
    norm: nn.LayerNorm | None = None,
    weights: str | None = None,
    **more: Any,
) -> BackboneViT:
    """The encoder that the flags name, with the weights of --init_from.

    Args:
        say: told in one line what was loaded.
        norm: takes the last norm of pre-training, if given.
        weights: checkpoint in the place of --init_from; empty: none.
        more: see :class:`BackboneViT`.
    """
    method: Method = "mae" if config.method == "auto" else config.method
    try:
        encoder = build_encoder(config.model, method, config.image_size, **config.encoder_options, **more)
    except ValueError as error:
        raise BadInput(f"--model {config.model}: {error}") from None
    path = config.init_from if weights is None else weights
    if path:
        say(load_encoder(encoder, Path(path), norm=norm))
    return encoder


def say_once(processes: Processes) -> Callable[[str], None]:
    """Prints on the main rank only."""
    return lambda line: print(line, flush=True) if processes.is_main else None


def layerwise_adamw(model: nn.Module, config: TunedEncoderConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW with the groups of :func:`layerwise_groups`."""
    groups = layerwise_groups(model, config.layer_decay, config.weight_decay)
    return adamw(groups, lr, (config.beta1, config.beta2))


def layerwise_groups(model: nn.Module, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for layer-wise learning rates (Clark et al., ICLR 2020; as in BEiT's and MAE's fine-tuning).

    Group of layer l of an encoder of L blocks has `lr_scale` = layer_decay^(L + 1 - l); the embeddings are layer 0,
    block i is layer i + 1, all that follows L + 1. Biases, norms and the encoder's `no_weight_decay` have no weight decay.
    """
    encoder: BackboneViT = model.encoder  # type: ignore[assignment]
    depth, groups = encoder.depth, dict[tuple[int, bool], dict[str, Any]]()
    for name, value in model.named_parameters():
        if not value.requires_grad:
            continue
        layer = layer_of(name, depth) if name.startswith("encoder.") else depth + 1
        decays = value.ndim > 1 and not name.endswith(".bias") and name.removeprefix("encoder.") not in encoder.no_weight_decay
        group = groups.setdefault(
            (layer, decays),
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr_scale": layer_decay ** (depth + 1 - layer)},
        )
        group["params"].append(value)
    return [groups[key] for key in sorted(groups)]


def evaluation_batches(
    source: Any, transform: Transform, config: RunConfig, processes: Processes, collate_fn: Collate = collate
) -> Iterator[Batch]:
    """Every sample of `source` exactly once over all ranks, in batches on this rank's device.

    Rank r gets samples r, r + ranks, ...; shares may differ by one, and no sample is repeated to even them out. All
    ranks must take all of their batches: at the end they tell each other what they could not read.

    Raises:
        BadInput: unreadable images, on every rank and at the end; names all of them, so that they can be seen to at once.
    """
    keys = [(0, index) for index in range(processes.rank, len(source), processes.world)]
    batches = [keys[first : first + config.batch_size] for first in range(0, len(keys), config.batch_size)]
    bad: list[str] = []
    for batch in make_loader(Samples(source, transform, config.seed), batches, config, processes, collate_fn):
        bad += batch.bad
        if not bad:
            yield batch.to(processes.device)
    everywhere = [line for rank in processes.gather(bad) for line in rank]
    refused = [line for line in everywhere if isinstance(line, Refusal)]
    if refused:
        raise BadInput(refused[0])
    if everywhere:
        raise BadInput(f"unreadable image {some_of(everywhere, '; ')} (an evaluation needs all)")


def save_picture(path: Path, picture: np.ndarray) -> None:
    """A uint8 picture [height, width, 3] as PNG, whole or not at all."""
    with written_whole(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def shown(numbers: dict[str, float]) -> str:
    """Numbers for people; those of one layer among several (top1_layer5) are left to the log and the table at the end."""
    return "  ".join(f"{key} {value:.2f}" for key, value in numbers.items() if "_layer" not in key)
