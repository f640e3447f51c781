"""Crops, colours and decoding on bytes, beside PIL and torchvision's transforms. Seeds are given in each test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from beit_evolved.run_beit_pretraining import BEiTConfig, TwoViews
from common.training.augment import Jitter, RandomCrop, colours, draw_crop, normalise
from common.training.config import LoaderConfig
from common.training.data import IMAGENET_MEAN, IMAGENET_STD, Samples, choose_loader, collate, seeded
from common.training.sources import ArraySource, FileSource, PhotoSource

SIZE = {"input_size": "96x112", "crop_scale": (0.2, 1.0)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> FileSource:
    """Seven real photographs as JPEGs of quality 92, colour and grey."""
    folder, source = tmp_path_factory.mktemp("photos"), PhotoSource()
    for place in (0, 1, 2, 5, 7, 12, 13):
        image = source.load(place)
        image = image.convert("L") if place == 7 else image
        image.save(folder / f"{place:02d}.jpg", quality=92)
    return FileSource(sorted(folder.iterdir()))


def levels(first: Tensor, second: Tensor) -> np.ndarray:
    """Differences of two views in grey levels."""
    difference: np.ndarray = (first.int() - second.int()).abs().numpy()
    return difference


def test_boxes_are_those_of_torchvision_for_both_kinds_of_image() -> None:
    """A PIL image and bytes of its size: the boxes of RandomResizedCrop.get_params by the same generator. Seeds 0 to 9."""
    image = Image.new("RGB", (160, 90))
    for seed in range(10):
        with seeded(seed):
            expected = transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
        for kind in (image, pil_to_tensor(image)):
            with seeded(seed):
                assert draw_crop(kind, (0.2, 1.0)) == expected


def test_normalised_bytes_equal_totensor_and_normalize() -> None:
    """All 256 values in every colour, to the bit; in any memory format; floats pass as they are."""
    pixels = np.stack([np.arange(256).reshape(16, 16), np.arange(256)[::-1].reshape(16, 16), np.full((16, 16), 77)], axis=2)
    image = Image.fromarray(pixels.astype(np.uint8))
    expected = transforms.ToTensor()(image)
    assert torch.equal(colours(pil_to_tensor(image)), expected)
    normalised = transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)(expected)
    for views in (pil_to_tensor(image), pil_to_tensor(image).contiguous()):
        assert torch.equal(normalise(views[None])[0], normalised)
        assert normalise(views).is_contiguous()
    assert torch.equal(normalise(expected), expected)


@pytest.mark.parametrize(("interpolation", "mean"), [("bicubic", 0.05), ("bilinear", 0.05)])
def test_loaders_differ_by_rounding(photos: FileSource, interpolation: str, mean: float) -> None:
    """Same seeds, real photographs: decoded alike, the same crop and flip, and nearly the same pixels. Epochs 0 and 1, seed 3."""
    config = LoaderConfig(interpolation=interpolation, **SIZE)  # type: ignore[arg-type]
    fast, slow = (Samples(photos, RandomCrop(config), 3, loader=loader) for loader in ("torchvision", "pil"))
    for place in range(len(photos)):
        pixels = photos.decode(place)
        assert isinstance(pixels, Tensor)
        assert torch.equal(pixels, pil_to_tensor(photos.load(place)))
        found = np.stack([levels(fast[epoch, place][0][0], slow[epoch, place][0][0]) for epoch in (0, 1)])  # type: ignore[index]
        assert found.mean() < mean * 5
        assert np.percentile(found, 99) <= 1
        assert found.max() <= 12


def test_beits_views_differ_by_rounding(photos: FileSource) -> None:
    """With colour jitter, whose contrast is about a mean that is estimated, and the flip that comes before the crop. Seed 5."""
    config = BEiTConfig(model="beit_tiny_patch8_8k_vocab", tokenizer="t", input_size="96x112", crop_scale=(0.2, 1.0))
    fast, slow = (Samples(photos, TwoViews(config, (48, 56)), 5, loader=loader) for loader in ("torchvision", "pil"))
    flips = set()
    for key in ((epoch, place) for epoch in range(2) for place in range(len(photos))):
        first, second = fast[key][0], slow[key][0]
        assert first is not None
        assert second is not None
        for one, other in zip(first, second, strict=True):
            assert one.dtype == torch.uint8
            assert levels(one, other).mean() < 0.8
            assert levels(one, other).max() <= 24
        flips.add(bool(levels(first[0].flip(2), second[0]).mean() > 5))
    assert flips == {True}


def test_jitter_draws_and_makes_what_colorjitter_does() -> None:
    """One colour everywhere, so that the estimated mean is exact: equal to the bit, in whole and in part. Seeds 0 to 7."""
    image = Image.new("RGB", (40, 32), (90, 120, 60))
    for seed in range(8):
        with seeded(seed):
            expected = transforms.ColorJitter(0.4, 0.4, 0.4)(image)
        with seeded(seed):
            drawn = Jitter(0.4).draw()
        assert torch.equal(pil_to_tensor(Jitter.whole(image, drawn)), pil_to_tensor(expected))
        part = Jitter.part(pil_to_tensor(image), (4, 8, 20, 24), drawn)
        assert torch.equal(part, pil_to_tensor(expected)[:, 4:24, 8:32])
    with seeded(0):
        assert Jitter(0.0).draw() == []


def odd_files(folder: Path) -> dict[str, bool]:
    """Name -> whether torchvision decodes it. What a web crawl holds."""
    photo = PhotoSource().load(0).resize((80, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a right angle
    kinds: dict[str, tuple[Any, dict[str, Any], bool]] = {
        "colour.jpg": (photo, {}, True),
        "progressive.jpg": (photo, {"progressive": True}, True),
        "turned.jpg": (photo, {"exif": exif}, True),
        "grey.jpg": (photo.convert("L"), {}, True),
        "cmyk.jpg": (photo.convert("CMYK"), {}, False),
        "colour.png": (photo, {}, False),
        "grey.png": (photo.convert("L"), {}, False),
        "palette.png": (photo.quantize(16), {}, False),
        "clear_palette.png": (photo.quantize(16), {"transparency": 0}, False),
        "clear_colour.png": (photo, {"transparency": (0, 0, 0)}, False),
        "alpha.png": (photo.convert("RGBA"), {}, False),
        "grey_alpha.png": (photo.convert("LA"), {}, False),
        "one_bit.png": (photo.convert("1"), {}, False),
        "sixteen.png": (Image.fromarray((np.arange(4800).reshape(60, 80) * 13).astype(np.uint16)), {}, False),
        "moving.png": (photo, {"save_all": True, "append_images": [photo.rotate(90)]}, False),
        "moving.gif": (photo, {"save_all": True, "append_images": [photo.rotate(90)]}, False),
        "a.webp": (photo, {}, False),
        "a.bmp": (photo, {}, False),
        "a.tiff": (photo, {}, False),
        "named_wrongly.png": (photo, {"format": "JPEG"}, True),
    }
    for name, (image, options, _) in kinds.items():
        image.save(folder / name, **options)
    return {name: decoded for name, (_, _, decoded) in kinds.items()}


def test_odd_files_give_what_pil_gives(tmp_path: Path) -> None:
    """Pixels are equal in all of them; those of odd kinds come from PIL."""
    for name, decoded in odd_files(tmp_path).items():
        source = FileSource([tmp_path / name])
        image = source.decode(0)
        assert isinstance(image, Tensor) == decoded, name
        pixels = image if isinstance(image, Tensor) else pil_to_tensor(image)
        assert torch.equal(pixels, pil_to_tensor(source.load(0))), name


def test_broken_files_are_counted_in_the_same_words(tmp_path: Path) -> None:
    """Cut short at any place, empty, text: each is replaced and named under both loaders, with PIL's line."""
    odd_files(tmp_path)
    for name in ("colour.jpg", "grey.jpg", "colour.png", "progressive.jpg", "moving.gif"):
        whole = (tmp_path / name).read_bytes()
        for share in (0.05, 0.5, 0.9):
            (tmp_path / f"cut_{share}_{name}").write_bytes(whole[: int(len(whole) * share)])
    (tmp_path / "cut_empty.jpg").write_bytes(b"")
    (tmp_path / "cut_text.jpg").write_text("no image")
    broken = sorted(tmp_path.glob("cut_*"))
    source = FileSource([tmp_path / "colour.jpg", *broken, tmp_path / "missing.jpg"])
    config = LoaderConfig(input_size="16")
    fast, slow = (Samples(source, RandomCrop(config), 0, loader=loader) for loader in ("torchvision", "pil"))
    for place in range(1, len(source)):
        (_, _, stand_in, bad), (_, _, other, expected) = fast[0, place], slow[0, place]
        assert bad == expected, source.name(place)
        assert stand_in == other
    assert sum(bool(slow[0, place][3]) for place in range(1, len(source))) >= 14


def test_bytes_travel_with_colours_last_and_auto_is_by_the_source(photos: FileSource) -> None:
    """A batch of both loaders holds the same values as its samples; images in memory go on with PIL."""
    config = LoaderConfig(**SIZE)  # type: ignore[arg-type]
    samples = Samples(photos, RandomCrop(config), 0, loader=choose_loader("auto", photos))
    assert samples.loader == "torchvision"
    parts = [samples[0, place] for place in range(3)]
    batch = collate(parts)
    assert batch.images.dtype == torch.uint8
    assert torch.equal(batch.images, torch.stack([views[0] for views, *_ in parts if views is not None]))
    array = ArraySource(np.full((2, 8, 8), 9, np.uint8), "grey")
    assert (choose_loader("auto", array), choose_loader("torchvision", array)) == ("pil", "torchvision")
    assert torch.equal(array.decode(1), pil_to_tensor(array.load(1)))
