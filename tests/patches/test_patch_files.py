"""The patch files as they are, without any official code at hand."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import textwrap
import tomllib

import pytest
import yaml

from patches import seam
from patches.apply import HERE, Patch, parse_patch, read_patch, read_upstream, render

NAMES = ("mae", "beit", "simmim")
MOST_LINES = 25
ROOT, TABLE_4 = HERE.parent, "downstream/recipes/table4_finetune_small.toml"


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def patch(name: str) -> Patch:
    return read_patch(read_upstream(name))


def inserted(patch: Patch) -> list[str]:
    return [line for hunks in patch.values() for hunk in hunks for line in hunk.lines]


def test_insertions_only_and_few(name: str, patch: Patch) -> None:
    text = (HERE / f"{name}.patch").read_text()
    body = [line for line in text.splitlines() if not line.startswith(("diff --git ", "--- a/", "+++ b/", "@@ "))]
    assert body
    assert all(line.startswith("+") for line in body)
    assert len(inserted(patch)) <= MOST_LINES


def test_the_file_is_what_the_parser_understood(name: str, patch: Patch) -> None:
    """No heading after @@ (git puts a line of the official file there), no index line, no fuzz."""
    assert render(patch) == (HERE / f"{name}.patch").read_text()


def test_every_block_parses_alone(patch: Patch) -> None:
    """Whole statements, so that no official statement is split or continued."""
    for hunks in patch.values():
        for hunk in hunks:
            assert ast.parse(textwrap.dedent("\n".join(hunk.lines))) is not None


def test_inserted_code_is_calls_of_the_seam(patch: Patch) -> None:
    """Imports of the seam, and calls of names that it has; no logic."""
    used = set()
    for line in filter(str.strip, inserted(patch)):
        (statement,) = ast.parse(line.strip()).body
        assert isinstance(statement, (ast.ImportFrom, ast.Expr, ast.Assign)), line
        if isinstance(statement, ast.ImportFrom):
            assert line == "from patches import seam"
        else:
            used |= set(re.findall(r"\bseam\.(\w+)", line))
            assert "seam." in line
    assert used
    assert used <= set(seam.CALLS)


def test_every_file_with_a_call_imports_the_seam_first(patch: Patch) -> None:
    for path, hunks in patch.items():
        assert hunks[0].lines[0] == "from patches import seam", path


def test_calls_exist_and_nothing_else_does() -> None:
    for call in seam.CALLS:
        assert callable(getattr(seam, call))
    with pytest.raises(AttributeError, match="no_such_call"):
        _ = seam.no_such_call


def test_every_call_is_inserted_somewhere() -> None:
    """The seam promises no call that no patch needs."""
    text = "".join((HERE / f"{name}.patch").read_text() for name in NAMES)
    assert set(re.findall(r"\bseam\.(\w+)", text)) == set(seam.CALLS)


def test_pins_are_whole(name: str) -> None:
    upstream = read_upstream(name)
    assert re.fullmatch("[0-9a-f]{40}", upstream.commit)
    assert all(re.fullmatch("[0-9a-f]{40}", blob) for blob in upstream.blobs.values())
    assert upstream.url.startswith("https://github.com/")
    assert upstream.licence
    assert all(upstream.folder == "." or path.startswith(f"{upstream.folder}/") for path in upstream.blobs)


def test_small_model_of_simmim_is_that_of_the_paper() -> None:
    (file,) = (HERE / "configs").glob("simmim_pretrain*.yaml")
    config = yaml.safe_load(file.read_text())
    assert config["MODEL"]["VIT"] == {"EMBED_DIM": 384, "DEPTH": 12, "NUM_HEADS": 6}
    assert config["TAG"] == file.stem
    train = config["TRAIN"]
    assert (train["EPOCHS"], train["LR_SCHEDULER"]["MULTISTEPS"]) == (200, [175])
    assert all(isinstance(train[key], float) for key in ("BASE_LR", "WARMUP_LR"))  # yaml reads 1e-4 as a string


def test_fine_tuning_of_simmim_is_our_recipe() -> None:
    """Rates for 512 images instead of 256; MAE's smallest rate is 1e-6 at 1024."""
    (file,) = (HERE / "configs").glob("simmim_finetune*.yaml")
    config, recipe = yaml.safe_load(file.read_text()), tomllib.loads((ROOT / TABLE_4).read_text())
    vit, train, augmentation = config["MODEL"]["VIT"], config["TRAIN"], config["AUG"]
    assert (vit["EMBED_DIM"], vit["DEPTH"], vit["NUM_HEADS"], vit["USE_MEAN_POOLING"]) == (384, 12, 6, recipe["pool"] == "mean")
    assert config["TAG"] == file.stem
    assert train["BASE_LR"] == 2 * recipe["blr"]
    assert train["MIN_LR"] == 1e-6 * 512 / 1024
    same = {
        "epochs": train["EPOCHS"],
        "warmup_epochs": train["WARMUP_EPOCHS"],
        "weight_decay": train["WEIGHT_DECAY"],
        "layer_decay": train["LAYER_DECAY"],
        "drop_path": config["MODEL"]["DROP_PATH_RATE"],
        "smoothing": config["MODEL"]["LABEL_SMOOTHING"],
        "mixup": augmentation["MIXUP"],
        "cutmix": augmentation["CUTMIX"],
        "random_erasing": augmentation["REPROB"],
        "auto_augment": augmentation["AUTO_AUGMENT"],
    }
    assert same.items() <= recipe.items()


def test_flags_of_the_mask_are_all_there() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    seam.add_arguments(parser)
    assert vars(parser.parse_args([])) == {}
    args = parser.parse_args(["--mask", "official", "--recipe", "authors", "--gamma", "3", "--no_shortcut", "--layers", "0,5"])
    assert vars(args) == {"mask": "official", "recipe": "authors", "gamma": 3.0, "shortcut": False, "layers": "0,5"}
    assert "official" in parser.format_help()


HEAD = "diff --git a/f.py b/f.py\n--- a/f.py\n+++ b/f.py\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("@@ -1 +0,0 @@\n-gone\n", "may only insert"),
        ("@@ -1,0 +2 @@\n-gone\n", "may only insert"),
        ("@@ -1,0 +2,2 @@\n+mine\n context\n", "may only insert"),
        ("@@ -1,2 +1,3 @@\n context\n+mine\n context\n", "may only insert"),
        ("@@ -1,0 +2 @@ def of_theirs():\n+mine\n", "may only insert"),
        ("@@ -1,0 +2 @@\n+mine\n+too many\n", "may only insert"),
        ("@@ -5,0 +6 @@\n+mine\n@@ -2,0 +4 @@\n+mine\n", "out of order"),
        ("@@ -5,0 +9 @@\n+mine\n", "do not fit"),
        ("@@ -5,0 +6,2 @@\n+mine\n", "incomplete"),
        ("", "incomplete"),
    ],
)
def test_other_patches_are_refused(body: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        parse_patch(HEAD + body, "bad.patch")


def test_the_front_door_stays_light() -> None:
    """Importing the method imports no command line, no training and no timm; patched scripts import the seam."""
    absent = ("patches.seam", "common.training", "timm", "torchvision")
    code = f"import sys; from common import evolved_mask; print([name for name in {absent} if name in sys.modules])"
    command = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout.strip() == "[]"
