"""What is worked out and refused before anything is submitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from common.training.errors import BadInput
from slurm.plan import Resources, configuration, count_files, main, plan
from tests.conftest import TINY, write_images

MAE = "mae_evolved.main_pretrain"


@pytest.mark.parametrize(
    ("nodes", "ranks", "effective", "most", "split"),
    [
        (1, 8, 4096, 512, (512, 1)),
        (1, 8, 4096, 511, (256, 2)),
        (1, 1, 4096, 64, (64, 64)),
        (4, 8, 4096, 512, (128, 1)),
        (3, 4, 96, 5, (4, 2)),
        (2, 8, 2048, 100, (64, 2)),
        (1, 1, 7, 3, (1, 7)),
    ],
)
def test_effective_batch_is_kept(nodes: int, ranks: int, effective: int, most: int, split: tuple[int, int]) -> None:
    found = Resources(nodes, ranks, effective, most).split()
    assert found == split
    assert found[0] * found[1] * nodes * ranks == effective


def test_every_number_of_ranks_keeps_the_batch_or_is_refused() -> None:
    for ranks in range(1, 200):
        resources = Resources(1, ranks, 96, 7)
        if 96 % ranks:
            with pytest.raises(BadInput, match="cannot share an effective batch of 96"):
                resources.split()
        else:
            batch_size, accum_iter = resources.split()
            assert batch_size * accum_iter * ranks == 96
            assert not [more for more in range(batch_size + 1, 8) if (96 // ranks) % more == 0]


@pytest.mark.parametrize(
    ("nodes", "ranks", "near"), [(3, 8, "16 or 32 ranks can"), (5, 1, "4 or 8 ranks can"), (1000, 8, "4096 ranks can")]
)
def test_ranks_that_do_not_fit_are_told_which_do(nodes: int, ranks: int, near: str) -> None:
    with pytest.raises(BadInput, match=rf"{nodes} nodes x {ranks} GPUs .* = {nodes * ranks} ranks .* 4096 equally; {near}"):
        Resources(nodes, ranks, 4096, 512).split()


def test_resources_below_one_are_refused() -> None:
    with pytest.raises(BadInput, match="ranks per node must be 1 or more, got 0"):
        Resources(1, 0, 8, 4)


def test_plan_adds_what_was_worked_out_and_nothing_else(image_folder: Path, tmp_path: Path) -> None:
    flags = [*TINY.replace("--batch_size 4 ", "").split(), "--data_path", str(image_folder), "--output_dir", str(tmp_path)]
    words = plan(MAE, flags, Resources(2, 1, 16, 4))
    assert words == [*flags, "--batch_size", "4", "--accum_iter", "2"]


def test_plan_as_the_batch_scripts_read_it(image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        f"--nodes 2 --ranks_per_node 2 --effective_batch 16 --batch_per_rank 8 --data_path {image_folder} "
        f"--output_dir {tmp_path} --dist_timeout 3 {MAE} "
        "--model mae_vit_tiny_patch4 --input_size 16 --parts_start 8 --parts_end 3".split()
    )
    assert capsys.readouterr().out.splitlines() == [
        "slurm.plan:",
        "2 nodes x 2 ranks, batch 4 x 1 accumulation steps a rank = 16 images an update",
        *("-m", MAE, "--data_path", str(image_folder), "--output_dir", str(tmp_path), "--dist_timeout", "3"),
        *("--model", "mae_vit_tiny_patch4", "--input_size", "16", "--parts_start", "8", "--parts_end", "3"),
        *("--batch_size", "4", "--accum_iter", "1"),
    ]


def test_numbers_are_numbers(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="argument --nodes: invalid int value: 'two'"):
        main(f"--nodes two --effective_batch 16 --batch_per_rank 8 --output_dir {tmp_path} {MAE}".split())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch_size 4", "--batch_size is worked out"),
        ("--accum_iter=2", "--accum_iter is worked out"),
        ("--epochz 3", "unrecognized arguments: --epochz 3"),
        ("--data_path {tmp}/nowhere", "--data_path {tmp}/nowhere: no such folder"),
        ("--data_path {tmp}/empty", "no images in"),
        ("--init_from {tmp}/none.pth", "--init_from {tmp}/none.pth: no such file"),
        ("--output_dir {tmp}/file/inside", "--output_dir {tmp}/file/inside: {tmp}/file is not a folder"),
        ("--resume {tmp}/none.pth", "checkpoint {tmp}/none.pth: no such file"),
        ("--resume {tmp}/file", "checkpoint {tmp}/file: "),
        ("--config {tmp}/none.toml", "--config {tmp}/none.toml: "),
        ("--mask_ratio 2", "--mask_ratio must be inside"),
        ("--input_size 64", "image 64, patch grid 4x4"),  # 40 parts of 16 patches
        ("--mask block-official", "--mask block-official may mask fewer patches in some images"),
        ("--layers 0,99", "--layers [99] do not exist: the encoder has 12 blocks (--model mae_vit_small_patch16)"),
        ("--layers 0,99 --alpha 0", "--layers [99] do not exist: the encoder has 12 blocks"),  # all passes are spared
    ],
)
def test_refused(image_folder: Path, tmp_path: Path, flags: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("no checkpoint")
    given = f"--data_path {image_folder} --output_dir {tmp_path}/out {flags.format(tmp=tmp_path)}".split()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput) as error:
        plan(MAE, given, Resources(1, 1, 4, 4))
    assert message.format(tmp=tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "effective", "message"),
    [
        ("", 17, "an effective batch of 17 images an update, but an epoch has 16 (16 images x --repeat 1)"),
        ("--repeat 2", 33, "an effective batch of 33 images an update, but an epoch has 32 (16 images x --repeat 2)"),
        ("--dataset photos --data_path=", 16, "an epoch has 14 (14 images x --repeat 1)"),
    ],
)
def test_batch_larger_than_an_epoch_is_refused(
    image_folder: Path, tmp_path: Path, flags: str, effective: int, message: str
) -> None:
    words = f"--data_path {image_folder} --output_dir {tmp_path}/out {flags}".split()
    with pytest.raises(BadInput) as error:
        plan(MAE, words, Resources(1, 1, effective, 4))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert plan(MAE, words, Resources(1, 1, effective - 2, 4))


def test_batch_larger_than_the_labelled_subset_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("bird", "cat"):
            write_images(tmp_path / "images" / split / name, 4)
    flags = f"--data_path {tmp_path}/images --output_dir {tmp_path}/out --method mae --model vit_tiny_patch8 --input_size 32"
    words = [*flags.split(), "--subset", "5"]
    with pytest.raises(BadInput, match="an epoch has 5 "):
        plan("downstream.finetune", words, Resources(1, 1, 8, 4))
    assert plan("downstream.finetune", words, Resources(1, 1, 4, 4))
    assert plan("downstream.finetune", words[:-2], Resources(1, 1, 8, 4))


def test_batch_larger_than_the_segmentation_set_is_refused(tmp_path: Path) -> None:
    write_segmentation(tmp_path / "ade", 3)
    flags = f"--data_path {tmp_path}/ade --output_dir {tmp_path}/out --method mae --model vit_tiny_patch8 --input_size 32"
    with pytest.raises(BadInput, match="an effective batch of 4 images an update, but an epoch has 3 "):
        plan("downstream.segment", flags.split(), Resources(1, 1, 4, 4))
    assert plan("downstream.segment", flags.split(), Resources(1, 1, 3, 4))


def write_segmentation(root: Path, count: int) -> None:
    """ADE20K's layout: `count` images of training, one of validation, all of class 1."""
    for split, images in (("training", count), ("validation", 1)):
        write_images(root / "images" / split, images, size=(40, 40))
        (root / "annotations" / split).mkdir(parents=True)
        for image in (root / "images" / split).iterdir():
            Image.new("L", (40, 40), 1).save(root / "annotations" / split / f"{image.stem}.png")


