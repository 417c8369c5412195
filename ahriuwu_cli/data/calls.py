"""Calls of a library that may never return, in a thread of their own.

A game's engine is a process that shares locks with its library. Killed while it holds one, it leaves the library
waiting forever, in code that no signal and no exception reaches.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 2.0  # seconds between looks whether the other side is still there


class Lost(Exception):
    """The other side has ended, and the call still waits for it."""


class Calls:
    """`do(work)` is work(), by one thread for all until `end`; is_gone says whether the other side has ended."""

    def __init__(self, is_gone: Callable[[], bool]) -> None:
        self._is_gone, self.lost = is_gone, False
        self._asked: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()  # which may be left behind when the program ends

    def do(self, work: Callable[[], T]) -> T:
        """Its result, or what it raises. Lost when the other side is gone, and two looks later it has not returned."""
        self._asked.put(work)
        looks = 0
        while True:
            try:
                result, error = self._answers.get(timeout=PATIENCE)
                break
            except queue.Empty:
                looks = looks + 1 if self._is_gone() else 0
                if looks == 2:
                    self.lost = True
                    raise Lost("it is gone, and its last answer never came") from None
        if error is not None:
            raise error
        return result

    def end(self) -> None:
        """Let the thread go; nothing is asked of it any more."""
        self._asked.put(None)

    def _serve(self) -> None:
        while (work := self._asked.get()) is not None:
            try:
                answer = work(), None
            except BaseException as error:
                answer = None, error
            self._answers.put(answer)
