"""The end of the program by a signal: clear away what is half done, say one sentence, exit with 128 + its number.

Nothing is raised for it: an exception out of a signal's handler can fall into any line, that of an import within torch
too, which turns it into another error or swallows it. Who leaves something half done says how to undo it (`undoing`);
who must not be stopped between two steps says so (`unbroken`).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from ahriuwu_cli.printing import one_sentence

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_undo: list[tuple[int, Callable[[], None]]] = []  # (process, what to call); a forked child clears nothing of its parent
_unbroken = 0
_asked: tuple[int, str | None] | None = None  # of the signal that waits until _unbroken is 0


@contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Within it a signal that ends the program calls undo() first. Nobody else calls it."""
    entry = (os.getpid(), undo)
    _undo.append(entry)
    try:
        yield
    finally:
        _undo.remove(entry)


@contextmanager
def unbroken() -> Iterator[None]:
    """Within it no signal ends the program: it waits until the block is through."""
    global _unbroken
    _unbroken += 1
    try:
        yield
    finally:
        _unbroken -= 1
        if _asked and not _unbroken:
            end(*_asked)


def end(number: int, sentence: str | None) -> None:
    """End the program for a signal, saying the sentence where there is one. Returns only within `unbroken`."""
    global _asked
    if _unbroken:
        _asked = (number, sentence)  # what is true at the end
        return
    for each in HANDLED:
        signal.signal(each, signal.SIG_IGN)
    for process, undo in reversed(_undo):
        if process == os.getpid():
            with suppress(Exception):  # the others are still to be called
                undo()
    if sentence is not None:
        new_line = "\n" if os.isatty(2) else ""  # below a progress bar
        text = f"{new_line}error: {one_sentence(sentence)}\n"
        with suppress(OSError):  # stderr itself may be gone; its object may be in the middle of a write
            os.write(2, text.encode(getattr(sys.stderr, "encoding", None) or "utf-8", "backslashreplace"))
    os._exit(128 + number)
