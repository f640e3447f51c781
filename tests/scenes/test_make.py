"""Composed scenes: labels that agree with the pixels, with each other, and with COCO's own decoder."""

from __future__ import annotations

import hashlib
import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.training.errors import BadInput, run_cli
from scenes import make as program
from scenes import sources
from scenes.contact_sheet import decode_run_lengths
from scenes.drawing import DOMINANCE, VISIBLE_MAIN, VISIBLE_OTHER, draw_scene
from scenes.layouts import ADE20K, COCO, box_of, run_lengths
from scenes.make import main, make_scenes
from scenes.sources import SPLITS, Library, Picture, Pool, divide, load_library, missing_packages, reason_against

needs_photos = pytest.mark.skipif(bool(missing_packages()), reason=f"run: {sources.INSTALL}")
COUNTS = {"train": 30, "val": 18}


@pytest.fixture(scope="session", params=["shapes", pytest.param("photos", marks=needs_photos)])
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes") / request.param
    make_scenes(out, **COUNTS, size=64, seed=3, sources=request.param, workers=1)
    return out


def tree(out: Path) -> dict[str, str]:
    """Every file below `out` and the hash of its bytes."""
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def instances_of(out: Path, split: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"coco/annotations/instances_{COCO[split]}.json").read_text())
    return content


# Drawing.


def flat_pool() -> Pool:
    """Three classes of one plain rectangle each, of a colour of its own, on black: the pixels tell what is visible."""
    sizes, colours = ((40, 40), (60, 20), (24, 50)), ((255, 0, 0, 255), (0, 255, 0, 255), (0, 0, 255, 255))
    cutouts = tuple((Picture(str(c), Image.new("RGBA", sizes[c], colours[c])),) for c in range(3))
    return Pool(cutouts, (Picture("black", Image.new("RGB", (90, 70))),))


def test_masks_are_exactly_what_can_be_seen() -> None:
    hidden = 0
    for index in range(60):
        scene = draw_scene(flat_pool(), 64, 0, "train", index)
        for label in range(3):
            claimed = np.zeros((64, 64), dtype=bool)
            for one in scene.instances:
                assert not (claimed & one.mask).any() or one.label != label
                claimed |= one.mask if one.label == label else False
            np.testing.assert_array_equal(claimed, scene.pixels[..., label] == 255)
        assert sum(one.mask.sum() for one in scene.instances) == (scene.pixels.max(axis=2) > 0).sum()
        hidden += any(one.mask.sum() < np.prod(box_of(one.mask)[2:]) for one in scene.instances)
    assert hidden > 5  # rectangles that are covered in part have occurred


def test_soft_edges_are_blended_and_the_mask_ends_at_one_half() -> None:
    ramp = np.zeros((40, 40, 4), dtype=np.uint8)
    ramp[..., 0] = 255
    ramp[..., 3] = np.linspace(0, 255, 40).astype(np.uint8)[None]
    pool = Pool(((Picture("ramp", Image.fromarray(ramp)),),), (Picture("blue", Image.new("RGB", (64, 64), "blue")),))
    seen = 0
    for index in range(40):
        scene = draw_scene(pool, 64, 0, "val", index)
        if len(scene.instances) == 1:
            red, blue = scene.pixels[..., 0], scene.pixels[..., 2]
            assert np.abs(red.astype(int) + blue - 255).max() <= 1
            np.testing.assert_array_equal(scene.instances[0].mask, red > 127)
            assert ((red > 10) & (red < 120)).any()
            seen += 1
    assert seen > 3


def test_rules_of_a_scene_hold() -> None:
    library = load_library("shapes", 64)
    counts = set()
    for index in range(120):
        scene = draw_scene(library.pools["train"], 64, 1, "train", index)
        areas = [int(one.mask.sum()) for one in scene.instances]
        assert scene.label == index % len(library.classes)
        assert all(areas[0] >= DOMINANCE * area for area in areas[1:])
        assert min(areas) >= 20
        counts.add(len(areas))
    assert counts == {1, 2, 3}


