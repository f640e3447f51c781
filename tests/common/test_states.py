"""Settings of a saved state against those of the run that continues it."""

from common.states import differences


def test_differences_are_named_and_sorted():
    """Both values of each setting that differs; one that is absent is None; free ones and equal ones are left out."""
    saved = {"seed": 1, "epochs": 5, "gone": 2, "same": "x", "workers": 4}
    current = {"seed": 2, "epochs": 5, "new": 3, "same": "x", "workers": 8}
    lines = differences(saved, current, free=frozenset({"workers"}))
    assert lines == ["gone 2 -> None", "new None -> 3", "seed 1 -> 2"]
    assert differences(saved, current, free=frozenset({"workers"}), prefix="--")[2] == "--seed 1 -> 2"


def test_tuples_and_lists_are_the_same_setting():
    """A saved state may hold either; other values and lengths differ."""
    assert differences({"size": (5, 7)}, {"size": [5, 7]}) == []
    assert differences({"size": [5, 7]}, {"size": (7, 5)}) == ["size [5, 7] -> [7, 5]"]
