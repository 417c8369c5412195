"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import math
import re

import typer

from ahriuwu_cli.errors import UserError

Device = typer.Option("auto", "--device", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
Out = typer.Option(..., "--out", help="Folder to write: new, empty, or with this very run to go on with.")
Overwrite = typer.Option(False, "--overwrite", help="Replace what is in --out.")
AsJson = typer.Option(False, "--json", help="Print one JSON object instead of text.")


def parse_pair(text: str, option: str) -> tuple[int, int]:
    """'16x32' or '16' -> (16, 32) or (16, 16)."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise UserError(f"{option} {text!r} is not a size: write 16 or 16x32")
    return int(match[1]), int(match[2] or match[1])


def parse_seconds(text: str, option: str) -> float:
    """'90', '90s', '4m' or '2h' in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else math.nan
    if not 0 < seconds < 1e8:
        raise UserError(f"{option} {text!r} is not a time: write 90s, 4m or 2h")
    return seconds
