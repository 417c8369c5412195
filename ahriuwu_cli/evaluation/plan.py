"""Plans: which cells, each a checkpoint, a dataset and settings, a batch evaluation measures; read strictly.

TOML:                             JSON lines (defaults, when there are any, come first):
    [defaults]                        {"defaults": {"dataset": "data", "windows": 64}}
    dataset = "data"                  {"checkpoint": "runs/a"}
    windows = 64                      {"checkpoint": "runs/a", "steps": 16, "sampler": "euler"}
    [[cell]]
    checkpoint = "runs/a"

Paths are relative to the plan's folder. A setting that is left out has the default of `ahriuwu eval`.
"""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ahriuwu_cli import ranges
from ahriuwu_cli.data.documents import decode, parse_json, read_bytes
from ahriuwu_cli.errors import CheckpointError, DataError, UserError, did_you_mean

MAX_BYTES = 1_000_000
MAX_CELLS = 10_000  # each is checked before the first is run, and is a file
MAX_DOTS = 64  # of a line: names with thousands of parts would take hours to read
GENERATION = ("steps", "sampler", "tau_ctx", "ctx_mode", "ctx_label")
WINDOWS = ("split", "windows", "context", "horizon")  # of windows still to be drawn; a manifest has its own
_KINDS = {
    "checkpoint": str, "dataset": str, "manifest": str,
    "steps": int, "sampler": str, "tau_ctx": float, "ctx_mode": str, "ctx_label": str,
    "split": str, "windows": int, "context": int, "horizon": int,
    "seed": int, "noise_seeds": int,
}  # fmt: skip
_RANGES = {
    "steps": ranges.STEPS, "tau_ctx": ranges.TAU_CTX, "windows": ranges.WINDOWS, "context": ranges.CONTEXT,
    "horizon": ranges.HORIZON, "seed": ranges.SEED, "noise_seeds": ranges.NOISE_SEEDS,
}  # fmt: skip
_WORDS = {str: "text", int: "a whole number", float: "a number"}
_SUFFIXES = {".toml": "TOML", ".jsonl": "JSON lines", ".ndjson": "JSON lines"}


