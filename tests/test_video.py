"""Video: what is written decodes to the same count, size and rate, and the panels show what they say."""

import time

import av
import numpy as np
import pytest
from PIL import Image, ImageFont

from ahriuwu_cli.data import panels
from ahriuwu_cli.data.panels import CONTEXT, GENERATED, MAX_SIDE, Page, compose, compose_grid, largest_scale, page_size
from ahriuwu_cli.data.video import MAX_PIXELS, read_video
from ahriuwu_cli.data.video_writing import write_gif, write_mp4, write_strip
from ahriuwu_cli.errors import DataError, UserError


def _clip(t=9, h=32, w=48):
    ramp = np.linspace(0, 200, w)[None, None, :, None] + np.arange(t)[:, None, None, None] * 5
    return np.broadcast_to(ramp, (t, h, w, 3)).astype(np.uint8)


@pytest.mark.parametrize(("h", "w", "fps"), [(32, 48, 8.75), (33, 47, 30000 / 1001), (16, 16, 60)])
def test_an_mp4_decodes_to_what_was_written(tmp_path, h, w, fps):
    clip = _clip(9, h, w)
    write_mp4(tmp_path / "a.mp4", clip, fps)
    frames, rate = read_video(tmp_path / "a.mp4")
    assert frames.shape == (9, h + h % 2, w + w % 2, 3)
    assert rate == pytest.approx(fps, rel=1e-3)
    assert np.abs(frames[:, :h, :w].astype(int) - clip).mean() < 4
    with av.open(tmp_path / "a.mp4") as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    head = (tmp_path / "a.mp4").read_bytes()
    assert head.index(b"moov") < head.index(b"mdat")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_gif_and_a_strip_show_every_frame(tmp_path):
    clip = _clip()
    write_gif(tmp_path / "a.gif", clip, 10)
    frames, rate = read_video(tmp_path / "a.gif")
    assert frames.shape == clip.shape
    assert rate == pytest.approx(10, rel=0.05)
    write_strip(tmp_path / "a.png", clip, every=2, scale=2)
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    assert strip.shape == (64, 5 * 96 + 4 * 2, 3)
    np.testing.assert_array_equal(strip[::2, 98 : 98 + 96 : 2], clip[2])