def test_no_object_is_mostly_hidden() -> None:
    """With plain rectangles the whole object is known: its area follows from the visible extent on an axis it keeps."""
    for index in range(60):
        scene = draw_scene(flat_pool(), 96, 2, "train", index)
        for rank, one in enumerate(scene.instances):
            width, height = flat_pool().cutouts[one.label][0].image.size
            longest = max(box_of(one.mask)[2] / width, box_of(one.mask)[3] / height)  # scale, at least
            rounding = 0.9
            floor = (VISIBLE_OTHER if rank else VISIBLE_MAIN) * rounding
            assert one.mask.sum() >= floor * longest**2 * width * height


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    pool = load_library("shapes", 64).pools["train"]
    pixels = [draw_scene(pool, 64, *key).pixels for key in ((0, "train", 5), (0, "train", 5), (1, "train", 5), (0, "val", 5))]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    assert not np.array_equal(pixels[0], pixels[3])


@pytest.mark.parametrize("size", [64, 100, 512])
def test_any_size(tmp_path: Path, size: int) -> None:
    make_scenes(tmp_path / "out", 2, 1, size, sources="shapes", workers=1)
    for path in (tmp_path / "out").rglob("*.jpg"):
        assert Image.open(path).size == (size, size)


# The layouts.


def test_coco_masks_are_the_regions_of_the_ade20k_annotation(scenes: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco", reason="run: pip install -r requirements-downstream.txt").COCO
    background = json.loads((scenes / "scenes.json").read_text())["ade20k_background"]
    for split in SPLITS:
        read = coco(scenes / f"coco/annotations/instances_{COCO[split]}.json")
        assert len(read.getImgIds()) == COUNTS[split]
        for image_id in read.getImgIds():
            expected = np.full((64, 64), background, dtype=np.uint8)
            covered = np.zeros((64, 64), dtype=int)
            for one in read.loadAnns(read.getAnnIds(image_id)):
                mask = read.annToMask(one).astype(bool)
                expected[mask] = one["category_id"]
                covered += mask
            assert covered.max() == 1  # visible parts do not overlap
            annotation = np.asarray(Image.open(scenes / f"ade20k/annotations/{ADE20K[split]}/{image_id:012d}.png"))
            assert annotation.dtype == np.uint8
            np.testing.assert_array_equal(annotation, expected)


def test_boxes_and_areas_are_those_of_pycocotools(scenes: Path) -> None:
    decoder = pytest.importorskip("pycocotools.mask", reason="run: pip install -r requirements-downstream.txt")
    for split in SPLITS:
        for one in instances_of(scenes, split)["annotations"]:
            encoded = decoder.frPyObjects(one["segmentation"], 64, 64)
            assert one["bbox"] == decoder.toBbox(encoded).tolist()
            assert one["area"] == int(decoder.area(encoded))
            assert one["iscrowd"] == 0


def test_the_folder_is_the_class_of_the_largest_visible_object(scenes: Path) -> None:
    for split in SPLITS:
        content = instances_of(scenes, split)
        names = {one["id"]: one["name"] for one in content["categories"]}
        found = {path.stem: path.parent.name for path in (scenes / "imagenet" / split).glob("*/*.jpg")}
        assert len(found) == COUNTS[split]
        for image in content["images"]:
            areas = sorted(
                (one["area"], names[one["category_id"]]) for one in content["annotations"] if one["image_id"] == image["id"]
            )
            assert found[Path(image["file_name"]).stem] == areas[-1][1]
            assert len(areas) == 1 or areas[-1][0] >= DOMINANCE * areas[-2][0]


def test_classes_are_balanced_and_numbered_alike(scenes: Path) -> None:
    content = json.loads((scenes / "scenes.json").read_text())
    rows = [line.split("\t") for line in (scenes / "ade20k/classes.txt").read_text().splitlines()]
    categories = [(str(one["id"]), one["name"]) for one in instances_of(scenes, "val")["categories"]]
    assert [tuple(row) for row in rows] == [*categories, (str(content["ade20k_background"]), "background")]
    assert [name for _, name in categories] == content["classes"]
    for split in SPLITS:
        of_class = content["splits"][split]["scenes_of_class"].values()
        assert max(of_class) - min(of_class) <= 1
        assert sorted(path.name for path in (scenes / "imagenet" / split).iterdir()) == sorted(content["classes"])


def test_a_picture_is_stored_once(scenes: Path) -> None:
    for split in SPLITS:
        for image in instances_of(scenes, split)["images"]:
            (first,) = (scenes / "imagenet" / split).glob(f"*/{image['file_name']}")
            for folder in (f"ade20k/images/{ADE20K[split]}", f"coco/{COCO[split]}"):
                assert (scenes / folder / image["file_name"]).samefile(first)


def test_copies_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    make_scenes(tmp_path / "copied", 3, 1, 64, sources="shapes", workers=1)
    monkeypatch.undo()
    make_scenes(tmp_path / "linked", 3, 1, 64, sources="shapes", workers=1)
    assert tree(tmp_path / "copied") == tree(tmp_path / "linked")


def test_run_lengths_and_boxes_of_known_masks() -> None:
    mask = np.array([[1, 0, 0], [1, 1, 0]], dtype=bool)
    assert run_lengths(mask) == [0, 2, 1, 1, 2]
    assert run_lengths(~mask) == [2, 1, 1, 2]
    assert box_of(mask) == [0, 0, 2, 2]
    assert box_of(np.array([[0, 0, 0], [0, 0, 1]], dtype=bool)) == [2, 1, 1, 1]
    square = np.random.default_rng(0).random((9, 9)) < 0.5
    np.testing.assert_array_equal(decode_run_lengths(run_lengths(square), 9), square)


# Splits and sources.


def test_no_picture_is_in_both_splits(scenes: Path) -> None:
    content = json.loads((scenes / "scenes.json").read_text())["splits"]
    used = {}
    for split in SPLITS:
        listed = {name for names in content[split]["cutouts"].values() for name in names} | set(content[split]["backgrounds"])
        coco = instances_of(scenes, split)
        used[split] = {one["cutout"] for one in coco["annotations"]} | {one["background"] for one in coco["images"]}
        assert used[split] <= listed
        assert min(map(len, content[split]["cutouts"].values())) >= 1
    assert used["train"]
    assert not set(content["train"]["backgrounds"]) & set(content["val"]["backgrounds"])
    for name, held_out in content["val"]["cutouts"].items():
        assert not set(content["train"]["cutouts"][name]) & set(held_out)
    assert not used["train"] & used["val"]


def thumbnail(image: Image.Image) -> np.ndarray:
    """A cut-out on grey, or a background, at 16x16."""
    canvas = Image.new("RGBA", image.size, (128, 128, 128, 255))
    canvas.alpha_composite(image.convert("RGBA"))
    return np.asarray(canvas.convert("RGB").resize((16, 16)), dtype=np.float64)


def thumbnails(library: Library, split: str) -> list[np.ndarray]:
    pool = library.pools[split]
    return [thumbnail(one.image) for one in [*(one for pictures in pool.cutouts for one in pictures), *pool.backgrounds]]


def alike(one: np.ndarray, other: np.ndarray) -> float:
    """The higher correlation of two thumbnails, one of them flipped or not."""
    return float(max(np.corrcoef(one.ravel(), picture.ravel())[0, 1] for picture in (other, other[:, ::-1])))


@needs_photos
def test_no_picture_of_one_split_is_another_size_or_a_mirror_of_one_of_the_other() -> None:
    """The pairs that the package does hold (two `_mirror` files) are found by the same measure."""
    library = load_library("photos", 64)
    pairs = product(thumbnails(library, "train"), thumbnails(library, "val"))
    assert max(alike(one, other) for one, other in pairs) < 0.95
    stamps = sources.SHARE / "tuxpaint/stamps"
    for name in ("vehicles/construction/dumper", "household/tools/measuring_tape"):
        pair = [thumbnail(sources._open_cutout(stamps / f"{name}{end}.png")) for end in ("", "_mirror")]
        assert alike(*pair) > 0.95
    photograph = sources.SHARE / sources.BACKGROUNDS[0]
    assert alike(*[thumbnail(sources._open_background(photograph, side)) for side in (100, 400)]) > 0.95


@needs_photos
def test_kept_cutouts_are_photographs() -> None:
    library = load_library("photos", 64)
    kept = [one.name for split in SPLITS for pictures in library.pools[split].cutouts for one in pictures]
    assert len(kept) == len(set(kept)) >= 180
    assert not [name for name in kept if any(word in name for word in ("cartoon", "mirror", "toys", "plastic"))]
    assert not set(kept) & set(library.left_out)
    assert "animals/birds/duck.png" in kept
    assert "household/arttools/highlighter.png" in library.left_out
    drawn = [f"food/fruit/cartoon/{name}.png" for name in ("apple", "banana", "lemon", "orange", "pear", "strawberry")]
    for name in [*drawn, "animals/insects/bee.png", "animals/mammals/hedgehog.png"]:
        assert reason_against(sources._open_cutout(sources.SHARE / "tuxpaint/stamps" / name)).startswith("drawn"), name


def test_reasons_against_a_cutout() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 4), dtype=np.uint8)
    noise[..., 3] = 255
    assert reason_against(Image.fromarray(noise)) == ""
    assert reason_against(Image.new("RGBA", (60, 60), "red")) == "drawn: flat 1.00, colour 0.0 bits"
    assert reason_against(Image.fromarray(noise[:30, :30])) == "30 px"
    assert reason_against(Image.fromarray(noise[:2])) == "fills 0.033 of its square"


