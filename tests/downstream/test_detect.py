"""Detection from its command line: exact resume, two processes, checkpoints of the three methods, real photographs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import downstream.vit
import mae_evolved.model
from beit_evolved.model import BEiT
from common.training.command_line import parse_flags
from common.training.distributed import start_processes
from common.training.errors import BadInput
from common.visualize.colours import distinct_colours, text_colour
from downstream.detect import DetectConfig, main, make_model
from downstream.detection.coco import CocoSource, fitted
from downstream.detection.evaluation import DetectionEvaluation
from downstream.detection.mask_rcnn import MaskRCNN
from downstream.detection.pictures import draw
from downstream.training import layerwise_groups
from mae_evolved.main_pretrain import main as pretrain
from mae_evolved.model import MaskedAutoencoder
from simmim_evolved.model import SimMIM
from tests.conftest import ROOT, assert_same, free_ports, read_log, run_module
from tests.downstream.coco_folder import box_of, ellipse, write_coco
from tests.downstream.test_vit import shaken

TINY = "--model vit_tiny_patch8 --input_size 64 --window 3 --pyramid_width 8 --anchor_scale 4 --box_samples 16 --batch_size 2 "
TINY += "--epochs 4 --warmup_epochs 1 --lr 1e-3 --jitter 0.5 1.5 --num_workers 0 --device cpu --pictures 2 "
LABELME = Path("/usr/share/doc/labelme-examples/examples/instance_segmentation/data_dataset_coco")

Train = Callable[..., Path]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 blocks instead of 12."""
    for models, name in ((downstream.vit.MODELS, "vit_tiny_patch8"), (mae_evolved.model.MODELS, "mae_vit_tiny_patch8")):
        monkeypatch.setitem(models, name, partial(models[name], depth=4))  # type: ignore[arg-type]


@pytest.fixture
def train(root: Path, tmp_path: Path, shallow: None) -> Train:
    """Trains in this process: `train("name", "--flag value ...")`."""

    def run(name: str, flags: str = "") -> Path:
        main(f"{TINY} --data_path {root} --output_dir {tmp_path / name} {flags}".split())
        return tmp_path / name

    return run


def _state(output: Path) -> dict[str, Any]:
    state = torch.load(output / "checkpoint-last.pth", weights_only=True)
    return {key: value for key, value in state.items() if key != "config"}