@dataclass(frozen=True)
class Cell:
    """One evaluation. None: the default of `ahriuwu eval`, for generation the checkpoint's own."""

    checkpoint: Path
    dataset: Path
    manifest: Path | None = None
    steps: int | None = None  # K
    sampler: str | None = None
    tau_ctx: float | None = None  # noise of context frames: 0 clean, 1 noise
    ctx_mode: str | None = None
    ctx_label: str | None = None
    split: str | None = None
    windows: int | None = None
    context: int | None = None  # frames given
    horizon: int | None = None  # frames generated
    seed: int | None = None
    noise_seeds: int | None = None
    where: str = field(default="the cell", compare=False)  # in the plan, for sentences
    names: tuple[str, str] = field(default=("", ""), compare=False)  # checkpoint and dataset as the plan writes them

    def given(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Those of the named settings that the plan sets."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def read_plan(path: Path) -> list[Cell]:
    """The cells of a plan, in order. UserError for a bad plan; CheckpointError or DataError for a path that is not."""
    defaults, entries = _parse(path)
    _check_keys(defaults, f"the defaults of {path.name}")
    if not entries:
        raise UserError(f"{path} has no cell: add one, {_example(path)}")
    if len(entries) > MAX_CELLS:
        raise UserError(f"{path} has {len(entries)} cells, more than {MAX_CELLS}: make several plans of it")
    seen: dict[Cell, str] = {}
    for where, entry in entries:
        _check_keys(entry, where)
        cell = _cell(path.parent, {**defaults, **entry}, where)
        if cell in seen:
            raise UserError(f"{where} repeats {seen[cell]}: remove one of them")
        seen[cell] = where
    return list(seen)


def _parse(path: Path) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """(defaults, [(where, settings)])."""
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is no plan by its name: call it .toml, or .jsonl for JSON lines")
    try:
        text = decode(read_bytes(path, MAX_BYTES))
    except FileNotFoundError:
        raise UserError(f"there is no plan at {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as text ({error}): give a plan in TOML or JSON lines") from None
    return _from_toml(path, text) if kind == "TOML" else _from_lines(path, text)


def as_keys(sentence: str) -> str:
    """A sentence about options of a command line as one about the keys of a plan."""
    keys = {f"--{key.replace('_', '-')}": key for key in _KINDS}
    return re.sub(r"`[^`]*`|(?<![^\s(])--[a-z]+(?:-[a-z]+)*", lambda found: keys.get(found[0], found[0]), sentence)


def _from_toml(path: Path, text: str) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    try:
        if any(line.count(".") > MAX_DOTS for line in text.split("\n")):  # as TOML does
            raise ValueError(f"a line has more than {MAX_DOTS} dots")
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    for name in document:
        if name not in ("defaults", "cell"):
            raise UserError(f"{path} has the unknown entry {name!r}: {did_you_mean(name, ('defaults', 'cell'))}")
    defaults, cells = document.get("defaults", {}), document.get("cell", [])
    if not isinstance(defaults, dict):
        raise UserError(f"{path}: defaults is {_shown(defaults)}, not a table: write [defaults]")
    if not isinstance(cells, list) or not all(isinstance(c, dict) for c in cells):
        raise UserError(f"{path}: cell is not a list of tables: begin every cell with [[cell]]")
    return defaults, [(f"cell {i} of {path.name}", c) for i, c in enumerate(cells, 1)]


def _from_lines(path: Path, text: str) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    defaults, entries = None, []
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {i} of {path.name}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise UserError(f"{where} is {str(entry)[:40]!r}, not an object of settings: write one a line in braces")
        if "defaults" not in entry:
            entries.append((where, entry))
            continue
        if defaults is not None or entries or len(entry) > 1 or not isinstance(entry["defaults"], dict):
            raise UserError(f'{where}: defaults must be the first line, alone, as {{"defaults": {{...}}}}')
        defaults = entry["defaults"]
    return defaults or {}, entries


def _check_keys(entry: dict[str, Any], where: str) -> None:
    for name, value in entry.items():
        if name not in _KINDS:
            raise UserError(f"{where} has the unknown key {name!r}: {did_you_mean(name, tuple(_KINDS))}")
        kind = _KINDS[name]
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or isinstance(value, bool) or value == "":
            raise UserError(f"{where}: {name} is {_shown(value)}, not {_WORDS[kind]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}: {name} is {value!r}, not a finite number")
        if name in _RANGES:
            _check_range(name, value, where)


def _check_range(name: str, value: float, where: str) -> None:
    """UserError where the option of the same name would refuse the value."""
    low, high = _RANGES[name]
    within, fits = f"{low} to {high}", low <= value <= high
    if _KINDS[name] is float:  # tau
        within, fits = f"[{low:g}, {high:g}), where 0 is clean and 1 is noise", low <= value < high
    if not fits:
        raise UserError(f"{where}: {name} {_shown(value)} is not in {within}")


def _shown(value: Any) -> str:
    """A value as a sentence quotes it; numbers with thousands of digits are not written out."""
    try:
        text = repr(value)
    except ValueError:
        return "a number with thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}"


def _cell(folder: Path, settings: dict[str, Any], where: str) -> Cell:
    for name in ("checkpoint", "dataset"):
        if name not in settings:
            raise UserError(f"{where} names no {name}: add it there or to the defaults")
    both = [name for name in WINDOWS if name in settings]
    if "manifest" in settings and both:
        raise UserError(f"{where} names a manifest, which has its own {both[0]}: leave one of them out")
    names = (settings["checkpoint"], settings["dataset"])
    for name, error in (("checkpoint", CheckpointError), ("dataset", DataError), ("manifest", DataError)):
        if name in settings:
            settings[name] = folder / settings[name]
            if not _exists(settings[name]):
                raise error(f"{where}: the {name} {settings[name]} does not exist")
    if "tau_ctx" in settings:
        settings["tau_ctx"] = ranges.as_number(settings["tau_ctx"])
    assert set(settings) <= {f.name for f in fields(Cell)}, settings
    return Cell(**settings, where=where, names=names)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        return False


def _example(path: Path) -> str:
    if path.suffix.lower() == ".toml":
        return 'as [[cell]] with checkpoint = "..." and dataset = "..."'
    return 'as {"checkpoint": "...", "dataset": "..."}'
