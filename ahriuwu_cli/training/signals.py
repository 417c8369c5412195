"""Signals during training: SIGINT, SIGTERM, SLURM's SIGUSR1 and a closed terminal's SIGHUP ask for a stop.

Between steps the loop asks for them, saves and stops; before the first step and after the last there is nothing to
save, and the program ends at once (`stopping.end`). Either way it ends with 128 + the signal's number and says how to
go on. A launcher may pass on a signal that had already reached all processes; `echo` seconds of repeats count as the
same. Nothing heavy is imported here.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from ahriuwu_cli import stopping
from ahriuwu_cli.stopping import HANDLED


class StopRequest:
    """`with StopRequest() as stop:` -> stop.number is 0, or the number of the first signal that came in.

    at_once: what to say of a request that ends the program where it stands; None: it waits until the loop asks.
    speaks: whether this process says it, or another one of its group. heeds_ignored: whether signals that the program
    was started without (a script's background job ignores SIGINT) count; SIGHUP under nohup never does.
    """

    def __init__(
        self, echo: float = 0.0, at_once: str | None = None, speaks: bool = True, heeds_ignored: bool = True
    ) -> None:
        self.number = 0
        self._echo, self._since = echo, 0.0
        self._at_once, self._speaks = at_once, speaks
        self._numbers = [
            number
            for number in HANDLED
            if signal.getsignal(number) is not signal.SIG_IGN or (heeds_ignored and number != signal.SIGHUP)
        ]
        self._twice: Callable[[], str] = lambda: "asked twice"
        self._before: dict[int, object] = {}

    def wait_for_step(self, twice: Callable[[], str] | None = None) -> None:
        """From here on a request waits until the loop asks. One that came before stands.

        twice: gives the sentence for a second request, which ends the program where it stands.
        """
        self._at_once, self._twice = None, twice or self._twice

    def end_at_once(self, sentence: str) -> None:
        """From here on a request ends the program where it stands; so does one that came before."""
        self._at_once = sentence
        if self.number:
            self._end()

    def __enter__(self) -> StopRequest:
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.number:
            self.number, self._since = number, time.monotonic()
            now = self._at_once is not None
        else:
            now = time.monotonic() - self._since >= self._echo  # a second request: the person means it
        if now:
            self._end()

    def _end(self) -> None:
        said = f"stopped by signal {self.number}; {self._at_once or self._twice()}"
        stopping.end(self.number, said if self._speaks else None)
