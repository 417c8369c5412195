"""How many pictures and pieces of sound the index of an mp4 or mov states, read before a decoder makes room for them.

An index says "sixty million pieces of one byte each" in twenty bytes, and FFmpeg takes memory for every one of them
when the file is opened, in whatever box it finds such a statement. So all bytes but those of the pictures are searched
for the names of the tables that state numbers (ISO/IEC 14496-12), nested as they may be. What they state together must
have room in those bytes, and what takes more memory than bytes is counted as pieces. Raw sound alone may state more, a
sample a tick: FFmpeg reads it in blocks. It must stand where every writer puts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    import numpy as np

MOST_PIECES = 4_000_000  # of one file: 37 hours of 30 pictures a second, 23 of packed sound; 100 MB in FFmpeg
MOST_INDEX = 128 << 20  # bytes of a file that are neither pictures nor sound
MOST_BOXES = 100_000  # side by side in a file: fragments, or nonsense
MOST_TABLES = 100  # of a kind in a file: a film has one for each of its tracks, and each is summed up
OTHERS = (b"GIF8", b"RIFF", b"\x1a\x45\xdf\xa3")  # how files begin that are no mp4, whatever else they hold
_RAW = (b"sowt", b"twos", b"in24", b"in32", b"fl32", b"fl64", b"lpcm", b"ipcm", b"fpcm", b"ulaw", b"alaw")
_AT_ONCE = 1024  # samples of raw sound that FFmpeg counts as one piece
_TABLES = (b"trak", b"hdlr", b"stsd", b"stts", b"ctts", b"stsc", b"stsz", b"stz2", b"stco", b"co64", b"elst")
# Tables that hold what they count: the fewest bytes of an entry and, by the version of the table (the last for all
# above it), how many bytes behind the first of its name the number of entries stands, and its bits.
_PLAIN = ((8, 32),)
_LISTS = {
    **dict.fromkeys((b"stco", b"stss", b"stps"), (4, _PLAIN)),
    **dict.fromkeys((b"stts", b"ctts", b"co64", b"keys"), (8, _PLAIN)),
    b"stsc": (12, _PLAIN),
    b"sbgp": (8, ((12, 32), (16, 32), (12, 32))),
    b"sgpd": (1, ((12, 32), (16, 32), (20, 32))),
    b"pssh": (16, ((24, 0), (24, 32))),
    b"trun": (0, _PLAIN),
    b"senc": (0, _PLAIN),
    b"saiz": (0, ((9, 32),)),
    b"ipma": (3, _PLAIN),
    b"iinf": (8, ((8, 16), (8, 32))),
    b"iloc": (6, ((10, 16), (10, 16), (10, 32))),
    b"tfra": (11, ((16, 32),)),
    b"sidx": (12, ((26, 16), (34, 16))),
}
_PARTS = (b"tfra", b"sidx")  # lists of which FFmpeg keeps every entry for every track, as it does fragments
_LARGE = (b"senc", b"saiz", b"iinf", b"iloc")  # of which it keeps every entry at the size of some pieces
_ENTRY = 8  # pieces
_SOUND_SCENE, _BYTE = b"iacb", 20  # pieces that a byte of it may take: every one may be a stream of sound
_WORDS = (b"keys", b"senc", b"stco", b"trun")  # found in texts, where letters follow that make a large number
_LETTERS = 1 << 29  # above it FFmpeg refuses those four itself
_LONG, _DATA, _SOUND = b"\0\0\0\1", b"mdat", (b"soun", b"alis", b"url ", b"\0\0\0\0")


def too_many(path: Path) -> str:
    """What is wrong with the index of a file, or nothing; a file of another kind has none. OSError."""
    with open(path, "rb") as file:
        if file.read(4) in OTHERS:
            return ""
        index = _index(file, file.seek(0, 2))
    if index is None:
        return f"its index has more than {MOST_INDEX >> 20} MB or {MOST_BOXES} parts"
    if b"cmov" in index:
        return "its index is compressed"
    if any(index.count(name) > MOST_TABLES for name in _TABLES) or index.count(b"trun") > MOST_BOXES:
        return f"its index has more than {MOST_TABLES} tables of a kind"
    counts = {name: sum(_entries(index, name, at) for at in _places(index, name)) for name in _LISTS}
    if sum(count * _LISTS[name][0] for name, count in counts.items()) > len(index):
        return "its index states more entries than it has room for"
    parts = index.count(b"moof") + sum(counts[name] for name in _PARTS)
    pieces = parts * index.count(b"trak") + counts[b"trun"]
    pieces += _ENTRY * sum(counts[name] for name in _LARGE)
    pieces += _BYTE * sum(_end(index, _SOUND_SCENE, at) - at for at in _places(index, _SOUND_SCENE))
    ends = [*_places(index, b"trak"), len(index)]
    for start, end in zip([0, *ends], ends, strict=False):
        pieces += _pieces(index[start:end])
    return f"its index states more than {MOST_PIECES} pictures and pieces of sound" if pieces > MOST_PIECES else ""


def _index(file: BinaryIO, end: int) -> bytes | None:
    """All boxes but those of data, one after the other; None where they are more than any film has.

    Where a box has no length that can be, the rest belongs to the index: a decoder may find something in it.
    """
    parts, total, at = [], 0, 0
    while at + 8 <= end:
        if len(parts) == MOST_BOXES:
            return None
        file.seek(at)
        head = file.read(16)
        size = int.from_bytes(head[:4]) if head[:4] != _LONG else int.from_bytes(head[8:16])
        stop = min(at + size, end) if size >= 8 else end
        if head[4:8] != _DATA:
            total += stop - at
            if total > MOST_INDEX:
                return None
            file.seek(at)
            parts.append(file.read(stop - at))
        else:
            parts.append(b"")
        at = stop
    return b"".join(parts)


def _pieces(track: bytes) -> int:
    """Pieces that the bytes from one track's name to the next one's state, once for each time that they are shown."""
    counts = [_number(track, at + 12) for name in (b"stsz", b"stz2") for at in _places(track, name)]
    counts += [int(_lines(track, at, 2)[:, 0].sum()) for name in (b"stts", b"ctts") for at in _places(track, name)]
    stated = max(counts, default=0)
    if stated > MOST_PIECES and _is_raw_sound(track):
        stated = _blocks(track)
    return stated * max((_shown(track, at) for at in _places(track, b"elst")), default=1)


def _shown(track: bytes, at: int) -> int:
    """How often a list of edits may show all of its track: its entries that are no pause, and once at least."""
    import numpy as np

    # as many as the table has bytes for: FFmpeg does not believe the number in it
    words, time = (5, slice(2, 4)) if track[at + 4 : at + 5] == b"\1" else (3, slice(1, 2))
    count = max(0, _end(track, b"elst", at) - at - 12) // (4 * words)
    edits = np.frombuffer(track, ">u4", count * words, min(at + 12, len(track))).reshape(-1, words)
    return max(1, int((edits[:, time] != 0xFFFFFFFF).any(1).sum()))


def _is_raw_sound(track: bytes) -> bool:
    """Whether a track is sound of a sample a tick in a form that is not packed, written in the one usual way."""
    tables = dict(_nested(track, (b"mdia", b"minf", b"stbl")))
    kinds = {track[at + 12 : at + 16] for at in _places(track, b"hdlr")}
    ticks = [_lines(track, at, 2) for at in _places(track, b"stts")]
    return (
        {b"stsd", b"stts", b"stsc", b"stsz"} <= tables.keys()
        and b"soun" in {content[8:12] for name, content in _nested(track, (b"mdia",)) if name == b"hdlr"}
        and kinds <= set(_SOUND)
        and all(track.count(name) == 1 for name in (b"stsd", b"stts", b"stsc", b"stsz"))
        and tables[b"stsd"][12:16] in _RAW
        and len(ticks[0]) == 1 == ticks[0][0, 1]
    )


def _blocks(track: bytes) -> int:
    """Pieces of raw sound: blocks of its chunks."""
    largest = max((int(_lines(track, at, 3)[:, 1].max(initial=0)) for at in _places(track, b"stsc")), default=0)
    chunks = max((_number(track, at + 8) for name in (b"stco", b"co64") for at in _places(track, name)), default=0)
    return chunks * -(-largest // _AT_ONCE)


def _nested(content: bytes, names: tuple[bytes, ...]) -> Iterator[tuple[bytes, bytes]]:
    """(name, content) of the boxes inside of boxes of these names, each in the one before; `content` is a track's."""
    at = 4 if len(names) and content[:4] == b"trak" else 0
    while at + 8 <= len(content):
        size, name = _number(content, at), content[at + 4 : at + 8]
        if size < 8:
            return
        inner = content[at + 8 : at + size]
        if not names:
            yield name, inner
        elif name == names[0]:
            yield from _nested(inner, names[1:])
        at += size


