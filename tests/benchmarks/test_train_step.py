"""The benchmark of whole steps at tiny sizes: it runs, and its numbers are what they say they are."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import cost_page, official_models, train_step
from common.training.errors import BadInput
from patches.apply import read_upstream

TINY = ["--models", "tiny", "--only", "mae", "--repeats", "2", "--epochs", "20", "--stages", "2", "--parts_every", "3"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("step")
    page = folder / "cost.md"
    page.write_text("# Cost\n\nBefore.\n\n" + f"{cost_page.BEGIN}\nold\n{cost_page.END}\n\nAfter.\n")
    made = train_step.main([*TINY, "--json", str(folder / "step.json"), "--write", str(page)])
    assert json.loads((folder / "step.json").read_text()) == made
    return made, page


def test_a_case_holds_its_ratios_and_the_page_its_case(record):
    """Ratios are of the seconds of a turn; the page keeps what stands around the tables; no official column without a clone."""
    made, page = record
    (case,) = made["cases"]
    seconds = case["seconds"]
    masks = {f"{what} at epoch {epoch}" for what in ("mask", "carried", "whole") for epoch in (5, 15)}
    assert set(seconds) == {"our step", "draws and selection", "data", *masks}
    assert case["summary"]["kept"]["median"] > 0
    assert "kept parts: --parts_every 3" in page.read_text()
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())
    extra = seconds["mask at epoch 15"][0] / seconds["our step"][0], seconds["mask at epoch 15"][1] / seconds["our step"][1]
    assert case["summary"]["pass_added"]["median"] == pytest.approx(sum(extra) / 2)
    assert case["summary"]["plain"] is None
    assert len(case["spared"]) == 2
    assert case["spared"][0] > case["spared"][1]
    text = page.read_text()
    assert text.startswith("# Cost\n\nBefore.\n\n" + cost_page.BEGIN)
    assert text.endswith(cost_page.END + "\n\nAfter.\n")
    assert "old" not in text
    assert cost_page.render(made) in text
    assert f"{case['summary']['added']['median']:.3f}" in text
    assert "official plain step" not in text
    assert made["command"].endswith("--json step.json --write cost.md")


def numbers(official=True):
    """A case with round numbers: 2 turns, masks at 2 stages of a run, of which the first spares all but a quarter."""
    seconds = {
        "our step": [2.0, 4.0], "draws and selection": [0.1, 0.1], "data": [1.0, 1.0], "mask at epoch 25": [0.5, 1.0],
        "mask at epoch 75": [0.7, 0.8],
    }  # fmt: skip
    if official:
        seconds["official step"] = [4.0, 5.0]
    memory = {"our step": 100, "evolved step": 102, "official step": 200}
    stages = [[0, 50, 25], [50, 100, 75]]
    return {
        "method": "mae", "size": "small", "model": "m", "batch": 16, "masked": 147, "seconds": seconds, "memory": memory,
        "stages": stages, "spared": [0.75, 0.0], "spared_overall": 0.375, "compiled": False, "parts_every": 0,
    }  # fmt: skip


def test_ratios_by_hand():
    mask = [0.5 * (0.25 * 0.5 + 0.75 * 0.1) + 0.5 * 0.7, 0.5 * (0.25 * 1.0 + 0.75 * 0.1) + 0.5 * 0.8]
    assert train_step.mask_seconds(numbers()) == pytest.approx(mask)
    summary = train_step.summarise(numbers())
    assert summary.plain == train_step.Ratio((0.5 + 0.8) / 2, 0.5, 0.8)
    assert summary.evolved.low == pytest.approx((2 + mask[0]) / 4)
    assert summary.evolved.high == pytest.approx((4 + mask[1]) / 5)
    assert summary.share.median == pytest.approx((mask[0] / (2 + mask[0]) + mask[1] / (4 + mask[1])) / 2)
    assert summary.memory == pytest.approx(0.02)
    assert summary.official_memory == 0.5
    assert summary.kept is None
    alone = train_step.summarise(numbers(official=False))
    assert alone.plain is None
    assert alone.added == summary.added


def test_kept_parts_by_hand():
    """--parts_every 4: of each image that is not spared a carried map, and for one in four a pass over the whole image."""
    case = numbers()
    case["parts_every"] = 4
    for middle, whole, carried in ((25, 0.8, 0.2), (75, 1.2, 0.3)):
        case["seconds"] |= {f"whole at epoch {middle}": [whole] * 2, f"carried at epoch {middle}": [carried] * 2}
    mask = 0.5 * (0.25 * (0.8 / 4 + 0.2) + 0.75 * 0.1) + 0.5 * (1.2 / 4 + 0.3)
    summary = train_step.summarise(case)
    assert summary.kept.high == pytest.approx(mask / (2 + mask))
    assert summary.kept.low == pytest.approx(mask / (4 + mask))
    assert summary.added == train_step.summarise(numbers()).added


@pytest.mark.parametrize(("value", "said"), [(0.70, "met"), (0.75, "first met"), (0.77, "missed")])
def test_targets_are_judged(value, said):
    case = {**numbers(), "summary": {"plain": {"median": value, "low": value, "high": value}}}
    assert cost_page._ratio(case, "plain") == f"{value:.3f} ({value:.3f} - {value:.3f}), targets 0.76 and 0.7: {said}"
    assert "target" not in cost_page._ratio({**case, "size": "tiny"}, "plain")


def test_stages_cover_the_run():
    assert train_step.stage_epochs(200, 3) == [(0, 66, 33), (66, 133, 99), (133, 200, 166)]
    assert train_step.stage_epochs(2, 3) == [(0, 1, 0), (1, 2, 1)]


@pytest.mark.parametrize("method", train_step.METHODS)
def test_our_step_is_a_step_of_the_trainers(method):
    """It updates every trained weight, and leaves no gradient; the mask is made for the epoch that is asked for."""
    torch.manual_seed(0)
    work = train_step.Workload(method, "tiny", None, train_step.parse(TINY))
    before = {name: value.detach().clone() for name, value in work.model.named_parameters() if value.requires_grad}
    assert work.step() > 0
    after = dict(work.model.named_parameters())
    assert all(not torch.equal(value, after[name]) for name, value in before.items() if "mask_token" not in name)
    assert all(value.grad is None for value in after.values())
    mask = work.make_masks(15, shortcut=False)
    assert (mask.sum(dim=1) == work.maskers[0].num_masked).all()
    assert work.maskers[0].epoch == 15


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


def test_clones_are_known_by_their_files_and_must_be_as_pinned(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match=f"--official {tmp_path}: no clone of"):
        official_models.find_clones([str(tmp_path)])
    (tmp_path / "models_mae.py").write_text("\n")
    with pytest.raises(BadInput, match="git does not know it"):
        official_models.find_clones([str(tmp_path)])
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "one")
    with pytest.raises(BadInput, match=f"not at the pinned {read_upstream('mae').commit[:12]}"):
        official_models.find_clones([str(tmp_path)])
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    pinned = official_models.read_upstream("mae")
    changed = type(pinned)(**{**vars(pinned), "commit": head.stdout.strip()})
    monkeypatch.setattr(official_models, "read_upstream", lambda name: changed)
    assert official_models.find_clones([str(tmp_path)]) == {"mae": Path(tmp_path).resolve()}
    (tmp_path / "models_mae.py").write_text("changed\n")
    with pytest.raises(BadInput, match=r"changed files: .*models_mae\.py"):
        official_models.find_clones([str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "named"), [(["--repeats", "0"], "--repeats"), (["--write", "/nowhere/cost.md"], "--write /nowhere/cost.md")]
)
def test_bad_flags_are_named(flags, named):
    with pytest.raises(BadInput, match=named):
        train_step.main([*TINY, *flags])
