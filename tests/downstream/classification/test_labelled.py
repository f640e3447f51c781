"""Labelled sources, subsets, and the transforms of classification."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common.training.data import IMAGENET_MEAN, IMAGENET_STD, RankBatches, Samples, make_loader
from common.training.errors import BadInput
from common.training.sources import DEBIAN_FASHION_MNIST, ArraySource
from downstream.classification.labelled import (
    FASHION_CLASSES,
    LabelledImages,
    LabelledSubset,
    augmentation,
    draw_subset,
    is_rand_augment,
    middle,
    open_labelled,
    posterized,
    same_classes,
)
from downstream.finetune import FinetuneConfig
from tests.downstream.labelled_folder import CLASSES, ONE, write_set


def config(**values: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "vit_tiny_patch4", "input_size": "16", "num_workers": 0, **values})


def photo(height: int = 41, width: int = 30, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def numbered(labels: list[int]) -> LabelledImages:
    """Image i is filled with i."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None].repeat(8, axis=1).repeat(8, axis=2)
    return LabelledImages(ArraySource(images, "made"), labels, [str(label) for label in sorted(set(labels))])


# --- sources ---


def test_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Classes are the sorted folders, hidden ones and files left out; images anywhere below them, sorted."""
    root = write_set(tmp_path)
    (root / "train" / ".hidden").mkdir()
    (root / "train" / "readme.txt").write_text("")
    (root / "train" / "cat" / "more").mkdir()
    photo().save(root / "train" / "cat" / "more" / "x.jpg")
    train, val = (open_labelled(config(data_path=str(root)), train=part) for part in (True, False))
    assert train.classes == val.classes == list(CLASSES)
    assert Counter(train.labels) == {label: 4 + (label == 2) for label in range(7)}
    for index in range(len(train)):
        assert f"/train/{CLASSES[train.labels[index]]}/" in train.name(index)
    image, label = val.load(4)
    assert (label, val.name(4)) == (1, str(root / "val" / "bee" / "1.png"))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(val.name(4))))
    same_classes(train, val, "x")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = b"\0\0\x08" + bytes([values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def test_fashion_mnist_files(tmp_path: Path) -> None:
    """Training and validation come from their own files, labels beside images."""
    generator, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 12), ("t10k", 5)):
        arrays[part] = generator.integers(0, 256, (count, 28, 28)), generator.integers(0, 10, count)
        for kind, values in zip(("images-idx3", "labels-idx1"), arrays[part], strict=True):
            write_idx(tmp_path / f"{part}-{kind}-ubyte.gz", values)
    named = config(dataset="fashion-mnist", data_path=str(tmp_path), input_size="28")
    for part, train in (("train", True), ("t10k", False)):
        labelled = open_labelled(named, train)
        assert labelled.labels == arrays[part][1].tolist()
        assert labelled.classes == list(FASHION_CLASSES)
        image = np.asarray(labelled.load(3)[0])
        assert np.array_equal(image, arrays[part][0][3, :, :, None].repeat(3, axis=2))
        assert labelled.name(3) == "fashion-mnist[3]"
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", arrays["train"][1][:-1])
    with pytest.raises(BadInput, match="--dataset fashion-mnist: 12 images, but 11 labels in --data_path"):
        open_labelled(named, True)


def test_fashion_mnist_of_debian() -> None:
    if not DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("apt-get install dataset-fashion-mnist")
    named = config(dataset="fashion-mnist", input_size="28")
    train, val = (open_labelled(named, train=part) for part in (True, False))
    assert Counter(train.labels) == dict.fromkeys(range(10), 6000)
    assert Counter(val.labels) == dict.fromkeys(range(10), 1000)
    # Trousers and bags are told apart by how many pixels they fill: names stand beside the right numbers.
    filled = [np.mean([np.asarray(val.load(i)[0]) > 0 for i in range(600) if val.labels[i] == label]) for label in (1, 8)]
    assert filled[0] < 0.4 < 0.5 < filled[1]


def test_what_has_no_labels_or_is_not_there(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", 1, 1)
    flat, bare = tmp_path / "flat", tmp_path / "bare"
    (flat / "train").mkdir(parents=True)
    photo().save(flat / "train" / "0.png")
    (bare / "train" / "empty").mkdir(parents=True)
    cases = [
        ({"dataset": "photos"}, "--dataset photos has no labels; give --data_path, or a named set"),
        ({}, "--data_path is needed: a folder with train/<class>/ and val/<class>/"),
        ({"data_path": str(tmp_path / "absent")}, r"--data_path .*absent: no folder .*absent/train \(expected train/<class>/"),
        ({"data_path": str(flat)}, r"no class folders in .*flat/train \(expected train/<class>/\*\)"),
        ({"data_path": str(bare)}, "no images in the class folders of .*bare/train"),
        ({"dataset": "cifar10", "data_path": str(tmp_path)}, "--dataset cifar10: cannot be read from --data_path .*--download"),
        ({"dataset": "stl10", "data_path": str(tmp_path)}, "--dataset stl10: cannot be read from --data_path .*--download"),
        ({"dataset": "fashion-mnist", "data_path": str(tmp_path)}, r"install Debian's dataset-fashion-mnist\).*--download"),
    ]
    for flags, message in cases:
        with pytest.raises(BadInput, match=message) as error:
            open_labelled(config(**flags), train=True)
        assert "\n" not in str(error.value)
    for folder in (root / "val").iterdir():
        folder.rename(tmp_path / folder.name)
    (root / "val").rmdir()
    with pytest.raises(BadInput, match=r"no folder .*set/val \(expected"):
        open_labelled(config(data_path=str(root)), train=False)


def test_classes_that_differ_are_named() -> None:
    train, val = numbered([0, 1]), numbered([0, 1])
    val.classes = ["0", "new"]
    with pytest.raises(BadInput, match="--data_path here: train and val have different classes: 1, new"):
        same_classes(train, val, "here")


# --- subsets ---


def test_subset_is_even_and_drawn_by_the_seed() -> None:
    labelled = numbered([0] * 20 + [1] * 9 + [2] * 2 + [3] * 30)
    assert draw_subset(labelled, 0, 0) is labelled
    for count, shares in ((4, [1, 1, 1, 1]), (8, [2, 2, 2, 2]), (20, [6, 6, 2, 6]), (60, [19, 9, 2, 30])):
        drawn = [draw_subset(labelled, count, seed) for seed in (0, 0, 1)]
        assert all(isinstance(subset, LabelledSubset) for subset in drawn)
        indices = [subset.indices for subset in drawn]  # type: ignore[union-attr]
        assert indices[0] == indices[1] == sorted(set(indices[0]))
        assert indices[0] != indices[2]
        counts = Counter(labelled.labels[index] for index in indices[0])
        assert all(abs(counts[label] - share) <= (count in (20, 60)) for label, share in enumerate(shares))
    subset = draw_subset(labelled, 8, 5)
    for place, index in enumerate(subset.indices):  # type: ignore[union-attr]
        image, label = subset.load(place)
        assert (np.asarray(image)[0, 0, 0], label) == (index, labelled.labels[index])
        assert subset.name(place) == f"made[{index}]"
    assert draw_subset(labelled, 61, 0).indices == list(range(61))  # type: ignore[union-attr]
    with pytest.raises(BadInput, match="--subset 62: there are 61 training images"):
        draw_subset(labelled, 62, 0)


def test_a_larger_subset_holds_the_smaller_one() -> None:
    labelled = numbered([0, 1, 2] * 20)
    small, large = (set(draw_subset(labelled, count, 3).indices) for count in (9, 30))  # type: ignore[union-attr]
    assert small < large


# --- transforms ---


@pytest.mark.parametrize("shape", [(41, 30), (30, 41), (24, 24), (64, 37), (16, 61), (333, 500)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("share", [0.875, 1.0, 0.9])
def test_middle_is_that_of_torchvision(shape: tuple[int, int], interpolation: str, share: float) -> None:
    """Square inputs: Resize of the shorter side to floor(size / share), then CenterCrop; to the bit."""
    image = photo(*shape)
    made, label = middle(config(crop_pct=share, interpolation=interpolation))((image, 3))
    official = transforms.Compose(
        [
            transforms.Resize(int(16 / share), interpolation=InterpolationMode(interpolation)),
            transforms.CenterCrop(16),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    assert torch.equal(made, official(image))
    assert (int(label), label.dtype) == (3, torch.int64)


@pytest.mark.parametrize("shape", [(41, 30), (30, 41), (24, 48), (48, 24), (7, 90)])
def test_middle_covers_inputs_that_are_not_square(shape: tuple[int, int]) -> None:
    """A crop of 16 x 32 holds nothing from outside the image, and the aspect is kept to a pixel."""
    transform = middle(config(input_size="16x32", crop_pct=1.0))
    image = Image.new("RGB", shape[::-1], (255, 255, 255))
    made, _ = transform((image, 0))
    assert made.shape == (3, 16, 32)
    assert made.flatten(1).std(dim=1).max() == 0
    resized = transform.transform.transforms[0](image)  # type: ignore[attr-defined]
    assert resized.height >= 16
    assert resized.width >= 32
    assert min(resized.height - 16, resized.width - 32) == 0
    assert abs(resized.height * shape[1] - resized.width * shape[0]) <= max(shape)


def sample(transform: Any, seed: int, epoch: int, index: int) -> torch.Tensor:
    views, *_ = Samples(LabelledImages(Photos(), list(range(12)), [""] * 12), transform, seed)[(epoch, index)]
    assert views is not None
    return views[0]


class Photos:
    def __len__(self) -> int:
        return 12

    def load(self, index: int) -> Image.Image:
        return photo(seed=index)

    def name(self, index: int) -> str:
        return str(index)


def test_augmentation_belongs_to_seed_epoch_and_index() -> None:
    """Every one of the three changes it, and the state of the three global generators does not."""
    transform = augmentation(config(random_erasing=0.5))
    first = sample(transform, 0, 1, 2)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(first, sample(transform, 0, 1, 2))
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(first, sample(transform, *other))


def test_augmentation_is_the_same_for_any_number_of_workers() -> None:
    """RandAugment draws from Python's and numpy's generators; those of a worker do not matter."""
    seen = []
    for workers in (0, 1, 2):
        flags = config(num_workers=workers, batch_size=3, random_erasing=0.5)
        samples = Samples(LabelledImages(Photos(), list(range(12)), [""] * 12), augmentation(flags), 0)
        batches = RankBatches(len(samples), flags, ONE)
        loader = make_loader(samples, batches, flags, ONE)
        seen.append([batch for epoch in (0, 1) if batches.start_at(epoch) is None for batch in loader])  # type: ignore[func-returns-value]
    for other in seen[1:]:
        assert len(other) == 8
        for batch, same in zip(seen[0], other, strict=True):
            assert torch.equal(batch.images, same.images)
            assert torch.equal(batch.views[1], same.views[1])
            assert torch.equal(batch.views[1], batch.sample_ids)
    assert not torch.equal(seen[0][0].images, seen[0][4].images)


def test_rand_augment_is_that_of_the_official_recipes() -> None:
    """Two of fifteen operations that grow with the magnitude, 9 with spread .5, and the interpolation of the crop."""
    steps = augmentation(config()).transform.transforms  # type: ignore[attr-defined]
    chosen = next(step for step in steps if type(step).__name__ == "RandAugment")
    assert (chosen.num_layers, len(chosen.ops)) == (2, 15)
    for op in chosen.ops:
        assert isinstance(op, AugmentOp)
        assert (op.magnitude, op.magnitude_std, op.kwargs["resample"]) == (9, 0.5, Image.Resampling.BICUBIC)
        assert op.kwargs["fillcolor"] == (124, 116, 104)
    names = [
        type(step).__name__ for step in augmentation(config(auto_augment="", color_jitter=0.4, flip=False)).transform.transforms
    ]  # type: ignore[attr-defined]
    assert names == ["RandomResizedCrop", "ColorJitter", "ToTensor", "Normalize", "RandomErasing"]


@pytest.mark.parametrize("magnitude", [0, 9, 10])
def test_every_operation_of_rand_augment_runs(magnitude: int) -> None:
    """timm 0.4.12 is older than the Pillow and numpy beside it. 10 is its strongest, which a spread of 0.5 around 9 reaches."""
    words = f"rand-m{magnitude}-n1-inc1"
    steps = augmentation(config(auto_augment=words, random_erasing=0)).transform.transforms  # type: ignore[attr-defined]
    for op in next(step for step in steps if type(step).__name__ == "RandAugment").ops:
        op.prob = 1.0
        assert op(photo()).size == (30, 41)


def test_posterized_keeps_the_upper_bits() -> None:
    pixels = np.array(photo())
    for bits in range(9):
        expected = pixels >> (8 - bits) << (8 - bits) if bits else np.zeros_like(pixels)
        assert np.array_equal(np.array(posterized(photo(), bits, resample=3)), expected), bits


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("rand-m9-mstd0.5-inc1", True),
        ("rand-n3-m5", True),
        ("rand", True),
        ("rand-m9-w0", True),
        ("v0", False),
        ("rand-x5", False),
        ("rand-m9-mst0.5", False),
        ("rand-strong", False),
        ("augmix-m5", False),
    ],
)
def test_words_of_rand_augment(words: str, known: bool) -> None:
    assert is_rand_augment(words) == known
    if known:
        assert augmentation(config(auto_augment=words))((photo(), 1))[0].shape == (3, 16, 16)
        return
    with pytest.raises(BadInput, match=r"--auto_augment must be a RandAugment of timm such as rand-m9-mstd0\.5-inc1, or empty"):
        config(auto_augment=words)


def test_erasing_covers_between_a_fiftieth_and_a_third() -> None:
    """Noise of mean 0 and spread 1, in a share of the images."""
    transform = augmentation(config(auto_augment="", flip=False, crop_scale=(1.0, 1.0), random_erasing=0.5, input_size="64"))
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    torch.manual_seed(0)
    shares, noise = [], []
    for _ in range(200):
        made, _ = transform((grey, 0))
        changed = (made != made.flatten(1).mode(dim=1).values[:, None, None]).any(dim=0)
        shares.append(float(changed.float().mean()))
        noise.append(made[:, changed].flatten())
    erased = [share for share in shares if share]
    assert 80 < len(erased) < 120
    assert 0.015 < min(erased) < 0.06 < 0.25 < max(erased) < 0.35
    values = torch.cat(noise)
    assert abs(float(values.mean())) < 0.02
    assert abs(float(values.std()) - 1) < 0.02
