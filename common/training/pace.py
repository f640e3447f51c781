"""How long a run will take, from the updates that were done."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]

UPDATES_FIRST, SECONDS_FIRST = 5, 60.0
"""An estimate is made after so many updates, or so many seconds where that comes first; the very first update is slow and not
counted."""


class Pace:
    """Time for the updates that are left, at the pace of those that were done here.

    Args:
        left: updates of the run that are still to be done.
        clock: seconds that never go back.
    """

    def __init__(self, left: int, clock: Clock = time.monotonic) -> None:
        self.left, self.clock = left, clock
        self.counted, self.began, self.now, self.told = -1, 0.0, 0.0, False

    def update_done(self) -> str:
        """Counts an update; returns the first estimate for people when it can be made, and an empty text otherwise."""
        self.left -= 1
        self.counted += 1
        self.now = self.clock()
        if self.counted == 0:
            self.began = self.now
            return ""
        ready = self.counted >= UPDATES_FIRST or self.now - self.began >= SECONDS_FIRST
        if self.told or not ready or self.left == 0:
            return ""
        self.told = True
        each = (self.now - self.began) / self.counted
        return f"{self.words()} for {self.left} updates, by the first {self.counted + 1} ({each:.2g} s each)"

    def words(self) -> str:
        """The time left, for people; empty before there is an estimate."""
        if self.counted < 1:
            return ""
        minutes = self.left * (self.now - self.began) / self.counted / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "less than a minute left"
