"""Tables of benchmarks.train_step, as text and as the part of docs/cost.md that is written from its numbers."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

NAMES = {"mae": "MAE", "beit": "BEiT", "simmim": "SimMIM"}
SIZES = {"tiny": "tiny", "small": "ViT-S", "base": "ViT-B"}
BEGIN, END = "<!-- written by benchmarks.train_step: begin -->", "<!-- written by benchmarks.train_step: end -->"

TARGETS: dict[tuple[str, str, str], tuple[float, float]] = {
    ("plain", "mae", "small"): (0.76, 0.70),
    ("plain", "mae", "base"): (0.92, 0.85),
    **{("plain", method, "small"): (0.85, 0.75) for method in ("beit", "simmim")},
    **{("plain", method, "base"): (0.95, 0.90) for method in ("beit", "simmim")},
    ("evolved", "mae", "small"): (0.90, 0.85),
    ("evolved", "mae", "base"): (1.18, 1.12),
    ("share", "mae", "small"): (0.15, 0.12),
    ("kept", "mae", "small"): (0.06, 0.03),
    ("memory", "mae", "small"): (0.017, 0.005),
}
"""(ratio, method, size) -> what was aimed at first, and then toward; meant for a CPU and fp32."""

HEADINGS = {
    "plain": "our plain step / official plain step",
    "evolved": "our evolved step / official plain step",
    "added": "mask / our plain step",
    "share": "mask's share of the time (mask / evolved step)",
    "kept": "mask's share with kept parts",
    "pass_added": "mask without spared passes / our plain step",
    "data": "data of one loader process / evolved step",
}


def line(case: dict[str, Any]) -> str:
    """One case in a line, as it is done."""
    summary = case["summary"]
    ratios = [f"{name} {summary[name]['median']:.3f}" for name in HEADINGS if summary.get(name) is not None]
    return f"{title(case)}: {', '.join(ratios)}"


def title(case: dict[str, Any]) -> str:
    """Method, size and batch."""
    return f"{NAMES[case['method']]} {SIZES[case['size']]}, batch {case['batch']}"


def render(record: dict[str, Any]) -> str:
    """Markdown of all that was measured."""
    machine, schedule = record["machine"], record["schedule"]
    lines = [
        f"`{record['command']}`", "",
        f"{machine['device']}, {machine['threads']} threads of {machine['cores']} cores, torch {machine['torch']}, "
        f"{record['precision']}, {record['clock']} clock; load of the machine {machine['load_at_start']:.1f} at the start, "
        f"{machine['load_at_end']:.1f} at the end. Evolved: gamma {schedule['gamma']:g}, {schedule['epochs']} epochs, "
        f"masks at the middle of {schedule['stages']} stages{_kept(record)}. "
        "Medians of the ratios of a turn, and the least and largest.",
        "", *_ratios(record["cases"]), "", *_seconds(record["cases"]), "", f"Memory: {record['memory_is']}.",
    ]  # fmt: skip
    return "\n".join(lines)


def _kept(record: dict[str, Any]) -> str:
    every = record["schedule"].get("parts_every", 0)
    return f"; kept parts: --parts_every {every}" if every else ""


def _ratios(cases: list[dict[str, Any]]) -> list[str]:
    shown = [name for name in HEADINGS if any(case["summary"].get(name) is not None for case in cases)]
    lines = [f"| | {' | '.join(HEADINGS[name] for name in shown)} | images spared |", f"|---|{'---|' * (len(shown) + 1)}"]
    for case in cases:
        cells = [_ratio(case, name) for name in shown]
        lines.append(f"| {title(case)} | {' | '.join(cells)} | {case['spared_overall']:.1%} |")
    return lines


def _ratio(case: dict[str, Any], name: str) -> str:
    ratio = case["summary"].get(name)
    if ratio is None:
        return ""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f}){_verdict(case, name, ratio['median'])}"


def _verdict(case: dict[str, Any], name: str, value: float) -> str:
    """Beside the targets of this ratio, where there are any."""
    aimed = TARGETS.get((name, case["method"], case["size"]))
    if aimed is None:
        return ""
    first, then = aimed
    said = "met" if value <= then else "first met" if value <= first else "missed"
    return f", targets {first:g} and {then:g}: {said}"


def _seconds(cases: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | our step, s | official step, s | data, s | our peak, MiB | official peak, MiB | evolved adds to our peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        seconds, memory, summary = case["seconds"], case["memory"], case["summary"]
        times = [_spread(seconds.get(name)) for name in ("our step", "official step", "data")]
        peaks = ["" if memory.get(name) is None else f"{memory[name] / 2**20:.0f}" for name in ("our step", "official step")]
        added = "" if summary["memory"] is None else f"{summary['memory']:.2%}{_verdict(case, 'memory', summary['memory'])}"
        lines.append(f"| {title(case)} | {' | '.join([*times, *peaks, added])} |")
    return lines


def _spread(times: list[float] | None) -> str:
    if not times:
        return ""
    return f"{statistics.median(times):.3f} ({min(times):.3f} - {max(times):.3f})"


def write(page: Path, record: dict[str, Any]) -> None:
    """Puts the tables between the two marks of the page, or behind what it says; makes it where there is none."""
    text = page.read_text() if page.exists() else "# What it costs\n"
    part = f"{BEGIN}\n\n{render(record)}\n\n{END}\n"
    if BEGIN in text and END in text:
        before, after = text.split(BEGIN)[0], text.split(END)[1].removeprefix("\n")
        page.write_text(before + part + after)
    else:
        page.write_text(f"{text.rstrip()}\n\n{part}")
