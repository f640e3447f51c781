"""Pictures by their pixels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from common.evolved_mask import EvolvedMask
from common.visualize import MASKED_GREY, MaskPictures, Snapshot, draw_mask, draw_parts
from common.visualize.captions import Group, Key, Sheet
from common.visualize.colours import distinct_colours, text_colour


def test_masked_patches_are_grey_and_visible_ones_untouched() -> None:
    image = np.random.default_rng(0).random((4, 6, 3))
    mask = np.array([[True, False, False], [False, False, True]])
    drawn = draw_mask(image, mask)
    assert (drawn[:2, :2] == MASKED_GREY).all()
    assert (drawn[2:, 4:] == MASKED_GREY).all()
    assert (drawn[:2, 2:] == image[:2, 2:]).all()
    assert (drawn[2:, :4] == image[2:, :4]).all()


def test_parts_have_their_colours_and_dark_borders() -> None:
    """Inside a part: 0.65 colour + 0.35 grey; on the border to another part: darker."""
    image = np.full((8, 8, 3), 0.5)
    drawn = draw_parts(image, np.array([[0, 1], [0, 1]]))
    colours = distinct_colours(2)
    assert np.allclose(drawn[3, 1], 0.65 * colours[0] + 0.175)
    assert np.allclose(drawn[3, 7], 0.65 * colours[1] + 0.175)
    assert np.allclose(drawn[3, 4], 0.35 * (0.65 * colours[1] + 0.175))
    assert np.allclose(draw_parts(image, np.full((2, 2), -1))[0, 0], 0.65 * MASKED_GREY + 0.175)


@dataclass(frozen=True)
class Written:
    """A text in a picture, the box around its ink (left, top, right, bottom), and the picture's width and height."""

    text: str
    box: tuple[float, float, float, float]
    size: tuple[int, int]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Written]:
    """Texts as they are drawn."""
    texts: list[Written] = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, *rest: Any) -> None:
        texts.append(Written(words, self.textbbox(place, words, rest[1]), self.im.size))
        original(self, place, words, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


def assert_whole(texts: list[Written]) -> None:
    """Every text lies inside its picture, and none over another."""
    for one in texts:
        left, top, right, bottom = one.box
        assert left >= 0
        assert top >= 0
        assert right <= one.size[0]
        assert bottom <= one.size[1]
    for one, other in itertools.combinations([one for one in texts if one.text], 2):
        beside = one.box[2] <= other.box[0] or other.box[2] <= one.box[0]
        assert beside or one.box[3] <= other.box[1] or other.box[3] <= one.box[1], (one, other)


DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]


@pytest.mark.parametrize("seen", [np.eye(3), np.array(DEUTERANOPIA), np.array(PROTANOPIA)], ids=["all", "no-green", "no-red"])
def test_first_colours_are_apart_for_every_reader(seen: np.ndarray) -> None:
    """Seven classes under the two common colour blindnesses (Machado et al. 2009, severity 1, on linear RGB)."""
    colours = distinct_colours(7)
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    shown = (linear @ seen.T).clip(0, 1) ** (1 / 2.2)
    distances = np.linalg.norm(shown[:, None] - shown[None], axis=2) + np.eye(7)
    assert distances.min() > 0.18
    assert np.array_equal(colours, distinct_colours(150)[:7])


def test_text_is_black_or_white_by_contrast() -> None:
    """4.5 : 1, what WCAG 2 asks of text, on every colour of parts and classes."""
    for background in [*distinct_colours(60), np.zeros(3), np.ones(3), np.array([0.9, 0.1, 0.1])]:
        ink = np.array(text_colour(background)) / 255
        first, second = sorted(_luminance(colour) + 0.05 for colour in (ink, background))
        assert second / first >= 4.5


def _luminance(colour: np.ndarray) -> float:
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in colour]
    return float(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])


