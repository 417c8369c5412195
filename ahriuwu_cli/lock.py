"""One run in a folder at a time: `flock` on a file in it that says who holds it.

The system frees a lock when its process ends, however it ends: a killed run blocks nobody. The file stays.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from ahriuwu_cli.disk import lock
from ahriuwu_cli.errors import CheckpointError, UserError

LOCK = ".lock"
PATIENCE = 0.5  # seconds for whoever only looks, or is about to end


def take(folder: Path, announce: Callable[[str], None]) -> TextIO:
    """Hold the folder until the file that comes back is closed. UserError, naming the holder, when it is taken.

    CheckpointError where the lock is a link, a pipe or anything else that no run has made.
    """
    file = _open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_APPEND, "a+")
    begun = time.monotonic()
    while True:
        try:
            if not _try(folder, file, announce):
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
        with _open(folder / LOCK, os.O_RDONLY, "r") as file:
            _try(folder, file, lambda sentence: None, shared=True)
    except BlockingIOError:
        raise _taken(folder) from None
    except OSError:
        return  # no lock, no run


def still_held(folder: Path, file: TextIO) -> bool:
    """Whether the folder is the one that was locked: it was not removed, and not made anew by another run."""
    try:
        return os.path.samestat(os.stat(folder / LOCK), os.fstat(file.fileno()))
    except OSError:
        return False


def _open(path: Path, flags: int, mode: str) -> TextIO:
    """A regular file alone, through no link; a pipe does not block. OSError, CheckpointError."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return open(descriptor, mode)
        os.close(descriptor)
    raise CheckpointError(f"{path} is no file that a run made: remove it, and look where this folder comes from")


def _try(folder: Path, file: TextIO, announce: Callable[[str], None], shared: bool = False) -> bool:
    """Lock, or raise BlockingIOError; False, and said, where the file system has no locks."""
    if lock(file.fileno(), shared):
        return True
    announce(f"{folder} has no file locks: nothing keeps a second run out of it")
    return False


def _taken(folder: Path) -> UserError:
    try:
        with _open(folder / LOCK, os.O_RDONLY, "r") as file:
            holder = file.read(200).strip() or "it did not say which process"
    except (OSError, ValueError):
        holder = "it did not say which process"
    return UserError(f"{folder} belongs to a run that is alive ({holder}): stop that one, or choose another --out")
