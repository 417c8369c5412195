"""How many entries the head and tail of a Matroska file hold, counted before a decoder makes room for them.

FFmpeg takes up to two hundred bytes for an entry of two, an encoding or a cue without content. All that is no cluster
of pictures is searched for the lists that hold such entries, wherever they stand, since a decoder that meets damage
looks for them byte by byte; so is what a table of places (SeekHead) points to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from ahriuwu_cli.data.mp4_index import MOST_INDEX
from ahriuwu_cli.data.whole_video import CLUSTER, MATROSKA, SEGMENT, Broken, counter, element

_LISTS = (0x114D9B74, 0x1654AE6B, 0x1C53BB6B, 0x1254C367, 0x1941A469, 0x1043A770)  # places, tracks, cues, tags, ...
_PLACE = b"\x53\xac"  # in the list of places
# Elements that hold others, of all of which FFmpeg keeps something: the lists, and what may be in them.
_HOLDERS = frozenset((
    *_LISTS, 0x4DBB, 0xAE, 0xE0, 0xE1, 0xE2, 0xE3, 0xE4, 0x41E4, 0x55B0, 0x55D0, 0x7670, 0x6D80, 0x6240, 0x5034, 0x5035,
    0x47E7, 0xBB, 0xB7, 0xDB, 0x7373, 0x63C0, 0x67C8, 0x61A7, 0x45B9, 0xB6, 0x8F, 0x80, 0x6944, 0x6911, 0x6933, 0x6624,
))  # fmt: skip
_DATA = frozenset((CLUSTER, 0xA0, 0xA3, 0xA7, 0xAB, 0xAF, 0xE7, 0x5854))  # and what is in one that states no length


def too_many_entries(path: Path) -> str:
    """What is wrong with the lists of a Matroska file, or nothing; a file of another kind has none. OSError."""
    with open(path, "rb") as file:
        if file.read(4) != MATROSKA:
            return ""
        size = file.seek(0, 2)
        count = counter(size)
        try:
            index = _index(file, size)
            for name in _LISTS:
                for at in _found(index, name.to_bytes(4), count):
                    _count(index, at, count)
        except Broken as error:
            return str(error)
    return ""


def _index(file: BinaryIO, size: int) -> bytes:
    """All but the clusters, from damage on all of the rest, and lists in clusters to which a place points. Broken."""
    parts, starts, ends, total, count = [], [], [], 0, counter(size)

    def keep(start: int, end: int) -> None:
        nonlocal total
        total += end - start
        if total > MOST_INDEX:
            raise Broken(f"it has more than {MOST_INDEX >> 20} MB that are no pictures")
        file.seek(start)
        parts.append(file.read(end - start))

    at = segment = 0
    while at < size:
        file.seek(at)
        name, length = _next(file)
        begin = file.tell()
        if name == SEGMENT and not segment:
            at = segment = begin
        elif name in _DATA:
            count()
            at = begin if length is None else begin + length
        else:
            count()
            end = size if length is None else min(size, begin + length)
            keep(at, end)
            starts.append(at)
            ends.append(end)
            at = end
    pointed: set[int] = set()
    for part in parts:  # to which some are added
        inner = BytesIO(part)  # no copy
        for place in _found(part, _PLACE, count):
            inner.seek(place)
            length = _next(inner)[1]
            at = segment + int.from_bytes(inner.read(min(length or 0, 8)))
            known = bisect_right(starts, at)
            if at >= size or at in pointed or (known and at < ends[known - 1]):
                continue
            pointed.add(at)
            file.seek(at)
            name, length = _next(file)
            if name in _LISTS:
                keep(at, size if length is None else min(size, file.tell() + length))
    return b"".join(parts)


def _count(index: bytes, at: int, count: Callable[[], None]) -> None:
    """Count the entries of the list that begins at a byte, up to its end or the first damage. Raises Broken."""
    file = BytesIO(index)  # no copy
    file.seek(at)
    name, length = _next(file)
    end = len(index) if length is None else min(len(index), file.tell() + length)
    while file.tell() < end:
        name, length = _next(file)
        if not name:
            return
        if name in _HOLDERS:
            count()  # what is in it comes next
        else:
            file.seek(length or 0, 1)


def _found(content: bytes, what: bytes, count: Callable[[], None]) -> Iterator[int]:
    at = content.find(what)
    while at >= 0:
        count()
        yield at
        at = content.find(what, at + 1)


def _next(file: BinaryIO) -> tuple[int, int | None]:
    """Name and length of an element; 0 and None where there is none."""
    try:
        return element(file)
    except Broken:
        return 0, None
