"""The log of a run, metrics.jsonl: one JSON object a line, appended whole, and cut where a state goes on from."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.errors import CheckpointError

NAME = "metrics.jsonl"
MAX_LOG = 100_000_000  # bytes: some 300,000 lines
_PREVIEW = re.compile(rb'\{"step": \d+, "(preview|gain_db_by_sampler)"')
_LOGGED = re.compile(rb'\{.*?"step": (\d{1,18})[,}]')


def append(file: Path, line: str) -> None:
    """Write a line at the end of a file, all of it or nothing. OSError, with the file's name."""
    with open(file, "ab", buffering=0) as stream:
        end = stream.tell()
        try:
            if stream.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            stream.truncate(end)
            raise OSError(error.errno, error.strerror, str(file)) from None


def cut(file: Path, step: int, logged: int, announce: Callable[[str], None], preview: bool = False) -> None:
    """Drop the lines after `step`, and one that a kill cut short; say which are missing up to the step `logged`.

    preview: that of `step` is to be done again, so what it said is dropped as well.

    CheckpointError where the file is none that a run writes.
    """
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise CheckpointError(f"{file} is no regular file: move it away, a log is written there")
    size = file.stat().st_size if file.exists() else 0
    if size > MAX_LOG:
        raise CheckpointError(f"{file} is larger than {MAX_LOG / 1e6:g} MB: move it away, a new log is begun there")
    kept, last = bytearray(), 0
    if size:
        with open(file, "rb") as lines:
            for line in lines:
                at = _step_of(line)
                if at is not None and at <= step and not (preview and at == step and _PREVIEW.match(line)):
                    kept += line
                    last = max(last, at)
    if len(kept) < size:
        write_whole(file, kept)
    if last < logged:
        announce(f"{file} was cut short: it holds no line of steps {last + 1} to {logged}, which were trained")


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics by the form in which `log` writes it; None for one that is cut short, or no such.

    It is not read as JSON: that takes 5 microseconds a line, and a hostile log has millions.
    """
    found = _LOGGED.match(line)
    return int(found[1]) if found and line.endswith(b"}\n") else None
