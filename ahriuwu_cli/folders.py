"""Folders that results go to, never half one thing, half another.

`replacing` fills a sibling and puts it in place by renaming, and `whole` reads one that may be replaced meanwhile.
`claimed` keeps a second process out of a folder that one works for. What may go where: `places`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ahriuwu_cli.disk import NO_LOCKS, call_it, exchange, hold, lock, random_digits, sync
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.lock import refuse_alive
from ahriuwu_cli.places import check_folder, refuse_other_kind, refuse_to_take_away
from ahriuwu_cli.stopping import unbroken, undoing

NO_FOLDER_LOCKS = NO_LOCKS | {errno.EBADF}  # some disks lock files alone
PATIENCE, PAUSE = 10.0, 0.001  # seconds: how long a reader waits for a folder that is being replaced, between looks
MISSING = 3  # looks by which a folder that is not there, with no old one beside it, counts as missing
T = TypeVar("T")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # no pipe in the place of a folder: it would wait for a writer


class replacing:
    """`with replacing(folder) as temporary`: fill a hidden folder, then put it in the place of `folder`.

    See `put_in_place`; the folder of a run that is alive, or with another dataset, world or run in it, is left, with a
    UserError. The hidden folder lies in the nearest folder that exists; other parents are made at the end. Whatever
    stops the writing, `folder` stays as it was.
    A signal that ends the program removes the hidden folder; what a killed process left is removed by the next that
    writes the same folder: the writer holds a lock on it (`flock`) as long as it lives. overwrite False: what another
    process put there meanwhile is kept, with a UserError. An OSError names `folder`, not what is hidden. then: called
    once the folder has its name, before a signal can end the program again. own: what overwrite may replace
    (`places.refuse_other_kind`), looked at once more at the end; None where the folder's owner has seen to that.
    """

    def __init__(
        self,
        folder: Path,
        overwrite: bool = True,
        then: Callable[[], None] = lambda: None,
        own: tuple[str, ...] | None = None,
    ) -> None:
        self.folder = Path(os.path.realpath(folder)) if Path(folder).is_symlink() else Path(folder)
        self.overwrite, self._then, self._own = overwrite, then, own
        self.temporary: Path | None = None

    def __enter__(self) -> Path:
        near = next(p for p in self.folder.absolute().parents if p.is_dir())
        near = self.folder.parent if self.folder.parent.is_dir() else near  # as it was given
        clear_leftovers(near, self.folder.name)
        with ExitStack() as stack:
            while True:
                path = self.temporary = near / f".{self.folder.name}.{random_digits()}.tmp"
                stack.callback(_away, path)
                stack.enter_context(undoing(lambda path=path: _away(path)))
                try:
                    path.mkdir()
                except OSError as error:
                    call_it(error, self.folder, path)
                    raise
                if (held := _held(path)) is not None:
                    stack.callback(os.close, held)
                    break  # else somebody who clears leftovers was quicker than the lock
            self._stack = stack.pop_all()
        return self.temporary

    def __exit__(self, kind, value, trace) -> None:
        with self._stack:
            try:
                if kind is None:
                    self._finish()
            except OSError as error:
                call_it(error, self.folder, self.temporary)
                raise
            if isinstance(value, OSError):
                call_it(value, self.folder, self.temporary)

    def _finish(self) -> None:
        for path in sorted(self.temporary.rglob("*"), reverse=True):
            sync(path)
        sync(self.temporary)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        refuse_alive(self.folder)
        refuse_to_take_away(self.folder)
        if self.overwrite and self._own is not None:
            refuse_other_kind(self.folder, *self._own)
        with unbroken():
            put_in_place(self.temporary, self.folder, self.overwrite)
            self._then()
        sync(self.folder.parent)


def _away(path: Path) -> None:
    """Remove a hidden folder of ours, as well as it can be done; an empty one that nobody may look into, too."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.rmdir()


def clear_leftovers(near: Path, name: str) -> None:
    """Remove what killed writers (`replacing`) of the folder `name` left in `near`; never what a live one fills."""
    hidden = re.compile(rf"\.{re.escape(name)}\.\d+\.tmp")
    for left in filter(hidden.fullmatch, os.listdir(near)):
        with suppress(OSError):  # no folder, or another process takes it away
            held = os.open(near / left, _FOLDER | os.O_NOFOLLOW)
            try:
                if lock(held, absent=NO_FOLDER_LOCKS):  # without locks nobody knows whether its writer lives
                    shutil.rmtree(near / left, ignore_errors=True)
            finally:
                os.close(held)


def _held(path: Path) -> int | None:
    """A new folder's descriptor, which holds its lock where there are locks; None when it was taken away before."""
    with suppress(FileNotFoundError):
        return hold(path, os.O_RDONLY, NO_FOLDER_LOCKS)
    return None


