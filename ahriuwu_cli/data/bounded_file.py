"""A file that gives a decoder only so much, and only so long, from one packet to the next.

A container may state that its next picture has two gigabytes, in a file that is a hole, and FFmpeg makes room for them.
"""

from __future__ import annotations

import time
from typing import BinaryIO

from ahriuwu_cli.data.whole_video import Broken

MOST_READ = 200 << 20  # bytes: a picture of 4096 x 4096 in 64 bits, or the largest index that is read
MOST_AT_ONCE = 1 << 20
PATIENCE = 60.0  # seconds in which a file must give its next packet


class BoundedFile:
    """Reads and seeks as a file does; raises Broken beyond its limits, which begin anew with `next_packet`."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name  # whose end tells FFmpeg what to try first
        self._file = file
        self.next_packet()
        if file.read(4) == b"GIF8":  # FFmpeg counts its pictures as it opens it
            self._left += file.seek(0, 2)
        file.seek(0)

    def next_packet(self) -> None:
        self._left, self._until = MOST_READ, time.monotonic() + PATIENCE

    def read(self, count: int) -> bytes:
        if time.monotonic() > self._until:
            raise Broken(f"it gives no packet within {PATIENCE:.0f} s")
        try:
            data = self._file.read(min(count, MOST_AT_ONCE))  # FFmpeg asks for all of a packet
        except OSError as error:
            raise Broken(str(error.strerror)) from None
        self._left -= len(data)
        if self._left < 0:
            raise Broken(f"a packet of it takes more than {MOST_READ >> 20} MB")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 2:  # FFmpeg asks for the last byte, of an empty file too
            whence, offset = 0, max(0, self._file.seek(0, 2) + offset)
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()
