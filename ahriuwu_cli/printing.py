r"""What reaches the terminal: text only. Whatever a file or a name holds, no escape sequence of it gets through.

Control characters, marks that turn the direction of writing, and what the terminal's encoding lacks come out as \x1b,
\u202e and the like. On stderr the carriage return stays, since progress bars are drawn with it.

A stream that is closed, full or gone: what is said on stderr is for whoever still listens, so nothing that is asked for
ends when it cannot be written. Stdout holds the result: `OutputLost` says that it did not get through.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

MOST = 2000  # characters of an error's sentence
CONTROLS = (
    r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # of ASCII and Latin-1, but tab and the ends of lines
    r"\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"  # without width, or of direction
    r"\ud800-\udfff"  # no characters: bytes of a file's name that are not UTF-8
)
_WITH_RETURN, _ALL = re.compile(f"[{CONTROLS}]"), re.compile(f"[\r{CONTROLS}]")
_SPACE = re.compile(r"\s")
_BREAKS = re.compile(r"\s*[\t-\r\x1c-\x1f\x85\u2028\u2029]\s*")
_commands: set[str] = set()  # that are to be typed


def printable(text: str, keep_return: bool = False) -> str:
    """The text with every control character written out, but tabs and line feeds."""
    return (_WITH_RETURN if keep_return else _ALL).sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def one_line(text: object) -> str:
    """A line of a report, whatever texts of files are in it: nothing ends it, and its spaces stay, for columns."""
    return printable(_SPACE.sub(" ", str(text)))


def some_of(parts: Sequence[str], most: int, between: str = ", ") -> str:
    """The first of them, `most` at most, and how many more there are."""
    more = f" and {len(parts) - most} more" if len(parts) > most else ""
    return between.join(parts[:most]) + more


def to_type(command: str) -> str:
    """The command of one line, which no sentence that ends with it cuts or changes from here on."""
    _commands.add(command)
    return command


def one_sentence(text: str) -> str:
    """An error's text on one line, cut in its middle where a value in it is endless."""
    text = printable(_BREAKS.sub(" ", text).strip())
    command = max((c for c in _commands if text.endswith(c)), key=len, default="")
    text = text.removesuffix(command)
    return (text if len(text) <= MOST else f"{text[: MOST // 2]} ... {text[-MOST // 2 :]}") + command


class OutputLost(Exception):
    """Stdout takes nothing any more. `errno`: EPIPE when its reader has ended, ENOSPC when a disk is full."""

    def __init__(self, error: OSError) -> None:
        super().__init__(error.strerror or str(error))
        self.errno = error.errno


def open_missing() -> None:
    """Put /dev/null where stdin, stdout or stderr were closed: else the next file that is opened takes their place."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  as long as the process


@contextmanager
def only_text() -> Iterator[None]:
    """Within it sys.stdout and sys.stderr write printable text alone; stdout raises OutputLost, stderr nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Printable(sys.stdout), _Printable(sys.stderr, is_stderr=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Printable:
    """Stands before a text stream."""

    def __init__(self, stream: TextIO, is_stderr: bool = False) -> None:
        self._stream, self._is_stderr = stream, is_stderr
        self._lost: OSError | None = None

    def write(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"text is written here, not {type(text).__name__}")
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = printable(text, keep_return=self._is_stderr).encode(encoding, "backslashreplace").decode(encoding)
        with self._failing():
            self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._failing():
            self._stream.flush()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What cannot be written goes to /dev/null from here on, what is still in the stream's buffer too.

        OutputLost then, and every time after: a library may have caught it.
        """
        try:
            yield
        except OSError as error:
            self._lost = error
            with suppress(OSError, ValueError):  # no file of the system, such as a test's
                void = os.open(os.devnull, os.O_WRONLY)
                os.dup2(void, self._stream.fileno())
                os.close(void)
        if self._lost and not self._is_stderr:
            raise OutputLost(self._lost) from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
