"""Cells of a sweep on disk: each one's scores by window, in a file named by a hash of all that they depend on.

So a finished cell is known by its name and skipped, and other weights, windows or settings make another file. A file
that is damaged, or holds other settings than its name says, is set aside under another name, never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahriuwu_cli import __version__
from ahriuwu_cli.data.documents import read_object, to_json
from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.metrics import CAP_DB, SSIM_WINDOW
from ahriuwu_cli.evaluation.protocol import WindowManifest
from ahriuwu_cli.evaluation.score_files import Shapes, flat, read_scores, tables_of, write_scores
from ahriuwu_cli.evaluation.scores import Table
from ahriuwu_cli.evaluation.shards import set_aside
from ahriuwu_cli.folders import replacing
from ahriuwu_cli.places import check_folder
from ahriuwu_cli.rollout import RolloutConfig

FORMAT = "ahriuwu-sweep-cell/1"
FOLDER = "cells"  # inside --out
ASKED = "asked.json"  # inside that: what the sweep was asked for


@dataclass(frozen=True, eq=False)
class CellScores:
    """Scores of one cell. tables: `model`, and `shuffled` where actions were shuffled, metric -> (W, L) float64."""

    tables: dict[str, Table]
    clip: np.ndarray  # uint8 (shown, T, H, W, 3), context included
    seconds: float  # of the rollouts with true actions
    wall: float  # of everything
    not_finite: int  # frames, of true and shuffled actions


def identity(
    weights: str, manifest: WindowManifest, cell: RolloutConfig, *, seed: int, delta_at: int | None, shown: int
) -> dict[str, Any]:
    """All that a cell's scores depend on: no paths, no device, no batch size. delta_at None: no shuffled actions."""
    return {
        "checkpoint_hash": weights,
        "manifest_hash": manifest.hash,
        "generation": asdict(cell),
        "noise_seed": seed,
        "delta_at": delta_at,
        "shown": shown,
        "psnr_cap_db": CAP_DB,
        "ssim_window": SSIM_WINDOW,
        "ahriuwu": __version__,
    }


def cell_file(folder: Path, about: dict[str, Any]) -> Path:
    """Where the cell with this identity lies: the first 16 hex digits of its sha256."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:16]}.safetensors"


def write_cell(folder: Path, about: dict[str, Any], scores: CellScores) -> None:
    """Write a finished cell, whole or not at all."""
    facts = {"seconds": scores.seconds, "wall": scores.wall, "not_finite": scores.not_finite}
    write_scores(cell_file(folder, about), FORMAT, flat(scores.tables) | {"clip": scores.clip}, about, facts)


def read_cell(
    folder: Path, about: dict[str, Any], expected: Shapes, sound: Callable[[CellScores], bool]
) -> CellScores | None:
    """The finished cell, or None when it is not there. DataError when its file is damaged or holds something else.

    sound: whether its count of frames is that of its scores; ValueError where it contradicts itself or what is known.
    """
    path = cell_file(folder, about)
    if not path.exists():
        return None
    kinds = {"seconds": float, "wall": float, "not_finite": int}
    return _cell(*read_scores(path, FORMAT, about, expected, kinds, lambda *found: sound(_cell(*found))))


def _cell(arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> CellScores:
    scores = {name: values for name, values in arrays.items() if name != "clip"}
    return CellScores(tables_of(scores), arrays["clip"], **facts)


def check_results(out: Path, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Whether a sweep that was asked for begins in `out`, rather than to go on there. UserError when it may do neither.

    It begins in a new folder, or by --overwrite, and goes on with the same sweep, or by --resume with another one.
    `asked` is what `begin` or `note_asked` wrote there when that sweep began.
    """
    path = out / FOLDER / ASKED
    if resume and overwrite:
        raise UserError("--resume keeps what is in --out and --overwrite replaces it: give one of them")
    if overwrite or not is_sweep(out):
        check_folder(out, overwrite or _is_bare(out))
        return True
    if resume:
        return False
    try:
        before = read_object(path)
        differs = [key for key in asked if before[key] != asked[key]]
    except (OSError, ValueError, KeyError, TypeError):
        differs = ["settings that cannot be read"]
    if differs:
        raise UserError(
            f"{out} holds a sweep with other settings ({', '.join(differs)}): choose another --out, or give --resume "
            f"to keep those finished cells that fit, or --overwrite to measure all of them anew"
        )
    return False


def is_sweep(out: Path) -> bool:
    """Whether a folder holds a sweep: what was asked for, or a cell. Plans have a folder of that name too."""
    folder = out / FOLDER
    return os.path.lexists(folder / ASKED) or any(folder.glob(f"{'[0-9a-f]' * 16}.safetensors"))


def begin(out: Path, asked: dict[str, Any], overwrite: bool) -> None:
    """Put a folder in the place of `out` that holds nothing but what was asked for: a sweep that can be gone on with.

    For who holds `out`, which another folder is then. UserError when something came there meanwhile, without overwrite.
    """
    if _is_bare(out):
        (out / FOLDER).rmdir()
    with replacing(out, overwrite) as folder:
        (folder / FOLDER).mkdir()
        note_asked(folder, asked)


def note_asked(out: Path, asked: dict[str, Any]) -> None:
    """Remember beside the cells what was asked for, so that the same command can go on."""
    path = out / FOLDER / ASKED
    if os.path.lexists(path) and not path.is_file():
        set_aside(path)
    write_whole(path, to_json(asked, 1) + "\n")


def _is_bare(out: Path) -> bool:
    """Whether a folder holds nothing but an empty one for cells: of a sweep that was stopped before it began."""
    cells = out / FOLDER
    return cells.is_dir() and not cells.is_symlink() and os.listdir(out) == [FOLDER] and not os.listdir(cells)


def put_aside(folder: Path, about: dict[str, Any]) -> Path | None:
    """Rename a damaged cell to a free name beside it, and return that."""
    return set_aside(cell_file(folder, about))
