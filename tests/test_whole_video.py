"""A video that was cut or damaged is refused, whatever its container; sound ones of every kind pass."""

from fractions import Fraction

import av
import numpy as np
import pytest

from ahriuwu_cli.data import whole_video
from ahriuwu_cli.data.importer import ImportConfig, import_videos, plan_import
from ahriuwu_cli.data.video import iter_video
from ahriuwu_cli.data.video_writing import write_gif, write_mp4
from ahriuwu_cli.errors import DataError

FRAMES = 40
CODECS = {"mkv": "libx264", "mov": "libx264", "mp4": "libx264", "avi": "libx264", "webm": "libvpx"}
STEADY = [100 * i for i in range(FRAMES)]  # ms
UNEVEN = list(np.cumsum(np.random.default_rng(1).integers(20, 400, FRAMES)))
PAUSED = [t + 5000 * (i >= 20) for i, t in enumerate(STEADY)]
LATE = [t + 3000 for t in STEADY]


def noisy() -> np.ndarray:
    """A bar that moves over noise: a few kilobytes a frame, so that a cut or a hole hits many frames."""
    frames = np.random.default_rng(0).integers(0, 60, (FRAMES, 64, 64, 3)).astype(np.uint8)
    for t in range(FRAMES):
        frames[t, :, 2 * t % 60 : 2 * t % 60 + 4] = 220
    return frames


