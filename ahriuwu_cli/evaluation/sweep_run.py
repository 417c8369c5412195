"""Running the cells of a sweep: the same windows, noise and references for all, finished ones taken from disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation.generate import generate
from ahriuwu_cli.evaluation.measure import Progress, batches, wrong_actions
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_windows
from ahriuwu_cli.evaluation.score_files import Shapes
from ahriuwu_cli.evaluation.scores import BASIC, FULL, Table, join, references, score
from ahriuwu_cli.evaluation.sweep_cells import CellScores, identity, put_aside, read_cell, write_cell
from ahriuwu_cli.evaluation.sweep_grid import SweepConfig, name, walked
from ahriuwu_cli.evaluation.table_check import check_tables
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

Bar = Callable[[str], AbstractContextManager[Progress | None]]  # title -> progress(passes made, passes to make)
Say = Callable[[str], None]
SAME = 1e-6  # scores of the same frames
REDONE = 0.02  # motion that starts at a reconstruction, which another device may have rounded otherwise
NAMED = ("sampler", "ctx_mode", "ctx_label")


@dataclass(frozen=True)
class Storage:
    """Where finished cells lie. weights: the hash of the checkpoint."""

    folder: Path
    weights: str


@dataclass(frozen=True, eq=False)
class Done:
    """A finished cell: its settings, its scores, and the tables of floor, ceiling and truth that all cells share."""

    cell: RolloutConfig
    scores: CellScores
    fixed: dict[str, Table]

    @property
    def tables(self) -> dict[str, Table]:
        """floor, ceiling, truth, model (and shuffled): metric -> (W, L)."""
        return self.fixed | self.scores.tables

    @property
    def psnr(self) -> np.ndarray:
        """(W, L) dB."""
        return self.scores.tables["model"]["psnr"]


class Budget:
    """Seconds for all that is begun here; what is under way may end. None: no limit."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.began = seconds, time.monotonic()
        self.spent, self.passes = 0.0, 0  # on cells that were run, not read

    def note(self, seconds: float, passes: int) -> None:
        self.spent += seconds
        self.passes += passes

    def needs(self, passes: int) -> float:
        """Seconds that so many passes will take, as far as is known."""
        return passes * self.spent / self.passes if self.passes else 0.0

    def allows(self, passes: int) -> bool:
        """Whether they would end in time. The first cell is always begun, so every call gets somewhere."""
        if self.seconds is None or not self.passes:
            return True
        return time.monotonic() - self.began + self.needs(passes) <= self.seconds


