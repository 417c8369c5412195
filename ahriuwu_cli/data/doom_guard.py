"""A process that ends the game engine when its recorder is gone, however that ended, and removes what the engine left.

The engine is started by a library, which neither tells its pid nor ends it with us. It is known by the folder that it
was started in, which is nobody else's. The guard sleeps on a pipe whose other end the recorder holds: the system closes
it for a recorder that was killed, too. The memory that both share is known from the recorder's own maps, so that an
engine may be gone already. On a system without /proc it finds neither and removes the folder alone.
"""

from __future__ import annotations

import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

LOOK = 0.01  # seconds between looks for the memory that recorder and engine share, until it is there
SHARED = Path("/dev/shm")  # where the engine's pictures and messages pass
SHARES = 12_000_000  # bytes of them, with room to spare: measured 10.7 MB


class Guard:
    """Watches over a folder that an engine is to be started in. `end` clears everything away now, and can be repeated.

    So does a signal that ends the program.
    """

    def __init__(self, folder: Path) -> None:
        from ahriuwu_cli.stopping import undoing

        self._undone = ExitStack()
        self._undone.enter_context(undoing(self.end))
        self._process = subprocess.Popen(
            [sys.executable, "-IS", __file__, str(folder), *instances(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # what a terminal or a launcher sends to all of a group is not for it
        )

    def end(self) -> None:
        """Kill the engine if it still runs, remove its files, and end the guard."""
        self._process.stdin.close()
        self._process.wait()
        self._undone.close()


def engines(folder: str) -> list[int]:
    """Processes that work in the folder, by their pid."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if os.readlink(process / "cwd") == folder:
                found.append(int(process.name))
    return found


def instances(recorder: int) -> set[str]:
    """The names of engines that a process shares memory with, from before they start until it lets go of it."""
    with suppress(OSError):
        mapped = os.fsdecode(Path(f"/proc/{recorder}/maps").read_bytes())  # paths may be of any bytes
        return set(re.findall(rf"{SHARED}/ViZDoom(?:MQCtr|MQDoom|SM)(\w+)", mapped))
    return set()


def named(engine: int) -> set[str]:
    """The name of an engine, from its own command line."""
    with suppress(OSError):
        words = os.fsdecode(Path(f"/proc/{engine}/cmdline").read_bytes()).split("\0")
        pairs = itertools.pairwise(words)
        return {name for option, name in pairs if option == "+viz_instance_id" and re.fullmatch(r"\w+", name)}
    return set()


def watch(recorder: int, others: set[str]) -> set[str]:
    """Sleep until the recorder lets go of the pipe, which its end does too; the names of its engines but for others."""
    names: set[str] = set()
    while not select.select([sys.stdin], [], [], None if names else LOOK)[0]:
        names = instances(recorder) - others
    return names or instances(recorder) - others  # it may wait for this one, which has not looked yet


def clear_away(folder: str, recorder: int, names: set[str]) -> None:
    """Kill the engines of a folder; remove it, and the memory of the engines of these names.

    recorder: a process that is spared: it works in the folder itself while it starts the engine.
    """
    for pid in (pid for pid in engines(folder) if pid != recorder):
        names = names | named(pid)  # on a busy machine all may be over before the guard's first look
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for left in (left for name in names for left in SHARED.glob(f"ViZDoom*{name}")):
        left.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parent, place = os.getppid(), os.path.realpath(sys.argv[1])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    clear_away(place, parent, watch(parent, set(sys.argv[2:])))