def test_four_epochs_equal_two_and_a_resume(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit: weights, optimiser, log, scores. And what a run leaves behind."""
    whole = train("whole", "--save_freq 2")
    assert "4 training images (2 without objects left out), 6 for validation" in capsys.readouterr().out
    half = whole.parent / "half"
    half.mkdir()
    shutil.copy(whole / "checkpoint-1.pth", half / "checkpoint-last.pth")
    train("half")
    assert_same(_state(whole), _state(half))
    assert read_log(whole)[2:] == read_log(half)
    assert [line["epoch"] for line in read_log(whole)] == [0, 1, 2, 3]

    result = json.loads((whole / "result.json").read_text())
    assert result == {**json.loads((half / "result.json").read_text()), "config": result["config"]}
    assert {"AP_box", "AP50_box", "AP75_box", "APs_box", "AP_mask", "AP50_mask"} < result["metrics"].keys()
    assert all(0 <= value <= 100 for key, value in result["metrics"].items() if key != "epoch")
    assert result["facts"] == {"classes": 2, "validation_images": 6}
    line = read_log(whole)[-1]
    terms = [value for key, value in line.items() if key.startswith("loss_")]
    assert len(terms) == 5
    assert sum(terms) == pytest.approx(line["train_loss"], rel=1e-5)  # type: ignore[arg-type]
    picture = np.array(Image.open(whole / "detections.png"))
    assert picture.shape[1] == 10 + 384 + 6 + 384 + 10

    # --eval_only with the same weights says the same, also with batches of another size
    capsys.readouterr()
    train("judged", f"--eval_only --batch_size 3 --resume {whole}/checkpoint-last.pth")
    said = dict(re.findall(r"(AP\w+) ([\d.]+)", capsys.readouterr().out.split("detection: ")[-1]))
    assert {key: float(value) for key, value in said.items()} == {
        key: pytest.approx(value, abs=0.006) for key, value in result["metrics"].items() if key != "epoch"
    }
    assert not (whole.parent / "judged" / "result.json").exists()


@pytest.mark.slow
def test_two_processes_train_and_judge_as_one(root: Path, tmp_path: Path) -> None:
    flags = TINY.replace("--epochs 4", "--epochs 2") + f"--data_path {root}"
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m downstream.detect"
    outcome = run_module(f"{launch} {flags} --batch_size 1 --output_dir {tmp_path / 'two'}")
    assert outcome.returncode == 0, outcome.stderr
    judge = (
        f"{flags} --batch_size 1 --eval_only --resume {tmp_path / 'two'}/checkpoint-last.pth --output_dir {tmp_path / 'judged'}"
    )
    alone = run_module(f"downstream.detect {judge}")
    both = run_module(f"{launch} {judge}")
    assert (alone.returncode, both.returncode) == (0, 0), alone.stderr + both.stderr
    lines = [re.search("detection: AP_box.*", one.stdout) for one in (outcome, alone, both)]
    assert lines[0] is not None
    assert [line and line[0] for line in lines] == [lines[0][0]] * 3


SIZES: dict[str, Any] = {"input_size": (32, 32), "patch_size": 8, "width": 192, "depth": 4, "heads": 3}


@pytest.mark.parametrize("method", ["mae", "beit", "simmim"])
def test_takes_checkpoints_of_the_three_methods(
    train: Train, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made at 32 pixels, used at 64 in windows: every block is that of the checkpoint, positions are interpolated."""
    builders: dict[str, Callable[[], Any]] = {
        "mae": lambda: MaskedAutoencoder(**SIZES, decoder_width=16, decoder_depth=1, decoder_heads=2),
        "beit": lambda: BEiT(vocabulary=32, **SIZES),
        "simmim": lambda: SimMIM(**SIZES),
    }
    held = shaken(builders[method]()).state_dict()
    torch.save({"model": held, "config": {"input_size": "32"}}, tmp_path / "checkpoint.pth")
    output = train("run", f"--init_from {tmp_path}/checkpoint.pth --epochs 1 --lr 1e-30 --weight_decay 0 --pictures 0")
    said = capsys.readouterr().out
    assert "4x4 interpolated to 8x8" in said if method == "mae" else "7x7 interpolated to" in said
    weights = _state(output)["model"]
    prefix = "encoder." if "encoder.blocks.0.attn.proj.weight" in held else ""
    for block in range(4):
        for name in ("attn.proj.weight", "mlp.fc1.bias"):
            assert torch.equal(weights[f"encoder.blocks.{block}.{name}"], held[f"{prefix}blocks.{block}.{name}"])
    assert json.loads((output / "run.json").read_text())["config"]["method"] == method


def _evaluation(root: Path, tmp_path: Path) -> DetectionEvaluation:
    config = parse_flags(DetectConfig, "detect", "", f"{TINY} --data_path {root} --output_dir {tmp_path}".split())
    return DetectionEvaluation(config, CocoSource(root, "val"), start_processes("cpu"))


def test_found_objects_go_back_to_the_image(root: Path, tmp_path: Path) -> None:
    """An object as the model sees it, put together from one in the file: box to the bit of float32, mask in its place."""
    evaluation = _evaluation(root, tmp_path)
    size = (40, 56)  # of the first image
    high, wide = fitted(size, (64, 64))
    assert (high, wide) == (46, 64)
    box = torch.tensor([[7.0, 4, 30, 33], [40, 20, 56, 40]])
    scale = torch.tensor([wide / 56, high / 40] * 2)
    cells = torch.from_numpy(ellipse((28, 28), (14, 14), (14, 14))).float().expand(2, 1, 28, 28)
    seen = {"boxes": box * scale, "labels": torch.tensor([2, 1]), "scores": torch.tensor([0.9, 0.2]), "masks": cells}
    seen["boxes"][1, 3] = 60  # reaches into what was filled up
    found = evaluation.in_file(0, seen)
    np.testing.assert_allclose(found.boxes[0], box[0], rtol=1e-6)
    np.testing.assert_allclose(found.boxes[1], [40, 20, 56, 40], rtol=1e-6)
    assert found.labels.tolist() == [2, 1]
    mask = evaluation.source.tools.decode(found.masks[0]).astype(bool)
    true = ellipse(size, ((4 + 33) / 2, (7 + 30) / 2), (29 / 2, 23 / 2))
    assert mask.shape == size
    assert (mask & true).sum() / (mask | true).sum() > 0.9
    outside = {**seen, "boxes": torch.tensor([[3.0, 50, 20, 60]] * 2)}
    assert len(evaluation.in_file(0, outside).boxes) == 0


def test_picture_shows_boxes_and_masks_where_they_are() -> None:
    image = Image.new("RGB", (48, 96), (0, 0, 0))
    mask = np.zeros((96, 48), dtype=np.uint8)
    mask[20:60, 10:30] = 1
    drawn = draw(image, np.array([[10.0, 20, 30, 60]]), [mask], ["ball"])
    assert drawn.shape == (384, 192, 3)  # no paper beside a narrow image
    left = drawn[:, :192].astype(int).sum(axis=2)
    assert box_of(left > 0) == pytest.approx([40, 80, 80, 160], abs=2)
    assert not draw(image, np.zeros((0, 4)), [], [])[:, :192].any()


def test_labels_are_whole_and_show_on_their_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a ground of its box's colour, black or white by contrast, inside the image even at its corner."""
    labels: list[tuple[str, tuple[float, float, float, float], tuple[int, ...]]] = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, ink: tuple[int, ...], face: Any) -> None:
        labels.append((words, self.textbbox(place, words, face), ink))
        original(self, place, words, ink, face)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    image = Image.new("RGB", (100, 50), (230, 25, 75))
    corners = np.array([[0.0, 0, 20, 20], [90, 0, 100, 10], [90, 45, 100, 50], [20, 45, 50, 50]])
    masks = [np.zeros((50, 100), dtype=np.uint8)] * 4
    drawn = draw(image, corners, masks, [f"musical instrument 0.9{k}" for k in range(4)])
    assert drawn.shape == (192, 384, 3)
    assert [words for words, _, _ in labels] == [f"musical instrument 0.9{k}" for k in range(4)]
    for k, (_, (left, top, right, bottom), ink) in enumerate(labels):
        assert min(left, top) >= 0
        assert right <= 384
        assert bottom <= 192
        ground = np.round(distinct_colours(4)[k] * 255).astype(int)
        shown = drawn[int(top) : int(bottom), int(left) : int(right)].reshape(-1, 3).astype(int)
        assert (shown == ground).all(axis=1).mean() > 0.2
        assert ink == text_colour(ground / 255)
        assert (shown == ink).all(axis=1).any()


