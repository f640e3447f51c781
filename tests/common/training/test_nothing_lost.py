"""What a run survives: damaged checkpoints and logs, full disks, files deleted under it, numbers that are no numbers."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.training import loop, runlog
from common.training.checkpoint import FORMAT, LAST, MIGRATIONS, PREVIOUS, is_whole, save_atomically
from common.training.errors import BadInput, NonFiniteLoss
from common.training.files import NoRoom
from common.training.loop import BEFORE_FAILURE, Loop
from mae_evolved.model import MODELS, MaskedAutoencoder
from tests.common.training.test_engine import stop_at_epoch, trained_state
from tests.conftest import assert_same, read_log

Train = Callable[..., Path]
GRID = "--mask grid --save_freq 100"


@pytest.fixture
def stopped(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended before epoch 3 of 4: its last checkpoint is of epoch 2, the one before of epoch 1."""
    with monkeypatch.context() as patch:
        stop_at_epoch(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train("run", GRID)
    return tmp_path / "run"


def epoch_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["epoch"])


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_byte(path: Path) -> None:
    """In the middle, among the weights: the file has its end and its table of contents."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        value = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([value ^ 1]))


# --- Checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [cut_short, flip_a_byte])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_continued(
    train: Train, stopped: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """To the bit as if nothing had been damaged; and where none is whole, nothing is trained."""
    assert (epoch_of(stopped / LAST), epoch_of(stopped / PREVIOUS)) == (2, 1)
    shutil.copytree(stopped, stopped.parent / "hopeless")
    damage(stopped / LAST)
    assert is_whole(stopped / LAST, every_byte=False) is (damage is flip_a_byte)
    capsys.readouterr()
    train("run", GRID)
    said = capsys.readouterr().out
    assert f"damaged, so {PREVIOUS} is continued in its place: {stopped / LAST}\n" in said
    assert f"resumed {stopped / PREVIOUS} at epoch 2, update 0" in said
    whole = train("whole", GRID)
    assert_same(trained_state(whole), trained_state(stopped))
    assert read_log(whole) == read_log(stopped)
    for name in (LAST, PREVIOUS):
        damage(stopped.parent / "hopeless" / name)
    with pytest.raises(BadInput, match=f"{LAST}: is damaged, and no other one there is whole"):
        train("hopeless", GRID)


def test_the_numbered_ones_come_after_the_previous_one(train: Train, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(stopped / PREVIOUS, stopped / "checkpoint-1.pth")
    shutil.copy(stopped / PREVIOUS, stopped / "checkpoint-before-nonfinite.pth")
    shutil.copy(stopped / PREVIOUS, stopped / "checkpoint-10.pth")
    for name in (LAST, PREVIOUS, "checkpoint-10.pth"):
        cut_short(stopped / name)
    train("run", GRID)
    assert f"resumed {stopped / 'checkpoint-1.pth'} at epoch 2, update 0" in capsys.readouterr().out


def test_previous_gives_way_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint before the last is a luxury: it goes before a save is given up. The last one is never without a file."""
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    for number in range(3):
        save_atomically({"model": {"a": torch.tensor(number)}}, last, previous)
    assert [int(torch.load(path)["model"]["a"]) for path in (last, previous)] == [2, 1]

    def full_while_it_is_there(path: Path, needed: int) -> None:
        if previous.exists():
            raise NoRoom(f"{path}: not written")

    monkeypatch.setattr("common.training.checkpoint.require_room", full_while_it_is_there)
    save_atomically({"model": {"a": torch.tensor(3)}}, last, previous)
    assert int(torch.load(last)["model"]["a"]) == 3
    assert sorted(os.listdir(tmp_path)) == [LAST]


def test_without_hard_links_there_is_no_previous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    for number in range(2):
        save_atomically({"model": {"a": torch.tensor(number)}}, tmp_path / LAST, tmp_path / PREVIOUS)
    assert os.listdir(tmp_path) == [LAST]
    assert int(torch.load(tmp_path / LAST)["model"]["a"]) == 1


@pytest.mark.parametrize(("flag", "saved"), [("continue", [0, 2, 3]), ("stop", [0])])
def test_full_disk_by_flag(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str, saved: list[int]
) -> None:
    """--on_full_disk: no room after epoch 1, whose last checkpoint is that of epoch 0; the run goes on, or ends in one line."""
    written: list[int] = []

    def save(state: dict[str, Any], path: Path, previous: Path | None = None) -> None:
        if state["epoch"] == 1:
            raise NoRoom(f"{path}: not written, it needs 1.0 GB")
        save_atomically(state, path, previous)
        written.extend([state["epoch"]] if path.name == LAST else [])

    monkeypatch.setattr(loop, "save_atomically", save)
    if flag == "stop":
        with pytest.raises(BadInput, match=f"{LAST}: not written, it needs 1.0 GB$"):
            train("run", GRID)
        assert epoch_of(tmp_path / "run" / LAST) == 0
    else:
        train("run", f"{GRID} --on_full_disk continue")
        assert "it needs 1.0 GB; training goes on (--on_full_disk continue)" in capsys.readouterr().out
    assert written == saved


def test_formats(train: Train, tmp_path: Path) -> None:
    """Every format has a step to the next one; one of a later version is refused in a line that says what to do."""
    assert sorted(MIGRATIONS) == list(range(1, FORMAT))
    output = train("run", f"{GRID} --epochs 1")
    state = torch.load(output / LAST, weights_only=True)
    assert state["format"] == FORMAT
    torch.save({**state, "format": FORMAT + 1}, output / LAST)
    later = f"is of format {FORMAT + 1}, this version reads up to {FORMAT}: use the one that wrote it$"
    with pytest.raises(BadInput, match=later):
        train("run", f"{GRID} --epochs 1")


