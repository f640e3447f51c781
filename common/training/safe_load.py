"""Reads a file that torch.save has written, with no code in it run, and says in one line why one cannot be read.

torch.load with weights_only refuses every class but tensors and plain containers. Official checkpoints hold a few
others: MAE and BEiT keep the arguments of their script (MAE under submitit with paths among them), BEiT numbers of
numpy in its optimiser, SimMIM a configuration of yacs. Those are allowed here, for this one call, and all but the first
are replaced by plain values while they are read: nothing of yacs or numpy is called with what the file says.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch


class _YacsNode:
    """Read in the place of `yacs.config.CfgNode`, the dict in which SimMIM's checkpoints hold their flags.

    torch.load fills only dicts of kinds that it knows, so this one becomes an ordered dict; yacs is not needed.
    """

    def __new__(cls) -> OrderedDict[str, Any]:  # type: ignore[misc]
        return OrderedDict()


class _NumberType:
    """Read in the place of `numpy.dtype`: its name and byte order, and nothing of what else a type can be told."""

    def __init__(self, name: str, *flags: bool) -> None:
        self.name, self.byte_order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = {"|": "="}.get(state[1], state[1])


def _number(kind: _NumberType, data: bytes) -> bool | int | float:
    """Read in the place of numpy's scalars: the plain number."""
    if not re.fullmatch(r"[iuf][1248]|b1", kind.name):
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype({kind.name!r}) was not an allowed global")
    value: bool | int | float = np.frombuffer(data, np.dtype(kind.byte_order + kind.name), count=1)[0].item()
    return value


def _path(*parts: str) -> str:
    """Read in the place of pathlib's paths."""
    return str(PurePosixPath(*parts))


ALLOWED: list[Any] = [
    argparse.Namespace,
    (_YacsNode, "yacs.config.CfgNode"),
    (_NumberType, "numpy.dtype"),
    (_number, "numpy._core.multiarray.scalar"),
    (_number, "numpy.core.multiarray.scalar"),  # before numpy 2
    (_path, "pathlib.PosixPath"),
    (_path, "pathlib._local.PosixPath"),  # Python 3.13
]
"""What a checkpoint may hold besides tensors and plain containers."""


def safe_load(path: Path) -> Any:
    """What torch.save has put into `path`, tensors on the CPU.

    Raises:
        OSError: no such file, or not to be read.
        ValueError: not a file of torch.save, cut short, or with classes in it that are not allowed; one line.
    """
    try:
        with torch.serialization.safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols; what cannot be read is an error anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged files end in errors of any kind
        raise ValueError(_reason(path, error)) from None


def _reason(path: Path, error: Exception) -> str:
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+) (?:whose module|was not an allowed)", text):
        return f"holds a class that is not allowed: {refused[1]}"
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if not start:
        return "is empty"
    if not start.startswith((b"PK", MAGIC)):
        return "is not a file of torch.save"
    if not isinstance(error, pickle.UnpicklingError):
        return "is cut short or damaged" if _has_pickle(path) else "is a zip archive, but not one of torch.save"
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()]
    inner = next((line for line in lines if line and not line.startswith(TORCHS_ADVICE)), type(error).__name__)
    return f"holds what is not plain weights ({inner.removeprefix('Weights only load failed. ')})"


def _has_pickle(path: Path) -> bool:
    """Whether a file is, as far as it can be read, one of torch.save."""
    if not zipfile.is_zipfile(path):
        return True
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files of torch.save begin that are no zip archives (before torch 1.6)."""

TORCHS_ADVICE = ("Weights only load failed. In PyTorch", "Please file an issue", "Check the documentation")
