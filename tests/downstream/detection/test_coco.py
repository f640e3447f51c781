"""COCO's layout, jitter and scores: values, against pycocotools' own masks and against another implementation of AP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from pycocotools import mask as tools

from common.training.data import seeded
from common.training.errors import BadInput
from downstream.detection.coco import (
    CocoScores,
    CocoSource,
    Detections,
    Fit,
    Jitter,
    Photograph,
    collate_objects,
    count_training_images,
    cut,
    decoded,
    fitted,
    tight_boxes,
)
from tests.downstream.coco_folder import CATEGORIES, SIZES, box_of, ellipse, write_coco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco")


def photograph(size: tuple[int, int] = (40, 60)) -> Photograph:
    """Two objects in colours of their own on black, and one that is a single pixel in the corner."""
    masks = [ellipse(size, (18, 20), (12, 9)), ellipse(size, (25, 45), (8, 11)), np.zeros(size, dtype=bool)]
    masks[2][-1, -1] = True
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    for channel, mask in enumerate(masks):
        pixels[mask, channel] = 255
    return Photograph(Image.fromarray(pixels), torch.from_numpy(np.stack(masks)), torch.tensor([2, 1, 5]), 0)


def test_training_images_are_counted_as_they_are_read(root: Path) -> None:
    """Those with an object that is no crowd; files alone where the JSON is too long to be read before a job is submitted."""
    assert count_training_images(root) == len(CocoSource(root, "train")) == 4
    assert count_training_images(root, most=100) == 6
    file = root / "annotations/instances_train2017.json"
    held = json.loads(file.read_text())
    held["annotations"] = [row for row in held["annotations"] if row["iscrowd"]]
    file.write_text(json.dumps(held))
    with pytest.raises(BadInput, match=r"instances_train2017\.json: no image has an object"):
        count_training_images(root)
    file.unlink()
    with pytest.raises(BadInput, match=r"instances_train2017\.json: No such file"):
        count_training_images(root)


def test_reading(root: Path) -> None:
    train, val = CocoSource(root, "train"), CocoSource(root, "val")
    assert (len(train), train.left_out, len(val), val.left_out) == (4, 2, 6, 0)
    assert (train.names, train.category_ids) == (["ball", "egg"], [7, 90])
    held = json.loads((root / "annotations/instances_train2017.json").read_text())
    one = train.load(2)
    assert one.labels.tolist() == [2, 1]
    assert one.image.size == SIZES[2][::-1]
    for mask, row in zip(one.masks, held["annotations"][4:6], strict=True):
        assert box_of(mask.numpy()) == row["bbox"]
        assert int(mask.sum()) == row["area"]
        colour = np.array(one.image)[mask.numpy()]
        assert len(np.unique(colour, axis=0)) == 1  # the mask covers the object and nothing else
    assert val.load(4).masks.shape == (0, *SIZES[4])


def test_masks_of_every_kind() -> None:
    mask = ellipse((20, 30), (9, 14), (6, 8))
    packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
    words = {"size": packed["size"], "counts": packed["counts"].decode()}  # as in a JSON file
    np.testing.assert_array_equal(decoded(words, (20, 30), tools), mask)
    square = [5.0, 4.0, 11.0, 4.0, 11.0, 10.0, 5.0, 10.0]
    plain = np.zeros((20, 30), dtype=np.uint8)
    plain[4:10, 5:11] = 1
    np.testing.assert_array_equal(decoded([square], (20, 30), tools), plain)
    np.testing.assert_array_equal(decoded([square, [20.0, 1, 25, 1]], (20, 30), tools), plain)  # two points are no box
    assert not decoded([], (20, 30), tools).any()
    with pytest.raises(ValueError, match="its size is"):
        decoded(words, (20, 31), tools)


@pytest.mark.parametrize("seed", range(12))
def test_jitter_moves_image_masks_and_boxes_together(seed: int) -> None:
    """Objects are known by their colours: mask and colour agree but for the blurred rim, boxes are tight, labels follow."""
    jitter = Jitter((48, 64), (0.4, 2.0), True, "bilinear")
    with seeded(seed):
        image, target = jitter(photograph())
    assert image.shape == (3, 48, 64)
    assert target["masks"].shape == (len(target["labels"]), 48, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    colours = image * std[:, None, None] + mean[:, None, None]
    for label, mask, box in zip(target["labels"].tolist(), target["masks"], target["boxes"].tolist(), strict=True):
        rows, columns = np.nonzero(mask.numpy())
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        if label == 5:
            continue
        colour = colours[{2: 0, 1: 1}[label]] > 0.55  # the mean colour of the filling is below
        shared = (colour & (mask == 1)).sum() / (colour | (mask == 1)).sum()
        assert shared > 0.8 or mask.sum() < 60, (label, float(shared))


def test_jitter_values() -> None:
    """No jitter and no flip: the image itself. Twice the size: each pixel of a mask four times. Flipped: mirrored."""
    one = photograph()
    _, same = Jitter((40, 60), (1.0, 1.0), False, "bilinear")(one)
    assert torch.equal(same["masks"], one.masks.to(torch.uint8))
    assert same["boxes"].tolist() == [[11, 6, 29, 30], [34, 17, 56, 33], [59, 39, 60, 40]]
    _, twice = Jitter((80, 120), (1.0, 1.0), False, "bilinear")(one)
    assert torch.equal(twice["masks"], one.masks.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8))
    flips = []
    for seed in range(8):
        with seeded(seed):
            image, target = Jitter((40, 60), (1.0, 1.0), True, "bilinear")(one)
        flips.append(torch.equal(target["masks"].flip(-1), same["masks"]))
        assert flips[-1] or torch.equal(target["masks"], same["masks"])
        straight = cut(one.image, (40, 60), (0, 0), (40, 60), "bilinear")
        assert torch.equal(image, straight.flip(-1) if flips[-1] else straight)
    assert 1 <= sum(flips) <= 7


def test_jitter_drops_what_vanishes_and_fills_up() -> None:
    dropped, kept = 0, 0
    for seed in range(20):
        with seeded(seed):
            image, target = Jitter((32, 32), (0.1, 3.0), True, "bilinear")(photograph())
        assert (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        assert target["masks"].flatten(1).any(dim=1).all()
        dropped, kept = dropped + 3 - len(target["labels"]), kept + len(target["labels"])
        assert image.shape == (3, 32, 32)
    assert dropped > 5
    assert kept > 5
    image, target = Jitter((32, 64), (0.25, 0.25), False, "bilinear")(photograph())  # 40 x 60 -> 8 x 12
    assert fitted((40, 60), (32, 64), 0.25) == (8, 12)
    assert not image[:, 8:].any()
    assert not image[:, :, 12:].any()
    assert image[:, :8, :12].all()
    assert fitted((4000, 3), (32, 32), 0.1) == (3, 1)


def test_jitter_depends_on_torchs_generator_alone() -> None:
    jitter = Jitter((32, 32), (0.1, 2.0), True, "bicubic")
    outcomes = []
    for seed in (1, 2, 1):
        with seeded(seed):
            outcomes.append(jitter(photograph())[0])
    assert torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], outcomes[1])


def test_cutting_equals_resizing_the_whole() -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    whole = cut(image, (100, 150), (0, 0), (100, 150), "bilinear")
    part = cut(image, (100, 150), (30, 41), (64, 64), "bilinear")
    torch.testing.assert_close(part[:, 4:-4, 4:-4], whole[:, 34:90, 45:101], rtol=0, atol=0.05)


def test_tight_boxes() -> None:
    generator = np.random.default_rng(0)
    masks = generator.random((20, 9, 13)) > 0.93
    masks = masks[masks.any(axis=(1, 2))]
    wanted = [[x, y, x + width, y + height] for x, y, width, height in map(box_of, masks)]
    assert tight_boxes(torch.from_numpy(masks)).tolist() == wanted
    assert tight_boxes(torch.zeros(0, 4, 4)).shape == (0, 4)


def test_batches(root: Path) -> None:
    source, jitter = CocoSource(root, "train"), Jitter((32, 32), (1.0, 1.0), True, "bilinear")
    samples: list[Any] = [(jitter(source.load(i)), i, source.name(i), []) for i in range(3)]
    batch = collate_objects(samples)
    assert batch.images.shape == (3, 3, 32, 32)
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for one in moved.targets for value in one.values()} == {"meta"}
    assert len(batch.targets) == 3
    broken = collate_objects([*samples, (None, 3, "x.jpg", ["x.jpg: gone"])])
    assert (broken.views, broken.bad) == ((), ["x.jpg: gone"])
    fit, known = Fit((32, 32), "bilinear")(source.load(1))
    assert (fit.shape, int(known["place"])) == ((3, 32, 32), 1)


# --- scores ---


def write_random_truth(root: Path, generator: np.random.Generator) -> CocoSource:
    """30 images with 0 to 5 objects of 3 classes and of every size, some of them crowds."""
    write_coco(root)
    images = [{"id": 5 * i + 1, "file_name": "x.png", "height": 160, "width": 200} for i in range(30)]
    annotations: list[dict[str, Any]] = []
    for image in images:
        for _ in range(generator.integers(0, 6)):
            radii = generator.uniform(8, 70, 2)
            mask = ellipse((160, 200), (generator.uniform(20, 140), generator.uniform(20, 180)), (radii[0], radii[1]))
            packed = tools.encode(np.asfortranarray(mask.astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": image["id"],
                    "category_id": int(generator.choice([3, 8, 20])),
                    "bbox": box_of(mask),
                    "area": float(mask.sum()),
                    "iscrowd": int(generator.random() < 0.15),
                    "segmentation": {"size": packed["size"], "counts": packed["counts"].decode()},
                }
            )
    held = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": str(i)} for i in (20, 3, 8)]}
    (root / "annotations/instances_val2017.json").write_text(json.dumps(held))
    return CocoSource(root, "val")


def random_outcome(source: CocoSource, place: int, generator: np.random.Generator) -> Detections:
    """Moved copies of most objects, some with another class, and some that are not there."""
    masks, labels = [], []
    for one in source.annotations:
        if one["image_id"] == source.records[place]["id"] and generator.random() < 0.9:
            moved = np.roll(decoded(one["segmentation"], (160, 200), tools), generator.integers(-3, 4, 2), (0, 1))
            masks.append(moved.astype(bool))
            wrong = generator.random() < 0.1
            labels.append(int(generator.integers(1, 4)) if wrong else 1 + source.category_ids.index(one["category_id"]))
    for _ in range(generator.integers(0, 3)):
        masks.append(ellipse((160, 200), (generator.uniform(20, 140), generator.uniform(20, 180)), (15, 20)))
        labels.append(int(generator.integers(1, 4)))
    boxes = [[x, y, x + width, y + height] for x, y, width, height in map(box_of, masks)]
    packed = [tools.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    scores = generator.random(len(masks)).astype(np.float32)
    return Detections(place, np.array(boxes, dtype=np.float32).reshape(-1, 4), np.array(labels, dtype=np.int64), scores, packed)


def judged_elsewhere(source: CocoSource, found: list[Detections], kind: str) -> list[float]:
    """The C++ evaluation of faster-coco-eval, on the JSON itself (but for ids from 1, which all implementations need)."""
    held = json.loads(source.file.read_text())
    for one in held["annotations"]:
        one["id"] += 1
    for one in held["images"]:
        one["height"], one["width"] = 160, 200
    truth = COCO(held, print_function=lambda *words: None)
    rows = []
    for one in found:
        for box, label, score, mask in zip(one.boxes.tolist(), one.labels, one.scores.tolist(), one.masks, strict=True):
            row = {"image_id": 5 * one.place + 1, "category_id": [3, 8, 20][label - 1], "score": score}
            shape = {"bbox": [*box[:2], box[2] - box[0], box[3] - box[1]]} if kind == "bbox" else {"segmentation": mask}
            rows.append({**row, **shape})
    judge = COCOeval_faster(truth, truth.loadRes(rows), kind, print_function=lambda *words: None)
    judge.run()
    return [100 * float(value) for value in judge.stats[:6]]


def test_scores_equal_another_implementation(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    source = write_random_truth(tmp_path / "coco", generator)
    assert any(one["iscrowd"] for one in source.annotations)
    assert len({one["image_id"] for one in source.annotations}) < len(source)  # some images have no object
    found = [random_outcome(source, place, generator) for place in range(len(source))]
    assert any(len(one.labels) == 0 for one in found)
    judge = CocoScores(source)
    numbers = judge(found)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        mine = [numbers[f"{key}_{name}"] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl")]
        assert mine == pytest.approx(judged_elsewhere(source, found, kind), abs=1e-6)
        assert 20 < mine[0] < 80
    assert judge(found[::-1]) == numbers  # twice, and in another order


def test_perfect_outcome_is_100_and_none_is_0(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also for the object with id 0, which pycocotools would count as missed."""
    source = CocoSource(root, "val")
    found = []
    for place, record in enumerate(source.records):
        rows = [one for one in source.annotations if one["image_id"] == record["id"] and not one["iscrowd"]]
        boxes = np.array([one["bbox"] for one in rows]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([1 + source.category_ids.index(one["category_id"]) for one in rows], dtype=np.int64)
        masks = [tools.frPyObjects(one["segmentation"], *one["segmentation"]["size"]) for one in rows]
        found.append(Detections(place, boxes, labels, np.linspace(0.9, 0.8, len(rows)), masks))
    judge = CocoScores(source)
    numbers = judge(found)
    assert set(numbers) == {f"{key}_{kind}" for key in ("AP", "AP50", "AP75", "APs") for kind in ("box", "mask")}
    assert numbers == pytest.approx(dict.fromkeys(numbers, 100.0))
    nothing = [Detections(place, np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0), []) for place in range(len(source))]
    assert judge(nothing) == dict.fromkeys(numbers, 0.0)
    assert capsys.readouterr().out == ""


