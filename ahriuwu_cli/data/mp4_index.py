"""How many pictures and pieces of sound the index of an mp4 or mov states, read before a decoder makes room for them.

An index says "sixty million pieces of one byte each" in twenty bytes, and FFmpeg takes memory for every one of them
when the file is opened. So the boxes that state numbers are looked at first (ISO/IEC 14496-12: stsz, stz2, stts, trun).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

MOST_PIECES = 4_000_000  # of one file: 37 hours of 30 pictures a second, 23 of packed sound; 100 MB in FFmpeg
_HOLDERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf")
_AT_ONCE = 1024  # samples of raw sound that FFmpeg counts as one piece


def too_many(path: Path) -> str:
    """What the index states beyond MOST_PIECES, or nothing. A file of another kind has no boxes, or few. OSError."""
    tracks, fragments = [dict[bytes, int]()], 0
    with open(path, "rb") as file:
        for name, start, length in _boxes(file, 0, file.seek(0, 2), depth=0):
            if name == b"trak":
                tracks.append({})
            file.seek(start)
            if name == b"trun":
                fragments += _number(file, length, 4)
            elif name in _FACTS:
                tracks[-1][name] = max(_FACTS[name](file, length), tracks[-1].get(name, 0))
    if fragments + sum(map(_pieces, tracks)) > MOST_PIECES:
        return f"its index states more than {MOST_PIECES} pictures and pieces of sound"
    return ""


def _pieces(track: dict[bytes, int]) -> int:
    """Pieces of a track: its samples, but of raw sound, where every sample lasts one tick, blocks of its chunks."""
    if track.get(b"hdlr") or track.get(b"stts"):
        return max(track.get(b"stsz", 0), track.get(b"stz2", 0))
    chunks = max(track.get(b"stco", 0), track.get(b"co64", 0))
    return chunks * -(-track.get(b"stsc", 0) // _AT_ONCE)


def _number(file: BinaryIO, length: int, at: int) -> int:
    """The 32 bits at a byte of the box that the file stands at; 0 where the box ends before."""
    content = file.read(at + 4) if length >= at + 4 else b""
    return int.from_bytes(content[at:])


def _is_picture(file: BinaryIO, length: int) -> int:
    return file.read(min(length, 12))[8:] == b"vide"


def _varies(file: BinaryIO, length: int) -> int:
    """Whether samples last other than one tick: no time table of one line that says so."""
    content = file.read(min(length, 16))
    return not content[4:8] == content[12:] == b"\0\0\0\1"


def _largest_chunk(file: BinaryIO, length: int) -> int:
    """Samples of the largest chunk, from lines of (first chunk, samples, description)."""
    content = file.read(length)[8:]
    return max((int.from_bytes(content[i : i + 4]) for i in range(4, len(content) - 3, 12)), default=0)


_FACTS: dict[bytes, Callable[[BinaryIO, int], int]] = {
    b"hdlr": _is_picture,
    b"stts": _varies,
    b"stsc": _largest_chunk,
    b"stsz": partial(_number, at=8),
    b"stz2": partial(_number, at=8),
    b"stco": partial(_number, at=4),
    b"co64": partial(_number, at=4),
}


def _boxes(file: BinaryIO, start: int, end: int, depth: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, first byte, length) of what the boxes between two bytes hold, those inside of others included."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        size, name, first = int.from_bytes(head[:4]), head[4:8], start + 8
        if size == 1:  # a length of 64 bits follows
            size, first = int.from_bytes(head[8:16]), start + 16
        stop = end if size == 0 else min(start + size, end)  # FFmpeg too reads what is left of a box that is cut
        if stop < first:
            return
        yield name, first, stop - first
        if name in _HOLDERS and depth < len(_HOLDERS):
            yield from _boxes(file, first, stop, depth + 1)
        start = stop
