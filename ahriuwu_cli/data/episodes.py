"""The episode store: a folder with dataset.json and one safetensors file an episode, frames kept lossless.

`actions[t]` takes `frames[t]` to `frames[t+1]`: an episode of T frames has T-1 actions, or none when it is unlabelled.
Train, val and test are split by episode; episodes with identical content never part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import document_hash
from ahriuwu_cli.data.metadata import SPLITS, read_document
from ahriuwu_cli.data.tensors import TensorInfo, read_header, read_rows
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import DataError, ReplacedError, UserError, did_you_mean
from ahriuwu_cli.folders import whole

if TYPE_CHECKING:
    import numpy as np

BLOCK_BYTES = 16 << 20  # of actions that are taken into memory at a time where all are looked at


@dataclass(frozen=True)
class Episode:
    """One recording: its id, split, number of frames, whether it has actions, and the SHA-256 of its file."""

    id: str
    split: str
    frames: int
    labelled: bool
    sha256: str
    source: str = ""


class EpisodeStore:
    """A dataset on disk, opened with `EpisodeStore.open`. Each read takes its own rows; no file or map stays open."""

    def __init__(self, path: Path, document: dict[str, Any], verify: bool = True) -> None:
        self.path = path
        self._believed: set[str] | None = set() if verify else None  # episodes whose file has the hash that it had
        self.name: str = document["name"]
        self.source: dict[str, Any] = document["source"]
        self.fps: float = document["fps"]
        self.frame_skip: int = document["frame_skip"]
        self.height: int = document["height"]
        self.width: int = document["width"]
        self.seed: int = document["seed"]
        self.action_space = ActionSpace.from_json(document["action_space"], f"{path / 'dataset.json'}: action_space")
        self._episodes = {e["id"]: Episode(**e) for e in document["episodes"]}
        self._offsets: dict[tuple[str, str], int] = {}
        self.fingerprint = document_hash(document)
        self._page = _identity(path)

    @staticmethod
    def open(path: Path | str, verify: bool = True) -> EpisodeStore:
        """Open a dataset folder; its JSON and every file's size are checked. Raises DataError with a sentence.

        verify: hash an episode's file before the first of its rows is believed and hold actions to their space; off for
        who hashes or counts himself.
        """
        path = Path(path)

        def read() -> EpisodeStore:
            store = EpisodeStore(path, read_document(path), verify)
            for episode in store.episodes():
                store._check_file(episode)
            return store

        return whole(path, read)

    def episodes(self, split: str | None = None) -> list[Episode]:
        """The episodes of one split, or all of them. Raises UserError on an unknown split."""
        if split is not None and split not in SPLITS:
            raise UserError(f"unknown split {split!r}: {did_you_mean(split, SPLITS)}")
        return [e for e in self._episodes.values() if split in (None, e.split)]

    def episode(self, episode_id: str) -> Episode:
        """One episode by its id. Raises DataError when it is not in the dataset."""
        if episode_id not in self._episodes:
            raise DataError(f"{self.path} has no episode {episode_id!r}: `ahriuwu info` counts them")
        return self._episodes[episode_id]

    def lengths(self, split: str | None = None) -> dict[str, int]:
        """Frames of every episode of a split by id, as `data.windows` wants them."""
        return {e.id: e.frames for e in self.episodes(split)}

    def file(self, episode_id: str) -> Path:
        """The episode's safetensors file."""
        return self.path / "episodes" / f"{episode_id}.safetensors"

    def check_hash(self, episode_id: str) -> None:
        """DataError when the episode's file is not what was recorded, by its SHA-256; read once, streamed."""
        if self._believed is None or episode_id in self._believed:
            return
        file = self.file(episode_id)
        try:
            found = file_hash(file)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
        if found != self.episode(episode_id).sha256:
            raise DataError(
                f"{file} is not what was recorded (its sha256 differs): `ahriuwu info {self.path} --check` names what "
                f"is damaged; restore it"
            )
        self._believed.add(episode_id)

    def frames(self, episode_id: str, start: int = 0, stop: int | None = None, every: int = 1) -> np.ndarray:
        """Frames start..stop-1, every so many, as uint8 (T, H, W, 3). Raises IndexError outside the episode."""
        return self._read(episode_id, "frames", start, stop, every)

    def actions(self, episode_id: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Actions start..stop-1 as float32 (T, A). Raises DataError when unlabelled or outside the action space, which
        no hash shows, IndexError outside the episode."""
        if not self.episode(episode_id).labelled:
            raise DataError(f"episode {episode_id} of {self.path} has no actions: choose a labelled one")
        actions = self._read(episode_id, "actions", start, stop)
        if self._believed is not None:
            self.action_space.validate(actions, str(self.file(episode_id)), start)
        return actions

    def action_blocks(self, episode_id: str) -> Iterator[tuple[int, np.ndarray]]:
        """All actions of a labelled episode, some megabytes at a time, each with the step that it begins at."""
        steps = self.episode(episode_id).frames - 1
        some = max(1, BLOCK_BYTES // (4 * max(1, self.action_space.width)))
        for start in range(0, steps, some):
            yield start, self.actions(episode_id, start, min(start + some, steps))

    def __reduce__(self) -> tuple[Callable, tuple]:
        return EpisodeStore.open, (self.path,)  # a worker process checks the files itself

    def _read(self, episode_id: str, name: str, start: int, stop: int | None, every: int = 1) -> np.ndarray:
        episode = self.episode(episode_id)
        dtype, shape = self._expected(episode)[name]
        stop = shape[0] if stop is None else stop
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"{name} {start}..{stop} of episode {episode_id}, which has {shape[0]}")
        while True:  # until dataset.json was the same file before and after: rows of a replacement are never given
            try:
                if (episode_id, name) not in self._offsets:
                    self._offsets |= {(episode_id, n): t.offset for n, t in self._check_file(episode).items()}
                self.check_hash(episode_id)
                info = TensorInfo(dtype, shape, self._offsets[episode_id, name])
                rows, failed = read_rows(self.file(episode_id), info, start, stop, every), None
            except DataError as error:
                rows, failed = None, error
            now = _identity(self.path)
            if now == self._page and failed:
                raise failed
            if now == self._page:
                return rows
            if now is None or EpisodeStore.open(self.path).fingerprint != self.fingerprint:
                raise ReplacedError(f"{self.path} was replaced by another dataset while it was read: start again")
            self._page = now  # touched, or the same dataset once more

    def _expected(self, episode: Episode) -> dict[str, tuple[str, tuple[int, ...]]]:
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "frames": ("U8", (episode.frames, self.height, self.width, 3))
        }
        if episode.labelled:
            expected["actions"] = ("F32", (episode.frames - 1, self.action_space.width))
        return expected

    def _check_file(self, episode: Episode) -> dict[str, TensorInfo]:
        file = self.file(episode.id)
        if os.path.dirname(os.path.realpath(file)) != os.path.join(os.path.realpath(self.path), "episodes"):
            raise DataError(f"{file} points out of the dataset: copy the file in instead of linking to it")
        found = read_header(file)
        tensors, expected = {name: (t.dtype, t.shape) for name, t in found.items()}, self._expected(episode)
        if tensors != expected:
            raise DataError(f"{file} holds {tensors}, but dataset.json says {expected}: record or import it again")
        return found


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a dataset is replaced: the file that is its dataset.json."""
    try:
        status = (path / "dataset.json").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
