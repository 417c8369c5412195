"""Where results may go: refused before the work when they cannot, or would take away what is read or worth keeping."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from ahriuwu_cli.errors import UserError

KINDS = {  # by what lies in them; many a project has a config.json
    "dataset": ("dataset.json",), "checkpoint": ("config.json", "model.safetensors"), "run": ("run.json",),
}  # fmt: skip
MOST_FOLDERS = 1000  # that are looked into for the sake of a sentence
PARTS = {  # of our folders, by what they are
    "dataset": ("episodes", "latents"),
    "checkpoint": ("tokenizer", "prompt"),
    "run": ("best", "last", "tokenizer", "state"),
    "results": ("cells",),
}
OURS = b'"format": ?"ahriuwu-(checkpoint/|state-)'  # in the first bytes of each file of a checkpoint, and of a state
OF = rb'"kind": ?"(dynamics|tokenizer)"'  # in those of config.json and run.json, and of a state
NAMES = {  # of what is a checkpoint or a run, for people
    ("checkpoint", "dynamics"): "world", ("checkpoint", "tokenizer"): "tokenizer",
    ("run", "dynamics"): "run", ("run", "tokenizer"): "tokenizer's run",
}  # fmt: skip


def check_folder(out: Path, overwrite: bool, holds: str = "results", own: tuple[str, ...] | None = None) -> None:
    """UserError when results cannot go to `out`: a file, no right to write, or results without --overwrite.

    Nothing goes among the files of a dataset, a checkpoint or a run, or takes one away that lies in `out` (a "run"
    and a "dataset" ask for that themselves). holds: "results" of looking at a world, a "rollout", and "pieces" of
    results that are written one by one, never take the place of one either; anything else that is written may
    replace its own kind (own: `refuse_other_kind`). What is put in place as one folder (all but "pieces" and a "run")
    cannot be the current one, which would be gone under the user's feet, nor one that cannot lose its name.
    """
    try:
        near = next(p for p in (out, *out.absolute().parents) if os.path.lexists(p))
    except OSError as error:
        raise UserError(f"{out} cannot be a folder ({error.strerror}): choose another --out") from None
    for i, part in enumerate(out.parts):  # making the folder would make what it goes back out of as well
        if part == ".." and not os.path.lexists(back := Path(*out.parts[:i] or ["."])):
            raise UserError(f"{out} leads through {back}, which does not exist: choose another --out")
    if not near.is_dir():
        what = "a link that leads nowhere" if near.is_symlink() and not near.exists() else "a file"
        raise UserError(f"{near} is {what}: choose a folder for --out")
    if not os.access(near, os.W_OK | os.X_OK):
        raise UserError(f"{near} cannot be written to: choose another --out")
    refuse_among_others(out, itself=holds in ("results", "rollout", "pieces"))
    if holds == "pieces":
        _refuse_linked_parts(out)
    if holds not in ("pieces", "run"):
        _refuse_irreplaceable(out, "results" if holds == "results" else f"a {holds}", exists=near == out)
    if near == out and not overwrite and any(out.iterdir()):
        refuse_used(out, own)
    if near == out and holds not in ("pieces", "run", "dataset"):
        refuse_to_take_away(out)
    if own is not None:
        refuse_other_kind(out, *own)


def refuse_used(out: Path, own: tuple[str, ...] | None = None) -> NoReturn:
    """UserError for a folder that is in use. --overwrite is advised where it would be taken alone. own: of NAMES."""
    try:
        refuse_to_take_away(out, most=MOST_FOLDERS)
        if own is not None:
            refuse_other_kind(out, *own)
    except UserError as error:
        raise UserError(f"{out} is not empty, and {error}") from None
    raise UserError(f"{out} is not empty: choose another --out, or give --overwrite to replace what is in it")


def _refuse_linked_parts(out: Path) -> None:
    """UserError where a part of results is a link: pieces that are written there would lie elsewhere."""
    for part in PARTS["results"]:
        if (out / part).is_symlink():
            raise UserError(f"{out / part} is a link, through which nothing is written: remove it, or link {out} whole")


def refuse_among_others(out: Path, itself: bool = True) -> None:
    """UserError when the folder `out` lies in a part of a dataset, a checkpoint or a run, or, with itself, is one."""
    target = _real(out)
    for folder in (target, *target.parents):
        kind = _kind(folder)
        if kind and folder == target:
            if itself:
                raise UserError(f"{out} holds a {kind}: choose another --out")
            continue
        if kind and target.relative_to(folder).parts[0] in PARTS[kind]:
            raise UserError(f"{out} lies among the files of the {kind} {folder}: choose another --out")


def refuse_to_take_away(out: Path, most: int | None = None) -> None:
    """UserError when a dataset, a checkpoint or a run lies anywhere in the folder `out`, which is to be replaced.

    most: folders that are looked into; more than these are refused as well. `out` itself may be one, with its own
    parts and what a killed process left of them under hidden names.
    """
    target = _real(out)
    in_run = _kind(target.parent) == "run" and target.name in PARTS["run"]  # a world, whatever it has lost
    own = "|".join(PARTS.get(_kind(target) or ("checkpoint" if in_run else None), ()))
    for i, (place, folders, _) in enumerate(os.walk(out)):
        if i == most:
            raise UserError(f"holds more than {most} folders: choose another --out")
        if place == str(out):
            folders[:] = [name for name in folders if not re.fullmatch(rf"{own}|\.({own})\.\d+\.(tmp|old)", name)]
        elif kind := _kind(Path(place)):
            raise UserError(f"--overwrite would take away the {kind} {place}: choose another --out than {out}")


def refuse_other_kind(out: Path, *own: str) -> None:
    """UserError when the folder `out`, which is to be replaced, is a dataset, a checkpoint or a run, but none of `own`.

    own: of NAMES. One that does not say what it is of, since its files are lost, may be any.
    """
    target = _real(out)
    kind = _kind(target)
    if kind == "dataset":
        raise UserError(f"--overwrite would take away the dataset {out}: choose another --out")
    told = (_first(file, OF) for file in (target / KINDS[kind][0], *_documents(target))) if kind else ()
    what = NAMES.get((kind, next(filter(None, told), None)))
    if what is not None and what not in own:
        raise UserError(f"--overwrite would take away the {what} {out}: choose another --out")


def _refuse_irreplaceable(out: Path, by: str, exists: bool) -> None:
    """UserError when another folder cannot take the name of `out`: the current folder, or one whose parent holds it."""
    if _real(out) == Path.cwd():
        raise UserError(f"{out} is the current folder, which {by} would replace: choose another --out")
    if exists and os.path.ismount(_real(out)):
        raise UserError(f"{out} is a disk of its own, which {by} cannot replace: choose a folder on it for --out")
    if exists and not os.access(parent := _real(out).parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} cannot be written to, so nothing takes the place of {out}: choose another --out")


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, by its run.json or its states."""
    return _kind(folder) == "run"


