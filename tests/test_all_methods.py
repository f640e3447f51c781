"""What MAE, BEiT and SimMIM must all do on the same machinery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit_evolved.model import BEiT
from common.training.checkpoint import LAST
from common.training.loop import Loop
from mae_evolved.model import MaskedAutoencoder
from simmim_evolved.model import SimMIM, masked_l1
from tests.conftest import assert_same, free_ports, read_log, run_module
from tests.methods import MAINS, flags, shallow_models

SIZES = {"input_size": (8, 12), "patch_size": 4, "width": 24, "depth": 2, "heads": 2}


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks instead of twelve."""
    for models, name, model in list(shallow_models()):
        monkeypatch.setitem(models, name, model)


@pytest.fixture
def run(image_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a tiny model in this process and returns the output folder: `run("beit", "name", "--flag value")`."""

    def train(method: str, name: str, more: str = "") -> Path:
        output = tmp_path / f"{method}_{name}"
        MAINS[method](f"{flags(method, image_folder, tmp_path)} --output_dir {output} {more}".split())
        return output

    return train


def final_state(output: Path) -> dict[str, object]:
    state = torch.load(output / LAST, weights_only=True)
    return {key: state[key] for key in ("model", "optimizer", "epoch", "update", "mask", "ema", "meters", "facts")}


def stop_before(monkeypatch: pytest.MonkeyPatch, place: tuple[int, int]) -> None:
    """Ends the process's work before this (epoch, update), as a time limit would."""
    original = Loop._train_update

    def cut(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == place:
            raise KeyboardInterrupt
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_train_update", cut)


@pytest.mark.parametrize("method", ["beit", "simmim"])
@pytest.mark.parametrize(
    ("place", "more"),
    [((2, 0), ""), ((2, 0), "--recipe authors --schedule_epochs 4 --num_workers 1"), ((1, 3), "--save_steps 2")],
    ids=["between epochs", "moving average", "in an epoch"],
)
def test_exact_resume(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str, place: tuple[int, int], more: str
) -> None:
    """4 epochs equal a cut-off run and its resume, to the bit: weights, optimiser, masks, average, log."""
    whole = run(method, "whole", more)
    with monkeypatch.context() as patch:
        stop_before(patch, place)
        with pytest.raises(KeyboardInterrupt):
            run(method, "parts", more)
    kept = torch.load(whole.parent / f"{method}_parts" / LAST, weights_only=True)
    assert (kept["epoch"], kept["update"]) == ((1, 0) if place[1] == 0 else (0, 2))
    parts = run(method, "parts", more)
    assert_same(final_state(whole), final_state(parts))
    assert read_log(whole) == read_log(parts)
    assert len(read_log(parts)) == 4


@pytest.mark.parametrize("method", ["beit", "simmim"])
@pytest.mark.parametrize("mask", ["evolved", "part", "official"])
def test_loss_falls_with_every_mask(run: Callable[..., Path], method: str, mask: str) -> None:
    """At 32 px, where BEiT's own block rule has room; benchmarks/short_runs.py has every mask."""
    log = read_log(run(method, mask, f"--mask {mask} --epochs 3 --repeat 2 --input_size 32 --drop_path 0"))
    assert float(str(log[-1]["train_loss"])) < float(str(log[0]["train_loss"]))


SIGNALS = {
    "attention": "--heads select",
    "tokens": "--similarity vectors --layers 1",
    "queries": "--layers last",
    "keys": "--heads select --remove_position",
    "values": "--similarity vectors --heads concat --layers 0,2",
}


@pytest.mark.parametrize("method", MAINS)
def test_masks_of_every_signal_train(run: Callable[..., Path], method: str) -> None:
    """Four updates with each; the first epoch's losses differ, since the masks do."""
    losses = {}
    for graph, more in SIGNALS.items():
        (line,) = read_log(run(method, graph, f"--mask part --epochs 1 --graph {graph} {more}"))
        assert line["skipped_attention"] == 0.0
        losses[graph] = line["train_loss"]
    assert len(set(losses.values())) == len(SIGNALS)
    assert all(0 < float(str(loss)) < 100 for loss in losses.values())


def test_two_processes_equal_one(image_folder: Path, tmp_path: Path) -> None:
    """All three: loss of each step to 1e-5, and the same mask for each image whatever rank drew it.

    Without drop path: its draws belong to a rank's batch, not to an image.
    """
    commands = [
        f"{flags(method, image_folder, tmp_path)} --epochs 3 {'' if method == 'mae' else '--drop_path 0'}" for method in MAINS
    ]
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m"
    for name, start, batch in (("one", "", 4), ("two", launch, 2)):
        file = tmp_path / f"{name}.txt"
        runs = zip(MAINS, commands, strict=True)
        file.write_text(
            "\n".join(f"{method} {tail} --batch_size {batch} --output_dir {tmp_path / name / method}" for method, tail in runs)
        )
        done = run_module(f"{start} tests.record_run {file}")
        assert done.returncode == 0, done.stderr
    for method in MAINS:
        alone, both = recorded(tmp_path / "one" / method, 1), recorded(tmp_path / "two" / method, 2)
        assert both["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        assert len(alone["losses"]) == 3 * 4
        assert_same(dict(sorted(alone["masks"].items())), dict(sorted(both["masks"].items())))
        assert len(alone["masks"]) == 3 * 16
        assert len({tuple(mask.tolist()) for mask in alone["masks"].values()}) > 3


def recorded(output: Path, ranks: int) -> dict[str, Any]:
    """Losses of the steps (the mean over ranks), and the mask of each (epoch, image)."""
    parts = [torch.load(output / f"record-{rank}.pth", weights_only=True) for rank in range(ranks)]
    masks = {key: mask for part in parts for key, mask in part["masks"].items()}
    return {"losses": parts[0]["losses"], "masks": masks}


# --- What a masked patch may tell --------------------------------------------------------------------------------


def start(model: torch.nn.Module) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The model with every tensor moved from its start value, images that want a gradient, and uneven-placed masks."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, [0, 2, 5]] = mask[1, [1, 2, 3]] = True
    return model, torch.randn(2, 3, 8, 12, requires_grad=True), mask


def assert_masked_pixels_do_not_count(images: Tensor, mask: Tensor) -> None:
    """The gradient is exactly zero on masked patches and nowhere else."""
    assert images.grad is not None
    patches = images.grad.reshape(2, 3, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5).reshape(2, 6, -1)
    assert torch.equal(patches.abs().sum(dim=2) == 0, mask)


def test_mae_encoder_does_not_see_masked_pixels() -> None:
    """Targets held fixed, the loss does not depend on masked pixels."""
    sizes = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    model, images, mask = start(MaskedAutoencoder(**SIZES, **sizes))  # type: ignore[arg-type]
    model.targets = lambda _: targets  # type: ignore[method-assign, assignment, union-attr]
    targets = MaskedAutoencoder.targets(model, images.detach())  # type: ignore[arg-type]
    loss, _ = model(images, mask)
    loss.backward()
    assert_masked_pixels_do_not_count(images, mask)


def test_beit_mask_token_hides_masked_pixels() -> None:
    model, images, mask = start(BEiT(vocabulary=16, **SIZES))
    labels = torch.randint(16, (int(mask.sum()),))
    torch.nn.functional.cross_entropy(model(images, mask), labels).backward()
    assert_masked_pixels_do_not_count(images, mask)


def test_simmim_mask_token_hides_masked_pixels() -> None:
    """Targets held fixed, the loss does not depend on masked pixels; with them, only through the target."""
    model, images, mask = start(SimMIM(**SIZES))
    target = images.detach().clone()
    masked_l1(model.reconstruct(images, mask), target, mask, (2, 3)).backward()  # type: ignore[operator]
    assert_masked_pixels_do_not_count(images, mask)
    images.grad = None
    model(images, mask)[0].backward()
    assert (images.grad != 0).any(dim=1).all()


def test_masked_pixels_full_of_nan_change_nothing() -> None:
    """Stronger than a gradient: NaN in the masked pixels of the input never reaches the outputs."""
    for made in (BEiT(vocabulary=16, **SIZES), SimMIM(**SIZES)):
        model, images, mask = start(made)
        forward = model if isinstance(model, BEiT) else model.reconstruct
        spoilt = images.detach().reshape(2, 3, 2, 4, 3, 4).clone()
        spoilt.masked_fill_(mask.reshape(2, 1, 2, 1, 3, 1), float("nan"))
        model.eval()
        assert torch.equal(forward(images, mask), forward(spoilt.reshape(2, 3, 8, 12), mask))  # type: ignore[operator]
