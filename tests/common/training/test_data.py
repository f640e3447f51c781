"""Sources, samples and their order. Seeds: the configurations below use seed 0 unless they say otherwise."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.training.config import TrainConfig
from common.training.data import (
    RankBatches,
    RefusedSample,
    Samples,
    check_usable,
    count_workers,
    denormalise,
    make_loader,
    picture_transform,
    seeded,
    training_transform,
)
from common.training.distributed import Processes
from common.training.errors import BadInput, RankError
from common.training.listing import find_images
from common.training.sources import DEBIAN_FASHION_MNIST, PHOTOS, FileSource, open_source, read_idx_images
from tests.conftest import write_images

CPU = torch.device("cpu")
ONE = Processes(0, 1, 0, CPU)


def make_config(**values: object) -> TrainConfig:
    return TrainConfig(**{"input_size": "16", "batch_size": 2, **values})  # type: ignore[arg-type]


def make_samples(folder: Path, config: TrainConfig) -> Samples:
    return Samples(FileSource(find_images(folder)), training_transform(config), config.seed, config.repeat)


# --- sources ---


def test_imagenet_folder_flat_folder_and_classes_at_the_root(tmp_path: Path) -> None:
    """train/<class>/ wins; without it <class>/; without classes the images of the folder itself. All sorted."""
    for place in ("train/b", "train/a", "val/c"):
        write_images(tmp_path / "imagenet" / place, 2)
    assert [path.parent.name for path in find_images(tmp_path / "imagenet")] == ["a", "a", "b", "b"]
    assert len(find_images(tmp_path / "imagenet" / "train")) == 4
    write_images(tmp_path / "flat", 3)
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    assert [path.name for path in find_images(tmp_path / "flat")] == ["image_00.jpg", "image_01.jpg", "image_02.jpg"]
    write_images(tmp_path / "flat_train" / "train", 1)
    assert len(find_images(tmp_path / "flat_train")) == 1


def test_photographs_beside_a_subfolder_are_all_used(tmp_path: Path) -> None:
    """66 in the folder and one in a subfolder of it: 67, in the order folder, subfolders; said in one line."""
    write_images(tmp_path, 66)
    write_images(tmp_path / "best", 1)
    source = open_source(make_config(data_path=str(tmp_path)))
    assert len(source) == 67
    assert [Path(source.name(index)).relative_to(tmp_path).as_posix() for index in (0, 65, 66)] == [
        "image_00.jpg", "image_65.jpg", "best/image_00.jpg",
    ]  # fmt: skip
    assert source.summary == f"67 image files in 2 folders under {tmp_path}; passed over: none"


def test_what_is_passed_over_is_counted_with_the_reason(tmp_path: Path) -> None:
    write_images(tmp_path / "a" / "deep", 2)
    for name in ("notes.txt", "b.HEIC", "c.heic", "README", ".hidden.jpg", "a/.d.jpg", "a/e.txt"):
        (tmp_path / name).write_text("")
    write_images(tmp_path / ".cache", 3)
    write_images(tmp_path / "outside", 1)
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "linked").symlink_to(tmp_path / "outside")
    (tmp_path / "good.jpg").symlink_to(tmp_path / "outside" / "image_00.jpg")
    source = open_source(make_config(data_path=str(tmp_path)))
    names = [Path(source.name(index)).relative_to(tmp_path).as_posix() for index in range(len(source))]
    assert names == ["good.jpg", "a/deep/image_00.jpg", "a/deep/image_01.jpg", "linked/image_00.jpg", "outside/image_00.jpg"]
    assert source.summary == (
        f"5 image files in 4 folders under {tmp_path}; passed over: 3 hidden, 1 links that lead nowhere, 1 links to folders, "
        "1 without an ending, 4 of other kinds (.heic 2, .txt 2)"
    )


def test_a_folder_named_train_among_photographs_is_refused(tmp_path: Path) -> None:
    """ImageNet has images in train/ only; a few beside them are passed over and said, many are a folder of photographs."""
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path, 1)
    assert open_source(make_config(data_path=str(tmp_path))).summary.endswith(f"passed over: 1 image beside {tmp_path}/train")
    write_images(tmp_path, 5)
    with pytest.raises(BadInput, match=r"5 images lie beside the folder train, which holds 2 and would be read alone"):
        find_images(tmp_path)


def test_folders_without_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"empty: no images in .*empty/train \(passed over: none; images end in .jpg"):
        find_images(tmp_path / "empty")
    (tmp_path / "empty" / "train" / "bird").mkdir()
    (tmp_path / "empty" / "train" / "bird" / "a.heic").write_text("")
    with pytest.raises(BadInput, match=r"no images in .*empty/train \(passed over: 1 of other kinds \(.heic 1\); images end in"):
        find_images(tmp_path / "empty")


def test_embedded_photographs() -> None:
    """Every listed photograph is in the installed wheels, in colour order RGB, at most 512 px."""
    source = open_source(make_config())
    assert len(source) == sum(map(len, PHOTOS.values())) == 14
    for index in range(len(source)):
        image = source.load(index)
        assert image.mode == "RGB"
        assert max(image.size) <= 512
    astronaut = np.asarray(source.load(0), dtype=float).mean(axis=(0, 1))
    assert astronaut[0] > astronaut[2]  # an orange suit: more red than blue


def test_fashion_mnist_in_the_debian_layout(tmp_path: Path) -> None:
    """Gzipped IDX: values come out as written; a cut file is refused by name."""
    pixels = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    header = struct.pack(">iiii", 2051, 2, 3, 4)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    assert np.array_equal(read_idx_images(tmp_path), pixels)
    source = open_source(make_config(dataset="fashion-mnist", data_path=str(tmp_path)))
    assert source.load(1).getpixel((2, 1)) == (18, 18, 18)
    assert source.name(1) == "fashion-mnist[1]"
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()[:-1]))
    with pytest.raises(BadInput, match=r"train-images-idx3-ubyte\.gz: not an IDX file of bytes, or cut short"):
        read_idx_images(tmp_path)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.exists(), reason="run: apt-get install dataset-fashion-mnist")
def test_fashion_mnist_of_debian() -> None:
    """The installed package: 60,000 images of 28 x 28, the mean that its authors give (0.2860)."""
    images = read_idx_images(DEBIAN_FASHION_MNIST)
    assert images.shape == (60000, 28, 28)
    assert images.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
    assert len(open_source(make_config(dataset="fashion-mnist"))) == 60000


def test_cifar10_in_the_real_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cifar-10-batches-py as torchvision reads it; a missing set is one clear line."""
    from torchvision import datasets

    with pytest.raises(BadInput, match="--dataset cifar10: cannot be read from --data_path"):
        open_source(make_config(dataset="cifar10", data_path=str(tmp_path)))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3072), dtype=np.uint8)
    sums = []
    for index in range(5):
        raw = pickle.dumps({"data": pixels[index : index + 1], "labels": [index]})
        (folder / f"data_batch_{index + 1}").write_bytes(raw)
        sums.append([f"data_batch_{index + 1}", hashlib.md5(raw).hexdigest()])
    meta = pickle.dumps({"label_names": list("abcdefghij")})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", sums)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [])
    known = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(meta).hexdigest()}
    monkeypatch.setattr(datasets.CIFAR10, "meta", known)
    source = open_source(make_config(dataset="cifar10", data_path=str(tmp_path)))
    assert len(source) == 5
    assert np.array_equal(np.asarray(source.load(3)), pixels[3].reshape(3, 32, 32).transpose(1, 2, 0))


