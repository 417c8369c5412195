"""Pictures as they are meant to be seen: turned as their file says, in 8 bits a channel."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av
    import numpy as np
    from PIL import Image


def upright_frame(frame: av.VideoFrame) -> np.ndarray:
    """A decoded frame as uint8 (h, w, 3), by the matrix that the video gives to players.

    ValueError for other turns than quarters.
    """
    import numpy as np
    from av.sidedata.sidedata import SideDataContainer

    picture = frame.to_ndarray(format="rgb24")
    # not frame.side_data, which the frame would keep: each would hold the other, and the picture, until a collection
    stated = SideDataContainer(frame).get("DISPLAYMATRIX")
    if stated is None:
        return picture
    right, down = np.frombuffer(stated, np.int32, 9).reshape(3, 3)[:2, :2]  # where x and y of the picture lead to
    if not (right.any() or down.any()):  # a matrix of nothing, which players take no notice of
        return picture
    if right[0] == down[1] == 0:  # x leads up or down, y to a side
        picture, right, down = picture.transpose(1, 0, 2), down, right
    if right[1] or down[0] or not right[0] or not down[1]:
        raise ValueError("it is to be shown turned by an angle that is no quarter")
    return np.ascontiguousarray(picture[:: np.sign(down[1]), :: np.sign(right[0])])


def upright_image(picture: Image.Image) -> np.ndarray:
    """An opened image as uint8 (h, w, 3), by its EXIF orientation. Raises what Pillow raises."""
    import numpy as np
    from PIL import Image

    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(_orientation(picture))  # fmt: skip
    picture = picture if turn is None else picture.transpose(turn)
    if not picture.mode.startswith("I"):
        return np.asarray(picture.convert("RGB"))
    grey = (np.asarray(picture).astype(np.int32) + 128) // 257  # 16 bits, which Pillow's own conversion clips
    return grey.clip(0, 255).astype(np.uint8)[..., None].repeat(3, axis=2)


def _orientation(picture: Image.Image) -> object:
    """What EXIF says, whatever else it holds; None where it cannot be read, which spoils no picture."""
    try:
        return picture.getexif().get(0x0112)
    except (OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, struct.error):
        return None
