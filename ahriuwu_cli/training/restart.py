"""The command line that starts this run again, ready to be pasted: quoted, and with the launcher it came from."""

from __future__ import annotations

import os
import shlex
import sys

_OF_THIS_TIME = ("--resume", "--overwrite")  # how a run is begun; not what is asked for


def typed() -> str:
    """This program's command line as it was typed."""
    return f"{launcher()} {shlex.join(sys.argv[1:])}"


def command_line() -> str:
    """This program's command line without --resume and --overwrite."""
    return f"{launcher()} {shlex.join(a for a in sys.argv[1:] if a not in _OF_THIS_TIME)}"


def launcher() -> str:
    """How this program was started, as the beginning of a command line."""
    if not several():
        program, *rest = sys.orig_argv
        return shlex.join([program, "-m", "ahriuwu_cli"]) if rest[:2] == ["-m", "ahriuwu_cli"] else "ahriuwu"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    each = os.environ.get("LOCAL_WORLD_SIZE", "1")
    where = "--standalone" if nodes == 1 else f"--nnodes {nodes}"
    return f"torchrun {where} --nproc-per-node {each} -m ahriuwu_cli"


def several() -> bool:
    """Whether a launcher started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this process is the one of its launcher's that prints, as far as can be told before they meet."""
    return os.environ.get("RANK", "0") == "0"
