"""Command line and TOML file -> a checked configuration.

Every flag is a field of the command's configuration (common/training/config.py), and so is every key of a file.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from common.flags import WideHelp, add_flag, add_mask_flags, mask_config_from, mask_options, scalar_type
from common.mask_config import MaskConfig
from common.training.config import FormerFlag, RunConfig, TrainConfig
from common.training.distributed import count_ranks
from common.training.errors import BadInput, Parser
from common.training.mask import make_mask
from common.training.preset import choose_parts, choose_settings, warmup_flag
from common.training.recipes import find_recipe, list_recipes
from common.training.sources import count_source

HEADINGS = ("data", "optimisation", "run", "model")
"""Order of the groups in --help; others follow."""

Config = TypeVar("Config", bound=TrainConfig)
AnyConfig = TypeVar("AnyConfig", bound=RunConfig)
Count = Callable[[Any], int]
Complete = Callable[[dict[str, Any]], dict[str, Any]]


def parse_flags(
    config_class: type[AnyConfig],
    program: str,
    description: str,
    argv: Sequence[str],
    *,
    count: Count = count_source,
    ranks: int | None = None,
    complete: Complete = dict,
) -> AnyConfig:
    """Command line -> checked configuration of a run without masks.

    Precedence, the later wins: defaults, then --preset, then --config, then the flags.

    Args:
        count: number of training images that a configuration names, which --preset asks for.
        ranks: processes of the run; default: as the environment says.
        complete: values that were given, by name -> the same with those that are taken from elsewhere.

    Raises:
        BadInput: an unknown flag or key, an unreadable file, or a value outside its range; under --preset also no data.
    """
    values = complete(read_values(config_class, make_parser(config_class, program, description), argv))
    config = provisional(config_class, values)
    return config if config.preset == "none" else settled(config, values, count, ranks)


def parse_arguments(
    config_class: type[Config],
    program: str,
    description: str,
    argv: Sequence[str],
    *,
    count: Count = count_source,
    ranks: int | None = None,
) -> tuple[Config, MaskConfig]:
    """Command line -> checked configuration.

    Precedence, the later wins: defaults, then --preset, then --recipe, then --config, then the flags.

    Args:
        count, ranks: see :func:`parse_flags`.

    Raises:
        BadInput: an unknown flag or key, an unreadable file, or a value outside its range; under --preset also a mask that does
            not fit the model, or no data.
    """
    parser = make_parser(config_class, program, description)
    add_mask_flags(parser)
    values = read_values(config_class, parser, argv)
    try:
        mask = mask_config_from(values).with_official(config_class.official_mask)
    except ValueError as error:
        raise BadInput(f"--{error}") from None
    of_mask = mask_options(values)
    values = {name: value for name, value in values.items() if name not in of_mask}
    config = provisional(config_class, values)
    if config.preset == "none":
        return config, mask
    height, width = config.grid_size
    parts = choose_parts(mask, height * width, of_mask)
    mask = replace(mask, **parts)
    make_mask(config, mask)  # what model and flags decide, before the images are counted
    return settled(config, values, count, ranks, tuple(parts)), mask


def provisional(config_class: type[AnyConfig], values: dict[str, Any]) -> AnyConfig:
    """The configuration as it was given, with everything checked; under --preset without a warm-up of the paper's length."""
    no_warmup = {} if values.get("preset", "none") == "none" else {warmup_flag(config_class): 0}
    return config_class(**{**no_warmup, **values})


def settled(
    config: AnyConfig, values: dict[str, Any], count: Count, ranks: int | None, chosen_before: tuple[str, ...] = ()
) -> AnyConfig:
    """The configuration with what --preset chooses in the place of what was not given."""
    chosen = choose_settings(config, count(config), count_ranks() if ranks is None else ranks, values)
    return type(config)(**{**chosen, **values, "preset_chose": (*chosen, *chosen_before)})


def make_parser(config_class: type[RunConfig], program: str, description: str) -> argparse.ArgumentParser:
    """--config, and a flag for each field, under the headings of their groups."""
    usage = f"{program} [flags]"
    parser = Parser(prog=program, description=description, allow_abbrev=False, formatter_class=WideHelp, usage=usage)
    parser.add_argument(
        "--config",
        default=argparse.SUPPRESS,
        metavar="RECIPE",
        help="a recipe by its name, from those at the end of this help, or a TOML file of flags",
    )
    headings = dict.fromkeys((*HEADINGS, *(flag.metadata["group"] for flag in fields(config_class))))
    groups = {heading: parser.add_argument_group(heading) for heading in headings}
    hints = _hints(config_class)
    for flag in shown_fields(config_class):
        add_flag(groups[flag.metadata["group"]], flag, hints[flag.name])
    for name, former in config_class.former_flags.items():
        _add_former_flag(parser, name, former)
    parser.epilog = _recipes_help(config_class)
    return parser