def test_layers_of_the_model(root: Path, tmp_path: Path) -> None:
    """Rates fall from the heads to the embeddings by .7 a block; window attention in all but the last of each quarter."""
    flags = f"--data_path {root} --output_dir {tmp_path} --model vit_tiny_patch8 --input_size 64 --pyramid_width 8"
    model = make_model(parse_flags(DetectConfig, "detect", "", flags.split()), 2, print)
    assert isinstance(model, MaskRCNN)
    assert [block.attn.windows.side if block.attn.windows else 0 for block in model.encoder.blocks] == [14, 14, 0] * 4  # type: ignore[union-attr]
    rates = {id(value): group["lr_scale"] for group in layerwise_groups(model, 0.7, 0.1) for value in group["params"]}
    named = dict(model.named_parameters())
    assert len(rates) == len(named)
    assert rates[id(named["rpn.head.cls_logits.weight"])] == rates[id(named["neck.levels.0.0.weight"])] == 1
    assert rates[id(named["encoder.blocks.11.attn.proj.weight"])] == pytest.approx(0.7)
    assert rates[id(named["encoder.pos_embed"])] == pytest.approx(0.7**13)


def test_recipe_is_the_default(root: Path) -> None:
    recipe = ROOT / "downstream/recipes/coco_mask_rcnn_15ep.toml"
    with_file = parse_flags(DetectConfig, "detect", "", ["--config", str(recipe), "--data_path", str(root)])
    assert with_file == DetectConfig(data_path=str(root))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input_size 72", "--input_size must be divisible by 32, 4 patches of vit_tiny_patch8"),
        ("--jitter 2 1", "--jitter must be two factors"),
        ("--anchor_scale 0", "--anchor_scale must be above 0"),
        ("--data_path /nowhere", "--data_path /nowhere: no such folder"),
        ("--dataset photos", "--dataset does not go with detection"),
        ("--crop_scale 0.5 1", "--crop_scale does not go with detection"),
        ("--eval_only", "--eval_only: no weights to evaluate; give --resume PATH"),
        ("--batch_size 5", "nothing would ever be updated"),
        ("--model vit_huge_patch14 --input_size 56", "--model must have patches of a power of two, not 14"),
    ],
)
def test_bad_flags_are_one_line(train: Train, flags: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as raised:
        train("run", flags)
    assert "\n" not in str(raised.value)


def test_bad_data_is_one_line(root: Path, tmp_path: Path, train: Train) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    image = copy / "train2017" / CocoSource(copy, "train").records[1]["file_name"]
    image.unlink()
    with pytest.raises(BadInput, match=f"unreadable image .*{image.name}"):
        train("run", f"--data_path {copy}")
    held = json.loads((copy / "annotations/instances_val2017.json").read_text())
    held["categories"][0]["name"] = "other"
    (copy / "annotations/instances_val2017.json").write_text(json.dumps(held))
    with pytest.raises(BadInput, match="has other categories than"):
        train("run", f"--data_path {copy}")
    shown = run_module(f"downstream.detect --data_path {tmp_path}/none")
    assert (shown.returncode, shown.stderr) == (2, f"detect: error: --data_path {tmp_path}/none: no such folder\n")


@pytest.mark.skipif(not LABELME.is_dir(), reason="Debian's package labelme-examples is not installed")
@pytest.mark.parametrize(
    ("repeat", "epochs"),
    [pytest.param(12, 3, marks=pytest.mark.slow, id="small"), pytest.param(140, 1, marks=pytest.mark.full, id="full")],
)
def test_learns_real_photographs_by_heart(repeat: int, epochs: int, tmp_path: Path, shallow: None) -> None:
    """Three photographs with 12 objects, from an encoder pre-trained for a few updates on the same."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    held = json.loads((LABELME / "annotations.json").read_text())
    for one in held["images"]:
        one["file_name"] = Path(one["file_name"]).name
    for split in ("train", "val"):
        shutil.copytree(LABELME / "JPEGImages", root / f"{split}2017")
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(held))
    common = "--num_workers 0 --device cpu --input_size 128"
    made, output = tmp_path / "mae", tmp_path / "out"
    pretrain(
        f"--model mae_vit_tiny_patch8 --data_path {root}/train2017 --repeat 16 --epochs 2 --warmup_epochs 1 --batch_size 8 "
        f"--lr 1e-3 --picture_epochs 0 --output_dir {made} {common}".split()
    )
    main(
        f"--model vit_tiny_patch8 --data_path {root} --init_from {made}/checkpoint-last.pth --window 8 --pyramid_width 64 "
        "--anchor_scale 4 --box_samples 64 --jitter 1 1 --no_flip --batch_size 3 --lr 1e-3 --beta2 0.99 "
        "--layer_decay 1 --drop_path 0 --lr_milestones 0.8 --warmup_epochs 0.1 --weight_decay 0.05 --clip_grad 1 "
        f"--repeat {repeat} --epochs {epochs} --eval_freq 3 --output_dir {output} {common}".split()
    )
    losses = [line["train_loss"] for line in read_log(output)]
    if len(losses) > 1:
        assert losses[-1] < 0.8 * losses[0], losses
        return
    metrics = json.loads((output / "result.json").read_text())["metrics"]
    assert metrics["AP50_box"] > 90, metrics
    assert metrics["AP50_mask"] > 50, metrics