# --- Logs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b'{"epoch": 3, "train_lo', b"\0" * 40, b'{"epoch": 3}'[:-1] + b"\n", b"\xff\xfe\n"])
def test_a_torn_line_of_the_log_is_dropped(train: Train, stopped: Path, capsys: pytest.CaptureFixture[str], tail: bytes) -> None:
    """With a warning that says which; the log is whole at the end."""
    with (stopped / "log.txt").open("ab") as file:
        file.write(tail)
    (stopped / "run.json").write_text("{")
    capsys.readouterr()
    train("run", GRID)
    said = capsys.readouterr().out
    reason = "as where a process or a machine ended while it wrote"
    assert f"{stopped / 'log.txt'}: dropped what cannot be read, {reason}: line 4\n" in said
    assert f"{stopped / 'run.json'}: is damaged, and written anew" in said
    assert [line["epoch"] for line in read_log(stopped)] == [0, 1, 2, 3]
    assert json.loads((stopped / "run.json").read_text())["resumed_from"] == str(stopped / LAST)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends in one
def test_logs_deleted_under_a_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """log.txt and TensorBoard's folder: the run ends as it would have; what comes after is written, and it is said once."""
    original = Loop._train_epoch

    def deleted(self: Loop, epoch: int, loader: Any) -> None:
        if epoch == 2:
            (tmp_path / "run" / "log.txt").unlink()
            shutil.rmtree(tmp_path / "run" / "tensorboard")
            assert self.log.events.writer is not None
        original(self, epoch, loader)

    monkeypatch.setattr(Loop, "_train_epoch", deleted)
    train("run", GRID)
    assert capsys.readouterr().out.count("TensorBoard: events are lost (No such file or directory: ") == 1
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [2, 3]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    monkeypatch.setattr(Loop, "_train_epoch", original)
    assert_same(trained_state(train("whole", GRID)), trained_state(tmp_path / "run"))


def test_a_full_disk_of_the_log_does_not_stop_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Epochs 1 and 2 find no room: their lines are written with that of epoch 3, in order."""
    original, asked = runlog._append, []

    def append(path: Path, text: str) -> None:
        asked.append(text)
        if len(asked) in (2, 3):
            raise NoRoom(f"{path}: not written, No space left on device")
        original(path, text)

    monkeypatch.setattr(runlog, "_append", append)
    train("run", GRID)
    assert [line["epoch"] for line in read_log(tmp_path / "run")] == [0, 1, 2, 3]
    assert capsys.readouterr().out.count("the line waits in memory, and training goes on") == 2


# --- Numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["attention", "keys"])
def test_nan_in_the_attention_ends_the_run_within_the_update(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: str
) -> None:
    """Of one image in update 2: it alone is named, and the state before the update is kept."""
    original, calls = MaskedAutoencoder.signal, 0

    def signal(self: Any, images: Tensor, **options: Any) -> Iterator[Tensor]:
        nonlocal calls
        calls += 1
        for values in original(self, images, **options):
            yield values.index_fill(0, torch.tensor([2]), float("nan")) if calls == 3 else values

    monkeypatch.setattr(MaskedAutoencoder, "signal", signal)
    flags = f"--alpha 1 --no_shortcut --picture_epochs 0 --graph {graph}"
    with pytest.raises(NonFiniteLoss, match=f"^{graph} of the encoder became NaN or infinite at epoch 0, update 2 ") as error:
        train("run", flags)
    whose = str(error.value).split("images: ")[1]
    assert whose.endswith(".jpg")
    assert "," not in whose
    state = torch.load(tmp_path / "run" / BEFORE_FAILURE, weights_only=True)
    assert (state["epoch"], state["update"]) == (-1, 2)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_pixels_end_the_run_within_the_update(train: Train, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Planted in an image of update 1: found there, and only images of that batch are named."""
    original, calls = Loop._next, 0

    def planted(self: Loop, stream: Any) -> Any:
        nonlocal calls
        calls += 1
        batch = original(self, stream)
        if calls == 2:
            batch.images[0, 0, 3, 3] = float(value)
        return batch

    monkeypatch.setattr(Loop, "_next", planted)
    with pytest.raises(NonFiniteLoss, match=r" at epoch 0, update 1 .*; images: ([^,]+\.jpg, ){3}[^,]+\.jpg$"):
        train("run", GRID)


# --- Formats that were released ------------------------------------------------------------------------------------

FORMATS = Path(__file__).parent / "formats"


@pytest.mark.parametrize("number", range(1, FORMAT))
def test_a_checkpoint_of_every_released_format_goes_on(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """With the same command, and to the weights with which the version that wrote it ended the same run.

    Rounding differs, by less than a hundredth of what the rest of the run changes (root of the sum of squares).
    """
    tiny = {"patch_size": 4, "width": 16, "depth": 2, "heads": 2, "decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    monkeypatch.setitem(MODELS, "mae_vit_tiny_patch4", partial(MaskedAutoencoder, **tiny))
    (tmp_path / "run").mkdir()
    shutil.copy(FORMATS / f"format_{number}.pth", tmp_path / "run" / LAST)
    before = torch.load(tmp_path / "run" / LAST, weights_only=True)["model"]
    train("run")
    ended = torch.load(FORMATS / f"format_{number}_end.pth", weights_only=True)
    now = torch.load(tmp_path / "run" / LAST, weights_only=True)["model"]
    change = sum(float((ended[name] - before[name]).square().sum()) for name in ended)
    difference = sum(float((ended[name] - now[name]).square().sum()) for name in ended)
    assert difference < 0.01**2 * change
