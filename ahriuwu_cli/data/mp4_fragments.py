"""Whether an mp4 in fragments, as recorders and browsers write it, is all there.

It opens and plays however much of it is missing. So its boxes are walked to the end of the file, and its fragments must
be numbered without a hole (ISO/IEC 14496-12: mfhd). A file that ends exactly between two fragments, and has no index of
them (sidx) whose end FFmpeg states, cannot be told from a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import BinaryIO


def cut(file: BinaryIO, size: int) -> str:
    """What is missing from a file, or nothing; one without fragments states all of its frames in its index. OSError."""
    at, fragmented, numbers = 0, False, []
    try:
        while at < size:
            file.seek(at)
            name, begin, end = _box(file.read(16), size - at)
            if name in (b"moov", b"moof"):
                file.seek(at + begin)
                content = file.read(end - begin)
                fragmented |= name == b"moof" or b"mvex" in content
                if name == b"moof":
                    numbers.append(_number(content))
            at += end
    except _Missing as error:
        return f"the part at byte {at} {error}" if fragmented else ""
    steps = [b - a for a, b in pairwise(numbers)]
    if steps and min(steps) == 1 < max(steps):  # numbers that go up by tens, or not at all, are somebody's own
        return f"fragment {numbers[steps.index(max(steps))] + 1} is missing"
    return ""


class _Missing(Exception):
    """What is wrong with a part."""


def _box(head: bytes, room: int) -> tuple[bytes, int, int]:
    """Name of a box, where its content begins and where it ends, of the first 16 bytes of it. Raises _Missing."""
    name, begin, end = head[4:8], 8, int.from_bytes(head[:4])
    if end == 1:
        begin, end = 16, int.from_bytes(head[8:16])
    elif not end:
        end = room  # to the end of the file
    if len(name) < 4 or end < begin or not all(32 <= byte < 127 or byte == 0xA9 for byte in name):
        raise _Missing("is none of an mp4")
    if end > room:
        raise _Missing("ends beyond the file")
    return name, begin, end


def _number(fragment: bytes) -> int:
    """The number of a fragment, whose tracks must be whole. Raises _Missing."""
    number = 0
    for name, content in _inner(fragment):
        if name == b"mfhd":
            number = int.from_bytes(content[4:8])
        elif name == b"traf":
            list(_inner(content))
    return number


def _inner(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and content of the boxes in a box, which must fill it. Raises _Missing."""
    at = 0
    while at < len(content):
        name, begin, end = _box(content[at : at + 16], len(content) - at)
        yield name, content[at + begin : at + end]
        at += end
