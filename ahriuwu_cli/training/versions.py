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
    """None where the code is no checkout, whatever project it is installed inside of, or where there is no git."""
    here = Path(__file__)
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    return _git(here.parent, "rev-parse", "HEAD")


def _git(folder: Path, *words: str) -> str | None:
    """What git prints in this folder; None where it fails."""
    try:
        git = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (git.stdout.decode("ascii", "replace").strip() or None) if git.returncode == 0 else None
