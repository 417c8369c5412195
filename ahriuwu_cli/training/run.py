"""A training run on disk: what was asked for, what happened, and states to go on from. Never overwritten unasked.

run.json        resolved configuration, command line, processes, versions, git revision
metrics.jsonl   one JSON object a line
state/step-N/   all that a resumed run needs (the last few)
best/ last/     worlds: by free-running gain on held-out windows, and at the end

The lead of several processes writes; a state is the same at any number of them, and can be gone on from at any other.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ahriuwu_cli import __version__
from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.documents import parse_object, read_object
from ahriuwu_cli.errors import CheckpointError, UserError
from ahriuwu_cli.training.checkpoint import save_world
from ahriuwu_cli.training.sharding import gathered, placed_as, placed_for
from ahriuwu_cli.training.state import (
    load_optimizer_tensors,
    load_state,
    optimizer_tensors,
    save_state,
    under_prefix,
    with_prefix,
)

if TYPE_CHECKING:
    from ahriuwu_cli.training.distributed import Group
    from ahriuwu_cli.training.loop import DynamicsTrainer
    from ahriuwu_cli.world import World


_UNFIT = (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError)  # what strange fields raise
FREE = ("accumulate",)  # settings that a resume may change: they share the same work out otherwise


class Run:
    """The folder of one run. `facts` (dataset, tokenizer, architecture) must be the same when it is resumed.

    writes: whether this process may; the others of its group see the same run and leave the folder alone.
    """

    def __init__(self, folder: Path, config: TrainConfig, facts: dict, command: str, writes: bool = True) -> None:
        self.folder, self.config, self.facts, self.command = Path(folder), config, facts, command
        self.writes = writes

    @classmethod
    def start(
        cls,
        folder: Path,
        config: TrainConfig,
        facts: dict,
        command: str,
        overwrite: bool = False,
        group: Group | None = None,
    ) -> Run:
        """A new run in an empty or absent folder. UserError when it holds something and overwrite is off."""
        if group is not None and not group.leads:
            return cls(folder, config, facts, command, writes=False)
        refuse_used(folder, overwrite)
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        run = cls(folder, config, facts, command)
        document = {"config": config.to_json(), "facts": facts, "command": command, "versions": versions()}
        document |= group.facts() if group is not None else {}
        _write_json(folder / "run.json", document)
        return run

    @classmethod
    def resume(cls, folder: Path, config: TrainConfig, facts: dict, command: str, group: Group | None = None) -> Run:
        """Go on in a run's folder. UserError when it was started with other settings, naming them."""
        try:
            document = read_object(folder / "run.json")
            before, old_facts = TrainConfig.from_json(document["config"]).to_json(), dict(document["facts"])
            started_by = str(document["command"])
        except FileNotFoundError:
            raise UserError(f"{folder} holds no run to resume: start it without --resume") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / 'run.json'} cannot be read ({error})") from None
        now = config.to_json()
        changed = [f"{k} {before[k]!r} -> {now[k]!r}" for k in now if now[k] != before[k] and k not in FREE]
        changed += [f"{k} differs" for k in facts if facts[k] != old_facts.get(k)]
        if changed:
            raise UserError(
                f"{folder} was started with other settings ({'; '.join(changed[:4])}): resume with the same"
            )
        return cls(folder, config, facts, started_by, writes=group is None or group.leads)

    def log(self, line: dict) -> dict:
        """Append one line to metrics.jsonl; NaN never gets in."""
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        return line

    def newest_state(self) -> Path | None:
        """The newest resumable state, or None."""
        found = sorted(d.parent for d in (self.folder / "state").glob("step-*/state.json"))
        return found[-1] if found else None

    def save(self, trainer: DynamicsTrainer) -> None:
        """Save everything that the next step depends on; keep the last few states. All processes take part."""
        tensors = with_prefix("model", trainer.model.state_dict())
        tensors |= with_prefix("average", trainer.average.state_dict())
        document = {
            "step": trainer.step,
            "total": trainer.total,
            "elapsed": trainer.elapsed,
            "best": trainer.best,
            "optimizers": [],
            **trainer.group.facts(),
        }
        for i, optimizer in enumerate(trainer.optimizers):
            state, description = optimizer_tensors(optimizer)
            tensors |= with_prefix(f"optimizer{i}", state)
            document["optimizers"].append(description)
        tensors = gathered(tensors, keep=self.writes)
        if not self.writes:
            return
        save_state(self.folder / "state" / f"step-{trainer.step:08d}", tensors, document)
        for old in sorted((self.folder / "state").glob("step-*"))[: -self.config.keep]:
            shutil.rmtree(old)

    def load(self, trainer: DynamicsTrainer) -> dict:
        """Bring a fresh trainer to the newest saved state, exactly, and drop later lines of the log.

        Returns who wrote the state: {"processes", "parallel"}. States from before there were several say one.
        """
        newest = self.newest_state()
        if newest is None:
            raise UserError(f"{self.folder} has no saved state yet: start again with --overwrite")
        tensors, document = load_state(newest)
        try:
            for part, module in (("model", trainer.model), ("average", trainer.average)):
                module.load_state_dict(placed_as(under_prefix(part, tensors), module.state_dict()), strict=True)
            for i, optimizer in enumerate(trainer.optimizers):
                mine = placed_for(optimizer, under_prefix(f"optimizer{i}", tensors))
                load_optimizer_tensors(optimizer, mine, document["optimizers"][i])
            trainer.step, trainer.total = _number(document, "step", int), _number(document, "total", int, None)
            trainer.elapsed, trainer.best = _number(document, "elapsed", float), _number(document, "best", float, None)
        except _UNFIT as error:
            raise CheckpointError(f"{newest} does not fit this run: {error}") from None
        if self.writes:
            cut_log(self.folder / "metrics.jsonl", trainer.step)
        return {"processes": document.get("processes", 1), "parallel": document.get("parallel", "none")}

    def save_world(self, world: World, name: str, trainer: DynamicsTrainer) -> None:
        """Write the averaged weights as the world `best` or `last`."""
        world.facts = {
            **versions(),
            "command": self.command,
            "step": trainer.step,
            "train_seconds": round(trainer.elapsed, 1),
            "preview_gain_db": trainer.best,
            "train": self.config.to_json(),
            **self.facts,
        }
        save_world(world, self.folder / name)


