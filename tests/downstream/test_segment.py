"""Segmentation by real short runs, and its prediction and loss against explicit loops."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional

import downstream.vit
import mae_evolved.model
from common.training.checkpoint import LAST
from common.training.command_line import parse_flags
from common.training.data import Batch
from common.training.distributed import Processes
from common.training.errors import BadInput
from common.training.loop import Loop
from common.training.runlog import RESULT
from common.training.task import Run as TaskRun
from downstream.confusion import IGNORED, confusion_matrix, scores_of
from downstream.segment import PROGRAM, SegmentConfig, build, main
from downstream.segmentation import pictures as segmentation_pictures
from downstream.segmentation.data import SegmentationSource, validation_transform
from downstream.segmentation.inference import Predictor
from downstream.segmentation.loss import make_loss
from scenes import labelme
from tests.conftest import assert_same, free_ports, read_log, run_module, write_images
from tests.downstream.segmentation.test_data import CLASSES, write_folder
from tests.methods import MAINS, flags, shallow_models

RECIPE = Path(__file__).parents[2] / "downstream/recipes/ade20k_upernet_80k.toml"
TINY = "--model vit_tiny_patch4 --input_size 16 --batch_size 2 --iterations 8 --warmup_iterations 2 --lr 1e-3 --num_workers 0 "
TINY += "--decoder_channels 16 --auxiliary_channels 8 --device cpu --eval_freq 1 --pictures 0 "
ALONE = Processes(0, 1, 0, torch.device("cpu"))

Run = Callable[..., Path]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks instead of twelve."""
    for models, name, model in list(shallow_models()):
        monkeypatch.setitem(models, name, model)
    tiny = partial(downstream.vit.MODELS["vit_tiny_patch4"], depth=3)
    monkeypatch.setitem(downstream.vit.MODELS, "vit_tiny_patch4", tiny)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "scenes")


@pytest.fixture
def run(scenes: Path, tmp_path: Path) -> Run:
    """Trains in this process and returns the output folder: `run("name", "--flag value ...")`."""

    def train(name: str, more: str = "") -> Path:
        main(f"{TINY} --data_path {scenes} --output_dir {tmp_path / name} {more}".split())
        return tmp_path / name

    return train


# --- prediction ---


