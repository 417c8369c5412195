"""Action files: CSV or JSON lines to columns of numbers, and a guess at their action space that is always announced.

Lines are parsed some thousands at a time. Only where something is wrong among them is each looked at, to name it.
"""

from __future__ import annotations

import csv
import io
import math
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.action_component import MAX_SIZE, ActionComponent, as_float32, check_name
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import decode, parse_json, read_bytes
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.ranges import as_number

if TYPE_CHECKING:
    import numpy as np

MAX_COLUMNS = 512
MAX_BYTES = 20_000_000
MAX_LINE = 65_536  # characters
BLOCK = 1 << 15  # characters of lines that are parsed together


@dataclass(frozen=True)
class ActionTable:
    """One action file: names of columns (None where the file gives bare arrays) and its rows, float64 (T, columns)."""

    path: Path
    columns: tuple[str, ...] | None
    rows: np.ndarray

    def order_in(self, space: ActionSpace) -> list[int]:
        """Which column of the file is which of the action space. Raises DataError when they differ."""
        if self.columns is None:
            if self.rows.shape[1] != space.width:
                raise DataError(
                    f"{self.path} has {self.rows.shape[1]} values a row, and the action space {space.width}"
                )
            return list(range(space.width))
        if sorted(self.columns) != sorted(space.column_names):
            raise DataError(
                f"{self.path} has the columns {', '.join(self.columns)}, and the action space has "
                f"{', '.join(space.column_names) or 'none'}: name them alike"
            )
        return [self.columns.index(name) for name in space.column_names]

    def rows_for(self, space: ActionSpace) -> np.ndarray:
        """Float32 (T, A) with the columns in the order of the action space. Raises DataError when they differ."""
        order = self.order_in(space)
        return self.rows.astype("float32")[:, order]


def read_actions(path: Path) -> ActionTable:
    """Read a .csv or .jsonl file of actions. Raises DataError that names the line."""
    try:
        data = read_bytes(path, MAX_BYTES).removeprefix(b"\xef\xbb\xbf")  # spreadsheets write that mark
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be taken ({error}): give a smaller file of actions") from None
    try:
        decode(data)
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): save it as CSV or JSON lines") from None
    read = _read_csv if path.suffix.lower() == ".csv" else _read_jsonl
    table = read(path, _blocks(path, data))
    if not len(table.rows):
        raise DataError(f"{path} holds no action: give a row for each step from a frame to the next")
    return table


def infer_space(tables: Iterable[ActionTable]) -> tuple[ActionSpace, list[str]]:
    """The action space that fits all files, and sentences that say what was guessed. One table is held at a time.

    A single whole-number column `action` is discrete; columns of 0 and 1 are buttons; all else is continuous between
    the smallest and the largest value seen. Raises DataError when the files do not have the same columns.
    """
    import numpy as np

    first, names, bare, whole = None, (), None, True
    for table in tables:
        own, rows = table.columns or _array_names(table.rows.shape[1]), table.rows
        if first is None:
            first, names = table.path, own
            low, high, button = np.full(len(own), np.inf), np.full(len(own), -np.inf), np.full(len(own), True)
        if sorted(own) != sorted(names):
            raise DataError(f"{table.path} has the columns {', '.join(own)}, and {first} has {', '.join(names)}")
        bare = bare or (table.path if table.columns is None else None)
        order = [own.index(name) for name in names]
        low, high = np.minimum(low, rows.min(0)[order]), np.maximum(high, rows.max(0)[order])
        button &= ((rows == 0) | (rows == 1)).all(0)[order]
        whole = whole and names == ("action",) and bool((rows == rows.round()).all())
    if first is None:
        return ActionSpace(), ["no action files: the dataset has video only"]
    if names == ("action",) and low[0] >= 0 and whole:
        top = int(high[0])
        if top >= MAX_SIZE:
            raise DataError(f"{first}: the column 'action' goes up to {top}: declare the space in actions.json")
        space = ActionSpace((ActionComponent("action", "discrete", top + 1),))
        return space, [f"inferred one discrete action, 0 to {top}; an actions.json beside the videos declares another"]
    buttons = tuple(n for n, pressed in zip(names, button, strict=True) if pressed)
    axes = tuple(n for n in names if n not in buttons)
    if bare and (*buttons, *axes) != _array_names(len(names)):  # a bare array's values are taken in the space's order
        raise DataError(
            f"{bare} gives bare arrays, and the inferred space has another order ({', '.join((*buttons, *axes))}; "
            f"buttons come first): give objects with names, or declare the space in actions.json"
        )
    components, found = [], []
    if buttons:
        components.append(ActionComponent("buttons", "binary", len(buttons), buttons))
        found.append(f"{len(buttons)} buttons ({', '.join(buttons)})")
    if axes:
        ranges = [(float(low[i]), float(high[i])) for i in range(len(names)) if not button[i]]
        still = [as_float32(a) == as_float32(b) for a, b in ranges]  # as it will be stored, the column never moves
        ranges = [(min(a, 0.0), max(b, 0.0)) if s else (a, b) for s, (a, b) in zip(still, ranges, strict=True)]
        low, high = zip(*ranges, strict=True)
        components.append(ActionComponent("axes", "continuous", len(axes), axes, low, high))
        shown = ", ".join(f"{n} {a:g} to {b:g}" for n, a, b in zip(axes, low, high, strict=True))
        found.append(f"{len(axes)} continuous ({shown})")
    note = f"inferred {' and '.join(found)}; an actions.json beside the videos declares another"
    return ActionSpace(tuple(components)), [note]


