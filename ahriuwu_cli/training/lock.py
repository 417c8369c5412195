"""One run in a folder at a time: `flock` on a file in it that says who holds it.

The system frees a lock when its process ends, however it ends: a killed run blocks nobody. The file stays.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ahriuwu_cli.disk import lock
from ahriuwu_cli.errors import UserError

LOCK = ".lock"
PATIENCE = 0.5  # seconds for whoever only looks, or is about to end


def take(folder: Path, announce: Callable[[str], None]) -> TextIO:
    """Hold the folder until the file that comes back is closed. UserError, naming the holder, when it is taken."""
    file = open(folder / LOCK, "a+")  # noqa: SIM115  open as long as the lock is held
    begun = time.monotonic()
    while True:
        try:
            if not _try(file, announce):
                return file
            break
        except BlockingIOError:
            if time.monotonic() - begun > PATIENCE:
                file.close()
                raise _taken(folder) from None
            time.sleep(0.05)
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def refuse_alive(folder: Path) -> None:
    """UserError when a run in this folder is alive. Writes nothing."""
    try:
        with open(folder / LOCK) as file:
            _try(file, lambda sentence: None, shared=True)
    except BlockingIOError:
        raise _taken(folder) from None
    except OSError:
        return  # no lock, no run


def _try(file: TextIO, announce: Callable[[str], None], shared: bool = False) -> bool:
    """Lock, or raise BlockingIOError; False, and said, where the file system has no locks."""
    if lock(file.fileno(), shared):
        return True
    announce(f"{Path(file.name).parent} has no file locks: nothing keeps a second run out of it")
    return False


def _taken(folder: Path) -> UserError:
    try:
        holder = (folder / LOCK).read_text().strip()[:200] or "it did not say which process"
    except (OSError, ValueError):
        holder = "it did not say which process"
    return UserError(f"{folder} belongs to a run that is alive ({holder}): stop that one, or choose another --out")
