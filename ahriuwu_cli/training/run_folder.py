"""The folder of a run, of whatever is trained: who may write in it, what was asked for, its log and its states.

run.json        what was asked for: configuration, facts of the data, command line, versions; once one is, that a state
                is saved. Each state has a copy of it
metrics.jsonl   one JSON object a line
state/step-N/   all that the next step depends on, the last few
.lock           held by the process that writes here

The same command again goes on with a run; other settings are refused by name; what is no run is left alone.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ahriuwu_cli import memory
from ahriuwu_cli.data.documents import document_hash, to_json
from ahriuwu_cli.disk import FULL, discard, mend, more_room, set_aside, sync, visible, write_whole
from ahriuwu_cli.errors import CheckpointError, DataError, ReplacedError, TrainingError, UserError
from ahriuwu_cli.folders import made
from ahriuwu_cli.lock import LOCK, refuse_alive, still_held, take
from ahriuwu_cli.places import check_folder, has_states, refuse_other_kind, refuse_to_take_away, refuse_used
from ahriuwu_cli.training import run_log
from ahriuwu_cli.training.asked import SAVED, Asked, Copied, differences, known_run, plain, ways_out
from ahriuwu_cli.training.finite import check_finite
from ahriuwu_cli.training.restart import resuming
from ahriuwu_cli.training.state_check import COPY, Expected, check_document
from ahriuwu_cli.training.states import States
from ahriuwu_cli.training.versions import versions

WRITTEN = ("run.json", run_log.NAME, "best", "last", "tokenizer", "state")  # under hidden names first
OWN = {"dynamics": ("run",), "tokenizer": ("tokenizer", "tokenizer's run")}  # what --overwrite may replace
_HIDDEN = re.compile(rf"\.({'|'.join(map(re.escape, WRITTEN))})\.\d+\.(tmp|old)")

Announce = Callable[[str], None]


class RunFolder:
    """A run on disk: what is asked for, the command that starts it (again), and how many states stay.

    free: settings that a run may change as it goes on; all else that is asked for says which run a state is of.
    writes: whether this process may; the others of its group see the same run and leave the folder alone.
    """

    needed: tuple[str, ...] = ("total",)  # what the document of each of its states says
    product = ""  # the name of what is there after the last step alone

    def __init__(
        self, folder: Path, asked: Asked, command: str, keep: int, free: tuple[str, ...], writes: bool = True
    ) -> None:
        self.folder, self.asked, self.command, self._free = Path(folder), plain(asked), command, free
        self.log_file, self.writes = self.folder / run_log.NAME, writes
        config = {name: value for name, value in self.asked["config"].items() if name not in free}
        self.states = States(
            self.folder / "state", keep, document_hash(self.asked | {"config": config}),
            lambda document: check_document(document, self.needed, config.get("steps")),
        )  # fmt: skip
        self.typed, self.again = command, resuming(command)  # what the user is told to type
        self.found: str | None = None  # one sentence on what was there, where there was something
        self.lacking: list[str] = []  # what was lost of it
        self._log_every = config.get("log_every")  # None where it may have been another one
        self._logged = 0  # the step of the last line with a loss
        self._lock: TextIO | None = None
        self._said: dict[str, Any] = {}  # run.json

    def begin(self, overwrite: bool, announce: Announce, **more: Any) -> None:
        """A new run in an empty or absent folder, or in place of what is there. UserError when that may not be."""
        if not self.writes:
            return
        fresh = not os.path.lexists(self.folder)
        with self.writing("nothing was trained"), made(self.folder):
            if overwrite:
                self._refuse_what_came()
            self._hold(announce)
            if not overwrite and _content(self.folder):  # somebody was quicker
                raise UserError(f"{self.folder} is not empty any more: run the same command again")
            if overwrite:
                self._refuse_what_came()
            try:
                self._clear(os.listdir(self.folder))
                self._begin(more)
            except OSError:
                if fresh:
                    (self.folder / LOCK).unlink(missing_ok=True)
                    self.release()
                raise

    def _refuse_what_came(self) -> None:
        """UserError for what --overwrite may not replace, and came here since `goes_on` looked."""
        refuse_to_take_away(self.folder)
        refuse_other_kind(self.folder, *OWN[self.asked["kind"]])

    def go_on(
        self, announce: Announce, expected: Expected | None = None, **more: Any
    ) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """The newest good state of the run that is here, after clearing away what a kill left; None: from step 0 again.

        expected: what the tensors of its states must be. Nothing is written when the run is finished. UserError when it
        is alive, CheckpointError when it is damaged or its states are gone.
        """
        self._said, copied = self._known()
        self.command = self._said["command"]
        _refuse_links(self.folder)
        glance = self.states.glance()
        finished = copied is None and glance is not None and self.is_finished(glance) and not self._has_leftovers()
        self.lacking = self.lost(glance) if finished and self.writes else []
        found = self._read(announce, expected) if (finished and not self.lacking) or not self.writes else None
        if found is not None and self.writes:
            run_log.look(self.log_file, found[2]["step"], found[2].get("logged", 0), announce, self._log_every)
        if found is None and self.writes:
            with self.writing("nothing was trained"):
                self._hold(announce)
                mend(self.folder, WRITTEN)
                self.states.clean()
                found = self.states.load(announce, expected=expected)
                self.lacking = [] if found is None else self.lost(found[2])
                if found is None:
                    self._refuse_lost_states()
                    self._clear(WRITTEN)  # whatever else lies here is the user's
                    self._begin(more)
                else:
                    with suppress(CheckpointError):  # the only copy may have been the damaged state's
                        self._said, copied = self._known()  # from a state that is there still
                    if copied is not None:
                        self._write_again(copied, announce)
                    self.states.prune()
                    step, logged = found[2]["step"], found[2].get("logged", 0)
                    last_preview = step == found[2]["total"] and bool(self.lacking or not self.is_finished(found[2]))
                    run_log.cut(self.log_file, step, logged, announce, last_preview, self._log_every)
                    for name in ("best", "last", "tokenizer"):  # one that is due later as well
                        self._set_aside(name)
        self.found = f"{self.folder} holds this run, stopped before its first saved state: starting again from step 0"
        if found is not None:
            step, total = found[2]["step"], found[2]["total"]
            self.found = f"going on with the run in {self.folder} after step {step} of {total or 'a time budget'}"
            if step == total:
                self.found += ": its last preview is left"
            if self.is_finished(found[2]):
                self.found = f"the run in {self.folder} is finished: all {total} steps are done"
            self._logged = found[2].get("logged", 0)
            if self.lacking:
                self.found += f"; {' and '.join(self.lacking)} is missing, damaged or another run's, and made anew"
        return found

    @staticmethod
    def is_finished(document: dict[str, Any]) -> bool:
        """Whether nothing is left to do at this state. States of older versions are of the very end."""
        return document["step"] == document.get("total") and document.get("finished", True)

    def lost(self, document: dict[str, Any]) -> list[str]:
        """What a run at this state must have in its folder, and has not: names."""
        return []

    def _refuse_lost_states(self) -> None:
        """CheckpointError where a state was saved, of a run without any: only who asks for it loses what came of it."""
        # before it was said in run.json, nothing but its last work tells
        if self._said.get(SAVED) is not True and not (self.product and os.path.lexists(self.folder / self.product)):
            return
        ways = ways_out(self.folder, self.states.folder)
        raise CheckpointError(f"the states of {self.folder} are gone, so this run cannot go on: {ways}")

    def _has_leftovers(self) -> bool:
        """Whether a killed process left something under a hidden name."""
        return any(_HIDDEN.fullmatch(p.name) for p in self.folder.iterdir()) or self.states.has_leftovers()

    def _read(
        self, announce: Announce, expected: Expected | None
    ) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """The newest state, left as it is; None when it is damaged and this process may mend it."""
        try:
            return self.states.load(announce, mend=False, expected=expected)
        except CheckpointError:
            if self.writes:
                return None
            raise

    def log(self, line: dict) -> dict:
        """Append one line to metrics.jsonl; NaN never gets in."""
        if self.writes:
            with self.writing():
                run_log.append(self.log_file, to_json(line) + "\n")
        self._logged = line["step"] if "loss" in line else self._logged
        return line

    def save_state(self, step: int, tensors: Mapping[str, Tensor], document: dict[str, Any]) -> None:
        """Save all that the next step depends on; the log up to here is on the disk before it counts."""
        check_finite(tensors, step, self.states.newest(), self.asked["config"].get("precision"))
        with self.writing():
            if self.log_file.exists():
                sync(self.log_file)
            copy = {COPY: {**self._said, SAVED: True}} if self._said else {}
            saved = self.states.save(step, tensors, {**copy, **document, "logged": self._logged})
            if not self._is_ours():  # it became another run's folder while this was written
                discard(saved)
            elif self._said and self._said.get(SAVED) is not True:
                self._say({**self._said, SAVED: True})

    @contextmanager
    def writing(self, otherwise: str | None = None) -> Iterator[None]:
        """Writing that fails in here is a TrainingError in a sentence: the disk is full, the folder is read-only.

        So it is where the folder was removed under the run, or made anew by another one: nothing is written there.
        """
        self._check_ours()
        try:
            yield
        except OSError as error:
            self._check_ours()
            unmade = os.fsdecode(error.filename or "") in map(str, (self.folder, *self.folder.parents))
            if unmade and error.errno not in FULL:  # such as one in /proc
                raise UserError(f"cannot make {self.folder} ({error.strerror}): choose another --out") from error
            remedy = more_room(error) if error.errno in FULL else "make it writable or choose another --out"
            raise TrainingError(
                f"cannot write {visible(error.filename) or self.folder} ({error.strerror}): {remedy}; "
                f"{otherwise or self.where_it_stands()}"
            ) from error
        self._check_ours()

    @contextmanager
    def training(self) -> Iterator[None]:
        """What a trainer works in: then others may write in the folder.

        Data that are gone (DataError) and memory that ran out (TrainingError) say in here what is saved.
        """
        try:
            yield
        except ReplacedError as error:
            said = str(error).removesuffix(": start again")
            raise ReplacedError(f"{said}: put the old one back; {self.where_it_stands()}") from error
        except DataError as error:
            raise DataError(f"{error}; {self.where_it_stands()}") from error
        except Exception as error:
            if not memory.ran_out(error):
                raise
            said = memory.sentence(f"train {self.asked['kind']}", error)
            raise TrainingError(f"{said}; {self.where_it_stands()}") from error
        finally:
            self.release()

    def where_it_stands(self) -> str:
        """What is saved, and how to go on from there, for the end of a sentence."""
        newest = self.states.newest()
        return f"the last good state is {newest}, go on with: {self.again}" if newest else "no state is saved yet"

    def asked_twice(self) -> str:
        """What is to be said to who does not wait until a step is done and saved."""
        saved = self.states.newest()
        ways = self.where_it_stands() if saved else f"no state is saved yet, start again with: {self.typed}"
        return f"asked twice, so this step was not saved: {ways}"

    def _is_ours(self) -> bool:
        return self._lock is None or still_held(self.folder, self._lock)

    def _check_ours(self) -> None:
        if not self._is_ours():
            raise TrainingError(
                f"{self.folder} was removed or replaced while this run was writing there, so it ended: "
                "start it again with another --out"
            )

    def release(self) -> None:
        """Let other runs into the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _hold(self, announce: Announce) -> None:
        if self._lock is None:
            self._lock = take(self.folder, announce)
            weakref.finalize(self, self._lock.close)  # also where this ends in an error

    def _clear(self, names: Iterable[str]) -> None:
        """Take these away, what is resumable first, and last what says that here is a run."""
        for name in sorted(set(names) - {LOCK}, key=lambda name: (name == "run.json", name != "state")):
            if os.path.lexists(self.folder / name):
                discard(self.folder / name)

    def _begin(self, more: dict[str, Any]) -> None:
        """Say in the folder what is asked for now."""
        self._say({**self.asked, "command": self.command, "versions": versions(), **more})

    def _say(self, document: dict[str, Any]) -> None:
        write_whole(self.folder / "run.json", to_json(document, 1) + "\n")
        self._said = document

    def _known(self) -> tuple[dict[str, Any], Copied | None]:
        return known_run(self.folder, self.asked, self._free)

    def _write_again(self, copied: Copied, announce: Announce) -> None:
        """Put the copy of run.json in its place."""
        path, done = self.folder / "run.json", ""
        if os.path.lexists(path):
            done = f", and set aside as {set_aside(path).name}"
        self._say(self._said)
        announce(f"{copied.why}: made anew from the copy in {copied.state}{done}")

    def _set_aside(self, name: str) -> None:
        """Make room for a folder where something else has its name."""
        path = self.folder / name
        if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
            set_aside(path)