def _blocks(path: Path, data: bytes) -> Iterator[tuple[int, list[str]]]:
    """Lines, those of about BLOCK characters together, with the number of the first. DataError for one without an end.

    By line feeds and carriage returns alone: a text in JSON may hold what `str.splitlines` also splits at.
    """
    text, first = io.TextIOWrapper(io.BytesIO(data), "utf-8"), 1
    while lines := text.readlines(BLOCK):
        if max(map(len, lines)) > MAX_LINE:
            long = next(i for i, line in enumerate(lines, first) if len(line) > MAX_LINE)
            raise DataError(f"{path}, line {long}: longer than {MAX_LINE} characters; give one row of numbers a line")
        yield first, lines
        first += len(lines)


def _read_csv(path: Path, blocks: Iterator[tuple[int, list[str]]]) -> ActionTable:
    columns: tuple[str, ...] | None = None
    values = array("d")
    try:
        for first, lines in blocks:
            if columns is None:
                reader = csv.reader(lines)
                names = next(filter(None, reader), None)
                columns = names and _header(path, names)
                first, lines = first + reader.line_num, lines[reader.line_num :]
            rows = list(csv.reader([*lines, "\n"]))  # a quote that is open at the end would take the last one in
            found = _floats([row for row in rows if row], len(columns or ()))
            if found is None or len(rows) != len(lines) + 1:
                raise _fault_of_csv(path, first, lines, columns)
            values.frombytes(found.tobytes())
    except csv.Error as error:
        raise DataError(f"{path} is not CSV ({error}): give a header of column names and rows of numbers") from None
    if columns is None:
        raise DataError(f"{path} is empty: give a header of column names and a row for each step")
    return _table(path, columns, values, len(columns))


def _fault_of_csv(path: Path, first: int, lines: list[str], columns: tuple[str, ...]) -> DataError:
    """For the first of the lines that is not as a row should be; what its numbers lack is raised at once."""
    reader, line = csv.reader(lines), first
    for line, row in enumerate(reader, first):
        if reader.line_num != line - first + 1:
            break
        if row:
            _check(path, line, row, columns)
    return DataError(f"{path}, line {line}: a quoted text does not end with its line: close the quote")


def _header(path: Path, names: list[str]) -> tuple[str, ...]:
    columns = tuple(name.replace("\n", "").strip() for name in names)
    if all(_is_number(name) for name in columns):
        raise DataError(f"{path} starts with numbers: give a header of column names first, such as 'action'")
    if len(set(columns)) != len(columns) or not all(columns):
        raise DataError(f"{path} has an empty or repeated column name in {', '.join(columns)!r}")
    _check_names(path, columns)
    return columns


def _read_jsonl(path: Path, blocks: Iterator[tuple[int, list[str]]]) -> ActionTable:
    columns: tuple[str, ...] | None = None
    width = 0  # not known yet
    values = array("d")
    for first, lines in blocks:
        texts = {i: line.strip(" \t\n") for i, line in enumerate(lines, first) if not line.isspace()}
        if texts and not width:
            columns, width = _form(path, *next(iter(texts.items())))
        rows = _rows_at_once(list(texts.values()), columns)
        found = None if rows is None else _floats(rows, width)
        if found is None:
            found = _floats([_row(path, i, text, columns, width) for i, text in texts.items()], width)
        values.frombytes(found.tobytes())
    return _table(path, columns, values, width)


