"""Layer-wise rates, schedules counted in updates, evaluation over ranks, and what a finished run leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.training.config import Length
from common.training.distributed import Processes
from common.training.errors import BadInput
from downstream import finetune, linear_probe
from downstream.classification.evaluation import ClassificationEvaluation
from downstream.classification.labelled import LabelledImages, middle, open_labelled
from downstream.classification.model import Classifier
from downstream.finetune import FinetuneConfig, build
from downstream.training import evaluation_batches, layerwise_groups, train_task
from downstream.vit import METHODS, BackboneViT, Method
from tests.conftest import read_log
from tests.downstream.labelled_folder import ONE, SMALL, assert_refused, result, saved, shrink_models, write_set

DECAY = 0.65


def classifier(method: Method, **options: Any) -> Classifier:
    encoder = BackboneViT(method, (16, 16), patch_size=4, width=24, depth=3, heads=2, **options)
    return Classifier(encoder, 5, "mean", nn.LayerNorm(24))


def expected_scale(name: str, depth: int) -> float:
    """By BEiT's rules for the official names: a list of depth + 2 rates, from the embeddings' to the head's."""
    rates = [1.0]
    while len(rates) < depth + 2:
        rates.insert(0, rates[0] * DECAY)
    first, *rest = name.split(".")
    if first == "blocks":
        return rates[1 + int(rest[0])]
    return rates[0] if first in ("cls_token", "pos_embed", "patch_embed") else rates[-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"class_token": False, "window": 2, "global_blocks": (1,)}])
def test_layerwise_groups_by_the_official_names(method: Method, options: dict[str, Any]) -> None:
    """Every trained parameter once, with the rate of its layer; weight decay on matrices, tables and kernels only."""
    model = classifier(method, **options)
    model.encoder.blocks[1].norm1.requires_grad_(False)
    names = {id(value): name.removeprefix("encoder.") for name, value in model.named_parameters() if value.requires_grad}
    groups = layerwise_groups(model, DECAY, 0.3)
    found = [id(value) for group in groups for value in group["params"]]
    assert sorted(found) == sorted(names)
    for group in groups:
        assert group["weight_decay"] in (0.0, 0.3)
        for value in group["params"]:
            name = names[id(value)]
            assert group["lr_scale"] == pytest.approx(expected_scale(name, 3), rel=1e-12), name
            plain = value.ndim == 1 or name in ("cls_token", "pos_embed")
            assert (group["weight_decay"] == 0) == plain, name


def test_rates_by_hand() -> None:
    model = classifier("beit")
    rates = {id(value): group["lr_scale"] for group in layerwise_groups(model, 0.5, 0.0) for value in group["params"]}
    encoder = model.encoder
    assert rates[id(encoder.cls_token)] == rates[id(encoder.patch_embed.proj.weight)] == 1 / 16
    assert [rates[id(block.attn.relative_position_bias_table)] for block in encoder.blocks] == [1 / 8, 1 / 4, 1 / 2]
    assert rates[id(encoder.blocks[0].gamma_1)] == 1 / 8
    assert rates[id(model.fc_norm.weight)] == rates[id(model.head.bias)] == 1


def test_without_decay_all_learn_alike() -> None:
    assert {group["lr_scale"] for group in layerwise_groups(classifier("mae"), 1.0, 0.05)} == {1.0}


# --- runs ---


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_set(tmp_path / "images")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_models(monkeypatch)


@dataclass(frozen=True)
class Counted(FinetuneConfig):
    """Seven updates, two of them warm-up."""

    @property
    def length(self) -> Length:
        return Length(7, 2, "updates")


@pytest.mark.usefixtures("small")
def test_run_counted_in_updates(images: Path, tmp_path: Path) -> None:
    """28 images in updates of 8: epochs of 3, 3 and 1. The rate is poly's with the warm-up counted in updates."""
    config = Counted(
        **{"model": "vit_tiny_patch4", "input_size": "16", "num_workers": 0, "data_path": str(images), "batch_size": 8},
        **{"lr": 1e-3, "min_lr": 1e-4, "lr_schedule": "poly", "lr_power": 0.9, "warmup_epochs": 0, "eval_freq": 9},
        **{"output_dir": str(tmp_path / "out"), "device": "cpu", "pictures": 0, "method": "mae"},
    )
    train_task(config, lambda run: build(config, run))
    lines = read_log(tmp_path / "out")
    assert [line["images"] for line in lines] == [24, 24, 8]
    rates = [(1e-4 + 9e-4 * (1 - step / 7) ** 0.9) * min(step / 2, 1) for step in range(7)]
    expected = [sum(rates[:3]) / 3, sum(rates[3:6]) / 3, rates[6]]
    assert [line["train_lr"] for line in lines] == pytest.approx(expected, rel=1e-9)
    assert ["top1" in line for line in lines] == [False, False, True]
    groups = saved(tmp_path / "out")["optimizer"]["param_groups"]
    assert {round(group["lr"] / rates[6], 9) for group in groups} == {round(DECAY**power, 9) for power in range(5)}


