"""Recipes: TOML files of flags in a folder `recipes/` beside the command, found by name from any folder.

`--config demo` is the file recipes/demo.toml of the package that the command belongs to; a path is a path.
"""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Container
from pathlib import Path
from typing import Any

from common.training.errors import BadInput

SUFFIX = ".toml"


def recipes_folder(config_class: type[Any]) -> Path | None:
    """The folder `recipes` beside the file that defines a command's configuration, or beside that file's package."""
    beside = Path(inspect.getfile(config_class)).resolve().parents[:2]
    return next((folder / "recipes" for folder in beside if (folder / "recipes").is_dir()), None)


def find_recipe(config_class: type[Any], said: str, known: Container[str]) -> Path:
    """The file that --config names. The first that applies:

    1. a path, that is anything with a folder or the suffix .toml in it, or the name of a file that is here: that file;
    2. a recipe's name.

    Args:
        known: keys that the command takes, for the list of its recipes.

    Raises:
        BadInput: a name that is no recipe's; lists those there are.
    """
    path = Path(said)
    if path.suffix == SUFFIX or len(path.parts) != 1 or path.is_file():
        return path
    folder = recipes_folder(config_class)
    if folder is not None and (folder / f"{said}{SUFFIX}").is_file():
        return folder / f"{said}{SUFFIX}"
    names = ", ".join(list_recipes(config_class, known)) or "none"
    raise BadInput(f"--config {said}: no such file, and no recipe by that name (recipes: {names})")


def list_recipes(config_class: type[Any], known: Container[str]) -> dict[str, str]:
    """Name -> first comment line of the recipes whose keys the command all takes: several commands may share a folder."""
    folder = recipes_folder(config_class)
    files = sorted(folder.glob(f"*{SUFFIX}")) if folder is not None else []
    return {file.stem: _first_comment(file) for file in files if all(key in known for key in _keys(file))}


def _keys(file: Path) -> set[str]:
    try:
        return set(tomllib.loads(file.read_text()))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return {""}  # of no command


def _first_comment(file: Path) -> str:
    lines = file.read_text().splitlines()
    return lines[0].lstrip("# ").strip() if lines and lines[0].startswith("#") else ""
