"""Measurement: windows in batches, each rolled out with true and wrong actions and from true context, and scored.

Only scores are kept, so memory does not grow with the number of windows. Context frames are never scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation.controls import partners, random_actions, with_future
from ahriuwu_cli.evaluation.generate import Generated, Tick, generate
from ahriuwu_cli.evaluation.metrics import psnr_per_frame
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_actions, read_windows
from ahriuwu_cli.evaluation.scores import Table, join, mean_frame, mean_over_seeds, references, score
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


def measure(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    horizons: Sequence[int],
    progress: Progress | None = None,
    share: range | None = None,
) -> Measured:
    """Run and score everything. Controls only where the world has actions; the noise of a window is the same in all.

    share: these windows alone (default: all); wrong actions are borrowed from among all of them nevertheless.
    """
    share = range(len(manifest.windows)) if share is None else share
    wrong = wrong_actions(store, manifest, config.seed) if store.action_space.width else {}
    steps = manifest.horizon * (1 + len(wrong)) + sum(h > 1 for h in horizons)
    tally = _Tally(len(share) * steps * config.noise_seeds, progress)
    task = _Task(world, rollout_config, manifest.context, config.batch, tally.tick)
    seeds = [config.seed + i for i in range(config.noise_seeds)]
    mean, parts = mean_frame(store), []
    for here, frames, actions in batches(store, manifest, config.batch, share):
        windows, truth, last = manifest.windows[here], frames[:, manifest.context :], frames[:, manifest.context - 1]
        part, before = references(world, frames, manifest.context, config.batch, mean=mean)
        for name, acts in ({"model": actions} | {n: rows[here] for n, rows in wrong.items()}).items():
            tables = []
            for seed in seeds:
                made = task.run(frames, acts, windows, seed)
                tally.note(name, made)
                shared = {"before": before, "true_before": last, "finite": made.finite, "full": name == "model"}
                tables.append(score(made.frames, truth, **shared))
            part[name] = mean_over_seeds(tables)
        for h in horizons:
            part[f"forced_{h}"] = _forced(task, tally, frames, actions, windows, seeds, h, part["model"])
        parts.append(part)
    count = len(share) * manifest.horizon * config.noise_seeds
    return Measured(join(parts), tally.not_finite, count, tally.seconds)


def _forced(task: _Task, tally: _Tally, frames, actions, windows, seeds, h: int, model: Table) -> Table:
    """psnr (W, 1) of frame h when all frames before it are true, and the floor that repeats the one before."""
    first, at = h - 1, task.context + h - 1
    floor = psnr_per_frame(frames[:, at - 1], frames[:, at])[:, None]
    if h == 1:  # the free rollout's own first frame
        return {"psnr": model["psnr"][:, :1], "floor": floor}
    shifted = [(episode, start + first) for episode, start in windows]
    tables = []
    for seed in seeds:
        made = task.run(frames[:, first:at], actions[:, first:at], shifted, seed)
        tally.note("teacher_forced", made)
        psnr = psnr_per_frame(made.frames[:, 0], frames[:, at])[:, None]
        tables.append({"psnr": np.where(made.finite, psnr, np.nan), "floor": floor})
    return mean_over_seeds(tables)
