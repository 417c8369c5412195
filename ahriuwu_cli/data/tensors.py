"""Safetensors files: headers, checked before they are believed, then rows or whole tensors read straight into memory.

`preadv` instead of a memory map: a file that shrinks or a disk that fails becomes a sentence where a map would end the
process, and no map or open file stays behind for each of 100,000 episodes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ahriuwu_cli.data.documents import parse_object
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_TENSORS = 100_000
MAX_AXES, MAX_LENGTH = 8, 2**40  # of a shape
MAX_VOLUME = 2**48  # product of the axes that are not 0, which libraries multiply for empty tensors too
SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4,
         "I64": 8, "U64": 8, "F64": 8}  # bytes, by the format's names  # fmt: skip
TORCH = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "F16": "float16",
         "BF16": "bfloat16", "I32": "int32", "U32": "uint32", "F32": "float32", "I64": "int64", "U64": "uint64",
         "F64": "float64"}  # fmt: skip
DTYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: dtype as safetensors names it, shape, first byte within the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@contextmanager
def as_any_file(path: Path) -> Iterator[None]:
    """What safetensors does to `path` is as with any other file: OSErrors, and rights by the umask, not 0600."""
    from safetensors import SafetensorError

    with open(path, "wb") as file:
        rights = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    try:
        yield
        os.chmod(path, rights)
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None


def read_header(path: Path | str) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name. Raises DataError when the header and the file do not agree."""
    return read_header_and_metadata(path)[0]


def read_header_and_metadata(path: Path | str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file by name, and its metadata. Sizes are checked before memory is taken.

    Raises DataError when the header and the file do not agree, or where tensors overlap or leave holes.
    """
    path = Path(path)
    try:
        about = path.stat()
        size = about.st_size
        if not stat.S_ISREG(about.st_mode):
            raise DataError(f"{path} is no regular file: give a safetensors file")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise DataError(f"{path} is not a safetensors file, or is cut short ({size} bytes): make it again")
            header = parse_object(file.read(length))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} has a safetensors header that is not JSON ({error}): make it again") from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError(f"{path} has safetensors metadata that are not texts: make it again")
    if len(header) > MAX_TENSORS:
        raise DataError(f"{path} lists {len(header)} tensors, above the limit of {MAX_TENSORS}: make it again")
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
    view = as_bytes(out)
    while view:
        got = os.preadv(descriptor, [view], offset)
        if not got:
            raise DataError(f"{path} was cut short while it was read: make it again")
        view, offset = view[got:], offset + got


def as_bytes(data: np.ndarray | bytes | memoryview) -> memoryview:
    """The bytes of what is contiguous, also where there are none (actions of width 0), which `cast` refuses."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")


def read_arrays(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All tensors of a safetensors file as arrays, and its metadata. DataError; never more memory than the file."""
    tensors, metadata = read_header_and_metadata(path)
    other = next((name for name, info in tensors.items() if info.dtype not in DTYPES), None)
    if other is not None:
        raise DataError(f"{path}: the tensor {other!r} has dtype {tensors[other].dtype!r}: make the file again")
    shaped = {name: _whole(path, t).view(DTYPES[t.dtype]).reshape(t.shape) for name, t in tensors.items()}
    return shaped, metadata


def checksum(arrays: Mapping[str, np.ndarray], texts: Sequence[str]) -> str:
    """sha256 over texts, then names, types, shapes and values in order of name: however a file arranges them."""
    import numpy as np

    found = hashlib.sha256(json.dumps(list(texts)).encode())
    for name, values in sorted(arrays.items()):
        found.update(f"{name} {values.dtype} {values.shape}".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()


def read_tensors(path: Path | str, most: int | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file for PyTorch, on the CPU. DataError, also for more than `most` bytes of them.

    Never more memory than the file; who knows the shapes compares them with `read_header` before.
    """
    import torch

    tensors: dict[str, Tensor] = {}
    header = read_header(path)
    if most is not None and sum(map(_bytes, header.values())) > most:
        raise DataError(f"{path} holds more than {most / 1e6:g} MB of tensors: give another file")
    for name, info in header.items():
        raw = torch.from_numpy(_whole(path, info))
        if info.dtype == "BOOL" and bool((raw > 1).any()):
            raise DataError(f"{path}: the tensor {name!r} holds values that are neither true nor false: make it again")
        kind = getattr(torch, TORCH[info.dtype])
        tensors[name] = (raw.view(kind) if len(raw) else torch.empty(0, dtype=kind)).reshape(info.shape)
    return tensors


def _whole(path: Path | str, info: TensorInfo) -> np.ndarray:
    """The bytes of one tensor."""
    import numpy as np

    out = np.empty(_bytes(info), np.uint8)
    try:
        with open(path, "rb", buffering=0) as file:
            fill(file.fileno(), out, info.offset, path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return out


def _entry(path: Path, name: str, entry: object, start: int, size: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        known = type(dtype) is str and len(entry) == 3 and len(shape) <= MAX_AXES
        whole = known and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        whole = whole and max(shape, default=0) <= MAX_LENGTH and math.prod(n or 1 for n in shape) <= MAX_VOLUME
    except (TypeError, KeyError, ValueError):
        known = False
    if not known:
        raise DataError(f"{path}: the header's entry for {name!r} is not one of safetensors: make it again")
    if dtype not in SIZES:
        raise DataError(f"{path}: the tensor {name!r} has dtype {dtype!r}, which is not one of {', '.join(SIZES)}")
    info = TensorInfo(dtype, shape, start + begin if whole else 0)
    if not whole or end - begin != _bytes(info) or start + end > size:
        raise DataError(f"{path}: the tensor {name!r} {shape} does not lie within the file: make it again")
    return info


def _bytes(info: TensorInfo) -> int:
    return math.prod(info.shape) * SIZES[info.dtype]