def test_images_are_counted_only_as_far_as_needed(image_folder: Path) -> None:
    """ImageNet takes minutes to list: the second class is not looked at where the first will do."""
    assert count_files(image_folder, 8) == 8
    assert count_files(image_folder, 9) == count_files(image_folder, 1000) == 16


def test_missing_tokenizer_is_refused(image_folder: Path, tmp_path: Path) -> None:
    flags = f"--tokenizer {tmp_path}/encoder.pkl --data_path {image_folder} --output_dir {tmp_path}/out"
    with pytest.raises(BadInput, match=r"--tokenizer .*encoder\.pkl: no such file"):
        plan("beit_evolved.run_beit_pretraining", flags.split(), Resources(1, 1, 4, 4))


@pytest.mark.parametrize("module", ["nowhere.trainer", "mae_evolved.nothing", "common.masks"])
def test_module_that_is_no_trainer_is_refused(module: str) -> None:
    with pytest.raises(BadInput, match=module):
        configuration(module, [])


def test_flat_folder_of_images_is_data(tmp_path: Path) -> None:
    write_images(tmp_path / "flat", 2)
    flags = f"--data_path {tmp_path}/flat --output_dir {tmp_path}/out".split()
    assert plan(MAE, flags, Resources(1, 1, 2, 2))[-4:] == ["--batch_size", "2", "--accum_iter", "1"]


def test_checkpoint_of_other_settings_is_refused(train: object, image_folder: Path, tmp_path: Path) -> None:
    output = train("run", "--epochs 1")  # type: ignore[operator]
    flags = TINY.replace("--batch_size 4 ", "").replace("--epochs 4", "--epochs 1").split()
    flags += ["--data_path", str(image_folder), "--output_dir", str(output)]
    assert plan(MAE, flags, Resources(2, 1, 4, 4))[-4:] == ["--batch_size", "2", "--accum_iter", "1"]
    with pytest.raises(BadInput, match=r"made with other settings: --gamma 2.0 -> 3.0"):
        plan(MAE, [*flags, "--gamma", "3"], Resources(2, 1, 4, 4))
    with pytest.raises(BadInput, match=r"made with other settings: effective_batch 4 -> 8"):
        plan(MAE, flags, Resources(2, 1, 8, 4))
    state = torch.load(output / "checkpoint-last.pth", weights_only=True)
    torch.save({"model": state["model"]}, output / "checkpoint-last.pth")
    with pytest.raises(BadInput, match="has no training state"):
        plan(MAE, flags, Resources(2, 1, 4, 4))
