"""BEiT's trainer: official defaults, two views of one crop, labels, the tokenizer as part of the run, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from beit_evolved.model import BEiT
from beit_evolved.run_beit_pretraining import PROGRAM, BEiTConfig, TokenLoss, TwoViews, build, main
from common.training.augment import colours
from common.training.checkpoint import LAST
from common.training.command_line import parse_arguments
from common.training.data import Batch, seeded
from common.training.errors import BadInput
from common.training.optim import absolute_lr
from tests.conftest import ROOT, run_module
from tests.methods import flags, lr_at, write_tokenizer

RECIPES = ROOT / "beit_evolved" / "recipes"


def parse(words: str = "") -> BEiTConfig:
    return parse_arguments(BEiTConfig, PROGRAM, "", f"--tokenizer somewhere {words}".split())[0]


def test_official_recipe_is_the_default() -> None:
    """1.5e-3 at batch 2048 down to 1e-5 by a cosine after 10 epochs; betas, decay, clipping, drop path, 75 of 196."""
    config = parse(f"--config {RECIPES}/official_beit_base_800.toml")
    peak = absolute_lr(config, 2048)
    assert peak == pytest.approx(1.5e-3)
    assert lr_at(10, config, peak) == pytest.approx(1.5e-3)
    assert lr_at(800, config, peak) == pytest.approx(1e-5)
    assert lr_at(0, config, peak) == 0
    assert (config.beta1, config.beta2, config.weight_decay, config.clip_grad, config.drop_path) == (0.9, 0.999, 0.05, 3.0, 0.1)
    assert (config.crop_scale, config.color_jitter, config.interpolation) == ((0.08, 1.0), 0.4, "bicubic")
    assert parse(f"--config {RECIPES}/table4_beit_small_200.toml").epochs == 200


def test_two_views_are_one_crop(tmp_path: Path) -> None:
    """Both show the same part of the image with the same flip and colours, each at its size; draws repeat by seed."""
    rows, columns = np.mgrid[0:120, 0:160]
    ramps = np.stack([rows * 2, columns * 1.5, 255 - columns], axis=2).astype(np.uint8)
    views = TwoViews(parse("--input_size 64x96 --model beit_tiny_patch8_8k_vocab"), (64, 96))
    for seed in range(5):
        with seeded(seed):
            first, second = views(Image.fromarray(ramps))
        with seeded(seed):
            again, _ = views(Image.fromarray(ramps))
        assert torch.equal(first, again)
        assert first.shape == second.shape == (3, 64, 96)
        assert (colours(first) - colours(second)).abs().mean() < 0.02  # bicubic against Lanczos on smooth ramps
        assert first.dtype == second.dtype == torch.uint8
    small = TwoViews(parse("--input_size 224"), (112, 112))
    assert [view.shape for view in small(Image.fromarray(ramps))] == [(3, 224, 224), (3, 112, 112)]


class Corners:
    """A tokenizer whose code of a place is its raster number plus the image's red."""

    stride, vocabulary = 2, 32

    def codes(self, images: Tensor) -> Tensor:
        grid = images[:, 0, ::2, ::2]
        return torch.arange(grid[0].numel()).reshape(grid[0].shape) + grid.round().long()

    def to(self, device: torch.device) -> Corners:
        return self


def test_labels_stand_at_the_places_of_the_logits() -> None:
    """The cross-entropy by a loop over images and masked patches."""
    torch.manual_seed(0)
    model = BEiT(vocabulary=32, input_size=(8, 12), patch_size=4, width=24, depth=1, heads=2).eval()
    images, views = torch.randn(2, 3, 8, 12), torch.rand(2, 3, 4, 6)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, [5, 1]] = mask[1, 3] = True
    batch = Batch((images, views), torch.arange(2), ["a", "b"], [])
    loss = TokenLoss(Corners())(model, batch, mask)
    scores = model.lm_head(model.encode(images, mask)).log_softmax(dim=2)
    codes = Corners().codes(views).flatten(1)
    wanted = -torch.stack([scores[image, place, codes[image, place]] for image, place in ((0, 1), (0, 5), (1, 3))]).mean()
    torch.testing.assert_close(loss, wanted)


def test_head_follows_the_tokenizer_and_the_view_its_stride(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    method = build(parse_arguments(BEiTConfig, PROGRAM, "", flags("beit", tmp_path, tmp_path).split())[0])
    assert method.model.lm_head.out_features == 16
    assert isinstance(method.transform, TwoViews)
    assert method.transform.second_size == (8, 8)
    assert method.facts["vocabulary"] == 16
    assert folder.is_dir()


def test_a_resumed_run_needs_the_same_tokenizer(image_folder: Path, tmp_path: Path) -> None:
    """Moved elsewhere it is the same; with other weights it is refused, though its path is the same."""
    command = f"{flags('beit', image_folder, tmp_path)} --epochs 1 --output_dir {tmp_path / 'run'}"
    main(command.split())
    assert len(torch.load(tmp_path / "run" / LAST, weights_only=True)["facts"]["tokenizer_sha256"]) == 64
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    main(f"{command} --tokenizer {tmp_path / 'moved'}".split())
    write_tokenizer(tmp_path / "tokenizer", seed=1)
    with pytest.raises(BadInput, match=r"made with .*tokenizer_sha256"):
        main(command.split())


def test_command_line_errors(tmp_path: Path) -> None:
    """One line on stderr and exit code 2 without a tokenizer; other values are named too."""
    run = run_module(f"beit_evolved.run_beit_pretraining --output_dir {tmp_path}")
    assert run.returncode == 2
    assert run.stderr.startswith("run_beit_pretraining: error: --tokenizer must name a tokenizer's file or folder")
    assert run.stderr.count("\n") == 1
    with pytest.raises(BadInput, match="--color_jitter must be 0 or more"):
        parse("--color_jitter -1")
    with pytest.raises(BadInput, match="--model must be one of beit_tiny_patch4_8k_vocab"):
        parse("--model vit")


def test_recipes_parse() -> None:
    for recipe in sorted(RECIPES.glob("*.toml")):
        if "tokenizer" not in recipe.name:
            parse(f"--config {recipe} --data_path images")
