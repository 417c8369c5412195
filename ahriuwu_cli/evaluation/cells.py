"""Cells on disk: each evaluation of a plan is one JSON file, named by a hash of all that its numbers depend on.

So a finished cell is known by its name and skipped, changed weights or data make another cell, and nothing is
ever overwritten: a damaged file is set aside and made anew, one with other settings than its name says is refused.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ahriuwu_cli.data.documents import MAX_RESULT, document_hash, parse_object, read_object, to_json
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.disk import clear_files, write_whole
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation import shards
from ahriuwu_cli.evaluation.evaluate import measure_share, ready, summarise
from ahriuwu_cli.evaluation.measure import CONTROLS, Measured, Progress, table_shapes
from ahriuwu_cli.evaluation.plan import GENERATION, WINDOWS, Cell, as_keys
from ahriuwu_cli.evaluation.prepare import INTERVAL_BEFORE, EvaluationConfig, settings
from ahriuwu_cli.evaluation.protocol import WindowManifest
from ahriuwu_cli.evaluation.score_files import Shapes
from ahriuwu_cli.evaluation.shards import Shards
from ahriuwu_cli.evaluation.summary import pick_horizons
from ahriuwu_cli.evaluation.sweep_cells import is_sweep
from ahriuwu_cli.folders import made
from ahriuwu_cli.places import check_folder
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

FORMAT = "ahriuwu-cell/1"
FOLDER = "cells"  # inside the plan's --out
# Where a cell was run and what its files were called there; all other settings are its identity.
_CIRCUMSTANCES = ("checkpoint", "checkpoint_git", "dataset", "device", "torch")
Bar = Callable[[str], AbstractContextManager[Progress | None]]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A cell that fits its world and data: everything that is needed to run it but the world."""

    cell: Cell
    config: EvaluationConfig
    generation: RolloutConfig
    manifest: WindowManifest
    identity: dict[str, Any]

    @property
    def digest(self) -> str:
        return digest(self.identity)


def run_plan(
    cells: Sequence[Cell],
    out: Path,
    split: Shards,
    *,
    device: str = "auto",
    batch: int = 32,
    bar: Bar | None = None,
    say: Say = lambda _: None,
) -> list[dict[str, Any]]:
    """Run this process's share of a plan into out/cells; rows {"cell", "checkpoint", "state", "status"} in its order.

    state: "done", "skipped" (it was there), or "part" (other processes still have windows of it). Every check is made
    before the first rollout; errors name the cell. UserError, DataError or CheckpointError.
    """
    folder = out / FOLDER
    for each in (out, folder):
        check_folder(each, overwrite=True, holds="pieces")
    if is_sweep(out):
        raise UserError(f"{out} holds a sweep: choose another --out")
    files = _Files(shards.choose_device(device, split))
    mine = _prepared(files, [cells[i] for i in split.of_cells(len(cells))], batch)
    found = {p.digest: _look(folder, p, split.leads, say) for p in mine}
    if not mine:
        return []
    rows = []
    with made(folder):
        clear_files(folder, ".+")
        for p in mine:
            document, state = found[p.digest], "skipped"
            if document is None:
                document = _run(files, p, folder, split, bar, say)
                state = "done" if document else "part"
            status = document["result"]["status"] if document else None
            rows.append({"cell": p.digest, "checkpoint": p.cell.names[0], "state": state, "status": status})
            say(f"{len(rows)}/{len(mine)} {p.digest} {p.cell.names[0]}: {state}")
    return rows


def planned(cells: Sequence[Cell]) -> dict[str, str]:
    """What a plan's cells will be called in out/cells, and where each stands in the plan.

    Worlds and datasets are opened for it, and the errors are those of `run_plan`.
    """
    return {p.digest: p.cell.where for p in _prepared(_Files("cpu"), cells)}


