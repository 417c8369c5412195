"""Is a dataset sound: contents against their hashes, actions against their space, and no split leaking into another."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ahriuwu_cli.data.episodes import Episode, EpisodeStore
from ahriuwu_cli.data.metadata import SPLITS
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.printing import printable, some_of

if TYPE_CHECKING:
    import numpy as np

RUN = 16  # so many changing frames in a row that two splits share are no coincidence
BLOCK_BYTES = 16 << 20  # bytes of frames taken into memory at a time,
BLOCK_FRAMES = 4096  # and most frames: of tiny ones the hashes take more than the pixels
OWN = ("dataset.json", "episodes", "latents")  # names in a dataset's folder
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
    store = EpisodeStore.open(store.path, verify=False)  # hashed here, so that all damage is named, not the first
    changed, bad_actions, black, frozen = [], [], [], []
    files: dict[str, str] = {}
    runs = _Runs()
    same_file = []
    splits = {e.id: e.split for e in store.episodes()}
    for episode in store.episodes():
        if file_hash(store.file(episode.id)) != episode.sha256:
            changed.append(episode.id)
        problem = _action_problem(store, episode)
        if problem:
            bad_actions.append(problem)
        dark = still = 0
        runs.begin(episode)
        for flat, motionless in _blocks(store, episode):
            dark += int((flat.reshape(len(flat), -1).max(1) < 16).sum())
            still += int(motionless.sum())
            runs.add(flat[~motionless])
        if dark / episode.frames > MOSTLY:
            black.append(episode.id)
        if still / max(1, episode.frames - 1) > MOSTLY:  # the first has none before it
            frozen.append(episode.id)
        twin = files.setdefault(episode.sha256, episode.id)
        if splits[twin] != episode.split:
            same_file.append(f"{twin} ({splits[twin]}) = {episode.id} ({episode.split})")
    same_run = [f"{a.id} ({a.split}) ~ {b.id} ({b.split})" for a, b in runs.shared()]
    labelled = [e for e in store.episodes() if e.labelled]
    present = [s for s in SPLITS if store.episodes(s)]
    return [
        Check("shapes, types, lengths", True, f"{len(splits)} episodes, T-1 actions for T frames"),
        _check("contents match their hashes", changed, "every file is as it was written"),
        _check("no other files among the episodes", _strangers(store), "every file is listed in dataset.json"),
        _check("actions", bad_actions, f"{len(labelled)} labelled episodes: finite, and within the action space"),
        _check("no episode in two splits", same_file, "no identical files across splits"),
        _check(f"no {RUN} equal frames in two splits", same_run, "no shared runs of changing frames"),
        _check("no other files", _neighbours(store), "dataset.json, episodes and latents alone", "unknown:", True),
        _check("splits", [s for s in SPLITS if s not in present], "train, val and test", "none in", True),
        _check("pictures", black, "no black episodes", "black:", True),
        _check("motion", frozen, "no frozen episodes", "frozen:", True),
    ]


def _check(name: str, problems: list[str], good: str, lead: str = "", warning: bool = False) -> Check:
    detail = f"{lead} {some_of(problems, 5)}".strip() if problems else good
    return Check(name, not problems, detail, warning)


def _strangers(store: EpisodeStore) -> list[str]:
    """Names in the folder of episodes that are none: what another program put there, or an older one left."""
    known = {store.file(e.id).name for e in store.episodes()}
    return sorted(printable(p.name) for p in (store.path / "episodes").iterdir() if p.name not in known)


def _neighbours(store: EpisodeStore) -> list[str]:
    """Names beside dataset.json that are not of a dataset; notes of people may well be among them."""
    return sorted(printable(p.name) for p in store.path.iterdir() if p.name not in OWN)


def _action_problem(store: EpisodeStore, episode: Episode) -> str | None:
    if not episode.labelled:
        return None
    try:
        for start, actions in store.action_blocks(episode.id):
            store.action_space.validate(actions, f"episode {episode.id}", start)
    except DataError as error:
        return str(error)
    return None


def _blocks(store: EpisodeStore, episode: Episode) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """An episode in blocks: pixels uint8 (T, H * W, 3), and (T,) bool, the frame stands still.

    A frame of one colour, or equal to the one before it, stands still. It says nothing about leakage.
    """
    import numpy as np

    pixels, before = store.height * store.width, None
    most = max(1, min(BLOCK_FRAMES, BLOCK_BYTES // (3 * pixels)))
    for start in range(0, episode.frames, most):
        flat = store.frames(episode.id, start, min(start + most, episode.frames)).reshape(-1, pixels, 3)
        still = (flat == flat[:, :1]).all((1, 2))
        still[1:] |= (flat[1:] == flat[:-1]).all((1, 2))
        still[0] |= before is not None and np.array_equal(flat[0], before)
        before = flat[-1].copy()
        yield flat, still


class _Runs:
    """Runs of RUN changing frames of all episodes, by 64-bit keys: 8 bytes a frame, however large the dataset is."""

    def __init__(self) -> None:
        self._keys, self._episodes, self._starts = array("Q"), [], []
        self._tail: list[bytes] = []

    def begin(self, episode: Episode) -> None:
        self._episodes.append(episode)
        self._starts.append(len(self._keys))
        self._tail = []

    def add(self, frames: np.ndarray) -> None:
        """More changing frames of the episode."""
        hashes = self._tail + [hashlib.blake2b(f, digest_size=8).digest() for f in frames]
        for i in range(len(hashes) - RUN + 1):
            key = hashlib.blake2b(b"".join(hashes[i : i + RUN]), digest_size=8).digest()
            self._keys.append(int.from_bytes(key, "little"))
        self._tail = hashes[-(RUN - 1) :]

    def shared(self) -> list[tuple[Episode, Episode]]:
        """Pairs of episodes of different splits with a run in common: the first that has it, and each other."""
        import numpy as np

        keys = np.frombuffer(self._keys, np.uint64) if self._keys else np.empty(0, np.uint64)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        _, first, which = np.unique(keys, return_index=True, return_inverse=True)
        ends = [*self._starts[1:], len(keys)]
        episode = np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))[order]  # of each key
        split = np.array([SPLITS.index(e.split) for e in self._episodes], np.int8)[episode]
        owner = episode[first[which]]
        differ = split[first[which]] != split
        found = sorted({(int(h), int(o)) for o, h in zip(owner[differ], episode[differ], strict=True)})
        return [(self._episodes[o], self._episodes[h]) for h, o in found]