@pytest.fixture
def tune(images: Path, tmp_path: Path, small: None) -> Callable[..., Path]:
    """Fine-tunes a small model: `tune("name", "--flag value ...")`."""

    def run(name: str, flags: str = "", epochs: int = 2) -> Path:
        output = tmp_path / name
        common = f"{SMALL} --data_path {images} --batch_size 8 --lr 1e-3 --epochs {epochs} --pictures 0"
        finetune.main(f"{common} --output_dir {output} {flags}".split())
        return output

    return run


def test_result_of_a_finished_run(tune: Callable[..., Path]) -> None:
    """metrics are those of the last epoch, best those of the epoch with the highest top-1, the first of equals."""
    output = tune("out", epochs=4)
    held, lines = result(output), read_log(output)
    assert (held["task"], held["seed"], held["facts"]) == ("fine-tuning", 0, {"classes": 7, "validation_images": 21})
    numbers = [{key: line[key] for key in ("epoch", "top1", "top5", "val_loss")} for line in lines]
    assert held["metrics"] == numbers[-1]
    assert held["best"] == max(numbers, key=lambda one: one["top1"])  # type: ignore[arg-type, return-value]
    assert held["config"]["method"] == "mae"
    assert held["config"]["epochs"] == 4


def test_evaluation_at_some_epochs(tune: Callable[..., Path]) -> None:
    output = tune("out", "--eval_freq 2", epochs=5)
    assert ["top1" in line for line in read_log(output)] == [False, True, False, True, True]
    assert result(output)["metrics"]["epoch"] == 4