def test_divide_does_not_depend_on_order_and_leaves_one_for_each() -> None:
    names = [f"n{number}" for number in range(20)]
    first, second = divide(names, names), divide(names[::-1], names[::-1])
    assert first == second
    assert len(first["val"]) == 5
    assert sorted(first["train"] + first["val"]) == sorted(names)
    assert {split: len(part) for split, part in divide(names[:2], names[:2]).items()} == {"train": 1, "val": 1}
    with pytest.raises(BadInput, match="n0: at least two pictures"):
        divide(names[:1], names[:1])


def test_without_the_packages_shapes_are_drawn_and_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "SHARE", tmp_path)
    main([str(tmp_path / "out"), "--train", "3", "--val", "1", "--workers", "1"])
    said = capsys.readouterr().out
    assert "drawn shapes, since these packages are not installed: tuxpaint-stamps-default, mate-backgrounds, lomiri" in said
    assert sources.INSTALL in said
    assert (tmp_path / "out/SOURCES.txt").read_text().startswith("Scenes of drawn shapes")
    assert json.loads((tmp_path / "out/scenes.json").read_text())["settings"]["sources"] == "shapes"
    with pytest.raises(BadInput, match=r"--sources photos: not installed: .*; run: apt install"):
        make_scenes(tmp_path / "other", 3, 1, 64, sources="photos")
    assert not (tmp_path / "other").exists()


