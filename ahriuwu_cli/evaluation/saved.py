"""Saved rollouts: generated once on the machine that has the GPU, scored many times anywhere, to the same numbers.

    folder/
      saved.json                  settings, hashes, the windows, and what world and dataset it was
      part-000000-000032.safetensors   of windows 0..31: reconstructions, and frames and finite flags of every rollout

A part says which windows of which rollouts it holds, so that none of another folder is taken for one. Parts are written
whole or not at all; those that are there are skipped, so the same command goes on. Scoring needs the dataset, for the
truth, but neither the world nor its tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ahriuwu_cli.data.documents import document_hash, parse_object, read_object, to_json
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.tensors import checksum, read_arrays, read_header_and_metadata
from ahriuwu_cli.disk import clear_files, write_whole
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation.cells import first_difference, identity, weights_hash
from ahriuwu_cli.evaluation.evaluate import measure_share, summarise
from ahriuwu_cli.evaluation.generate import Generated
from ahriuwu_cli.evaluation.measure import CONTROLS, Made, Maker, Progress, batches
from ahriuwu_cli.evaluation.prepare import EvaluationConfig, of_windows, settings
from ahriuwu_cli.evaluation.protocol import WindowManifest
from ahriuwu_cli.evaluation.score_files import amount
from ahriuwu_cli.evaluation.settings_check import SAVED, check_rollouts, hold
from ahriuwu_cli.evaluation.shards import join_measured, set_aside
from ahriuwu_cli.evaluation.summary import pick_horizons
from ahriuwu_cli.folders import made
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

FORMAT = "ahriuwu-rollouts/3"
INDEX = "saved.json"
AGAIN = "run the same `ahriuwu eval generate` again"
_PART = re.compile(r"part-([0-9]{6,8})-([0-9]{6,8})\.safetensors")


def save_rollouts(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    generation: RolloutConfig,
    manifest: WindowManifest,
    out: Path,
    progress: Progress | None = None,
    share: range | None = None,
    announce: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Roll out all that `evaluate` scores and write it; {"written", "skipped"} parts. `ready` must have been called.

    What is damaged there is set aside, which announce gets a sentence of. UserError when the folder holds rollouts of
    other settings.
    """
    index = _index(world, store, config, generation, manifest)
    with made(out):
        clear_files(out, rf"{re.escape(INDEX)}|windows\.json|part-.+")
        _write_index(out, index, store, manifest, announce)
        if (out / "windows.json").is_dir() and (aside := set_aside(out / "windows.json")):
            announce(f"{out / 'windows.json'} is a folder: set aside as {aside.name}")
        manifest.save(out / "windows.json")  # each time: who began may have been stopped before it
        share = range(len(manifest.windows)) if share is None else share
        horizons = pick_horizons(config.horizons, manifest.horizon)
        todo = [range(i, min(i + config.batch, share.stop)) for i in range(share.start, share.stop, config.batch)]
        missing = [part for part in todo if not _is_there(out, index, part, announce)]
        windows = sum(len(part) for part in missing)
        maker = Maker(world, store, config, generation, manifest, horizons, windows, progress)
        for part in missing:
            for here, frames, actions in batches(store, manifest, config.batch, part):
                _write_part(_part_file(out, part), maker(here, frames, actions), _part_of(index, part))
    return {"written": len(missing), "skipped": len(todo) - len(missing)}


