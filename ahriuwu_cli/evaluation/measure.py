"""Measurement: windows in batches, each rolled out with true and wrong actions and from true context, and scored.

Only scores are kept, so memory does not grow with the number of windows. Context frames are never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation.controls import partners, random_actions, with_future
from ahriuwu_cli.evaluation.generate import Generated, Tick, generate, reconstruct
from ahriuwu_cli.evaluation.metrics import psnr_per_frame
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_actions, read_windows
from ahriuwu_cli.evaluation.scores import (
    BASIC,
    FULL,
    LOOK,
    Table,
    join,
    mean_frame,
    mean_over_seeds,
    references,
    score,
)
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

CONTROLS = ("shuffled", "random")
Progress = Callable[[int, int], None]  # (frames generated, frames to generate)


@dataclass
class Measured:
    """tables: floor, ceiling, mean_frame, truth, model, every control, and `forced_h`, the step from true context."""

    tables: dict[str, Table]
    not_finite: dict[str, int]  # frames that were not finite, by what was generated
    frames: int  # generated with true actions
    seconds: float  # that they took


@dataclass
class _Tally:
    """What is counted while rollouts run."""

    total: int
    progress: Progress | None
    done: int = 0
    seconds: float = 0.0
    not_finite: dict[str, int] = field(default_factory=dict)

    def tick(self, frames: int) -> None:
        self.done += frames
        if self.progress:
            self.progress(self.done, self.total)

    def note(self, name: str, made: Generated) -> None:
        self.not_finite[name] = self.not_finite.get(name, 0) + int((~made.finite).sum())
        self.seconds += made.seconds if name == "model" else 0.0


@dataclass(frozen=True)
class _Task:
    """What every rollout of one measurement shares."""

    world: World
    rollout_config: RolloutConfig
    context: int
    batch: int
    tick: Tick

    def run(self, frames, actions, windows, seed) -> Generated:
        keys = [f"{episode}:{start}" for episode, start in windows]
        return generate(
            self.world, frames, actions, keys, self.rollout_config,
            seed=seed, context=self.context, batch=self.batch, tick=self.tick,
        )  # fmt: skip


def batches(
    store: EpisodeStore, manifest: WindowManifest, batch: int, share: range | None = None
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(which windows, their frames, their actions), `batch` windows of the share (default: all) at a time."""
    share = range(len(manifest.windows)) if share is None else share
    for first in range(share.start, share.stop, batch):
        stop = min(first + batch, share.stop)
        yield slice(first, stop), *read_windows(store, manifest, first, stop)


def wrong_actions(store: EpisodeStore, manifest: WindowManifest, seed: int) -> dict[str, np.ndarray]:
    """The actions (W, T-1, A) of every control: another window's, and random ones. Context keeps its own."""
    true = read_actions(store, manifest)
    other = {
        "shuffled": true[partners(manifest.episodes)],
        "random": random_actions(store.action_space, manifest.keys, true.shape[1], seed),
    }
    return {name: with_future(true, other[name], manifest.context) for name in CONTROLS}


@dataclass(frozen=True)
class Made:
    """What is scored of some windows W of one world: `again` uint8 (W, T, H, W, 3), the reconstructions, and for
    "model", every control and `forced_h` (frame h alone) one Generated a noise seed."""

    again: np.ndarray
    rollouts: dict[str, list[Generated]]


Source = Callable[[slice], Made]  # of windows


def measure(
    world: World | None,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    horizons: Sequence[int],
    progress: Progress | None = None,
    share: range | None = None,
    source: Source | None = None,
) -> Measured:
    """Run and score everything. Controls only where the world has actions; the noise of a window is the same in all.

    share: these windows alone (default: all); wrong actions are borrowed from among all of them nevertheless. source:
    where rollouts come from that were made before (`evaluation.saved`); no world is needed then.
    """
    share = range(len(manifest.windows)) if share is None else share
    make = Maker(world, store, config, rollout_config, manifest, horizons, len(share), progress)
    mean, parts = mean_frame(store), []
    for here, frames, actions in batches(store, manifest, config.batch, share):
        if source is None:
            made = make(here, frames, actions)
        else:
            made = source(here)
            make.count(made)
        parts.append(score_made(made, frames, manifest.context, horizons, config.batch, mean))
    count = len(share) * manifest.horizon * config.noise_seeds
    return Measured(join(parts), make.tally.not_finite, count, make.tally.seconds)


