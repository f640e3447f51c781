"""The scores of several probed layers as a table, and the best layer by each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SELECTION = "chosen by validation accuracy: a selection, to report as such"


def by_layer(numbers: Mapping[str, float]) -> dict[int, dict[str, float]]:
    """Scores named such as `top1_layer5` -> {5: {"top1": ...}}, layers ascending; names without a layer are passed over."""
    layers: dict[int, dict[str, float]] = {}
    for name, value in numbers.items():
        metric, marked, layer = name.partition("_layer")
        if marked:
            layers.setdefault(int(layer), {})[metric] = value
    return dict(sorted(layers.items()))


def best_layers(layers: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Metric -> {"layer": the one with the highest score, the lowest of equals, "value": its score in percent}."""
    metrics = dict.fromkeys(metric for scores in layers.values() for metric in scores)
    best = {metric: max(layers, key=lambda layer: (layers[layer][metric], -layer)) for metric in metrics}
    return {metric: {"layer": layer, "value": layers[layer][metric]} for metric, layer in best.items()}


def report(numbers: Mapping[str, float]) -> tuple[list[str], dict[str, Any]]:
    """What is said at the end of a run that probed several layers, and what result.json has of it.

    Returns:
        Lines: a table of layers and scores with a star at the best of each column, and a sentence that names the best layers.
        Entries `layers` and `best_layer`. Nothing of either for a single layer.
    """
    layers = by_layer(numbers)
    if not layers:
        return [], {}
    best = best_layers(layers)
    lines = ["layer" + "".join(f"{metric:>10} " for metric in best)]
    for layer, scores in layers.items():
        marks = ("*" if best[metric]["layer"] == layer else " " for metric in best)
        lines.append(f"{layer:>5}" + "".join(f"{scores[metric]:>10.2f}{mark}" for metric, mark in zip(best, marks, strict=True)))
    named = ", ".join(f"{one['layer']} ({metric} {one['value']:.2f})" for metric, one in best.items() if metric != "top5")
    lines.append(f"best layer   {named}; {SELECTION}")
    return [line.rstrip() for line in lines], {
        "layers": {str(layer): scores for layer, scores in layers.items()},
        "best_layer": best,
    }
