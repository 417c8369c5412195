"""One tensor of a safetensors file as a read-only memory map: random windows cost a page fault, not a copy.

Reading a window this way is several times faster than `safe_open` slices. The header is checked before it is believed.
"""

from __future__ import annotations

import json
import math
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
    except ValueError:
        raise DataError(f"{path} has a safetensors header that is not JSON: make it again") from None
    if not isinstance(header, dict):
        raise DataError(f"{path} has a safetensors header that is not an object: make it again")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length, size) for name, entry in header.items()}
    end = max((t.offset + _bytes(t) for t in tensors.values()), default=8 + length)
    if end != size:
        raise DataError(f"{path} has {size} bytes but its header describes {end}: the file is damaged, make it again")
    return tensors


def open_tensor(path: Path | str, name: str) -> np.memmap | np.ndarray:
    """Map one tensor read-only (an empty array where it has no elements). Raises DataError when it is not there."""
    import numpy as np

    tensors = read_header(path)
    if name not in tensors:
        raise DataError(f"{path} has no tensor {name!r}, only {', '.join(sorted(tensors)) or 'nothing'}")
    info = tensors[name]
    dtype = np.dtype(DTYPES[info.dtype])
    if 0 in info.shape:
        return np.empty(info.shape, dtype)
    return np.memmap(path, dtype, mode="r", offset=info.offset, shape=info.shape)


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
