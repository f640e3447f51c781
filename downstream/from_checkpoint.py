"""What a downstream run takes from the checkpoint that it starts from: model, method, input size, so that no flag need say them.

Width, depth, patch and method are read off the tensors; the input size off the flags that a checkpoint holds or, where it holds
none (official layouts), off its positions or tables of relative biases, if they are of a square grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from common.models.names import patch_grid
from common.training.checkpoint import find_resume, read_checkpoint
from common.training.config import OutputConfig
from common.training.errors import BadInput
from downstream.vit import MODELS, Method
from downstream.weights import TITLES, EncoderWeights, Sizes, find_encoder, require_method

TAKEN = ("model", "method", "input_size", "layer_scale")
"""Flags whose value is the checkpoint's where the command line and its file do not say one."""


@dataclass(frozen=True)
class Taken:
    """Values of flags that nobody gave, and the checkpoint they are from; without one there are no values."""

    values: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def line(self, model: str, input_size: tuple[int, int]) -> str:
        """What is said of it, empty if nothing was taken.

        Args:
            model: of the run, a key of MODELS.
            input_size: of the run, (height, width) in pixels.
        """
        if not self.values:
            return ""
        patch = sizes_of(model).patch_size
        height, width = patch_grid(input_size, patch)
        said = " ".join(f"--{name} {value}" for name, value in self.values.items())
        return f"from checkpoint {self.path}: {said} (patch {patch}, grid {height}x{width} of the images here)"


def take(config_class: Any, values: Mapping[str, Any], pending: bool = False) -> Taken:
    """What the checkpoint says of TAKEN. The first that applies, for each flag:

    1. The command line or its file gives it: that, and what cannot be is refused.
    2. A run of a task is resumed: what it began with.
    3. --init_from: what that checkpoint is of. The input size is left to the task, which may have one of its own.
    4. Nothing: the flag's default.

    Args:
        config_class: the task's configuration, with `input_size_from`.
        values: that were given, by name.
        pending: --init_from is still to be written by another run; where it is not there, nothing is taken of it.

    Raises:
        BadInput: a checkpoint that cannot be read or holds no encoder of MODELS, or a flag that contradicts it.
    """
    given = {name: value for name, value in values.items() if not (name == "method" and value == "auto")}
    wanted = [name for name in TAKEN if name not in given]
    resumed = find_resume(OutputConfig(**_of(given, ("resume", "output_dir"))))
    if resumed is not None:
        held = _flags_of_run(resumed, config_class) if wanted else {}
        if held or not given.get("init_from"):
            return Taken({name: held[name] for name in wanted if held.get(name) is not None}, resumed)
    if not given.get("init_from") or (pending and not Path(given["init_from"]).exists()):
        return Taken()
    path = Path(given["init_from"])
    if not path.exists():
        raise BadInput(f"--init_from {path}: no such file")
    return Taken(_of(_said(find_encoder(read_checkpoint(path), path), config_class, given), wanted), path)


def sizes_of(model: str) -> Sizes:
    """Of a key of MODELS."""
    return Sizes(**_of(MODELS[model].keywords, [part.name for part in fields(Sizes)]))


def _of(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _flags_of_run(path: Path, config_class: Any) -> dict[str, Any]:
    """Flags of the run of a task that wrote a checkpoint; empty for any other checkpoint, which is refused later."""
    state = read_checkpoint(path)
    held = state.get("config")
    if "scores" not in state or not isinstance(held, dict) or held.get("model") not in MODELS:
        return {}
    own = {flag.name for flag in fields(config_class)}
    return held if held.keys() <= own | config_class.former_flags.keys() else {}  # else of another task


def _said(weights: EncoderWeights, config_class: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of each flag in TAKEN, as far as it does."""
    method = _method(weights, given.get("method"))
    said: dict[str, Any] = {"model": _model(weights, method, given.get("model")), "method": method}
    size = weights.image_size
    chosen = config_class.input_size_from(size, weights.patch_size) if size is not None else None
    if chosen is not None:
        said["input_size"] = f"{chosen[0]}" if chosen[0] == chosen[1] else f"{chosen[0]}x{chosen[1]}"
    if method != "mae" and "blocks.0.gamma_1" not in weights.tensors:
        said["layer_scale"] = 0.0
    return said


def _method(weights: EncoderWeights, asked: Method | None) -> Method:
    if asked is not None:
        require_method(weights, asked)
        return asked
    if len(weights.methods) > 1:
        raise BadInput(
            f"--init_from {weights.path}: made by {' or '.join(weights.methods)}, which it does not say; give --method"
        )
    return weights.methods[0]


def _model(weights: EncoderWeights, method: Method, asked: str | None) -> str:
    """The name in MODELS of the checkpoint's encoder.

    Raises:
        BadInput: it has none, or is not of the model asked for.
    """
    names = [name for name in MODELS if weights.sizes.are_of(sizes_of(name))]
    holds = f"checkpoint {weights.path}: holds a {TITLES[method]} encoder {weights.sizes}"
    if asked is None:
        if not names:
            raise BadInput(f"{holds}, which no model here is: {', '.join(MODELS)}")
        return names[0]
    if asked in MODELS and asked not in names:
        mine = sizes_of(asked).as_told_by(weights.sizes)
        hint = f" (give --model {names[0]}, or leave it out of flags and file)" if names else ""
        raise BadInput(f"{holds}; the model {asked} is {mine}{hint}")
    return asked
