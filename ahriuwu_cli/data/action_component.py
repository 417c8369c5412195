"""One part of an action: buttons, a choice, or numbers within bounds; read from JSON and from a user's words."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ahriuwu_cli.errors import DataError, UserError, did_you_mean
from ahriuwu_cli.ranges import as_number

KINDS = ("discrete", "binary", "continuous")
MAX_SIZE, MAX_BUTTONS = 4096, 512  # of a component and of all columns; of buttons, since pairs of them are drawn
MAX_NAME = 200  # characters of a name or a label


@dataclass(frozen=True)
class ActionComponent:
    """One part of an action. discrete: one column holding 0..size-1; binary: `size` columns of 0 or 1;
    continuous: `size` columns, column i within [low[i], high[i]]. Raises DataError when it contradicts itself."""

    name: str
    kind: str
    size: int
    labels: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in (self.name, *self.labels):
            check_name(name, "the action space")
        where = f"action component {self.name!r}"
        if not self.name or self.name != self.name.strip():
            raise DataError(f"{where} needs a name without spaces around it")
        if self.kind not in KINDS:
            raise DataError(f"{where} has the unknown kind {self.kind!r}: {did_you_mean(self.kind, KINDS)}")
        most = MAX_BUTTONS if self.kind == "binary" else MAX_SIZE
        if not 1 <= self.size <= most:
            raise DataError(f"{where} has size {self.size}: give 1 to {most}")
        if self.labels and len(self.labels) != self.size:
            raise DataError(
                f"{where} has {len(self.labels)} labels for size {self.size}: give one each, or none at all"
            )
        if len(set(self.labels)) != len(self.labels) or not all(self.labels):
            raise DataError(f"{where} has empty or repeated labels: {', '.join(map(repr, self.labels))}")
        bounds = self.size if self.kind == "continuous" else 0
        if len(self.low) != bounds or len(self.high) != bounds:
            raise DataError(f"{where} of kind {self.kind} needs {bounds} values in low and in high")
        for low, high in zip(self.low, self.high, strict=True):
            least, most = as_float32(low), as_float32(high)
            if not (least < most and math.isfinite(as_float32(2 * (most - least)))):  # the model scales values by it
                raise DataError(
                    f"{where} has the range {low} to {high}: low must be below high, and twice their distance finite, "
                    f"in float32"
                )

    @property
    def width(self) -> int:
        """How many columns it takes."""
        return 1 if self.kind == "discrete" else self.size

    @property
    def column_names(self) -> tuple[str, ...]:
        """A name for each of its columns."""
        if self.kind == "discrete":
            return (self.name,)
        return self.labels or tuple(f"{self.name}{i}" for i in range(self.size))

    def read(self, word: str, alone: bool, form: Callable[[str], str]) -> tuple[int, float] | None:
        """(which of its columns, value) that a user's word names, or None where it is not of this component.

        alone: no other component could be meant. form: how labels are compared. UserError for what is no number.
        """
        name, equals, value = word.partition("=")
        if self.kind == "continuous":
            if not equals or name not in self.column_names:
                return None
            try:
                return self.column_names.index(name), as_float32(as_number(value))
            except ValueError:
                raise UserError(f"the action {word!r} needs a number after '='") from None
        if equals and (self.kind == "binary" or name != self.name):
            return None
        by_number = self.kind == "binary" or equals or alone
        text, names = value if equals else word, self.column_names if self.kind == "binary" else self.labels
        known = [form(n) for n in names]
        if form(text) in known:
            index = known.index(form(text))
        elif by_number and text.isascii() and text.isdecimal() and len(text) < 6 and int(text) < self.size:
            index = int(text)
        else:
            return None
        return (index, 1) if self.kind == "binary" else (0, index)


def component_from_json(document: Any, where: str) -> ActionComponent:
    """What `ActionSpace.to_json` has of a component. Raises DataError on anything else."""
    known = {"name", "kind", "size", "labels", "low", "high"}
    if not isinstance(document, dict):
        raise DataError(f"{where}: every component must be an object, not {document!r}")
    if not {"name", "kind", "size"} <= set(document) <= known:
        odd = sorted(({"name", "kind", "size"} - set(document)) | (set(document) - known))
        raise DataError(
            f"{where}: a component must have name, kind, size and may have labels, low, high; see {odd[0]!r}"
        )
    name, kind, size = document["name"], document["kind"], document["size"]
    if not isinstance(name, str) or not isinstance(kind, str) or type(size) is not int:
        raise DataError(
            f"{where}: name and kind must be text and size a whole number, not {name!r}, {kind!r}, {size!r}"
        )
    labels, low, high = (document.get(key, []) for key in ("labels", "low", "high"))
    if not isinstance(labels, list) or not all(isinstance(x, str) for x in labels):
        raise DataError(f"{where}: the labels of {name!r} must be a list of texts, not {labels!r}")
    for bound in (low, high):
        if not isinstance(bound, list) or not all(type(x) in (int, float) for x in bound):
            raise DataError(f"{where}: low and high of {name!r} must be lists of numbers, not {bound!r}")
    return ActionComponent(name, kind, size, tuple(labels), tuple(map(float, low)), tuple(map(float, high)))


def check_name(name: str, where: str) -> None:
    """DataError for a name or label that is longer than any that a person gives."""
    if len(name) > MAX_NAME:
        raise DataError(f"{where} has the name {name[:40]!r}.. of {len(name)} characters: give at most {MAX_NAME}")


def as_float32(value: float) -> float:
    """The nearest number that float32 holds; infinite beyond its ends, where NumPy would warn."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
