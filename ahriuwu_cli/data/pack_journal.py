"""What a packer has done so far: a lock, and a journal of finished parts beside the partial pack.

The journal is JSON lines. The first says what is being packed; every other names a part and the hash of its rows, and
is written after the rows are. Nothing in it is believed unless the rows still have that hash.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.documents import parse_json, read_bytes
from ahriuwu_cli.data.tensors import as_bytes
from ahriuwu_cli.disk import lock

if TYPE_CHECKING:
    import numpy as np

FORMAT = "ahriuwu-journal/1"
MAX_BYTES = 100_000_000
_OF_LOCK = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
# As `Journal.add` writes it. A search skips millions of other lines in the time that a few take to be parsed.
_LINE = re.compile(rb'^\{"part": (\d{1,9}), "sha256": "([0-9a-f]{64})"\}$', re.MULTILINE)


@dataclass(frozen=True)
class Workplace:
    """Where a packer works: the partial pack, its journal, and the lock's descriptor (None: the disk has no locks)."""

    partial: Path
    journal: Path
    lock: int | None


@contextmanager
def locked(path: Path, announce: Callable[[str], None]) -> Iterator[Workplace]:
    """Hold the lock of one pack; whoever comes second waits, with a sentence. OSError when the folder is read-only.

    The lock is `flock` on a file that stays. Processes that inherit the descriptor hold it too: it is free when the
    last of them has ended, however it ended. NFS passes it on to the server. A file system without locks gets partial
    files of its own for each process: safe, but not resumable, and said.
    """
    import fcntl

    descriptor = os.open(_hidden(path, "lock"), _OF_LOCK, 0o666)
    try:
        try:
            held = lock(descriptor)
        except BlockingIOError:
            announce(f"another process is packing {path}: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            held = True
        if not held:
            announce(f"{path.parent} has no file locks: packing without, so this pack cannot be resumed when cut short")
            own = f"{socket.gethostname()}-{os.getpid()}"
            place = Workplace(_hidden(path, f"{own}.partial"), _hidden(path, f"{own}.journal"), None)
            try:
                yield place
            finally:
                place.partial.unlink(missing_ok=True)
                place.journal.unlink(missing_ok=True)
            return
        yield Workplace(_hidden(path, "partial"), _hidden(path, "journal"), descriptor)
    finally:
        os.close(descriptor)


def left_behind(folder: Path, pack: str = "*.safetensors") -> list[Path]:
    """Journals without the partial pack that they are of: it got its name, and then its packer was killed."""
    journals = sorted(folder.glob(f".{pack}.*journal*"))
    return [p for p in journals if not p.with_name(f"{p.name.rpartition('journal')[0]}partial").exists()]


def sweep(path: Path) -> None:
    """Remove what the packer of a pack left behind, unless one is at work. For who finds the pack there."""
    if path.parent.is_symlink() or not left_behind(path.parent, path.name):
        return
    with suppress(OSError):  # a disk that cannot be written keeps it, and the pack can be read
        descriptor = os.open(_hidden(path, "lock"), _OF_LOCK, 0o666)
        try:
            if lock(descriptor):
                for left in left_behind(path.parent, path.name):
                    left.unlink()
        finally:
            os.close(descriptor)


def read_journal(path: Path, purpose: dict[str, Any]) -> dict[int, str] | None:
    """{part: hash of its rows} of a journal with this purpose; None when there is none, or it is for something else.

    A torn or strange line is left out: its part is encoded again.
    """
    try:
        content = read_bytes(path, MAX_BYTES)
        first = parse_json(content.partition(b"\n")[0])
    except (FileNotFoundError, ValueError):
        return None
    if first != {"format": FORMAT, **purpose}:
        return None
    return {int(line[1]): line[2].decode() for line in _LINE.finditer(content)}


class Journal:
    """A journal to write on: begun with what is already believed, renamed into place, then one line a part."""

    def __init__(self, path: Path, purpose: dict[str, Any], done: dict[int, str]) -> None:
        fresh = path.with_name(path.name + ".new")
        lines = [{"format": FORMAT, **purpose}, *({"part": p, "sha256": h} for p, h in done.items())]
        self._descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            write_all(self._descriptor, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            os.replace(fresh, path)
        except BaseException:
            self.close()
            fresh.unlink(missing_ok=True)
            raise

    def add(self, part: int, digest: str) -> None:
        """Note a part whose rows are written."""
        write_all(self._descriptor, json.dumps({"part": part, "sha256": digest}).encode() + b"\n")

    def close(self) -> None:
        os.close(self._descriptor)


def write_all(descriptor: int, data: np.ndarray | bytes, offset: int | None = None) -> None:
    """Write everything, at an offset or at the end of what was written; the system may take it in pieces."""
    view = as_bytes(data)
    while view:
        count = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
        view = view[count:]
        offset = None if offset is None else offset + count


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
