"""The states of one run, step-N each: there whole or not at all, the last few kept, damaged ones set aside by name."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ahriuwu_cli.disk import discard, exchange, remove, set_aside, sync
from ahriuwu_cli.errors import CheckpointError
from ahriuwu_cli.training.state import DOCUMENT, load_tensors, read_document, save_state

if TYPE_CHECKING:
    from ahriuwu_cli.training.state_check import Expected

SAVE_SECONDS = 600.0  # of training between states at most: a run that dies loses no more
_NAME = re.compile(r"step-\d{8,18}", re.ASCII)  # within 64 bits: processes compare them


def step_of(state: Path) -> int:
    """The step that the folder of a state is named by."""
    return int(state.name.removeprefix("step-"))


class States:
    """The folder that holds them. keep: how many stay. run: the hash of what was asked for, in each; "" is any.

    sound: raises ValueError for a document that no such run writes.
    """

    def __init__(
        self, folder: Path, keep: int, run: str = "", sound: Callable[[dict[str, Any]], None] = lambda document: None
    ) -> None:
        self.folder, self.keep, self.run, self.sound = Path(folder), keep, run, sound

    def newest(self) -> Path | None:
        """The newest state, or None. It is as its save left it, or was damaged since: `load` tells."""
        found = self._found()
        return found[-1] if found else None

    def save(self, step: int, tensors: Mapping[str, Tensor], document: dict[str, Any]) -> Path:
        """Write the state of a step, then drop the oldest. OSError leaves the states before it and no trace of this."""
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            sync(self.folder.parent)
        target = self.folder / f"step-{step:08d}"
        partial = target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_state(partial, tensors, document | {"run": self.run})
            if not (target.exists() and exchange(partial, target)):
                if target.exists():  # the same step again, on a system that cannot swap
                    discard(target)
                partial.rename(target)
            sync(self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.prune()
        return target

    def prune(self) -> None:
        """Take away all but the last few. Only for who holds the run's lock, and knows a sound one among those."""
        for old in self._found()[: -self.keep]:
            discard(old)

    def readable(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Folders and documents of those whose document is as it was written, newest first, whatever it says."""
        for path in reversed(self._found()):
            with suppress(CheckpointError):
                yield path, read_document(path)[0]

    def glance(self) -> dict[str, Any] | None:
        """The document of the newest state without its tensors; None when there is none, or a damaged one."""
        newest = self.newest()
        try:
            return None if newest is None else self._check(newest, read_document(newest)[0])
        except CheckpointError:
            return None

    def load(
        self, announce: Callable[[str], None], mend: bool = True, expected: Expected | None = None
    ) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """(its folder, tensors, document) of the newest state that is not damaged; None when none was ever saved.

        mend: rename damaged ones, each with a sentence; otherwise a damaged one is an error. expected: what the tensors
        must be; others are damaged too. CheckpointError when all are damaged: then they stay as they are.
        """
        damaged: list[tuple[Path, CheckpointError]] = []
        for path in reversed(self._found()):
            try:
                document, digest = read_document(path)
                tensors = load_tensors(path, self._check(path, document), digest, expected)
            except CheckpointError as error:
                if not mend:
                    raise
                damaged.append((path, error))
                continue
            for broken, error in damaged:
                aside = set_aside(broken)
                announce(f"{broken} is damaged ({error}): set aside as {aside.name}, going on from {path} instead")
            return path, tensors, document
        if damaged:
            raise CheckpointError(f"{damaged[0][1]}; no other state is left in {self.folder}: start with --overwrite")
        if aside := sorted(self.folder.glob("step-*.damaged*")):
            raise CheckpointError(f"{self.folder} holds damaged states only, such as {aside[-1].name}: use --overwrite")
        return None

    def has_leftovers(self) -> bool:
        """Whether a killed save left something."""
        return any(self.folder.glob(".step-*"))

    def clean(self) -> None:
        """Remove what killed saves left. Only for who holds the run's lock."""
        for left in self.folder.glob(".step-*"):
            remove(left)

    def _found(self) -> list[Path]:
        found = (path for path in self.folder.glob("step-*") if _NAME.fullmatch(path.name))
        return sorted(found, key=step_of)  # beyond 8 digits too

    def _check(self, path: Path, document: dict[str, Any]) -> dict[str, Any]:
        """The document of a state, which says its folder's step, and what this run would say. CheckpointError."""
        step = document.get("step")
        if type(step) is not int or path.name != f"step-{step:08d}":
            raise CheckpointError(f"{path / DOCUMENT} says that it is of step {step!r}: use another state")
        if self.run and document.get("run", self.run) != self.run:  # states of older versions do not say it
            raise CheckpointError(f"{path} is of another run, with other settings or data: use another state")
        try:
            self.sound(document)
        except ValueError as error:
            raise CheckpointError(f"{path / DOCUMENT} makes no sense ({error}): use another state") from None
        return document
