"""What a run, a world or a result was made with."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from ahriuwu_cli import __version__


def versions() -> dict:
    """What this ran with: ahriuwu, torch, Python, and the git revision of the code where it is a checkout."""
    return {
        "ahriuwu": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "git": _revision(),
    }


@cache
def _revision() -> str | None:
    """None where the code is no checkout, or where there is no git."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        git = subprocess.run(command, capture_output=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.decode("ascii", "replace").strip() or None