def _kind(folder: Path) -> str | None:
    """Which of KINDS a folder is. A checkpoint that lost one of its files still is one, where the other says so.

    So is a run with states.
    """
    lie = {kind: [name for name in names if os.path.lexists(folder / name)] for kind, names in KINDS.items()}
    whole = (kind for kind, names in lie.items() if len(names) == len(KINDS[kind]))
    kind = next(whole, "checkpoint" if any(_is_ours(folder / name) for name in lie["checkpoint"]) else None)
    return kind or ("run" if has_states(folder) else None)


def has_states(folder: Path) -> bool:
    """Whether a run's states lie in a folder, sound or not, whatever else does."""
    return any(map(_is_ours, _documents(folder)))


def _documents(folder: Path) -> list[Path]:
    """Those of the states of a run."""
    return sorted((folder / "state").glob("step-*/state.json"))


def _is_ours(file: Path) -> bool:
    """Whether a file says that it is of a checkpoint or a state of ours; many a project has files of these names."""
    return _first(file, OURS) is not None


def _first(file: Path, words: bytes) -> str | None:
    """What a file has of this pattern in its first bytes: the last group of it."""
    with suppress(OSError):
        if file.is_file():  # reading a pipe would not end
            with open(file, "rb") as stream:
                found = re.search(words, stream.read(1024))
                return found and found[found.re.groups].decode()
    return None


def keep_apart(out: Path, inputs: Iterable[Path]) -> None:
    """UserError when replacing `out` would take away what is read, or the folder that the user stands in.

    Results may lie inside of what is read (`runs/mine/eval`), but not where it keeps its own parts.
    """
    target = _real(out)
    parts = {part for each in PARTS.values() for part in each}
    for read in inputs:
        source = _real(read)
        own = target.is_relative_to(source) and target != source and target.relative_to(source).parts[0] in parts
        if source.is_relative_to(target) or own:
            raise UserError(f"--overwrite would replace {read}, which is read: choose another --out than {out}")
        for link in _links(source):
            if _real(link).is_relative_to(target):
                raise UserError(
                    f"--overwrite would replace what the link {link} leads to, which is read: choose another --out "
                    f"than {out}"
                )
    places = {"the current folder": Path.cwd()}
    with suppress(RuntimeError):  # a user whom the system does not know has none
        places["the home folder"] = Path.home()
    for what, place in places.items():
        if _real(place).is_relative_to(target):
            raise UserError(f"--overwrite would replace {what} ({out}): choose another --out")


def _links(folder: Path, levels: int = 2) -> Iterator[Path]:
    """Links in a folder and in those below it, as deep as what is read of a dataset, a world or videos."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # a file, or what the command itself will say
        return
    for entry in entries:
        if entry.is_symlink():
            yield Path(entry.path)
        elif levels > 1 and entry.is_dir():
            yield from _links(Path(entry.path), levels - 1)


def _real(path: Path) -> Path:
    """Without links. A circle of links stays as it is, where `Path.resolve` raises."""
    return Path(os.path.realpath(path))


def refuse_folders(files: Iterable[Path]) -> None:
    """UserError where one of these names, which files are to get, is a folder's."""
    for path in files:
        if path.is_dir():
            raise UserError(f"{path} is a folder, where a result is to go: move it away, or choose another --out")
