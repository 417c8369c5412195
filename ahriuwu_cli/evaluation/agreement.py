"""Cells of the same windows of the same data held to each other: what no world has a part in is the same in all.

Of each cell alone nothing can be known there: its author may have raised every floor and made all else fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    from ahriuwu_cli.evaluation.merge import FinishedCell

_OF_DATA = re.compile(
    r"windows\.\d+\.floor_\d+|horizons\.\d+\.((floor|mean_frame)_\w+|teacher_forced_floor)"
    r"|curves\.(floor|mean_frame)\.\d+"
)
_OF_TOKENIZER = re.compile(r"windows\.\d+\.ceiling_\d+|curves\.ceiling\.\d+")
_CLOSE = 1e-5  # results have 6 decimals
_REDONE = 1.0  # dB: another device may round pixels of a reconstruction otherwise


def check_agreement(group: Sequence[FinishedCell]) -> None:
    """DataError where cells of one manifest differ in what the data alone decide, or the data and one tokenizer."""
    known: dict[tuple[re.Pattern, str], tuple[str, dict[str, Any]]] = {}
    for cell in group:
        told = dict(_leaves(cell.result))
        for names, by, slack in (
            (_OF_DATA, "", _CLOSE),
            (_OF_TOKENIZER, cell.identity["tokenizer_fingerprint"], _REDONE),
        ):
            mine = {name: value for name, value in told.items() if names.fullmatch(name)}
            other, theirs = known.setdefault((names, by), (cell.name, mine))
            apart = (name for name in mine.keys() | theirs.keys() if _differ(mine.get(name), theirs.get(name), slack))
            if name := min(apart, default=None):
                what = f"{'the data and their tokenizer' if by else 'the data'} alone decide"
                raise DataError(
                    f"cells {other} and {cell.name} are of the same windows, but differ in what {what} ({name}): move "
                    "away the one that was changed, or both, and run the plan again"
                )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a result that holds no others, by its path."""
    if isinstance(value, dict | list):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(each, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _differ(a: float | None, b: float | None, slack: float) -> bool:
    """Whether two numbers are farther apart than rounding, or one alone is null."""
    if a is None or b is None:
        return a is not b
    return abs(a - b) > slack + _CLOSE * abs(a)  # ratios may be large
