"""Checkpoints: atomic, safe to read, strict to load."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from common.training.checkpoint import count_bytes, load_weights, read_checkpoint, save_atomically
from common.training.errors import BadInput
from common.training.runlog import write_text


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"needs the right to mount a small disk: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def numbers(count: int) -> dict[str, Any]:
    """A state of `count` bytes."""
    return {"model": {"a": torch.ones(count, dtype=torch.uint8)}}


def test_a_full_disk_is_found_before_writing(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line with what is needed and free; nothing is begun, and the checkpoint of before is as it was."""
    path = small_disk / "c.pth"
    save_atomically(numbers(300_000), path)
    monkeypatch.setattr(torch, "save", lambda *_: pytest.fail("began to write"))
    with pytest.raises(BadInput) as error:
        save_atomically(numbers(900_000), path)
    kept = r"; the one that was there before is untouched"
    assert re.fullmatch(rf"{path}: not written, it needs 900\.0 kB \(7\d\d\.\d kB free\){kept}", str(error.value))
    assert os.listdir(small_disk) == ["c.pth"]
    assert read_checkpoint(path)["model"]["a"].sum() == 300_000


def test_a_disk_that_fills_while_it_is_written_to(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where others write too: one line, no temporary file, room again, and the checkpoint of before can be read."""
    path = small_disk / "c.pth"
    save_atomically(numbers(300_000), path)
    monkeypatch.setattr("common.training.checkpoint.require_room", lambda path, needed: None)
    for _ in range(2):
        with pytest.raises(BadInput, match=r"c.pth: not written, No space left on device .*before is untouched$"):
            save_atomically(numbers(900_000), path)
        assert os.listdir(small_disk) == ["c.pth"]
    assert read_checkpoint(path)["model"]["a"].sum() == 300_000
    with pytest.raises(BadInput, match=r"run.json: not written, No space left on device \(\d+\.\d kB free\)$"):
        write_text(small_disk / "run.json", "x" * 900_000)
    assert os.listdir(small_disk) == ["c.pth"]


def test_no_room_without_a_disk_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no disk can be mounted: the system says so part-way, and torch.save raises something else over it."""

    def full(state: object, file: Any) -> None:
        file.write(b"half")
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    path = tmp_path / "c.pth"
    save_atomically(numbers(10), path)
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match=r"c.pth: not written, Disk quota exceeded"):
        save_atomically(numbers(10), path)
    assert os.listdir(tmp_path) == ["c.pth"]


def test_bytes_of_a_state() -> None:
    """Tensors at any depth; two views of one memory count once, and whole, as torch.save writes it."""
    shared = torch.zeros(10)
    assert count_bytes({"a": shared, "b": [shared[:5], {"c": torch.zeros(3, dtype=torch.uint8)}], "d": 7}) == 43


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
    before = set(torch.serialization.get_safe_globals())
    assert read_checkpoint(tmp_path / "c.pth") == {"lr": 1.0}
    assert set(torch.serialization.get_safe_globals()) == before
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
    contents = {"empty.pth": b"", "text.pth": b"epoch 1\tloss 0.5\n", "pickle.pth": pickle.dumps({"a": 1})}  # "e" is byte 101
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
    torch.save({"model": {**whole, "body.bias": torch.tensor([1, float("nan"), 1])}}, path)
    with pytest.raises(BadInput, match=r"w.pth: holds weights that are NaN or infinite: body.bias$"):
        load_weights(Tiny(), path)
    torch.save({"model": {**whole, "body.weight": torch.ones(2, 2)}}, path)
    with pytest.raises(BadInput, match=r"of another shape: body.weight \[2, 2\] instead of \[3, 2\]"):
        load_weights(Tiny(), path)
