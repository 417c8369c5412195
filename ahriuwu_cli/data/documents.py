"""JSON that others may have written: one strict reader, with limits that are checked before memory is taken.

And one writer, which gives nothing that the reader would refuse: what is written can be read again.

Refused, with a reason: more bytes, values, keys or nesting than allowed, a key that stands twice, NaN and infinity,
numbers beyond 64 bits, text that is not UTF-8 or begins with a byte order mark, halves of surrogate pairs, devices and
pipes. The limits hold what a document takes in memory to some 700 MB, whatever its 100 MB of text say.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from itertools import islice
from pathlib import Path
from typing import Any

MAX_BYTES = 10_000_000
MAX_RESULT = 100_000_000  # of what keeps a row for every window
MAX_WIDE = 25_000_000  # bytes of a text that is not ASCII, each of whose characters may take four; ours are ASCII
MAX_VALUES = 4_000_000  # of arrays and objects together; the largest datasets have about six an episode
MAX_CONTAINERS = 600_000  # arrays and objects, some 200 bytes each; the largest datasets have one an episode
MAX_KEYS = 500_000  # that differ, some 300 bytes each: names of tensors; rows of results and episodes share theirs
MAX_DEPTH = 64  # the deepest file of ours has 8


def read_json(path: Path, most: int = MAX_BYTES) -> Any:
    """Any JSON value in a file. OSError when it cannot be read, ValueError with the reason when it is refused."""
    return parse_json(read_bytes(path, most))


def read_object(path: Path, most: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file. OSError and ValueError likewise."""
    return parse_object(read_bytes(path, most))


def parse_object(data: bytes | str) -> dict[str, Any]:
    """The JSON object in a text. ValueError with the reason."""
    document = parse_json(data)
    if type(document) is not dict:
        raise ValueError(f"it is {_KINDS[type(document)]}, not an object")
    return document


def parse_json(data: bytes | str) -> Any:
    """Any JSON value in a text. ValueError with the reason."""
    if len(data) > MAX_WIDE and not data.isascii():
        raise ValueError(f"it is larger than {MAX_WIDE / 1e6:g} MB and not ASCII")
    text = decode(data) if isinstance(data, bytes) else data
    _check_cost(text)
    try:
        document = json.loads(
            text, object_pairs_hook=_no_repeats, parse_constant=_no_constant, parse_int=_whole, parse_float=_finite
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from None
    except _NoNumber as error:
        key = re.search(rf'"([^"\\]{{1,40}})"\s*:\s*{error}', text)
        raise ValueError(f"{key[1] if key else 'a value'} is {error}, which is no number of JSON") from None
    _check_nesting(document, broken_pairs="\\u" in text)
    return document


def decode(data: bytes) -> str:
    """UTF-8 text without a byte order mark. ValueError with the reason."""
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it begins with a byte order mark: save it as plain UTF-8")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text from byte {error.start} on") from None


def read_bytes(path: Path, most: int = MAX_BYTES) -> bytes:
    """A regular file of at most so many bytes. OSError when it cannot be read, ValueError when it is another or larger.

    A pipe is not opened, since that would wait for its writer; a file that grows meanwhile is read to the limit only.
    """
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError("it is no regular file")
    with open(path, "rb") as file:
        data = file.read(min(about.st_size, most) + 1)  # room for all of it is taken at once
        if about.st_size < len(data) <= most:
            data += file.read(most + 1 - len(data))
    if len(data) > most:
        raise ValueError(f"it is larger than {most / 1e6:g} MB")
    return data


def to_json(value: Any, indent: int | None = None, most: int = MAX_BYTES) -> str:
    """The text of a JSON value for a file, ASCII. ValueError with the reason where `parse_json` would refuse it."""
    text = json.dumps(value, indent=indent, allow_nan=False)
    if len(text) > most:
        raise ValueError(f"it would be larger than {most / 1e6:g} MB")
    parse_json(text)
    return text


def as_text(name: Path | str) -> str:
    """A name of the file system for people, JSON and Markdown: bytes of it that are not UTF-8 come out as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def document_hash(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_hash(value: object) -> bool:
    """Whether a JSON value has the form of a sha256."""
    return type(value) is str and re.fullmatch(r"[0-9a-f]{64}", value) is not None


_KINDS = {dict: "an object", list: "an array", str: "a text", bool: "true or false", int: "a number", float: "a number"}
_KINDS[type(None)] = "null"


# A text and whether it is a key. It matches at every quote outside of a text, closed or not, and never looks back.
_TEXT = re.compile(r'"((?:[^"\\]++|\\.)*+)"?+[ \t\n\r]*+(:?)', re.DOTALL)


def extent(value: Any) -> tuple[int, int]:
    """How deep a JSON value is nested, and how many values it holds, arrays and objects among them."""
    level, depth, count = [value], 0, 0
    while level:
        count += len(level)
        inner = [each for each in level if type(each) in (dict, list)]
        depth += bool(inner)
        level = [below for each in inner for below in (each.values() if type(each) is dict else each)]
    return depth, count


class _NoNumber(Exception):
    """NaN, Infinity or -Infinity."""


def _check_cost(text: str) -> None:
    """What takes memory is counted in the text, before there is any of it. ValueError.

    Too much may be counted where texts hold such characters, never too little.
    """
    containers = text.count("{") + text.count("[")
    if containers > MAX_CONTAINERS:
        raise ValueError(f"it holds more than {MAX_CONTAINERS} arrays and objects")
    if containers + text.count(",") > MAX_VALUES:
        raise ValueError(f"it holds more than {MAX_VALUES} values")
    if text.count(":") <= MAX_KEYS:
        return
    keys: set[str] = set()
    for match in islice(_TEXT.finditer(text), 2 * MAX_VALUES):  # each value and its key; what has more is not JSON
        if match[2]:
            keys.add(match[1])
            if len(keys) > MAX_KEYS:
                raise ValueError(f"it holds more than {MAX_KEYS} different keys")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"a key stands twice in it: {twice[:40]!r}")
    return document


def _no_constant(name: str) -> Any:
    raise _NoNumber(name)


def _whole(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**64:
        raise ValueError(f"it holds the number {digits[:24]}..., which has more than 64 bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {digits[:24]}, which is beyond 64 bits")
    return value


def _check_nesting(document: Any, broken_pairs: bool) -> None:
    """Depth by containers alone; texts are looked at only where the file could hold half of a surrogate pair."""
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        below = []
        for value in level:
            if type(value) is dict:
                inner = [*value, *value.values()] if broken_pairs else value.values()
            elif type(value) is list:
                inner = value
            else:
                inner = (value,)
            for each in inner:
                if type(each) in (dict, list):
                    below.append(each)
                elif broken_pairs and type(each) is str and not _whole_pairs(each):
                    raise ValueError(f"it holds half of a surrogate pair in {each[:40]!r}")
        level = below


def _whole_pairs(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)
