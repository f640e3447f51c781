"""ADE20K's layout, and transforms: labels are painted into the image, and must stay under their pixels."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from common.training.data import RefusedSample, denormalise, seeded
from common.training.errors import BadInput
from downstream.confusion import IGNORED
from downstream.segmentation.data import (
    SegmentationSource,
    TrainingTransform,
    class_names,
    cover_size,
    distorted,
    read_labels,
    validation_transform,
    window_starts,
)

CLASSES = 6


def write_folder(
    root: Path, count: int = 4, size: tuple[int, int] = (24, 20), classes: int = CLASSES, names: bool = True
) -> Path:
    """`count` images of two splits whose grey value says the class: 40 times its number in the file, 0 unlabelled."""
    for number, split in enumerate(("training", "validation")):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(number)
        for index in range(count):
            labels = painted(generator, size, classes)
            Image.fromarray((labels * 40).astype(np.uint8)).convert("RGB").save(
                root / f"images/{split}/{index:02d}.jpg", quality=95
            )
            Image.fromarray(labels).save(root / f"annotations/{split}/{index:02d}.png")
    if names:
        (root / "classes.txt").write_text("".join(f"{number}\tclass {number}\n" for number in range(1, classes + 1)))
    return root


def painted(generator: np.random.Generator, size: tuple[int, int], classes: int) -> np.ndarray:
    """Blocks of classes 0..`classes` of about a quarter of the side: uint8 [height, width] of (width, height)."""
    small = Image.fromarray(generator.integers(0, classes + 1, (4, 4), dtype=np.uint8))
    return np.asarray(small.resize(size, Image.Resampling.NEAREST))


def pair(shape: tuple[int, int] = (40, 56), seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """A sample as a source gives it: classes 0..5 or 255, painted in grey as 40 times (class + 1), 0 where unlabelled."""
    held = painted(np.random.default_rng(seed), (shape[1], shape[0]), CLASSES)
    return Image.fromarray(held * np.uint8(40)).convert("RGB"), (held.astype(int) - 1).astype(np.uint8)


def grey_of(labels: Tensor) -> Tensor:
    return torch.where(labels == IGNORED, 0, 40 * (labels.long() + 1)) / 255


@pytest.mark.parametrize("shape", [(40, 56), (90, 30), (16, 18)])
def test_image_and_labels_move_together(shape: tuple[int, int]) -> None:
    """Wherever the crop has pixels away from edges of classes, the grey of the image says the label beneath it."""
    transform = TrainingTransform((32, 48), (0.5, 2.0), 0.75, flip=True, photometric=False)
    seen = set()
    for seed in range(12):
        with seeded(seed):
            image, labels = transform(pair(shape))
        assert image.shape == (3, 32, 48)
        assert labels.shape == (32, 48)
        assert labels.dtype == torch.uint8
        inside = edgeless(labels)
        assert inside.float().mean() > 0.1
        grey = denormalise(image)
        # 0 after normalisation is the mean colour, which no class has.
        real = (image != 0).any(0) & inside
        difference = (grey - grey_of(labels)).abs()[:, real]
        assert difference.max() < 0.03
        seen |= set(labels[real].tolist())
    assert len(seen) == CLASSES + 1


def test_half_are_flipped() -> None:
    """The flip is drawn last, so that the same seed without it gives the same crop."""
    flipped = 0
    for seed in range(100):
        made = []
        for flip in (True, False):
            with seeded(seed):
                made.append(TrainingTransform((16, 16), (2.0, 2.0), 1.0, flip, photometric=False)(pair()))
        (image, labels), (plain_image, plain_labels) = made
        turned = not torch.equal(image, plain_image)
        assert torch.equal(labels, plain_labels.flip(-1) if turned else plain_labels)
        assert torch.equal(image, plain_image.flip(-1) if turned else plain_image)
        flipped += turned
    assert 35 <= flipped <= 65


def edgeless(labels: Tensor, reach: int = 2) -> Tensor:
    """Whether all pixels within `reach` are in the crop and have one label: bool [H, W]."""
    values = labels[None, None].float()
    side = 2 * reach + 1
    highest = torch.nn.functional.max_pool2d(values, side, 1, reach)
    lowest = -torch.nn.functional.max_pool2d(-values, side, 1, reach)
    inside = torch.nn.functional.pad(torch.ones_like(values[0, 0, reach:-reach, reach:-reach]), (reach,) * 4)
    return (highest == lowest)[0, 0] & inside.bool()


def test_padding_is_nought_after_normalisation_and_unlabelled() -> None:
    transform = TrainingTransform((32, 32), (0.5, 0.5), 1.0, flip=False, photometric=False)
    with seeded(0):
        image, labels = transform(pair((40, 40)))
    assert (image[:, 16:] == 0).all()
    assert (image[:, :, 16:] == 0).all()
    assert (labels[16:] == IGNORED).all()
    assert (labels[:, 16:] == IGNORED).all()
    assert (image[:, :16, :16] != 0).all()


def test_scale_keeps_the_shape_and_its_longest_side() -> None:
    """ADE20K's rule, 2048 and 512 times r: the shorter side is r times the crop's, the longer one at most four times that."""
    transform = TrainingTransform((32, 32), (1.5, 1.5), 1.0, flip=False, photometric=False)
    for shape, expected in (((20, 40), (48, 96)), ((400, 40), (192, 19))):
        image, labels = transform._scaled(torch.zeros(3, *shape, dtype=torch.uint8), torch.zeros(shape, dtype=torch.uint8))
        assert tuple(image.shape[1:]) == tuple(labels.shape) == expected


def test_scales_are_uniform_over_their_range() -> None:
    transform = TrainingTransform((64, 64), (0.5, 2.0), 1.0, flip=False, photometric=False)
    blank = torch.zeros(1, 1, 1, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8)
    with seeded(0):
        sides = torch.tensor([transform._scaled(*blank)[1].shape[0] for _ in range(300)]) / 64
    assert (sides.min() - 0.5).abs() < 0.03
    assert (sides.max() - 2.0).abs() < 0.03
    assert (sides.mean() - 1.25).abs() < 0.08


def test_crops_avoid_one_class_alone() -> None:
    """The image is one class but for a corner: 10 attempts find the corner far more often than one does."""
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[:24, :24] = 1
    sample = Image.fromarray(labels), labels
    shares = {}
    for ratio in (0.75, 1.0):
        transform = TrainingTransform((32, 32), (2.0, 2.0), ratio, flip=False, photometric=False)
        found = 0
        for seed in range(60):
            with seeded(seed):
                crop = transform((sample[0].convert("RGB"), labels))[1]
            counts = torch.bincount(crop.flatten().long())
            found += bool(len(counts) > 1 and counts.max() < 0.75 * counts.sum())
        shares[ratio] = found / 60
    assert shares[1.0] < 0.35
    assert shares[0.75] > 2 * shares[1.0]


def test_all_draws_are_of_the_sample() -> None:
    transform = TrainingTransform((32, 48), (0.5, 2.0), 0.75, flip=True, photometric=True)
    outcomes = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(outcomes))
        with seeded(seed):
            outcomes.append(transform(pair()))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1], outcomes[1][1])
    assert not torch.equal(outcomes[0][0], outcomes[2][0])


def test_colour_changes() -> None:
    """Each of the four in half of the images; hue is seen by what it turns, a pure red."""
    red = torch.zeros(3, 2, 2)
    red[0], red[1], red[2] = 0.6, 0.2, 0.2
    untouched, hues, values = 0, [], []
    for seed in range(400):
        with seeded(seed):
            made = distorted(red)
        assert made.min() >= 0
        assert made.max() <= 1
        hue, _, value = colorsys.rgb_to_hsv(*made[:, 0, 0].tolist())
        untouched += torch.equal(made, red)
        hues.append((hue + 0.5) % 1 - 0.5)
        values.append(value)
    assert abs(untouched / 400 - 1 / 16) < 0.04
    turned = [abs(hue) > 1e-3 for hue in hues]
    assert abs(sum(turned) / 400 - 0.5) < 0.1
    assert 0.08 < max(map(abs, hues)) < 0.1 + 1e-3
    assert min(values) < 0.35
    assert max(values) > 0.9


def test_validation_keeps_size_and_values() -> None:
    image, labels = validation_transform(pair())
    assert torch.equal(labels, torch.from_numpy(pair()[1]))
    assert (denormalise(image) - grey_of(labels)).abs().max() < 1e-5


def test_labels_are_shifted(tmp_path: Path) -> None:
    held = np.array([[0, 1, 6, 255]], dtype=np.uint8)
    Image.fromarray(held).save(tmp_path / "one.png")
    assert read_labels(tmp_path / "one.png", 6).tolist() == [[255, 0, 5, 255]]
    indexed = Image.fromarray(held).convert("P")
    indexed.putdata([0, 1, 6, 255])
    indexed.save(tmp_path / "palette.png")
    assert read_labels(tmp_path / "palette.png", 6).tolist() == [[255, 0, 5, 255]]


def test_a_source_in_order(tmp_path: Path) -> None:
    source = SegmentationSource(write_folder(tmp_path), "validation", CLASSES)
    assert len(source) == 4
    assert [Path(source.name(i)).name for i in range(4)] == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]
    image, labels = source.load(1)
    assert (image.size, labels.shape) == ((24, 20), (20, 24))
    grey = torch.from_numpy(np.asarray(image).copy())[..., 0] / 255
    inside = edgeless(torch.from_numpy(labels), 1)
    assert (grey - grey_of(torch.from_numpy(labels))).abs()[inside].max() < 0.06  # JPEG


def test_class_names(tmp_path: Path) -> None:
    assert class_names(tmp_path) == [str(number) for number in range(1, 151)]
    assert class_names(tmp_path, 3) == ["1", "2", "3"]
    (tmp_path / "classes.txt").write_text("1\tbird\n2\tpotted plant\n")
    assert class_names(tmp_path) == class_names(tmp_path, 2) == ["bird", "potted plant"]
    with pytest.raises(BadInput, match=r"--classes 3: .*classes\.txt has 2"):
        class_names(tmp_path, 3)
    for wrong in ("bird\nplant\n", "0\tbird\n1\tplant\n", "", "1\tbird\tmore\n"):
        (tmp_path / "classes.txt").write_text(wrong)
        with pytest.raises(BadInput, match=r"classes\.txt: expected lines"):
            class_names(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "images/training/02.jpg").unlink(), "1 annotations of training without image, such as .*02.png"),
        (lambda root: (root / "annotations/training/01.png").unlink(), "1 images of training without annotation, .*01.jpg"),
        (lambda root: (root / "annotations").rename(root / "labels"), "no folder .*annotations/training"),
        (lambda root: [path.unlink() for path in (root / "images/training").iterdir()], "no .jpg or .jpeg or .png files in"),
        (lambda root: (root / "images/training/x.jpeg").write_bytes(b""), "1 images of training without annotation"),
        (lambda root: (root / "images/training/02.png").write_bytes(b""), "02.jpg and 02.png have the same name"),
    ],
)
def test_unusable_folders(tmp_path: Path, spoil: Any, message: str) -> None:
    write_folder(tmp_path)
    spoil(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        SegmentationSource(tmp_path, "training", CLASSES)
    assert "\n" not in str(caught.value)


def test_files_that_are_passed_over_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path)
    for name in (
        "images/training/.DS_Store",
        "images/training/a.heic",
        "annotations/training/a.txt",
        "annotations/training/README",
    ):
        (tmp_path / name).write_text("")
    source = SegmentationSource(tmp_path, "training", CLASSES)
    expected = "training: 4 images with annotations; passed over: 1 hidden, 1 without an ending, 2 of other kinds "
    assert source.summary.startswith(expected)
    assert sorted(source.summary.removeprefix(expected).strip("()").split(", ")) == [".heic 1", ".txt 1"]


def test_unusable_annotations(tmp_path: Path) -> None:
    source = SegmentationSource(write_folder(tmp_path), "training", CLASSES)
    place = tmp_path / "annotations/training"
    Image.fromarray(np.full((20, 24), 7, dtype=np.uint8)).save(place / "00.png")
    Image.fromarray(np.ones((10, 24), dtype=np.uint8)).save(place / "01.png")
    Image.fromarray(np.ones((20, 24, 3), dtype=np.uint8)).save(place / "02.png")
    (place / "03.png").write_bytes(b"no picture")
    for index, message in enumerate(
        (
            "00.png: holds class 7, but there are 6",
            "01.png has 24x10 pixels, its image 24x20",
            "02.png: must be an 8-bit",
            "03.png",
        )
    ):
        with pytest.raises(RefusedSample if index == 0 else (OSError, ValueError), match=message):
            source.load(index)


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(64, 64, 42, [0]), (65, 64, 42, [0, 1]), (106, 64, 42, [0, 42]), (107, 64, 42, [0, 42, 43]), (683, 512, 341, [0, 171])],
)
def test_windows_of_a_side(length: int, window: int, stride: int, starts: list[int]) -> None:
    assert window_starts(length, window, stride) == starts


def test_covering_sizes() -> None:
    assert cover_size((375, 500), (512, 512), 1.0) == (512, 683)
    assert cover_size((375, 500), (512, 512), 0.5) == (512, 683)  # the encoder takes full windows only
    assert cover_size((375, 500), (512, 512), 1.5) == (768, 1024)
    assert cover_size((10, 40), (32, 64), 1.0) == (32, 128)