# --- input that cannot be used ---


def _rewrite(root: Path, **changes: Any) -> None:
    file = root / "annotations/instances_train2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "annotations/instances_train2017.json").unlink(), "instances_train2017.json: No such file"),
        (lambda root: (root / "train2017").rename(root / "elsewhere"), "has no folder train2017"),
        (lambda root: (root / "annotations/instances_train2017.json").write_text("{"), "is not JSON"),
        (lambda root: (root / "annotations/instances_train2017.json").write_text("[]"), "has no list 'images'"),
        (lambda root: _rewrite(root, categories=[{"id": 7}]), "categories 7 has no name"),
        (lambda root: _rewrite(root, categories=CATEGORIES[:1]), "annotation 1 has the unknown category_id 7"),
        (lambda root: _rewrite(root, images=[]), "unknown image_id 11"),
        (lambda root: _rewrite(root, annotations=[]), "no image has an object"),
    ],
)
def test_bad_layouts_are_named(root: Path, damage: Any, message: str) -> None:
    damage(root)
    with pytest.raises(BadInput, match=message) as raised:
        CocoSource(root, "train")
    assert "\n" not in str(raised.value)


def test_unreadable_samples_are_value_errors(root: Path) -> None:
    """They become one line of the training loop, or another image takes their place (common/training/data.py)."""
    held = json.loads((root / "annotations/instances_train2017.json").read_text())
    rows = held["annotations"]
    rows[0]["segmentation"] = {"size": [9, 9], "counts": [81]}
    rows[2]["segmentation"] = {"size": list(SIZES[1])}
    held["images"][2]["height"] += 1
    _rewrite(root, annotations=rows, images=held["images"])
    source = CocoSource(root, "train")
    for index, message in ((0, "annotation 0: segmentation cannot be read"), (1, "annotation 2: segm"), (2, "is 40 x 56, but")):
        with pytest.raises(ValueError, match=message):
            source.load(index)
    Path(source.name(3)).unlink()
    with pytest.raises(OSError, match="No such file"):
        source.load(3)


def test_without_pycocotools_one_line_says_how_to_get_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(BadInput, match=r"pip install -r requirements-downstream\.txt"):
        CocoSource(root, "train")