def test_long_titles_and_legends_widen_the_sheet(written: list[Written]) -> None:
    """Cells of 20 px under titles and above keys that are wider: nothing is cut, cells keep their size and are centred."""
    cell = np.full((20, 20, 3), 77, dtype=np.uint8)
    keys = [Key([np.zeros(3)], f"class with a long name {k}" * (1 + k // 4)) for k in range(5)]
    long_group = Group(("a", "b"), "a title over two columns that is much wider than both")
    sheet = Sheet([Group(("a column title",)), long_group], "A heading " * 12, keys, [[cell] * 3, [cell, None, cell]])
    picture = sheet.draw()
    assert_whole(written)
    assert [one.text for one in written].count("a title over two columns that is much wider than both") == 1
    assert (picture == 77).all(axis=2).sum() == 5 * 400
    assert (picture[:3] == 255).all()
    assert (picture[:, :3] == 255).all()
    assert (picture[-3:] == 255).all()
    assert (picture[:, -3:] == 255).all()


def test_forty_parts_have_forty_colours() -> None:
    colours = distinct_colours(40)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2) + np.eye(40)
    assert distances.min() > 0.02


def attention(images: Tensor) -> Tensor:
    """Of 16 patches and a class token, each to its neighbours in raster order."""
    rows = torch.arange(17.0)
    near = (-(rows[:, None] - rows).abs()).softmax(dim=-1)
    return near.expand(len(images), 2, 17, 17)


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


class Photos:
    """Three plain images, the second unreadable."""

    def __init__(self, size: tuple[int, int] = (8, 8)) -> None:
        self.size = size

    def __len__(self) -> int:
        return 3

    def load(self, index: int) -> Image.Image:
        if index == 1:
            raise OSError("broken")
        return Image.new("RGB", self.size, (50 * index, 0, 0))

    def name(self, index: int) -> str:
        return str(index)


def test_snapshots_hold_the_masks_that_training_draws(tmp_path: Path) -> None:
    """Same numbers as the run's own mask for the same images, with all parts shown; unreadable images left out."""
    mask = EvolvedMask((4, 4), 12, 4, seed=3, parts_start=6, parts_end=3)
    pictures = MaskPictures(tmp_path, Photos(), to_tensor, lambda images: images, mask, 3)
    for epoch in (0, 2, 4):
        sheet = pictures.take(epoch, torch.device("cpu"), attention)
        assert sheet is not None
        assert sheet.shape == (10 + 3 * 21 + 2 * 200 + 6 + 6 + 2 * 21 + 10, 10 + 200 + 18 + 200 + 6 + 200 + 10, 3)
        mask.set_epoch(epoch)
        expected = mask(torch.zeros(2, 1), attention, torch.tensor([0, 2]))
        shot = np.load(tmp_path / f"epoch_{epoch:04d}.npz")
        assert np.array_equal(shot["masks"].reshape(2, 16), expected.mask.numpy())
        assert shot["parts"].min() >= 0
        assert float(shot["alpha"]) == (epoch / 4) ** 2
    assert mask.config.shortcut
    figure = pictures.compose()
    assert figure == tmp_path / "evolution.png"
    with Image.open(figure) as image:
        assert image.width > 700


STATIC = "masked: the model does not see it"
EVOLVED = "parts: a colour each, unrelated between pictures"


def pictures_of(folder: Path, grid: tuple[int, int] = (4, 4), size: tuple[int, int] = (8, 8), **options: Any) -> MaskPictures:
    """Of the black first photograph and the dark red last one, over four epochs."""
    mask = EvolvedMask(grid, 8, 4, seed=3, parts_start=6, parts_end=3, **options)
    return MaskPictures(folder, Photos(size), to_tensor, lambda images: images, mask, 2)


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ({}, ["epoch 0 of 4: alpha 0.00, K 6", "epoch 2 of 4: alpha 0.25, K 5"]),
        ({"alpha": 0.5}, ["epoch 0 of 4: alpha 0.50, K 6", "epoch 2 of 4: alpha 0.50, K 5"]),
        ({"mask": "part"}, ["epoch 0 of 4: K 6", "epoch 2 of 4: K 5"]),
        ({"mask": "grid-to-block"}, ["epoch 0 of 4: alpha 0.00", "epoch 2 of 4: alpha 0.25"]),
        ({"mask": "grid"}, ["epoch 0 of 4", "epoch 2 of 4"]),
        ({"mask": "random"}, ["epoch 0 of 4", "epoch 2 of 4"]),
        ({"mask": "block"}, ["epoch 0 of 4", "epoch 2 of 4"]),
        ({"mask": "random-units"}, ["epoch 0 of 4", "epoch 2 of 4"]),
    ],
)
def test_titles_name_what_the_mask_has(
    tmp_path: Path, written: list[Written], options: dict[str, Any], titles: list[str]
) -> None:
    """alpha where it grows, K and a column of parts where there are parts; all whole and apart from one another."""
    pictures = pictures_of(tmp_path, **options)
    for epoch in (0, 2):
        pictures.take(epoch, torch.device("cpu"), attention)
    written.clear()
    pictures.compose()
    mask = options.get("mask", "evolved")
    has_parts = mask in ("evolved", "part")
    columns = ["parts", "mask"] * 2 if has_parts else ["mask"] * 2
    legend = [EVOLVED, STATIC] if has_parts else [STATIC]
    assert [one.text for one in written if one.text] == [
        f"{mask} mask: 8 of 16 patches masked", *titles, "image", *columns, *legend
    ]  # fmt: skip
    assert_whole(written)


def test_at_most_where_the_count_may_fall_short(tmp_path: Path, written: list[Written]) -> None:
    mask = EvolvedMask((8, 8), 30, 4, mask="block-official")
    MaskPictures(tmp_path, Photos(), to_tensor, lambda images: images, mask, 2).take(1, torch.device("cpu"), attention)
    assert "block-official mask: at most 30 of 64 patches masked" in [one.text for one in written]