class Runner:
    """Cells on the windows of one manifest. Floor and ceiling are measured once, when the first cell is asked for."""

    def __init__(
        self,
        world: World,
        store: EpisodeStore,
        manifest: WindowManifest,
        config: SweepConfig,
        storage: Storage | None = None,
        complain: Say = lambda _: None,
    ) -> None:
        self.world, self.store, self.manifest, self.config = world, store, manifest, config
        self.storage, self.complain = storage, complain
        self.delta_at = min(config.delta_at, manifest.horizon) if config.delta and store.action_space.width else None
        self.fixed: dict[str, Table] = {}
        self._before: list[np.ndarray] = []

    def run_all(
        self, cells: Sequence[RolloutConfig], budget: Budget, bar: Bar | None = None, say: Say = lambda _: None
    ) -> Iterator[Done]:
        """Each cell that is on disk, or for which there is time, in order."""
        self._measure_references()
        stored = {cell: self._read(cell) for cell in cells}
        left = [cell for cell in cells if stored[cell] is None]
        if len(left) < len(cells):
            say(f"{len(cells) - len(left)} of {len(cells)} cells are there already")
        total, done = sum(map(self.passes, left)), 0
        with bar(f"sweep-tau {self.manifest.split}") if bar and left else nullcontext() as progress:
            for number, cell in enumerate(cells, 1):
                scores = stored[cell]
                if scores is None and not budget.allows(self.passes(cell)):
                    continue
                if scores is None:
                    scores = self._run(cell, done, total, progress)
                    done += self.passes(cell)
                    budget.note(scores.wall, self.passes(cell))
                    eta = budget.needs(total - done)
                    say(f"{number}/{len(cells)}: tau {name(cell, NAMED)} took {scores.wall:.1f} s, ETA {eta:.0f} s")
                yield Done(cell, scores, self.fixed)

    def passes(self, cell: RolloutConfig) -> int:
        """Model passes over one frame that a cell costs, by which time is foretold."""
        frames = self.manifest.horizon + (self.delta_at or 0)
        return len(self.manifest.windows) * frames * walked(cell, self.world.k_max)[1]

    def truth_clip(self) -> np.ndarray:
        """uint8 (shown, T, H, W, 3) of the first windows."""
        return read_windows(self.store, self.manifest, 0, self.config.shown)[0]

    def _measure_references(self) -> None:
        if self.fixed:
            return
        parts = []
        for _, frames, _ in batches(self.store, self.manifest, self.config.batch):
            tables, before = references(self.world, frames, self.manifest.context, self.config.batch)
            parts.append(tables)
            self._before.append(before)
        self.fixed = join(parts)

    def _identity(self, cell: RolloutConfig) -> dict:
        shown = min(self.config.shown, len(self.manifest.windows))
        return identity(
            self.storage.weights, self.manifest, cell, seed=self.config.seed, delta_at=self.delta_at, shown=shown
        )

    def _read(self, cell: RolloutConfig) -> CellScores | None:
        if self.storage is None:
            return None
        about = self._identity(cell)
        try:
            return read_cell(self.storage.folder, about, self._shapes(about["shown"]), self._is_sound)
        except DataError as error:
            if new := put_aside(self.storage.folder, about):
                self.complain(f"{error}: set aside as {new.name}, and done again")
            return None

    def _is_sound(self, scores: CellScores) -> bool:
        """Whether a cell counts the frames that its tables lack. ValueError where these deny each other, what was
        measured here of the same windows, or the frames that the cell shows."""
        lost = check_tables(self.fixed | scores.tables, seeds=1)
        shown, context = len(scores.clip), self.manifest.context
        truth, before = self.truth_clip(), np.concatenate(self._before)[:shown]
        if not np.array_equal(scores.clip[:, :context], truth[:, :context]):
            raise ValueError("its clip has another context than these windows")
        seen = score(scores.clip[:, context:], truth[:, context:], before=before, true_before=truth[:, context - 1])
        for metric, values in seen.items():
            gap = np.abs(scores.tables["model"][metric][:shown] - values)
            slack = np.full(gap.shape, SAME)
            if metric in ("motion", "motion_gg", "motion_gt"):
                slack[:, 0] = REDONE
            if (gap > slack).any():  # NaN, of a frame that was not finite, is not
                raise ValueError(f"'model/{metric}' is not that of its clip")
        return sum(lost.values()) == scores.not_finite

    def _shapes(self, shown: int) -> Shapes:
        """Of all that a cell holds."""
        windows, frame = len(self.manifest.windows), (self.store.height, self.store.width, 3)
        shapes = {f"model/{metric}": (windows, self.manifest.horizon) for metric in FULL}
        if self.delta_at:
            shapes |= {f"shuffled/{metric}": (windows, self.delta_at) for metric in BASIC}
        return shapes | {"clip": (shown, self.manifest.length, *frame)}

    def _run(self, cell: RolloutConfig, done: int, total: int, progress: Progress | None) -> CellScores:
        """Roll out all windows, and as many frames as the action delta needs again with shuffled actions."""
        began, context, passes = time.monotonic(), self.manifest.context, walked(cell, self.world.k_max)[1]
        wrong = None
        if self.delta_at:
            wrong = wrong_actions(self.store, self.manifest, self.config.seed)["shuffled"]
            wrong = wrong[:, : context + self.delta_at - 1]  # the frames after that would not be looked at

        def tick(frames: int) -> None:
            nonlocal done
            done += frames * passes
            if progress:
                progress(done, total)

        parts, clip, seconds, broken = [], [], 0.0, 0
        for i, (here, frames, actions) in enumerate(batches(self.store, self.manifest, self.config.batch)):
            part: dict[str, Table] = {}
            asked = {"model": actions} | ({} if wrong is None else {"shuffled": wrong[here]})
            for who, acts in asked.items():
                made = generate(
                    self.world, frames, acts, self.manifest.keys[here], cell,
                    seed=self.config.seed, context=context, batch=self.config.batch, tick=tick,
                )  # fmt: skip
                truth = frames[:, context : context + made.frames.shape[1]]
                last, main = frames[:, context - 1], who == "model"
                shared = {"before": self._before[i], "true_before": last, "finite": made.finite, "full": main}
                part[who] = score(made.frames, truth, **shared)
                broken += int((~made.finite).sum())
                if main:
                    seconds += made.seconds
                    clip.append(np.concatenate([frames[:, :context], made.frames], axis=1)[: self.config.shown])
            parts.append(part)
        shown = np.concatenate(clip)[: self.config.shown]
        scores = CellScores(join(parts), shown, seconds, time.monotonic() - began, broken)
        if self.storage:
            write_cell(self.storage.folder, self._identity(cell), scores)
        return scores
