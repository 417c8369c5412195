"""Whether a video is all there: what its container says of itself, held against the file and what came out of it.

FFmpeg skips over damage and ends where a file was cut; it says so in a log at most. So the parts of a GIF, AVI, mkv or
webm are walked by their own lengths, a frame that the decoder marks as corrupt is none, and the last frame must reach
the end that the container states. An mp4 or mov without its index does not open, and states its end there, but where it
is in fragments (`mp4_fragments`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ahriuwu_cli.data import mp4_fragments

if TYPE_CHECKING:
    import av

MOST_PARTS = 2_000_000  # of one file: packets, blocks; ten times those of the longest film of 1920 x 1080 that is read
FEW_PARTS = 500_000  # that any file may have
PART = 16  # bytes a part of a file that has more: a picture that stands still takes 22
SCAN, MOST_SCANS = b"\xff\xda", 500  # of a JPEG, each a pass over all of its picture; cameras write ten at most
SLACK = 1.5  # frame times that the last frame may end before the stated end: rounding, and a cut between two frames
MATROSKA = b"\x1a\x45\xdf\xa3"  # how a file begins
SEGMENT, CLUSTER = 0x18538067, 0x1F43B675  # of Matroska


class Clock:
    """Gives the frames of a video and says afterwards what was wrong. Made before the first frame is decoded."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self._stated, self._of_all = stated_end(container, stream)
        self._count, self._corrupt, self._many = 0, -1, ""
        self._last: float | None = None  # seconds, when the last frame begins
        self._length = 0.0  # of the last frame
        self._gap = float(1 / stream.average_rate) if stream.average_rate else 0.0  # the largest between two frames
        self._others = 0.0  # the end of the other streams

    def frames(
        self, container: av.container.InputContainer, stream: av.VideoStream, next_packet: Callable[[], None]
    ) -> Iterator[av.VideoFrame]:
        """The frames of a stream, up to the most packets without one; `next_packet` is called before each.

        Raises what PyAV raises.
        """
        count = counter(container.size)
        next_packet()
        try:
            for packet in container.demux():
                before = self._count
                if packet.stream.index == stream.index:
                    if stream.codec_context.name == "mjpeg" and bytes(packet).count(SCAN) > MOST_SCANS:
                        raise Broken(f"a picture of more than {MOST_SCANS} scans")
                    for frame in packet.decode():
                        self._see(frame)
                        yield frame
                elif self._of_all and packet.pts is not None:
                    # twice: the length that is stated has what a decoder takes to begin (Opus 7 ms), its times have not
                    last = packet.pts + 2 * (packet.duration or 0)
                    self._others = max(self._others, float(last * packet.time_base))
                if self._count == before and (self._of_all or packet.stream.index == stream.index):
                    count()
                next_packet()
        except Broken as error:
            self._many = str(error)

    def fault(self) -> str:
        """Too many packets, a frame that is corrupt, or an end that no frame reaches; empty where there is none."""
        if self._many:
            return self._many
        if self._corrupt >= 0:
            return f"frame {self._corrupt} is corrupt"
        if self._stated is None or self._last is None:
            return ""
        end = max(self._last + max(self._length, SLACK * self._gap), self._others)
        if self._stated - end <= 2e-3:  # Matroska counts in milliseconds
            return ""
        return f"it states {self._stated:.2f} s, and the last of its {self._count} frames begins at {self._last:.2f} s"

    def _see(self, frame: av.VideoFrame) -> None:
        if frame.is_corrupt and self._corrupt < 0:
            self._corrupt = self._count
        self._count += 1
        if frame.pts is None:
            return
        time = float(frame.pts * frame.time_base)
        if self._last is not None:
            self._gap = max(self._gap, time - self._last)
        self._last, self._length = time, float((frame.duration or 0) * frame.time_base)


def broken(path: Path) -> str:
    """What is wrong with the parts of a GIF, AVI, mkv, webm or mp4, or nothing. OSError."""
    with open(path, "rb") as file:
        magic = file.read(4)
        size = file.seek(0, 2)
        file.seek(0)
        walk = {b"GIF8": _gif, b"RIFF": _riff, MATROSKA: _matroska}.get(magic)
        if walk is None:
            return mp4_fragments.cut(file, size)
        try:
            walk(file, size)
        except Broken as error:
            return str(error)
    return ""


class Broken(Exception):
    """Where a walk cannot go on."""