def _lines(content: bytes, at: int, columns: int) -> np.ndarray:
    """(n, columns) numbers of the table whose name stands at a byte, as many as it states and has."""
    import numpy as np

    count = min(_number(content, at + 8), (len(content) - at - 12) // (4 * columns))
    return np.frombuffer(content, ">u4", max(0, count) * columns, min(at + 12, len(content))).reshape(-1, columns)


def _entries(content: bytes, name: bytes, at: int) -> int:
    """How many entries the list whose name stands at a byte states."""
    versions = _LISTS[name][1]
    offset, bits = versions[min(content[at + 4] if at + 4 < len(content) else 0, len(versions) - 1)]
    if name == b"saiz" and content[at + 7 : at + 8] == b"\1":  # two more words
        offset += 8
    count = _number(content, at + offset) >> 32 - bits
    return 0 if name in _WORDS and count >= _LETTERS else count


def _places(content: bytes, name: bytes) -> Iterator[int]:
    """Where a name stands; behind it, where the length of its box does, so that what follows is what always follows."""
    at = content.find(name)
    while at >= 0:
        yield at + 8 if content[max(0, at - 4) : at] == _LONG else at
        at = content.find(name, at + 1)


def _end(content: bytes, name: bytes, at: int) -> int:
    """Where the box ends whose place is given; the end of all where it does not say so in 32 bits."""
    size = _number(content, at - 4) if at >= 4 and content[at : at + 4] == name else 0
    return min(at - 4 + size, len(content)) if size >= 8 else len(content)


def _number(content: bytes, at: int) -> int:
    """The 32 bits at a byte; 0 beyond the end."""
    return int.from_bytes(content[at : at + 4]) if len(content) >= at + 4 else 0
