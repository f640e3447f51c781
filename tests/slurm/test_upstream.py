"""The command lines of the patched official scripts."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import slurm.upstream as subject
from common.training.errors import BadInput
from patches.apply import Hunk, blob_id, read_upstream
from slurm.upstream import newest_checkpoint, official_command

MODULES = {
    "mae": "mae_evolved.main_pretrain",
    "beit": "beit_evolved.run_beit_pretraining",
    "simmim": "simmim_evolved.main_simmim",
}


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository that stands for an official one, with a patch of one line in it."""
    root = tmp_path / "clone"
    root.mkdir()
    for name in ("code.py", "beit"):
        (root / name).mkdir() if name == "beit" else (root / name).write_text("one\ntwo\n")
    git = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t.t"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True, capture_output=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    pinned = {name: replace(read_upstream(name), commit=head, blobs={"code.py": blob_id(b"one\ntwo\n")}) for name in MODULES}
    monkeypatch.setattr(subject, "read_upstream", pinned.__getitem__)
    monkeypatch.setattr(subject, "read_patch", lambda upstream: {"code.py": [Hunk(1, ("ours",))]})
    (root / "code.py").write_text("one\nours\ntwo\n")
    (tmp_path / "images" / "train").mkdir(parents=True)
    return root


def command(name: str, clone: Path, split: tuple[int, int] = (4, 1)) -> list[str]:
    images, output = clone.parent / "images", clone.parent / "out"
    words = official_command(MODULES[name], clone, images, output, split, ["--epochs", "2"])
    return [word.replace(str(clone.parent), "AT") for word in words]


def test_commands_by_their_official_names(clone: Path) -> None:
    assert command("mae", clone, (4, 2)) == [
        *("AT/clone/main_pretrain.py", "--epochs", "2", "--batch_size", "4", "--accum_iter", "2", "--data_path", "AT/images"),
        *("--output_dir", "AT/out", "--log_dir", "AT/out/tensorboard"),
    ]
    assert command("beit", clone) == [
        *("AT/clone/beit/run_beit_pretraining.py", "--epochs", "2", "--batch_size", "4", "--data_path", "AT/images/train"),
        *("--output_dir", "AT/out", "--log_dir", "AT/out/tensorboard"),
    ]
    assert command("simmim", clone) == [
        *("AT/clone/main_simmim.py", "--epochs", "2", "--batch-size", "4", "--accumulation-steps", "1"),
        *("--data-path", "AT/images/train", "--output", "AT/out"),
    ]


def test_mae_is_told_its_newest_checkpoint(clone: Path) -> None:
    output = clone.parent / "out"
    output.mkdir()
    assert newest_checkpoint(output) is None
    for number in ("20", "100", "last"):
        (output / f"checkpoint-{number}.pth").touch()
    assert command("mae", clone)[-2:] == ["--resume", "AT/out/checkpoint-100.pth"]
    assert "--resume" not in command("beit", clone)


def test_clone_without_the_patch_is_refused(clone: Path) -> None:
    (clone / "code.py").write_text("one\ntwo\n")
    with pytest.raises(BadInput, match=r"code\.py does not have the patch.*python -m patches\.apply mae"):
        command("mae", clone)
    (clone / "code.py").write_text("one\nours\ntwo\nthree\n")
    with pytest.raises(BadInput, match="or more than it"):
        command("mae", clone)


def test_what_the_official_code_cannot_do_is_refused(clone: Path) -> None:
    with pytest.raises(BadInput, match="beit code cannot accumulate, and the effective batch needs 2 steps of 4 images"):
        command("beit", clone, (4, 2))
    with pytest.raises(BadInput, match=r"UPSTREAM is for .*, not for elsewhere"):
        official_command("elsewhere", clone, clone, clone, (1, 1), [])
    with pytest.raises(BadInput, match="has no folder train"):
        official_command(MODULES["mae"], clone, clone, clone, (1, 1), [])
