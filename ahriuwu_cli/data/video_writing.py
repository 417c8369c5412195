"""Frames as files for people: mp4 that every player opens, GIF, and strips of pictures as PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ahriuwu_cli import memory
from ahriuwu_cli.disk import arriving
from ahriuwu_cli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

LARGE = 1 << 20  # pixels of a picture from which on an encoder's memory counts


def write_mp4(path: Path | str, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3), see `mp4_writer`."""
    _check(path, frames, fps)
    with mp4_writer(path, *frames.shape[1:3], fps) as add:
        for picture in frames:
            add(picture)


@contextmanager
def mp4_writer(path: Path | str, height: int, width: int, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yields add(picture), uint8 (height, width, 3): an H.264 yuv420p mp4 that grows frame by frame, index first.

    An odd side is padded by one repeated pixel. The file has its name when all went well, else there is none.
    UserError where the encoder does not take such pictures.
    """
    import av
    import numpy as np
    from av.video.reformatter import VideoReformatter

    # x264 holds sixty pictures of seven bytes a pixel, to look ahead; of large ones it gets the one that it is at
    large = {"tune": "zerolatency", "refs": "1"} if height * width > LARGE else {}
    with (
        _renamed(Path(path)) as temporary,
        _encoding(path, height, width),
        av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"} | large)
        stream.height, stream.width = height + height % 2, width + width % 2
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.codec_context.color_range = 1  # 1: BT.709, and the range of television

        convert = VideoReformatter()  # one for all: setting it up costs more than a small picture

        def add(picture: np.ndarray) -> None:
            if height % 2 or width % 2:
                picture = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            out.mux(stream.encode(convert.reformat(frame, format="yuv420p", dst_colorspace="ITU709")))

        yield add
        out.mux(stream.encode(None))


def write_gif(path: Path | str, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3), see `save_gif`."""
    _check(path, frames, fps)
    save_gif(path, [gif_picture(frame) for frame in frames], fps)


def gif_picture(frame: np.ndarray) -> Image.Image:
    """A frame as a GIF holds it, in 256 colours of its own: a byte a pixel."""
    from PIL import Image

    return Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)


def save_gif(path: Path | str, pictures: list[Image.Image], fps: float) -> None:
    """Write a looping GIF. Its clock ticks in 10 ms; equal neighbours become one longer frame."""
    ends = [round((i + 1) * 100 / fps) * 10 for i in range(len(pictures))]
    longest = 655_350 // len(pictures) // 10 * 10  # ms: a picture's time has 16 bits, that of equal ones summed
    durations = [min(max(20, b - a), longest) for a, b in zip([0, *ends], ends, strict=False)]
    with _renamed(Path(path)) as temporary:
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1
        )


def write_strip(path: Path | str, frames: np.ndarray, *, every: int = 1, scale: int = 1, gap: int = 2) -> None:
    """Write every n-th of uint8 (T, H, W, 3) side by side into one PNG, lossless, with a white gap in pixels."""
    import numpy as np
    from PIL import Image

    _check(path, frames, 1)
    shown = frames[::every].repeat(scale, 1).repeat(scale, 2)
    t, h, w, _ = shown.shape
    strip = np.full((h, t * (w + gap) - gap, 3), 255, np.uint8)
    for i, frame in enumerate(shown):
        strip[:, i * (w + gap) : i * (w + gap) + w] = frame
    with _renamed(Path(path)) as temporary:
        Image.fromarray(strip).save(temporary, format="PNG")


def _check(path: Path | str, frames: np.ndarray, fps: float) -> None:
    assert (frames.dtype, frames.shape[3:]) == ("uint8", (3,)), (frames.dtype, frames.shape)
    if len(frames) == 0 or not fps > 0:
        raise DataError(f"{path} cannot be written from {len(frames)} frames at {fps} frames per second")


@contextmanager
def _encoding(path: Path | str, height: int, width: int) -> Iterator[None]:
    """UserError where FFmpeg refuses what is written; a disk's refusal is an OSError like any other."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
        if memory.at_limit():
            raise MemoryError(str(error)) from None
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, error.filename) from None  # PyAV's lets nobody name its file
        raise UserError(
            f"{path} cannot be written as video of {width}x{height} pixels ({error.strerror}): give a smaller --scale, "
            "or fewer pictures side by side"
        ) from None


@contextmanager
def _renamed(path: Path) -> Iterator[str]:
    """A temporary name beside path, which takes its place when all went well and vanishes otherwise."""
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist: make it, or write elsewhere")
    with arriving(path) as temporary:
        yield str(temporary)
        os.replace(temporary, path)