def prepare_cell(files: _Files, cell: Cell, batch: int = 32) -> Prepared:
    """Open what a cell names and check that it fits together; errors begin with the cell's place in the plan."""
    try:
        store = files.store(cell.dataset)
        world, weights = files.world(cell.checkpoint)
        generation = world.generation_with(cell.given(GENERATION))
        config = EvaluationConfig(batch=batch, **cell.given((*WINDOWS, "seed", "noise_seeds")))
        stored = cell.manifest and WindowManifest.load(cell.manifest, store, "leave out `manifest` to make new windows")
        config, manifest = ready(world, store, config, generation, stored)
    except UserError as error:
        raise type(error)(f"{cell.where}: {as_keys(str(error))}") from None
    everything = settings(world, store, config, generation, manifest)
    return Prepared(cell, config, generation, manifest, identity(everything, weights))


def _prepared(files: _Files, cells: Sequence[Cell], batch: int = 32) -> list[Prepared]:
    prepared = [prepare_cell(files, cell, batch) for cell in cells]
    first: dict[str, Cell] = {}
    for p in prepared:
        if p.digest in first:
            raise UserError(f"{p.cell.where} comes to the same settings as {first[p.digest].where}: remove one of them")
        first[p.digest] = p.cell
    return prepared


def identity(everything: dict[str, Any], weights: str) -> dict[str, Any]:
    """Of `settings` what the numbers depend on, with the hash of the weights: no paths, no device, no batch size."""
    kept = {name: value for name, value in everything.items() if name not in _CIRCUMSTANCES}
    kept["evaluation"] = {name: value for name, value in kept["evaluation"].items() if name != "batch"}
    kept["interval"] = INTERVAL_BEFORE  # how it is worded makes no other cell
    return json.loads(json.dumps({"checkpoint_hash": weights, **kept}))


def digest(settings_of_cell: dict[str, Any]) -> str:
    """The first 16 hex digits of the sha256 of settings: a cell's name."""
    return document_hash(settings_of_cell)[:16]


def weights_hash(world: World) -> str:
    """sha256 over architecture, every weight of the dynamics, and the tokenizer; not over names, paths or dates."""
    about = [asdict(world.dynamics.config), world.tokenizer.fingerprint(), list(world.trained_d)]
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(world.dynamics.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def write_cell(path: Path, p: Prepared, result: dict[str, Any]) -> dict[str, Any]:
    """Write a finished cell, whole or not at all, and return its document."""
    document = {
        "format": FORMAT,
        "names": {"checkpoint": p.cell.names[0], "dataset": p.cell.names[1]},
        "identity": p.identity,
        "result": result,
    }
    document["checksum"] = document_hash(document)
    write_whole(path, to_json(document, 1, MAX_RESULT) + "\n")
    return document


def read_cell(path: Path) -> dict[str, Any]:
    """A cell's document. DataError when it is damaged or was edited; FileNotFoundError when it is not there."""
    try:
        document = read_object(path, MAX_RESULT)
        if document.get("format") != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        stated = document.pop("checksum", None)
        if stated != document_hash(document):
            raise ValueError("its checksum does not fit its content")
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error})") from None
    return document


