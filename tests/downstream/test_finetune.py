"""Fine-tuning: scores, mixing, exact resume, processes, checkpoints of all methods, what is refused."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score
from timm.data.mixup import mixup_target
from torch import Tensor, nn

from common.training.data import Batch
from common.training.errors import BadInput, run_cli
from downstream import finetune
from downstream.classification.evaluation import count_correct
from downstream.classification.labelled import middle, open_labelled
from downstream.classification.loss import MixedLoss
from downstream.classification.model import Classifier
from downstream.finetune import FinetuneConfig
from downstream.training import evaluation_batches
from downstream.vit import METHODS, BackboneViT, Method
from tests.conftest import ROOT, assert_same, free_ports, read_log, run_module
from tests.downstream.labelled_folder import CLASSES, ONE, SMALL, assert_refused, result, saved, shake, shrink_models, write_set
from tests.downstream.test_weights import pretrained

EVERYTHING = (
    "--mixup 0.8 --cutmix 1 --mix_prob 0.8 --random_erasing 0.5 --drop_path 0.3 --model_ema 0.8 --smoothing 0.1 "
    "--auto_augment rand-m9-mstd0.5-inc1 "
)
PLAIN = "--mixup 0 --cutmix 0 --drop_path 0"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_set(tmp_path / "images")


@pytest.fixture
def tune(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Fine-tunes a small model: `tune("name", "--flag value ...")`."""
    shrink_models(monkeypatch)

    def run(name: str, flags: str = "", epochs: int = 2) -> Path:
        output = tmp_path / name
        common = f"{SMALL} --data_path {images} --batch_size 8 --lr 1e-3 --epochs {epochs} --pictures 0"
        finetune.main([word.replace("NONE", "") for word in f"{common} --output_dir {output} {flags}".split()])
        return output

    return run


@torch.no_grad()
def scored(model: Classifier, images: Path, config: FinetuneConfig | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(classes, probabilities) of the validation set, image by image, in float64."""
    flags = config or FinetuneConfig(model="vit_tiny_patch4", input_size="16", num_workers=0, data_path=str(images))
    val = open_labelled(flags, train=False)
    pairs = [middle(flags)(val.load(index)) for index in range(len(val))]
    logits = torch.cat([model.eval()(image[None]) for image, _ in pairs]).double()
    return np.array([int(label) for _, label in pairs]), logits.softmax(dim=1).numpy()


def assert_scores(numbers: dict[str, float], truth: np.ndarray, shares: np.ndarray) -> None:
    """Equal to scikit-learn's."""
    names = np.arange(shares.shape[1])
    assert numbers["top1"] == pytest.approx(100 * top_k_accuracy_score(truth, shares, k=1, labels=names))
    assert numbers["top5"] == pytest.approx(100 * top_k_accuracy_score(truth, shares, k=5, labels=names))
    assert numbers["val_loss"] == pytest.approx(log_loss(truth, shares, labels=names), rel=1e-5)


def small_classifier(method: Method = "mae", pool: str = "mean", classes: int = 7) -> Classifier:
    encoder = BackboneViT(method, (16, 16), patch_size=4, width=24, depth=3, heads=2)
    return Classifier(encoder, classes, pool, nn.LayerNorm(24, eps=1e-6))


# --- the model and its scores ---


def test_counts_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 9, generator=generator), torch.randint(9, (50,), generator=generator)
    images, first, five, loss = count_correct(logits, labels).tolist()
    assert images == 50
    numbers = {"top1": 2 * first, "top5": 2 * five, "val_loss": loss / 50}
    assert_scores(numbers, labels.numpy(), logits.double().softmax(dim=1).numpy())


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_pooling(method: Method) -> None:
    """Mean of the patch tokens without the class token, or the class token; then norm and head."""
    images = torch.randn(2, 3, 16, 16)
    for pool in ("mean", "cls"):
        model = shake(small_classifier(method, pool)).eval()
        (tokens,) = model.encoder(images, [2])
        assert tokens.shape == (2, 17, 24)
        pooled = tokens[:, 1:].sum(dim=1) / 16 if pool == "mean" else tokens[:, 0]
        normed = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        expected = (normed * model.fc_norm.weight + model.fc_norm.bias) @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=0)


