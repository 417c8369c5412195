"""What was asked of a run: its run.json, the copy of it in each state, and whether it is what is asked for now."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ahriuwu_cli.config import ADDED
from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.errors import CheckpointError
from ahriuwu_cli.places import KINDS
from ahriuwu_cli.training.state_check import COPY, check_run
from ahriuwu_cli.training.states import States

SAVED = "state_saved"  # what a run.json says once a state is; nothing else of it ever changes
Asked = dict[str, Any]  # {"kind": "dynamics" or "tokenizer", "config": {...}, "facts": {...}}


def read_run(folder: Path) -> dict[str, Any]:
    """The run.json of a folder. CheckpointError when it cannot be read or is none of ours."""
    path = folder / "run.json"
    try:
        document = {"kind": "dynamics"} | read_object(path)
        check_run(document)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    return document


@dataclass(frozen=True)
class Copied:
    """That what a run.json says was read from a state's copy: which state, and why (the beginning of a sentence)."""

    state: Path
    why: str


def known_run(
    folder: Path, asked: Asked | None = None, free: tuple[str, ...] = ()
) -> tuple[dict[str, Any], Copied | None]:
    """The run.json of a folder; where that is lost or altered, the copy in its newest state that can be read, so said.

    asked: what is asked for now (free: but for these settings); what says the same is believed first. run.json is
    altered where all copies (those of what is asked for, where there are such) say one thing and it says another: they
    have hashes. CheckpointError when there is no copy either, or the folder is no run.
    """
    path, states = folder / "run.json", States(folder / "state", keep=1)

    def is_asked(said: dict[str, Any]) -> bool:
        return asked is not None and not differences(said, plain(asked), free)

    try:
        said = read_run(folder)
    except CheckpointError as error:
        copies = list(_copies(states))
        best = next((each for each in copies if is_asked(each[1])), copies[0] if copies else None)
        if best is not None:
            return best[1], Copied(best[0], str(error))
        if states.newest() is None:
            raise
        raise CheckpointError(f"{error}, and no state beside it has a copy of it: {ways_out(folder, path)}") from None
    copies = list(_copies(states))
    mine = [each for each in copies if is_asked(each[1])]
    same = _same_to_the_letter if is_asked(said) else _same
    denied = mine or ([] if is_asked(said) else copies)
    several = any(not same(copy, denied[0][1]) for _, copy in denied)  # runs: the file tells which is its own
    if not denied or several or any(same(copy, said) for _, copy in copies):
        return said, None
    return denied[0][1], Copied(denied[0][0], f"{path} was altered")


def _copies(states: States) -> Iterator[tuple[Path, dict[str, Any]]]:
    """States that have a sound copy of their run.json, newest first, and that."""
    for state, document in states.readable():
        with suppress(KeyError, ValueError):
            check_run(document[COPY])
            yield state, document[COPY]


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in ("kind", "config", "facts"))


def _same_to_the_letter(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all is the same that a run.json says for good."""
    return {**one, SAVED: None} == {**other, SAVED: None}


def ways_out(folder: Path, lost: Path) -> str:
    """What is left to do with a run that lost what it needs."""
    ways = [f"put {lost} back", "start over by --overwrite"]
    for world in (folder / "best", folder / "last"):
        if all((world / name).is_file() for name in KINDS["checkpoint"]):
            ways.insert(1, f"take its weights into another --out by --init-from {world}")
            break
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def agrees(asked: Mapping[str, Any], facts: Mapping[str, Any], free: Iterable[str], **more: Any) -> bool:
    """Whether what a run's product states is what was asked for, wherever both say something: its facts, the settings
    among them (`train`), and more of it. free: what may differ."""
    trained = facts.get("train")
    told = more | dict(facts) | (trained if isinstance(trained, dict) else {})
    return all(asked[key] == told[key] for key in asked.keys() & told.keys() - set(free))


def differences(before: dict[str, Any], asked: Asked, free: tuple[str, ...]) -> list[str]:
    """What is asked for now and was not then, each as "name old -> new"; long values only by name."""
    if before["kind"] != asked["kind"]:
        return [f"train {before['kind']} -> train {asked['kind']}"]
    old, new = (ADDED | each["config"] for each in (before, asked))
    pairs = [(name, old.get(name), new.get(name)) for name in [*new, *(old.keys() - new.keys())] if name not in free]
    facts = {name: (before["facts"].get(name), value) for name, value in asked.get("facts", {}).items()}
    start = facts.get("init_from", (None, None))
    if all(start) and os.path.realpath(start[0]) == os.path.realpath(start[1]):  # one path, typed in another way
        del facts["init_from"]
    pairs += [(name, *both) for name, both in facts.items()]
    return [f"{n} {a!r} -> {b!r}" if len(repr(a) + repr(b)) < 80 else f"{n} differs" for n, a, b in pairs if a != b]


def plain(asked: Asked) -> Asked:
    """As JSON gives it back."""
    return json.loads(json.dumps(asked))
