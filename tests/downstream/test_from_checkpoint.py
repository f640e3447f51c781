"""What a downstream command takes from its checkpoint, so that the shortest command line works, and what it refuses."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import beit_evolved.model
import mae_evolved.model
import simmim_evolved.model
from common.training.errors import BadInput
from downstream import finetune, linear_probe
from downstream.detection.config import DetectConfig
from downstream.finetune import FinetuneConfig
from downstream.from_checkpoint import Taken, sizes_of, take
from downstream.linear_probe import ProbeConfig
from downstream.segment import SegmentConfig
from downstream.training import parse_task
from downstream.vit import METHODS, MODELS, BackboneViT, Method
from downstream.weights import Sizes, find_encoder
from slurm.plan import Resources, plan
from tests.downstream.labelled_folder import result, saved, shrink_models, write_set
from tests.downstream.test_weights import fresh, pretrained

PLAIN = "--num_workers 0 --device cpu --warmup_epochs 0 --epochs 1 --pictures 0 --batch_size 7 "


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """vit_tiny_patch4 is 24 wide and 3 deep, as what `pretrained` makes."""
    shrink_models(monkeypatch)


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(weights: dict[str, Any], name: str = "checkpoint.pth", **more: Any) -> Path:
        torch.save({"model": weights, **more}, tmp_path / name)
        return tmp_path / name

    return write


def values_of(path: Path, config_class: Any = FinetuneConfig, **given: Any) -> dict[str, Any]:
    return take(config_class, {"init_from": str(path), **given}).values


# --- what a checkpoint says ---


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", METHODS)
def test_model_method_and_size_of_every_layout(method: Method, save: Callable[..., Path]) -> None:
    """Ours says its size in its flags; without flags a square grid tells it, and any other leaves the flag's default."""
    square, oblong = pretrained(method, (20, 20)).state_dict(), pretrained(method, (20, 28)).state_dict()
    found = {"model": "vit_tiny_patch4", "method": method}
    assert values_of(save(oblong, config={"input_size": "20x28"})) == {**found, "input_size": "20x28"}
    assert values_of(save(square)) == {**found, "input_size": "20"}
    assert values_of(save(square, args=argparse.Namespace(input_size=20))) == {**found, "input_size": "20"}
    assert values_of(save(oblong)) == found
    assert values_of(save(square, config={"input_size": "28"})) == {**found, "input_size": "20"}, "shapes are the truth"


@pytest.mark.parametrize("module", [mae_evolved.model, beit_evolved.model, simmim_evolved.model])
def test_every_model_that_is_pre_trained_here_is_known(module: Any) -> None:
    """Real sizes, without memory for them: the name downstream is that of the same width, depth, heads and patch."""
    for name, build in module.MODELS.items():
        size = 4 * sizes_of_name(name)
        with torch.device("meta"):
            state = (
                build(vocabulary=8, input_size=(size, size)) if "beit" in name else build(input_size=(size, size))
            ).state_dict()
        weights = find_encoder(state, Path("c.pth"))
        names = [model for model in MODELS if weights.sizes.are_of(sizes_of(model))]
        assert names == [f"vit_{name.split('_')[-2 if 'beit' not in name else 1]}_patch{sizes_of_name(name)}"], name
        assert weights.image_size == (size, size)


def sizes_of_name(name: str) -> int:
    return int(name.split("patch")[1].split("_")[0])


@pytest.mark.usefixtures("small")
def test_windows_and_no_layer_scale(save: Callable[..., Path]) -> None:
    """A detector's encoder has tables of windows in all blocks but the last of each quarter: the whole grid is read off that."""
    detector = BackboneViT("beit", (24, 24), 4, 24, 3, 2, class_token=False, window=2, global_blocks=(2,))
    assert values_of(save(detector.state_dict()), method="beit")["input_size"] == "24"
    bare = fresh("simmim", (16, 16), layer_scale=0.0).state_dict()
    assert values_of(save(bare), method="simmim") == {"model": "vit_tiny_patch4", "input_size": "16", "layer_scale": 0.0}


@pytest.mark.parametrize(
    ("config_class", "size", "patch", "expected"),
    [
        (FinetuneConfig, (96, 96), 8, (96, 96)),
        (ProbeConfig, (224, 224), 16, (224, 224)),
        (SegmentConfig, (96, 128), 8, (96, 128)),
        (SegmentConfig, (224, 224), 16, None),
        (DetectConfig, (96, 96), 8, (96, 96)),
        (DetectConfig, (56, 72), 8, (64, 96)),
        (DetectConfig, (224, 224), 16, None),
    ],
)
def test_dense_tasks_keep_their_size_for_encoders_of_imagenet(
    config_class: Any, size: tuple[int, int], patch: int, expected: tuple[int, int] | None
) -> None:
    assert config_class.input_size_from(size, patch) == expected


# --- who wins ---


@pytest.mark.usefixtures("small")
def test_flags_and_files_win_over_the_checkpoint(save: Callable[..., Path], tmp_path: Path) -> None:
    path, recipe = save(pretrained("mae", (16, 16)).state_dict()), tmp_path / "recipe.toml"
    recipe.write_text('input_size = "24"\n')
    words = ["--init_from", str(path), "--data_path", "x"]
    config, line = parse_task(FinetuneConfig, "finetune", "", words, count=len)
    assert (config.model, config.method, config.image_size) == ("vit_tiny_patch4", "mae", (16, 16))
    assert line == (
        f"from checkpoint {path}: --model vit_tiny_patch4 --method mae --input_size 16 (patch 4, grid 4x4 of the images here)"
    )
    config, line = parse_task(FinetuneConfig, "finetune", "", [*words, "--config", str(recipe), "--method", "auto"], count=len)
    assert (config.method, config.image_size) == ("mae", (24, 24))
    assert line.endswith("--model vit_tiny_patch4 --method mae (patch 4, grid 6x6 of the images here)")
    given = ["--model", "vit_tiny_patch4", "--method", "mae", "--input_size", "32"]
    config, line = parse_task(FinetuneConfig, "finetune", "", [*words, *given], count=len)
    assert (config.image_size, line) == ((32, 32), ""), "nothing was taken, nothing is said"
    assert parse_task(FinetuneConfig, "finetune", "", words[2:], count=len)[0].model == "vit_small_patch16", (
        "random weights: the defaults"
    )


