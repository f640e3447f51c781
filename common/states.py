"""Comparing the settings of a saved state with those of the run that continues it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, free: frozenset[str] = frozenset(), prefix: str = ""
) -> list[str]:
    """A line `NAME saved -> current` for each setting that differs, sorted by name; None stands for one that is absent.

    Tuples count as lists, since a saved state may hold either.

    Args:
        free: names that may differ.
        prefix: before each name, such as "--" where settings are flags.
    """
    names = sorted((set(saved) | set(current)) - free)
    pairs = {name: (_plain(saved.get(name)), _plain(current.get(name))) for name in names}
    return [f"{prefix}{name} {before!r} -> {now!r}" for name, (before, now) in pairs.items() if before != now]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
