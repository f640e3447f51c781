"""Kept parts: their number, their way from view to view, when they are made, and runs that keep them. Tests give their seeds."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.evolved_mask import EvolvedMask, MaskConfig
from common.training.checkpoint import LAST
from common.training.distributed import Processes
from common.training.engine import PretrainingTask
from common.training.errors import BadInput
from common.training.geometry import LocatedBatch
from common.training.kept_parts import (
    PartStore,
    StepParts,
    WholeImageParts,
    carry_parts,
    digest_names,
    parts_in_a_crop,
    step_layers,
    whole_parts,
)
from common.training.loop import Loop
from common.training.sources import FileSource
from tests import methods, record_run
from tests.conftest import assert_same, free_ports, read_log, run_module
from tests.test_all_methods import recorded, stop_before

CPU = torch.device("cpu")
ONE = Processes(0, 1, 0, CPU)
Run = Callable[..., Path]


# --- how many -----------------------------------------------------------------------------------------------------


def lattice_count(side: int, scale: tuple[float, float]) -> float:
    """Cells of a lattice, `side` x `side`, that crops of a square image meet: 4000 crops, counted (numpy's generator 0)."""
    generator = np.random.default_rng(0)
    area, ratio = generator.uniform(*scale, 4000), np.exp(generator.uniform(np.log(3 / 4), np.log(4 / 3), 4000))
    tall, wide = np.minimum(np.sqrt(area / ratio), 1), np.minimum(np.sqrt(area * ratio), 1)
    counts = np.ones(4000)
    for length in (tall, wide):
        start = generator.uniform(0, 1, 4000) * (1 - length)
        counts *= np.ceil((start + length) * side - 1e-9) - np.floor(start * side)
    return float(counts.mean())


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.67, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("side", [4, 6, 8])
def test_a_crop_holds_about_the_scheduled_number(scale: tuple[float, float], side: int) -> None:
    """The formula against counted cells, with torchvision's aspect ratios; and its inverse."""
    assert parts_in_a_crop(side**2, scale) == pytest.approx(lattice_count(side, scale), rel=0.08)
    assert whole_parts(round(parts_in_a_crop(side**2, scale)), scale) == pytest.approx(side**2, abs=1.5)


def test_parts_of_a_cell_lattice_are_counted_patch_by_patch() -> None:
    """The formula against carried labels: 64 parts of 8 x 8 patches on a 64 x 64 grid, 1000 crops (torch's generator 0)."""
    place = torch.arange(64) // 8
    labels = (place[:, None] * 8 + place).flatten()
    generator = torch.Generator().manual_seed(0)
    side = (0.2 + 0.8 * torch.rand(1000, generator=generator)).sqrt()
    corner = torch.rand(2, 1000, generator=generator) * (1 - side)
    geometry = torch.stack([corner[0], corner[1], side, side, torch.zeros(1000)], dim=1)
    carried = carry_parts(labels.expand(1000, -1), geometry, (64, 64))
    seen = torch.zeros(1000, 64).scatter_(1, carried, 1.0).sum(dim=1).mean()
    assert float(seen) == pytest.approx(parts_in_a_crop(64, (0.2, 1.0)), rel=0.04)


def test_number_of_parts_of_a_whole_image() -> None:
    """A view of everything needs no more; the number for half the area by hand; the cap; never below 1."""
    assert whole_parts(40, (1.0, 1.0)) == 40
    assert parts_in_a_crop(36, (0.25, 0.25)) == pytest.approx(16)  # (1 + 6 / 2)^2
    assert whole_parts(16, (0.25, 0.25)) == 36
    assert whole_parts(250, (0.08, 1.0)) == 255
    assert whole_parts(40, (0.2, 1.0), most=49) == 49
    assert whole_parts(1, (0.2, 1.0)) == 1


# --- from view to view --------------------------------------------------------------------------------------------


def slow_carry(row: Tensor, view: list[float], grid: tuple[int, int], seen: list[float] | None, outside: int) -> list[int]:
    """Patch by patch, in plain numbers."""
    height, width = grid
    carried = []
    for i in range(height):
        for j in range(width):
            x = (j + 0.5) / width
            y, x = view[0] + view[2] * (i + 0.5) / height, view[1] + view[3] * (1 - x if view[4] else x)
            if seen is not None:
                y, x = (y - seen[0]) / seen[2], (x - seen[1]) / seen[3]
                x = 1 - x if seen[4] else x
            if 0 <= y < 1 and 0 <= x < 1:
                carried.append(int(row[int(y * height) * width + int(x * width)]))
            else:
                carried.append(outside)
    return carried


@pytest.mark.parametrize("between_crops", [False, True])
def test_carried_parts_equal_a_patch_by_patch_walk(between_crops: bool) -> None:
    """Forty random views (torch's generator 0) on a 5 x 7 grid, mirrored and not."""
    generator = torch.Generator().manual_seed(0)
    size = 0.2 + 0.8 * torch.rand(2, 40, 2, generator=generator)
    corner = torch.rand(2, 40, 2, generator=generator) * (1 - size)
    mirrored = (torch.rand(2, 40, 1, generator=generator) < 0.5).float()
    view, seen = torch.cat([corner, size, mirrored], dim=2).unbind(0)
    rows = torch.randint(9, (40, 35), generator=generator)
    made_in = seen if between_crops else None
    carried = carry_parts(rows, view, (5, 7), made_in, outside=11)
    for index in range(40):
        walked = slow_carry(rows[index], view[index].tolist(), (5, 7), seen[index].tolist() if between_crops else None, 11)
        assert carried[index].tolist() == walked
    assert (carried == 11).any() == between_crops


def test_the_whole_image_and_its_mirror() -> None:
    rows = torch.arange(6)[None]
    assert carry_parts(rows, torch.tensor([[0.0, 0, 1, 1, 0]]), (2, 3)).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert carry_parts(rows, torch.tensor([[0.0, 0, 1, 1, 1]]), (2, 3)).tolist() == [[2, 1, 0, 5, 4, 3]]
    lower_right = torch.tensor([[0.5, 2 / 3, 0.5, 1 / 3, 0]])
    assert carry_parts(rows, lower_right, (2, 3)).tolist() == [[5] * 6]


def test_an_image_without_parts_stays_without() -> None:
    """Also outside of the view before: it is one image without parts, not one with a part outside."""
    view, seen = torch.tensor([[0.0, 0, 0.4, 0.4, 0]]), torch.tensor([[0.5, 0.5, 0.5, 0.5, 0]])
    assert carry_parts(torch.full((1, 4), -1), view, (2, 2), seen, outside=3).tolist() == [[-1] * 4]


# --- the rows -----------------------------------------------------------------------------------------------------


def test_the_first_row_of_an_update_counts_in_the_order_of_its_samples() -> None:
    """Two ranks and two steps: step 0 of rank 1 comes before step 1 of rank 0; stand-ins are not kept; geometry comes along."""
    messages = []
    for steps in (((1, 0), (2, 1)), ((1, 1), (0, 2))):  # (place, part) of each rank's steps
        store = PartStore(4, 6, "", with_geometry=True)
        sent: list[Tensor] = []
        rank = SimpleNamespace(device=CPU, gather_tensor=lambda value, sent=sent: sent.append(value) or [value])
        for step, (place, part) in enumerate(steps):
            geometry = torch.tensor([[0.25, 0.5, step, part, 1.0], [0.0] * 5])
            store.hold(torch.tensor([place, -1]), torch.tensor([[part] * 6, [99] * 6]), geometry)
        store.commit(3, rank, steps=2, batch=2)  # type: ignore[arg-type]
        messages += sent
    both = SimpleNamespace(device=CPU, gather_tensor=lambda _: messages)
    store = PartStore(4, 6, "", with_geometry=True)
    store.commit(3, both, steps=2, batch=2)  # type: ignore[arg-type]
    assert store.made.tolist() == [3, 3, 3, -1]
    assert store.rows[:, 0].tolist() == [2, 0, 1, 0]
    assert store.geometry is not None
    assert store.geometry[0].tolist() == [0.25, 0.5, 1.0, 2.0, 1.0]


def test_rows_of_other_images_are_refused() -> None:
    mine, other = PartStore(4, 6, "abc"), PartStore(4, 6, "def")
    with pytest.raises(BadInput, match=r"kept parts are of other images \(4 with names def, --data_path has 4 with names abc\)"):
        mine.load_state_dict(other.state_dict())
    with pytest.raises(BadInput, match="of other images"):
        mine.load_state_dict(PartStore(5, 6, "abc").state_dict())
    other.commit(2, ONE, 1, 1)
    mine.load_state_dict({**other.state_dict(), "digest": "abc"})


def test_the_digest_knows_names_and_not_where_they_are(tmp_path: Path) -> None:
    """The same below another folder; another with a name changed, or with an image less."""
    paths = [Path("/data/train") / name for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg")]
    moved = [Path("/elsewhere") / name for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg")]
    digests = [digest_names(FileSource(files)) for files in (paths, moved, paths[:2], [*paths[:2], Path("/data/train/b/3.jpg")])]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


# --- when they are made -------------------------------------------------------------------------------------------


def attention_of(images: Tensor, tokens: int = 17) -> Tensor:
    """Attention [B, 1, T, T] that depends on the image alone, through its first pixel, by torch's generator."""
    maps = []
    for image in images:
        generator = torch.Generator().manual_seed(int(image.flatten()[0] * 1000))
        maps.append(torch.rand(1, tokens, tokens, generator=generator).softmax(dim=-1))
    return torch.stack(maps)


def make_batch(ids: list[int], images: int, wanted: list[bool]) -> LocatedBatch:
    """Views of the whole image, unmirrored; pixels say which image it is."""
    places = [index % images for index in ids]
    pixels = torch.tensor(places, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 16, 16) / 1000
    rows = [row for row, mark in enumerate(wanted) if mark]
    geometry = torch.tensor([[0.0, 0, 1, 1, 0]]).expand(len(ids), -1)
    return LocatedBatch((pixels,), torch.tensor(ids), [], [], geometry, pixels[rows] if rows else None, rows, places)


def make_kept(every: int, images: int, **options: Any) -> WholeImageParts:
    mask = EvolvedMask((4, 4), 12, 12, MaskConfig(parts_start=5, parts_end=2, **options))
    return WholeImageParts(mask, PartStore(images, 16, ""), every, (0.2, 1.0))


def visit(kept: WholeImageParts, epoch: int, ids: list[int]) -> tuple[Tensor, Tensor, int]:
    """One update: masks [B, N], parts [B, N] and number of passes."""
    kept.mask.set_epoch(epoch)
    batch = make_batch(ids, len(kept.store.made), kept.wanted(ids))
    parts, passes = kept.parts(batch, attention_of)
    masks = kept.mask(batch.images, sample_ids=batch.sample_ids, parts=parts, num_parts=kept.num_draws)
    kept.store.commit(epoch, ONE, 1, len(ids))
    return masks.mask, parts, passes


def test_each_row_is_made_once_in_R_epochs_a_share_each_epoch() -> None:
    """mask part, where every visit needs parts: all rows at the first visit, then 1/R of them, by the number of the image."""
    kept = make_kept(4, 8, mask="part")
    for epoch in range(8):
        _, parts, passes = visit(kept, epoch, list(range(8)))
        turns = [image for image in range(8) if (epoch + image) % 4 == 0]
        assert passes == (8 if epoch == 0 else 2)
        assert (kept.store.made == epoch).nonzero()[:, 0].tolist() == (list(range(8)) if epoch == 0 else turns)
        assert torch.equal(kept.store.rows.long(), parts)  # views are whole images
        assert (kept.store.made > epoch - 4).all()
        assert int(parts.max()) < kept.num_draws


def test_R_of_one_is_the_mask_of_a_fresh_pass() -> None:
    """Views that are whole images, K not raised: to the bit the masks that a pass for every view makes. Mask seed 0."""
    kept = make_kept(1, 8)
    kept.crop_scale = (1.0, 1.0)
    for epoch in (0, 5, 11):
        masks, _, passes = visit(kept, epoch, list(range(8)))
        fresh = kept.mask(make_batch(list(range(8)), 8, [False] * 8).images, attention_of, torch.arange(8))
        assert torch.equal(masks, fresh.mask)
        assert passes == int((~fresh.skipped).sum())
    assert passes > 0


def test_a_row_missed_at_its_turn_is_made_at_the_next_visit() -> None:
    """Image 1 has its turn in epoch 3 and is left out of it; it is older than R nowhere."""
    kept = make_kept(4, 2, mask="part")
    visit(kept, 0, [0, 1])
    visit(kept, 3, [0])
    assert kept.store.made.tolist() == [0, 0]
    _, _, passes = visit(kept, 4, [0, 1])
    assert passes == 2
    assert kept.store.made.tolist() == [4, 4]


def test_crops_of_one_image_share_a_row() -> None:
    """Three crops of each of two images in one batch: two passes, and equal parts."""
    kept = make_kept(4, 2, mask="part")
    _, parts, passes = visit(kept, 0, [0, 1, 2, 3, 4, 5])
    assert passes == 2
    assert torch.equal(parts[0], parts[2])
    assert torch.equal(parts[0], parts[4])
    assert not torch.equal(parts[0], parts[1])


def test_spared_images_are_exact_and_make_no_row() -> None:
    """Evolved masks at 6 epochs, 64 images: what the grid decides is the same with any parts (torch's generator 0)."""
    kept, spared, generator = make_kept(3, 64), 0, torch.Generator().manual_seed(0)
    for epoch in range(0, 12, 2):
        ids = list(range(64))
        masks, parts, _ = visit(kept, epoch, ids)
        decided = kept.mask.spared(torch.tensor(ids), kept.num_draws)
        other = torch.where(decided[:, None], torch.randint(kept.num_draws, (64, 16), generator=generator), parts)
        images = make_batch(ids, 64, [False] * 64).images
        again = kept.mask(images, sample_ids=torch.tensor(ids), parts=other, num_parts=kept.num_draws)
        assert torch.equal(again.skipped, decided)
        assert torch.equal(again.mask, masks)
        assert not (kept.store.made[decided] == epoch).any()
        spared += int(decided.sum())
    assert 64 < spared < 6 * 64


def test_a_stand_in_has_parts_and_no_row() -> None:
    kept = make_kept(4, 4, mask="part")
    batch = make_batch([0, 1], 4, [True, True])
    batch.places[0] = -1
    parts, passes = kept.parts(batch, attention_of)
    kept.store.commit(0, ONE, 1, 2)
    assert passes == 2
    assert (parts >= 0).all()
    assert kept.store.made.tolist() == [-1, 0, -1, -1]


# --- attention of the step ----------------------------------------------------------------------------------------


def test_parts_of_the_step_serve_the_next_visit() -> None:
    """First visit: none. Then those of the left half of the image, seen mirrored; the right half is one more part."""
    mask = EvolvedMask((4, 4), 12, 12, MaskConfig(mask="part", num_parts=3))
    kept = StepParts(mask, PartStore(2, 16, "", with_geometry=True))
    batch = make_batch([0, 1], 2, kept.wanted([0, 1]))
    batch.geometry = torch.tensor([[0.0, 0.0, 1.0, 0.5, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]])
    assert (kept.parts(batch, attention_of)[0] == -1).all()
    maps = [attention_of(batch.images), attention_of(batch.images + 0.5)]
    kept.read(batch, maps)
    kept.store.commit(0, ONE, 1, 2)
    mask.set_epoch(1)
    again = make_batch([0, 1], 2, [False, False])
    parts, passes = kept.parts(again, attention_of)
    mask.set_epoch(0)
    cut = mask.cut(batch.images, lambda _: maps, batch.sample_ids).reshape(2, 4, 4)
    assert passes == 0
    assert torch.equal(parts[1].reshape(4, 4), cut[1])
    shown = parts[0].reshape(4, 4)
    assert (shown[:, 2:] == kept.num_draws - 1).all()
    # Centres at 1/8 and 3/8 of the image lie at 1/4 and 3/4 of the view, mirrored at 3/4 and 1/4: its columns 3 and 1.
    assert torch.equal(shown[:, :2], cut[0][:, [3, 1]])


def test_the_last_block_of_a_step_is_not_read() -> None:
    assert step_layers(MaskConfig(), 4) == [0, 1, 2]
    assert step_layers(MaskConfig(layers="0,2"), 4) == [0, 2]


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Trains a tiny model with three blocks in this process and returns the output folder: `run("beit", "name", "--flags")`."""
    for models, name, model in list(methods.shallow_models()):
        monkeypatch.setitem(models, name, model)

    def train(method: str, name: str, more: str = "") -> Path:
        output = tmp_path / f"{method}_{name}"
        methods.MAINS[method](f"{methods.flags(method, image_folder, tmp_path)} --output_dir {output} {more}".split())
        return output

    return train


def final_state(output: Path) -> dict[str, Any]:
    state = torch.load(output / LAST, weights_only=True)
    return {key: state[key] for key in ("model", "optimizer", "epoch", "update", "mask", "meters", "kept_parts")}


STEP = "--attention_pass training"
RESUMES = [
    ("mae", "--parts_every 2 --repeat 2 --accum_iter 2 --epochs 3 --save_steps 2 --num_workers 1", (1, 3)),
    ("beit", "--parts_every 3 --save_steps 2", (2, 3)),
    ("simmim", "--parts_every 2 --mask semantic", (2, 0)),
    ("simmim", f"{STEP} --save_steps 2", (1, 3)),
]


@pytest.mark.parametrize(("method", "more", "place"), RESUMES)
def test_exact_resume(run: Run, monkeypatch: pytest.MonkeyPatch, method: str, more: str, place: tuple[int, int]) -> None:
    """A whole run equals a cut-off one and its resume, to the bit: weights, optimiser, rows, log."""
    whole = run(method, "whole", more)
    with monkeypatch.context() as patch:
        stop_before(patch, place)
        with pytest.raises(KeyboardInterrupt):
            run(method, "parts", more)
    parts = run(method, "parts", more)
    assert_same(final_state(whole), final_state(parts))
    assert read_log(whole) == read_log(parts)
    kept = final_state(whole)["kept_parts"]
    assert int((kept["made"] >= 0).sum()) == 16
    assert len(kept["rows"].unique(dim=0)) > 8


@pytest.mark.parametrize("method", methods.MAINS)
def test_passes_of_a_run(run: Run, method: str) -> None:
    """mask part, 16 images: all in the first epoch, then a quarter each, and the log says so; the loss falls."""
    log = read_log(run(method, "kept", "--mask part --parts_every 4"))
    assert [line["skipped_attention"] for line in log] == [0.0, 0.75, 0.75, 0.75]
    assert float(str(log[-1]["train_loss"])) < float(str(log[0]["train_loss"]))


def test_without_the_flag_nothing_is_kept(run: Run) -> None:
    kept, fresh = run("mae", "kept", "--mask part --parts_every 4 --epochs 1"), run("mae", "fresh", "--mask part --epochs 1")
    assert read_log(kept)[0]["train_loss"] != read_log(fresh)[0]["train_loss"]
    assert "kept_parts" not in torch.load(fresh / LAST, weights_only=True)


def test_the_shortcut_changes_nothing(run: Run) -> None:
    """MAE with evolved masks, some of whose passes are spared: the same weights and rows."""
    first, second = run("mae", "first", "--parts_every 2"), run("mae", "second", "--parts_every 2 --no_shortcut")
    assert_same(final_state(first)["model"], final_state(second)["model"])
    assert_same(final_state(first)["kept_parts"], final_state(second)["kept_parts"])
    spared = [float(str(line["skipped_attention"])) for line in read_log(first)]
    assert spared[0] == 1.0
    assert min(spared) < 1.0


@pytest.mark.parametrize("method", ["beit", "simmim"])
def test_a_step_that_makes_parts_trains_as_it_would(run: Run, method: str) -> None:
    """Epoch 0 is the grid's alone and its losses are equal; later masks differ; no pass is ever made."""
    step, own = run(method, "step", f"{STEP} --drop_path 0"), run(method, "own", "--drop_path 0")
    assert read_log(step)[0]["train_loss"] == pytest.approx(read_log(own)[0]["train_loss"], rel=1e-6)
    assert read_log(step)[-1]["train_loss"] != read_log(own)[-1]["train_loss"]
    assert [line["skipped_attention"] for line in read_log(step)] == [1.0] * 4


def test_rows_of_renamed_images_are_refused(run: Run, image_folder: Path) -> None:
    """A moved folder goes on; a renamed file does not, and nothing is overwritten."""
    output = run("mae", "run", "--parts_every 2")
    before = (output / LAST).read_bytes()
    moved = image_folder.parent / "moved"
    shutil.copytree(image_folder, moved)
    run("mae", "run", f"--parts_every 2 --data_path {moved}")
    (moved / "train" / "cat" / "image_07.jpg").rename(moved / "train" / "cat" / "image_08.jpg")
    before = (output / LAST).read_bytes()
    with pytest.raises(BadInput, match="kept parts are of other images"):
        run("mae", "run", f"--parts_every 2 --data_path {moved}")
    with pytest.raises(BadInput, match="--parts_every 2 -> 3"):
        run("mae", "run", "--parts_every 3")
    assert (output / LAST).read_bytes() == before


def test_a_checkpoint_older_than_the_flag_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_before(patch, (1, 0))
        with pytest.raises(KeyboardInterrupt):
            run("simmim", "old", "--epochs 2")
    whole = run("simmim", "whole", "--epochs 2")
    path = whole.parent / "simmim_old" / LAST
    state = torch.load(path, weights_only=True)
    del state["config"]["parts_every"], state["config"]["attention_pass"]
    torch.save(state, path)
    resumed = run("simmim", "old", "--epochs 2")
    assert_same(*(torch.load(output / LAST, weights_only=True)["model"] for output in (resumed, whole)))


def test_unreadable_images_are_counted_and_not_kept(run: Run, image_folder: Path) -> None:
    (image_folder / "train" / "bird" / "image_03.jpg").write_bytes(b"broken")
    with pytest.raises(BadInput, match=r"unreadable image .*image_03.jpg"):
        run("mae", "raises", "--parts_every 2")
    output = run("mae", "skips", "--parts_every 2 --mask part --on_bad_image skip")
    assert [line["bad_images"] for line in read_log(output)] == [1] * 4
    assert (final_state(output)["kept_parts"]["made"] < 0).nonzero()[:, 0].tolist() == [3]


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("mae", "--parts_every -1", "--parts_every must be 0 or more"),
        ("mae", "--parts_every 2 --mask grid", "--parts_every 2 cannot be with --mask grid: it makes no parts"),
        ("mae", "--parts_every 2 --graph keys --remove_position", "--parts_every 2 cannot be with --remove_position"),
        ("simmim", "--parts_every 2 --recipe authors", "cannot be with --start_draw batch"),
        ("beit", "--parts_every 2 --parts_jitter 2", "cannot be with --parts_jitter 2"),
        ("mae", STEP, "--attention_pass is for BEiT and SimMIM: MAE's training step does not see masked patches"),
        ("beit", f"{STEP} --parts_every 2", "--attention_pass training cannot be with --parts_every 2"),
        ("simmim", f"{STEP} --graph keys", "cannot be with --graph keys"),
        ("simmim", f"{STEP} --attention_values scores", "cannot be with --attention_values scores"),
        ("beit", f"{STEP} --attention_from ema", "cannot be with --attention_from ema"),
        ("beit", f"{STEP} --layers last", "cannot be with --layers last"),
        ("beit", f"{STEP} --layers 0,11", "cannot be with --layers 0,11"),
        ("simmim", f"{STEP} --compile", "cannot be with --compile"),
        ("simmim", f"{STEP} --mask random", "cannot be with --mask random"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_data_and_device(tmp_path: Path, method: str, flags: str, message: str) -> None:
    needed = "--tokenizer nowhere" if method == "beit" else ""
    places = f"--data_path {tmp_path}/nowhere --output_dir {tmp_path}/out --device cuda:77 {needed}"
    with pytest.raises(BadInput, match=message):
        methods.MAINS[method](f"--model {methods.MODELS[method]} {methods.COMMON} {places} {flags}".split())
    assert not list(tmp_path.iterdir())


def test_any_number_of_ranks(run: Run, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks from the start, and two that go on where one was stopped, make the masks and losses of one.

    Losses to 1e-5; masks of every image and epoch, and the rows at the end, are equal. The learning rate is so small that
    rounding, which differs with the batch of a rank, moves no patch to another part.
    """
    tiny = "--mask part --lr 1e-7 --epochs 3"
    lines = {
        "kept": ("mae", f"{tiny} --parts_every 2"),
        "step": ("simmim", f"{tiny} {STEP} --drop_path 0"),
    }
    alone = {}
    for name, (method, more) in lines.items():
        alone[name] = recorded_here(monkeypatch, partial(run, method, f"{name}_one", more))
    with monkeypatch.context() as patch:
        stop_before(patch, (2, 0))
        with pytest.raises(KeyboardInterrupt):
            run("mae", "resumed_two", lines["kept"][1])
    file = tmp_path / "runs.txt"
    lines["resumed"] = lines["kept"]
    starts = {method: methods.flags(method, image_folder, tmp_path) for method in ("mae", "simmim")}
    file.write_text(
        "\n".join(
            f"{method} {starts[method]} {more} --batch_size 2 --output_dir {tmp_path}/{method}_{name}_two"
            for name, (method, more) in lines.items()
        )
    )
    done = run_module(f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m tests.record_run {file}")
    assert done.returncode == 0, done.stderr
    for name, (method, _) in lines.items():
        of_one, first = ("kept", 2) if name == "resumed" else (name, 0)
        losses, masks = alone[of_one]
        both = recorded(tmp_path / f"{method}_{name}_two", 2)
        assert_same({key: mask for key, mask in sorted(masks.items()) if key[0] >= first}, dict(sorted(both["masks"].items())))
        assert both["losses"] == pytest.approx(losses[4 * first :], abs=1e-5)
        rows = [final_state(tmp_path / f"{method}_{folder}")["kept_parts"] for folder in (f"{of_one}_one", f"{name}_two")]
        assert_same(rows[0], rows[1])


def recorded_here(
    monkeypatch: pytest.MonkeyPatch, train: Callable[[], Path]
) -> tuple[list[float], dict[tuple[int, int], Tensor]]:
    """Losses of the steps of a run in this process, and the mask of each (epoch, image)."""
    record_run.losses.clear()
    record_run.masks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(PretrainingTask, "prepare", record_run.prepare)
        patch.setattr(Loop, "_count", record_run.count)
        train()
    return list(record_run.losses), dict(record_run.masks)