def refuse_used(folder: Path, overwrite: bool) -> None:
    """UserError when a run folder already holds something and --overwrite was not given, or when it is a file."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder for the run")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is not empty: choose another --out, go on with --resume, or give --overwrite")


def cut_log(file: Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl that come after `step`, and one that a kill cut short. CheckpointError."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise CheckpointError(f"{file} is no regular file: move it away, a log is written there")
    if file.exists():
        lines = file.read_bytes().decode("utf-8", "replace").split("\n")  # what is no text is no line either
        kept = [line for line in lines if _step_of(line) <= step]
        file.write_text("".join(line + "\n" for line in kept))


def versions() -> dict:
    """What this ran with: ahriuwu, torch, Python, and the git revision of the code where it is a checkout."""
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "ahriuwu": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": git.stdout.strip() or None,
    }


def _write_json(path: Path, document: dict) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(document, indent=1))
    os.replace(temporary, path)


def _number(document: dict, name: str, kind: type, *or_else: None) -> Any:
    """A number of a state's document that is not below zero where it is whole; or None where that may stand there."""
    value = document[name]
    if value is None and or_else:
        return None
    if type(value) not in (kind, int) or (kind is int and value < 0):
        raise ValueError(f"{name} is {value!r}")
    return value


def _step_of(line: str) -> float:
    """The step of a line of metrics; a line that was cut short counts as later than all."""
    try:
        return int(parse_object(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