def put_in_place(new: Path, folder: Path, overwrite: bool = True) -> None:
    """Rename the folder `new` to `folder`, and delete what was there.

    On Linux the two swap names in one step. Elsewhere what was there is renamed away first, so for an instant `folder`
    is not there: a reader waits (`whole`), and a kill in that instant leaves the old one beside it, `.NAME.DIGITS.old`.
    UserError when something is there and overwrite is off.
    """
    if overwrite and folder.is_dir() and exchange(new, folder):
        return shutil.rmtree(new, ignore_errors=True)
    retired = folder.with_name(f".{folder.name}.{random_digits()}.old")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            os.rename(new, folder)  # nothing there, or an empty folder
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not overwrite:
            raise UserError(f"{folder} was filled by another process meanwhile: choose another --out")
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is filled by other processes again and again: choose another --out")
        try:
            os.rename(folder, retired)
        except FileNotFoundError:
            continue  # another writer just took it away
        try:
            os.rename(new, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                os.rename(retired, folder)
                raise
        finally:
            shutil.rmtree(retired, ignore_errors=True)
    shutil.rmtree(retired, ignore_errors=True)


def whole(folder: Path, read: Callable[[], T]) -> T:
    """What `read` makes of the files in `folder`, all of one save, while other processes may be replacing it.

    Why this is right on Linux and macOS: the folder is held open while it is read, so its number (device, inode) is
    taken by nothing else; a writer only ever renames whole folders in, and never one that was there before. When the
    name still leads to the held folder after reading, it led there all the time, and every file was of that one save.
    When it does not, or is missing while a save puts it in place, what was read counts for nothing, errors as well,
    and is read again. After PATIENCE seconds of that: UserError, try again.
    """
    deadline, missing = time.monotonic() + PATIENCE, 0
    while True:
        try:
            held = os.open(folder, _FOLDER)
        except OSError:
            old, missing = _put_away(folder), missing + 1
            if not old and missing > MISSING:
                return read()  # which says what is wrong
            if old and time.monotonic() > deadline:
                raise UserError(f"{folder} is not there: saving it was cut short, rename {old} back") from None
        else:
            try:
                outcome = _tried(read)
                if _leads_to(folder, held):
                    return outcome()
            finally:
                os.close(held)
        if time.monotonic() > deadline:
            raise UserError(f"{folder} is replaced faster than it can be read: try again when that has ended")
        time.sleep(PAUSE)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents where they are missing; of those, the ones that stay empty are removed again."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]

    def leave() -> None:
        for each in missing:
            try:
                each.rmdir()
            except (FileNotFoundError, PermissionError):
                continue  # it was never made, or lies in one that nobody may look into
            except OSError:
                break

    try:
        with undoing(leave):
            folder.mkdir(parents=True, exist_ok=True)
            yield
    finally:
        leave()


@contextmanager
def claimed(out: Path, overwrite: bool, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold `out` (made when it is missing) for this process; UserError when another one holds it, or has filled it.

    The lock is `flock` on the folder itself, so nothing is left behind, however the process ends. An `out` that stays
    empty is removed. A file system without locks is said.
    """
    with ExitStack() as stack:
        stack.enter_context(made(out))
        held = os.open(out, _FOLDER)
        stack.callback(os.close, held)
        try:
            if not lock(held, absent=NO_FOLDER_LOCKS):
                announce(f"{out} has no file locks: see to it that no other process writes there")
            if not _leads_to(out, held):  # another process put its own in place just now
                raise BlockingIOError
        except BlockingIOError:
            raise UserError(f"another process is writing to {out}: choose another --out, or wait for it") from None
        check_folder(out, overwrite, holds="pieces")
        yield


@contextmanager
def holding(folder: Path) -> Iterator[tuple[int, Callable[[], bool]]]:
    """A folder, held open, and whether its name still leads to it. OSError."""
    held = os.open(folder, _FOLDER)
    try:
        yield held, lambda: _leads_to(folder, held)
    finally:
        os.close(held)


def _tried(read: Callable[[], T]) -> Callable[[], T]:
    """read() now; the function that is returned gives its result, or raises its error."""
    try:
        result = read()
    except Exception as error:
        caught = error

        def fail() -> T:
            raise caught

        return fail
    return lambda: result


def _put_away(folder: Path) -> Path | None:
    """The old one of this folder, or of the one that it lies in, that a writer renamed away (`put_in_place`)."""
    for place in (folder, folder.parent):
        try:
            names = os.listdir(place.parent)
        except OSError:
            continue
        for name in names:
            if name.startswith(f".{place.name}.") and name.endswith(".old"):
                return place.with_name(name)
    return None


def _leads_to(folder: Path, held: int) -> bool:
    try:
        return os.path.samestat(os.stat(folder), os.fstat(held))
    except OSError:
        return False
