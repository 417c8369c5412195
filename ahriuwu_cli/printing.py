"""What reaches the terminal: text only. Whatever a file or a name holds, no escape sequence of it gets through.

Control characters, marks that turn the direction of writing, and what the terminal's encoding lacks come out as \x1b,
\u202e and the like. On stderr the carriage return stays, since progress bars are drawn with it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

MOST = 2000  # characters of an error's sentence
CONTROLS = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # of ASCII and Latin-1, but tab and the ends of lines
    r"\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # without width, or of direction
    r"\ud800-\udfff"  # no characters: bytes of a file's name that are not UTF-8
)
_WITH_RETURN, _ALL = re.compile(f"[{CONTROLS}]"), re.compile(f"[\r{CONTROLS}]")


def printable(text: str, keep_return: bool = False) -> str:
    """The text with every control character written out, but tabs and line feeds."""
    return (_WITH_RETURN if keep_return else _ALL).sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def one_sentence(text: str) -> str:
    """An error's text on one line, cut in its middle where a value in it is endless."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}"


@contextmanager
def only_text() -> Iterator[None]:
    """Within it sys.stdout and sys.stderr write printable text alone."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Printable(sys.stdout, keep_return=False), _Printable(sys.stderr, keep_return=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Printable:
    """Stands before a text stream."""

    def __init__(self, stream: TextIO, keep_return: bool) -> None:
        self._stream, self._keep_return = stream, keep_return

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"text is written here, not {type(text).__name__}")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = printable(text, self._keep_return).encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
