"""Seconds that a run really trained: a process that stands still (suspended, preempted, swapped out) spends none.

A time budget in wall-clock seconds would end a run whose machine was paused with a fraction of its steps. A thread
looks at the clock once a second; where it comes late by more than `SHORTEST`, nothing of the process ran, be it in a
step, a preview or a save. A step that is slow by itself (compilation, a large batch) lets the thread go on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

TICK = 1.0  # seconds between looks
SHORTEST = 10.0  # seconds: what is shorter is a hiccup, and counts


class Watch:
    """`with Watch() as watch:` counts the seconds in which this whole process stood still; `taken` hands them over."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._seen, self._stood = now, now(), 0.0
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="standstill", daemon=True)

    def __enter__(self) -> Watch:
        self._seen = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(TICK):
            self.look(ticks=True)

    def look(self, ticks: bool = False) -> None:
        """Note a standstill that ended just now. ticks: from who looks once a TICK; others may be between two looks."""
        with self._lock:
            at = self._now()
            late = at - self._seen - TICK
            if late > SHORTEST:
                self._stood += late
            if ticks or late > SHORTEST:
                self._seen = at

    def taken(self) -> float:
        """Seconds that stood still since this was last asked."""
        self.look()  # after a standstill the asker may be awake before the thread is
        with self._lock:
            stood, self._stood = self._stood, 0.0
        return stood


class TrainingClock:
    """`lap` counts seconds, from the last one on, without those of a standstill."""

    def __init__(
        self,
        announce: Callable[[float], None],
        now: Callable[[], float] = time.monotonic,
        stood: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """announce: called with the seconds that are left out.

        stood: seconds of standstills since it was last asked, as `now` counts them (`Watch.taken`).
        """
        self._announce, self._now, self._stood = announce, now, stood
        self._since = now()

    def lap(self) -> float:
        """Seconds since the last lap, whatever was done in them: a step, a preview, a save."""
        at = self._now()
        took, self._since = at - self._since, at
        stood = min(self._stood(), took)
        if stood:
            self._announce(stood)
        return took - stood
