"""Agreement of kept parts: by hand, and the whole command on a tiny run. Seeds are given in each test."""

import json

import pytest
import torch

from beit_evolved.tokenizer import OWN_FILE, DiscreteVAE
from benchmarks import kept_parts
from benchmarks.kept_parts import Agreement, agree, by_every, largest, mean
from common.training.errors import BadInput
from scenes.make import make_scenes


def test_agreement_of_part_maps():
    """1 for the same parts under other numbers; of the second image by hand: no pair of patches is together in both."""
    first, second = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]), torch.tensor([[5, 5, 2, 2], [0, 1, 0, 1]])
    assert agree(first[:1], second[:1]) == Agreement(1.0, 1.0)
    assert agree(first[1:], second[1:]).rand == pytest.approx(-0.5)  # (0 - 2/3) / (2 - 2/3)
    assert agree(first, second).rand == pytest.approx(0.25)
    shares = mean([Agreement(0.2, 0.4), Agreement(0.4, 0.8)]).over(Agreement(0.6, 1.2))
    assert (shares.rand, shares.information) == pytest.approx((0.5, 0.5))


def test_the_largest_R_is_that_of_the_mean_over_its_ages():
    """Shares 1, 0.8, 0.54 of ages 0, 1, 2: 1, 0.9 and 0.78 on average."""
    rows = [{"whole_share": {"rand": share}, "crop_share": {"rand": share / 2}} for share in (1.0, 0.8, 0.54)]
    table = by_every(rows)
    assert [row["whole"] for row in table] == pytest.approx([1.0, 0.9, 0.78])
    assert largest(table, "whole") == 2
    assert largest(table, "crop") == 0


@pytest.mark.parametrize("method", ["mae", "beit"])
def test_the_whole_command(tmp_path, capsys, monkeypatch, method):
    """Two blocks, 32 scenes, 4 epochs (seed 0): every number is there, and those that must be are in their range."""
    monkeypatch.setattr(kept_parts, "DEPTH", 2)
    monkeypatch.setattr(kept_parts, "EVERY", (0, 2))
    make_scenes(tmp_path / "scenes", train=32, val=16, size=64, sources="shapes", workers=1)
    arguments = [str(tmp_path / "scenes"), "--method", method, "--epochs", "4", "--count", "4", "--json", f"{tmp_path}/all.json"]
    if method == "beit":
        torch.manual_seed(0)
        torch.save({"weights": DiscreteVAE(16, 8, 1, 8).state_dict()}, tmp_path / OWN_FILE)
        arguments += ["--tokenizer", str(tmp_path)]
    result = kept_parts.main(arguments)
    assert json.loads((tmp_path / "all.json").read_text())["runs"] == result["runs"]
    assert [row["age"] for row in result["ages"]] == [0, 1]
    assert result["ages"][0]["whole_share"]["rand"] == pytest.approx(1.0)  # no time has passed: two draws
    assert all(0 < row["crop_share"]["rand"] < 1.2 for row in result["ages"])
    runs = {row["run"]: row for row in result["runs"]}
    assert runs["R = 2"]["passes"] < runs["fresh"]["passes"]
    assert all(0 <= row["probe"] <= 1 for row in runs.values())
    assert ("step" in runs) == (method == "beit")
    assert (runs["fresh"]["held_out_loss"] is None) == (method == "beit")
    if method == "beit":
        assert runs["step"]["passes"] == 0
        assert 0 < result["step"]["patches_seen_before"] < 1
    assert "Largest R above 0.8" in capsys.readouterr().out


def test_a_folder_without_scenes_is_named(tmp_path):
    with pytest.raises(BadInput, match="no scenes there"):
        kept_parts.main([str(tmp_path)])
