"""The graph of runs behind each table: what it holds, what it costs, and that nothing is submitted twice or half."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from beit_evolved.model import MODELS as BEIT
from common.masks import mae_ids
from common.training.errors import BadInput
from downstream.segmentation.upernet import UperNet
from downstream.vit import build_encoder
from mae_evolved.model import MODELS as MAE
from paper import cost, reproduce
from paper.graph import PlannedRun, Setting, graph
from paper.reproduce import main
from paper.tables import TABLES
from simmim_evolved.model import MODELS as SIMMIM
from slurm.plan import configuration
from tests.conftest import ROOT

DATA = {name: f"<{name}>" for name in ("imagenet", "ade20k", "coco")}


def setting(tmp_path: Path, scale: str = "full", seeds: tuple[int, ...] = (0,)) -> Setting:
    return Setting(tmp_path, scale, seeds, DATA, "<tokenizer>")  # type: ignore[arg-type]


def gmacs(run: object) -> float:
    """Multiply-adds of a call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        run()  # type: ignore[operator]
    return counter.get_total_flops() / 2e9


@pytest.mark.parametrize("table", TABLES)
def test_each_run_once_and_behind_what_it_needs(table: str, tmp_path: Path) -> None:
    runs = graph([table], setting(tmp_path))
    names = [run.name for run in runs]
    assert len(names) == len(set(names))
    for place, run in enumerate(runs):
        assert all(names.index(need) < place for need in run.needs)
    wanted = {(cell.encoder.name, cell.stage) for _, cell in TABLES[table].cells() if cell.encoder}
    stages = {(run.name.split("/")[0], run.name.split("/")[2]) for run in runs if not run.name.endswith("pretrain")}
    assert stages == wanted


def test_table_4_is_six_chains(tmp_path: Path) -> None:
    runs = graph(["4"], setting(tmp_path, seeds=(0, 3)))
    assert len(runs) == 2 * 6 * 3
    tuned = next(run for run in runs if run.name == "beit_small_200_evolved/seed3/finetune")
    assert tuned.needs == ("beit_small_200_evolved/seed3/pretrain",)
    words = shlex.join(tuned.flags)
    assert f"--init_from {tmp_path}/beit_small_200_evolved/seed3/pretrain/checkpoint-last.pth" in words
    assert "--seed 3" in words


def test_random_weights_need_nothing(tmp_path: Path) -> None:
    runs = [run for run in graph(["1"], setting(tmp_path)) if run.name.startswith("random_weights")]
    assert [run.script for run in runs] == ["finetune", "segment", "detect"]
    assert all(not run.needs and "--init_from" not in run.flags for run in runs)


@pytest.mark.parametrize("scale", ["full", "tiny"])
def test_every_command_is_one_that_its_module_takes(scale: str, tmp_path: Path) -> None:
    """Flags and recipe make a configuration; masks, epochs and models are those of the run's name."""
    runs = {run.name: run for run in graph(TABLES, setting(tmp_path, scale))}
    seen = set()
    for run in runs.values():
        kind = (run.module, run.recipe, run.name.split("/")[0].split("_")[-1])
        if kind in seen:
            continue
        seen.add(kind)
        words = run.command()
        flags = [*words[1:], "--data_path", str(tmp_path), "--output_dir", str(run.folder)]
        config, mask = configuration(words[0], flags)
        assert config.seed == 0
        if scale == "full" and run.name.endswith("pretrain"):
            assert f"_{config.epochs}_" in run.name
        if mask is not None and "_evolved/" in run.name:
            assert mask.mask == "evolved"
        if mask is not None and "_parts_30_to_5/" in run.name:
            assert (mask.parts_start, mask.parts_end) == (30, 5)


def test_only_part_of_a_table(tmp_path: Path) -> None:
    assert {run.name.split("/")[0] for run in graph(["4"], setting(tmp_path), "simmim")} == {
        "simmim_small_200_official",
        "simmim_small_200_evolved",
    }


# --- cost ---


def test_multiply_adds_equal_those_that_torch_counts() -> None:
    """All models on the meta device, to 0.1 %; UperNet with its convolutions to 1 %."""
    with torch.device("meta"):
        image, all_of_them = torch.empty(1, 3, 224, 224), torch.empty(1, 196, dtype=torch.int64)
        for size in ("small", "base"):
            mae = MAE[f"mae_vit_{size}_patch16"]()
            step = gmacs(lambda mae=mae: mae.decode(mae.encode(image, all_of_them[:, :49]), all_of_them))
            assert 3 * step == pytest.approx(cost.pretraining_macs("mae", size, False) / 1e9, rel=1e-3)
            beit, nothing = BEIT[f"beit_{size}_patch16_224_8k_vocab"](), torch.zeros(1, 196, dtype=torch.bool)
            encoder = gmacs(lambda beit=beit, nothing=nothing: beit.encode(image, nothing))
            assert encoder == pytest.approx(cost.encoder_macs(size) / 1e9, rel=1e-3)
            simmim = SIMMIM[f"simmim_vit_{size}_patch16"]()
            step = gmacs(lambda simmim=simmim, nothing=nothing: simmim.reconstruct(image, nothing))
            assert 3 * step == pytest.approx(cost.pretraining_macs("simmim", size, False) / 1e9, rel=1e-3)
            model = UperNet(build_encoder(f"vit_{size}_patch16", "mae", (512, 512)), 150)
            crops = torch.empty(2, 3, 512, 512)
            assert gmacs(lambda model=model, crops=crops: model(crops)) / 2 == pytest.approx(cost.UPERNET_GMACS[size], rel=1e-2)
    mask = torch.zeros(1, 196, dtype=torch.bool)
    mask[:, :147] = True
    assert mae_ids(mask)[0].shape == (1, 49)