class Pixels(nn.Module):
    """Logits that depend on place within the window and on colour, as a model's do: [n, 3, h, w] -> [n, 4, h/2, w/2]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv2d(3, 4, 3, padding=1)
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        self.shapes.append(tuple(images.shape))
        return functional.avg_pool2d(self.mix(images), 2), None


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_slide_is_whole_where_one_window_covers_the_image() -> None:
    model, images = Pixels(), [drawn(3, 12, 16), drawn(3, 12, 16) + 1]
    for flip in (False, True):
        slid, whole = (Predictor((12, 16), (8, 10), slide, flip=flip).probabilities(model, images) for slide in (True, False))
        for one, other in zip(slid, whole, strict=True):
            torch.testing.assert_close(one, other)


@torch.no_grad()
def test_slide_is_the_average_over_windows() -> None:
    """Windows one by one, logits summed pixel by pixel and divided by how many windows saw the pixel."""
    model, image = Pixels(), drawn(3, 12, 30)
    total, seen = torch.zeros(4, 12, 30), torch.zeros(12, 30)
    for left in (0, 8, 16, 18):
        logits = functional.interpolate(model(image[None, :, :, left : left + 12])[0], size=(12, 12), mode="bilinear")[0]
        for row in range(12):
            for column in range(12):
                total[:, row, left + column] += logits[:, row, column]
                seen[row, left + column] += 1
    model.shapes.clear()
    predictor = Predictor((12, 12), (8, 8), batch_size=3)
    torch.testing.assert_close(predictor.probabilities(model, [image])[0], (total / seen).softmax(0))
    assert model.shapes == [(3, 3, 12, 12), (1, 3, 12, 12)]
    assert torch.equal(predictor(model, [image])[0], total.div(seen).argmax(0))


@torch.no_grad()
def test_scales_and_flips_are_averaged() -> None:
    """0.5 counts as 1, so 1 weighs two thirds; each scale is seen as it is and flipped."""
    model, image = Pixels(), drawn(3, 10, 14)
    expected = torch.zeros(4, 10, 14)
    for scale, weight in ((1.0, 2 / 3), (2.0, 1 / 3)):
        one = Predictor((12, 12), (8, 8), scales=(scale,))
        flipped = one.probabilities(model, [image.flip(-1)])[0].flip(-1)
        expected += weight * (one.probabilities(model, [image])[0] + flipped) / 2
    found = Predictor((12, 12), (8, 8), scales=(0.5, 1.0, 2.0), flip=True).probabilities(model, [image])[0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(0), torch.ones(10, 14))


@torch.no_grad()
def test_classes_come_in_the_size_of_each_image() -> None:
    images = [drawn(3, 10, 14), drawn(3, 31, 9), drawn(3, 12, 12)]
    for slide in (True, False):
        found = Predictor((12, 12), (8, 8), slide)(Pixels(), images)
        assert [tuple(one.shape) for one in found] == [(10, 14), (31, 9), (12, 12)]
        assert all(one.dtype == torch.int64 for one in found)


# --- loss ---


class Fixed(nn.Module):
    """The logits it is given."""

    def __init__(self, logits: Tensor, auxiliary: Tensor) -> None:
        super().__init__()
        self.logits, self.auxiliary = nn.Parameter(logits), nn.Parameter(auxiliary)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits, self.auxiliary


def loss_of(model: nn.Module, labels: Tensor) -> Tensor:
    config = parse_flags(SegmentConfig, PROGRAM, "", ["--data_path", "x"])
    batch = Batch((torch.zeros(len(labels), 3, 8, 8), labels), torch.arange(len(labels)), [], [])
    return make_loss(config, ALONE)(model, batch)


def test_loss_is_the_mean_over_labelled_pixels() -> None:
    model = Fixed(drawn(2, 4, 4, 4), drawn(2, 4, 2, 2))
    labels = torch.randint(4, (2, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    labels[0, :5] = IGNORED
    expected = 0.0
    for logits, weight in ((model.logits, 1.0), (model.auxiliary, 0.4)):
        shares = functional.interpolate(logits, size=(8, 8), mode="bilinear", align_corners=False).log_softmax(1)
        picked = [-shares[n, int(labels[n, i, j]), i, j] for n, i, j in (labels != IGNORED).nonzero().tolist()]
        expected += weight * torch.stack(picked).mean().item()
    assert loss_of(model, labels).item() == pytest.approx(expected, rel=1e-5)


def test_loss_without_labelled_pixels_is_nought() -> None:
    model = Fixed(drawn(2, 4, 4, 4), drawn(2, 4, 2, 2))
    loss = loss_of(model, torch.full((2, 8, 8), IGNORED, dtype=torch.uint8))
    assert loss.item() == 0
    loss.backward()
    for value in model.parameters():
        assert value.grad is not None
        assert not value.grad.any()


# --- runs ---


def state_of(output: Path) -> dict[str, object]:
    state = torch.load(output / LAST, weights_only=True)
    return {key: state[key] for key in ("model", "optimizer", "epoch", "update", "meters", "scores", "best", "facts")}


@pytest.mark.parametrize(
    ("place", "more"), [((2, 0), ""), ((1, 1), "--save_steps 1 --head_norm group")], ids=["between epochs", "in an epoch"]
)
def test_exact_resume(run: Run, monkeypatch: pytest.MonkeyPatch, place: tuple[int, int], more: str) -> None:
    """8 updates (4 epochs) equal a cut-off run and its resume, to the bit: weights, optimiser, scores, log, result."""
    whole = run("whole", more)
    original = Loop._train_update

    def cut(self: Loop, epoch: int, update: int, *rest: object) -> None:
        if (epoch, update) == place:
            raise KeyboardInterrupt
        original(self, epoch, update, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_update", cut)
        with pytest.raises(KeyboardInterrupt):
            run("parts", more)
    assert not (whole.parent / "parts" / RESULT).exists()
    parts = run("parts", more)
    assert_same(state_of(whole), state_of(parts))
    assert read_log(whole) == read_log(parts)
    results = [json.loads((output / RESULT).read_text()) for output in (whole, parts)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["best"] == results[1]["best"]


def test_length_and_learning_rate_are_those_of_iterations(run: Run) -> None:
    """7 updates of 2 an epoch: four epochs, the last cut short; linear up, then linear down to 0, over updates."""
    output = run("run", "--iterations 7 --save_freq 1")
    log = read_log(output)
    rates = [1e-3 * (1 - i / 7) * (1.0 if i >= 2 else 1e-6 + (1 - 1e-6) * i / 2) for i in range(7)]
    expected = [(rates[i] + rates[i + 1]) / 2 for i in (0, 2, 4)] + [rates[6]]
    assert [line["images"] for line in log] == [4, 4, 4, 2]
    assert [line["train_lr"] for line in log] == pytest.approx(expected)


def test_numbers_are_those_of_the_model_that_was_saved(run: Run, scenes: Path) -> None:
    """The result again from the last checkpoint: images one by one, in whole and by hand."""
    output = run("run", "--inference whole")
    config = parse_flags(SegmentConfig, PROGRAM, "", f"{TINY} --data_path {scenes}".split())
    model = build(config, TaskRun(config, ALONE)).model
    model.load_state_dict(torch.load(output / LAST, weights_only=True)["model"])
    model.eval()
    source = SegmentationSource(scenes, "validation", CLASSES)
    total = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for index in range(len(source)):
        image, labels = validation_transform(source.load(index))
        small = functional.interpolate(image[None], size=(16, 16), mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = functional.interpolate(model(small)[0], size=(16, 16), mode="bilinear")
        full = functional.interpolate(logits, size=labels.shape, mode="bilinear")
        total += confusion_matrix(full[0].argmax(0), labels, CLASSES)
    found, written = scores_of(total), json.loads((output / RESULT).read_text())
    assert written["task"] == "segmentation"
    assert written["facts"]["classes"] == [f"class {number}" for number in range(1, CLASSES + 1)]
    expected = {"mIoU": 100 * found.miou, "mAcc": 100 * found.macc, "aAcc": 100 * found.aacc}
    assert {key: written["metrics"][key] for key in expected} == pytest.approx(expected)
    assert written["best"]["mIoU"] >= written["metrics"]["mIoU"]


def test_evaluation_of_a_checkpoint(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing but pictures is written, numbers equal those of the run, and flags of evaluation may differ."""
    output = run("run")
    metrics = json.loads((output / RESULT).read_text())["metrics"]
    capsys.readouterr()
    same = run("same", f"--eval_only --resume {output / LAST} --batch_size 4 --pictures 3")
    assert f"mIoU {metrics['mIoU']:.2f}  mAcc {metrics['mAcc']:.2f}  aAcc {metrics['aAcc']:.2f}" in capsys.readouterr().out
    assert sorted(path.name for path in same.iterdir()) == ["confusion.png", "validation.png"]
    run("other", f"--eval_only --resume {output / LAST} --inference whole --test_flip --pictures 0")
    run("scales", f"--eval_only --resume {output / LAST} --test_scales 1,1.5 --slide_stride 5 --pictures 0")
    assert capsys.readouterr().out.count("segmentation: mIoU") == 2


