"""Training of the tokenizer: the loss falls, codes stay in use, exact resume, what is written, errors."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from beit_evolved import run_beit_pretraining
from beit_evolved.tokenizer import OWN_FILE, DiscreteVAE, codebook_usage, collapse_warning, load_tokenizer
from beit_evolved.train_tokenizer import (
    PROGRAM,
    TokenizerConfig,
    main,
    temperature_at,
    vae_loss,
)
from common.draws import Stream, hash_seed
from common.training.augment import RandomCrop, colours
from common.training.checkpoint import LAST
from common.training.command_line import parse_flags
from common.training.data import RankBatches, Samples
from common.training.distributed import Processes
from common.training.errors import BadInput
from common.training.loop import Loop
from common.training.sources import open_source
from tests import methods
from tests.conftest import ROOT, assert_same, free_ports, read_log, run_module

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
    assert list(torch.load(output / "pytorch_model.bin", weights_only=True)) == ["weights", "usage"]
    with Image.open(output / "reconstructions.png") as sheet:
        assert sheet.size == (8 * 16, 2 * 16)
    assert json.loads((output / "run.json").read_text())["config"]["vocabulary"] == 16
    assert list((output / "tensorboard").iterdir())


def test_no_picture_where_no_image_can_be_read(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pictures at the end of an epoch are of the first images; if those went away, the tokenizer is written without."""
    original = Loop._end_epoch

    def spoil(self: Loop, *rest: object) -> None:
        for path in image_folder.rglob("*.jpg"):
            path.write_bytes(b"no image")
        original(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_end_epoch", spoil)
    output = train(image_folder, tmp_path / "run", "--epochs 1")
    assert load_tokenizer(str(output)).vocabulary == 16
    assert not (output / "reconstructions.png").exists()


def final_state(output: Path) -> dict[str, object]:
    state = torch.load(output / LAST, weights_only=True)
    return {key: state[key] for key in ("model", "weights", "optimizer", "epoch", "update", "meters")}


@pytest.mark.parametrize(
    ("place", "more"),
    [((2, 0), ""), ((1, 3), "--save_steps 2"), ((1, 3), "--save_steps 2 --batch_size 4 --accum_iter 2 --precision bf16")],
    ids=["between epochs", "in an epoch", "in an epoch of bf16"],
)
def test_exact_resume(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[int, int], more: str
) -> None:
    """4 epochs of 4 updates equal a cut-off run and its resume, to the bit; counts of codes too, which the log shows."""
    whole = train(image_folder, tmp_path / "whole", more)
    original = Loop._train_update

    def cut(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == place:
            raise KeyboardInterrupt
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_update", cut)
        with pytest.raises(KeyboardInterrupt):
            train(image_folder, tmp_path / "parts", more)
    left = torch.load(tmp_path / "parts" / LAST, weights_only=True)
    assert (left["epoch"], left["update"]) == ((1, 0) if place[1] == 0 else (0, 2))
    parts = train(image_folder, tmp_path / "parts", more)
    assert_same(final_state(whole), final_state(parts))
    assert_same(*(torch.load(output / OWN_FILE, weights_only=True) for output in (whole, parts)))
    assert read_log(whole) == read_log(parts)
    assert len(read_log(parts)) == 4
    with pytest.raises(BadInput, match="--vocabulary 16 -> 8"):
        train(image_folder, tmp_path / "parts", f"{more} --vocabulary 8")


def old_layout(state: dict[str, Any]) -> dict[str, Any]:
    """What this training wrote before it had processes, precision and resume in an epoch."""
    new = {"precision", "compile", "save_freq", "save_steps"}
    config = {key: value for key, value in state["config"].items() if key not in new}
    return {**{key: state[key] for key in ("weights", "optimizer", "epoch")}, "config": config}


def test_a_checkpoint_of_the_old_layout_goes_on(image_folder: Path, tmp_path: Path) -> None:
    """To the same end as a run that never stopped; with other settings it is refused, and so is one without a state.

    Of those times is PIL as the loader.
    """
    whole = train(image_folder, tmp_path / "whole", "--save_freq 1 --loader pil")
    old = tmp_path / "old" / LAST
    old.parent.mkdir()
    torch.save(old_layout(torch.load(whole / "checkpoint-1.pth", weights_only=True)), old)
    for flags, named in (("--width 4", "--width 8 -> 4"), ("--batch_size 4", "effective_batch 8 -> 4"), ("--blr 1", "--blr ")):
        with pytest.raises(BadInput, match=named):
            train(image_folder, old.parent, flags)
    again = train(image_folder, old.parent, "--save_freq 1")
    assert_same(final_state(whole), final_state(again))
    assert read_log(again) == read_log(whole)[2:]
    torch.save({"weights": {}}, old)
    with pytest.raises(BadInput, match="has no training state to resume"):
        train(image_folder, old.parent)


def test_a_checkpoint_is_a_tokenizer_too(image_folder: Path, tmp_path: Path) -> None:
    output = train(image_folder, tmp_path / "run", "--epochs 1")
    assert_same(load_tokenizer(str(output / LAST)).state_dict(), load_tokenizer(str(output)).state_dict())


def test_two_processes_average_their_gradients(image_folder: Path, tmp_path: Path) -> None:
    """Losses and weights equal to 1e-5 those of a plain loop over both ranks' halves, each with the noise of its rank."""
    flags = f"{TINY} --data_path {image_folder} --batch_size 4 --epochs 2".replace("--batch_size 8", "").replace("--epochs 4", "")
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m beit_evolved.train_tokenizer"
    done = run_module(f"{launch} {flags} --output_dir {tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    losses, model = plain_loop(parse_flags(TokenizerConfig, PROGRAM, "", flags.split()))
    assert [line["train_loss"] for line in read_log(tmp_path / "two")] == pytest.approx(losses, abs=1e-5)
    trained = torch.load(tmp_path / "two" / LAST, weights_only=True)["model"]
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trained[key], value, atol=1e-5, rtol=1e-4, msg=key)


def plain_loop(config: TokenizerConfig) -> tuple[list[float], DiscreteVAE]:
    """Losses of the epochs of a run of two ranks, written out: no processes, no loop of the project."""
    samples = Samples(open_source(config), RandomCrop(config), config.seed, config.repeat, "torchvision")
    order = [RankBatches(len(samples), config, Processes(rank, 2, rank, torch.device("cpu"))) for rank in (0, 1)]
    torch.manual_seed(config.seed)
    model = DiscreteVAE(config.vocabulary, config.code_width, config.layers, config.width)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(config.beta1, config.beta2), weight_decay=0.0)
    means, updates = [], order[0].updates
    for epoch in range(config.epochs):
        for sampler in order:
            sampler.start_at(epoch)
        total = 0.0
        for update, keys in enumerate(zip(*order, strict=True)):
            share = (epoch + update / updates) / config.epochs
            optimizer.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * share)) / 2  # type: ignore[operator]
            for rank in (0, 1):
                torch.manual_seed(hash_seed(config.seed, epoch, 2 * update + rank, Stream.MODEL))
                images = colours(torch.stack([samples[key][0][0] for key in keys[rank]]))  # type: ignore[index]
                loss, _ = vae_loss(model, images, temperature_at(share, config.temperature), 0.0, config.usage_weight)
                (loss / 2).backward()
                total += float(loss.detach()) / 2
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        means.append(total / updates)
    return means, model


