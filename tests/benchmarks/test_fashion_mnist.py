"""The Fashion-MNIST benchmark: its parts, and that a run of a few made-up images goes through."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

import downstream.vit
import mae_evolved.model
from benchmarks import fashion_mnist
from common.training.errors import BadInput
from common.training.sources import read_idx
from downstream.probing.knn import knn_votes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The four files: bars whose height in the image is their class."""
    folder, generator = tmp_path / "source", np.random.default_rng(0)
    folder.mkdir()
    for part, count in (("train", 60000), ("t10k", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        images = np.zeros((count, 28, 28), dtype=np.uint8)
        rows = np.arange(28)[None] - 2 * labels[:, None].astype(int)
        bars = (rows >= 0) & (rows < 3)  # a bar of three rows, lower for each class
        images[:, :, 4:24] = (bars * generator.integers(100, 256, (count, 1)))[:, :, None]
        fashion_mnist.write_idx(folder / f"{part}-images-idx3-ubyte.gz", images)
        fashion_mnist.write_idx(folder / f"{part}-labels-idx1-ubyte.gz", labels)
    return folder


def test_drawn_data_keep_their_labels(source: Path, tmp_path: Path) -> None:
    fashion_mnist.draw_data(source, tmp_path / "drawn", seed=3, train=50, val=20)
    images = read_idx(tmp_path / "drawn" / "train-images-idx3-ubyte.gz")
    labels = read_idx(tmp_path / "drawn" / "train-labels-idx1-ubyte.gz")
    assert images.shape == (50, 28, 28)
    assert (images[:, :, 5].argmax(axis=1) == 2 * labels).all()
    assert read_idx(tmp_path / "drawn" / "t10k-labels-idx1-ubyte.gz").tolist() == [*range(10), *range(10)]
    fashion_mnist.draw_data(source, tmp_path / "other", seed=4, train=50, val=20)
    assert (read_idx(tmp_path / "other" / "train-labels-idx1-ubyte.gz") != labels).any()


def test_votes_on_pixels_are_those_of_the_probe() -> None:
    generator = np.random.default_rng(0)
    bank, labels, queries = generator.random((40, 6)), generator.integers(0, 4, 40), generator.random((9, 6))
    near = KNeighborsClassifier(7, metric="cosine", weights=fashion_mnist.vote).fit(bank, labels)
    votes = knn_votes(torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), 7, 4)
    np.testing.assert_allclose(near.predict_proba(queries), (votes / votes.sum(1, keepdim=True)).numpy(), atol=1e-9)


def test_table_of_known_rows() -> None:
    layers = {f"{kind}_layer{layer}": 10.0 * layer for kind in ("top1", "knn20") for layer in range(4)}
    rows = [
        {
            "MAE, evolved masks": {"k-NN": 80.0 + seed, "linear": 70.0, "fine-tuned": 60.0, **layers},
            "random weights": {"k-NN": 50.0, "linear": 40.0, "fine-tuned": 30.0, **layers},
            "raw pixels": {"k-NN": 75.0, "linear": 65.0, "linear, few labels": 55.0},
        }
        for seed in (0, 1, 2)
    ]
    said = fashion_mnist.table(rows, fashion_mnist.argparse.Namespace(val_images=9, train_images=8, labels=7))
    assert "| MAE, evolved masks | 81.0 ± 1.0 | 70.0 ± 0.0 | 60.0 ± 0.0 |" in said
    assert "| raw pixels | 75.0 ± 0.0 | 65.0 ± 0.0 | - |" in said
    assert "with 7 labels: 55.0 ± 0.0." in said
    assert "| 3 | 30.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 | 30.0 ± 0.0 |" in said


@pytest.mark.slow
def test_one_seed_goes_through(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixels of these images give their class away, and every row has its numbers."""
    for models, name in ((mae_evolved.model.MODELS, "mae_vit_tiny_patch4"), (downstream.vit.MODELS, "vit_tiny_patch4")):
        monkeypatch.setitem(models, name, models[name])  # type: ignore[arg-type, index]
    words = (
        f"--data_path {source} --train_images 256 --val_images 40 --labels 64 --pretrain_epochs 1 --finetune_epochs 1 --jobs 1"
    )
    flags = fashion_mnist.parse(words.split())
    rows = fashion_mnist.run_seed(flags, 0, tmp_path / "work")
    assert min(rows["raw pixels"]["linear"], rows["raw pixels"]["k-NN"]) > 90
    for name in ("MAE, evolved masks", "random weights"):
        assert {"k-NN", "linear", "fine-tuned", "top1_layer0", "knn20_layer3"} <= rows[name].keys()
        assert all(0 <= value <= 100 for value in rows[name].values())
    assert (tmp_path / "work" / "seed0" / "pretrained" / "probe" / "layers.png").is_file()


def test_no_data_is_said() -> None:
    with pytest.raises(
        BadInput, match=r"--data_path /absent: no train-images-idx3-ubyte.gz .apt-get install dataset-fashion-mnist"
    ):
        fashion_mnist.parse(["--data_path", "/absent"])
