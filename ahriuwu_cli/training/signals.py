"""Signals during training: SIGINT, SIGTERM and SLURM's SIGUSR1 ask for a stop after the current step.

A launcher may pass on a signal that had already reached all processes; `echo` seconds of repeats count as the same.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`with StopRequest() as stop:` -> stop.number is 0, or the number of the first signal that came in."""

    def __init__(self, echo: float = 0.0) -> None:
        self.number = 0
        self._echo, self._since = echo, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= self._echo:  # a second request: the person means it
            raise KeyboardInterrupt
