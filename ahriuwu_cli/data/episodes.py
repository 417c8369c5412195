"""The episode store: a folder with dataset.json and one safetensors file an episode, frames kept lossless.

`actions[t]` takes `frames[t]` to `frames[t+1]`: an episode of T frames has T-1 actions, or none when it is unlabelled.
Train, val and test are split by episode; episodes with identical content never part.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import as_text, document_hash, to_json
from ahriuwu_cli.data.metadata import FORMAT, MAX_BYTES, SPLITS, check_document, check_facts, read_document
from ahriuwu_cli.data.tensors import TensorInfo, as_any_file, read_header, read_rows
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import DataError, UserError, did_you_mean
from ahriuwu_cli.folders import replacing, whole
from ahriuwu_cli.places import check_folder

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
                raise DataError(f"{self.path} was replaced by another dataset while it was read: start again")
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
        if file.resolve().parent != self.path.resolve() / "episodes":
            raise DataError(f"{file} points out of the dataset: copy the file in instead of linking to it")
        found = read_header(file)
        tensors, expected = {name: (t.dtype, t.shape) for name, t in found.items()}, self._expected(episode)
        if tensors != expected:
            raise DataError(f"{file} holds {tensors}, but dataset.json says {expected}: record or import it again")
        return found


class EpisodeWriter:
    """Context manager that writes a dataset folder: `add` episodes, and leaving it assigns splits and renames.

    Everything goes to a hidden folder beside the target, which takes its name at the end: whatever stops the writing,
    nothing is left behind and an earlier dataset stays as it was.

    fps is the rate of the stored frames; frame_skip how many steps of the world one stored frame takes. Refuses
    (UserError) a folder that is not empty, unless overwrite is set and the folder is a dataset.
    then: as of `replacing`.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        height: int,
        width: int,
        fps: float,
        action_space: ActionSpace,
        name: str | None = None,
        source: dict[str, Any] | None = None,
        frame_skip: int = 1,
        seed: int = 0,
        fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
        overwrite: bool = False,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = Path(path).absolute()
        self.action_space = action_space
        self._shape = (height, width, 3)
        self._fractions = fractions
        self._overwrite, self._then = overwrite, then
        self._facts = {
            "format": FORMAT,
            "name": name or as_text(self.path.name),
            "source": source or {},
            "fps": fps,
            "frame_skip": frame_skip,
            "height": height,
            "width": width,
            "action_space": action_space.to_json(),
            "seed": seed,
        }
        self._episodes: list[dict[str, Any]] = []
        check_target(self.path, overwrite)
        check_fractions(fractions)  # now, not after an hour of recording
        check_facts(self._facts, str(self.path / "dataset.json"))
        self._place = ExitStack()
        self._staging: Path | None = None

    @property
    def frames(self) -> int:
        """How many frames have been added."""
        return sum(e["frames"] for e in self._episodes)

    def __enter__(self) -> EpisodeWriter:
        with ExitStack() as stack:
            self._staging = stack.enter_context(replacing(self.path, self._overwrite, self._then))
            (self._staging / "episodes").mkdir()
            self._place = stack.pop_all()
        return self

    def add(self, frames: np.ndarray, actions: np.ndarray | None, source: str = "", split: str | None = None) -> str:
        """Write one episode, frames uint8 (T, H, W, 3) and actions float32 (T-1, A) or None; returns its id.

        split: train, val or test; left out, it is drawn from the writer's fractions at the end.
        Raises DataError on a wrong shape, a wrong count of actions, or actions outside the action space; OSError when
        the disk is full.
        """
        import numpy as np
        from safetensors.numpy import save_file

        where = f"episode {source or len(self._episodes)}"
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != self._shape:
            raise DataError(f"{where}: frames are {frames.dtype} {frames.shape}, not uint8 (T, {self._shape})")
        if len(frames) < 2:
            raise DataError(f"{where}: {len(frames)} frame(s) show no action; an episode needs at least 2")
        tensors = {"frames": np.ascontiguousarray(frames)}
        if actions is not None:
            self.action_space.validate(actions, where)
            if len(actions) != len(frames) - 1:
                raise DataError(f"{where}: {len(frames)} frames need {len(frames) - 1} actions, not {len(actions)}")
            if self.action_space.width == 0:
                raise DataError(f"{where}: actions were given, but the dataset's action space is empty")
            tensors["actions"] = np.ascontiguousarray(actions)
        episode_id = f"{len(self._episodes):06d}"
        file = self._staging / "episodes" / f"{episode_id}.safetensors"
        with as_any_file(file):
            save_file(tensors, file)
        digest = file_hash(file)
        assert split is None or split in SPLITS, split
        episode = Episode(episode_id, split or "", len(frames), actions is not None, digest, source)
        self._episodes.append(dict(vars(episode)))
        return episode_id

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._place.__exit__(kind, error, trace)
            return
        with self._place:
            self._finish()

    def _finish(self) -> None:
        if not self._episodes:
            raise DataError(f"no episode was written, so {self.path} was not made")
        given = {e["sha256"]: e["split"] for e in self._episodes if e["split"]}
        unique = list(dict.fromkeys(e["sha256"] for e in self._episodes if e["sha256"] not in given))
        # identical episodes share one split
        drawn = split_episodes(len(unique), self._fractions, self._facts["seed"]) if unique else []
        splits = given | dict(zip(unique, drawn, strict=True))
        for episode in self._episodes:
            episode["split"] = splits[episode["sha256"]]
        document = self._facts | {"episodes": self._episodes}
        check_document(document, str(self.path / "dataset.json"))
        try:
            page = to_json(document, 1, MAX_BYTES) + "\n"
        except ValueError as error:
            raise DataError(f"no dataset.json can be written ({error}): make several datasets of it") from None
        (self._staging / "dataset.json").write_text(page)
        check_target(self.path, self._overwrite)  # somebody may have written there meanwhile


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when a dataset is replaced: the file that is its dataset.json."""
    try:
        status = (path / "dataset.json").stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def parse_fractions(text: str) -> tuple[float, float, float]:
    """The shares of train, val and test from "0.8,0.1,0.1". Raises UserError."""
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"the splits {text!r} are not three shares: give train,val,test such as 0.8,0.1,0.1") from None
    check_fractions((train, val, test))
    return train, val, test


def check_fractions(fractions: tuple[float, ...]) -> None:
    """UserError unless these are three shares that sum to 1 and leave something to train on."""
    if len(fractions) != 3 or not all(0 <= f <= 1 for f in fractions) or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"splits {fractions} must be three shares (train, val, test) that sum to 1, such as 0.8,0.1,0.1"
        )
    if fractions[0] == 0:
        raise UserError(f"splits {fractions} leave nothing to train on: give train a share above 0")


def split_episodes(n: int, fractions: tuple[float, float, float], seed: int) -> list[str]:
    """The split of each of n episodes, shuffled by the seed. From 3 episodes on, each split with a fraction above zero
    gets at least one; 2 become train and val; 1 is train. Raises UserError on fractions that are not shares of 1."""
    import numpy as np

    check_fractions(fractions)
    wanted = [max(1, round(n * f)) if f > 0 else 0 for f in fractions[1:]]
    while sum(wanted) > n - 1:  # train keeps one; test gives way before val
        wanted[1 if wanted[1] >= wanted[0] else 0] -= 1
    names = ["val"] * wanted[0] + ["test"] * wanted[1]
    names += ["train"] * (n - len(names))
    order = np.random.default_rng([seed, n]).permutation(n)
    return [names[i] for i in order]


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse to write a dataset where something else is, or where none can be. Raises UserError."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_dir()):
        raise UserError(f"{path} exists and is not a folder: choose another --out")
    check_folder(path, overwrite=True, holds="dataset")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "dataset.json").is_file():
        raise UserError(f"{path} is not empty and is not a dataset, so it is left alone: choose another --out")
    if not overwrite:
        raise UserError(f"{path} already holds a dataset: choose another --out, or add --overwrite")
