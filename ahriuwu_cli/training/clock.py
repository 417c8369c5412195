"""Seconds that a run really trained: a machine that stands still (suspended, preempted, swapped out) spends none.

A time budget in wall-clock seconds would end a run whose machine was paused with a fraction of its steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

PATIENCE = 20.0  # a lap this many times the median one, and longer than `SHORTEST`, is a standstill
SHORTEST = 10.0  # seconds


class TrainingClock:
    """`lap` once a step. `elapsed` counts its seconds; of a standstill it counts a median lap and tells `announce`."""

    def __init__(
        self, elapsed: float, announce: Callable[[float], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        """elapsed: seconds of earlier parts of the run. announce: called with the seconds that are left out."""
        self.elapsed, self._announce, self._now = elapsed, announce, now
        self._since = now()
        self._laps: list[float] = []

    def lap(self) -> float:
        """Seconds trained so far, the lap that ends here included."""
        at = self._now()
        took, self._since = at - self._since, at
        usual = median(self._laps[-50:]) if len(self._laps) >= 5 else took
        if took > max(PATIENCE * usual, SHORTEST):
            self._announce(took - usual)
            took = usual
        else:
            self._laps.append(took)
        self.elapsed += took
        return self.elapsed

    def rest(self) -> None:
        """Add what was done since the last lap besides steps (a preview, a save), however long it took."""
        at = self._now()
        self.elapsed, self._since = self.elapsed + at - self._since, at
