"""What decoding a video may take in memory: bytes of a picture times the pictures that a decoder keeps."""

import gc
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from ahriuwu_cli.data import video
from ahriuwu_cli.data.video import KEPT, iter_video
from ahriuwu_cli.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
SIDE = 64
JUST = SIDE * SIDE * 3 // 2 * (KEPT + 1)  # bytes: the pictures of a single thread, 8 bits in yuv420p


def film(path: Path, codec: str = "libx264", pixels: str = "yuv420p", count: int = 5, side: int = SIDE) -> Path:
    with av.open(path, "w") as out:
        stream = out.add_stream(codec, rate=10)
        stream.width = stream.height = side
        stream.pix_fmt = pixels
        for i in range(count):
            picture = np.full((side, side, 3), 100 + i, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)))
        out.mux(stream.encode(None))
    return path


def copied(path: Path, *sources: Path, streams: int = 1, change: str = "null") -> Path:
    """The packets of films of H.264 one after the other, through FFmpeg's filter, in each of so many streams."""
    with av.open(path, "w") as out, av.open(sources[0]) as first:
        to, count = [out.add_stream_from_template(first.streams.video[0]) for _ in range(streams)], 0
        for source in sources:
            with av.open(source) as one:
                through = BitStreamFilterContext(change, one.streams.video[0])
                data = [bytes(p) for packet in one.demux(video=0) if packet.size for p in through.filter(packet)]
            for each in data:
                for stream in to:
                    packet = av.Packet(each)
                    packet.pts = packet.dts = count
                    packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), count == 0
                    out.mux(packet)
                count += 1
    return path


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "fits"),
    [
        ("a.mp4", "libx264", "yuv420p", True), ("a.mkv", "libx264", "yuv444p10le", False),
        ("a.mp4", "libx265", "yuv420p10le", False), ("a.webm", "libvpx-vp9", "yuv444p", False),
        ("a.avi", "mjpeg", "yuvj444p", True), ("a.mov", "prores_ks", "yuv422p10le", True),  # neither keeps any
    ],
)  # fmt: skip
def test_what_a_decoder_keeps_of_a_film_has_a_limit(tmp_path, monkeypatch, name, codec, pixels, fits):
    monkeypatch.setattr(video, "MEMORY", JUST)
    film(tmp_path / name, codec, pixels)
    if fits:
        assert len(list(iter_video(tmp_path / name))) == 5
        return
    with pytest.raises(DataError, match=r"takes more than .* MB to decode, .*: make it smaller, or convert"):
        list(iter_video(tmp_path / name))


def test_pictures_that_grow_within_a_film_or_are_cut_out_of_larger_ones_are_refused(tmp_path, monkeypatch):
    long, other = film(tmp_path / "a.h264", count=80), film(tmp_path / "b.h264", pixels="yuv444p10le", count=40)
    copied(tmp_path / "grows.avi", long, other)
    copied(tmp_path / "cut.avi", long, change="h264_metadata=crop_right=48:crop_bottom=48")
    for name, memory, reason in (("grows.avi", JUST, "to decode"), ("cut.avi", JUST // 16, "frames above 256 pixels")):
        assert len(list(iter_video(tmp_path / name))) > 75, name
        monkeypatch.setattr(video, "MEMORY", memory)
        with pytest.raises(DataError, match=reason):
            list(iter_video(tmp_path / name))
        monkeypatch.undo()


def test_large_pictures_are_decoded_in_fewer_threads(tmp_path, monkeypatch):
    film(tmp_path / "a.mp4")
    picture = JUST // (KEPT + 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    threads = []
    monkeypatch.setattr(video, "_check_memory", lambda path, context, _: threads.append(context.thread_count))
    for room in (1, 5, 15):
        monkeypatch.setattr(video, "MEMORY", picture * (KEPT + room))
        assert len(list(iter_video(tmp_path / "a.mp4"))) == 5
    assert list(dict.fromkeys(t for t in threads if t)) == [1, 5, 9]


def test_a_picture_is_let_go_with_its_frame(tmp_path):
    film(tmp_path / "a.mp4", count=30)
    gc.collect()
    gc.disable()
    try:
        assert len(list(iter_video(tmp_path / "a.mp4"))) == 30
        assert sum(type(each) is av.VideoFrame for each in gc.get_objects()) < 5
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["mkv", "mp4"])
def test_streams_that_are_not_read_are_not_decoded_when_a_film_is_opened(tmp_path, kind):
    one = film(tmp_path / "a.mp4", pixels="yuv444p10le", side=1024)
    copied(tmp_path / f"many.{kind}", one, streams=20)
    measure = (
        "import sys; from ahriuwu_cli.data.video import video_fps; video_fps(sys.argv[1])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for path in (one, tmp_path / f"many.{kind}"):
        command = [sys.executable, "-c", measure, str(path)]
        answer = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE)
        peaks.append(int(answer.stdout) * 1024)
    assert peaks[1] - peaks[0] < 40e6, peaks
