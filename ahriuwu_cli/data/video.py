"""Video for people: read with limits, written so that every player opens it, panels side by side with text drawn in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ahriuwu_cli.data.metadata import MAX_FPS, MIN_FPS
from ahriuwu_cli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 4096 * 4096
MAX_DECODED = 400_000_000_000  # pixels of all frames that are decoded of one video: 190,000 frames of 1920 x 1080
PATIENCE = 60.0  # seconds in which a file must give its next packet
# Containers that hold their pictures themselves. Others (playlists, lists of files) would open what they name.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif"
CONTEXT = (255, 170, 0)  # frames that were given
GENERATED = (60, 130, 230)  # frames that were made
INK, PAPER = (235, 235, 235), (24, 24, 24)
BORDER, TITLE, FOOTER, FONT = 3, 16, 18, 12


def video_fps(path: Path | str) -> float:
    """The frame rate that a video file states, in frames per second. Raises DataError."""
    with _opened(Path(path)) as (_, stream):
        rate = stream.average_rate or stream.guessed_rate
        if not rate or not MIN_FPS <= rate <= MAX_FPS:
            raise DataError(f"{path} does not state its frame rate, or one that no video has: convert it to mp4 first")
        return float(rate)


def iter_video(path: Path | str, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
    """Decode a video frame by frame, uint8 (h, w, 3), all of one size.

    Raises DataError when it is not one, is damaged, changes its size, or is larger than a limit: the decoder itself is
    told the most pixels of a frame, whatever the file says of them.
    """
    import av

    with _opened(Path(path)) as (container, stream):
        if stream.width * stream.height > max_pixels:
            raise DataError(f"{path} is {stream.width}x{stream.height}, above the limit of {max_pixels} pixels a frame")
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stream.thread_type = "AUTO"
        size, decoded = None, 0
        try:
            for frame in container.decode(stream):
                size = size or (frame.height, frame.width)
                if size != (frame.height, frame.width):
                    raise DataError(
                        f"{path} changes its size from {size} to {(frame.height, frame.width)}: convert it first"
                    )
                decoded += size[0] * size[1]
                if size[0] * size[1] > max_pixels or decoded > MAX_DECODED:
                    raise DataError(f"{path} has more than {MAX_DECODED:g} pixels in all: cut it, or make it smaller")
                yield frame.to_ndarray(format="rgb24")
        except av.error.FFmpegError as error:
            raise DataError(
                f"{path} is damaged, no video, or has frames above {max_pixels} pixels: {error.strerror}; convert or "
                f"cut it first"
            ) from None
        except (ValueError, OverflowError, MemoryError) as error:  # frames in a form that cannot be shown
            raise DataError(f"{path} holds a frame that cannot be decoded ({error}): convert it first") from None


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


def write_mp4(path: Path | str, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3) as H.264 yuv420p mp4, index first; an odd side is padded by one repeated pixel."""
    import av
    import numpy as np

    _check(path, frames, fps)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with (
        _renamed(Path(path)) as temporary,
        av.open(temporary, "w", format="mp4", options={"movflags": "+faststart"}) as out,
    ):
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "18"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 1
        stream.codec_context.color_range = 1  # 1: BT.709, and the range of television
        for picture in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            out.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        out.mux(stream.encode(None))


def write_gif(path: Path | str, frames: np.ndarray, fps: float) -> None:
    """Write uint8 (T, H, W, 3) as a looping GIF. Its clock ticks in 10 ms; equal neighbours become one longer frame."""
    from PIL import Image

    _check(path, frames, fps)
    pictures = [Image.fromarray(f).quantize(256, dither=Image.Dither.NONE) for f in frames]
    ends = [round((i + 1) * 100 / fps) * 10 for i in range(len(frames))]
    longest = 655_350 // len(frames) // 10 * 10  # ms: GIF counts a picture's time in 16 bits, that of equal ones summed
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