@pytest.mark.slow
def test_a_signal_stops_it_in_an_epoch(image_folder: Path, tmp_path: Path) -> None:
    """SIGUSR1 to one of two ranks: both leave with code 75 in the middle of an epoch, and go on to the same end."""
    flags = f"{TINY} --data_path {image_folder} --batch_size 1 --epochs 3 --warmup_epochs 1"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_ports())]
    command = [*launch, "-m", "tests.beit_evolved.signalled_tokenizer", *flags.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, after in (("whole", ""), ("cut", "5"), ("cut", "")):
        words = [*command, "--output_dir", str(tmp_path / name)]
        done = subprocess.run(words, cwd=ROOT, env={**environment, "SIGNAL_AFTER": after}, capture_output=True, text=True)
        assert (done.returncode == 0) == (not after), done.stderr
        if after:
            assert "asked to stop; saved" in done.stderr
            state = torch.load(tmp_path / name / LAST, weights_only=True)
            assert (state["epoch"], state["update"]) == (-1, 6)
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


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


def test_a_collapsed_tokenizer_warns_at_its_end_and_at_the_start_of_beit(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rate that breaks the codes: one code of 64 is left. The warning is in result.json, and BEiT repeats it (seed 0)."""
    output = train(image_folder, tmp_path / "run", "--lr 1 --vocabulary 64 --usage_weight 0 --epochs 2 --clip_grad 100")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: the tokenizer has collapsed")]
    result = json.loads((output / "result.json").read_text())
    last = read_log(output)[-1]
    assert result["collapsed"] is True
    assert result["metrics"]["perplexity"] == last["perplexity"] < 2  # type: ignore[operator]
    assert result["metrics"]["codes_used"] == last["codes_used"]
    assert len(said) == 1
    assert f"{round(64 * float(str(last['codes_used'])))} of 64 codes in use" in said[0]
    train(image_folder, tmp_path / "run", "--lr 1 --vocabulary 64 --usage_weight 0 --epochs 2 --clip_grad 100")  # finished
    assert said[0] in capsys.readouterr().out.splitlines()
    flags = methods.flags("beit", image_folder, tmp_path).split("--tokenizer")[0]
    run_beit_pretraining.main(f"{flags} --tokenizer {output} --output_dir {tmp_path}/beit --epochs 1".split())
    assert said[0] in capsys.readouterr().out.splitlines()
    run_beit_pretraining.main(f"{flags} --tokenizer {output / LAST} --output_dir {tmp_path}/beit2 --epochs 1".split())
    assert said[0] in capsys.readouterr().out.splitlines()


def test_a_tokenizer_in_use_does_not_warn(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = train(image_folder, tmp_path / "run", "--epochs 8")
    assert json.loads((output / "result.json").read_text())["collapsed"] is False
    assert "collapsed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("perplexity", "vocabulary", "warns"),
    [(1.9, 16, True), (2.0, 16, False), (163.0, 8192, True), (164.0, 8192, False), (10.2, 512, True), (10.3, 512, False)],
)
def test_what_counts_as_collapsed(perplexity: float, vocabulary: int, warns: bool) -> None:
    """Below 2 % of the vocabulary, and below 2 codes; a tokenizer that does not say is not blamed."""
    assert bool(collapse_warning({"codes_used": 0.5, "perplexity": perplexity}, vocabulary)) == warns
    assert collapse_warning(None, vocabulary) == ""


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


def test_unreadable_images(image_folder: Path, tmp_path: Path) -> None:
    broken = image_folder / "train" / "cat" / "image_05.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(BadInput, match=r"unreadable image .*image_05.jpg"):
        train(image_folder, tmp_path / "bad")
    assert len(read_log(train(image_folder, tmp_path / "skipped", "--on_bad_image skip --epochs 1"))) == 1


def test_recipe_parses() -> None:
    recipe = ROOT / "beit_evolved" / "recipes" / "demo_tokenizer.toml"
    assert parse_flags(TokenizerConfig, PROGRAM, "", ["--config", str(recipe)]).vocabulary == 512
