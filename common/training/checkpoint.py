"""Checkpoints: written atomically, read without running code from them, resumed by a written order.

Layout (the keys `model`, `optimizer`, `epoch`, `scaler` are those of the official MAE checkpoints, so that weights
move both ways):

    model, optimizer, scaler   state dicts
    epoch                      last finished epoch, -1 before the first
    update                     updates done in the epoch after it; 0 at an epoch's end
    meters                     sums of the unfinished epoch's log line
    mask                       state of the mask
    ema                        weights of the moving average, or None
    config, mask_config        plain dicts
    effective_batch, samples   images an update, and samples an epoch
    loader                     what decodes and crops: pil (also where it is not said), or torchvision
    facts                      what the targets depend on besides (which tokenizer)
    format                     number of this layout; a state without it is of format 1

A change that an older state does not go along with gets the next number and a step in MIGRATIONS. A new flag needs neither: in
an older state it counts as its default.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import states
from common.mask_config import MaskConfig
from common.training.config import Loader, OutputConfig, RunConfig, TrainConfig
from common.training.errors import BadInput
from common.training.files import NoRoom, require_room, written_whole
from common.training.safe_load import safe_load

LAST = "checkpoint-last.pth"
PREVIOUS = "checkpoint-previous.pth"
"""The last one before LAST, for the day that LAST cannot be read."""

FORMAT = 2
"""Of what is written now."""

MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: lambda state: state}
"""Format -> how its state becomes one of the next format. From 1 to 2 nothing was renamed or removed."""

FREE_TO_CHANGE = frozenset(
    (
        *("data_path", "download", "num_workers", "pin_mem", "on_bad_image", "batch_size", "accum_iter", "device", "compile"),
        *("output_dir", "log_dir", "resume", "init_from", "save_freq", "save_steps", "picture_epochs", "picture_images"),
        *("dist_timeout", "on_full_disk", "preset", "preset_chose"),  # what the preset chose is compared flag by flag
        "tokenizer",  # its content is checked instead, as one of the method's facts
        "loader",  # compared with what the run really used
    )
)
"""Flags that a resumed run may change: what they say does not alter the weights of the run, or is checked apart."""


def save_atomically(state: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Writes `path` whole or not at all: a temporary file beside it, flushed to disk, then renamed.

    Args:
        previous: where the checkpoint that is `path` until then is kept. It goes first where there is no room for both.

    Raises:
        NoRoom: found before or while it is written.
    """
    try:
        _save(state, path, previous)
    except NoRoom:
        if previous is None or not previous.exists():
            raise
        previous.unlink()
        _save(state, path, None)


def _save(state: dict[str, Any], path: Path, previous: Path | None) -> None:
    require_room(path, count_bytes(state))
    with written_whole(path, previous) as file:
        torch.save(state, file)


def count_bytes(state: Any) -> int:
    """Bytes of all tensors in nested dicts and lists; memory that several of them share counts once."""
    storages: dict[int, int] = {}
    pending = [state]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, (list, tuple)):
            pending += value
    return sum(storages.values())


def check_finite(weights: Mapping[str, Any], path: Path) -> None:
    """Raises BadInput, naming them, for weights of a checkpoint that are NaN or infinite."""
    wrong = [key for key, value in weights.items() if isinstance(value, Tensor) and not bool(value.isfinite().all())]
    if wrong:
        raise BadInput(f"checkpoint {path}: holds weights that are NaN or infinite: {_some(wrong)}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours or of the official code, on the CPU. No code in it is run.

    Raises:
        BadInput: not there, not readable, or not a checkpoint.
    """
    try:
        state = safe_load(path)
    except FileNotFoundError:
        raise BadInput(f"checkpoint {path}: no such file") from None
    except OSError as error:
        raise BadInput(f"checkpoint {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise BadInput(f"checkpoint {path}: {error}") from None
    if not isinstance(state, dict):
        raise BadInput(f"checkpoint {path}: holds a {type(state).__name__}, not a dict with the key 'model'")
    return state


def find_resume(config: OutputConfig) -> Path | None:
    """The checkpoint that a run continues. The first that applies:

    1. --resume PATH: that file; it must exist.
    2. --resume auto: <output_dir>/checkpoint-last.pth, if it exists; if that is damaged, the newest other one that is not:
       checkpoint-previous.pth, then the numbered ones.
    3. --resume none, or auto without such a file: a new run, from --init_from's weights if given, else random ones.

    Damage that is looked for here is that of a file cut short or overwritten (:func:`is_whole`).
    """
    if config.resume == "none":
        return None
    if config.resume != "auto":
        return Path(config.resume)
    candidates = resumable(config)
    return next((path for path in candidates if is_whole(path)), candidates[0]) if candidates else None


def resumable(config: OutputConfig) -> list[Path]:
    """What --resume auto can continue, in the order of preference; nothing where there is no last checkpoint."""
    folder = Path(config.output_dir)
    names = {path: re.fullmatch(r"checkpoint-(\d+)\.pth", path.name) for path in folder.glob("checkpoint-*.pth")}
    numbered = {int(name[1]): path for path, name in names.items() if name}
    others = [folder / PREVIOUS, *(numbered[epoch] for epoch in sorted(numbered, reverse=True))]
    return [path for path in (folder / LAST, *others) if path.exists()] if (folder / LAST).exists() else []


def is_whole(path: Path, every_byte: bool = False) -> bool:
    """Whether a file of torch.save has its end, where its table of contents is, or with `every_byte` all of its check sums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not every_byte or archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, ValueError):
        return False