def compose(
    panels: list[tuple[str, np.ndarray]], *, scale: int = 4, context: int = 0, captions: list[str] | None = None
) -> np.ndarray:
    """Panels (title, uint8 (T, H, W, 3)) side by side -> uint8 (T, H', W', 3), upscaled by nearest neighbour.

    The first `context` frames get the border of CONTEXT, the rest of GENERATED; the footer shows the frame's index and
    captions[t]. All panels need the same T; captions may be shorter.
    """
    return compose_grid(panels, columns=len(panels), scale=scale, context=context, captions=captions)


def compose_grid(
    cells: list[tuple[str, np.ndarray]],
    *,
    columns: int = 4,
    scale: int = 4,
    context: int = 0,
    captions: list[str] | None = None,
) -> np.ndarray:
    """As `compose`, with the cells laid row by row, `columns` to a row. All need the same shape."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    shapes = {frames.shape for _, frames in cells}
    assert len(shapes) == 1, shapes
    length, h, w, _ = shapes.pop()
    cell_h, cell_w = TITLE + h * scale + 2 * BORDER, w * scale + 2 * BORDER
    columns = min(columns, len(cells))
    height = -(-len(cells) // columns) * cell_h + FOOTER
    font = ImageFont.load_default(FONT)

    page = Image.new("RGB", (columns * cell_w, height + height % 2), PAPER)
    draw = ImageDraw.Draw(page)
    corners = [((i // columns) * cell_h, (i % columns) * cell_w) for i in range(len(cells))]
    for (top, left), (title, _) in zip(corners, cells, strict=True):
        draw.text((left + BORDER, top + 1), _fit(title, cell_w - BORDER, font), INK, font)
    blank = np.asarray(page)

    out = np.empty((length, *blank.shape), np.uint8)
    for t in range(length):
        caption = captions[t] if captions and t < len(captions) else ""
        footer = Image.new("RGB", (blank.shape[1], FOOTER), PAPER)
        text = _fit(f"{t:4d}  {caption}", blank.shape[1] - BORDER, font)
        ImageDraw.Draw(footer).text((BORDER, 1), text, CONTEXT if t < context else INK, font)
        out[t] = blank
        out[t, height - FOOTER : height] = np.asarray(footer)
        for (top, left), (_, frames) in zip(corners, cells, strict=True):
            out[t, top + TITLE : top + cell_h, left : left + cell_w] = CONTEXT if t < context else GENERATED
            picture = frames[t].repeat(scale, 0).repeat(scale, 1)
            top, left = top + TITLE + BORDER, left + BORDER
            out[t, top : top + h * scale, left : left + w * scale] = picture
    return out


def _check(path: Path | str, frames: np.ndarray, fps: float) -> None:
    assert (frames.dtype, frames.shape[3:]) == ("uint8", (3,)), (frames.dtype, frames.shape)
    if len(frames) == 0 or not fps > 0:
        raise DataError(f"{path} cannot be written from {len(frames)} frames at {fps} frames per second")


@contextmanager
def _opened(path: Path):
    """The container and its first video stream."""
    import av

    if not path.is_file():
        raise DataError(f"{path} is not a file: give a video file")
    try:
        container = av.open(path, options={"format_whitelist": CONTAINERS}, timeout=PATIENCE)
    except av.error.FFmpegError as error:
        raise DataError(
            f"{path} cannot be read as video ({error.strerror}): give an mp4, mkv, webm, avi, mov or gif"
        ) from None
    with container:
        if not container.streams.video:
            raise DataError(f"{path} holds no video stream: give an mp4, mkv, webm, avi, mov or gif")
        yield container, container.streams.video[0]


@contextmanager
def _renamed(path: Path) -> Iterator[str]:
    """A temporary name beside path, which takes its place when all went well and vanishes otherwise."""
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist: make it, or write elsewhere")
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        yield str(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _fit(text: str, width: int, font) -> str:
    """The text, cut with dots where it is wider than width pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "..") > width:
        text = text[:-1]
    return text + ".."
