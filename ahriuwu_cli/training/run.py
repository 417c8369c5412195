"""A run of the dynamics on disk: the folder of a run, with a trainer's states and the worlds that come out.

best/ last/     worlds: by free-running gain on held-out windows, and at the end
tokenizer/      the tokenizer that was fitted for this run, where none was given

The lead of several processes writes; a state is the same at any number of them, and can be gone on from at any other.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.errors import CheckpointError
from ahriuwu_cli.training.asked import Asked, agrees, known_run
from ahriuwu_cli.training.checkpoint import is_sound, is_sound_tokenizer, load_tokenizer, save_tokenizer, save_world
from ahriuwu_cli.training.config_json import identity
from ahriuwu_cli.training.run_folder import WRITTEN, Announce, RunFolder, goes_on
from ahriuwu_cli.training.sharding import gathered, placed_as, placed_for
from ahriuwu_cli.training.state import load_optimizer_tensors, optimizer_tensors, under_prefix, with_prefix
from ahriuwu_cli.training.state_check import Expected, Held, held, is_path
from ahriuwu_cli.training.states import States, step_of
from ahriuwu_cli.training.versions import versions

if TYPE_CHECKING:
    from ahriuwu_cli.models.tokenizer import Tokenizer
    from ahriuwu_cli.training.loop import DynamicsTrainer
    from ahriuwu_cli.world import World

FREE = ("accumulate", "keep", "save_every")  # settings that a resume may change: the run's numbers stay the same


class Run(RunFolder):
    """The folder of one run. `facts` (dataset, tokenizer, architecture) must be the same when it is gone on with."""

    needed = ("total", "elapsed", "best", "optimizers")
    product = "last"

    def __init__(self, folder: Path, config: TrainConfig, facts: dict, command: str, writes: bool = True) -> None:
        super().__init__(folder, _asked(config, facts), command, config.keep, FREE, writes)
        self.config, self.facts = config, facts
        self.written: dict[str, str] = {}  # the worlds that it wrote, by name: what each is (`config_json.identity`)

    def save(self, trainer: DynamicsTrainer) -> None:
        """Save everything that the next step depends on; keep the last few states. All processes take part."""
        tensors = with_prefix("model", trainer.model.state_dict())
        tensors |= with_prefix("average", trainer.average.state_dict())
        optimizers = []
        for i, optimizer in enumerate(trainer.optimizers):
            state, description = optimizer_tensors(optimizer)
            tensors |= with_prefix(f"optimizer{i}", state)
            optimizers.append(description)
        tensors = gathered(tensors, keep=self.writes)
        sums, norms = trainer.log.unfinished(trainer.group)
        document = {
            "step": trainer.step,
            "total": trainer.total,
            "elapsed": trainer.elapsed,
            "looked": trainer.looked,
            "best": trainer.best,
            "finished": trainer.finished,
            "worlds": self.written,
            "optimizers": optimizers,
            "grad_norms": norms,
            **trainer.group.facts(trainer.config),
        }
        if self.writes:
            self.save_state(trainer.step, tensors | {"log": sums}, document)

    def expected(self, trainer: DynamicsTrainer) -> Expected:
        """What `save` would write of a trainer, but for its numbers. Without grad_norms an older version wrote it."""
        tensors = held("model", trainer.model.state_dict()) | held("average", trainer.average.state_dict())
        tensors["log"] = Held(torch.float64, trainer.log.shape, trainer.log.holds)
        return Expected(tensors, trainer.optimizers, optional={"log": "grad_norms"})

    def restore(self, trainer: DynamicsTrainer, found: tuple[Path, dict[str, Tensor], dict[str, Any]]) -> dict:
        """Bring a fresh trainer exactly to a state that `go_on` found, and held to what is expected of it.

        Returns who wrote the state, see `Group.facts`. States from before there were several say one.
        """
        _, tensors, document = found
        for part, module in (("model", trainer.model), ("average", trainer.average)):
            module.load_state_dict(placed_as(under_prefix(part, tensors), module.state_dict()), strict=True)
        for i, optimizer in enumerate(trainer.optimizers):
            mine = placed_for(optimizer, under_prefix(f"optimizer{i}", tensors))
            load_optimizer_tensors(optimizer, mine, document["optimizers"][i])
        trainer.step, trainer.total, trainer.elapsed = document["step"], document["total"], float(document["elapsed"])
        trainer.looked = float(document.get("looked", 0.0))  # states of older versions do not say it
        trainer.best = None if "best" in self.lacking else document["best"]  # lost: the next preview is the best
        trainer.finished = self.is_finished(document)
        if self.writes:  # what is there, which may be newer than the state
            there = [name for name in self._due(document) if name not in self.lacking]
            self.written = {name: identity(self._config_of(name)) for name in there}
        if "log" in tensors and trainer.group.leads:  # the sums of all
            shares = trainer.config.accumulate * trainer.group.world
            before = document.get("accumulate", trainer.config.accumulate) * document.get("processes", 1)
            trainer.log.go_on(tensors["log"], document.get("grad_norms", []), shares, before)
        return {"processes": 1, "parallel": "none"} | document

    def lost(self, document: dict[str, Any]) -> list[str]:
        """Worlds that a run at this state has written, and that are not there, damaged, or not this run's."""
        return [name for name in self._due(document) if not self._is_own(name, document)]

    def _due(self, document: dict[str, Any]) -> list[str]:
        """Worlds that a run at this state has written."""
        best = ["best"] if document.get("best") is not None else []
        return [*best, "last"] if self.is_finished(document) else best

    def _config_of(self, name: str) -> dict[str, Any]:
        return read_object(self.folder / name / "config.json")

    def _is_own(self, name: str, document: dict[str, Any]) -> bool:
        """Whether a world is there whole, and what this run wrote: sound ones may have been put in its place.

        One that is newer than the state (of its own step, where that is of before the last preview), and any of an
        older version's run, is held to what it states alone.
        """
        if not is_sound(self.folder / name):
            return False
        told = self._config_of(name)
        wrote, step = document.get("worlds", {}).get(name), told["facts"].get("step")
        last_preview = step == document["total"] and not self.is_finished(document)
        newer = type(step) is int and (step > document["step"] or last_preview)
        if wrote not in (None, identity(told)) and not newer:
            return False
        says, asked = told["facts"], asdict(self.config) | self.asked["facts"]  # as `save_world` states them
        asked["action_space"] = self.asked["facts"].get("architecture", {}).get("action_space")
        if self.is_finished(document):  # of another, the best may be newer than the state
            asked |= {"step": document["step"]} if name == "last" else {"preview_gain_db": document["best"]}
        same = agrees(asked, says, (*FREE, "init_from"), action_space=told["action_space"])
        return same and "averaged_with" not in says and self._starts_alike(says.get("init_from"))

    def _starts_alike(self, start: object) -> bool:
        """Whether a world started from what this run started from: one path, typed in whatever way, or moved since."""
        mine = {self.asked["facts"].get("init_from"), self._said.get("facts", {}).get("init_from")}
        if start is None:
            return None in mine
        mine.discard(None)
        return is_path(start) and os.path.realpath(start) in set(map(os.path.realpath, mine))

    def keep_tokenizer(self, tokenizer: Tokenizer, announce: Announce) -> None:
        """Write the tokenizer that is this run's own, unless it is there, so that going on needs no second fit."""
        if self.writes and not is_sound_tokenizer(self.folder / "tokenizer"):
            with self.writing():
                self._hold(announce)  # a finished run does not hold its folder
                self._set_aside("tokenizer")
                save_tokenizer(tokenizer, self.folder / "tokenizer", {})

    def save_world(self, world: World, name: str, trainer: DynamicsTrainer, gain: float) -> None:
        """Write the averaged weights as the world `best` or `last`. gain: of its own preview, dB."""
        world.facts = {
            **versions(),
            "command": self.command,
            "step": trainer.step,
            "train_seconds": round(trainer.elapsed, 1),
            "preview_gain_db": gain,
            "train": asdict(self.config),
            **self.facts,
        }
        with self.writing():
            save_world(world, self.folder / name)
            self.written[name] = identity(self._config_of(name))


