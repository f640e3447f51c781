"""Parts against true objects: scores by hand and by scikit-learn, scenes as written, and the whole command on a tiny run."""

import json
import math

import numpy as np
import pytest
import torch

from benchmarks import part_scores, parts_quality, parts_study
from benchmarks.part_scores import best_overlap, patch_objects, read_scenes, score_parts
from common.training.errors import BadInput
from scenes.layouts import run_lengths
from scenes.make import make_scenes
from tests import methods
from tests.conftest import assert_same, write_images

GRID = (2, 3)
TRUTH = np.array([0, 1, 1, 0, 1, 2])


def test_scores_of_the_objects_themselves():
    """Parts that are the objects have the best of every score, whatever their numbers are."""
    scores = score_parts(np.array([7, 3, 3, 7, 3, 5]), TRUTH, GRID)
    assert (scores.homogeneity, scores.rand, scores.information, scores.overlap) == pytest.approx((1, 1, 1, 1))
    assert (scores.pieces, scores.filled) == (1, 3)
    assert scores.single == pytest.approx(1 / 3)  # the object 2 is a single patch


def test_one_part_and_a_part_a_patch():
    """One part for all says nothing; a part for every patch is homogeneous, and agrees with nothing."""
    together, apart = score_parts(np.zeros(6, dtype=int), TRUTH, GRID), score_parts(np.arange(6), TRUTH, GRID)
    assert (together.homogeneity, together.rand, together.information) == pytest.approx((0, 0, 0))
    assert together.overlap == pytest.approx((3 / 6 + 1 / 6) / 2)
    assert (apart.homogeneity, apart.rand) == pytest.approx((1, 0))
    assert (apart.single, apart.pieces, apart.filled) == (1, 1, 6)


def test_best_overlap_by_hand():
    """Object 1 (patches 1, 2, 4): part 1 has two of them and one other, 2 of 4; object 2 (patch 5) is half of its part."""
    assert best_overlap(np.array([0, 1, 1, 1, 2, 2]), TRUTH) == pytest.approx((2 / 4 + 1 / 2) / 2)
    assert math.isnan(best_overlap(np.zeros(6, dtype=int), np.zeros(6, dtype=int)))


def test_an_image_without_objects_does_not_count():
    """The mean of `overlap` is over images that have objects."""
    empty = score_parts(np.array([0, 0, 0, 1, 1, 1]), np.zeros(6, dtype=int), GRID)
    whole = score_parts(TRUTH, TRUTH, GRID)
    assert part_scores.mean_scores([empty, whole]).overlap == 1
    assert part_scores.mean_scores([empty, whole]).filled == 2.5


def test_patch_objects_by_hand():
    """The object of most pixels; 4 x 6 pixels in patches of 2 x 2."""
    objects = np.array([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], [3, 3, 0, 0, 2, 2], [3, 0, 0, 0, 2, 2]])
    assert patch_objects(objects, (2, 3)).tolist() == [0, 1, 2, 3, 0, 2]