def test_scores_of_a_run_are_those_of_its_weights(tune: Callable[..., Path], images: Path) -> None:
    """result.json against scikit-learn on the saved weights: the trained ones, or their moving average where it is on."""
    for name, flags, key in (("plain", "--lr 1e-2", "model"), ("ema", "--lr 1e-2 --model_ema 0.7", "ema")):
        output = tune(name, flags, epochs=3)
        model = small_classifier()
        model.load_state_dict(saved(output)[key])
        assert_scores(result(output)["metrics"], *scored(model, images))
    assert not torch.equal(saved(output)["ema"]["head.weight"], saved(output)["model"]["head.weight"])


def test_no_top5_of_five_classes(tune: Callable[..., Path], images: Path) -> None:
    for part in ("train", "val"):
        for name in CLASSES[5:]:
            shutil.rmtree(images / part / name)
    assert set(result(tune("out", "--drop_path 0"))["metrics"]) == {"epoch", "top1", "val_loss"}


def test_it_learns(tune: Callable[..., Path]) -> None:
    """Classes that differ in colour are told apart."""
    output = tune("out", f"{PLAIN} --lr 3e-3 --layer_decay 1 --random_erasing 0 --auto_augment NONE --repeat 4", epochs=8)
    assert result(output)["metrics"]["top1"] > 70


# --- mixing ---


class Watched(nn.Module):
    """Linear in the means of the channels; keeps what it was given."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.weights = torch.randn(3, classes, generator=torch.Generator().manual_seed(0))

    def forward(self, images: Tensor) -> Tensor:
        self.images = images
        return images.mean(dim=(2, 3)) @ self.weights


def plain_batch(count: int) -> Batch:
    """Image i is filled with i."""
    images = torch.arange(float(count))[:, None, None, None].expand(-1, 3, 8, 8).clone()
    return Batch((images, torch.arange(count) % 5), torch.arange(count), [""] * count, [])


def shares_of(mixed: Tensor, kind: str) -> Tensor:
    """How much of image i is its own, from images filled with i, mixed with image i - 1."""
    count = len(mixed)
    own, other = torch.arange(float(count)), torch.arange(float(count)).roll(1)
    if kind == "mixup":
        return ((mixed.mean(dim=(1, 2, 3)) - other) / (own - other)).clamp(0, 1)
    return (mixed == own[:, None, None, None]).float().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_of_mixed_images(kind: str, smoothing: float) -> None:
    """Targets from how images were mixed, with the on and off values of timm's Mixup; they sum to 1."""
    other = {"mixup": "cutmix", "cutmix": "mixup"}[kind]
    loss, shares = MixedLoss(FinetuneConfig(smoothing=smoothing, **{other: 0.0}), 6), set()  # type: ignore[arg-type]
    for seed in range(12):
        model, batch = Watched(6), plain_batch(7)
        torch.manual_seed(seed)
        found = loss(model, batch)
        lam = shares_of(model.images, kind)
        assert float(lam.std()) < 1e-5, "one draw a batch"
        low, high = smoothing / 6, 1 - smoothing + smoothing / 6
        own, partner = (torch.full((7, 6), low) for _ in range(2))
        own[torch.arange(7), batch.views[1]] = high
        partner[torch.arange(7), batch.views[1].roll(1)] = high
        targets = lam[:, None] * own + (1 - lam[:, None]) * partner
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(7))
        expected = -(targets * model(model.images).log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        shares.add(round(float(lam[0]), 3))
    assert len(shares) > 6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_are_those_of_timm(smoothing: float) -> None:
    """Of a pair of images, previous and reverse order are the same partner."""
    loss = MixedLoss(FinetuneConfig(smoothing=smoothing, cutmix=0.0), 6)
    for seed in range(5):
        model, batch = Watched(6), plain_batch(2)
        torch.manual_seed(seed)
        found = loss(model, batch)
        targets = mixup_target(batch.views[1], 6, float(shares_of(model.images, "mixup")[0]), smoothing, device="cpu")
        expected = -(targets * model(model.images).log_softmax(dim=1)).sum(dim=1).mean()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_smoothing_without_mixing() -> None:
    """(1 - s) * cross-entropy + s * mean over classes of -log p."""
    batch, model = plain_batch(7), Watched(6)
    for config in (FinetuneConfig(mixup=0, cutmix=0, smoothing=0.3), FinetuneConfig(mix_prob=0, smoothing=0.3)):
        found = MixedLoss(config, 6)(model, batch)
        assert model.images is batch.images
        logs = model(batch.images).log_softmax(dim=1)
        expected = -(0.7 * logs[torch.arange(7), batch.views[1]] + 0.3 * logs.mean(dim=1)).mean()
        torch.testing.assert_close(found, expected)


def test_how_often_each_kind_is_drawn() -> None:
    """Half mixup, half cutmix of the three quarters that are mixed; shares of mixup follow Beta(.8, .8)."""
    loss, kinds, shares = MixedLoss(FinetuneConfig(mix_prob=0.75), 6), {"none": 0, "mixup": 0, "cutmix": 0}, []
    torch.manual_seed(0)
    for _ in range(600):
        model, batch = Watched(6), plain_batch(3)
        loss(model, batch)
        if torch.equal(model.images, batch.images):
            kinds["none"] += 1
        elif float(model.images[2].std()) < 1e-6 and not float(model.images[2, 0, 0, 0]).is_integer():
            kinds["mixup"] += 1
            shares.append(float(shares_of(model.images, "mixup")[2]))
        else:
            kinds["cutmix"] += 1
    assert kinds["none"] == pytest.approx(150, abs=45), "a box without pixels counts as none"
    assert kinds["mixup"] == pytest.approx(225, abs=45)
    assert kinds["cutmix"] == pytest.approx(225, abs=45)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.02)