def stated_end(container: Any, stream: Any) -> tuple[float | None, bool]:
    """The end of the video in seconds and whether it is that of the longest stream; None where nothing says it."""
    if "DURATION" in stream.metadata:  # Matroska's, a time of the clock, not a length
        try:
            hours, minutes, seconds = stream.metadata["DURATION"].split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds), False
        except ValueError:
            return None, False
    if stream.duration is not None:
        length = float(stream.duration * stream.time_base)
        if container.format.name == "avi" and stream.average_rate:  # FFmpeg shortens the length where a file was cut
            length = max(length, stream.frames / float(stream.average_rate))
        begin = stream.start_time if stream.frames else 0  # fragments, which state no number of frames, count from 0
        return float((begin or 0) * stream.time_base) + length, False
    return (None, False) if container.duration is None else (container.duration / 1e6, True)


def _gif(file: BinaryIO, size: int) -> None:
    """Header, colours, then extensions and images in blocks of up to 255 bytes, to the mark of the end."""
    count = counter(size)
    head = _take(file, 13)
    _skip_colours(file, head[10])
    while (kind := _take(file, 1)[0]) != 0x3B:
        count()
        if kind == 0x2C:  # an image
            _skip_colours(file, _take(file, 9)[8])
        elif kind != 0x21:
            raise Broken(f"there is no part of a GIF at byte {file.tell() - 1}")
        _take(file, 1)  # what kind of extension, or how many bits a colour has
        while length := _take(file, 1)[0]:
            count()
            _skip(file, length, size)


def _skip_colours(file: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        _take(file, 3 << (flags & 7) + 1)


def _riff(file: BinaryIO, size: int) -> None:
    """Chunks with their lengths, some of which are lists of chunks; one RIFF after the other to the end of the file."""
    count = counter(size)
    while file.tell() < size and file.read(4) == b"RIFF":  # what is no RIFF after the first is not looked at
        count()
        end = _number(file) + file.tell()
        if end > size:
            raise Broken(f"it says that it has {end} bytes and has {size}")
        _take(file, 4)
        while file.tell() + 8 <= end:
            count()
            name, length = _take(file, 4), _number(file)
            if not all(32 <= byte < 127 for byte in name):
                raise Broken(f"there is no chunk of an AVI at byte {file.tell() - 8}")
            if name == b"LIST" and length >= 4 and file.read(4) in (b"movi", b"rec "):
                continue  # its chunks come next; none reaches beyond the RIFF
            file.seek(-4 if name == b"LIST" and length >= 4 else 0, 1)
            _skip(file, length + length % 2, end + end % 2)
        file.seek(end + end % 2)


def _matroska(file: BinaryIO, size: int) -> None:
    """Elements with their lengths: a head, and the first segment with clusters of blocks in it."""
    count = counter(size)
    name, length = element(file)
    _skip(file, length or 0, size)
    name, length = element(file)
    if name != SEGMENT:
        raise Broken(f"there is no segment at byte {file.tell()}")
    end = size if length is None else file.tell() + length
    if end > size:
        raise Broken(f"it says that it has {end} bytes and has {size}")
    while file.tell() < end:
        count()
        name, length = element(file)
        if name == CLUSTER:
            continue  # its blocks come next
        if length is None:
            raise Broken(f"the part at byte {file.tell()} has no length")
        _skip(file, length, end)


def element(file: BinaryIO) -> tuple[int, int | None]:
    """Name and length of an element of Matroska; None: it ends where the next of its kind begins."""
    first = _take(file, 1)[0]
    if first < 0x10:
        raise Broken(f"there is no part of a Matroska file at byte {file.tell() - 1}")
    name = int.from_bytes(bytes([first]) + _take(file, 8 - first.bit_length()))
    first = _take(file, 1)[0]
    if not first:
        raise Broken(f"the length at byte {file.tell() - 1} is none of Matroska")
    more = 8 - first.bit_length()
    length = int.from_bytes(bytes([first & (0x7F >> more)]) + _take(file, more))
    return name, None if length == (1 << 7 * (more + 1)) - 1 else length


def _number(file: BinaryIO) -> int:
    return int.from_bytes(_take(file, 4), "little")


def _take(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise Broken("it ends in the middle")
    return data


def _skip(file: BinaryIO, count: int, end: int) -> None:
    if file.tell() + count > end:
        raise Broken("it ends in the middle")
    file.seek(count, 1)


def counter(size: int) -> Callable[[], None]:
    most = left = min(MOST_PARTS, max(FEW_PARTS, size // PART))

    def count() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Broken(f"it has more than {most} parts in {size} bytes")

    return count
