"""The benchmark of loading at a tiny size: it runs, and its numbers are what they say they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import loading
from benchmarks.train_step import config_of
from common.training.augment import colours, normalise
from common.training.data import seeded
from common.training.errors import BadInput
from common.training.listing import find_images
from common.training.sources import PhotoSource


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ratios are of the seconds of a turn; the loaders differ by rounding; every name of the tree is found."""
    flags = ["--only", "mae,beit", "--images", "3", "--repeats", "2", "--names", "30", "--json", str(tmp_path / "numbers.json")]
    record = loading.main(flags)
    assert json.loads((tmp_path / "numbers.json").read_text()) == record
    for case, views in zip(record["cases"], (1, 2), strict=True):
        seconds = case["seconds"]
        turns = [first / second for first, second in zip(seconds["ours"], seconds["official"], strict=True)]
        assert case["ratio"]["median"] == pytest.approx(sum(turns) / 2)
        assert case["images_a_second"]["ours"] == pytest.approx(3 / (sum(seconds["ours"]) / 2))
        assert len(case["grey_levels"]) == views
        assert all(0 < levels["mean"] < 1 <= levels["max"] for levels in case["grey_levels"])
    assert record["names"]["names"] == 30
    said = capsys.readouterr().out
    assert f"mae: ours / official {record['cases'][0]['ratio']['median']:.3f}" in said
    assert "30 names: scanned in" in said


def test_its_images_are_imagenets_and_its_official_transforms_are_ours_by_pil(tmp_path: Path) -> None:
    """Without a clone: the same views as the trainers' with PIL, at the same seeds (BEiT, and MAE). Seed 4."""
    loading.make_images(tmp_path, 5, 0)
    paths = find_images(tmp_path)
    assert {path.parent.name for path in paths} == {f"class_{number}" for number in range(4)}
    assert all(Image.open(path).size == (500, 375) for path in paths)
    image = PhotoSource().load(0)
    for method in ("mae", "beit"):
        config = config_of(method, "small")
        with seeded(4):
            official = loading.official_transform(method, config, None)(image)
        with seeded(4):
            ours = loading.our_transform(config)(image)
        if method == "mae":
            assert torch.equal(official, normalise(ours))
        else:
            assert torch.equal(official[0], normalise(ours[0]))
            assert torch.equal(official[1], colours(ours[1]))


def test_wrong_flags_are_named() -> None:
    with pytest.raises(BadInput, match="--repeats must be 1 or more, got 0"):
        loading.main(["--repeats", "0"])
