"""Files that are there whole or not at all, whatever stops the writing: hidden name, flush, rename, flush.

A rename counts only once the folder that holds the name is flushed too: without that a power cut can undo it. Folders
are put in place by `folders`.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ahriuwu_cli.stopping import undoing

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
LARGER = "raise the limit on the size of files (`ulimit -f`)"
REFUSALS = FULL | {errno.EROFS, errno.EIO}  # of a disk, whoever asks and whatever for
NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})  # what a file system without says
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def arriving(path: Path) -> Iterator[Path]:
    """Yields an empty file of a hidden name beside path, which no other process takes, to fill: it is gone afterwards.

    Rename it to have it; a signal that ends the program removes it, and what a killed process left `clear_files`, which
    knows it by its lock. An OSError names `path`, not the hidden name.
    """
    temporary = path.with_name(f".{path.name}.{random_digits()}.tmp")
    with undoing(lambda: temporary.unlink(missing_ok=True)), ExitStack() as stack:
        try:
            while (held := hold(temporary, os.O_RDWR | os.O_CREAT)) is None:
                pass  # somebody who clears files was quicker than the lock
            stack.callback(os.close, held)
            yield temporary
        except OSError as error:
            call_it(error, path, temporary)
            raise
        finally:
            temporary.unlink(missing_ok=True)


def clear_files(folder: Path, names: str) -> None:
    """Remove what killed writers left in `folder` of files whose names match, and never what a live one fills.

    names: a regular expression. On a disk without locks nobody knows which is which, so all stay.
    """
    with suppress(OSError):  # there is no such folder, or it may not be read: then there is nothing to clear
        for left in os.listdir(folder):
            name = left
            while found := re.fullmatch(r"\.(.+)\.\d+\.tmp", name):
                name = found[1]
            if name != left and re.fullmatch(names, name):
                with suppress(OSError):
                    _clear_file(folder / left)


def _clear_file(path: Path) -> None:
    if (held := hold(path, os.O_RDWR | os.O_NONBLOCK)) is not None:  # never waits for the other end of a pipe
        try:
            if stat.S_ISREG(os.fstat(held).st_mode) and lock(held):
                path.unlink()
        finally:
            os.close(held)


def hold(path: Path, how: int, absent: frozenset[int] = NO_LOCKS) -> int | None:
    """A descriptor of what has this name, with its lock, where there are locks. OSError where it cannot be opened.

    None where another process has the lock, or took the name away before there was one.
    """
    held = os.open(path, how | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        lock(held, absent=absent)
        if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(held)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(held)
    return None


def write_whole(path: Path, content: bytes | str, replace: bool = True) -> bool:
    """Write a file under a hidden name that no other process takes, on this host or another, and rename it.

    replace False: what is there stays, and the answer is False; of several processes exactly one writes. OSError.
    """
    try:
        with arriving(path) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(temporary)
            if replace:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # fails where the name is taken
    except FileExistsError:
        return False
    sync(path.parent)
    return True


def write_inside(folder: int, name: str, content: str) -> None:
    """`write_whole` in a folder that is held open, whatever its path leads to by now. OSError."""
    hidden = f".{name}.{random_digits()}.tmp"

    def undo() -> None:
        with suppress(FileNotFoundError):
            os.unlink(hidden, dir_fd=folder)

    with undoing(undo):
        try:
            descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.replace(hidden, name, src_dir_fd=folder, dst_dir_fd=folder)
            os.fsync(folder)
        finally:
            undo()


def random_digits() -> int:
    """A part of a name that no other process takes, on this host or another."""
    return int.from_bytes(os.urandom(7))


def call_it(error: OSError, path: Path, hidden: Path) -> None:
    """Let an error name `path` where it names what is hidden below `hidden`, or a disk refused without any name."""
    if error.filename is None:
        inside = error.errno in REFUSALS
    else:
        named = os.path.abspath(os.fsdecode(error.filename))
        inside = f"{named}{os.sep}".startswith(f"{os.path.abspath(hidden)}{os.sep}")
    if inside:
        error.filename = str(path)


def visible(name: str | bytes | int | None) -> str:
    """What people call the file of an error: without hidden names that it would have lost in the end. "" for None."""
    text = "" if name is None else os.fsdecode(name) if isinstance(name, bytes) else str(name)
    text = re.sub(r"(^|/)\.([^/]+)\.(?:\d+\.tmp|partial-\d+|partial)(?=/|$)", r"\1\2", text)
    return re.sub(r"(^|/)(state\.(?:safetensors|json))\.partial$", r"\1\2", text)  # within a hidden folder


def set_aside(path: Path) -> Path:
    """Rename what is damaged to a free name beside it, x.damaged or x.damaged-2. FileNotFoundError if it is gone."""
    aside, count = path.with_name(f"{path.name}.damaged"), 1
    while os.path.lexists(aside):
        count += 1
        aside = path.with_name(f"{path.name}.damaged-{count}")
    path.rename(aside)
    sync(path.parent)
    return aside


def check_room(path: Path, size: int) -> None:
    """OSError, as from a full disk, where a file of so many bytes has no room beside `path`. A look, not a promise."""
    disk = shutil.disk_usage(path.parent)
    if size > disk.free and disk.total:  # some file systems say nothing
        why = f"{size / 1e9:.4g} GB are needed, {disk.free / 1e9:.4g} GB are free"
        raise OSError(errno.ENOSPC, why, str(path))


def more_room(error: OSError) -> str:
    """What to do about one of FULL: files may be limited where the disk has room."""
    return LARGER if error.errno == errno.EFBIG else "make room"


def refusal(error: OSError, place: str) -> str:
    """One sentence on a disk that refused `place`, with what to do."""
    if error.errno == errno.EFBIG:
        return f"{place} would be larger than files may be ({error.strerror}): {LARGER}, or choose another --out"
    if error.errno in FULL:
        return f"no room for {place} ({error.strerror}): make room there, or choose another --out"
    if error.errno == errno.EROFS:
        return f"{place} is on a disk that cannot be written to ({error.strerror}): choose another --out"
    return f"the disk of {place} fails ({error.strerror}): see to the disk, or choose another --out"


def file_hash(path: Path) -> str:
    """The sha256 of a regular file, streamed. OSError, also for a pipe or a device, which would never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        return hashlib.file_digest(stream, "sha256").hexdigest()


def lock(descriptor: int, shared: bool = False, absent: frozenset[int] = NO_LOCKS) -> bool:
    """`flock` without waiting; False where the file system has no locks. BlockingIOError when another one holds it.

    The system frees a lock when the last process with the descriptor has ended, however it ended.
    """
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in absent:
            raise
        return False
    return True


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
    remove(hidden)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, whatever it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def mend(folder: Path, names: tuple[str, ...]) -> None:
    """Clear away what killed writers of these names left in a folder. Only for who holds the folder's lock."""
    for name in names:
        if not (folder / name).exists():
            for old in folder.glob(f".{name}.*.old"):
                if not old.is_symlink():  # nothing that we made
                    os.rename(old, folder / name)
                    break
        for left in [*folder.glob(f".{name}.*.tmp"), *folder.glob(f".{name}.*.old")]:
            remove(left)