def test_multiply_adds_of_the_detector_equal_those_that_torch_counts() -> None:
    """The encoder in windows; what follows it was counted once by hand."""
    with torch.device("meta"):
        encoder = build_encoder(
            "vit_small_patch16", "mae", (1024, 1024), class_token=False, window=14, global_blocks=(2, 5, 8, 11)
        )
        counted = gmacs(lambda: encoder(torch.empty(1, 3, 1024, 1024), [-1]))
    assert cost.detection_macs("small") / 3e9 - cost.MASK_RCNN_HEADS_GMACS == pytest.approx(counted, rel=1e-6)


def test_hours_of_the_published_run_come_out_of_its_own_utilisation() -> None:
    """7 h 11 min on 32 V100: the arithmetic turned round."""
    tuning = cost.TrainingCost(cost.finetuning_macs("base"), cost.IMAGENET * 100)
    assert tuning.gpu_hours(cost.PUBLISHED_UTILISATION * cost.V100_PEAK) == pytest.approx(32 * (7 + 11 / 60))


# --- command line ---


def test_dry_run_lists_commands_hours_and_sum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table", "4", "--dry_run", "--output_dir", f"{tmp_path}/out"])
    shown = capsys.readouterr().out
    hours = [int(number) for number in re.findall(r"^# .*: (\d+) GPU-hours", shown, flags=re.M)]
    assert len(hours) == 18
    total = int(re.search(r"18 runs, 18 to do, about (\d+) GPU-hours", shown)[1])  # type: ignore[index]
    assert total == pytest.approx(sum(hours), abs=9)
    assert "arithmetic, not timings" in shown
    assert not (tmp_path / "out").exists(), "a dry run writes nothing"
    commands = [line for line in shown.splitlines() if line and not line.startswith(("#", "18 runs", "Hours"))]
    for command in commands:
        script = next(word for word in shlex.split(command) if word.startswith("slurm/"))
        assert os.access(ROOT / script, os.X_OK)


def test_finished_runs_are_not_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = graph(["3"], setting(tmp_path))[0]
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_text("{}")
    main(["--table", "3", "--dry_run", "--output_dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert f"# {run.name}: finished" in shown
    assert "16 runs, 15 to do" in shown
    main(["--table", "3", "--status", "--output_dir", str(tmp_path)])
    assert "1 finished, 15 not submitted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--table 4 --submit", "--ade20k is needed: a folder with images/ and annotations/"),
        ("--table 4 --submit --ade20k nowhere --imagenet {}", "--ade20k nowhere: no such folder"),
        ("--table 4 --local --ade20k {} --imagenet {}", "--tokenizer is needed for BEiT"),
        ("--table 4 --local --ade20k {} --imagenet {} --tokenizer none.pkl", "--tokenizer none.pkl: no such file or folder"),
        ("--table 6 --dry_run", "argument --table: invalid choice: '6'"),
        ("--table 4", "one of the arguments --dry_run --submit --local --status --collect is required"),
        ("--table 4 --dry_run --seeds a", "--seeds must be numbers such as 0,1,2, got 'a'"),
        ("--table 4 --dry_run --tflops 0", "--tflops must be above 0"),
        ("--table 4 --dry_run --only nothing", "--only nothing: no encoder of table 4 has this in its name"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(flags: str, line: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        main([*flags.replace("{}", str(tmp_path)).split(), "--output_dir", f"{tmp_path}/out"])
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("nodes", "gpus", "batch", "found"),
    [
        ("4", "8", 4096, (4, 8)),
        ("4", "8", 16, (2, 8)),  # 16 of the 32 GPUs, on as few nodes as hold them
        ("3", "8", 1024, (2, 8)),
        ("1", "6", 16, (1, 4)),
        ("", "", 64, (1, 8)),
        ("5", "0", 16, (4, 2)),
    ],
)
def test_a_run_gets_as_many_gpus_as_can_share_its_batch(
    nodes: str, gpus: str, batch: int, found: tuple[int, int], tmp_path: Path
) -> None:
    run = replace(graph(["3"], setting(tmp_path))[0], effective_batch=batch)
    site = {"NODES": nodes, "GPUS_PER_NODE": gpus, "TASKS_PER_NODE": "2", "BATCH_PER_GPU": ""}
    assert reproduce.share(run, site) == found


def test_refused_run_cancels_what_was_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch takes two jobs and refuses the third: the two are cancelled, and no job is on record."""
    bin = tmp_path / "bin"
    bin.mkdir()
    script = "#!/bin/sh\nn=$(cat {0}/n 2>/dev/null || echo 0); n=$((n+1)); echo $n >{0}/n\n[ $n -lt 3 ] && echo $n && exit 0\n"
    (bin / "sbatch").write_text(script.format(tmp_path) + 'echo "sbatch: error: no more" >&2; exit 1\n')
    (bin / "scancel").write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/cancelled\n')
    for file in bin.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("SITE_ENV", os.devnull)
    monkeypatch.setattr(reproduce, "check", lambda run, site: None)
    runs: list[PlannedRun] = graph(["3"], setting(tmp_path / "out"))
    with pytest.raises(BadInput, match=r"not submitted: no more; nothing is submitted"):
        reproduce.submit(runs, setting(tmp_path / "out"))
    assert (tmp_path / "cancelled").read_text() == "1 2\n"
    assert not (tmp_path / "out" / "jobs.json").exists()
