"""Where crops lie in their images. Seeds are given in each test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from beit_evolved.run_beit_pretraining import BEiTConfig, TwoViews
from common.training.augment import colours, normalise
from common.training.data import denormalise, seeded, training_transform
from common.training.geometry import Located, LocatedCrop, LocatedSamples, WholeImage, collate_located, crop_transform
from common.training.sources import FileSource
from mae_evolved.main_pretrain import MAEConfig
from tests.conftest import write_images

MAE = {"model": "mae_vit_tiny_patch4", "input_size": "32x48", "interpolation": "bilinear"}


def ramps(height: int = 90, width: int = 120) -> Image.Image:
    """Red says how far right a pixel is, green how far down, each as a share of 255."""
    across = np.broadcast_to((np.arange(width) + 0.5) / width, (height, width))
    down = np.broadcast_to(((np.arange(height) + 0.5) / height)[:, None], (height, width))
    pixels = np.stack([across, down, np.zeros((height, width))], axis=2) * 255
    return Image.fromarray(pixels.round().astype(np.uint8))


def expected_shares(geometry: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """How far right and down the pixels of a view should be, by its geometry: [width], [height]."""
    top, left, tall, wide, flipped = geometry.tolist()
    across = left + wide * (torch.arange(width) + 0.5) / width
    return across.flip(0) if flipped else across, top + tall * (torch.arange(height) + 0.5) / height


def assert_geometry_is_true(view: Tensor, geometry: Tensor) -> None:
    """Colours of the view are those of the places that the geometry names; not at its edges, which resizing repeats."""
    across, down = expected_shares(geometry, *view.shape[1:])
    assert torch.allclose(view[0, 3:-3, 3:-3], across[None, 3:-3].expand_as(view[0, 3:-3, 3:-3]), atol=0.01)
    assert torch.allclose(view[1, 3:-3, 3:-3], down[3:-3, None].expand_as(view[1, 3:-3, 3:-3]), atol=0.01)


def test_a_located_crop_is_the_training_crop_and_knows_its_place() -> None:
    """Twenty seeds: pixels equal to the bit, place and mirroring true to them, both mirrorings among them."""
    plain, located = training_transform(MAEConfig(**MAE)), crop_transform(MAEConfig(**MAE, parts_every=4))  # type: ignore[arg-type]
    assert isinstance(located, LocatedCrop)
    image, flips = ramps(), set()
    for seed in range(20):
        with seeded(seed):
            view = plain(image)
        with seeded(seed):
            made = located(image)
        assert torch.equal(view, normalise(made.views[0]))
        assert_geometry_is_true(denormalise(view), made.geometry)
        flips.add(float(made.geometry[4]))
    assert flips == {0.0, 1.0}
    assert not isinstance(crop_transform(MAEConfig(**MAE)), LocatedCrop)  # type: ignore[arg-type]


def test_beits_two_views_know_their_place() -> None:
    """Mirrored before they are cut: the place is that in the image as it is stored. Seeds 0 to 19."""
    flags = {"input_size": "32x48", "tokenizer": "t", "color_jitter": 0.0, "interpolation": "bilinear", "crop_scale": (0.2, 1.0)}
    plain = TwoViews(BEiTConfig(model="beit_tiny_patch4_8k_vocab", **flags), (16, 24))  # type: ignore[arg-type]
    located = TwoViews(BEiTConfig(model="beit_tiny_patch4_8k_vocab", parts_every=2, **flags), (16, 24))  # type: ignore[arg-type]
    flips = set()
    for seed in range(20):
        with seeded(seed):
            views = plain(ramps())
        with seeded(seed):
            made = located(ramps())
        assert isinstance(made, Located)
        assert isinstance(views, tuple)
        assert all(torch.equal(one, other) for one, other in zip(views, made.views, strict=True))
        assert_geometry_is_true(colours(made.views[0]), made.geometry)
        flips.add(float(made.geometry[4]))
    assert flips == {0.0, 1.0}


@pytest.fixture
def samples(tmp_path: Path) -> LocatedSamples:
    """Three images, two crops of each, the second of the images unreadable."""
    write_images(tmp_path, 3)
    paths = sorted(tmp_path.glob("*.jpg"))
    paths[1].write_bytes(b"broken")
    config = MAEConfig(model="mae_vit_tiny_patch4", input_size="16", parts_every=1)
    return LocatedSamples(FileSource(paths), crop_transform(config), 0, 2, WholeImage(config))


def test_whole_images_come_where_they_are_asked_for(samples: LocatedSamples) -> None:
    """Row, place and pixels; a stand-in always has its whole image, and no place."""
    batch = collate_located([samples[0, index, wanted] for index, wanted in ((0, False), (3, True), (4, False), (5, False))])
    assert batch.places == [0, 0, -1, 2]
    assert batch.whole_rows == [1, 2]
    assert batch.whole is not None
    assert batch.sample_ids.tolist() == [0, 3, 4, 5]
    whole = samples.source.load(0).resize((16, 16), Image.Resampling.BICUBIC)
    assert torch.allclose(colours(batch.whole[0]), torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255, atol=1e-6)
    assert batch.geometry.shape == (4, 5)
    assert len(batch.bad) == 1
    assert collate_located([samples[0, 0, False]]).whole is None
    moved = batch.to(torch.device("cpu"))
    assert moved.places == batch.places
    assert torch.equal(moved.geometry, batch.geometry)
    assert moved.whole is not None


def test_where_nothing_can_be_read_the_batch_has_no_views(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(b"broken")
    config = MAEConfig(model="mae_vit_tiny_patch4", input_size="16", parts_every=1)
    samples = LocatedSamples(FileSource([tmp_path / "one.jpg"]), crop_transform(config), 0, 1, WholeImage(config))
    batch = collate_located([samples[0, 0, True]])
    assert batch.views == ()
    assert batch.places == []
    assert batch.bad
