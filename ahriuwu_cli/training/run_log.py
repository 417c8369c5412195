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
MOST_GAPS = 5  # that are named
_PREVIEW = re.compile(rb'\{"step": \d+, "(preview|gain_db_by_sampler)"')
_LOGGED = re.compile(rb'\{.*?"step": (\d{1,18})[,}]')


def append(file: Path, line: str) -> None:
    """Write a line at the end of a file, all of it or nothing. OSError, with the file's name."""
    if file.exists() and file.stat().st_nlink > 1:  # a backup by hard links keeps what it has
        write_whole(file, file.read_bytes())
    with open(file, "ab", buffering=0) as stream:
        end = stream.tell()
        try:
            if stream.write(line.encode()) < len(line.encode()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            stream.truncate(end)
            raise OSError(error.errno, error.strerror, str(file)) from None


def cut(
    file: Path, step: int, logged: int, announce: Callable[[str], None], preview: bool = False, every: int | None = None
) -> None:
    """Drop the lines after `step`, one that a kill cut short, and what comes a second time; say which are missing.

    logged, every: of which steps there are lines with a loss, all `every` ones up to `logged`; None where that changed.
    preview: that of `step` is to be done again, so what it said is dropped as well. CheckpointError where the file is
    none that a run writes.
    """
    kept, size = _read(file, step, preview)
    if sum(map(len, kept)) < size:
        write_whole(file, b"".join(kept))
    _say_missing(file, kept, logged, announce, every)


def look(file: Path, step: int, logged: int, announce: Callable[[str], None], every: int | None = None) -> None:
    """Say which lines are missing, as `cut` does, and leave the file as it is. CheckpointError."""
    _say_missing(file, _read(file, step, preview=False)[0], logged, announce, every)


def _read(file: Path, step: int, preview: bool) -> tuple[list[bytes], int]:
    """(the lines that count, in order; bytes of the file). CheckpointError."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise CheckpointError(f"{file} is no regular file: move it away, a log is written there")
    size = file.stat().st_size if file.exists() else 0
    if size > MAX_LOG:
        raise CheckpointError(f"{file} is larger than {MAX_LOG / 1e6:g} MB: move it away, a new log is begun there")
    kept: list[bytes] = []
    last, of_last = 0, set()
    if size:
        with open(file, "rb") as lines:
            for line in lines:
                at = _step_of(line)
                if at is None or not last <= at <= step or (preview and at == step and _PREVIEW.match(line)):
                    continue
                if at > last:
                    last, of_last = at, set()
                if line not in of_last:
                    of_last.add(line)
                    kept.append(line)
    return kept, size


def _say_missing(
    file: Path, lines: list[bytes], logged: int, announce: Callable[[str], None], every: int | None
) -> None:
    there = [_step_of(line) for line in lines if b'"loss": ' in line]
    gaps, before = [], 0
    for at in there:
        if every and (at - 1) // every * every > before:  # the line of that step was not the one before
            gaps.append((before + 1, (at - 1) // every * every))
        before = at
    if before < logged:
        gaps.append((before + 1, logged))
    if gaps:
        more = " and more" if len(gaps) > MOST_GAPS else ""
        which = " and ".join(f"{first} to {last}" if first < last else f"{last}" for first, last in gaps[:MOST_GAPS])
        announce(f"{file} was cut short: it holds no line of steps {which}{more}, which were trained")


def _step_of(line: bytes) -> int | None:
    """The step of a line of metrics by the form in which `log` writes it; None for one that is cut short, or no such.

    It is not read as JSON: that takes 5 microseconds a line, and a hostile log has millions.
    """
    found = _LOGGED.match(line)
    return int(found[1]) if found and line.endswith(b"}\n") else None
