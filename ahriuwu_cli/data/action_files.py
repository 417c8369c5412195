"""Action files: CSV or JSON lines to columns of numbers, and a guess at their action space that is always announced."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.actions import MAX_SIZE, ActionComponent, ActionSpace, as_float32
from ahriuwu_cli.data.documents import decode, parse_json, read_bytes
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    import numpy as np

MAX_COLUMNS = 512
MAX_BYTES = 20_000_000
MAX_LINE = 65_536  # characters


@dataclass(frozen=True)
class ActionTable:
    """One action file: names of columns (None where the file gives bare arrays) and its rows of numbers."""

    path: Path
    columns: tuple[str, ...] | None
    rows: list[list[float]]

    def rows_for(self, space: ActionSpace) -> np.ndarray:
        """Float32 (T, A) with the columns in the order of the action space. Raises DataError when they differ."""
        import numpy as np

        values = np.array(self.rows, np.float32).reshape(len(self.rows), -1)
        if self.columns is None:
            if values.shape[1] != space.width:
                raise DataError(f"{self.path} has {values.shape[1]} values a row, and the action space {space.width}")
            return values
        if sorted(self.columns) != sorted(space.column_names):
            raise DataError(
                f"{self.path} has the columns {', '.join(self.columns)}, and the action space has "
                f"{', '.join(space.column_names) or 'none'}: name them alike"
            )
        return values[:, [self.columns.index(name) for name in space.column_names]]


def read_actions(path: Path) -> ActionTable:
    """Read a .csv or .jsonl file of actions. Raises DataError that names the line."""
    try:
        text = decode(read_bytes(path, MAX_BYTES).removeprefix(b"\xef\xbb\xbf"))  # spreadsheets write that mark
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): save it as CSV or JSON lines") from None
    long = next((i for i, line in enumerate(_lines(text), 1) if len(line) > MAX_LINE), None)
    if long is not None:
        raise DataError(f"{path}, line {long}: longer than {MAX_LINE} characters; give one row of numbers a line")
    table = _read_csv(path, text) if path.suffix.lower() == ".csv" else _read_jsonl(path, text)
    if not table.rows:
        raise DataError(f"{path} holds no action: give a row for each step from a frame to the next")
    width = len(table.rows[0])
    if not 1 <= width <= MAX_COLUMNS:
        raise DataError(f"{path} has {width} columns: give 1 to {MAX_COLUMNS}")
    return table


def infer_space(tables: list[ActionTable]) -> tuple[ActionSpace, list[str]]:
    """The action space that fits all files, and sentences that say what was guessed.

    A single whole-number column `action` is discrete; columns of 0 and 1 are buttons; all else is continuous between
    the smallest and the largest value seen. Raises DataError when the files do not have the same columns.
    """
    import numpy as np

    if not tables:
        return ActionSpace(), ["no action files: the dataset has video only"]
    first = tables[0]
    names = first.columns or _array_names(len(first.rows[0]))
    for table in tables:
        own = table.columns or _array_names(len(table.rows[0]))
        if sorted(own) != sorted(names):
            raise DataError(f"{table.path} has the columns {', '.join(own)}, and {first.path} has {', '.join(names)}")
    named = [ActionTable(t.path, t.columns or names, t.rows) for t in tables]
    columns = {
        name: np.concatenate([np.array(t.rows, np.float64)[:, t.columns.index(name)] for t in named]) for name in names
    }
    if names == ("action",) and _is_whole(columns["action"]):
        top = int(columns["action"].max())
        if top >= MAX_SIZE:
            raise DataError(f"{first.path}: the column 'action' goes up to {top}: declare the space in actions.json")
        space = ActionSpace((ActionComponent("action", "discrete", top + 1),))
        return space, [f"inferred one discrete action, 0 to {top}; an actions.json beside the videos declares another"]
    buttons = tuple(n for n in names if np.isin(columns[n], (0, 1)).all())
    axes = tuple(n for n in names if n not in buttons)
    if first.columns is None and buttons and axes and names != (*buttons, *axes):
        raise DataError(f"{first.path} mixes buttons and axes in bare arrays: give objects, or declare actions.json")
    components, found = [], []
    if buttons:
        components.append(ActionComponent("buttons", "binary", len(buttons), buttons))
        found.append(f"{len(buttons)} buttons ({', '.join(buttons)})")
    if axes:
        ranges = [(float(columns[n].min()), float(columns[n].max())) for n in axes]
        still = [as_float32(a) == as_float32(b) for a, b in ranges]  # as it will be stored, the column never moves
        ranges = [(min(a, 0.0), max(b, 0.0)) if s else (a, b) for s, (a, b) in zip(still, ranges, strict=True)]
        low, high = zip(*ranges, strict=True)
        components.append(ActionComponent("axes", "continuous", len(axes), axes, low, high))
        shown = ", ".join(f"{n} {a:g} to {b:g}" for n, a, b in zip(axes, low, high, strict=True))
        found.append(f"{len(axes)} continuous ({shown})")
    note = f"inferred {' and '.join(found)}; an actions.json beside the videos declares another"
    return ActionSpace(tuple(components)), [note]


def _read_csv(path: Path, text: str) -> ActionTable:
    try:
        lines = [(i, row) for i, row in enumerate(csv.reader(_lines(text)), 1) if row]
    except csv.Error as error:
        raise DataError(f"{path} is not CSV ({error}): give a header of column names and rows of numbers") from None
    if not lines:
        raise DataError(f"{path} is empty: give a header of column names and a row for each step")
    columns = tuple(name.strip() for name in lines[0][1])
    if all(_is_number(name) for name in columns):
        raise DataError(f"{path} starts with numbers: give a header of column names first, such as 'action'")
    if len(set(columns)) != len(columns) or not all(columns):
        raise DataError(f"{path} has an empty or repeated column name in {', '.join(columns)!r}")
    rows = [_numbers(path, i, row, columns) for i, row in lines[1:]]
    return ActionTable(path, columns, rows)


def _read_jsonl(path: Path, text: str) -> ActionTable:
    columns: tuple[str, ...] | None = None
    rows: list[list[float]] = []
    for i, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError:
            raise DataError(f"{path}, line {i}: not JSON; give one object or array a line") from None
        if isinstance(value, dict):
            columns = columns or tuple(value)
            if not value or (rows and len(rows[0]) != len(value)) or sorted(columns) != sorted(value):
                raise DataError(f"{path}, line {i}: the keys are {', '.join(value)}, not {', '.join(columns or ())}")
            value = [value[name] for name in columns]
        elif not isinstance(value, list) or columns is not None:
            raise DataError(
                f"{path}, line {i}: {line.strip()[:40]!r}; give objects on every line, or arrays on every line"
            )
        if rows and len(value) != len(rows[0]):
            raise DataError(f"{path}, line {i}: {len(value)} values where the first line has {len(rows[0])}")
        rows.append(_numbers(path, i, value, columns or _array_names(len(value))))
    return ActionTable(path, columns, rows)


def _lines(text: str) -> list[str]:
    """By line feeds and carriage returns alone: a text in JSON may hold what `str.splitlines` also splits at."""
    return re.split(r"\r\n?|\n", text)


def _numbers(path: Path, line: int, values: list[Any], columns: tuple[str, ...]) -> list[float]:
    if len(values) != len(columns):
        raise DataError(f"{path}, line {line}: {len(values)} values for {len(columns)} columns ({', '.join(columns)})")
    for name, value in zip(columns, values, strict=True):
        if isinstance(value, (dict, list)) or not _is_number(value):
            raise DataError(f"{path}, line {line}: the value of {name!r} is {value!r}, not a finite number of float32")
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(as_float32(float(value)))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_whole(values: np.ndarray) -> bool:
    return bool((values == values.round()).all() and (values >= 0).all())


def _array_names(width: int) -> tuple[str, ...]:
    return ("action",) if width == 1 else tuple(f"axis{i}" for i in range(width))
