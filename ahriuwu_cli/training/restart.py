"""The command line that starts this run again, ready to be pasted: quoted, and with the launcher it came from.

Nothing heavy is imported here, so that signals are minded before torch is there.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress

from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.shards import processes
from ahriuwu_cli.printing import CONTROLS, to_type
from ahriuwu_cli.training.signals import StopRequest

ECHO = 5.0  # seconds in which torchrun may pass on a signal that its processes already got
# torchrun passes SIGUSR1 on only when told to; and a large state takes longer to write than the 30 s that it would wait
TORCHRUN = "--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 600"
_OF_THIS_TIME = ("--resume", "--overwrite")  # how a run is begun; not what is asked for
_UNSEEN = re.compile(rf"[\t\n\r{CONTROLS}]")  # what a terminal does not show, so that it cannot be pasted
_WORD = re.compile(r"""(?:\$'(?:\\.|[^'\\])*'|'[^']*'|"[^"]*"|[^\s'"])+""")  # as `_quoted` writes it


def stoppable() -> StopRequest:
    """What a training command does its work in, from its first import on: a signal ends it with the command to type.

    So does the death of the torchrun that started it.
    """
    if {"TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():  # not what a shell has left
        _end_with_parent()
    return StopRequest(ECHO if _several() else 0.0, f"nothing of this is lost, start again with: {typed()}", speaks())


def speaks() -> bool:
    """Whether this one of a launcher's processes says what all have to say."""
    return _place()[0] == 0


def typed() -> str:
    """This program's command line."""
    return to_type(f"{launcher()} {_quoted(sys.argv[1:])}")


def command_line() -> str:
    """This program's command line without --resume and --overwrite."""
    options, rest = _split(sys.argv[1:])
    return to_type(f"{launcher()} {_quoted([*(a for a in options if a not in _OF_THIS_TIME), *rest])}")


def resuming(command: str) -> str:
    """A command line with --resume, before a `--` that ends its options."""
    end = next((word.start() for word in _WORD.finditer(command) if word[0] == "--"), None)
    return to_type(f"{command} --resume" if end is None else f"{command[:end]}--resume {command[end:]}")


def _quoted(words: Iterable[str]) -> str:
    """Words for bash and zsh. What a terminal does not show, and bytes that are no UTF-8, become $'\\x0a'."""

    def escaped(unseen: re.Match) -> str:
        number = ord(unseen[0])
        byte = number - 0xDC00 if 0xDC80 <= number <= 0xDCFF else number  # "surrogateescape"
        return f"\\x{byte:02x}" if number < 128 or byte != number else f"\\u{number:04x}"

    def quoted(word: str) -> str:
        text = os.fsencode(word).decode("utf-8", "surrogateescape")
        if not _UNSEEN.search(text):
            return shlex.quote(text)
        text = text.replace("\\", r"\\").replace("'", r"\'")
        return f"$'{_UNSEEN.sub(escaped, text)}'"

    return " ".join(map(quoted, words))


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Words before `--`, and from there on."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at:]


def launcher() -> str:
    """How this program was started, as the beginning of a command line."""
    if not _several():
        started = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv) + 1]
        if started[-2:] == ["-m", "ahriuwu_cli"]:
            return _quoted(started)
        program = sys.argv[0]
        by_name = os.path.basename(program) != "ahriuwu" or _found_as("ahriuwu", program)
        return "ahriuwu" if by_name else _quoted([program])
    nodes, each = (os.environ.get(name, "1") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    where = "--standalone"
    if nodes != "1":  # the same line on every node; without an endpoint each would wait for itself
        endpoint = f"{os.environ.get('MASTER_ADDR', 'HOST')}:29400"
        where = f"--nnodes {shlex.quote(nodes)} --rdzv-backend c10d --rdzv-endpoint {shlex.quote(endpoint)}"
    return f"torchrun {where} --nproc-per-node {shlex.quote(each)} {TORCHRUN} -m ahriuwu_cli"


def _found_as(name: str, program: str) -> bool:
    """Whether a shell that is given the name alone starts this program."""
    found = shutil.which(name)
    return found is not None and os.path.exists(program) and os.path.samefile(found, program)


def _several() -> bool:
    return _place()[1] > 1


def _place() -> tuple[int, int]:
    """(rank, processes). Asked before there is any way to say an error, so nonsense is one process here."""
    with suppress(UserError):  # whatever depends on it asks again, and says it
        return processes(os.environ)
    return 0, 1


def _end_with_parent() -> None:
    """Get SIGTERM when the process that started this one dies; else it would train on, unseen, and hold its folder."""
    if sys.platform == "linux":  # elsewhere there is no such call
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
