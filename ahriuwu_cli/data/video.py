"""Video, read frame by frame, with limits on what a file may ask for."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ahriuwu_cli import memory
from ahriuwu_cli.data.bounded_file import BoundedFile
from ahriuwu_cli.data.metadata import MAX_FPS, MIN_FPS
from ahriuwu_cli.data.mkv_index import too_many_entries
from ahriuwu_cli.data.mp4_index import too_many
from ahriuwu_cli.data.whole_video import Broken, Clock, broken, stated_end
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    import av
    import numpy as np

MAX_PIXELS = 4096 * 4096
MAX_DECODED = 400_000_000_000  # pixels of all frames that are decoded of one video: 190,000 frames of 1920 x 1080
MEMORY = 640_000_000  # bytes of all pictures that a decoder keeps at a time: 20 of 3840 x 2160 in yuv422p10
KEPT = 17  # of them: the one at work, and those that it is predicted from, 16 at most in any codec
MOST_THREADS = 16  # FFmpeg takes as many by itself; each may have a picture of its own
WIDEST = 64  # bits a pixel, where the file does not say
# Containers that hold their pictures themselves. Others (playlists, lists of files) would open what they name.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
COVER = 0x400 | 0x800  # what FFmpeg says of a stream: attached picture, thumbnails
STILLS = ("mjpeg", "png", "bmp", "tiff", "webp")


def video_fps(path: Path | str) -> float:
    """The frame rate that a video file states, in frames per second. Raises DataError."""
    with _opened(Path(path)) as (_, stream, _):
        rate = stream.average_rate or stream.guessed_rate
        if not rate or not MIN_FPS <= rate <= MAX_FPS:
            raise DataError(f"{path} does not state its frame rate, or one that no video has: convert it to mp4 first")
        return float(rate)


def iter_video(path: Path | str, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """The pictures of `timed_frames`."""
    for _, picture in timed_frames(path, max_pixels):
        yield picture


def timed_frames(path: Path | str, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[float | None, np.ndarray]]:
    """Decode a video frame by frame: seconds, where the file says them, and uint8 (h, w, 3), turned as players do.

    Raises DataError when it is not one, is damaged, changes its size, or is larger than a limit: the decoder itself is
    told the most pixels of a frame, whatever the file says of them. Whether all of it came is known at its end.
    Large pictures are decoded in fewer threads, so that those which the decoder keeps stay below MEMORY.
    """
    import av

    from ahriuwu_cli.data.upright import upright_frame

    with _opened(Path(path)) as (container, stream, file):
        if stream.width * stream.height > max_pixels:
            raise DataError(f"{path} is {stream.width}x{stream.height}, above the limit of {max_pixels} pixels a frame")
        context = stream.codec_context
        threads = min(MOST_THREADS, MEMORY // max(1, _picture_bytes(context)) - _kept(context))
        _check_memory(path, context, max(1, threads))
        max_pixels = min(max_pixels, _most_pixels(context))
        context.options = {"max_pixels": str(max_pixels)}
        stream.thread_type = "AUTO"
        if threads < MOST_THREADS:
            context.thread_count = min(threads, (os.cpu_count() or 1) + 1)

        def next_packet() -> None:
            file.next_packet()
            _check_memory(path, context, threads)  # the last packet may have said something else of the pictures

        size, decoded, clock = None, 0, Clock(container, stream)
        untimed = container.format.name == "avi"  # FFmpeg gives its frames the times of packets, in another order
        try:
            for frame in clock.frames(container, stream, next_packet):
                pixels = frame.height * frame.width
                decoded += pixels
                if pixels > max_pixels or decoded > MAX_DECODED:
                    raise DataError(f"{path} has more than {MAX_DECODED:g} pixels in all: cut it, or make it smaller")
                picture = upright_frame(frame)
                size = size or picture.shape[:2]
                if size != picture.shape[:2]:
                    raise DataError(f"{path} changes its size from {size} to {picture.shape[:2]}: convert it first")
                yield None if untimed else frame.time, picture
            if fault := clock.fault() or _broken(Path(path)):
                raise DataError(f"{path} is damaged ({fault}): restore it, or convert what is left of it first")
        except (av.error.FFmpegError, ValueError, OverflowError, MemoryError) as error:
            _raise_for_memory(error)
            if not isinstance(error, av.error.FFmpegError):  # frames in a form that cannot be shown
                raise DataError(f"{path} holds a frame that cannot be decoded ({error}): convert it first") from None
            raise DataError(
                f"{path} is damaged, no video, or has frames above {max_pixels} pixels: {error.strerror}; convert or "
                f"cut it first"
            ) from None


def read_video(path: Path | str, max_frames: int = 100_000, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, float]:
    """All frames uint8 (T, h, w, 3) and the rate in frames per second. Raises DataError beyond a limit."""
    import numpy as np

    frames = []
    for frame in iter_video(path, max_pixels):
        if len(frames) == max_frames:
            raise DataError(f"{path} has more than {max_frames} frames: cut it, or raise the limit")
        frames.append(frame)
    if not frames:
        raise DataError(f"{path} holds no frames: record it again")
    return np.stack(frames), video_fps(path)


@contextmanager
def _opened(path: Path):
    """The container, the stream of its film, and the file that it reads."""
    if not path.is_file():
        raise DataError(f"{path} is not a file: give a video file")
    try:
        if fault := too_many(path) or too_many_entries(path):
            raise DataError(f"{path} is damaged or no video ({fault}): convert it first")
    except OSError as error:
        raise DataError(f"{path} cannot be read as video ({error.strerror}): make it readable") from None
    with _container(path, []) as (container, _):
        film = _film(container)
        if film is None:
            raise DataError(f"{path} holds no video stream: give an mp4, mkv, webm, avi, mov or gif")
        index, context = film.index, film.codec_context
        most = _most_pixels(context) if context.format else MAX_PIXELS  # not known: of it one picture is decoded
    with _container(path, [0] * index + [most]) as (container, file):
        yield container, container.streams[index], file


def _broken(path: Path) -> str:
    try:
        return broken(path)
    except OSError as error:
        raise DataError(f"{path} went away while it was decoded ({error.strerror}): put it back") from None


@contextmanager
def _container(path: Path, limits: Sequence[int]):
    """The container and the file that it reads. FFmpeg decodes the first pictures of every stream as it opens it, and
    keeps them: those of limits[i] pixels at most of stream i, none of the others."""
    import av

    with open(path, "rb") as raw:
        file = BoundedFile(raw, str(path))
        try:
            container = av.open(
                file,
                options={"format_whitelist": CONTAINERS, "max_pixels": "0"},
                stream_options=[{"max_pixels": str(most)} for most in limits],
            )
        except (av.error.FFmpegError, Broken) as error:
            _raise_for_memory(error)
            what = str(error) if isinstance(error, Broken) else error.strerror
            raise DataError(
                f"{path} cannot be read as video ({what}): give an mp4, mkv, webm, avi, mov or gif"
            ) from None
        with container:
            yield container, file


def _raise_for_memory(error: Exception) -> None:
    """MemoryError where an error may be one near the limit of memory; data that are invalid are so anywhere."""
    import av

    lacking = isinstance(error, (MemoryError, av.error.ExternalError))
    if (lacking or getattr(error, "errno", None) in (errno.ENOMEM, errno.EAGAIN)) and memory.at_limit():
        raise MemoryError(str(error)) from None


def _check_memory(path: Path | str, context: av.VideoCodecContext, threads: int) -> None:
    if _picture_bytes(context) * (_kept(context) + threads) > MEMORY:
        raise DataError(
            f"{path} takes more than {MEMORY / 1e6:g} MB to decode, {_picture_bytes(context) / 1e6:.0f} MB for each of "
            "the pictures that its decoder may keep: make it smaller, or convert it to yuv420p first"
        )


def _picture_bytes(context: av.VideoCodecContext) -> int:
    """Of one decoded picture, with what is cut off before it is shown."""
    shown, coded = context.width * context.height, context.coded_width * context.coded_height
    return max(shown, coded) * _bits(context) // 8


def _most_pixels(context: av.VideoCodecContext) -> int:
    """Of a picture, for those that the decoder keeps, and one of a single thread, to stay below MEMORY."""
    return 8 * MEMORY // _bits(context) // (_kept(context) + 1)


def _bits(context: av.VideoCodecContext) -> int:
    return context.format.padded_bits_per_pixel if context.format else WIDEST


def _kept(context: av.VideoCodecContext) -> int:
    return 1 if context.codec.intra_only else KEPT


def _film(container: av.container.InputContainer) -> av.VideoStream | None:
    """The first video that is no cover: not marked as one, not much shorter than another, nor in a format of single
    pictures beside one that is in none. None where there is no video of a known codec."""
    films = [stream for stream in container.streams.video if stream.codec_context and not stream.disposition & COVER]
    ends = [None if of_all else end for end, of_all in (stated_end(container, stream) for stream in films)]
    longest = max((end for end in ends if end is not None), default=0)
    films = [stream for stream, end in zip(films, ends, strict=True) if end is None or end >= longest / 2]
    return next((stream for stream in films if stream.codec_context.name not in STILLS), films[0] if films else None)
