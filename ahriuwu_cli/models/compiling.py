"""Whether torch.compile works on this machine: known by compiling next to nothing, before any work is done.

What it makes stays in a cache outside of all runs, under its final name from the compiler's first byte on: of a process
that was killed just then half a file stays, which every later one with the same code would fail on. Those go first.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch

from ahriuwu_cli.disk import lock
from ahriuwu_cli.errors import UserError

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian


def check_compile(device: torch.device | str) -> None:
    """UserError where torch.compile cannot make code for a device: no compiler, no headers, no place for its files."""
    try:
        cache = cache_folder()
        _remove(path for path in cache.glob("*/*.so") if cut_short(path))
        try:
            _compile_a_little(device)
        except Exception as error:
            headers = list(cache.glob("precompiled_headers/*.gch"))  # nothing tells half of one but the compiler
            if "PCH" not in str(error) or not _remove(headers):
                raise
            _compile_a_little(device)
    except Exception as error:  # of torch's compiler, of Triton or of the system, all alike to who asked
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"--compile does not work on this machine ({reason}): install a C++ compiler (g++, or another by CXX), or "
            "leave --compile out"
        ) from None


def cache_folder() -> Path:
    """Where torch.compile keeps what it made: TORCHINDUCTOR_CACHE_DIR, or a temporary folder of the user's."""
    from torch._inductor.codecache import cache_dir

    return Path(cache_dir())


def cut_short(path: Path) -> bool:
    """Whether a shared library ends before it says that it does: empty, without a head, or without its last table."""
    with open(path, "rb") as file:
        head = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(head) < 64 or not head.strip(b"\0"):
        return True
    if not head.startswith(_ELF):
        return False  # of another system, which this knows nothing of
    at, each, count = (int.from_bytes(head[a:b], "little") for a, b in ((0x28, 0x30), (0x3A, 0x3C), (0x3C, 0x3E)))
    return size < at + each * count


def _compile_a_little(device: torch.device | str) -> None:
    torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(16, device=device))


def _remove(files: Iterable[Path]) -> bool:
    """Remove files of the cache that nobody is making: who does holds a lock by the name. Whether any is gone now."""
    gone = False
    for path in files:
        place = path.parent if path.suffix == ".gch" else path.parent.parent
        with suppress(OSError):
            descriptor = os.open(place / "locks" / f"{path.name.split('.')[0]}.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                lock(descriptor)
                path.unlink()
                gone = True
            finally:
                os.close(descriptor)
    return gone
