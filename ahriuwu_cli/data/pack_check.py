"""Are the packs of a dataset what was written? Hashes and contents of parts, streamed: all, or a sample on opening.

A hash alone says that nothing changed since somebody wrote it; so rows are held to what an encoder can have written.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.pack_format import Layout, OtherFormat, Part, hash_part, hashes_of, parts_of, read_pack_header
from ahriuwu_cli.data.pack_journal import left_behind
from ahriuwu_cli.data.tensors import DTYPES, fill
from ahriuwu_cli.data.validate import Check
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.printing import some_of

OPENING = 256 << 20  # bytes that opening a pack may read for its hashes: a smaller pack is checked whole
BLOCK = 4 << 20  # bytes of latents looked at together
INFINITE = 0x7C00  # the exponent of a float16 that is infinite or NaN


def check_some(path: Path, facts: dict[str, Any], layout: Layout, space: ActionSpace) -> None:
    """Check a pack of up to OPENING bytes whole, and of a larger one another sample every time. DataError names it."""
    parts = list(parts_of(facts))
    if layout.size > OPENING:
        parts = random.Random().sample(parts, max(1, len(parts) * OPENING // layout.size))
    bad = damaged_parts(path, facts, layout, sorted(parts, key=lambda part: part.index), space)
    if bad:
        more = f" and {len(bad) - 1} more parts" if len(bad) > 1 else ""
        raise DataError(f"{path} is damaged at {bad[0]}{more}: delete it, it is made anew")


def damaged_parts(
    path: Path, facts: dict[str, Any], layout: Layout, parts: list[Part], space: ActionSpace | None
) -> list[str]:
    """Those of the parts whose rows do not have the hash in the header, or that nobody could have packed, and why.

    space: what the actions must lie in; None where it is not known, and the hashes alone are looked at.
    """
    hashes, labelled = hashes_of(facts), {e["id"]: e["frames"] - 1 for e in facts["episodes"] if e["labelled"]}
    bad = []
    try:
        with open(path, "rb", buffering=0) as file:
            for part in parts:
                if hash_part(file.fileno(), layout, part) != hashes[part.index]:
                    bad.append(f"{part} (the hash differs)")
                    continue
                try:
                    if space:
                        _check_rows(path, file.fileno(), layout, part, labelled.get(part.episode, 0), space)
                except DataError as error:
                    bad.append(f"{part} ({error})")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return bad


def _check_rows(path: Path, descriptor: int, layout: Layout, part: Part, known: int, space: ActionSpace) -> None:
    """DataError for rows that the hash may be right for and the encoder never wrote, a few megabytes at a time.

    known: how many actions the episode has; the rows behind them are zero.
    """

    def rows(name: str, first: int, stop: int) -> np.ndarray:
        dtype, shape = layout.shapes[name]
        out = np.empty((stop - first, *shape[1:]), DTYPES[dtype])
        fill(descriptor, out, layout.offsets[name] + (part.row + first) * layout.row_bytes[name], path)
        return out

    count = part.stop - part.start
    step = max(1, BLOCK // layout.row_bytes["latents"])
    for first in range(0, count, step):
        bits = rows("latents", first, min(first + step, count)).view(np.uint16)
        if ((bits & INFINITE) == INFINITE).any():
            raise DataError("latents that are not finite")
    actions, known = rows("actions", 0, count), max(0, min(count, known - part.start))
    space.validate(actions[:known], "its actions", part.start)
    if actions[known:].any():
        raise DataError("actions where the episode has none")


def check_packs(store: EpisodeStore) -> list[Check]:
    """Rows for `ahriuwu info --check`: every byte of every pack against its hashes. No row when there is no pack."""
    bad, stale, good = [], [], 0
    folder = Path(store.path) / "latents"
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else []:
        try:
            facts, layout = read_pack_header(path)
            space = store.action_space if facts["dataset"] == store.fingerprint else None
            problems = damaged_parts(path, facts, layout, list(parts_of(facts)), space)
        except OtherFormat as error:
            stale.append(str(error))
            continue
        except DataError as error:
            bad.append(str(error))
            continue
        bad += [f"{path} at {part}: delete it, it is made anew" for part in problems]
        if misfit := _misfit(path, facts, store):
            bad.append(f"{path} {misfit}: delete it, it is made anew")
        if facts["dataset"] != store.fingerprint:
            stale.append(f"{path} was made from other data")
        good += not problems and not misfit
    unfinished = []
    if folder.is_dir():
        unfinished += [f"{path} is not finished" for path in sorted(folder.glob(".*.partial"))]
        unfinished += [f"{path} is left of a killed packer: delete it" for path in left_behind(folder)]
    rows = []
    if good or bad:
        rows.append(_row("latent packs match their hashes", bad, f"{good} packs, every part is as it was written"))
    if stale or unfinished:
        notes = [f"{note}; it is not used" for note in stale]
        rows.append(_row("latent packs", notes + unfinished, "", warning=True))
    return rows


def _misfit(path: Path, facts: dict[str, Any], store: EpisodeStore) -> str:
    """Where a pack's header contradicts its own name, or the dataset that it says it was made from."""
    if path.name != f"{facts['split']}-{facts['tokenizer'][:16]}.safetensors":
        return "is of another split or tokenizer than its name says"
    listed = [(e["id"], e["frames"], e["labelled"], e["source"]) for e in facts["episodes"]]
    here = [(e.id, e.frames, e.labelled, e.sha256) for e in store.episodes(facts["split"])]
    return "lists other episodes than the dataset" if facts["dataset"] == store.fingerprint and listed != here else ""


def _row(name: str, problems: list[str], good: str, warning: bool = False) -> Check:
    return Check(name, not problems, some_of(problems, 5, "; ") if problems else good, warning)
