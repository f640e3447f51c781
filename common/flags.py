"""Flags of a command line made from the fields of a dataclass, and those of the mask.

A field carries its help text (:func:`common.mask_config.option`) and its type, so that a default is written once.
Only what is given ends up in the namespace: defaults, recipes and files are the caller's to put under it. The mask
itself imports nothing of this.
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .mask_config import RECIPES, MaskConfig, option

__all__ = ["WideHelp", "add_flag", "add_mask_flags", "mask_config_from", "mask_options", "option", "scalar_type"]


def add_flag(group: Any, flag: Field[Any], hint: Any) -> None:
    """Adds `--NAME` for one field of a dataclass.

    Args:
        group: a parser, or an argument group of one.
        flag: the field; its metadata hold `help`.
        hint: its type: bool (`--no_NAME` then exists too), Literal, a pair of floats, or int, float, str or an optional of those.
    """
    default = "" if flag.default in (None, "", MISSING) else f" [{_shown(flag.default)}]"
    help = (flag.metadata["help"] + default).replace("%", "%%")
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": help}
    if hint is bool:
        group.add_argument(f"--{flag.name}", f"--no_{flag.name}", action=_Switch, nargs=0, **common)
    elif get_origin(hint) is Literal:
        group.add_argument(f"--{flag.name}", choices=get_args(hint), **common)
    elif get_origin(hint) is tuple:
        group.add_argument(f"--{flag.name}", type=float, nargs=2, metavar=("LOW", "HIGH"), action=_Pair, **common)
    else:
        plain = scalar_type(hint)
        group.add_argument(f"--{flag.name}", type=plain, metavar=plain.__name__.upper(), **common)


def scalar_type(hint: Any) -> Any:
    """int, float or str of an annotation such as `float | None`."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def add_mask_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --recipe and one flag for each field of MaskConfig."""
    group = parser.add_argument_group("mask", "the method's choices; docs/method.md explains each")
    group.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default=argparse.SUPPRESS,
        help="paper (the default); authors: all mask options as in the authors' released code; best: the paper's with keys in "
        "the place of attention, whose parts agreed better with objects in small BEiT and SimMIM models (docs/parts.md)",
    )
    hints = get_type_hints(MaskConfig)
    for flag in fields(MaskConfig):
        add_flag(group, flag, hints[flag.name])


def mask_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of the mask among a script's flags: `recipe` and the fields of MaskConfig."""
    names = {"recipe", *(flag.name for flag in fields(MaskConfig))}
    return {name: value for name, value in options.items() if name in names}


def mask_config_from(options: Mapping[str, Any]) -> MaskConfig:
    """The mask's configuration from a script's flags; those that are not the mask's are passed over.

    Raises:
        ValueError: an unknown recipe or a value outside its range, naming the option.
    """
    chosen = mask_options(options)
    return MaskConfig.from_recipe(chosen.pop("recipe", "paper"), **chosen)


class WideHelp(argparse.HelpFormatter):
    """Wide enough that one flag is one or two lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=120)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs of one line are filled as usual; a list, which has several, keeps its lines."""
        return text if "\n" in text else super()._fill_text(text, width, indent)


class _Switch(argparse.Action):
    """--name sets True, --no_name False, in the style of the official --pin_mem and --no_pin_mem."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


class _Pair(argparse.Action):
    """Two numbers as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
