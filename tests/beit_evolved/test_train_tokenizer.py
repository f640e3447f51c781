"""Training of the tokenizer: the loss falls, codes stay in use, exact resume, what is written, errors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from beit_evolved.tokenizer import DiscreteVAE, load_tokenizer
from beit_evolved.train_tokenizer import (
    PROGRAM,
    TokenizerConfig,
    TokenizerTraining,
    codebook_usage,
    main,
    temperature_at,
    vae_loss,
)
from common.training.checkpoint import LAST
from common.training.config import parse_flags
from common.training.errors import BadInput
from tests.conftest import ROOT, assert_same, read_log

TINY = "--input_size 16 --batch_size 8 --epochs 4 --repeat 2 --lr 3e-3 --vocabulary 16 --code_width 8 --layers 2 --width 8 "
TINY += "--num_workers 0 --device cpu --warmup_epochs 0"


def train(images: Path, output: Path, more: str = "") -> Path:
    main(f"{TINY} --data_path {images} --output_dir {output} {more}".split())
    return output


def test_training_is_logged_and_loads(image_folder: Path, tmp_path: Path) -> None:
    output = train(image_folder, tmp_path / "run", "--epochs 8")
    log = read_log(output)
    assert float(str(log[-1]["train_loss"])) < 0.9 * float(str(log[0]["train_loss"]))
    assert float(str(log[-1]["codes_used"])) >= 0.2
    assert log[-1]["temperature"] == pytest.approx(0.0625)
    tokenizer = load_tokenizer(str(output))
    assert (tokenizer.vocabulary, tokenizer.stride) == (16, 4)
    assert list(torch.load(output / "pytorch_model.bin", weights_only=True)) == ["weights"]
    with Image.open(output / "reconstructions.png") as sheet:
        assert sheet.size == (8 * 16, 2 * 16)
    assert json.loads((output / "run.json").read_text())["config"]["vocabulary"] == 16
    assert list((output / "tensorboard").iterdir())


def test_exact_resume(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 epochs equal 2 and a resume, to the bit."""
    whole = train(image_folder, tmp_path / "whole")
    original = TokenizerTraining._train_epoch

    def cut(self: TokenizerTraining, epoch: int, loader: object) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        original(self, epoch, loader)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTraining, "_train_epoch", cut)
        with pytest.raises(KeyboardInterrupt):
            train(image_folder, tmp_path / "parts")
    parts = train(image_folder, tmp_path / "parts")
    states = [torch.load(output / LAST, weights_only=True) for output in (whole, parts)]
    for key in ("weights", "optimizer", "epoch"):
        assert_same(states[0][key], states[1][key])
    assert read_log(whole) == read_log(parts)
    with pytest.raises(BadInput, match="--vocabulary 16 -> 8"):
        train(image_folder, tmp_path / "parts", "--vocabulary 8")


def test_loss_terms() -> None:
    """Without weights the loss is the squared error; the two terms are divergences from uniform codes."""
    model = DiscreteVAE(4, 3, 1, 5)
    images = torch.rand(2, 3, 4, 4)

    def loss(**weights: float) -> float:
        torch.manual_seed(1)
        return float(vae_loss(model, images, 1.0, **weights)[0].detach())

    torch.manual_seed(1)
    reconstruction, logits = model(images, 1.0)
    plain = float((reconstruction - (2 * images - 1)).square().mean().detach())
    assert loss() == pytest.approx(plain)
    shares = logits.softmax(dim=1)
    each = (shares * (shares * 4).log()).sum(dim=1).mean()
    assert loss(kl_weight=2.0) == pytest.approx(plain + 2 * each.item(), rel=1e-4)
    mean = shares.mean(dim=(0, 2, 3))
    assert loss(usage_weight=3.0) == pytest.approx(plain + 3 * (mean * (mean * 4).log()).sum().item(), rel=1e-4)
    assert torch.equal(vae_loss(model, images, 1.0)[1], model.codes(images))


def test_schedule_and_usage() -> None:
    assert temperature_at(0.0, (1.0, 0.0625)) == 1.0
    assert temperature_at(1.0, (1.0, 0.0625)) == pytest.approx(0.0625)
    assert temperature_at(0.5, (1.0, 0.0625)) == pytest.approx(0.53125)
    usage = codebook_usage(torch.tensor([5, 5, 0, 0]))
    assert usage["codes_used"] == 0.5
    assert usage["perplexity"] == pytest.approx(2.0)
    assert codebook_usage(torch.ones(8))["perplexity"] == pytest.approx(8.0)
    assert math.isfinite(usage["perplexity"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--input_size 100", "--input_size must be divisible by 8, the pixels of a code"),
        ("--temperature 1 0", "--temperature must be above 0 at both ends"),
        ("--vocabulary 0", "--vocabulary must be 1 or more"),
        ("--mask grid", "unrecognized arguments: --mask grid"),
    ],
)
def test_bad_flags_are_named(words: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse_flags(TokenizerConfig, PROGRAM, "", words.split())


def test_one_process_only(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = image_folder / "train" / "cat" / "image_05.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(BadInput, match=r"unreadable image .*image_05.jpg"):
        train(image_folder, tmp_path / "bad")
    assert len(read_log(train(image_folder, tmp_path / "skipped", "--on_bad_image skip --epochs 1"))) == 1


def test_recipe_parses() -> None:
    recipe = ROOT / "beit_evolved" / "recipes" / "demo_tokenizer.toml"
    assert parse_flags(TokenizerConfig, PROGRAM, "", ["--config", str(recipe)]).vocabulary == 512