# --- exact resume, and more processes ---


def test_four_epochs_are_two_and_two(tune: Callable[..., Path]) -> None:
    """With everything random on: weights, optimiser, moving average, log and scores to the bit."""
    whole = tune("whole", f"{EVERYTHING} --save_freq 1", epochs=4)
    rest = whole.parent / "rest"
    rest.mkdir()
    shutil.copy(whole / "checkpoint-1.pth", rest / "checkpoint-last.pth")
    lines = (whole / "log.txt").read_text().splitlines(keepends=True)
    (rest / "log.txt").write_text("".join(lines[:2]))
    tune("rest", f"{EVERYTHING} --save_freq 1 --num_workers 1", epochs=4)
    first, second = saved(whole), saved(rest)
    for key in ("model", "ema", "optimizer", "scores", "best", "epoch"):
        assert_same(first[key], second[key], key)
    assert read_log(whole) == read_log(rest)
    for key in ("metrics", "best", "facts", "task"):
        assert result(whole)[key] == result(rest)[key]
    assert not torch.equal(first["model"]["head.weight"], torch.load(whole / "checkpoint-1.pth")["model"]["head.weight"])


REAL = "--model vit_tiny_patch8 --input_size 16 --device cpu --num_workers 0 --lr 1e-3 --epochs 2 --warmup_epochs 1 --pictures 0"