@needs_photos
def test_sources_names_packages_and_licences(tmp_path: Path) -> None:
    make_scenes(tmp_path / "out", 1, 1, 64, sources="auto", workers=1)
    text = (tmp_path / "out/SOURCES.txt").read_text()
    for package, licence in (
        ("tuxpaint-stamps-default", "GPL-2"),
        ("mate-backgrounds", "GPL-2+"),
        ("lomiri-wallpapers-16.04", "CC-BY"),
    ):
        assert f"{package}: {licence}" in text
        assert licence in (Path("/usr/share/doc") / package / "copyright").read_text()


# Repeating, interrupting, replacing.


def test_the_same_bytes_for_any_number_of_processes(tmp_path: Path) -> None:
    make_scenes(tmp_path / "one", 200, 10, 64, seed=5, sources="shapes", workers=1)
    make_scenes(tmp_path / "three", 200, 10, 64, seed=5, sources="shapes", workers=3)
    make_scenes(tmp_path / "seed", 200, 10, 64, seed=6, sources="shapes", workers=1)
    first = tree(tmp_path / "one")
    assert len(first) == 4 * 210 + 6
    assert first == tree(tmp_path / "three")
    other = tree(tmp_path / "seed")
    assert not [name for name in first if name.startswith("coco/train2017") and first[name] == other[name]]


