"""Files that are there whole or not at all, whatever stops the writing: hidden name, flush, rename, flush.

A rename counts only once the folder that holds the name is flushed too: without that a power cut can undo it. Folders
are put in place by `folders`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from pathlib import Path

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a file under a hidden name and rename it over what was there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step; False where system or file system cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def discard(path: Path) -> None:
    """Remove a file or folder so that a kill on the way leaves a hidden name, never half of it under its own."""
    hidden = path
    if not path.name.startswith("."):
        hidden = path.with_name(f".{path.name}.{os.getpid()}.old")
        os.rename(path, hidden)
    shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()


def mend(folder: Path, names: tuple[str, ...]) -> None:
    """Clear away what killed writers of these names left in a folder. Only for who holds the folder's lock."""
    for name in names:
        if not (folder / name).exists():
            for old in folder.glob(f".{name}.*.old"):
                os.rename(old, folder / name)
                break
        for left in [*folder.glob(f".{name}.*.tmp"), *folder.glob(f".{name}.*.old")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
