"""Pictures by their pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.evolved_mask import EvolvedMask
from common.visualize import MASKED_GREY, MaskPictures, draw_mask, draw_parts, part_colours


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
    colours = part_colours(2)
    assert np.allclose(drawn[3, 1], 0.65 * colours[0] + 0.175)
    assert np.allclose(drawn[3, 7], 0.65 * colours[1] + 0.175)
    assert np.allclose(drawn[3, 4], 0.35 * (0.65 * colours[1] + 0.175))
    assert np.allclose(draw_parts(image, np.full((2, 2), -1))[0, 0], 0.65 * MASKED_GREY + 0.175)


def test_forty_parts_have_forty_colours() -> None:
    colours = part_colours(40)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2) + np.eye(40)
    assert distances.min() > 0.02


class Photos:
    """Three plain images, the second unreadable."""

    def __len__(self) -> int:
        return 3

    def load(self, index: int) -> Image.Image:
        if index == 1:
            raise OSError("broken")
        return Image.new("RGB", (8, 8), (50 * index, 0, 0))

    def name(self, index: int) -> str:
        return str(index)


def test_snapshots_hold_the_masks_that_training_draws(tmp_path: Path) -> None:
    """Same numbers as the run's own mask for the same images, with all parts shown; unreadable images left out."""

    def attention(images: Tensor) -> Tensor:
        rows = torch.arange(17.0)
        near = (-(rows[:, None] - rows).abs()).softmax(dim=-1)
        return near.expand(len(images), 2, 17, 17)

    def to_tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)

    mask = EvolvedMask((4, 4), 12, 4, seed=3, parts_start=6, parts_end=3)
    pictures = MaskPictures(tmp_path, Photos(), to_tensor, lambda images: images, mask, 3)
    for epoch in (0, 2, 4):
        sheet = pictures.take(epoch, torch.device("cpu"), attention)
        assert sheet.shape == (16, 24, 3)
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
