"""Is a dataset sound: contents against their hashes, actions against their space, and no split leaking into another."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ahriuwu_cli.data.episodes import Episode, EpisodeStore
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    import numpy as np

RUN = 16  # so many changing frames in a row that two splits share are no coincidence
MOSTLY = 0.95  # an episode is black or frozen when this share of its frames is


@dataclass(frozen=True)
class Check:
    """One row of the report. A warning that is not ok deserves a look; anything else that is not ok is a defect."""

    name: str
    ok: bool
    detail: str
    warning: bool = False


def validate(store: EpisodeStore) -> list[Check]:
    """Read every byte of a dataset and report. Shapes, types and lengths T and T-1 were checked by opening it."""
    changed, bad_actions, black, frozen = [], [], [], []
    files: dict[str, str] = {}
    runs: dict[str, str] = {}
    same_file, same_run = [], []
    splits = {e.id: e.split for e in store.episodes()}
    for episode in store.episodes():
        with open(store.file(episode.id), "rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != episode.sha256:
                changed.append(episode.id)
        problem = _action_problem(store, episode)
        if problem:
            bad_actions.append(problem)
        frames = store.frames(episode.id)
        if (frames.reshape(len(frames), -1).max(1) < 16).mean() > MOSTLY:
            black.append(episode.id)
        if _still(frames).mean() > MOSTLY:
            frozen.append(episode.id)
        twin = files.setdefault(episode.sha256, episode.id)
        if splits[twin] != episode.split:
            same_file.append(f"{twin} ({splits[twin]}) = {episode.id} ({episode.split})")
        shared = {
            owner for key in _run_keys(frames) if splits[owner := runs.setdefault(key, episode.id)] != episode.split
        }
        same_run += [f"{owner} ({splits[owner]}) ~ {episode.id} ({episode.split})" for owner in sorted(shared)]
    labelled = [e for e in store.episodes() if e.labelled]
    present = [s for s in ("train", "val", "test") if store.episodes(s)]
    return [
        Check("shapes, types, lengths", True, f"{len(splits)} episodes, T-1 actions for T frames"),
        _check("contents match their hashes", changed, "every file is as it was written"),
        _check("actions", bad_actions, f"{len(labelled)} labelled episodes: finite, and within the action space"),
        _check("no episode in two splits", same_file, "no identical files across splits"),
        _check(f"no {RUN} equal frames in two splits", same_run, "no shared runs of changing frames"),
        _check(
            "splits", [s for s in ("train", "val", "test") if s not in present], "train, val and test", "none in", True
        ),
        _check("pictures", black, "no black episodes", "black:", True),
        _check("motion", frozen, "no frozen episodes", "frozen:", True),
    ]


def _check(name: str, problems: list[str], good: str, lead: str = "", warning: bool = False) -> Check:
    more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
    detail = f"{lead} {', '.join(problems[:5])}{more}".strip() if problems else good
    return Check(name, not problems, detail, warning)


def _action_problem(store: EpisodeStore, episode: Episode) -> str | None:
    if not episode.labelled:
        return None
    try:
        store.action_space.validate(store.actions(episode.id), f"episode {episode.id}")
    except DataError as error:
        return str(error)
    return None


def _still(frames: np.ndarray) -> np.ndarray:
    """(T,) bool: the frame is of one colour, or equals the one before it. They say nothing about leakage."""
    import numpy as np

    flat = frames.reshape(len(frames), -1, 3)
    still = (flat == flat[:, :1]).all((1, 2))
    still[1:] |= np.array([np.array_equal(a, b) for a, b in zip(frames[1:], frames[:-1], strict=True)], bool)
    return still


def _run_keys(frames: np.ndarray) -> set[bytes]:
    """A key for every run of RUN frames, those that stand still left out."""
    hashes = [hashlib.blake2b(f.tobytes(), digest_size=8).digest() for f in frames[~_still(frames)]]
    return {b"".join(hashes[i : i + RUN]) for i in range(len(hashes) - RUN + 1)}
