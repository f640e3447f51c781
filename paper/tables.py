"""The paper's Tables 1-5 and the appendix' baseline as data, and beside them what runs of this project gave.

    python -m paper.tables --table 4 --results ROOT [--output FILE_WITHOUT_SUFFIX]

Every number of the paper here stands in the table of that number (docs/sources.md); a number of this project comes from the
result.json of a finished run, or the place is left blank.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.training.errors import BadInput, Parser, run_cli
from common.training.runlog import RESULT, write_text
from paper.experiments import PretrainedEncoder, Stage

PROGRAM = "tables"
DECIMALS = 2


@dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
        column: heading.
        paper: the paper's number, None where it has none.
        encoder: whose results these are, None where nothing of this project belongs (other methods).
        stage, metric: which run, and which of its metrics (in percent).
    """

    column: str
    paper: float | None
    encoder: PretrainedEncoder | None = None
    stage: Stage = "finetune"
    metric: str = "top1"


@dataclass(frozen=True)
class TableRow:
    """A line of a table."""

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper."""

    name: str
    title: str
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()

    def cells(self) -> Iterator[tuple[TableRow, Cell]]:
        """All cells with their rows."""
        for row in self.rows:
            for cell in row.cells:
                yield row, cell


def _table1() -> Table:
    columns = ("grid", "random", "block", "ours")
    masks = {"grid": "grid", "random": "random", "block": "block", "ours": "evolved"}
    tasks: tuple[tuple[str, Stage, str], ...] = (
        ("top-1", "finetune", "top1"),
        ("mIoU", "segment", "mIoU"),
        ("AP-box", "detect", "AP_box"),
    )
    numbers = {
        100: ((78.28, 78.11, 77.85, 78.34), (36.65, 37.60, 36.02, 37.85), (36.11, 32.70, 31.78, 34.94)),
        200: ((78.63, 79.20, 78.55, 79.89), (36.67, 38.81, 36.65, 40.42), (36.21, 34.42, 33.15, 36.23)),
        400: ((79.11, 79.42, 79.29, 80.36), (36.78, 39.43, 40.67, 41.22), (35.19, 35.21, 35.08, 37.17)),
        800: ((79.34, 79.77, 79.69, 80.67), (36.54, 39.31, 41.81, 41.97), (34.62, 38.73, 38.91, 39.02)),
    }
    random = PretrainedEncoder("none")
    random_row = TableRow(
        "random weights",
        tuple(
            Cell(f"{title}", value, random, stage, metric)
            for (title, stage, metric), value in zip(tasks, (71.53, 21.17, 19.31), strict=True)
        ),
    )
    rows = [
        TableRow(
            f"{epochs} epochs, {column}",
            tuple(
                Cell(title, numbers[epochs][task][place], PretrainedEncoder("mae", "small", epochs, masks[column]), stage, metric)
                for task, (title, stage, metric) in enumerate(tasks)
            ),
        )
        for epochs in numbers
        for place, column in enumerate(columns)
    ]
    return Table("1", "MAE ViT-S with static masks and with evolved ones", (random_row, *rows))


def _table2() -> Table:
    lines = (
        ("alpha 0 (grid)", "grid", 78.63, 36.67),
        ("alpha 0.5", "alpha_0.5", 79.02, 38.13),
        ("alpha 1", "alpha_1", 75.71, 35.82),
        ("dynamic, gamma 0.2", "gamma_0.2", 78.13, 38.75),
        ("dynamic, gamma 0.5", "gamma_0.5", 79.30, 39.61),
        ("dynamic, gamma 1", "gamma_1", 79.42, 39.94),
        ("dynamic, gamma 2", "evolved", 79.89, 40.42),
        ("dynamic, gamma 5", "gamma_5", 79.51, 39.06),
    )
    rows = (
        TableRow(label, _top1_and_miou(PretrainedEncoder("mae", "small", 200, mask), top1, miou))
        for label, mask, top1, miou in lines
    )
    return Table("2", "Weight of the parts: fixed alpha, and alpha = (t/T)^gamma; MAE ViT-S, 200 epochs", tuple(rows))


def _table3() -> Table:
    lines = (
        ("K 5", "parts_5", 78.22),
        ("K 10", "parts_10", 78.94),
        ("K 30", "parts_30", 79.25),
        ("K 40", "parts_40", 79.12),
        ("K 30 -> 5", "parts_30_to_5", 79.43),
        ("K 40 -> 5", "parts_40_to_5", 79.80),
        ("K 30 -> 10", "parts_30_to_10", 79.72),
        ("K 40 -> 10", "evolved", 79.89),
    )
    rows = (TableRow(label, (Cell("top-1", top1, PretrainedEncoder("mae", "small", 200, mask)),)) for label, mask, top1 in lines)
    return Table("3", "Number of parts; MAE ViT-S, 200 epochs", tuple(rows))


def _table4() -> Table:
    lines = (
        ("MAE", PretrainedEncoder("mae", "small", 200, "random"), (79.20, 94.61, 38.81, 79.61)),
        ("MAE + ours", PretrainedEncoder("mae", "small", 200, "evolved"), (79.89, 94.78, 40.42, 79.95)),
        ("BEiT", PretrainedEncoder("beit", "small", 200, "official"), (79.05, 94.57, 38.39, 79.31)),
        ("BEiT + ours", PretrainedEncoder("beit", "small", 200, "evolved"), (79.61, 94.74, 39.63, 79.84)),
        ("SimMIM", PretrainedEncoder("simmim", "small", 200, "official"), (78.51, 94.18, 38.13, 79.15)),
        ("SimMIM + ours", PretrainedEncoder("simmim", "small", 200, "evolved"), (79.08, 94.55, 39.57, 79.80)),
    )
    rows = (
        TableRow(
            label,
            (
                Cell("top-1", top1, encoder),
                Cell("top-5", top5, encoder, "finetune", "top5"),
                Cell("mIoU", miou, encoder, "segment", "mIoU"),
                Cell("aAcc", accuracy, encoder, "segment", "aAcc"),
                Cell("mAcc", None, encoder, "segment", "mAcc"),
            ),
        )
        for label, encoder, (top1, top5, miou, accuracy) in lines
    )
    note = (
        "The paper calls its last column mAcc. Near 80 beside an mIoU of 40 it is read here as the accuracy over all pixels "
        "(aAcc) and compared with that; mAcc, the mean over classes, is given without a number of the paper."
    )
    return Table("4", "Three methods with their own masks and with evolved ones; ViT-S, 200 epochs", tuple(rows), (note,))


def _table5() -> Table:
    quoted = (
        ("ViT, 300 epochs of supervised training", None, 77.9),
        ("DeiT, 300, supervised", None, 81.8),
        ("DINO, 1600", 74.6, 82.8),
        ("MoCo v3, 300", 76.5, 83.2),
        ("MST, 100", 75.0, None),
        ("AttnMask, 100", 76.1, None),
        ("CAE, 300", 64.1, 83.6),
        ("MFM, 300", None, 83.1),
        ("SemMAE, 800", 68.7, 83.3),
    )
    ours = (
        ("BEiT, 300", PretrainedEncoder("beit", "base", 300, "official"), 56.7, 82.9),
        ("MAE, 300", PretrainedEncoder("mae", "base", 300, "random"), 64.4, 83.6),
        ("SimMIM, 800", PretrainedEncoder("simmim", "base", 800, "official"), 56.7, 83.8),
        ("ours (MAE), 200", PretrainedEncoder("mae", "base", 200, "evolved"), 59.6, 83.6),
        ("ours (MAE), 300", PretrainedEncoder("mae", "base", 300, "evolved"), 64.7, 84.1),
    )
    rows = [TableRow(label, (Cell("linear probe", probe), Cell("fine-tuning", tuned))) for label, probe, tuned in quoted]
    rows += [
        TableRow(label, (Cell("linear probe", probe, encoder, "linear_probe"), Cell("fine-tuning", tuned, encoder)))
        for label, encoder, probe, tuned in ours
    ]
    notes = (
        "Rows without a place for a run are methods that this project does not hold; their numbers are as the paper quotes them.",
    )
    return Table("5", "ViT-B on ImageNet-1K", tuple(rows), notes)


def _appendix() -> Table:
    lines = (("grid -> block", "grid_to_block", 79.18, 38.30), ("ours", "evolved", 79.89, 40.42))
    rows = (
        TableRow(label, _top1_and_miou(PretrainedEncoder("mae", "small", 200, mask), top1, miou))
        for label, mask, top1, miou in lines
    )
    return Table("appendix", "Grid masks that turn into blocks; MAE ViT-S, 200 epochs", tuple(rows))


def _top1_and_miou(encoder: PretrainedEncoder, top1: float, miou: float) -> tuple[Cell, Cell]:
    return Cell("top-1", top1, encoder), Cell("mIoU", miou, encoder, "segment", "mIoU")


TABLES: dict[str, Table] = {table.name: table for table in (_table1(), _table2(), _table3(), _table4(), _table5(), _appendix())}


# --- results of runs ---


@dataclass(frozen=True)
class SeedResults:
    """What finished runs gave for a cell.

    Attributes:
        values: by seed, ascending.
        paths: of the result files, in that order.
    """

    values: dict[int, float]
    paths: tuple[Path, ...]

    @property
    def mean(self) -> float | None:
        """Over seeds, None without any."""
        return statistics.fmean(self.values.values()) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of the sample, None below two seeds."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None


def folder_of(root: Path, encoder: PretrainedEncoder, seed: int, stage: str) -> Path:
    """Where a run writes: root/<encoder>/seed<n>/<stage>."""
    return root / encoder.name / f"seed{seed}" / stage


def results_of(root: Path, cell: Cell) -> SeedResults:
    """Results of all seeds that are finished.

    Raises:
        BadInput: a result file that cannot be read or lacks the metric.
    """
    if cell.encoder is None:
        return SeedResults({}, ())
    files = sorted((root / cell.encoder.name).glob(f"seed*/{cell.stage}/{RESULT}"), key=_seed_of)
    return SeedResults({_seed_of(file): read_metric(file, cell.metric) for file in files}, tuple(files))


def _seed_of(file: Path) -> int:
    return int(file.parents[1].name.removeprefix("seed"))


def read_metric(file: Path, metric: str) -> float:
    """A number of a finished run: that of its last epoch, not of its best."""
    try:
        return float(json.loads(file.read_text())["metrics"][metric])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file}: no metric {metric} in it ({type(error).__name__}: {error})") from None


# --- the tables as text ---

HEADINGS = ("table", "row", "column", "paper", "ours", "difference", "spread", "seeds", "runs")


def lines_of(table: Table, root: Path) -> list[dict[str, str]]:
    """A line for each cell, the keys HEADINGS; blank where there is no number."""
    lines = []
    for row, cell in table.cells():
        results = results_of(root, cell)
        mean = None if results.mean is None else round(results.mean, DECIMALS)  # differences are of the numbers as they are shown
        difference = None if mean is None or cell.paper is None else mean - cell.paper
        texts = (
            table.name, row.label, cell.column,
            _text(cell.paper), _text(mean), _text(difference, sign=True), _text(results.spread),
            " ".join(map(str, results.values)), " ".join(str(path.parent) for path in results.paths),
        )  # fmt: skip
        lines.append(dict(zip(HEADINGS, texts, strict=True)))
    return lines


def _text(value: float | None, sign: bool = False) -> str:
    return "" if value is None else f"{value:{'+' if sign else ''}.{DECIMALS}f}"


def as_csv(lines: Sequence[dict[str, str]]) -> str:
    """One line a cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, HEADINGS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def as_markdown(table: Table, lines: Sequence[dict[str, str]], claim: str = "") -> str:
    """The table side by side: in each column the paper's number, ours with its spread, and the difference.

    Args:
        claim: a sentence about what the runs were, put above the table.
    """
    columns = list(dict.fromkeys(cell.column for _, cell in table.cells()))
    head = "| |" + "".join(f" {column}: paper | ours | diff. |" for column in columns) + " seeds |"
    rule = "|---|" + "---:|---:|---:|" * len(columns) + "---|"
    by_place = {(line["row"], line["column"]): line for line in lines}
    body = [_markdown_row(row, columns, by_place) for row in table.rows]
    runs = list(dict.fromkeys(f"* {line['row']}: {folder}" for line in lines for folder in line["runs"].split()))
    parts = [f"# Table {table.name}: {table.title}" if table.name != "appendix" else f"# Appendix: {table.title}", claim]
    parts += ["\n".join([head, rule, *body]), *table.notes]
    parts += [
        "Blank: no finished run. Numbers of runs are those after the last epoch, in percent.",
        "Runs:\n\n" + "\n".join(runs) if runs else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_row(row: TableRow, columns: list[str], lines: dict[tuple[str, str], dict[str, str]]) -> str:
    texts, seeds = [], list[str]()
    for column in columns:
        line = lines.get((row.label, column))
        if line is None:
            texts += ["", "", ""]
            continue
        spread = f" ± {line['spread']}" if line["spread"] else ""
        texts += [line["paper"], line["ours"] + spread, line["difference"]]
        seeds += line["seeds"].split()
    return f"| {row.label} | " + " | ".join(texts) + f" | {', '.join(sorted(set(seeds), key=int))} |"


def write_tables(names: Sequence[str], root: Path, output: Path, claim: str = "") -> list[Path]:
    """Writes `<output>.md` and `<output>.csv` of the named tables.

    Raises:
        BadInput: a result file that cannot be used.
    """
    lines = {name: lines_of(TABLES[name], root) for name in names}
    paths = [output.with_name(f"{output.name}.{suffix}") for suffix in ("md", "csv")]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(paths[0], "\n".join(as_markdown(TABLES[name], lines[name], claim) for name in names))
    write_text(paths[1], as_csv([line for name in names for line in lines[name]]))
    return paths


def main(argv: Sequence[str]) -> None:
    """Gathers results, writes both files and prints the Markdown."""
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--table", required=True, choices=[*TABLES, "all"], help="of the paper")
    parser.add_argument(
        "--results", required=True, type=Path, metavar="ROOT", help="folder with <encoder>/seed<n>/<stage>/result.json"
    )
    parser.add_argument("--output", type=Path, help="files to write, .md and .csv are added [<ROOT>/table_<N>]")
    args = parser.parse_args(argv)
    if not args.results.is_dir():
        raise BadInput(f"--results {args.results}: no such folder")
    names = list(TABLES) if args.table == "all" else [args.table]
    paths = write_tables(names, args.results, args.output or args.results / f"table_{args.table}")
    print(paths[0].read_text())
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    run_cli(PROGRAM, main)