def test_object_map_inverts_the_run_lengths():
    """Masks of COCO's json come back as they were (seed 0)."""
    objects = np.random.default_rng(0).integers(0, 4, (5, 7))
    segments = [{"counts": run_lengths(objects == index)} for index in (1, 2, 3)]
    assert np.array_equal(part_scores._object_map(segments, 5, 7), objects)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of one tiny run: MAE with two blocks, one epoch of eight scenes of drawn shapes."""
    out = tmp_path_factory.mktemp("study")
    make_scenes(out / "scenes", train=8, val=6, size=64, sources="shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_study, "DEPTH", 2)
        with parts_study.shallow_models():
            parts_study.pretrain(out, "mae", "random", seed=3, epochs=1, batch_size=4)
    return out


def test_read_scenes(study):
    """Pictures and objects of the validation scenes; every scene has an object and a background."""
    scenes = read_scenes(study / "scenes", 6)
    assert [picture.shape for picture in scenes.pictures] == [(64, 64, 3)] * 6
    assert all(0 < (objects > 0).mean() < 1 for objects in scenes.objects)
    with pytest.raises(BadInput, match="has 6 scenes of val2017, 7 are wanted"):
        read_scenes(study / "scenes", 7)
    with pytest.raises(BadInput, match="no scenes there"):
        read_scenes(study / "nothing", 1)


def test_the_command(study, tmp_path, capsys):
    """Signals, controls, and K down the table; the numbers of the JSON are the scores of the very parts."""
    checkpoint = study / "mae-random-3" / "checkpoint-last.pth"
    files = f"--json {tmp_path}/table.json --markdown {tmp_path}/table.md --picture {tmp_path}/table.png"
    chosen = ["--signals", "attention 1,tokens 1,keys 0"]
    parts_quality.main([str(checkpoint), *f"--scenes {study}/scenes --count 6 --parts 8,4 {files}".split(), *chosen])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    measured = ["attention 1", "keys 0", "keys 0, heads select", "tokens 1", "tokens 1, no position", "tokens 1, vectors"]
    controls = ["coordinates", "pixels", "random labels", "untrained attention all", "untrained tokens 1"]
    measured += [f"tokens 1, smooth {beta}" for beta in (1, 8, 32)]
    assert sorted({row["signal"] for row in rows}) == sorted(measured + controls)
    assert {(row["method"], row["mask"], row["seed"], row["images"]) for row in rows} == {("MAE", "random", 3, 8)}
    scores = {(row["signal"], row["num_parts"]): row["scores"] for row in rows}
    assert scores["random labels", 4]["rand"] < 0.1 < scores["pixels", 4]["rand"]
    assert scores["tokens 1, smooth 32", 4]["pieces"] < scores["tokens 1", 4]["pieces"]
    assert scores["coordinates", 4]["pieces"] < scores["random labels", 4]["pieces"]
    assert (tmp_path / "table.md").read_text().strip() in capsys.readouterr().out
    assert "| 4 | tokens 1, vectors |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "table.png").stat().st_size > 1000


def test_a_signal_is_what_a_run_would_read(study):
    """`tokens 0` is the graph that a mask with --graph tokens --layers 0 is made from."""
    trained = parts_quality.load_trained(study / "mae-random-3" / "checkpoint-last.pth")
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    config = parts_quality.signals_of(2)["tokens 0"]
    assert (config.graph, config.layers) == ("tokens", "0")
    with torch.no_grad():
        tokens = next(iter(trained.model.eval().signal(images, "tokens", [0])))[:, 1:]
    centred = torch.nn.functional.normalize(tokens - tokens.mean(dim=1, keepdim=True), dim=2)
    torch.testing.assert_close(parts_quality.graph_of(trained.model, images, config), centred @ centred.transpose(1, 2))


@pytest.mark.parametrize("method", ["beit", "simmim"])
def test_models_of_every_method_are_read(tmp_path, method, monkeypatch):
    """Weights of a short run come back, with depth and vocabulary, and give signals that an untrained one does not (seed 0)."""
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images", 4)
    for models, name, model in methods.shallow_models():
        monkeypatch.setitem(models, name, model)
    run = f"{methods.flags(method, tmp_path / 'images', tmp_path)} --epochs 1 --warmup_epochs 0 --output_dir {tmp_path / 'run'}"
    methods.MAINS[method](run.split())
    trained = parts_quality.load_trained(tmp_path / "run" / "checkpoint-last.pth")
    saved = torch.load(tmp_path / "run" / "checkpoint-last.pth", weights_only=True)["model"]
    assert_same(dict(trained.model.state_dict()), saved)
    assert (trained.depth, trained.mask, trained.images) == (3, "evolved", 4)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    untrained = parts_quality.build_untrained(trained.method, trained.config, trained.sizes, seed=1)
    config = parts_quality.signals_of(3)["keys 2"]
    graphs = [parts_quality.graph_of(model, images, config) for model in (trained.model, untrained)]
    assert graphs[0].shape == (2, 16, 16)
    assert not torch.allclose(*graphs)


def test_seeds_are_put_together():
    """Mean and standard deviation over the runs that differ in their seed alone."""
    rows = [
        parts_quality.Row("MAE", "random", seed, 4, 100, "tokens 0", 8, dict.fromkeys(part_scores.SCORES, value))
        for seed, value in enumerate((1.0, 2.0, 6.0))
    ]
    (summary,) = parts_quality.summarise(rows)
    assert summary["seeds"] == 3
    assert summary["mean"]["rand"] == 3
    assert summary["spread"]["rand"] == pytest.approx(math.sqrt(7))


def test_best_blocks():
    """One row a signal, whichever block it was; options of a signal make it another one."""
    values = {"tokens 0": 0.2, "tokens 1": 0.5, "tokens all": 0.3, "tokens 1, vectors": 0.1, "keys 0": 0.4, "coordinates": 0.6}
    rows = [
        parts_quality.Row("MAE", "random", 0, 4, 100, signal, 8, dict.fromkeys(part_scores.SCORES, value))
        for signal, value in values.items()
    ]
    best = parts_quality.best_blocks(parts_quality.summarise(rows))
    assert [row["signal"] for row in best] == ["tokens 1", "tokens 1, vectors", "keys 0", "coordinates"]


def test_the_cut_is_that_of_the_options():
    """The options of each name are those of the cut."""
    signals = parts_quality.signals_of(2)
    assert signals["attention all, recipe authors"].parts_options.estimator == "vmf"
    assert signals["attention all, cut of version 0.1.0"].parts_options.start == "kmeans++"
    assert signals["attention all, smooth 8"].parts_options.smooth == 8


def test_bad_input(study, tmp_path):
    """A tokenizer's checkpoint, scenes of another size, an empty folder: each is named."""
    with pytest.raises(BadInput, match=r"no checkpoint-last\.pth"):
        parts_quality.main([str(tmp_path), "--scenes", str(study / "scenes")])
    torch.save({"model": {}, "config": {"model": "other"}}, tmp_path / "other.pth")
    with pytest.raises(BadInput, match="is not of a pre-training run"):
        parts_quality.load_trained(tmp_path / "other.pth")
    with pytest.raises(BadInput, match="--parts"):
        parts_quality.main([str(study), "--scenes", str(study / "scenes"), "--parts", "40,x"])
