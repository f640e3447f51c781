"""The paper's numbers as they stand in the paper, and beside them only what finished runs wrote."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from common.mask_config import MaskConfig
from common.training.errors import BadInput
from paper.experiments import MASKS, PretrainedEncoder
from paper.tables import TABLES, as_csv, as_markdown, lines_of, main, read_metric, results_of

OURS = PretrainedEncoder("mae", "small", 200, "evolved")


def write(root: Path, encoder: PretrainedEncoder, seed: int, stage: str, **metrics: float) -> Path:
    """A finished run."""
    file = root / encoder.name / f"seed{seed}" / stage / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"task": stage, "metrics": metrics, "best": {"top1": 99.0}}))
    return file


def paper_of(table: str, row: str) -> list[float | None]:
    return [cell.paper for one, cell in TABLES[table].cells() if one.label == row]


def test_numbers_of_the_paper() -> None:
    """Typed from the paper a second time: a row and a sum of each column of its tables."""
    assert paper_of("1", "random weights") == [71.53, 21.17, 19.31]
    assert paper_of("1", "800 epochs, ours") == [80.67, 41.97, 39.02]
    assert paper_of("2", "dynamic, gamma 2") == [79.89, 40.42]
    assert paper_of("3", "K 40 -> 5") == [79.80]
    assert paper_of("4", "BEiT + ours") == [79.61, 94.74, 39.63, 79.84, None]
    assert paper_of("5", "ours (MAE), 300") == [64.7, 84.1]
    assert paper_of("appendix", "grid -> block") == [79.18, 38.30]
    sums = {
        name: sum(cell.paper for _, cell in TABLES[name].cells() if cell.paper is not None and cell.column == column)
        for name, column in (("1", "top-1"), ("2", "mIoU"), ("3", "top-1"), ("4", "top-5"), ("5", "fine-tuning"))
    }
    assert sums["1"] == pytest.approx(71.53 + 312.58 + 316.27 + 318.18 + 319.47)
    assert sums["2"] == pytest.approx(36.67 + 38.13 + 35.82 + 38.75 + 39.61 + 39.94 + 40.42 + 39.06)
    assert sums["3"] == pytest.approx(315.53 + 318.84)
    assert sums["4"] == pytest.approx(94.61 + 94.78 + 94.57 + 94.74 + 94.18 + 94.55)
    assert sums["5"] == pytest.approx(77.9 + 81.8 + 82.8 + 83.2 + 82.9 + 83.6 + 83.6 + 83.8 + 83.1 + 83.3 + 83.6 + 84.1)


def test_the_row_of_the_method_is_one_run_in_all_tables() -> None:
    holding = [name for name, table in TABLES.items() if any(cell.encoder == OURS for _, cell in table.cells())]
    assert holding == ["1", "2", "3", "4", "appendix"]


def test_every_mask_is_flags_that_the_trainers_take() -> None:
    for name, words in MASKS.items():
        pairs = dict(zip(words[::2], words[1::2], strict=True))
        values = {key.removeprefix("--"): value for key, value in pairs.items()}
        typed = {
            key: value if key == "mask" else float(value) if key in ("alpha", "gamma") else int(value)
            for key, value in values.items()
        }
        mask = MaskConfig.from_recipe("paper", **typed)
        assert {key: getattr(mask, key) for key in typed} == typed, name


def test_unknown_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown mask 'evolve'"):
        PretrainedEncoder("mae", "small", 200, "evolve")


def test_without_runs_all_of_ours_is_blank(tmp_path: Path) -> None:
    for table in TABLES.values():
        lines = lines_of(table, tmp_path)
        assert all(line["ours"] == line["difference"] == line["seeds"] == line["runs"] == "" for line in lines)
        assert any(line["paper"] for line in lines)


def test_mean_difference_and_spread_over_seeds(tmp_path: Path) -> None:
    """80.10 and 79.50: mean 79.80, sample deviation 0.4243, difference to 79.89 -0.09; other places stay blank."""
    files = [write(tmp_path, OURS, seed, "finetune", top1=value, top5=95.0) for seed, value in ((0, 80.1), (10, 79.5))]
    line = next(one for one in lines_of(TABLES["4"], tmp_path) if (one["row"], one["column"]) == ("MAE + ours", "top-1"))
    assert (line["paper"], line["ours"], line["difference"], line["spread"]) == ("79.89", "79.80", "-0.09", "0.42")
    assert line["seeds"] == "0 10"
    assert line["runs"] == " ".join(str(file.parent) for file in files)
    filled = [one for one in lines_of(TABLES["4"], tmp_path) if one["ours"]]
    assert [(one["row"], one["column"]) for one in filled] == [("MAE + ours", "top-1"), ("MAE + ours", "top-5")]


def test_the_last_epoch_counts_and_not_the_best(tmp_path: Path) -> None:
    assert read_metric(write(tmp_path, OURS, 0, "finetune", top1=12.5), "top1") == 12.5


def test_a_number_without_one_of_the_paper_has_no_difference(tmp_path: Path) -> None:
    write(tmp_path, OURS, 0, "segment", mIoU=40.0, aAcc=80.0, mAcc=50.0)
    line = next(one for one in lines_of(TABLES["4"], tmp_path) if (one["row"], one["column"]) == ("MAE + ours", "mAcc"))
    assert (line["paper"], line["ours"], line["difference"]) == ("", "50.00", "")


def test_csv_and_markdown_say_the_same(tmp_path: Path) -> None:
    write(tmp_path, OURS, 0, "finetune", top1=80.0, top5=95.0)
    lines = lines_of(TABLES["4"], tmp_path)
    assert list(csv.DictReader(io.StringIO(as_csv(lines)))) == lines
    text = as_markdown(TABLES["4"], lines, "A claim.")
    row = next(one for one in text.splitlines() if one.startswith("| MAE + ours |"))
    assert [word.strip() for word in row.strip("|").split("|")][1:7] == ["79.89", "80.00", "+0.11", "94.78", "95.00", "+0.22"]
    assert "A claim." in text
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "a ragged table"


def test_broken_result_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, OURS, 0, "finetune", top5=95.0)
    with pytest.raises(BadInput, match=f"^{file}: no metric top1 in it"):
        main(["--table", "4", "--results", str(tmp_path)])
    assert not list(tmp_path.glob("table_4*"))


def test_other_methods_have_no_place_for_runs(tmp_path: Path) -> None:
    cell = next(cell for row, cell in TABLES["5"].cells() if row.label == "DINO, 1600")
    assert results_of(tmp_path, cell).values == {}


def test_all_tables_in_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table", "all", "--results", str(tmp_path), "--output", str(tmp_path / "deep" / "all")])
    text = (tmp_path / "deep" / "all.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("# ")] == [
        f"# Table {name}: {table.title}" if name != "appendix" else f"# Appendix: {table.title}" for name, table in TABLES.items()
    ]
    assert text in capsys.readouterr().out
