"""Frames to another size by exact area: every output pixel is the mean of the patch of input that it covers."""

from __future__ import annotations

import functools
import math
import re
from typing import TYPE_CHECKING

from ahriuwu_cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

MIN_SIDE, MAX_SIDE = 8, 1024
AT_ONCE = 1 << 20  # numbers that are laid beside each other at a time, which fits a cache


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "64" or "48x64" (HEIGHTxWIDTH), in pixels. Raises UserError."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
        raise UserError(
            f"the size {text!r} is not a side or HEIGHTxWIDTH within {MIN_SIDE} to {MAX_SIDE} pixels: give 64 or 48x64"
        )
    return height, width


def area_resize(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (h, w, 3) -> uint8 (height, width, 3). The picture is stretched where the aspects differ."""
    import numpy as np

    h, w = frame.shape[:2]
    if (h, w) == (height, width):
        return np.array(frame)
    rows = _area_mean(frame.reshape(h, w * 3), height)  # height, w*3
    turned = rows.reshape(height, w, 3).transpose(1, 0, 2).reshape(w, height * 3)
    both = _area_mean(turned, width).reshape(width, height, 3).transpose(1, 0, 2)  # height, width, 3
    return np.ascontiguousarray(both + 0.5).clip(0, 255).astype(np.uint8)


def centre_crop(frame: np.ndarray, height: int, width: int) -> np.ndarray:
    """The largest middle part of (h, w, 3) with the aspect of height : width."""
    h, w = frame.shape[:2]
    crop_h, crop_w = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    return frame[top : top + crop_h, left : left + crop_w]


def _area_mean(x: np.ndarray, target: int) -> np.ndarray:
    """(size, n) -> (target, n) float32 from the few inputs under each output (a matrix product wakes BLAS: far slower).

    Some outputs at a time: their inputs are laid beside each other, half a gigabyte of them for a large picture.
    """
    import numpy as np

    taps, shares = _area_taps(len(x), target)
    out = np.empty((target, x.shape[1]), np.float32)
    step = max(1, AT_ONCE // (taps.shape[1] * x.shape[1]))
    for i in range(0, target, step):
        some = slice(i, i + step)
        np.einsum("ok,okn->on", shares[some], x[taps[some]], out=out[some])
    return out


@functools.lru_cache(maxsize=32)
def _area_taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Which inputs lie under each output, and their shares, which sum to 1: both (target, K)."""
    import numpy as np

    edges = np.arange(target + 1) * (size / target)
    left, right = edges[:-1, None], edges[1:, None]
    taps = np.floor(left).astype(int) + np.arange(math.ceil(size / target) + 1)
    overlap = np.maximum(np.minimum(right, taps + 1) - np.maximum(left, taps), 0)
    return np.minimum(taps, size - 1), (overlap * target / size).astype(np.float32)
