"""Rows of safetensors files, read straight into memory, and their headers, checked before they are believed.

`preadv` instead of a memory map: a file that shrinks or a disk that fails becomes a sentence where a map would end the
process, and no map or open file stays behind for each of 100,000 episodes.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype as safetensors names it, shape, first byte within the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. Raises DataError when the header and the file do not agree."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path | str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Sizes are checked before memory is taken.

    Raises DataError when the header and the file do not agree, or where tensors overlap or leave holes.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DataError(f"{path} is not a safetensors file, or is cut short ({size} bytes): make it again")
            header = json.loads(file.read(length))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} has a safetensors header that is not JSON: make it again") from None
    if not isinstance(header, dict):
        raise DataError(f"{path} has a safetensors header that is not an object: make it again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError(f"{path} has safetensors metadata that are not texts: make it again")
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, _bytes(item[1]))):
        if info.offset != end:
            raise DataError(f"{path}: the tensor {name!r} does not begin where the one before ends: make it again")
        end += _bytes(info)
    if end != size:
        raise DataError(f"{path} has {size} bytes but its header describes {end}: the file is damaged, make it again")
    return tensors, metadata


def make_header(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file with tensors {name: (dtype, shape)}, in this order. DataError: too long.

    Same tensors and texts of the same length give a header of the same length, so it can be written again in place.
    """
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name, (dtype, shape) in shapes.items():
        size = _bytes(TensorInfo(dtype, shape, 0))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise DataError(f"{path} would need a header of {len(header)} bytes, safetensors allows {MAX_HEADER_BYTES}")
    return len(header).to_bytes(8, "little") + header


def read_rows(path: Path | str, info: TensorInfo, start: int, stop: int, every: int = 1) -> np.ndarray:
    """Rows start, start + every, ... below stop of one tensor, in fresh memory. Raises DataError."""
    import numpy as np

    rows = range(start, stop, every)
    out = np.empty((len(rows), *info.shape[1:]), DTYPES[info.dtype])
    if not out.nbytes:
        return out
    try:
        with open(path, "rb", buffering=0) as file:
            if every == 1:
                fill(file.fileno(), out, info.offset + start * out[0].nbytes, path)
                return out
            for row, into in zip(rows, out, strict=True):
                fill(file.fileno(), into, info.offset + row * into.nbytes, path)
            return out
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def fill(descriptor: int, out: np.ndarray, offset: int, path: Path | str) -> None:
    """Fill a contiguous array with the file's bytes from offset on. DataError where the file ends before."""
    view = memoryview(out).cast("B")
    while view:
        got = os.preadv(descriptor, [view], offset)
        if not got:
            raise DataError(f"{path} was cut short while it was read: make it again")
        view, offset = view[got:], offset + got


def _entry(path: Path, name: str, entry: object, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        raise DataError(f"{path}: the header's entry for {name!r} is not one of safetensors: make it again") from None
    if dtype not in DTYPES:
        raise DataError(f"{path}: the tensor {name!r} has dtype {dtype!r}, which is not one of {', '.join(DTYPES)}")
    info = TensorInfo(dtype, shape, start + begin if whole else 0)
    if not whole or end - begin != _bytes(info) or start + end > size:
        raise DataError(f"{path}: the tensor {name!r} {shape} does not lie within the file: make it again")
    return info


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * int(DTYPES[info.dtype][-1])