def _recipes_help(config_class: type[RunConfig]) -> str | None:
    """A line for each recipe of the command."""
    recipes = list_recipes(config_class, _hints(config_class))
    return "\n".join(["recipes:", *(f"  {name:<28} {line}" for name, line in recipes.items())]) if recipes else None


def _hints(config_class: type[RunConfig]) -> dict[str, Any]:
    """Types of the flags of a command, by name; those of the mask among them where it has masks."""
    masks = {**get_type_hints(MaskConfig), "recipe": str} if issubclass(config_class, TrainConfig) else {}
    hints = get_type_hints(config_class)
    return {**{flag.name: hints[flag.name] for flag in shown_fields(config_class)}, **masks}


def shown_fields(config_class: type[RunConfig]) -> list[Field[Any]]:
    """The fields of a configuration that are flags."""
    return [flag for flag in fields(config_class) if not flag.metadata.get("hidden")]


def _add_former_flag(parser: argparse.ArgumentParser, name: str, former: FormerFlag) -> None:
    """Not shown, and taken only to be refused with its reason, or passed over at its neutral value."""
    hidden: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    if isinstance(former.neutral, bool):
        parser.add_argument(f"--{name}", action="store_const", const=[True], **hidden)
        parser.add_argument(f"--no_{name}", action="store_const", const=[False], **hidden)
    else:
        parser.add_argument(f"--{name}", nargs="*", **hidden)


def read_values(config_class: type[RunConfig], parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Flags over the values of the recipe that --config names; what has no effect is refused or left out."""
    flags, hints = vars(parser.parse_args(argv)), _hints(config_class)
    said = flags.pop("config", None)
    of_file = _read_toml(find_recipe(config_class, said, hints), hints, config_class.former_flags) if said else {}
    given = _without_former(flags, config_class.former_flags)
    return {**_without_other_data(of_file, given), **given}


def _without_other_data(of_file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The file's values without those of data that the command line replaces by others.

    The photographs of a demo's recipe give way to --data_path, and a folder of a file to --dataset photos. Where one place says
    both, the configuration refuses the pair.
    """
    dropped = set()
    if given.get("data_path") and of_file.get("dataset") == "photos":
        dropped.add("dataset")
    if given.get("dataset") == "photos":
        dropped.add("data_path")
    return {name: value for name, value in of_file.items() if name not in dropped}


def _without_former(values: dict[str, Any], former_flags: dict[str, FormerFlag]) -> dict[str, Any]:
    """`values` without former flags at their neutral values.

    Raises:
        BadInput: a former flag with another value.
    """
    for name in values.keys() & former_flags.keys():
        if not _is(former_flags[name].neutral, values[name]):
            raise BadInput(f"--{name} {former_flags[name].reason}")
    return {name: value for name, value in values.items() if name not in former_flags}


def _is(neutral: Any, value: Any) -> bool:
    """Whether a value from a file, or words from a command line, say the neutral value."""
    expected = list(neutral) if isinstance(neutral, tuple) else [neutral]
    words = value if isinstance(value, list) else [value]
    try:
        return [type(item)(word) for item, word in zip(expected, words, strict=True)] == expected
    except ValueError:
        return False


def _read_toml(file: Path, hints: dict[str, Any], former_flags: dict[str, FormerFlag]) -> dict[str, Any]:
    """Keys and values of a recipe file, types checked."""
    try:
        values = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadInput(f"--config {file}: {error}") from None
    values = _without_former(values, former_flags)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise BadInput(f"--config {file}: unknown key {', '.join(unknown)}")
    return {key: _typed(value, hints[key], f"--config {file}: {key}") for key, value in values.items()}


def _typed(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        if not (isinstance(value, list) and len(value) == 2 and all(type(bound) in (int, float) for bound in value)):
            raise BadInput(f"{where} must be two numbers, got {value!r}")
        return tuple(map(float, value))
    wanted = str if get_origin(hint) is Literal else scalar_type(hint)
    if wanted is float and type(value) is int:
        return float(value)
    if wanted is str and type(value) is int:
        return str(value)
    if type(value) is not wanted:
        raise BadInput(f"{where} must be {wanted.__name__}, got {value!r}")
    return value