def test_stl10_in_the_real_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Column-major binary of train and unlabelled images, as torchvision reads it."""
    from torchvision import datasets

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)  # [n, colour, column, row]
    (folder / "train_X.bin").write_bytes(pixels[:2].tobytes())
    (folder / "train_y.bin").write_bytes(bytes([1, 2]))
    (folder / "unlabeled_X.bin").write_bytes(pixels[2:].tobytes())
    (folder / "class_names.txt").write_text("a\nb\n")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    source = open_source(make_config(dataset="stl10", data_path=str(tmp_path)))
    assert len(source) == 3
    assert np.array_equal(np.asarray(source.load(2)), pixels[2].transpose(2, 1, 0))


# --- samples ---


def test_a_sample_depends_on_seed_epoch_and_index_alone(image_folder: Path) -> None:
    config = make_config()
    samples = make_samples(image_folder, config)
    (first,), index, name, bad = samples[(3, 5)]
    torch.rand(100)  # the state of torch's generator does not matter
    assert torch.equal(first, samples[(3, 5)][0][0])
    assert (index, bad) == (5, [])
    assert name.endswith("train/bird/image_05.jpg")
    assert not torch.equal(first, samples[(4, 5)][0][0])
    other = make_samples(image_folder, make_config(seed=1))
    assert not torch.equal(first, other[(3, 5)][0][0])


def test_repeats_are_different_crops_of_one_image(image_folder: Path) -> None:
    samples = make_samples(image_folder, make_config(repeat=3))
    assert len(samples) == 48
    first, second = samples[(0, 2)], samples[(0, 18)]
    assert first[2] == second[2]
    assert not torch.equal(first[0][0], second[0][0])


def test_seeded_puts_the_generator_back() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(99):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(99):
        assert torch.equal(torch.rand(2), inside)


def test_crop_is_torchvisions_and_colours_come_back(image_folder: Path) -> None:
    """With crop_scale 1..1 on a square image and no flip the training view is the resized image."""
    image = Image.open(find_images(image_folder)[0]).convert("RGB").resize((20, 20))
    view = training_transform(make_config(crop_scale=(1.0, 1.0), flip=False))(image)
    expected = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    assert np.abs(denormalise(view).permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_picture_view_covers_non_square_sizes(image_folder: Path) -> None:
    view = picture_transform(make_config(input_size="16x24"))(Image.new("RGB", (50, 30), (255, 0, 0)))
    assert view.shape == (3, 16, 24)
    assert torch.allclose(denormalise(view)[0], torch.ones(16, 24))


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_keys_in_order(image_folder: Path, workers: int) -> None:
    config = make_config(num_workers=workers)
    samples = make_samples(image_folder, config)
    batches = RankBatches(len(samples), config, ONE)
    batches.start_at(2)
    loaded = list(make_loader(samples, batches, config, ONE))
    keys = [key for keys in batches for key in keys]
    assert [int(index) for batch in loaded for index in batch.sample_ids] == [index for _, index in keys]
    assert all(torch.equal(batch.images[0], samples[(2, int(batch.sample_ids[0]))][0][0]) for batch in loaded)


def test_unreadable_image_is_replaced_and_named(image_folder: Path) -> None:
    samples = make_samples(image_folder, make_config())
    path = Path(samples.source.name(4))
    path.write_bytes(path.read_bytes()[:100])
    views, index, name, bad = samples[(0, 4)]
    assert index == 4
    assert name != str(path)
    assert len(bad) == 1
    assert bad[0].startswith(str(path))
    assert torch.equal(views[0], samples[(0, 4)][0][0])


def test_a_refusal_comes_out_of_a_loaders_process(tmp_path: Path) -> None:
    """A sample that does not go with the flags has nothing in its place, and its own line ends the run."""

    class Picky(FileSource):
        def load(self, index: int) -> Image.Image:
            raise RefusedSample(f"{self.name(index)}: holds class 7, but there are 3 classes")

    write_images(tmp_path, 3)
    config = make_config(num_workers=1)
    samples = Samples(Picky(find_images(tmp_path)), training_transform(config), 0)
    (batch,) = list(make_loader(samples, RankBatches(3, config, ONE), config, ONE))
    with pytest.raises(RankError, match=r"^\S+image_0\d.jpg: holds class 7, but there are 3 classes$"):
        check_usable(batch)


def test_nothing_readable_gives_no_views(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    config = make_config(batch_size=1, num_workers=0)
    samples = make_samples(tmp_path, config)
    (batch,) = list(make_loader(samples, RankBatches(1, config, ONE), config, ONE))
    assert batch.views == ()
    assert "a.jpg" in batch.bad[0]
    with pytest.raises(RankError, match=r"^no readable image found, 1 were tried: \S+a.jpg: cannot identify image file"):
        check_usable(batch)


# --- order ---


def keys_of(config: TrainConfig, rank: int, world: int, length: int = 26) -> list[list[tuple[int, int]]]:
    batches = RankBatches(length, config, Processes(rank, world, rank, CPU))
    batches.start_at(1)
    return list(batches)


def test_each_update_sees_the_same_images_for_any_layout() -> None:
    """8 images an update: 1 rank x 8, 2 ranks x 4, 2 ranks x 2 x 2 accumulation steps, 4 accumulation steps x 2."""
    expected = [sorted(batch) for batch in keys_of(make_config(batch_size=8), 0, 1)]
    assert len(expected) == 3  # 26 // 8; the last 2 are left out
    for world, size, accum in [(2, 4, 1), (2, 2, 2), (1, 2, 4), (4, 1, 2)]:
        config = make_config(batch_size=size, accum_iter=accum)
        ranks = [keys_of(config, rank, world) for rank in range(world)]
        for update, images in enumerate(expected):
            steps = range(update * accum, (update + 1) * accum)
            assert sorted(key for rank in ranks for step in steps for key in rank[step]) == images


def test_order_changes_with_epoch_and_seed_and_covers_the_set() -> None:
    config = make_config(batch_size=13)
    batches = RankBatches(26, config, ONE)
    orders = []
    for epoch in range(2):
        batches.start_at(epoch)
        orders.append([index for keys in batches for _, index in keys])
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(26))
    assert orders[0] != orders[1]
    other = RankBatches(26, make_config(batch_size=13, seed=5), ONE)
    assert [index for keys in other for _, index in keys] != orders[0]


def test_start_in_the_middle_gives_the_rest() -> None:
    config = make_config(batch_size=4, accum_iter=2)
    batches = RankBatches(26, config, ONE)
    everything = list(batches)
    batches.start_at(0, 2)
    assert list(batches) == everything[4:]
    assert len(batches) == 2


def test_epoch_without_an_update_is_an_error() -> None:
    with pytest.raises(BadInput, match="nothing would ever be updated"):
        RankBatches(7, make_config(batch_size=2, accum_iter=4), ONE)


def test_workers_share_the_cores_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(32)))
    assert count_workers(-1) == 10
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert count_workers(-1) == 4
    assert count_workers(3) == 3