def goes_on(folder: Path, asked: Asked, free: tuple[str, ...], resume: bool, overwrite: bool) -> bool:
    """Whether a run that is asked for goes on with the one in the folder. Facts may still be missing in `asked`.

    free: settings that may differ. UserError when the folder holds anything else, a run with other settings, or one
    that is alive. Writes nothing.
    """
    if resume and overwrite:
        raise UserError("give --resume to go on or --overwrite to start over, not both")
    check_folder(folder, overwrite=True, holds="run")
    refuse_alive(folder)
    if overwrite:
        refuse_to_take_away(folder)
        refuse_other_kind(folder, *OWN[asked["kind"]])
    content = _content(folder)
    if overwrite or not content:
        if resume:
            raise UserError(f"{folder} holds no run to resume: start it without --resume")
        return False
    started = has_states(folder)
    if "run.json" not in content and not started:
        if resume:
            raise UserError(f"{folder} holds no run to resume but other files ({content[0]}): choose another --out")
        refuse_used(folder, OWN[asked["kind"]])
    try:
        before, _ = known_run(folder, asked, free)
    except CheckpointError:
        if not resume and not started:
            refuse_used(folder, OWN[asked["kind"]])
        raise
    _refuse_links(folder)
    changed = differences(before, plain(asked), free)
    if changed:
        ways = "resume with the same" if resume else "give the same to go on, another --out, or --overwrite"
        if before["kind"] != asked["kind"]:
            ways = "choose another --out"
        raise UserError(f"{folder} was started with other settings ({'; '.join(changed[:4])}): {ways}")
    return True


def _refuse_links(folder: Path) -> None:
    """CheckpointError where a part of a run is a link: what it leads to is not the run's to write or to delete."""
    for path in (*(folder / name for name in WRITTEN), *(folder / "state").glob("step-*")):
        if path.is_symlink():
            way = "put what it leads to in its place"
            if not os.path.exists(path):
                states = path.name == "state" or path.parent.name == "state"  # which are nowhere else
                way = "it leads to nothing, so " + ("put what it led to in its place" if states else "remove it")
            raise CheckpointError(f"{path} is a link: {way} (only {folder} may be a link)")


def _content(folder: Path) -> list[str]:
    """Names in a folder, without the lock and what a killed start left under hidden names."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    return [name for name in names if name != LOCK and not _HIDDEN.fullmatch(name)]