@pytest.mark.parametrize("method", list(MAINS))
def test_from_a_checkpoint_of_pre_training(
    run: Run, method: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Encoders of all three methods train here, found by --method auto; what was loaded is where the run starts."""
    pretrained = tmp_path / "pretrained"
    MAINS[method](f"{flags(method, image_folder, tmp_path)} --epochs 1 --output_dir {pretrained}".split())
    output = run(method, f"--init_from {pretrained / LAST} --iterations 2 --lr 1e-9 --warmup_iterations 0")
    held, start = (torch.load(folder / LAST, weights_only=True)["model"] for folder in (output, pretrained))
    prefix = "" if method == "mae" else ("encoder." if any(key.startswith("encoder.") for key in start) else "")
    for key in ("blocks.0.mlp.fc1.weight", "blocks.2.attn.proj.weight", "patch_embed.proj.weight"):
        torch.testing.assert_close(held[f"encoder.{key}"], start[prefix + key], atol=1e-6, rtol=0)
    said = capsys.readouterr().out
    assert f"segmentation: vit_tiny_patch4 ({method}) from" in said
    assert "loaded" in said
    assert math.isfinite(json.loads((output / RESULT).read_text())["metrics"]["mIoU"])


def test_two_processes_equal_one(run: Run, scenes: Path, tmp_path: Path) -> None:
    """Without batch norm and random dropping, to rounding: also where ranks have unlike counts of labelled pixels."""
    for number in range(2):  # two of the four images are nearly unlabelled
        path = scenes / f"annotations/training/0{number}.png"
        labels = np.asarray(Image.open(path)).copy()
        labels[:, 3:] = 0
        Image.fromarray(labels).save(path)
    alike = "--model vit_tiny_patch8 --head_norm group --drop_path 0 --head_dropout 0 --iterations 3 --warmup_iterations 1"
    launch = f"torch.distributed.run --nproc_per_node 2 --master_port {free_ports()} -m downstream.segment"
    two = run_module(f"{launch} {TINY} {alike} --data_path {scenes} --output_dir {tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr
    run("one", f"{alike} --batch_size 4")
    for first, second in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        for key in ("train_loss", "grad_norm"):
            assert second[key] == pytest.approx(first[key], rel=1e-4)
        for key in ("mIoU", "mAcc", "aAcc"):
            assert second[key] == pytest.approx(first[key], abs=1)  # a pixel between two classes may fall either way
    # Adam makes whole steps of gradients that are nothing but rounding, hence no bound on each element.
    one, other = (torch.load(tmp_path / name / LAST, weights_only=True)["model"] for name in ("one", "two"))
    differences = torch.cat([(one[key] - other[key]).float().abs().flatten() for key in one])
    assert differences.mean() < 1e-5


def test_pictures_show_truth_and_prediction(run: Run, monkeypatch: pytest.MonkeyPatch, scenes: Path) -> None:
    """Left the image, then its true classes, which are black where unlabelled; pictures are those of the first images."""
    monkeypatch.setattr(segmentation_pictures, "_COLOUR_SHARE", 1.0)
    output = run("run", "--iterations 2 --pictures 2")
    whole = np.asarray(Image.open(output / "validation.png"))
    high, wide, gap, margin, line = 213, 256, 6, 10, 21
    assert whole.shape == (margin + line + 2 * high + gap + gap + line + margin, margin + 3 * wide + 2 * gap + margin, 3)
    picture = whole[margin + line : margin + line + 2 * high + gap, margin:-margin]
    assert picture.shape == (2 * high + gap, 3 * wide + 2 * gap, 3)
    image, labels = SegmentationSource(scenes, "validation", CLASSES).load(1)
    colours = segmentation_pictures.palette(CLASSES)
    assert len({tuple(colour) for colour in colours[:CLASSES]} | {(0, 0, 0)}) == CLASSES + 1
    for row, column in ((2, 3), (9, 16), (17, 21)):
        y, x = round((row + 0.5) * high / 20), round((column + 0.5) * wide / 24)
        assert np.array_equal(picture[high + gap + y, wide + gap + x], colours[labels[row, column]])
        assert abs(int(picture[high + gap + y, x, 0]) - image.getpixel((column, row))[0]) < 25
        assert tuple(picture[high + gap + y, 2 * (wide + gap) + x]) in {tuple(colour) for colour in colours[:CLASSES]}
    assert np.asarray(Image.open(output / "confusion.png")).std() > 10


def test_titles_and_legend_of_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classes in the images, by their colours and in their order, and no others; cells of non-square images touch."""
    texts: list[str] = []
    original = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, place: Any, words: str, *rest: Any) -> None:
        left, top, right, bottom = self.textbbox(place, words, rest[1])
        assert min(left, top) >= 0
        assert right <= self.im.size[0]
        assert bottom <= self.im.size[1]
        texts.append(words)
        original(self, place, words, *rest)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    truth = torch.zeros(32, 64, dtype=torch.int64)
    truth[:, 32:] = 7
    truth[0] = 255
    predicted = torch.full((32, 64), 3)
    row = segmentation_pictures.triptych(torch.zeros(3, 32, 64), truth, predicted, 9)
    tall = segmentation_pictures.triptych(torch.zeros(3, 64, 32), truth.T, predicted.T, 9)
    names = [f"class {k}" for k in range(9)]
    sheet = segmentation_pictures.draw_sheet([row, row], names)
    assert [text for text in texts if text] == [
        "image", "true classes", "predicted classes", "class 0", "class 3", "class 7", "unlabelled"
    ]  # fmt: skip
    assert sheet.shape == (10 + 21 + 2 * 128 + 6 + 6 + 21 + 10, 10 + 3 * 256 + 2 * 6 + 10, 3)
    assert segmentation_pictures.draw_sheet([tall], names).shape == (
        10 + 21 + 256 + 6 + 21 + 10,
        10 + 3 * 128 + 2 * 6 + 10,
        3,
    )
    colours = segmentation_pictures.palette(9)
    swatches = sheet[10 + 21 + 2 * 128 + 6 + 6 :]
    for label in (0, 3, 7):
        assert (swatches == colours[label]).all(axis=2).sum() == 11 * 11
    # A dark line between the classes, and nothing of the kind inside them.
    left = 10 + 256 + 6
    cell = sheet[31:159, left : left + 256].astype(int).sum(axis=2)
    assert cell[60, 128] < 0.5 * cell[60, [126, 127, 129, 130]].min()


