"""A process that ends the game engine when its recorder is gone, however that ended, and removes what the engine left.

The engine is started by a library, which neither tells its pid nor ends it with us. It is known by the folder that it
was started in, which is nobody else's. The guard sleeps on a pipe whose other end the recorder holds: the system closes
it for a recorder that was killed, too. On a system without /proc it finds no engine and removes the folder alone.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

SHARED = Path("/dev/shm")  # where the engine's pictures (10 MB) and messages pass


class Guard:
    """Watches over a folder that an engine is to be started in. `end` clears everything away now, and can be repeated.

    So does a signal that ends the program.
    """

    def __init__(self, folder: Path) -> None:
        from ahriuwu_cli.stopping import undoing

        self._undone = ExitStack()
        self._undone.enter_context(undoing(self.end))
        self._process = subprocess.Popen(
            [sys.executable, "-IS", __file__, str(folder)],
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


def shared_by(engine: int) -> list[Path]:
    """The memory that an engine shares with its recorder, by the name on its command line. OSError when it is gone."""
    words = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"\0")
    name = words[words.index(b"+viz_instance_id") + 1].decode() if b"+viz_instance_id" in words else ""
    return list(SHARED.glob(f"ViZDoom*{name}")) if re.fullmatch(r"\w+", name) else []


def clear_away(folder: str, recorder: int) -> None:
    """Kill the engines of a folder; remove it and the memory that they share with their recorder.

    recorder: a process that is spared: it works in the folder itself while it starts the engine.
    """
    for pid in (pid for pid in engines(folder) if pid != recorder):
        with suppress(OSError):
            shared = shared_by(pid)
            os.kill(pid, signal.SIGKILL)
            for left in shared:
                left.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    parent = os.getppid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clear_away(os.path.realpath(sys.argv[1]), parent)