class _Files:
    """Datasets stay open; of worlds only the last one is kept, since they may be large."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._stores: dict[Path, EpisodeStore] = {}
        self._last: tuple[Path, World, str] | None = None

    def store(self, path: Path) -> EpisodeStore:
        if path not in self._stores:
            self._stores[path] = EpisodeStore.open(path)
        return self._stores[path]

    def world(self, path: Path) -> tuple[World, str]:
        """The world and the hash of its weights."""
        from ahriuwu_cli.training.checkpoint import load_world

        if self._last is None or self._last[0] != path:
            self._last = None  # free it before the next one is read
            world = load_world(path, self.device)
            self._last = (path, world, weights_hash(world))
        return self._last[1:]


def _look(folder: Path, p: Prepared, leads: bool, say: Say) -> dict[str, Any] | None:
    """The finished cell, or None when it has to be run."""
    from ahriuwu_cli.evaluation.merge import as_finished

    path = folder / f"{p.digest}.json"
    try:
        document = read_cell(path)
        differs = first_difference(document.get("identity"), p.identity)
        if not differs:
            as_finished(p.digest, document)
            return document
    except FileNotFoundError:
        return None
    except (DataError, ValueError) as error:
        if leads and (new := shards.set_aside(path)):
            said = error if isinstance(error, DataError) else f"{path} {error}"
            say(f"{said}: set aside as {new.name}, and done again")
        return None
    raise DataError(
        f"{path} was measured with other settings than {p.cell.where} ({differs} differs): "
        f"move it away, or choose another --out"
    )


def _run(files: _Files, p: Prepared, folder: Path, split: Shards, bar: Bar | None, say: Say) -> dict[str, Any] | None:
    """Measure this process's windows; the cell's document when that made it whole, else None."""
    began = time.monotonic()
    world, weights = files.world(p.cell.checkpoint)
    if weights != p.identity["checkpoint_hash"]:
        raise CheckpointError(f"{p.cell.where}: {p.cell.checkpoint} changed while the plan ran: run the plan again")
    whole = (world, files.store(p.cell.dataset), p.config, p.generation, p.manifest)
    share = shards.shard_windows(p.manifest, *split.windows)
    if len(share) == len(p.manifest.windows):
        measured: Measured | None = _measure(whole, share, p, bar)
    else:
        measured = _with_others(whole, share, p, folder, split, bar, say)
    if measured is None:
        return _look(folder, p, False, say)
    result = summarise(*whole, measured, time.monotonic() - began)
    parts = list(folder.glob(f"{p.digest}.part-*.safetensors"))
    if len(share) < len(p.manifest.windows):
        _check_joined(measured, result, p, parts)
    document = write_cell(folder / f"{p.digest}.json", p, result)
    for old in parts:
        old.unlink(missing_ok=True)
    return document


def _check_joined(measured: Measured, result: dict[str, Any], p: Prepared, parts: Sequence[Path]) -> None:
    """DataError for a result of parts that no reader of cells would take; each part was sound for itself."""
    from ahriuwu_cli.evaluation.cell_check import check_result
    from ahriuwu_cli.evaluation.table_check import check_tables

    try:
        check_tables(measured.tables, p.config.noise_seeds)
        check_result(parse_object(to_json(result, most=MAX_RESULT)))
    except ValueError as error:
        for part in parts:
            shards.set_aside(part)
        raise DataError(
            f"{p.cell.where}: its parts contradict each other ({error}) and are set aside: run the plan again in as "
            "many processes"
        ) from None


def _with_others(
    whole, share: range, p: Prepared, folder: Path, split: Shards, bar: Bar | None, say: Say
) -> Measured | None:
    """Write this process's part unless it is there; all parts joined, or None while some are missing (or joined)."""
    rank, world_size = split.windows
    parts = shards.part_count(p.manifest, world_size)
    files = [shards.part_file(folder, p.digest, r, parts) for r in range(parts)]
    shapes = [_shapes(whole, len(shards.shard_windows(p.manifest, r, world_size))) for r in range(parts)]
    if share:
        try:
            shards.read_part(files[rank], p.identity, shapes[rank])
        except (FileNotFoundError, DataError) as error:
            if isinstance(error, DataError) and (new := shards.set_aside(files[rank])):
                say(f"{error}: set aside as {new.name}, and measured again")
            shards.write_part(files[rank], _measure(whole, share, p, bar), p.identity)
    try:
        pieces = zip(files, shapes, strict=True)
        return shards.join_measured([shards.read_part(file, p.identity, each) for file, each in pieces])
    except FileNotFoundError:
        return None
    except DataError as error:
        raise DataError(f"{error}: run the plan again in as many processes, which measures that part again") from None


def _shapes(whole, windows: int) -> Shapes:
    """Of the tables of so many windows."""
    _, store, config, _, manifest = whole
    controls = CONTROLS if store.action_space.width else ()
    return table_shapes(windows, manifest.horizon, pick_horizons(config.horizons, manifest.horizon), controls)


def _measure(whole, share: range, p: Prepared, bar: Bar | None) -> Measured:
    with bar(p.cell.where) if bar else nullcontext() as progress:
        return measure_share(*whole, progress, share)


def first_difference(a: Any, b: Any, where: str = "identity") -> str:
    """Where two JSON values differ first, as name.name; empty where they do not."""
    if not (isinstance(a, dict) and isinstance(b, dict)):
        return "" if a == b else where
    inner = "" if where == "identity" else f"{where}."
    pairs = ((a.get(name), b.get(name), f"{inner}{name}") for name in [*b, *a])
    return next(filter(None, (first_difference(*pair) for pair in pairs)), "")