def upgraded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """A state to resume in the present format.

    Raises:
        BadInput: of a later format than this version knows.
    """
    number = state.get("format", 1)
    if number > FORMAT:
        raise BadInput(f"checkpoint {path}: is of format {number}, this version reads up to {FORMAT}: use the one that wrote it")
    for step in range(number, FORMAT):
        state = MIGRATIONS[step](state)
    return state


def check_same_run(
    state: dict[str, Any], path: Path, config: TrainConfig, mask_config: MaskConfig, effective_batch: int, samples: int
) -> None:
    """Raises BadInput, naming what differs, unless the checkpoint belongs to a pre-training run with these settings."""
    if "config" not in state or "mask" not in state:
        raise BadInput(f"checkpoint {path}: has no training state to resume; --init_from takes its weights")
    check_same_settings(state, path, config, effective_batch, samples, mask_config)


def check_same_settings(
    state: dict[str, Any],
    path: Path,
    config: RunConfig,
    effective_batch: int,
    samples: int,
    mask_config: MaskConfig | None = None,
    free: frozenset[str] = FREE_TO_CHANGE,
) -> None:
    """Raises BadInput, naming what differs, unless the checkpoint belongs to a run with these settings.

    Args:
        effective_batch: images an update.
        samples: images an epoch.
        free: flags that may differ.
    """
    differs = differences(state["config"], config, free)
    if mask_config is not None:
        saved = state["mask_config"]
        differs += states.differences(MaskConfig.completed(saved), asdict(mask_config.continuing(saved)), prefix="--")
    began, asked = loader_of(state), getattr(config, "loader", "auto")
    if asked not in ("auto", began):
        differs.append(f"--loader {began} -> {asked}")
    for name, value in (("effective_batch", effective_batch), ("samples", samples)):
        if state[name] != value:
            differs.append(f"{name} {state[name]} -> {value}")
    if differs:
        raise BadInput(f"checkpoint {path}: made with other settings: {'; '.join(differs)} (--resume none starts anew)")


def loader_of(state: dict[str, Any]) -> Loader:
    """What decoded and cropped the images of a checkpoint's run; PIL did before there was a choice."""
    loader: Loader = state.get("loader", "pil")
    return loader


def differences(saved: dict[str, Any], config: Any, free: frozenset[str] = frozenset()) -> list[str]:
    """A line `--flag saved -> now` for each flag that differs, those in `free` left out.

    A flag that is newer than the checkpoint counts as its default, with which a run does what it did before there was the flag.
    One that the command had without using it (`former_flags`) does not count.

    Args:
        saved: flags of the run that wrote the checkpoint.
        config: a dataclass of flags.
    """
    defaults = {flag.name: flag.default for flag in fields(config)}
    unused = frozenset(getattr(config, "former_flags", {}))
    return states.differences({**defaults, **saved}, asdict(config), free=free | unused, prefix="--")


def load_weights(model: nn.Module, path: Path, may_miss: tuple[str, ...] = ()) -> str:
    """Loads the weights of a checkpoint, strictly.

    Args:
        may_miss: prefixes of keys that an encoder-only checkpoint lacks; they are missing all or not at all.

    Returns:
        One line that says what was loaded, and what was missing and keeps its random start.

    Raises:
        BadInput: keys missing beyond those, keys left over, shapes that differ, or values that are not finite; names them.
    """
    state = read_checkpoint(path)
    weights = state.get("model", state)
    mine = model.state_dict()
    missing = [key for key in mine if key not in weights]
    left_over = [key for key in weights if key not in mine]
    shapes = [
        f"{key} {list(weights[key].shape)} instead of {list(mine[key].shape)}"
        for key in mine
        if key in weights and weights[key].shape != mine[key].shape
    ]
    optional = [key for key in mine if key.startswith(may_miss)] if may_miss else []
    if left_over or shapes or (missing and missing != optional):
        problems = {"missing": missing, "not of this model": left_over, "of another shape": shapes}
        listed = "; ".join(f"{kind}: {_some(keys)}" for kind, keys in problems.items() if keys)
        raise BadInput(f"checkpoint {path}: does not fit the model ({listed})")
    check_finite(weights, path)
    model.load_state_dict(weights, strict=not missing)
    if missing:
        return f"loaded {path}: encoder only; {len(missing)} decoder tensors are missing and start at random ({_some(missing)})"
    return f"loaded {path}: all {len(mine)} tensors"


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
