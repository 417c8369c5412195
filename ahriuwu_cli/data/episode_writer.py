"""Writing an episode store: all of it beside its place, which it takes when it is whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import as_text, to_json
from ahriuwu_cli.data.episodes import Episode
from ahriuwu_cli.data.metadata import FORMAT, MAX_BYTES, SPLITS, check_document, check_facts
from ahriuwu_cli.data.splits import check_fractions, split_episodes
from ahriuwu_cli.data.tensors import as_any_file
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.folders import replacing
from ahriuwu_cli.places import check_folder, refuse_to_take_away

if TYPE_CHECKING:
    import numpy as np


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


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse to write a dataset where something else is, or where none can be. Raises UserError."""
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder: choose another --out")
    check_folder(path, overwrite=True, holds="dataset")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / "dataset.json").is_file():
        raise UserError(f"{path} is not empty and is not a dataset, so it is left alone: choose another --out")
    if not overwrite:
        raise UserError(f"{path} already holds a dataset: choose another --out, or add --overwrite")
    refuse_to_take_away(path)
