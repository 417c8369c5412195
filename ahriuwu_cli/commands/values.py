"""What the value of an option may be, checked as the command line is read: before a byte is loaded or written.

A value that does not fit is one sentence with the option, the value and what to try. These are parsers for typer, which
calls them with the text; a test reads ranges and names from them.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from ahriuwu_cli.errors import UserError, did_you_mean
from ahriuwu_cli.ranges import as_number

LONGEST = 4096  # characters of one word of a command line: as many as a path may have


class Whole:
    """A whole number in low..high."""

    __name__ = "integer"

    def __init__(self, option: str, low: int, high: int) -> None:
        self.option, self.low, self.high = option, low, high

    def __call__(self, given: Any) -> int:
        text = str(given).strip()
        if not re.fullmatch(r"[+-]?[0-9]+", text):
            raise UserError(
                f"{self.option} {shown(text)} is not a whole number: give one from {self.low} to {self.high}"
            )
        value = int(text)
        if value < self.low:
            raise UserError(f"{self.option} must be at least {self.low}, got {_cut(text)}")
        if value > self.high:
            raise UserError(f"{self.option} must be at most {self.high}, got {_cut(text)}")
        return value


class Number:
    """A finite number from low to high; `ends` says which of the two belong to it: [], [), (] or ()."""

    __name__ = "float"

    def __init__(self, option: str, low: float, high: float, ends: str = "[]", meaning: str = "") -> None:
        self.option, self.low, self.high, self.ends, self.meaning = option, low, high, ends, meaning

    def __call__(self, given: Any) -> float:
        try:
            value = as_number(given)
        except ValueError:
            raise UserError(f"{self.option} {shown(given)} is not a number: give one in {self._range}") from None
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        if not (above and below):  # nan is neither
            raise UserError(f"{self.option} {value} is not in {self._range}")
        return value

    @property
    def _range(self) -> str:
        return f"{self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}{self.meaning}"


class Name:
    """One of the names that `known()` gives; it is asked only when a name was given, since it may import torch."""

    __name__ = "name"

    def __init__(self, option: str, default: str | None, known: Callable[[], tuple[str, ...]]) -> None:
        self.option, self.default, self.known = option, default, known

    def __call__(self, given: str) -> str:
        if given != self.default and given not in self.known():
            raise UserError(f"unknown {self.option} {shown(given)}: {did_you_mean(given, self.known())}")
        return given


class Text:
    """A text that `parse` understands; it raises UserError for another. The command itself parses it again."""

    __name__ = "text"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self.parse = parse

    def __call__(self, given: str) -> str:
        self.parse(given)
        return given


def listed(module: str, names: str) -> Callable[[], tuple[str, ...]]:
    """The names of a table in another module, which is imported when they are asked for."""
    return lambda: tuple(getattr(import_module(f"ahriuwu_cli.{module}"), names))


def by_commas(option: str, one: Callable[[str], Any], most: int = 1000) -> Callable[[str | None], tuple[Any, ...]]:
    """A parser of values by commas, each read by `one`: a Whole, Number or Name. Nothing given is ()."""

    def parse(given: str | None) -> tuple[Any, ...]:
        if given is None:
            return ()
        parts = given.split(",")
        if len(parts) > most:
            raise UserError(f"{option} lists {len(parts)} values: give {most} at most")
        values = tuple(one(part.strip()) for part in parts)
        if len(set(values)) < len(values):
            raise UserError(f"{option} {shown(given)} names a value twice: list different ones")
        return values

    return parse


def shard(given: str) -> None:
    """'1/4', see `evaluation.shards.find_shards`."""
    from ahriuwu_cli.evaluation.shards import find_shards

    find_shards(given, "cells", {})


def device_name(given: str) -> None:
    """A device as PyTorch calls it, or auto; whether it is there, `training.checkpoint.pick_device` finds out."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:[0-9]{1,3})?", given):
        raise UserError(f"device {shown(given)} cannot be used: give auto, cpu, cuda or cuda:1")


def parse_size(given: str) -> tuple[int, int]:
    """(height, width) of frames, see `data.resize.parse_size`."""
    from ahriuwu_cli.data.resize import parse_size

    return parse_size(given)


def parse_splits(given: str) -> tuple[float, float, float]:
    """Shares of train, val and test, see `data.splits.parse_fractions`."""
    from ahriuwu_cli.data.splits import parse_fractions

    return parse_fractions(given)


def pair(text: str, option: str = "--patch") -> tuple[int, int]:
    """'16x32' or '16' -> (16, 32) or (16, 16)."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise UserError(f"{option} {shown(text)} is not a size: write 16 or 16x32")
    return int(match[1]), int(match[2] or match[1])


def seconds(text: str, option: str = "--budget") -> float:
    """'90', '90s', '4m' or '2h' in seconds."""
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else math.nan
    if not 0 < seconds < 1e8:
        raise UserError(f"{option} {shown(text)} is not a time: write 90s, 4m or 2h")
    return seconds


def check_words(words: Sequence[str]) -> None:
    """UserError for a word of the command line that is empty, only spaces, longer than a path, or no text.

    Words end up in JSON and Markdown: bytes of a name that are not UTF-8 cannot be written there.
    """
    for before, word in zip(["the command", *words], words, strict=False):
        option, equals, value = word.partition("=") if word.startswith("--") else (before, "=", word)
        if equals and not value.strip():
            raise UserError(f"there is nothing after {shown(option)}: give a value, or leave it out")
        if len(word) > LONGEST:
            raise UserError(f"what follows {shown(before)} has {len(word)} characters: {LONGEST} are the most")
        if "\0" in word:
            raise UserError(f"{shown(word)} holds a character that no name has: write it without")
        if any("\ud800" <= c <= "\udfff" for c in word):
            encoding = sys.getfilesystemencoding()
            remedy = "rename it" if encoding == "utf-8" else "set PYTHONUTF8=1"
            raise UserError(f"{shown(word)} is not text in {encoding}, so no result could name it: {remedy}")


def shown(given: Any) -> str:
    """A value as a sentence quotes it: what does not print is escaped, and what is long is cut."""
    return repr(_cut(str(given)))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else text[:40] + "..." + text[-10:]