@pytest.mark.parametrize(("grid", "size", "cell"), [((2, 8), (32, 8), (48, 192)), ((8, 2), (6, 24), (192, 48))])
def test_non_square_images_have_no_gaps(
    tmp_path: Path, written: list[Written], grid: tuple[int, int], size: tuple[int, int], cell: tuple[int, int]
) -> None:
    """Rows are as high and columns as wide as the images (or a title), with the photograph's own pixels in them."""
    pictures = pictures_of(tmp_path, grid, size)
    sheet = pictures.take(4, torch.device("cpu"), attention)
    assert sheet is not None
    assert_whole(written[len(written) // 2 :])  # evolution.png was drawn first, with the same texts
    high, wide = cell
    if wide == 192:
        assert sheet.shape == (10 + 3 * 21 + 2 * high + 6 + 6 + 2 * 21 + 10, 10 + 3 * wide + 18 + 6 + 10, 3)
    red = (sheet == (100, 0, 0)).all(axis=2)
    assert red[10 + 63 + high + 6 : 10 + 63 + 2 * high + 6, 10 : 10 + wide].all()
    assert not red[: 10 + 63 + high + 6].any()  # the black photograph is above
    assert red[:, : 10 + wide + 5].sum() == high * wide


def test_known_pixels_of_the_figure(tmp_path: Path) -> None:
    """Parts have their colours over the grey image, masked patches the legend's grey, lines between them are dark."""
    pictures = pictures_of(tmp_path)
    figure = pictures.take(4, torch.device("cpu"), attention)
    assert figure is not None
    shot = Snapshot.read(tmp_path / "epoch_0004.npz")
    assert shot is not None
    left_parts, left_mask, top = 10 + 200 + 18, 10 + 200 + 18 + 206, 10 + 63 + 206  # second row: (100, 0, 0)
    colours = distinct_colours(int(shot.parts[1].max()) + 1)
    for row in range(4):
        for column in range(4):
            y, x = top + 50 * row + 25, 50 * column + 25
            colour = 0.65 * colours[shot.parts[1, row, column]] + 0.35 * 100 / 255 / 3
            assert np.abs(figure[y, left_parts + x] / 255 - colour).max() < 0.004
            expected = (128, 128, 128) if shot.masks[1, row, column] else (100, 0, 0)
            assert tuple(figure[y, left_mask + x]) == expected
            if column and shot.masks[1, row, column] != shot.masks[1, row, column - 1]:
                assert tuple(figure[y, left_mask + 50 * column]) == (0, 0, 0)
    legend = figure[10 + 63 + 2 * 206 :, :40]
    assert (legend == (128, 128, 128)).all(axis=2).sum() > 100


def test_a_run_that_starts_earlier_drops_what_is_not_its_own(tmp_path: Path) -> None:
    """From epoch 2 on: that of epoch 4 goes, and the figure is that of the first two; a new run has none at all."""
    pictures = pictures_of(tmp_path)
    sizes = []
    for epoch in (0, 2, 4):
        pictures.take(epoch, torch.device("cpu"), attention)
        sizes.append((tmp_path / "evolution.png").read_bytes())
    pictures.keep_until(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch_0000.npz", "epoch_0002.npz", "evolution.png"]
    assert (tmp_path / "evolution.png").read_bytes() == sizes[1]
    pictures.keep_until(-1)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_snapshot_is_passed_over(tmp_path: Path) -> None:
    pictures = pictures_of(tmp_path)
    pictures.take(0, torch.device("cpu"), attention)
    alone = (tmp_path / "evolution.png").read_bytes()
    whole = (tmp_path / "epoch_0000.npz").read_bytes()
    for number, content in enumerate((b"", whole[:200], whole[:-30], b"text")):
        (tmp_path / f"epoch_000{number + 1}.npz").write_bytes(content)
    assert pictures.compose() == tmp_path / "evolution.png"
    assert (tmp_path / "evolution.png").read_bytes() == alone


def test_images_of_another_choice_are_not_mixed(tmp_path: Path) -> None:
    """A run resumed with more images: the earlier epoch is drawn for those that it has, and stays empty for the others."""
    photos = Photos()
    photos.load = lambda index: Image.new("RGB", (8, 8), (50 * index, 0, 0))  # type: ignore[method-assign]
    mask = EvolvedMask((4, 4), 8, 4, mask="random")
    few, more = (MaskPictures(tmp_path, photos, to_tensor, lambda images: images, mask, count) for count in (2, 3))
    few.take(0, torch.device("cpu"), attention)
    more.take(4, torch.device("cpu"), attention)
    figure = np.asarray(Image.open(tmp_path / "evolution.png"))
    first = [figure[73 + 206 * row : 273 + 206 * row, 228:428] for row in range(3)]
    assert (first[1] == 255).all()
    for row, red in ((0, 0), (2, 100)):
        seen = first[row][25::50, 25::50].reshape(-1, 3).tolist()
        assert sorted(map(tuple, seen)) == [(red, 0, 0)] * 8 + [(128, 128, 128)] * 8


def test_no_picture_of_unreadable_images(tmp_path: Path) -> None:
    class Broken(Photos):
        def load(self, index: int) -> Image.Image:
            raise OSError("broken")

    mask = EvolvedMask((4, 4), 8, 4, mask="random")
    pictures = MaskPictures(tmp_path / "masks", Broken(), to_tensor, lambda images: images, mask, 2)
    assert pictures.take(0, torch.device("cpu"), attention) is None
    assert pictures.compose() is None
