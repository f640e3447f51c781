"""Checkpoints: atomic, safe to read, strict to load."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.training.checkpoint import load_weights, read_checkpoint, save_atomically
from common.training.errors import BadInput


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.decoder_head = nn.Linear(2, 3), nn.Linear(3, 1)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pth"
    save_atomically({"model": {"a": torch.ones(2)}}, path)
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"model": {"a": torch.zeros(2)}}, path)
    assert torch.equal(read_checkpoint(path)["model"]["a"], torch.ones(2))


def test_official_checkpoints_hold_a_namespace(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "official.pth")
    assert read_checkpoint(tmp_path / "official.pth")["args"].lr == 1.0


def test_simmims_flags_are_read_without_yacs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They lie in a dict of a class of yacs, with attributes of its own; they come back as plain dicts."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    flags = node({"DATA": node({"IMG_SIZE": 224}), "TAG": "one"})
    flags.__deprecated_keys__, flags.__immutable__ = {"OLD"}, True
    with monkeypatch.context() as with_yacs:
        with_yacs.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        with_yacs.setitem(sys.modules, "yacs.config", types.ModuleType("yacs.config"))
        sys.modules["yacs.config"].CfgNode = node  # type: ignore[attr-defined]
        torch.save({"model": {"a": torch.ones(1)}, "config": flags}, tmp_path / "ckpt_epoch_0.pth")
    monkeypatch.setitem(sys.modules, "yacs.config", None)  # type: ignore[arg-type]
    read = read_checkpoint(tmp_path / "ckpt_epoch_0.pth")
    assert read["config"] == {"DATA": {"IMG_SIZE": 224}, "TAG": "one"}
    assert torch.equal(read["model"]["a"], torch.ones(1))


@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_numbers_of_numpy_and_paths_become_plain(tmp_path: Path, module: str) -> None:
    """As BEiT's schedules leave them in the optimiser, and submitit's folders in MAE's arguments; also written before numpy 2."""
    groups = [{"lr": np.float64(0.25), "weight_decay": np.float64(0.05), "params": [0, 1]}]
    others = {"half": np.float16(0.5), "whole": np.int64(-3), "truth": np.bool_(True)}
    arguments = argparse.Namespace(lr=np.float64(1.5), output_dir=PurePosixPath("/jobs/7"), here=PurePosixPath())
    state = {"model": {"a": torch.ones(1)}, "optimizer": {"state": {}, "param_groups": groups}, "args": arguments, **others}
    path = tmp_path / "checkpoint-0.pth"
    torch.save(state, path)
    before = {"numpy._core.multiarray": module, "pathlib\nPurePosixPath": "pathlib\nPosixPath"}
    rewrite_pickle(path, {old.encode(): new.encode() for old, new in before.items()})
    read = read_checkpoint(path)
    assert read["optimizer"]["param_groups"] == [{"lr": 0.25, "weight_decay": 0.05, "params": [0, 1]}]
    numbers = [*read["optimizer"]["param_groups"][0].values(), *(read[name] for name in others), read["args"].lr]
    assert [type(value) for value in numbers] == [float, float, list, float, int, bool, float]
    assert [read[name] for name in others] == [0.5, -3, True]
    assert (read["args"].output_dir, read["args"].here, read["args"].lr) == ("/jobs/7", ".", 1.5)


