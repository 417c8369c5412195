"""Signals during training: SIGINT, SIGTERM and SLURM's SIGUSR1 ask for a stop.

Between steps the loop asks for them, saves and stops; before the first step and after the last there is nothing to
save, and the program ends at once. Either way it ends with 128 + the signal's number and says how to go on.
A launcher may pass on a signal that had already reached all processes; `echo` seconds of repeats count as the same.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

from ahriuwu_cli.errors import Interrupted

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`with StopRequest() as stop:` -> stop.number is 0, or the number of the first signal that came in.

    at_once: what to say of a request that ends the program where it stands; None: it waits until the loop asks.
    speaks: whether this process says it, or another one of its group.
    """

    def __init__(self, echo: float = 0.0, at_once: str | None = None, speaks: bool = True) -> None:
        self.number = 0
        self._echo, self._since = echo, 0.0
        self._at_once, self._speaks = at_once, speaks
        self._before: dict[int, object] = {}

    def wait_for_step(self) -> None:
        """From here on a request waits until the loop asks. One that came before stands."""
        self._at_once = None

    def end_at_once(self, sentence: str) -> None:
        """From here on a request ends the program where it stands; so does one that came before."""
        self._at_once = sentence
        if self.number:
            raise KeyboardInterrupt

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in HANDLED}
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self.number:
            if not self._speaks:
                raise SystemExit(128 + self.number) from None
            said = self._at_once or "asked twice, so nothing was saved: the state before stands, go on with --resume"
            raise Interrupted(f"stopped by signal {self.number}; {said}", self.number) from None

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            now = self._at_once is not None
        else:
            now = time.monotonic() - self._since >= self._echo  # a second request: the person means it
        if now:
            raise KeyboardInterrupt