def film(path, codec, times=None, sound=0, **options) -> None:
    """The noisy frames by PyAV, ten a second or at their times in ms; sound: seconds of silence beside them."""
    with av.open(str(path), "w", options=options) as out:
        stream = out.add_stream(codec, rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        voice = out.add_stream("libopus", rate=48_000) if sound else None
        for i, picture in enumerate(noisy()):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            if times:
                frame.pts, frame.time_base = int(times[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if voice:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 48_000 * sound), np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts = 48_000, 0
            rates = {"rate": 48_000, "frame_size": voice.codec_context.frame_size}
            change = av.AudioResampler(format=voice.codec_context.format, layout=voice.codec_context.layout, **rates)
            for piece in [*change.resample(silence), *change.resample(None)]:
                out.mux(voice.encode(piece))
            out.mux(voice.encode(None))


def count(path) -> int:
    return sum(1 for _ in iter_video(path))


@pytest.mark.parametrize("kind", CODECS)
def test_sound_videos_pass_with_all_their_frames(tmp_path, kind):
    for name, times in {"plain": None, "uneven": UNEVEN, "paused": PAUSED, "late": LATE}.items():
        film(tmp_path / f"{name}.{kind}", CODECS[kind], times)
        assert count(tmp_path / f"{name}.{kind}") == FRAMES, name


def test_sound_that_is_longer_than_its_pictures_needs_no_tag_that_says_so(tmp_path):
    """Not every writer states each stream's length; sound may be said to end some ms after its last packet."""
    film(tmp_path / "a.webm", "libvpx", sound=9)
    data = (tmp_path / "a.webm").read_bytes()
    assert b"DURATION" in data
    (tmp_path / "a.webm").write_bytes(data.replace(b"DURATION", b"OTHERTAG"))
    assert count(tmp_path / "a.webm") == FRAMES


def test_sound_that_is_longer_or_shorter_than_its_pictures_is_no_damage(tmp_path):
    for seconds in (1, 9):
        for name, codec in (("a.webm", "libvpx-vp9"), ("a.mkv", "libx264"), ("a.mp4", "libx264")):
            film(tmp_path / name, codec, sound=seconds)
            assert count(tmp_path / name) == FRAMES, (name, seconds)


def test_our_own_videos_and_live_ones_pass(tmp_path):
    write_mp4(tmp_path / "own.mp4", noisy(), 30000 / 1001)
    write_gif(tmp_path / "own.gif", noisy(), 10)
    film(tmp_path / "live.mkv", "libx264", live="1")  # states no lengths
    film(tmp_path / "live.mp4", "libx264", movflags="frag_keyframe+empty_moov")
    for name in ("own.mp4", "own.gif", "live.mkv", "live.mp4"):
        assert count(tmp_path / name) == FRAMES, name


def damaged(path):
    """The file cut to two thirds, with 3,000 zeros in its middle, and without them."""
    whole = path.read_bytes()
    middle, hole = len(whole) // 2, min(3000, len(whole) // 4)
    yield "cut", whole[: len(whole) * 2 // 3]
    yield "zeros", whole[:middle] + bytes(hole) + whole[middle + hole :]
    yield "hole", whole[:middle] + whole[middle + hole :]


@pytest.mark.parametrize("kind", [*CODECS, "gif", "own.mp4"])
def test_a_video_that_was_cut_or_has_a_hole_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "gif":
        write_gif(path, noisy(), 10)
    elif kind == "own.mp4":
        write_mp4(path, noisy(), 10)
    else:
        film(path, CODECS[kind])
    for name, content in damaged(path):
        path.write_bytes(content)
        with pytest.raises(DataError):
            print(name, count(path), "frames were accepted")


FRAGMENTS = {
    "plain": "empty_moov",
    "own places": "empty_moov+default_base_moof",
    "dash": "empty_moov+dash",
    "listed": "empty_moov+dash+global_sidx",
    "cmaf": "empty_moov+cmaf+skip_trailer",
}


def boxes(data: bytes) -> list[tuple[bytes, int, int]]:
    """Names, beginnings and ends of the outermost boxes."""
    found, at = [], 0
    while at < len(data):
        found.append((data[at + 4 : at + 8], at, at + int.from_bytes(data[at : at + 4])))
        at = found[-1][2]
    return found


@pytest.mark.parametrize("flags", FRAGMENTS.values(), ids=FRAGMENTS)
def test_an_mp4_in_fragments_passes_whole_and_in_no_other_way(tmp_path, flags):
    film(tmp_path / "a.mp4", "libx264", sound=3, frag_duration="700000", movflags=flags)
    whole = (tmp_path / "a.mp4").read_bytes()
    parts = boxes(whole)
    fragments = [begin for name, begin, _ in parts if name == b"moof"]
    assert len(fragments) > 3
    free = b"\0\0\0\x0cfree1234"
    renumbered = bytearray(whole)
    for i, begin in enumerate(fragments):
        renumbered[begin + 20 : begin + 24] = (10 * i + 10).to_bytes(4)
    untailed = whole[: next((begin for name, begin, _ in parts if name == b"mfra"), len(whole))]
    late = [whole[: fragments[0]], whole[fragments[2] :]]  # as a stream that was joined late
    for content in (whole, whole + free, untailed + free, bytes(renumbered)):
        (tmp_path / "a.mp4").write_bytes(content)
        assert count(tmp_path / "a.mp4") == FRAMES
    if flags != FRAGMENTS["plain"]:  # which counts its bytes from the first of the file
        (tmp_path / "a.mp4").write_bytes(b"".join(late))
        assert 0 < count(tmp_path / "a.mp4") < FRAMES
    third = fragments[2]
    for content in (
        *(whole[: third + more] for more in (3, 9, 40, 100)),
        *(untailed + tail for tail in (b"\0", bytes(3000), b"\0\0\1\0moof")),
        whole[: fragments[1]] + whole[fragments[2] :],
        whole[: third + 40] + bytes(24) + whole[third + 64 :],
    ):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(DataError):
            print(len(content) - third, count(tmp_path / "a.mp4"), "frames were accepted")


def test_fragments_whose_list_says_that_more_follow_are_refused(tmp_path):
    film(tmp_path / "a.mp4", "libx264", frag_duration="700000", movflags=FRAGMENTS["listed"])
    whole = (tmp_path / "a.mp4").read_bytes()
    fourth = [begin for name, begin, _ in boxes(whole) if name == b"moof"][3]
    (tmp_path / "a.mp4").write_bytes(whole[:fourth])  # exactly between two
    with pytest.raises(DataError, match=r"it states 4\.20 s"):
        count(tmp_path / "a.mp4")


def test_a_video_that_goes_away_while_it_is_decoded_is_a_sentence(tmp_path):
    write_mp4(tmp_path / "a.mp4", np.zeros((20, 32, 32, 3), np.uint8), 10)
    frames = iter_video(tmp_path / "a.mp4")
    next(frames)
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(DataError, match="went away while it was decoded"):
        list(frames)


def test_import_refuses_a_short_video_in_one_sentence(tmp_path):
    film(tmp_path / "a.mkv", "libvpx")
    whole = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(DataError, match=r"a\.mkv is damaged \(it .*\): restore it"):
        list(import_videos(plan_import(ImportConfig(tmp_path))))


def test_a_prompt_of_the_first_frames_may_come_from_a_video_that_was_cut(tmp_path):
    film(tmp_path / "a.mkv", "libvpx")
    whole = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    frames = iter_video(tmp_path / "a.mkv")
    assert [next(frames).shape for _ in range(8)] == [(64, 64, 3)] * 8


@pytest.mark.parametrize("content", [
    b"GIF89a" + bytes(7) + b"\x21\xfe\0" * 100 + b"\x3b",
    b"GIF89a" + bytes(7) + b"\x21\xfe" + b"\1x" * 100 + b"\0\x3b",
    b"RIFF\4\0\0\0AVI " * 100,
    b"RIFF\x24\3\0\0AVI " + b"JUNK\0\0\0\0" * 100,
    b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff" + b"\xec\x80" * 100,
])  # fmt: skip
def test_parts_without_content_are_counted_too(tmp_path, monkeypatch, content):
    (tmp_path / "v").write_bytes(content)
    monkeypatch.setattr(whole_video, "MOST_PARTS", 50)
    assert whole_video.broken(tmp_path / "v") == f"it has more than 50 parts in {len(content)} bytes"


def test_the_parts_of_a_file_are_as_many_as_its_bytes_allow(tmp_path, monkeypatch):
    head = b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff"
    (tmp_path / "v").write_bytes(head + b"\xec\x80" * 500_001)  # a megabyte
    assert whole_video.broken(tmp_path / "v") == "it has more than 500000 parts in 1000012 bytes"
    monkeypatch.setattr(whole_video, "FEW_PARTS", 50)
    (tmp_path / "v").write_bytes(head + (b"\xec\x96" + bytes(22)) * 100)
    assert not whole_video.broken(tmp_path / "v")
    monkeypatch.setattr(whole_video, "MOST_PARTS", 99)
    assert whole_video.broken(tmp_path / "v") == "it has more than 99 parts in 2410 bytes"


def test_packets_without_a_picture_are_counted_as_well(tmp_path, monkeypatch):
    film(tmp_path / "a.webm", "libvpx", sound=1)
    whole = (tmp_path / "a.webm").read_bytes()
    (tmp_path / "a.webm").write_bytes(whole.replace(b"DURATION", b"duration"))  # so that all streams are looked at
    assert count(tmp_path / "a.webm") == FRAMES
    monkeypatch.setattr(whole_video, "broken", lambda path: "")
    monkeypatch.setattr(whole_video, "MOST_PARTS", 40)
    with pytest.raises(DataError, match="it has more than 40 parts"):
        count(tmp_path / "a.webm")