def score_rollouts(
    folder: Path, store: EpisodeStore, delta_at: int | None = None, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """What `evaluate` returns for the world that made these rollouts, to the bit but for times.

    DataError for another dataset, damaged parts, or windows that are missing.
    """
    index = _read_index(folder)
    if index["identity"]["dataset_fingerprint"] != store.fingerprint:
        raise DataError(f"{folder} was made from another dataset than {store.path}: name that one")
    manifest = WindowManifest.load(folder / "windows.json", store, AGAIN)
    if manifest.hash != index["manifest"]:
        raise DataError(f"{folder / 'windows.json'} lists other windows than {INDEX} says: {AGAIN}")
    config, generation = _check_agreement(folder, index, store, manifest)
    if delta_at is not None:
        if delta_at < 1:
            raise UserError(f"--delta-at must be at least 1, got {delta_at}")
        if delta_at > manifest.horizon:
            raise UserError(f"--delta-at {delta_at} is beyond the {manifest.horizon} frames that {folder} holds")
        config = replace(config, delta_at=delta_at)
    horizons, parts = pick_horizons(config.horizons, manifest.horizon), []
    for part in _parts(folder, len(manifest.windows)):
        made = _read_part(folder, index, part, manifest, store, config.noise_seeds, horizons)
        here = replace(config, batch=len(part))
        parts.append(
            measure_share(None, store, here, generation, manifest, share=part, source=lambda _, made=made: made)
        )
        if progress:
            progress(part.stop, len(manifest.windows))
    measured = join_measured(parts)
    measured.seconds = sum(p.seconds for p in parts)
    return summarise(_stand_in(index["world"], store), store, config, generation, manifest, measured, measured.seconds)


def made_by(folder: Path) -> str:
    """`cells.weights_hash` of the world that made the rollouts of a folder. DataError."""
    return str(_read_index(folder)["identity"]["checkpoint_hash"])


def _index(world, store, config, generation, manifest) -> dict[str, Any]:
    """saved.json. `identity` is what the numbers depend on; the rest is what a result must be able to say."""
    everything, git = settings(world, store, config, generation, manifest), world.facts.get("git")
    index = {
        "format": FORMAT,
        "identity": identity(everything, weights_hash(world)),
        "generation": asdict(generation),
        "evaluation": asdict(config),
        "manifest": manifest.hash,
        "world": {
            "path": None if world.path is None else str(world.path),
            "git": None if git is None else str(git),
            "tokenizer": world.tokenizer.fingerprint(),
            "k_max": world.k_max,
            "fps": world.fps,
            "frame_skip": world.frame_skip,
            "device": str(world.device),
            "precision": world.precision,
        },
    }
    return json.loads(json.dumps(index | {"checksum": document_hash(index)}))


def _stand_in(about: dict[str, Any], store: EpisodeStore) -> Any:
    """What `summarise` asks of a world: facts alone. The actions are the dataset's, or it would have been refused."""
    return SimpleNamespace(
        path=about["path"], facts={"git": about["git"]}, k_max=about["k_max"], fps=about["fps"],
        frame_skip=about["frame_skip"], device=about["device"], precision=about["precision"],
        action_space=store.action_space, tokenizer=SimpleNamespace(fingerprint=lambda: about["tokenizer"]),
    )  # fmt: skip


def _write_index(
    folder: Path, index: dict[str, Any], store: EpisodeStore, manifest: WindowManifest, announce: Callable[[str], None]
) -> None:
    """Write the index, or see that the one that is there is the same. One that cannot be used, or fits none of the
    parts where all are ours, is set aside. UserError when the folder holds other rollouts."""
    other = UserError(f"{folder} holds rollouts of other settings: choose another --out")
    while True:
        parts = [] if _is_index_of(folder, index) else _found(folder)  # which came from elsewhere where it is ours
        says = [(said, _part_of(index, part)) for part in parts if (said := _says_of(folder, part))]
        if any(said != mine for said, mine in says):
            raise other
        try:
            if os.path.lexists(folder / INDEX):
                told = _read_index(folder)
                if told["identity"] != index["identity"]:
                    if not says:
                        raise other
                    raise DataError(f"{folder / INDEX} is of other rollouts than the parts beside it")
                _check_agreement(folder, told, store, manifest)
                return
        except DataError as error:
            if aside := set_aside(folder / INDEX):
                announce(f"{str(error).removesuffix(f': {AGAIN}')}: set aside as {aside.name}")
        if write_whole(folder / INDEX, to_json(index, 1) + "\n", replace=False):
            return


def _is_index_of(folder: Path, index: dict[str, Any]) -> bool:
    """Whether the index that is there is sound and of these very rollouts."""
    try:
        return _read_index(folder)["identity"] == index["identity"]
    except DataError:
        return False


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / INDEX
    try:
        document = read_object(file)
        if document.get("format") != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        if document_hash({k: v for k, v in document.items() if k != "checksum"}) != document.get("checksum"):
            raise ValueError("its checksum does not fit its content")
        hold(document, SAVED)
        check_rollouts(document["generation"], document["world"]["k_max"])
    except FileNotFoundError:
        if file.is_symlink():
            raise DataError(f"{file} is a link that leads to nothing: {AGAIN}") from None
        raise DataError(f"{folder} holds no rollouts: give the --out of `ahriuwu eval generate`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be used ({error}): {AGAIN}") from None
    return document


def _check_agreement(
    folder: Path, index: dict[str, Any], store: EpisodeStore, manifest: WindowManifest
) -> tuple[EvaluationConfig, RolloutConfig]:
    """What was asked for; DataError unless the index is the one that these windows of this dataset give."""
    told = index["evaluation"]
    config = EvaluationConfig(**told | {"horizons": tuple(told["horizons"])})
    generation = RolloutConfig(**index["generation"])
    everything = settings(_stand_in(index["world"], store), store, of_windows(config, manifest), generation, manifest)
    wanted = identity(everything, index["identity"]["checkpoint_hash"]) | {"ahriuwu": index["identity"]["ahriuwu"]}
    differs = first_difference(index["identity"], wanted)
    if not differs and of_windows(config, manifest) != config:
        differs = "evaluation"
    if differs:
        raise DataError(f"{folder / INDEX} contradicts itself or its windows ({differs} differs): {AGAIN}")
    return config, generation


def _part_file(folder: Path, part: range) -> Path:
    return folder / f"part-{part.start:06d}-{part.stop:06d}.safetensors"


def _part_of(index: dict[str, Any], part: range) -> str:
    """What a part says of itself: a hash of its windows and of all that its numbers depend on."""
    return document_hash({"identity": index["identity"], "windows": [part.start, part.stop]})


def _found(folder: Path) -> list[range]:
    return [range(int(m[1]), int(m[2])) for m in map(_PART.fullmatch, os.listdir(folder)) if m]


def _says_of(folder: Path, part: range) -> str | None:
    """What a part says of itself; None where it cannot be read."""
    try:
        return read_header_and_metadata(_part_file(folder, part))[1].get("of")
    except (DataError, OSError):
        return None


def _parts(folder: Path, windows: int) -> list[range]:
    """Parts that cover all windows, in order. DataError when some are missing."""
    found = _found(folder)
    reached: dict[int, range | None] = {0: None}  # by which part; --batch may have changed, so not every one leads on
    for part in sorted(found, key=lambda part: (part.start, part.stop)):
        if part.start in reached and part.start < part.stop <= windows:
            reached.setdefault(part.stop, part)
    if windows not in reached:
        until = min((part.start for part in found if part.start > max(reached)), default=windows)
        raise DataError(f"{folder} lacks the rollouts of windows {max(reached)}..{min(until, windows) - 1}: {AGAIN}")
    parts, at = [], windows
    while part := reached[at]:
        parts.append(part)
        at = part.start
    return parts[::-1]


def _tensors(made: Made) -> dict[str, np.ndarray]:
    tensors = {"again": made.again}
    for name, rollouts in made.rollouts.items():
        for i, each in enumerate(rollouts):
            tensors |= {f"{name}.{i}.frames": each.frames, f"{name}.{i}.finite": each.finite.astype(np.uint8)}
    return tensors


def _write_part(path: Path, made: Made, of: str) -> None:
    from safetensors.numpy import save

    seconds = {name: [each.seconds for each in rollouts] for name, rollouts in made.rollouts.items()}
    tensors = {name: np.ascontiguousarray(value) for name, value in _tensors(made).items()}
    told = to_json(seconds)
    metadata = {"format": FORMAT, "of": of, "seconds": told, "checksum": checksum(tensors, [of, told])}
    write_whole(path, save(tensors, metadata))


def _is_there(folder: Path, index: dict[str, Any], part: range, announce: Callable[[str], None]) -> bool:
    """Whether a part is there and whole; a damaged one, or one of other rollouts, is set aside, which is said."""
    path = _part_file(folder, part)
    if not path.exists():
        return False
    if _says_of(folder, part) == _part_of(index, part):
        return True
    if aside := set_aside(path):
        announce(f"{path} is damaged, or of other rollouts: set aside as {aside.name}")
    return False


def _read_part(
    folder: Path,
    index: dict[str, Any],
    part: range,
    manifest: WindowManifest,
    store: EpisodeStore,
    seeds: int,
    horizons: list[int],
) -> Made:
    """One part, its shapes checked against what the settings say before anything is read. DataError when damaged."""
    path, windows = _part_file(folder, part), len(part)
    size = (store.height, store.width, 3)
    names = {"model": manifest.horizon} | {f"forced_{h}": 1 for h in horizons if h > 1}
    names |= dict.fromkeys(CONTROLS if store.action_space.width else (), manifest.horizon)
    expected = {"again": ("U8", (windows, manifest.length, *size))}
    for name, frames in names.items():
        for i in range(seeds):
            expected[f"{name}.{i}.frames"] = ("U8", (windows, frames, *size))
            expected[f"{name}.{i}.finite"] = ("U8", (windows, frames))
    header, says = read_header_and_metadata(path)
    found = {name: (t.dtype, tuple(t.shape)) for name, t in header.items()}
    if found != expected:
        wrong = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        raise DataError(f"{path} does not hold what {INDEX} says ({wrong[0]} differs): delete it and generate again")
    if says.get("of") != _part_of(index, part):
        raise DataError(f"{path} holds other rollouts than {INDEX} says: delete it and generate again")
    try:
        arrays, metadata = read_arrays(path)
        if metadata["checksum"] != checksum(arrays, [metadata["of"], metadata["seconds"]]):
            raise ValueError("its checksum does not fit its content")
        seconds = parse_object(metadata["seconds"])
        rollouts = {
            name: [
                Generated(arrays[f"{name}.{i}.frames"], arrays[f"{name}.{i}.finite"] != 0, amount(seconds[name][i]))
                for i in range(seeds)
            ]
            for name in names
        }
        return Made(arrays["again"], rollouts)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is damaged ({error}): delete it and generate again") from None