def has_state(folder: Path) -> bool:
    """Whether a run in this folder has come to its first saved state, so that it needs no start any more."""
    return States(folder / "state", keep=1).newest() is not None


def seen_step(folder: Path) -> int | None:
    """The step of the newest state in this folder, sound or not; 0 where a run has none yet, None where no run is."""
    newest = States(folder / "state", keep=1).newest()
    if newest is None:
        return 0 if (folder / "run.json").is_file() else None
    return step_of(newest)


def run_goes_on(
    folder: Path, config: TrainConfig, facts: dict, resume: bool, overwrite: bool, fits: bool = False
) -> bool:
    """Whether this run goes on with what is in the folder; see `goes_on`. Facts that are not known yet are left out.

    fits: the tokenizer is the run's own. Killed between run.json and its tokenizer, it fits another one, whose last
    bits depend on threads; nothing was trained on the first.
    """
    if fits and has_fitted(folder) and not has_state(folder):
        facts = {name: value for name, value in facts.items() if name != "tokenizer_hash"}
    return goes_on(folder, _asked(config, facts), FREE, resume, overwrite)


def is_own_tokenizer(given: Path | None, out: Path) -> bool:
    """Whether the run in `out` keeps this tokenizer: none was given, or what it wrote itself and may clear away.

    A run that says that it was given one has none of its own, whatever its worlds hold. Older runs do not say.
    """
    if given is None:
        return True
    if has_fitted(out) is False:
        return False
    own, path = os.path.realpath(out), os.path.realpath(given)
    return path == own or any(Path(path).is_relative_to(os.path.join(own, name)) for name in WRITTEN)