class Maker:
    """Rolls out all that is scored: `maker(which windows, their frames, their actions)` gives `Made`."""

    def __init__(
        self,
        world: World | None,
        store: EpisodeStore,
        config: EvaluationConfig,
        rollout_config: RolloutConfig,
        manifest: WindowManifest,
        horizons: Sequence[int],
        windows: int,
        progress: Progress | None = None,
    ) -> None:
        self.manifest, self.horizons = manifest, horizons
        self.wrong = wrong_actions(store, manifest, config.seed) if store.action_space.width else {}
        self.seeds = [config.seed + i for i in range(config.noise_seeds)]
        steps = manifest.horizon * (1 + len(self.wrong)) + sum(h > 1 for h in horizons)
        self.tally = _Tally(windows * steps * config.noise_seeds, progress)
        self.task = _Task(world, rollout_config, manifest.context, config.batch, self.tally.tick)

    def __call__(self, here: slice, frames: np.ndarray, actions: np.ndarray) -> Made:
        windows, context = self.manifest.windows[here], self.manifest.context
        given = {"model": actions} | {name: rows[here] for name, rows in self.wrong.items()}
        rollouts = {
            name: [self.task.run(frames, acts, windows, seed) for seed in self.seeds] for name, acts in given.items()
        }
        for h in self.horizons:
            if h > 1:  # frame 1 of the free rollout is its own step from true context
                shifted = [(episode, start + h - 1) for episode, start in windows]
                past = slice(h - 1, context + h - 1)
                rollouts[f"forced_{h}"] = [
                    self.task.run(frames[:, past], actions[:, past], shifted, seed) for seed in self.seeds
                ]
        made = Made(reconstruct(self.task.world, frames, self.task.batch), rollouts)
        self.count(made)
        return made

    def count(self, made: Made) -> None:
        """Note what is not finite, and the seconds of the true actions' rollouts."""
        for name, rollouts in made.rollouts.items():
            for each in rollouts:
                self.tally.note("teacher_forced" if name.startswith("forced_") else name, each)


def table_shapes(windows: int, horizon: int, horizons: Sequence[int], controls: Sequence[str]) -> dict[str, tuple]:
    """The shape of every table of `measure` for so many windows, by who/metric."""
    tables = dict.fromkeys(("floor", "ceiling", "mean_frame", "model"), FULL) | {"truth": LOOK}
    tables |= dict.fromkeys(controls, BASIC)
    shapes = {f"{who}/{metric}": (windows, horizon) for who, metrics in tables.items() for metric in metrics}
    return shapes | {f"forced_{h}/{metric}": (windows, 1) for h in horizons for metric in ("psnr", "floor")}


def score_made(
    made: Made, frames: np.ndarray, context: int, horizons: Sequence[int], batch: int, mean: np.ndarray | None
) -> dict[str, Table]:
    """Every table of some windows, averaged over noise seeds: floor, ceiling, mean_frame, truth, model, controls,
    forced_h. Without a mean frame its scores are NaN."""
    truth, last = frames[:, context:], frames[:, context - 1]
    part, before = references(None, frames, context, batch, mean=mean, again=made.again)
    if mean is None:
        part["mean_frame"] = {name: np.full_like(values, np.nan) for name, values in part["floor"].items()}
    for name, rollouts in made.rollouts.items():
        if name.startswith("forced_"):
            continue
        shared = {"before": before, "true_before": last, "full": name == "model"}
        part[name] = mean_over_seeds([score(r.frames, truth, finite=r.finite, **shared) for r in rollouts])
    for h in horizons:
        at = context + h - 1
        floor = psnr_per_frame(frames[:, at - 1], frames[:, at])[:, None]
        if h == 1:
            part["forced_1"] = {"psnr": part["model"]["psnr"][:, :1], "floor": floor}
            continue
        tables = []
        for r in made.rollouts[f"forced_{h}"]:
            psnr = psnr_per_frame(r.frames[:, 0], frames[:, at])[:, None]
            tables.append({"psnr": np.where(r.finite, psnr, np.nan), "floor": floor})
        part[f"forced_{h}"] = mean_over_seeds(tables)
    return part