def rewrite_pickle(path: Path, words: dict[bytes, bytes]) -> None:
    """Other names in the pickle of a checkpoint, which another Python or numpy would have written."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, content in members.items():
        if name.endswith("data.pkl"):
            for old, new in words.items():
                assert old in content
                content = content.replace(old, new)
            members[name] = content
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth")
    with pytest.raises(BadInput, match=r"checkpoint evil.pth: holds a class that is not allowed: (posix|nt).system$"):
        read_checkpoint(Path("evil.pth"))
    assert not Path("executed").exists()


class Called:
    """Pickled as a call."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.args


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (Called(eval, "open('executed', 'w')"), "holds a class that is not allowed: eval"),
        (Tiny(), f"holds a class that is not allowed: {__name__}.Tiny"),
        (np.ones(2), "holds a class that is not allowed: numpy._core.multiarray._reconstruct"),
        (np.datetime64("2023-06-01"), "holds a class that is not allowed: numpy.dtype('M8')"),
        (PurePosixPath("a"), "holds a class that is not allowed: pathlib.PurePosixPath"),
    ],
)
@pytest.mark.parametrize("archive", [True, False])
def test_refusals_are_one_line_with_the_reason(tmp_path: Path, archive: bool, value: Any, reason: str) -> None:
    """In today's archives and in the form of torch before 1.6, without terminal codes or torch's advice."""
    path = tmp_path / "c.pth"
    torch.save({"model": {}, "more": value}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(BadInput) as error:
        read_checkpoint(path)
    assert str(error.value) == f"checkpoint {path}: {reason}"
    assert not Path("executed").exists()


def test_what_is_allowed_is_allowed_while_a_checkpoint_is_read_only(tmp_path: Path) -> None:
    torch.save({"lr": np.float64(1)}, tmp_path / "c.pth")
    before = torch.serialization.get_safe_globals()
    assert read_checkpoint(tmp_path / "c.pth") == {"lr": 1.0}
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth")


def test_numbers_of_another_byte_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    torch.save({"lr": np.float64(1.5)}, path)
    rewrite_pickle(path, {b"X\x01\x00\x00\x00<": b"X\x01\x00\x00\x00>"})
    assert read_checkpoint(path)["lr"] == np.float64(1.5).byteswap()


def test_truncated_or_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_atomically({"model": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:500])
    with zipfile.ZipFile(tmp_path / "zip.pth", "w") as archive:
        archive.writestr("a.txt", "hello")
    reasons = {
        "c.pth": "is cut short or damaged",
        "empty.pth": "is empty",
        "text.pth": "is not a file of torch.save",
        "pickle.pth": "is not a file of torch.save",
        "zip.pth": "is a zip archive, but not one of torch.save",
    }
    contents = {"empty.pth": b"", "text.pth": b"hello", "pickle.pth": pickle.dumps({"a": 1})}
    for name, reason in reasons.items():
        if name in contents:
            (tmp_path / name).write_bytes(contents[name])
        with pytest.raises(BadInput, match=f"{name}: {reason}$") as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(BadInput, match="holds a list"):
        read_checkpoint(tmp_path / "list.pth")


def test_weights_load_strictly(tmp_path: Path) -> None:
    """Whole: loaded. Encoder only: loaded, and what is missing is said. Anything else: refused by name."""
    path, source = tmp_path / "w.pth", Tiny()
    whole = source.state_dict()
    torch.save({"model": whole}, path)
    model = Tiny()
    assert load_weights(model, path).endswith("all 4 tensors")
    assert torch.equal(model.body.weight, source.body.weight)

    torch.save({"model": {key: value for key, value in whole.items() if key.startswith("body")}}, path)
    with pytest.raises(BadInput, match=r"missing: decoder_head.weight, decoder_head.bias"):
        load_weights(Tiny(), path)
    model = Tiny()
    message = load_weights(model, path, may_miss=("decoder_",))
    assert "encoder only; 2 decoder tensors are missing and start at random (decoder_head.weight, decoder_head.bias)" in message
    assert torch.equal(model.body.weight, source.body.weight)

    torch.save({"model": {key: value for key, value in whole.items() if key != "decoder_head.bias"}}, path)
    with pytest.raises(BadInput, match=r"missing: decoder_head.bias"):
        load_weights(Tiny(), path, may_miss=("decoder_",))
    torch.save({"model": {**whole, "head.weight": torch.ones(1)}}, path)
    with pytest.raises(BadInput, match=r"not of this model: head.weight"):
        load_weights(Tiny(), path)
    torch.save({"model": {**whole, "body.weight": torch.ones(2, 2)}}, path)
    with pytest.raises(BadInput, match=r"of another shape: body.weight \[2, 2\] instead of \[3, 2\]"):
        load_weights(Tiny(), path)
