"""The table of probed layers: values, ties, and one layer alone."""

from __future__ import annotations

from downstream.probing.table import report


def test_table_and_best_layers() -> None:
    """The highest score of each column is marked, the lowest layer of equals; plain names, the last layer's, are no layer."""
    numbers = {
        **{"top1": 30.0, "top1_layer0": 10.0, "top1_layer2": 50.0, "top1_layer11": 30.0},
        **{"top5": 90.0, "top5_layer0": 90.0, "top5_layer2": 80.0, "top5_layer11": 90.0},
        **{"knn20": 20.125, "knn20_layer0": 5.0, "knn20_layer2": 6.0, "knn20_layer11": 20.125},
    }
    lines, entries = report(numbers)
    assert [line.split() for line in lines[:-1]] == [
        ["layer", "top1", "top5", "knn20"],
        ["0", "10.00", "90.00*", "5.00"],
        ["2", "50.00*", "80.00", "6.00"],
        ["11", "30.00", "90.00", "20.12*"],
    ]
    assert {len(line) for line in lines[1:3]} == {len("    2" + 3 * 11 * " ") - 1}
    assert lines[-1].startswith("best layer   2 (top1 50.00), 11 (knn20 20.12); chosen by validation accuracy")
    assert entries["best_layer"] == {
        "top1": {"layer": 2, "value": 50.0}, "top5": {"layer": 0, "value": 90.0}, "knn20": {"layer": 11, "value": 20.125},
    }  # fmt: skip
    assert entries["layers"]["2"] == {"top1": 50.0, "top5": 80.0, "knn20": 6.0}
    assert list(entries["layers"]) == ["0", "2", "11"]


def test_one_layer_has_no_table() -> None:
    assert report({"top1": 30.0, "knn20": 20.0}) == ([], {})