@pytest.mark.usefixtures("small")
def test_a_resumed_run_keeps_what_it_began_with(save: Callable[..., Path], tmp_path: Path) -> None:
    """Also with --init_from of another size, and where it began with a flag that is not given again."""
    path, images = save(pretrained("simmim", (16, 16)).state_dict()), write_set(tmp_path / "images")
    words = f"{PLAIN} --data_path {images} --output_dir {tmp_path}/out".split()
    finetune.main([*words, "--init_from", str(path), "--method", "simmim", "--input_size", "24"])
    began = saved(tmp_path / "out")["config"]
    for more in ([], ["--init_from", str(path)]):
        taken = take(FinetuneConfig, {"output_dir": f"{tmp_path}/out", **({"init_from": str(path)} if more else {})})
        assert taken == Taken(
            {key: began[key] for key in ("model", "method", "input_size")}, tmp_path / "out/checkpoint-last.pth"
        )
        finetune.main([*words, *more])
    assert began["input_size"] == "24"
    assert take(ProbeConfig, {"output_dir": f"{tmp_path}/out"}).values == {}, "a checkpoint of another task says nothing"


# --- what cannot work ---


@pytest.mark.usefixtures("small")
def test_what_contradicts_the_checkpoint_is_one_line_for_command_and_plan(save: Callable[..., Path], tmp_path: Path) -> None:
    path, images = save(pretrained("beit", (16, 16)).state_dict()), write_set(tmp_path / "images")
    (tmp_path / "text.pth").write_text("no checkpoint")
    odd = save(fresh("mae", (16, 16), depth=2).state_dict(), "odd.pth")
    holds = r"holds a BEiT encoder 24 wide, 3 deep, 2 heads, patch 4; the model vit_small_patch16 is 384 wide, 12 deep, 6 heads, "
    for flags, message in (
        (f"--init_from {path} --model vit_small_patch16", holds + r"patch 16 \(give --model vit_tiny_patch4, or leave it out"),
        (f"--init_from {path} --method mae", "holds a BEiT encoder, but the method asked for is MAE"),
        (f"--init_from {path} --input_size 18", "--input_size must be divisible by the patch size 4 of vit_tiny_patch4"),
        (
            f"--init_from {odd}",
            r"odd.pth: holds a MAE encoder 24 wide, 2 deep, patch 4, which no model here is: vit_tiny_patch4, ",
        ),
        (f"--init_from {tmp_path}/text.pth", "text.pth: is not a file of torch.save"),
        (f"--init_from {tmp_path}/none.pth", "--init_from .*none.pth: no such file"),
    ):
        words = f"--data_path {images} --output_dir {tmp_path}/out {flags}".split()
        for refuse in (
            lambda words=words: finetune.main([*PLAIN.split(), *words]),
            lambda words=words: plan("downstream.finetune", words, Resources(1, 1, 4, 4)),
        ):
            with pytest.raises(BadInput, match=message) as error:
                refuse()
            assert "\n" not in str(error.value)
            assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_plan_of_a_checkpoint_that_is_still_to_come(save: Callable[..., Path], tmp_path: Path) -> None:
    """Nothing is taken of it; and a run that was interrupted may be planned again, its method found in its own checkpoint."""
    images = write_set(tmp_path / "images")
    words = f"--data_path {images} --output_dir {tmp_path}/out --init_from {tmp_path}/checkpoint.pth "
    words += "--model vit_tiny_patch4 --input_size 16"
    plain = PLAIN.replace("--batch_size 7 ", "").split()
    assert plan("downstream.finetune", [*words.split(), *plain], Resources(1, 1, 7, 7), pending=True)
    with pytest.raises(BadInput, match=r"--init_from .*checkpoint\.pth: no such file"):
        plan("downstream.finetune", [*words.split(), *plain], Resources(1, 1, 7, 7))
    save(pretrained("mae", (16, 16)).state_dict())
    finetune.main([*PLAIN.split(), *words.split()])
    (tmp_path / "checkpoint.pth").unlink()
    assert plan("downstream.finetune", [*words.split(), *plain], Resources(1, 1, 7, 7), pending=True)


# --- the shortest commands ---


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("task", [finetune, linear_probe])
def test_the_shortest_command(task: Any, save: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data and checkpoint, and what makes it short here; the line comes before all others."""
    path, images = save(pretrained("beit", (16, 16)).state_dict(), config={"input_size": "16"}), write_set(tmp_path / "images")
    task.main(f"{PLAIN} --data_path {images} --init_from {path} --output_dir {tmp_path}/out".split())
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"from checkpoint {path}: --model vit_tiny_patch4 --method beit --input_size 16 (patch 4, grid 4x4 "
    )
    config = result(tmp_path / "out")["config"]
    assert (config["model"], config["method"], config["input_size"]) == ("vit_tiny_patch4", "beit", "16")


def test_sizes_in_words() -> None:
    assert str(Sizes(24, 3, 2, 4)) == "24 wide, 3 deep, 2 heads, patch 4"
    assert str(Sizes(24, 3, None, 4)) == "24 wide, 3 deep, patch 4"
