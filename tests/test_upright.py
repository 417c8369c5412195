"""Pictures come in as players and viewers show them, whatever way round they are stored, and 16 bits become 8."""

import zlib

import numpy as np
import pytest
from PIL import Image
from small import small_world

from ahriuwu_cli.data.video import iter_video
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.prompts import Request, read_prompts

CORNERS = np.zeros((32, 48, 3), np.uint8)
CORNERS[:16, :24], CORNERS[:16, 24:], CORNERS[16:, :24] = (250, 0, 0), (0, 250, 0), (0, 0, 250)  # the fourth is black
TURNS = [(0, False, False), (90, False, False), (-90, False, False), (180, False, False),
         (0, True, False), (0, False, True), (90, True, False), (90, False, True)]  # fmt: skip


def film(path, *turn):
    import av

    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv444p"
        stream.set_display_rotation(*turn)
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(CORNERS, format="rgb24")))
        out.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("turn", TURNS, ids=str)
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_video_is_turned_and_mirrored_as_it_says(tmp_path, turn, container):
    degrees, sideways, upside = turn
    wanted = np.rot90(CORNERS, degrees // 90)[:: -1 if upside else 1, :: -1 if sideways else 1]
    frames = list(iter_video(film(tmp_path / f"a.{container}", *turn)))
    assert len(frames) == 3
    assert frames[0].shape == wanted.shape
    assert np.abs(frames[0].astype(int) - wanted).mean() < 8


def test_a_video_that_is_turned_by_no_quarter_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.mp4 .*turned by an angle that is no quarter"):
        list(iter_video(film(tmp_path / "a.mp4", 45)))


def prompt(path) -> np.ndarray:
    return read_prompts(small_world(), Request(path, context=1, length=1))[0].context[0]


EXIF = {1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, -1), 7: lambda p: np.rot90(p, 2).transpose(1, 0, 2), 8: np.rot90}  # fmt: skip


@pytest.mark.parametrize("orientation", EXIF)
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_an_image_is_turned_as_its_camera_was_held(tmp_path, orientation, ending):
    pixels = CORNERS[::2, 8:40:2]
    image, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"a.{ending}", exif=exif, quality=100)
    assert np.abs(prompt(tmp_path / f"a.{ending}").astype(int) - EXIF[orientation](pixels)).mean() < 12


def test_16_bits_of_grey_become_8(tmp_path):
    grey = np.arange(256).reshape(16, 16)
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    np.testing.assert_array_equal(prompt(tmp_path / "a.png"), grey[..., None].repeat(3, axis=2))


def test_exif_that_makes_no_sense_spoils_no_picture(tmp_path):
    pixels = CORNERS[::2, 8:40:2]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    stored = prompt(tmp_path / "plain.png")
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    wanted = prompt(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    at = data.index(b"eXIf")
    for kind in range(1, 14):  # the words as numbers, fractions, ...
        block = bytearray(data)
        big = data[at + 4 : at + 6] == b"MM"
        block[data.index(b"\x01\x0e\x00\x02" if big else b"\x0e\x01\x02\x00", at) + (3 if big else 2)] = kind
        length = int.from_bytes(block[at - 4 : at])
        block[at + 4 + length : at + 8 + length] = zlib.crc32(block[at : at + 4 + length]).to_bytes(4)
        (tmp_path / "b.png").write_bytes(block)
        shown = prompt(tmp_path / "b.png")  # turned, or as it is stored where all of it cannot be read
        assert any(np.array_equal(shown, either) for either in (wanted, stored)), kind