def test_panels_are_upscaled_exactly_bordered_by_context_and_captioned():
    clip = _clip(4, 16, 16)
    film = compose([("truth", clip), ("rollout", 255 - clip)], scale=3, context=2, captions=["LEFT", "LEFT", "-"])
    assert film.shape[0] == 4
    assert not film.shape[1] % 2
    np.testing.assert_array_equal(film[3, 19:67, 3:51], clip[3].repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(film[3, 19:67, 57:105], 255 - clip[3].repeat(3, 0).repeat(3, 1))
    assert [tuple(film[t, 17, 1]) for t in range(4)] == [CONTEXT, CONTEXT, GENERATED, GENERATED]
    assert (film[1, -18:] != film[2, -18:]).any()


def test_text_is_cut_where_it_is_as_wide_as_the_picture_however_long_it_is():
    font, text = ImageFont.load_default(12), "".join(chr(97 + i * i % 26) for i in range(300))
    lengths = [font.getlength(text[:n] + "..") for n in range(len(text))]
    for width in range(0, 400, 7):
        fitting = [n for n, length in enumerate(lengths) if length <= width]
        assert panels._fit(text, width, font) == text[: max(fitting, default=0)] + "..", width
    assert panels._fit(text[:9], 100, font) == text[:9]
    begun = time.process_time()
    for endless in (text * 1000, "\u0301" * 300_000):  # the second has no width at all
        compose([(endless, _clip(4, 16, 16))], context=2, captions=[endless] * 4)
    assert time.process_time() - begun < 1  # 0.03; it would be hours if letters went one by one


def test_a_grid_lays_its_cells_row_by_row():
    cells = [(str(i), np.full((1, 8, 8, 3), 10 * i, np.uint8)) for i in range(5)]
    grid = compose_grid(cells, columns=3, scale=2)[0]
    cell_h, cell_w = 16 + 16 + 6, 16 + 6
    for i in range(5):
        assert tuple(grid[(i // 3) * cell_h + 25, (i % 3) * cell_w + 8]) == (10 * i,) * 3


@pytest.mark.parametrize(
    ("panels", "height", "width", "columns", "largest"),
    [(3, 16, 16, 4, 64), (3, 8, 1024, 4, 5), (1, 1024, 8, 4, 15), (9, 64, 64, 4, 18), (2, 4096, 4096, 4, 0)],
)
def test_a_page_is_enlarged_as_far_as_it_can_be_written(panels, height, width, columns, largest):
    scale = largest_scale(64, panels, height, width, columns)
    assert scale == largest
    for each in (scale, scale + 1) if 0 < scale < 64 else ():
        h, w = page_size(panels, height, width, columns, each)
        assert (h * w <= MAX_PIXELS and max(h, w) <= MAX_SIDE) == (each == scale)
    if scale:
        page = Page(["x"] * panels, height, width, columns=columns, scale=scale)
        assert page.shape[:2] == page_size(panels, height, width, columns, scale)


def test_a_picture_that_the_encoder_refuses_is_a_sentence_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match="of 17000x8 pixels"):
        write_mp4(tmp_path / "a.mp4", np.zeros((2, 8, 17000, 3), np.uint8), 10)
    assert not list(tmp_path.iterdir())


def test_what_is_no_video_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"not a video at all" * 50)
    with pytest.raises(DataError, match=r"a\.mp4"):
        read_video(tmp_path / "a.mp4")
    with pytest.raises(DataError, match="not a file"):
        read_video(tmp_path / "b.mp4")
    write_mp4(tmp_path / "c.mp4", _clip(), 10)
    with pytest.raises(DataError, match="more than 5 frames"):
        read_video(tmp_path / "c.mp4", max_frames=5)
    with pytest.raises(DataError, match="limit of 100 pixels"):
        read_video(tmp_path / "c.mp4", max_pixels=100)
    with pytest.raises(UserError, match="does not exist"):
        write_mp4(tmp_path / "no" / "d.mp4", _clip(), 10)


def _two_streams(path, first: tuple[str, str, int], second: tuple[str, str, int], marks=(0, 0)) -> None:
    """A file of two videos: codec, kind of pixels, and grey pictures of 60 in the first and 200 in the second."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream(codec, rate=10) for codec, _, _ in (first, second)]
        for stream, (_, pixels, _), mark in zip(streams, (first, second), marks, strict=True):
            stream.width = stream.height = 64
            stream.pix_fmt, stream.disposition = pixels, mark
        for stream, (_, pixels, count), grey in zip(streams, (first, second), (60, 200), strict=True):
            for _ in range(count):
                picture = np.full((64, 64, 3), grey, np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)))
            out.mux(stream.encode(None))


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mov", "avi", "live.mkv"])
def test_the_film_is_read_not_the_cover_before_it(tmp_path, kind):
    film, cover, short = ("mpeg4", "yuv420p", 20), ("mjpeg", "yuvj420p", 1), ("mpeg4", "yuv420p", 1)
    path = tmp_path / f"a.{kind}"
    for first, second, grey, count in [(cover, film, 200, 20), (film, cover, 60, 20), (short, film, 200, 20)]:
        if (kind, first) == ("live.mkv", short):
            continue  # nothing says how long it is
        _two_streams(path, first, second)
        if kind == "live.mkv":
            path.write_bytes(path.read_bytes().replace(b"DURATION", b"OTHERTAG"))
        frames, rate = read_video(path)
        assert (len(frames), rate) == (count, 10)
        assert abs(float(frames.mean()) - grey) < 4


def test_of_two_films_the_first_is_read(tmp_path):
    first, second = ("mpeg4", "yuv420p", 18), ("mpeg4", "yuv420p", 20)
    for kind in ("mp4", "mkv", "avi"):
        _two_streams(tmp_path / f"a.{kind}", first, second)
        assert len(read_video(tmp_path / f"a.{kind}")[0]) == 18


def test_a_marked_cover_is_no_film_however_long_it_is(tmp_path):
    cover, film = ("mjpeg", "yuvj420p", 1), ("mpeg4", "yuv420p", 1)
    _two_streams(tmp_path / "a.mp4", cover, film, marks=(0x400, 0))
    assert abs(float(read_video(tmp_path / "a.mp4")[0].mean()) - 200) < 4
