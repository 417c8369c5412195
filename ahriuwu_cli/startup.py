"""What comes first, before anything heavy is imported: whole streams, and signals that end in a sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress

from ahriuwu_cli.printing import open_missing
from ahriuwu_cli.stopping import HANDLED
from ahriuwu_cli.training.restart import speaks, typed
from ahriuwu_cli.training.signals import StopRequest

_stop: StopRequest | None = None


def begin() -> None:
    """Of a process of its own. Called again it does nothing.

    A signal ends the program where it stands, until a command asks for something else (`training.restart.stoppable`).
    """
    global _stop
    open_missing()
    try:
        os.getcwd()
    except OSError as error:  # libraries die of it in ways of their own
        sys.stderr.write(f"error: the current folder cannot be used ({error.strerror}): change to another one\n")
        sys.exit(2)
    if _stop is None:
        said = f"nothing half done is left, start again with: {typed()}"
        _stop = StopRequest(at_once=said, speaks=speaks(), heeds_ignored=False)
        _stop.__enter__()  # until the process ends


def ended(code: int) -> None:
    """The command is through and has its exit code: a signal changes it no more.

    Python gives handlers back before it takes itself down, some 0.1 s with torch, and a signal would end it there by
    the system's own rule, without a word. And it would wait for threads that an environment left behind, for ever.
    """
    if _stop is not None:
        for each in HANDLED:
            signal.signal(each, signal.SIG_IGN)
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def complete(what: object) -> None:
    """From here on a signal says that `what` is complete, not that the same command is to be started again."""
    if _stop is not None:
        _stop.end_at_once(f"{what} is complete")
