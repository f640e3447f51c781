"""Flags, files and recipes -> one checked configuration."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from common.mask_config import MaskConfig
from common.training.command_line import parse_arguments
from common.training.errors import BadInput, NonFiniteLoss, RankError, run_cli
from mae_evolved.main_pretrain import MAEConfig

RECIPES = sorted((Path(__file__).parents[3] / "mae_evolved" / "recipes").glob("*.toml"))


def parse(flags: str) -> tuple[MAEConfig, MaskConfig]:
    return parse_arguments(MAEConfig, "test", "", flags.split())


def test_defaults_are_the_table_4_recipe() -> None:
    """ViT-S, 200 epochs, MAE's optimiser, the paper's mask."""
    config, mask = parse("")
    assert (config.model, config.epochs, config.input_size, config.mask_ratio) == ("mae_vit_small_patch16", 200, "224", 0.75)
    assert (config.blr, config.beta1, config.beta2, config.weight_decay, config.warmup_epochs) == (1.5e-4, 0.9, 0.95, 0.05, 40)
    assert config.norm_pix_loss
    assert config.crop_scale == (0.2, 1.0)
    assert mask == MaskConfig()
    assert config.grid_size == (14, 14)


def test_flags_of_every_kind() -> None:
    config, mask = parse(
        "--batch_size 7 --lr 1e-3 --no_norm_pix_loss --crop_scale 0.3 0.9 --input_size 192x256 "
        "--mask block --no_shortcut --layers 0,5"
    )
    assert (config.batch_size, config.lr, config.norm_pix_loss, config.crop_scale) == (7, 1e-3, False, (0.3, 0.9))
    assert config.image_size == (192, 256)
    assert config.grid_size == (12, 16)
    assert (mask.mask, mask.shortcut, mask.chosen_layers) == ("block", False, [0, 5])


def test_precedence_flags_over_file_over_recipe(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('recipe = "authors"\ngamma = 5\nepochs = 9\nwarmup_epochs = 1\ncrop_scale = [0.5, 1]\ninput_size = 32\n')
    config, mask = parse(f"--config {file} --epochs 11 --model mae_vit_tiny_patch4")
    assert (config.epochs, config.crop_scale, config.input_size) == (11, (0.5, 1.0), "32")
    assert (mask.gamma, mask.estimator, mask.parts_jitter) == (5.0, "vmf", 2)
    _, mask = parse(f"--config {file} --recipe paper --gamma 3")
    assert (mask.gamma, mask.estimator) == (3.0, "gaussian")


def test_the_command_lines_data_win_over_a_files(tmp_path: Path) -> None:
    """--data_path over a recipe of photographs, --dataset photos over a file's folder; both from one place are refused."""
    photos, folder = tmp_path / "photos.toml", tmp_path / "folder.toml"
    photos.write_text('dataset = "photos"\n')
    folder.write_text('data_path = "images"\n')
    places = [
        (f"--config {photos}", ("photos", "")),
        (f"--config {photos} --data_path=", ("photos", "")),
        (f"--config {photos} --data_path mine", ("auto", "mine")),
        (f"--config {folder} --dataset photos", ("photos", "")),
        (f"--config {folder} --data_path mine", ("auto", "mine")),
    ]
    for flags, data in places:
        config, _ = parse(flags)
        assert (config.dataset, config.data_path) == data, flags
    photos.write_text('dataset = "photos"\ndata_path = "images"\n')
    for flags in ("--dataset photos --data_path images", f"--config {photos}"):
        with pytest.raises(BadInput, match="--data_path is not read by --dataset photos: leave one of them out, got 'images'"):
            parse(flags)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_files_are_valid_and_say_what_they_claim(recipe: Path) -> None:
    parse(f"--config {recipe} --data_path images")
    head = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    for word in ("Hardware:", "Claim:", "Command:"):
        assert any(word in line for line in head), f"{recipe.name} has no '{word}' comment"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
        ("--batch_size 0", "--batch_size must be 1 or more, got 0"),
        ("--batch_size x", "argument --batch_size: invalid int value: 'x'"),
        ("--mask_ratio 1", r"--mask_ratio must be inside \(0, 1\), got 1.0"),
        ("--mask_ratio 0", r"--mask_ratio must be inside \(0, 1\), got 0.0"),
        ("--mask_ratio nan", r"--mask_ratio must be inside \(0, 1\), got nan"),
        ("--input_size 225", "--input_size must be divisible by the patch size 16 of mae_vit_small_patch16, got '225'"),
        ("--input_size 22a", "--input_size must be SIZE or HEIGHTxWIDTH in pixels, got '22a'"),
        ("--model vit", "--model must be one of mae_vit_tiny_patch4"),
        ("--crop_scale 0.9 0.3", "--crop_scale must be two shares"),
        ("--warmup_epochs 300", "--warmup_epochs must not be above --epochs 200"),
        ("--beta1 1", r"--beta1 must be in \[0, 1\)"),
        ("--lr -1", "--lr must be above 0, got -1.0"),
        ("--dataset cifar10", "--data_path is needed for --dataset cifar10"),
        ("--dataset mnist", "argument --dataset: invalid choice: 'mnist'"),
        ("--gamma 0", "--gamma must be above 0"),
        ("--alpha 2", "--alpha must be between 0 and 1"),
        ("--mask stripes", "argument --mask: invalid choice"),
        ("--layers a", "--layers must be 'all', 'last' or block indices"),
        ("--config none.toml", "--config none.toml:.*No such file"),
    ],
)
def test_bad_flags_say_which_and_why(flags: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        parse(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key epoch"),
        ("epochs = 2.5", "epochs must be int, got 2.5"),
        ('batch_size = "4"', "batch_size must be int, got '4'"),
        ("crop_scale = [1]", "crop_scale must be two numbers"),
        ("compile = 1", "compile must be bool, got 1"),
        ("epochs = ", "Invalid value"),
    ],
)
def test_bad_files_say_which_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        parse(f"--config {file}")


def test_bad_input_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: object) -> None:
        raise BadInput("--data_path x: no such folder")

    with pytest.raises(SystemExit) as stop:
        run_cli("program", fail, [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "program: error: --data_path x: no such folder\n"


def test_numbers_that_end_a_run_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1, no traceback; a full disk that nothing foresaw 2; what one rank alone finds is said by that rank."""

    def fail(error: Exception) -> None:
        raise error

    full = OSError(errno.ENOSPC, "No space left on device", "out/evolution.png")
    for error, code, line in (
        (NonFiniteLoss("loss became nan at epoch 1"), 1, "loss became nan at epoch 1"),
        (full, 2, "out/evolution.png: No space left on device"),
    ):
        with pytest.raises(SystemExit) as stop:
            run_cli("program", lambda argv, error=error: fail(error), [])  # type: ignore[misc]
        assert stop.value.code == code
        assert capsys.readouterr().err == f"program: error: {line}\n"
    monkeypatch.setenv("RANK", "1")
    for error, line in ((BadInput("all"), ""), (RankError("mine"), "program: error: mine\n")):
        with pytest.raises(SystemExit):
            run_cli("program", lambda argv, error=error: fail(error), [])  # type: ignore[misc]
        assert capsys.readouterr().err == line


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli("program", lambda argv: print(1 / 0), [])
