"""Whether torch.compile works on this machine: known by compiling next to nothing, before any work is done.

What it makes stays in a cache outside of all runs, under its final name from the compiler's first byte on: of a process
that was killed just then half a file stays, which every later one with the same code would fail on. Those go first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from ahriuwu_cli.disk import lock
from ahriuwu_cli.errors import UserError

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_LIBRARY = re.compile(r"[a-z2-7]{52}(\.main)?\.so")  # by a hash of its source; it lies below two of its letters


def check_compile(device: torch.device | str) -> None:
    """UserError where torch.compile cannot make code for a device: no compiler, no headers, no place for its files."""
    try:
        for path in _cache().glob("??/*.so"):
            if _LIBRARY.fullmatch(path.name) and path.parent.name == path.name[1:3]:
                remove_if(path, path.parent.parent / "locks", cut_short)
        try:
            _compile_a_little(device)
        except Exception as error:
            if "PCH" not in str(error):
                raise
            headers = _headers()
            for path in headers.glob("*.gch"):  # nothing tells half of one but the compiler
                remove_if(path, headers / "locks", lambda _: True)
            _forget()
            _compile_a_little(device)
    except Exception as error:  # of torch's compiler, of Triton or of the system, all alike to who asked
        reason = str(error).strip().split("\n")[0][:300]
        raise UserError(
            f"--compile does not work on this machine ({reason}): install a C++ compiler (g++, or another by CXX), or "
            "leave --compile out"
        ) from None


def _cache() -> Path:
    """Where torch.compile keeps what it made: TORCHINDUCTOR_CACHE_DIR, or a temporary folder of the user's."""
    from torch._inductor.codecache import cache_dir

    return Path(cache_dir())


def _headers() -> Path:
    """Where it keeps headers that were compiled: always in the temporary folder."""
    from torch._inductor import codecache

    return Path(getattr(codecache, "_HEADER_DIR", _cache() / "precompiled_headers"))


def _forget() -> None:
    """Make torch's compiler forget, in this process, what it made and what it failed on."""
    from torch._inductor import codecache, utils

    torch._dynamo.reset()
    for name in ("clear_caches", "clear_inductor_caches"):  # as its versions call it
        getattr(utils, name, lambda: None)()
    getattr(getattr(codecache, "_precompile_header", None), "cache_clear", lambda: None)()


def _compile_a_little(device: torch.device | str) -> None:
    torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(16, device=device))


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


def remove_if(path: Path, locks: Path, broken: Callable[[Path], bool]) -> None:
    """Remove a broken file of the cache, unless somebody is making it, who holds a lock by its name.

    What cannot be looked at or locked stays: it may not be ours, and another process may have been faster.
    """
    with suppress(OSError):
        if not broken(path):
            return
        descriptor = os.open(locks / f"{path.name.split('.')[0]}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if lock(descriptor) and broken(path):  # who held it may have finished meanwhile
                path.unlink()
        finally:
            os.close(descriptor)