def copy_of_tokenizer(folder: Path) -> Path | None:
    """Where a run that lost the tokenizer it fitted has a copy of just that, within one of its worlds."""
    wanted = _said_in(folder).get("facts", {}).get("tokenizer_hash")
    copies = (folder / world / "tokenizer" for world in ("best", "last"))
    return next((c for c in copies if is_sound_tokenizer(c) and load_tokenizer(c).fingerprint() == wanted), None)


def has_fitted(folder: Path) -> bool | None:
    """Whether the run in this folder says that its tokenizer is its own. None: no run, or an older version's."""
    said = _said_in(folder).get("fits_tokenizer")
    return said if isinstance(said, bool) else None


def known_start(init_from: Path | None, out: Path, overwrite: bool) -> str | None:
    """Path of the world that a run starts from, as the run in `out` knows it where both were moved together.

    So where that path leads to the same place: a link stands where the world was.
    """
    if init_from is None:
        return None
    before = {} if overwrite else _said_in(out)
    known = before.get("facts", {}).get("init_from")
    start = os.path.realpath(init_from)
    if known is None:
        return start
    moved = before.get("init_from_here") == from_here(init_from, out)
    return known if moved or os.path.realpath(known) == start else start


def from_here(init_from: Path | None, out: Path) -> str | None:
    """Path of a run's start, seen from the run's folder."""
    return None if init_from is None else os.path.relpath(os.path.realpath(init_from), os.path.realpath(out))


def _said_in(folder: Path) -> dict[str, Any]:
    """What the run.json of a folder says; nothing where there is none, or one that `goes_on` refuses."""
    try:
        return known_run(folder)[0]
    except CheckpointError:
        return {}


def _asked(config: TrainConfig, facts: dict) -> Asked:
    return {"kind": "dynamics", "config": config.to_json(), "facts": facts}