@pytest.mark.slow
def test_interrupted_in_the_middle_of_an_epoch(images: Path, tmp_path: Path) -> None:
    """SIGUSR1: saved, code 75; the same command goes on to the same end as a run that was left alone."""
    flags = f"downstream.finetune {REAL} {EVERYTHING} --data_path {images} --batch_size 4 --repeat 3"
    whole = run_module(f"{flags} --output_dir {tmp_path}/whole")
    assert whole.returncode == 0, whole.stderr
    output = tmp_path / "cut"
    process = subprocess.Popen(
        [sys.executable, "-m", *flags.split(), "--output_dir", str(output)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (output / "log.txt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    shown = process.communicate(timeout=300)[0]
    assert process.returncode == 75, shown
    assert "asked to stop; saved" in shown
    assert saved(output)["update"] > 0
    assert not (output / "result.json").exists()
    again = run_module(f"{flags} --output_dir {output}")
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stdout
    assert_same(saved(output)["model"], saved(tmp_path / "whole")["model"])
    assert_same(saved(output)["ema"], saved(tmp_path / "whole")["ema"])
    assert read_log(output) == read_log(tmp_path / "whole")
    assert result(output)["metrics"] == result(tmp_path / "whole")["metrics"]


@pytest.mark.slow
def test_two_processes_equal_one(images: Path, tmp_path: Path) -> None:
    """The same images an update; 21 validation images, which two ranks cannot share evenly. Then scikit-learn's numbers."""
    flags = f"downstream.finetune {REAL} {PLAIN} --data_path {images} --random_erasing 0.5"
    one = run_module(f"{flags} --batch_size 8 --output_dir {tmp_path}/one")
    assert one.returncode == 0, one.stderr
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m"
    two = run_module(f"{launch} {flags} --batch_size 4 --output_dir {tmp_path}/two")
    assert two.returncode == 0, two.stderr
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    for first, second in zip(*logs, strict=True):
        assert second["train_loss"] == pytest.approx(first["train_loss"], abs=1e-5)
        assert second["val_loss"] == pytest.approx(first["val_loss"], abs=1e-5)
        assert (second["top1"], second["top5"]) == (first["top1"], first["top5"])
    states = [saved(tmp_path / name)["model"] for name in ("one", "two")]
    assert max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0]) < 1e-4
    config = FinetuneConfig(model="vit_tiny_patch8", input_size="16", num_workers=0, data_path=str(images))
    model = Classifier(BackboneViT("mae", (16, 16), 8, 192, 12, 3), 7, "mean", nn.LayerNorm(192, eps=1e-6))
    model.load_state_dict(states[1])
    assert_scores(result(tmp_path / "two")["metrics"], *scored(model, images, config))


@pytest.mark.slow
def test_an_image_that_one_rank_cannot_read_ends_both(images: Path, tmp_path: Path) -> None:
    (images / "val" / "bee" / "0.png").write_bytes(b"broken")  # number 3 of the set: the second rank's
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m"
    run = run_module(f"{launch} downstream.finetune {REAL} --data_path {images} --batch_size 4 --output_dir {tmp_path}/two")
    assert run.returncode != 0
    assert "finetune: error: unreadable image" in run.stderr
    assert "bee/0.png" in run.stderr
    assert "errors.py" not in run.stderr
    assert not (tmp_path / "two" / "result.json").exists()


# --- checkpoints ---


def official(method: Method, **more: Any) -> dict[str, Any]:
    """A pre-training checkpoint as the official code writes it."""
    flags = argparse.Namespace(input_size=16, model=f"{method}_vit")
    return {"model": pretrained(method, (16, 16)).state_dict(), "optimizer": {}, "epoch": 3, "args": flags, **more}


LEFT = {
    "mae": "mask_token (1), decoder_pos_embed (1), norm (2), decoder_embed (2), decoder_blocks (12), ",
    "beit": "shared position bias copied to each block; left out: mask_token (1), norm (2), lm_head (2)",
    "simmim": "shared position bias copied to each block; left out: mask_token (1), norm (2), decoder (2)",
}


@pytest.mark.parametrize("method", METHODS)
def test_official_pretraining_is_fine_tuned(
    method: Method, tune: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read without --method, all names accounted for; at a rate of almost 0 the encoder stays that of the checkpoint."""
    state = official(method)
    torch.save(state, tmp_path / "official.pth")
    output = tune("out", f"--init_from {tmp_path}/official.pth --lr 1e-12", epochs=1)
    assert LEFT[method] in capsys.readouterr().out
    held = saved(output)
    assert held["config"]["method"] == method
    theirs = {key.removeprefix("encoder."): value for key, value in state["model"].items()}
    for key in ("patch_embed.proj.weight", "blocks.2.attn.qkv.weight", "cls_token"):
        torch.testing.assert_close(held["model"][f"encoder.{key}"], theirs[key], atol=1e-9, rtol=0)
    if method != "mae":
        for block in range(3):
            table = held["model"][f"encoder.blocks.{block}.attn.relative_position_bias_table"]
            torch.testing.assert_close(table, theirs["rel_pos_bias.relative_position_bias_table"], atol=1e-9, rtol=0)
    tune("chained", f"--init_from {output}/checkpoint-last.pth", epochs=1)
    assert "left out: fc_norm (2), head (2)" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_norm_of_pretraining_goes_with_the_class_token(method: Method, tune: Callable[..., Path], tmp_path: Path) -> None:
    state = official(method)
    torch.save(state, tmp_path / "official.pth")
    norm = next(value for key, value in state["model"].items() if key.removeprefix("encoder.") == "norm.weight")
    for pool in ("cls", "mean"):
        output = tune(pool, f"--init_from {tmp_path}/official.pth --lr 1e-12 --pool {pool}", epochs=1)
        expected = norm if pool == "cls" else torch.ones(24)
        torch.testing.assert_close(saved(output)["model"]["fc_norm.weight"], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pool", ["mean", "cls"])
@pytest.mark.parametrize("layout", ["official", "ours"])
def test_fine_tuned_checkpoints_are_evaluated(
    method: Method, pool: str, layout: str, tune: Callable[..., Path], images: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Head and norm too: `fc_norm`, or `norm` for the class token. Scores are scikit-learn's, and nothing is written."""
    model = shake(small_classifier(method, pool), size=0.3)
    weights = model.state_dict()
    state: dict[str, Any] = {"model": weights, "config": {"pool": pool, "method": method}}
    if layout == "official":
        renamed = {key.removeprefix("encoder."): value for key, value in weights.items()}
        state["model"] = {key.replace("fc_norm", "norm" if pool == "cls" else "fc_norm"): one for key, one in renamed.items()}
        state["config"] = {}
    torch.save(state, tmp_path / "tuned.pth")
    tune("out", f"--init_from {tmp_path}/tuned.pth --eval_only --method {method} --pool {pool}")
    truth, shares = scored(model, images)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fine-tuning: top1"))
    top1, top5, loss = (float(word) for word in said.split()[2::2])
    expected = [100 * top_k_accuracy_score(truth, shares, k=k, labels=np.arange(7)) for k in (1, 5)]
    assert [top1, top5, loss] == pytest.approx([*expected, log_loss(truth, shares, labels=np.arange(7))], abs=0.006)
    assert 0 < top5 < 100
    assert_refused(tmp_path / "out")
    other = {"mean": "cls", "cls": "mean"}[pool]
    with pytest.raises(BadInput, match=f"was fine-tuned with --pool {pool}, not {other}"):
        tune("out", f"--init_from {tmp_path}/tuned.pth --eval_only --method {method} --pool {other}")


def test_what_cannot_be_evaluated(tune: Callable[..., Path], tmp_path: Path) -> None:
    torch.save(official("mae"), tmp_path / "official.pth")
    torch.save({"model": small_classifier(classes=9).state_dict(), "config": {"pool": "mean"}}, tmp_path / "nine.pth")
    torch.save({"model": small_classifier("beit").state_dict()}, tmp_path / "unsaid.pth")
    for flags, message in (
        ("", "--eval_only: no weights to evaluate; give --resume PATH or --init_from PATH"),
        ("--init_from official.pth", r"has no head.weight; --eval_only needs a fine-tuned checkpoint"),
        ("--init_from nine.pth", r"nine.pth: head.weight is \[9, 24\] instead of \[7, 24\]"),
        ("--init_from unsaid.pth", "made by beit or simmim, which it does not say; give --method"),
        ("--resume absent.pth", "checkpoint .*absent.pth: no such file"),
        ("--resume official.pth", "official.pth: has no state of fine-tuning to resume; --init_from takes its encoder"),
    ):
        with pytest.raises(BadInput, match=message):
            tune("out", f"--eval_only {flags}".replace(" official", f" {tmp_path}/official").replace(" nine", f" {tmp_path}/nine")
                 .replace(" unsaid", f" {tmp_path}/unsaid").replace(" absent", f" {tmp_path}/absent"))  # fmt: skip
        assert_refused(tmp_path / "out")
    output = tune("out")
    torch.save({"model": small_classifier().state_dict(), "config": {"pool": "mean"}}, tmp_path / "tuned.pth")
    with pytest.raises(BadInput, match=r"--eval_only: .*checkpoint-last.pth or --init_from .*tuned.pth\? Give --resume none"):
        tune("out", f"--eval_only --init_from {tmp_path}/tuned.pth")
    tune("out", f"--eval_only --init_from {tmp_path}/tuned.pth --resume none")
    assert result(output)["config"]["eval_only"] is False


def test_method_of_the_run_that_is_resumed(tune: Callable[..., Path]) -> None:
    """Without --init_from and --method the folder's own checkpoint says it."""
    output = tune("out", "--method simmim", epochs=1)
    tune("out", "", epochs=1)
    assert result(output)["config"]["method"] == "simmim"


# --- what is refused ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mixup -1", "--mixup must be 0 or more, got -1.0"),
        ("--cutmix nan", "--cutmix must be 0 or more, got nan"),
        ("--mix_prob 1.5", "--mix_prob must be between 0 and 1, got 1.5"),
        ("--smoothing -0.1", "--smoothing must be between 0 and 1"),
        ("--random_erasing 2", "--random_erasing must be between 0 and 1"),
        ("--crop_pct 0", "--crop_pct must be in (0, 1], got 0.0"),
        ("--model_ema 1", "--model_ema must be in [0, 1), got 1.0"),
        ("--color_jitter -1", "--color_jitter must be 0 or more"),
        ("--subset -1", "--subset must be 0 or more"),
        ("--subset 29", "--subset 29: there are 28 training images"),
        ("--pool max", "argument --pool: invalid choice: 'max'"),
        ("--auto_augment v0", "--auto_augment must be a RandAugment of timm"),
        ("--precision fp16", "--precision fp16 needs a GPU"),
        ("--batch_size 29", "29 images an update, but an epoch has 28"),
        ("--dataset photos", "--data_path is not read by --dataset photos: leave one of them out"),
        ("--data_path /absent", "--data_path /absent: no folder /absent/train (expected train/<class>/ and val/<class>/)"),
        ("--resume /absent.pth", "checkpoint /absent.pth: no such file"),
        ("--init_from /absent.pth", "--init_from /absent.pth: no such file"),
        ("--lerning_rate 1", "unrecognized arguments: --lerning_rate 1"),
    ],
)
def test_refused_in_one_line(
    flags: str, message: str, tune: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the flag and its value, and no output."""
    with pytest.raises(SystemExit) as left:
        run_cli("finetune", lambda _: tune("out", flags), [])  # type: ignore[arg-type, return-value]
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("finetune: error: ")
    assert message in said
    assert said.count("\n") == 1
    assert_refused(tmp_path / "out")


def test_data_that_is_refused(tune: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    (images / "val" / "gnu").rename(images / "val" / "yak")
    with pytest.raises(BadInput, match="train and val have different classes: gnu, yak"):
        tune("out")
    shutil.rmtree(images / "val")
    with pytest.raises(BadInput, match=r"no folder .*images/val \(expected"):
        tune("out")
    assert_refused(tmp_path / "out")


def test_broken_images(tune: Callable[..., Path], images: Path) -> None:
    """Of training: named, or replaced if asked. Of validation: all are named, and there is no result of the others."""
    (images / "val" / "ant" / "0.png").write_bytes(b"broken")
    cut = images / "val" / "fox" / "2.png"
    cut.write_bytes(cut.read_bytes()[:-90])
    with pytest.raises(BadInput, match=r"unreadable image .*val/ant/0.png: .*; .*val/fox/2.png: .* \(an evaluation needs all\)"):
        tune("out", "--on_bad_image skip")
    assert not (images.parent / "out" / "result.json").exists()
    assert not list((images.parent / "out").glob("*.pth"))
    (images / "train" / "ant" / "0.png").write_bytes(b"")
    with pytest.raises(BadInput, match=r"unreadable image .*train/ant/0.png.*--on_bad_image skip"):
        tune("other", "--batch_size 28")


def test_every_validation_image_is_in_the_scores(images: Path) -> None:
    """Batches of any size hold the whole set, in order, with its labels."""
    config = FinetuneConfig(model="vit_tiny_patch4", input_size="16", num_workers=0, data_path=str(images), batch_size=8)
    val = open_labelled(config, train=False)
    batches = list(evaluation_batches(val, middle(config), config, ONE))
    assert [len(batch.names) for batch in batches] == [8, 8, 5]
    assert torch.cat([batch.views[1] for batch in batches]).tolist() == val.labels
