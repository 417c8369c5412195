"""Cells of a sweep on disk: each one's scores by window, in a file named by a hash of all that they depend on.

So a finished cell is known by its name and skipped, and other weights, windows or settings make another file. A file
that is damaged, or holds other settings than its name says, is set aside under another name, never deleted.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahriuwu_cli import __version__
from ahriuwu_cli.data.documents import parse_object, read_object, to_json
from ahriuwu_cli.data.tensors import checksum, read_arrays
from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation.metrics import CAP_DB, SSIM_WINDOW
from ahriuwu_cli.evaluation.protocol import WindowManifest
from ahriuwu_cli.evaluation.scores import Table
from ahriuwu_cli.evaluation.shards import set_aside
from ahriuwu_cli.folders import check_folder
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
    """Write a finished cell, whole or not at all, with a checksum over everything in it."""
    from safetensors.numpy import save

    tensors = {f"{who}/{metric}": values for who, t in scores.tables.items() for metric, values in t.items()}
    tensors = {key: np.ascontiguousarray(v, np.float64) for key, v in tensors.items()}
    tensors["clip"] = np.ascontiguousarray(scores.clip)
    facts = {"seconds": scores.seconds, "wall": scores.wall, "not_finite": scores.not_finite}
    metadata = {"format": FORMAT, "identity": to_json(about), "facts": to_json(facts)}
    metadata["checksum"] = checksum(tensors, [metadata["identity"], metadata["facts"]])
    write_whole(cell_file(folder, about), save(tensors, metadata))


def read_cell(folder: Path, about: dict[str, Any], windows: int) -> CellScores | None:
    """The finished cell, or None when it is not there. DataError when its file is damaged or holds something else."""
    path, tables = cell_file(folder, about), {}
    if not path.exists():
        return None
    try:
        tensors, metadata = read_arrays(path)
        stated = checksum(tensors, [metadata["identity"], metadata["facts"]])
        if metadata["format"] != FORMAT or metadata["checksum"] != stated:
            raise ValueError("its checksum does not fit its content")
        if parse_object(metadata["identity"]) != about:
            raise ValueError("it holds other settings than its name says")
        clip = tensors.pop("clip")
        for key, values in tensors.items():
            who, metric = key.split("/")
            tables.setdefault(who, {})[metric] = values
        if "model" not in tables or any(len(v) != windows for v in tensors.values()):
            raise ValueError(f"it does not hold {windows} windows")
        return CellScores(tables, clip, **parse_object(metadata["facts"]))
    except (DataError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error})") from None


def check_results(out: Path, asked: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Whether a sweep that was asked for may write into `out`: a new folder, or one with the same sweep, or --resume.

    UserError otherwise. `asked` is what `note_asked` wrote there when that sweep began.
    """
    path = out / FOLDER / ASKED
    if resume and overwrite:
        raise UserError("--resume keeps what is in --out and --overwrite replaces it: give one of them")
    if overwrite or not path.is_file():
        check_folder(out, overwrite)
        return
    if resume:
        return
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


def note_asked(out: Path, asked: dict[str, Any]) -> None:
    """Remember beside the cells what was asked for, so that the same command can go on."""
    write_whole(out / FOLDER / ASKED, to_json(asked, 1) + "\n")


def put_aside(folder: Path, about: dict[str, Any]) -> Path | None:
    """Rename a damaged cell to a free name beside it, and return that."""
    return set_aside(cell_file(folder, about))