def test_an_old_result_does_not_outlive_the_next_start(tune: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    output = tune("out")
    first = (output / "result.json").read_bytes()
    tune("out")
    assert (output / "result.json").read_bytes() == first, "a finished run started again writes the same"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("common.training.loop.Loop._train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        tune("out", "--resume none")
    assert not (output / "result.json").exists()


def test_evaluation_only(tune: Callable[..., Path], images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same command, or flags that say the model only; on another validation set too; nothing but pictures is written."""
    output = tune("out", "--model_ema 0.5")
    kept = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    said = capsys.readouterr().out
    numbers = next(line for line in said.splitlines() if line.startswith("fine-tuning: top1"))
    tune("out", "--model_ema 0.5 --eval_only")
    assert numbers in capsys.readouterr().out.splitlines()
    tune("other", f"--model_ema 0.5 --eval_only --resume {output}/checkpoint-last.pth --layer_decay 1 --batch_size 5", epochs=9)
    assert numbers in capsys.readouterr().out.splitlines()
    (images / "val" / "ant" / "0.png").unlink()
    tune("other", f"--model_ema 0.5 --eval_only --resume {output}/checkpoint-last.pth", epochs=9)
    assert numbers not in capsys.readouterr().out.splitlines()
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == kept
    assert not (output.parent / "other").exists()
    for flags, what in (("--model_ema 0", "--model_ema 0.5 -> 0.0"), ("--model_ema .5 --pool cls", "--pool 'mean' -> 'cls'")):
        with pytest.raises(BadInput, match=f"{what} .evaluation needs the same model"):
            tune("out", f"--eval_only {flags}")
    tune("drawn", f"--model_ema 0.5 --eval_only --resume {output}/checkpoint-last.pth --pictures 3")
    assert {path.name for path in (output.parent / "drawn").iterdir()} == {"predictions.png", "confusion.png"}


def test_resume_is_refused_for_another_configuration(tune: Callable[..., Path], images: Path, tmp_path: Path) -> None:
    """What differs is named; the checkpoint stays as it was."""
    output = tune("out")
    before = (output / "checkpoint-last.pth").read_bytes()
    for flags, what in (
        ("--mixup 0.5", "--mixup 0.8 -> 0.5"),
        ("--batch_size 4", "effective_batch 8 -> 4"),
        ("--subset 14", "--subset 0 -> 14; samples 28 -> 14"),
        ("--layer_decay 0.7 --drop_path 0", "--drop_path 0.1 -> 0.0; --layer_decay 0.65 -> 0.7"),
        ("--method beit", "--method 'mae' -> 'beit'"),
    ):
        with pytest.raises(BadInput, match=rf"made with other settings: {what} .--resume none starts anew"):
            tune("out", flags)
    tune("out", "--accum_iter 2 --batch_size 4 --eval_freq 2 --checkpointing")
    assert (output / "checkpoint-last.pth").read_bytes() == before
    (images / "val" / "ant" / "0.png").unlink()
    with pytest.raises(BadInput, match=r"made with .*'validation_images': 21.* this run has .*'validation_images': 20"):
        tune("out")
    words = f"{SMALL} --data_path {images} --batch_size 8 --epochs 2 --resume {output}/checkpoint-last.pth"
    with pytest.raises(BadInput, match="has no state of linear probing to resume; --init_from takes its encoder"):
        linear_probe.main(f"{words} --output_dir {tmp_path}/probe".split())
    assert_refused(tmp_path / "probe")


# --- evaluation over ranks ---


class Shared(Processes):
    """One of several ranks that gather into a list instead of over a network."""

    heard: list[list[str]] = []  # noqa: RUF012

    def gather(self, value: Any) -> list[Any]:
        self.heard.append(value)
        return self.heard


def config_for(images: Path, **values: Any) -> FinetuneConfig:
    return FinetuneConfig(model="vit_tiny_patch4", input_size="16", num_workers=0, data_path=str(images), **values)


@pytest.mark.parametrize("world", [1, 2, 5, 30])
def test_every_validation_image_once(images: Path, world: int) -> None:
    """21 images, also over more ranks than images; no image is repeated to fill a share."""
    config = config_for(images, batch_size=4)
    val = open_labelled(config, train=False)
    seen: list[int] = []
    for rank in range(world):
        Shared.heard = []
        processes = Shared(rank, world, rank, torch.device("cpu"))
        shares = [batch.sample_ids.tolist() for batch in evaluation_batches(val, middle(config), config, processes)]
        assert sum(map(len, shares)) in (21 // world, 21 // world + 1)
        seen += [index for share in shares for index in share]
    assert sorted(seen) == list(range(21))


def test_all_unreadable_images_are_named_on_every_rank(images: Path) -> None:
    """Ranks that could read all of theirs learn of the others'; batches with a stand-in are not given out."""
    config = config_for(images, batch_size=4)
    for name in ("ant/1.png", "dog/0.png"):
        (images / "val" / name).write_bytes(b"broken")
    val, given = open_labelled(config, train=False), []
    Shared.heard = []
    for rank in (1, 0):
        shares = evaluation_batches(val, middle(config), config, Shared(rank, 2, rank, torch.device("cpu")))
        with pytest.raises(BadInput, match=r"unreadable image .*(ant/1|dog/0).png") as error:
            given += [name for batch in shares for name in batch.names]
        assert all(name in str(error.value) for name in ("ant/1.png", "dog/0.png"))
    assert not [name for name in given if name.endswith(("ant/1.png", "dog/0.png"))]


def test_predictions_are_drawn_from_all_classes(images: Path) -> None:
    """Validation sets are in the order of their classes."""
    val = open_labelled(config_for(images), train=False)
    assert isinstance(val, LabelledImages)
    drawn = ClassificationEvaluation(config_for(images, pictures=7), val, ONE).drawn
    assert sorted(val.labels[index] for index in drawn) == list(range(7))
    assert len(ClassificationEvaluation(config_for(images, pictures=99), val, ONE).drawn) == 21
    assert ClassificationEvaluation(config_for(images, pictures=4), val, Processes(1, 2, 1, torch.device("cpu"))).drawn == set()


# --- flags ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "vit"}, "--model must be one of vit_tiny_patch4, .*got 'vit'"),
        ({"drop_path": 1.0}, r"--drop_path must be in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"--layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.1}, "--layer_decay must be in"),
        ({"layer_scale": -0.1}, "--layer_scale must be 0 or more"),
        ({"eval_freq": 0}, "--eval_freq must be 1 or more"),
        ({"pictures": -1}, "--pictures must be 0 or more"),
        ({"input_size": "225"}, "--input_size must be divisible by the patch size 16 of vit_small_patch16, got '225'"),
        ({"method": "dino"}, "--method must be one of auto, mae, beit, simmim, got 'dino'"),
        ({"warmup_epochs": 101}, "--warmup_epochs must not be above --epochs 100"),
    ],
)
def test_flags_of_every_task(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        FinetuneConfig(**values)


def test_layer_scale_of_an_encoder_that_has_none(tune: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--model vit_tiny_patch4: MAE has no layer scale, got layer_scale 0\.1"):
        tune("out", "--layer_scale 0.1")
    assert_refused(tmp_path / "out")