def test_fewer_scenes_are_the_first_of_more(tmp_path: Path, scenes: Path) -> None:
    make_scenes(
        tmp_path / "few", 4, 2, 64, seed=3, sources=json.loads((scenes / "scenes.json").read_text())["settings"]["sources"]
    )
    few, many = tree(tmp_path / "few"), tree(scenes)
    pictures = [name for name in few if name.endswith((".jpg", "0.png", "1.png", "2.png"))]
    assert len(pictures) > 18
    assert all(few[name] == many[name] for name in pictures)
    assert instances_of(tmp_path / "few", "val")["images"] == instances_of(scenes, "val")["images"][:2]


def test_running_again_does_nothing_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(tmp_path / "out"), "--train", "3", "--val", "1", "--sources", "shapes"]
    main(command)
    assert "out holds 3 + 1 scenes (shapes) of 6 classes" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    main(command)
    assert "out holds already 3 + 1 scenes" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_other_settings_need_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_scenes(out, 3, 1, 64, sources="shapes")
    before = tree(out)
    with pytest.raises(BadInput, match=r"out holds other scenes \(train 3, seed 0\); add --overwrite"):
        make_scenes(out, 2, 1, 64, seed=1, sources="shapes")
    assert tree(out) == before
    make_scenes(out, 2, 1, 64, seed=1, sources="shapes", overwrite=True)
    make_scenes(tmp_path / "new", 2, 1, 64, seed=1, sources="shapes")
    assert tree(out) == tree(tmp_path / "new")


def test_an_interrupted_folder_is_not_whole_and_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    make_scenes(out, 5, 1, 64, sources="shapes", workers=1)
    monkeypatch.setattr(program, "write_lists", stop)
    with pytest.raises(KeyboardInterrupt):
        make_scenes(out, 3, 1, 64, sources="shapes", workers=1, overwrite=True)
    monkeypatch.undo()
    assert not (out / "scenes.json").exists()
    assert (out / "imagenet/train").is_dir()
    make_scenes(out, 3, 1, 64, sources="shapes", workers=1)
    make_scenes(tmp_path / "clean", 3, 1, 64, sources="shapes", workers=1)
    assert tree(out) == tree(tmp_path / "clean")


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet/mine.txt").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(BadInput, match="holds files that are not scenes"):
            make_scenes(tmp_path, 2, 1, 64, sources="shapes", overwrite=overwrite)
    (tmp_path / "scenes.json").write_text("[]")
    with pytest.raises(BadInput, match=r"scenes\.json was not written by"):
        make_scenes(tmp_path, 2, 1, 64, sources="shapes", overwrite=True)
    assert (tmp_path / "imagenet/mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--size 32", "--size must be 64 to 512, got 32"),
        ("--size big", "argument --size: invalid int value: 'big' (see --help)"),
        ("--train 0", "--train must be 1 to 999999, got 0"),
        ("--val -4", "--val must be 1 to 999999, got -4"),
        ("--seed -1", "--seed must be 0 or more, got -1"),
        ("--workers -2", "--workers must be 0 or more, got -2"),
        ("--sources cats", "argument --sources: invalid choice: 'cats'"),
        ("--colour", "unrecognized arguments: --colour (see --help)"),
    ],
)
def test_bad_flags_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, line: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_cli(program.PROGRAM, main, [str(tmp_path / "out"), *flags.split()])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert line in said
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(BadInput, match="out is not a folder"):
        make_scenes(tmp_path / "out", 1, 1, 64, sources="shapes")


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(BadInput, match=r"broken\.png cannot be read as a picture"):
        sources._open_cutout(tmp_path / "broken.png")


def test_the_contact_sheet_marks_every_object(scenes: Path) -> None:
    with Image.open(scenes / "contact_sheet.png") as sheet:
        assert sheet.width == 8 * (192 + 4)
        assert sheet.height == 5 * (192 + 4)  # 24 + 16 scenes
        red = (np.asarray(sheet) == (255, 64, 64)).all(axis=2)
    for row, column in product(range(5), range(8)):
        assert red[row * 196 : row * 196 + 192, column * 196 : column * 196 + 192].sum() > 50
