"""A safetensors file whose tensors are written piece by piece, in any order, so that none has to fit in memory."""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ahriuwu_cli.data.pack_journal import write_all
from ahriuwu_cli.data.tensors import DTYPES, make_header
from ahriuwu_cli.disk import check_room

if TYPE_CHECKING:
    import numpy as np


class TensorWriter:
    """Context manager: tensors {name: (dtype, shape)}, dtype as safetensors names it; what is not written is zero.

    OSError at once where the disk has no room for all of it.
    """

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        # Wide numbers first: every tensor then begins at a multiple of its numbers' size, as readers like it.
        order = sorted(tensors, key=lambda name: (-int(DTYPES[tensors[name][0]][-1]), name))
        self._tensors = {name: tensors[name] for name in order}
        header = make_header(path, self._tensors, {})
        self._offsets, end = {}, len(header)
        for name, (dtype, shape) in self._tensors.items():
            self._offsets[name] = end
            end += math.prod(shape) * int(DTYPES[dtype][-1])
        check_room(path, end)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._descriptor, end)
        write_all(self._descriptor, header, 0)

    def write(self, name: str, array: np.ndarray, *first: int) -> None:
        """Write an array where the tensor's index `first` begins; nothing for `first` is the tensor's beginning."""
        import numpy as np

        dtype, shape = self._tensors[name]
        assert array.dtype == DTYPES[dtype], (name, array.dtype)
        skip = sum(i * math.prod(shape[axis + 1 :]) for axis, i in enumerate(first))
        assert skip + array.size <= math.prod(shape), (name, first, array.shape, shape)
        write_all(self._descriptor, np.ascontiguousarray(array), self._offsets[name] + skip * array.itemsize)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)
