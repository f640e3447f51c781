"""Checkpoints: atomic, safe to read, strict to load."""

from __future__ import annotations

import argparse
import os
import sys
import types
from pathlib import Path
from typing import Any

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


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, "evil.pth")
    with pytest.raises(BadInput, match=r"checkpoint evil.pth: "):
        read_checkpoint(Path("evil.pth"))
    assert not Path("executed").exists()


def test_truncated_or_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_atomically({"model": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[:500])
    for name, content in (("c.pth", None), ("empty.pth", b""), ("text.pth", b"hello")):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=f"{name}: ") as error:
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
