"""Running out of memory: how it is known, what to ask less of, and how much there is at all."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import suppress
from pathlib import Path

LESS = {  # by the command
    "train dynamics": "a smaller --size, --batch or --frames, or a larger --accumulate",
    "train tokenizer": "a smaller --patch, --batch, --frames or --tokens",
    "rollout": "a smaller --context, --samples or --scale",
    "eval": "a smaller --batch or --windows",
    "sweep-tau": "a smaller --batch or --windows",
    "import": "a smaller --size, or shorter videos",
    "record": "a smaller --size, or shorter episodes",
}
# What PyTorch's allocators say, of CPUs (Linux, elsewhere) and GPUs, then oneDNN, threads and the loader of libraries,
# which find no place in what `ulimit -v` leaves; most of them raise a plain RuntimeError.
_WORDS = (
    "can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "could not create a primitive",
    "can't start new thread", "resources to create thread", "failed to map segment", "annot allocate memory",
)  # fmt: skip
NO_PROCESS = "no process more could be started: raise the limit (`ulimit -u`), or end others"
ALWAYS = 1 << 30  # bytes that any machine is asked for
_NEAR = 1 << 27  # bytes: what a thread asks for at once


def ran_out(error: BaseException) -> bool:
    """Whether an error is of memory that is not there."""
    if isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _WORDS):
        return True
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


def at_limit() -> bool:
    """Whether this process came so near to its limit of address space (`ulimit -v`) that any error may be of that."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return False
    with suppress(OSError, StopIteration):  # Linux alone tells
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak"))
        return peak > limit - max(_NEAR, limit // 8)
    return False


def sentence(command: str, error: BaseException | None = None) -> str:
    """One sentence for who ran out of memory, or of threads, by `command`, such as "train dynamics data --out run"."""
    if "thread" in str(error):
        return "no thread more could be started: raise the limit (`ulimit -u`), or make memory free"
    less = next((less for name, less in LESS.items() if f"{command} ".startswith(f"{name} ")), "something smaller")
    return f"there is not enough memory for this: ask for {less}, or make memory free"


def refuse_beyond(needed: int) -> None:
    """MemoryError for bytes that this process may not have at all, where the system would end it in silence."""
    if needed > ALWAYS and needed > most():
        raise MemoryError


def most() -> int:
    """Bytes that this process may have, by the machine, its control group and its limit."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError, ValueError):  # no such group, or the word "max"
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(sizes) if limit == resource.RLIM_INFINITY else min(*sizes, limit)