def test_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("downstream.segment.can_draw", lambda: False)
    monkeypatch.setattr("downstream.pictures.can_draw", lambda: False)
    output = run("run", "--iterations 2 --pictures 1")
    assert capsys.readouterr().out.count("matplotlib is not installed (requirements-demo.txt)") == 1
    assert (output / "validation.png").exists()
    assert not (output / "confusion.png").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--epochs 5", "--epochs has no effect on segmentation: --iterations says it"),
        ("--crop_scale 0.5 1", "--crop_scale has no effect on segmentation: --scale says it"),
        ("--data_path=", "--data_path must name a folder in ADE20K's layout"),
        ("--data_path nowhere", "--data_path nowhere: no such folder"),
        ("--classes 255", "--classes must be at most 254"),
        ("--classes 4", "--classes 4: .*classes.txt has 6"),
        ("--iterations 3 --warmup_iterations 4", "--warmup_iterations is above --iterations 3"),
        ("--scale 2 1", "--scale must be 0 < low <= high"),
        ("--cat_max_ratio 0", "--cat_max_ratio must be in"),
        ("--test_scales 1,x", "--test_scales must be numbers above 0"),
        ("--inference whole --test_scales 1,2", "--test_scales needs --inference slide"),
        ("--slide_stride 17", "--slide_stride must not be above --input_size"),
        ("--batch_size 1", "--batch_size 1 leaves batch norm nothing to average over"),
        ("--input_size 4", "--input_size 4: a patch grid of 1x1"),
        ("--eval_only", "--eval_only: no weights to evaluate; give --resume PATH"),
        ("--head_norm layer", "argument --head_norm: invalid choice"),
    ],
)
def test_bad_flags(run: Run, tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        run("run", given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_bad_labels_stop_the_run_and_are_named(run: Run, scenes: Path) -> None:
    path = scenes / "annotations/training/02.png"
    good = path.read_bytes()
    Image.fromarray(np.full((20, 24), 9, dtype=np.uint8)).save(path)
    with pytest.raises(BadInput, match=r"^annotation .*training/02.png: holds class 9, but there are 6 classes: --classes"):
        run("run", "--num_workers 1")
    path.write_bytes(good)
    Image.fromarray(np.full((20, 24), 7, dtype=np.uint8)).save(scenes / "annotations/validation/01.png")
    with pytest.raises(BadInput, match=r"^annotation .*validation/01.png: holds class 7"):
        run("other")
    for index in range(4):
        Image.fromarray(np.zeros((20, 24), dtype=np.uint8)).save(scenes / f"annotations/validation/0{index}.png")
    with pytest.raises(BadInput, match="no pixel of the validation annotations is labelled"):
        run("third")


def test_recipe_is_the_default() -> None:
    """But for the batch of a GPU, which is 16 on one and 2 on each of eight."""
    common = ["--data_path", "x"]
    defaults = parse_flags(SegmentConfig, PROGRAM, "", common)
    recipe = parse_flags(SegmentConfig, PROGRAM, "", ["--config", str(RECIPE), *common])
    differing = {name for name in vars(defaults) if getattr(defaults, name) != getattr(recipe, name)}
    assert differing == {"batch_size"}
    assert defaults.strides == (341, 341)


# --- labelme ---

LABELME = Path("/usr/share/doc/labelme-examples/examples/semantic_segmentation/data_dataset_voc")

OVERFIT = "--input_size 96x128 --batch_size 3 --repeat 40 --eval_freq 25 --warmup_iterations 10 --lr 2e-3 --inference whole "
OVERFIT += "--layer_decay 1 --drop_path 0 --head_dropout 0 --decoder_channels 64 --auxiliary_channels 16 "
OVERFIT += "--scale 1 1 --no_flip --no_photometric --cat_max_ratio 1 --pictures 3"


@pytest.mark.skipif(not LABELME.is_dir(), reason="Debian's labelme-examples is not installed")
@pytest.mark.parametrize(
    ("updates", "miou", "aacc"),
    [
        pytest.param(100, 20, 75, marks=pytest.mark.slow, id="small"),
        pytest.param(1000, 90, 97, marks=pytest.mark.full, id="full"),
    ],
)
def test_overfits_real_photographs(
    updates: int, miou: float, aacc: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three photographs of VOC, 7 classes: an MAE of four blocks is trained on them for a moment, then UperNet on it.

    Classes of few pixels come late: a car of 1.4 % and a bottle of 0.2 % count as 0 in the mean until then.
    """
    mae = partial(mae_evolved.model.MODELS["mae_vit_tiny_patch8"], depth=4, decoder_depth=1)
    monkeypatch.setitem(mae_evolved.model.MODELS, "mae_vit_tiny_patch8", mae)
    monkeypatch.setitem(downstream.vit.MODELS, "vit_tiny_patch8", partial(downstream.vit.MODELS["vit_tiny_patch8"], depth=4))
    labelme.convert(LABELME, tmp_path / "voc")
    pretrained, output = tmp_path / "mae", tmp_path / "run"
    shared = "--num_workers 0 --device cpu"
    flags = "--model mae_vit_tiny_patch8 --input_size 96x128 --batch_size 8 --epochs 2 --repeat 16 --warmup_epochs 1 --lr 1e-3"
    images = f"--data_path {tmp_path}/voc/images/training --picture_epochs 0"
    MAINS["mae"](f"{flags} {images} {shared} --output_dir {pretrained}".split())
    model = f"--model vit_tiny_patch8 --init_from {pretrained / LAST} --data_path {tmp_path}/voc --iterations {updates}"
    main(f"{model} {OVERFIT} {shared} --output_dir {output}".split())
    metrics = json.loads((output / RESULT).read_text())["metrics"]
    assert metrics["aAcc"] > aacc
    assert metrics["mIoU"] > miou


def write_voc(root: Path) -> Path:
    write_images(root / "JPEGImages", 4, (12, 10))
    (root / "SegmentationClass").mkdir()
    for index in range(4):
        labels = np.tile(np.array([[0, 1, 2, 255]], dtype=np.uint8), (10, 3))
        Image.fromarray(labels).save(root / f"SegmentationClass/image_{index:02d}.png")
    (root / "class_names.txt").write_text("_background_\nbird\npotted plant")
    return root


def test_labelme_folders(tmp_path: Path) -> None:
    assert labelme.convert(write_voc(tmp_path / "voc"), tmp_path / "out", val=0.25) == [
        "_background_",
        "bird",
        "potted plant",
    ]
    assert (tmp_path / "out/classes.txt").read_text() == "1\t_background_\n2\tbird\n3\tpotted plant\n"
    parts = [SegmentationSource(tmp_path / "out", split, 3) for split in ("training", "validation")]
    assert [len(part) for part in parts] == [3, 1]
    assert not {Path(parts[0].name(i)).name for i in range(3)} & {Path(parts[1].name(0)).name}
    assert parts[0].load(0)[1][0].tolist() == [0, 1, 2, 255] * 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda voc: (voc / "class_names.txt").unlink(), "class_names.txt: "),
        (lambda voc: (voc / "class_names.txt").write_text("_background_\nbird"), "image_00.png: holds label 2, but"),
        (lambda voc: (voc / "SegmentationClass/image_01.png").unlink(), "no image_01.png for"),
        (lambda voc: (voc / "SegmentationClass").rename(voc / "other"), "no PNG files in SegmentationClassPNG or"),
        (lambda voc: (voc / "JPEGImages").rename(voc / "other"), "JPEGImages: no .jpg files"),
    ],
)
def test_unusable_labelme_folders(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(write_voc(tmp_path / "voc"))
    with pytest.raises(BadInput, match=message):
        labelme.convert(tmp_path / "voc", tmp_path / "out")
    assert not (tmp_path / "out").exists()
