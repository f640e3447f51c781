"""Seconds spent in the phases of a step (data, mask, model)."""

from __future__ import annotations

import time
from collections import defaultdict

import torch

PHASES = ("data", "mask", "model")


class Stopwatch:
    """Each call of :meth:`lap` gives the time since the last one to a phase.

    On a GPU phases are measured by events in its stream, so that nothing waits; :meth:`settle` adds them up once
    they have happened.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._last = self._mark()
        self._last_host = time.perf_counter()

    def start(self) -> None:
        """Time until now belongs to no phase."""
        self._last, self._last_host = self._mark(), time.perf_counter()

    def lap(self, phase: str, host: bool = False) -> None:
        """The time since the last lap was spent in `phase`; `host` says that the GPU had no part in it."""
        now, now_host = self._mark(), time.perf_counter()
        if now is None or self._last is None or host:
            self.seconds[phase] += now_host - self._last_host
        else:
            self._pending.append((phase, self._last, now))
        self._last, self._last_host = now, now_host

    def settle(self) -> None:
        """Adds the GPU's laps; call it where the host has waited for the GPU anyway."""
        for phase, first, last in self._pending:
            last.synchronize()
            self.seconds[phase] += first.elapsed_time(last) / 1000
        self._pending.clear()

    @property
    def total(self) -> float:
        """Seconds of all phases together, never 0."""
        return max(sum(self.seconds.values()), 1e-9)

    def shares(self) -> str:
        """The phases as shares of their sum, for people."""
        return " ".join(f"{phase} {self.seconds[phase] / self.total:.0%}" for phase in PHASES)

    def _mark(self) -> torch.cuda.Event | None:
        if not self.on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
