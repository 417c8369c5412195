"""Video for people: read with limits, written so that every player opens it, panels side by side with text drawn in."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ahriuwu_cli.data.metadata import MAX_FPS, MIN_FPS
from ahriuwu_cli.data.mp4_index import too_many
from ahriuwu_cli.disk import arriving
from ahriuwu_cli.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_PIXELS = 4096 * 4096
MAX_SIDE = 16_384  # pixels of a side of a picture that is written: x264 takes no more
LARGE = 1 << 20  # pixels of a picture from which on an encoder's memory counts
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
    """The pictures of `timed_frames`."""
    for _, picture in timed_frames(path, max_pixels):
        yield picture


def timed_frames(path: Path | str, max_pixels: int = MAX_PIXELS) -> Iterator[tuple[float | None, np.ndarray]]:
    """Decode a video frame by frame: seconds, where the file says them, and uint8 (h, w, 3), turned as players do.

    Raises DataError when it is not one, is damaged, changes its size, or is larger than a limit: the decoder itself is
    told the most pixels of a frame, whatever the file says of them. Whether all of it came is known at its end.
    """
    import av

    from ahriuwu_cli.data.upright import upright_frame
    from ahriuwu_cli.data.whole_video import Clock, broken

    with _opened(Path(path)) as (container, stream):
        if stream.width * stream.height > max_pixels:
            raise DataError(f"{path} is {stream.width}x{stream.height}, above the limit of {max_pixels} pixels a frame")
        stream.codec_context.options = {"max_pixels": str(max_pixels)}
        stream.thread_type = "AUTO"
        size, decoded, clock = None, 0, Clock(container, stream)
        untimed = container.format.name == "avi"  # FFmpeg gives its frames the times of packets, in another order
        try:
            for frame in clock.frames(container, stream):
                pixels = frame.height * frame.width
                decoded += pixels
                if pixels > max_pixels or decoded > MAX_DECODED:
                    raise DataError(f"{path} has more than {MAX_DECODED:g} pixels in all: cut it, or make it smaller")
                picture = upright_frame(frame)
                size = size or picture.shape[:2]
                if size != picture.shape[:2]:
                    raise DataError(f"{path} changes its size from {size} to {picture.shape[:2]}: convert it first")
                yield None if untimed else frame.time, picture
            if fault := clock.fault() or broken(Path(path)):
                raise DataError(f"{path} is damaged ({fault}): restore it, or convert what is left of it first")
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

    shapes = {frames.shape for _, frames in cells}
    assert len(shapes) == 1, shapes
    length, h, w, _ = shapes.pop()
    page = Page([title for title, _ in cells], h, w, columns=columns, scale=scale, context=context, captions=captions)
    return np.stack([page.picture(t, [frames[t] for _, frames in cells]) for t in range(length)])


def page_size(panels: int, height: int, width: int, columns: int, scale: int) -> tuple[int, int]:
    """Height and width of a `Page` of panels of height x width."""
    columns = min(columns, panels)
    end = -(-panels // columns) * (TITLE + height * scale + 2 * BORDER) + FOOTER
    return end + end % 2, columns * (width * scale + 2 * BORDER)


def largest_scale(most: int, panels: int, height: int, width: int, columns: int, max_pixels: int = MAX_PIXELS) -> int:
    """The largest enlargement up to `most` at which a `Page` has no more pixels, and can be written; 0: not even 1."""
    for scale in range(most, 0, -1):
        h, w = page_size(panels, height, width, columns, scale)
        if h * w <= max_pixels and max(h, w) <= MAX_SIDE:
            return scale
    return 0


class Page:
    """The grid of `compose_grid`, drawn frame by frame: its titles are laid out once. height, width are a panel's."""

    def __init__(
        self,
        titles: list[str],
        height: int,
        width: int,
        *,
        columns: int = 4,
        scale: int = 4,
        context: int = 0,
        captions: list[str] | None = None,
    ) -> None:
        import numpy as np
        from PIL import Image, ImageDraw, ImageFont

        self.scale, self.context, self.captions = scale, context, captions or []
        self._side = (height * scale, width * scale)
        cell_h, cell_w = TITLE + self._side[0] + 2 * BORDER, self._side[1] + 2 * BORDER
        columns = min(columns, len(titles))
        self._end = -(-len(titles) // columns) * cell_h + FOOTER
        self._font = ImageFont.load_default(FONT)
        page = Image.new("RGB", page_size(len(titles), height, width, columns, scale)[::-1], PAPER)
        draw = ImageDraw.Draw(page)
        self._corners = [((i // columns) * cell_h, (i % columns) * cell_w) for i in range(len(titles))]
        for (top, left), title in zip(self._corners, titles, strict=True):
            draw.text((left + BORDER, top + 1), _fit(title, cell_w - BORDER, self._font), INK, self._font)
        self._blank = np.asarray(page)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a picture: (H', W', 3)."""
        return self._blank.shape

    def picture(self, t: int, panels: list[np.ndarray]) -> np.ndarray:
        """Frame t of the film, uint8 (H', W', 3), from frame t of every panel, uint8 (H, W, 3)."""
        import numpy as np
        from PIL import Image, ImageDraw

        out, given = self._blank.copy(), t < self.context
        caption = self.captions[t] if t < len(self.captions) else ""
        footer = Image.new("RGB", (out.shape[1], FOOTER), PAPER)
        text = _fit(f"{t:4d}  {caption}", out.shape[1] - BORDER, self._font)
        ImageDraw.Draw(footer).text((BORDER, 1), text, CONTEXT if given else INK, self._font)
        out[self._end - FOOTER : self._end] = np.asarray(footer)
        h, w = self._side
        for (top, left), panel in zip(self._corners, panels, strict=True):
            out[top + TITLE : top + TITLE + h + 2 * BORDER, left : left + w + 2 * BORDER] = (
                CONTEXT if given else GENERATED
            )
            top, left = top + TITLE + BORDER, left + BORDER
            out[top : top + h, left : left + w] = panel.repeat(self.scale, 0).repeat(self.scale, 1)
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
        if fault := too_many(path):
            raise DataError(f"{path} is damaged or no video ({fault}): convert it first")
    except OSError as error:
        raise DataError(f"{path} cannot be read as video ({error.strerror}): make it readable") from None
    try:
        container = av.open(path, options={"format_whitelist": CONTAINERS}, timeout=PATIENCE)
    except av.error.FFmpegError as error:
        raise DataError(
            f"{path} cannot be read as video ({error.strerror}): give an mp4, mkv, webm, avi, mov or gif"
        ) from None
    with container:
        if not container.streams.video or container.streams.video[0].codec_context is None:  # or of no known codec
            raise DataError(f"{path} holds no video stream: give an mp4, mkv, webm, avi, mov or gif")
        yield container, container.streams.video[0]


@contextmanager
def _encoding(path: Path | str, height: int, width: int) -> Iterator[None]:
    """UserError where FFmpeg refuses what is written; a disk's refusal is an OSError like any other."""
    import av

    try:
        yield
    except av.error.FFmpegError as error:
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


def _fit(text: str, width: int, font) -> str:
    """The text, cut with dots where it is wider than width pixels. No more letters than pixels are ever measured."""
    if len(text) <= width and font.getlength(text) <= width:
        return text
    fitting = bisect_right(range(min(len(text), width)), width, key=lambda n: font.getlength(text[:n] + ".."))
    return text[: max(0, fitting - 1)] + ".."