def _rows_at_once(texts: list[str], columns: tuple[str, ...] | None) -> list[list[Any]] | None:
    """The rows of lines of JSON, parsed as one array; None where a line may be other than a row.

    No text of JSON goes over the end of a line, so each line begins with a value. As many values as lines are one a
    line, unless a row holds an array or object, which is no number.
    """
    kind, opening = (list, "[") if columns is None else (dict, "{")
    if not all(text.startswith(opening) for text in texts):
        return None
    try:
        rows = parse_json("[" + ",\n".join(texts) + "]")
    except ValueError:
        return None
    if len(rows) != len(texts) or not all(type(row) is kind for row in rows):
        return None
    if columns is None:
        return rows
    keys = set(columns)
    return [[row[name] for name in columns] for row in rows] if all(row.keys() == keys for row in rows) else None


def _form(path: Path, line: int, text: str) -> tuple[tuple[str, ...] | None, int]:
    """Names of columns, and how many there are, by the first row."""
    first = _value(path, line, text)
    if not isinstance(first, (dict, list)):
        raise _neither(path, line, text)
    _check_names(path, first if isinstance(first, dict) else _array_names(len(first)))
    return tuple(first) if isinstance(first, dict) else None, len(first)


def _row(path: Path, line: int, text: str, columns: tuple[str, ...] | None, width: int) -> list[Any]:
    """One row of JSON. DataError unless it is as the first is, and of numbers."""
    value = _value(path, line, text)
    if isinstance(value, dict) and columns is not None:
        if sorted(columns) != sorted(value):
            raise DataError(f"{path}, line {line}: the keys are {', '.join(value)}, not {', '.join(columns)}")
        value = [value[name] for name in columns]
    elif not isinstance(value, list) or columns is not None:
        raise _neither(path, line, text)
    if len(value) != width:
        raise DataError(f"{path}, line {line}: {len(value)} values where the first line has {width}")
    _check(path, line, value, columns or _array_names(width))
    return value


def _value(path: Path, line: int, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{path}, line {line}: not JSON ({error}); give one object or array a line") from None


def _neither(path: Path, line: int, text: str) -> DataError:
    return DataError(f"{path}, line {line}: {text[:40]!r}; give objects on every line, or arrays on every line")


def _floats(rows: list[list[Any]], width: int) -> np.ndarray | None:
    """All values, float64; None unless every row has `width` of them, each a finite number of float32."""
    import numpy as np

    if set(map(len, rows)) <= {width}:
        with suppress(TypeError, ValueError, OverflowError), np.errstate(over="ignore"):
            values = np.fromiter(map(as_number, chain.from_iterable(rows)), np.float64, len(rows) * width)
            if np.isfinite(values.astype(np.float32)).all():
                return values
    return None


def _table(path: Path, columns: tuple[str, ...] | None, values: array, width: int) -> ActionTable:
    import numpy as np

    return ActionTable(path, columns, np.frombuffer(values).reshape(-1, max(width, 1)))


def _check_names(path: Path, columns: Collection[str]) -> None:
    if not 1 <= len(columns) <= MAX_COLUMNS:
        raise DataError(f"{path} has {len(columns)} columns: give 1 to {MAX_COLUMNS}")
    for name in columns:
        check_name(name, str(path))


def _check(path: Path, line: int, values: list[Any], columns: tuple[str, ...]) -> None:
    """DataError that says what is wrong with a row."""
    if len(values) != len(columns):
        raise DataError(f"{path}, line {line}: {len(values)} values for {len(columns)} columns ({', '.join(columns)})")
    for name, value in zip(columns, values, strict=True):
        if isinstance(value, (dict, list)) or not _is_number(value):
            raise DataError(f"{path}, line {line}: the value of {name!r} is {value!r}, not a finite number of float32")


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(as_float32(as_number(value)))
    except (TypeError, ValueError, OverflowError):
        return False


def _array_names(width: int) -> tuple[str, ...]:
    return ("action",) if width == 1 else tuple(f"axis{i}" for i in range(width))
