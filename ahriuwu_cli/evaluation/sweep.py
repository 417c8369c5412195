"""The sweep over tau_ctx (and K): the same windows and the same noise in every cell, so that cells can be paired.

Says which cell is best and, as important, which cannot be told from it on these windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.generate import generate
from ahriuwu_cli.evaluation.measure import Progress, batches, wrong_actions
from ahriuwu_cli.evaluation.metrics import ratio
from ahriuwu_cli.evaluation.prepare import EvaluationConfig, prepare, settings, warnings
from ahriuwu_cli.evaluation.protocol import Interval, WindowManifest, paired_bootstrap
from ahriuwu_cli.evaluation.scores import Table, join, references, score
from ahriuwu_cli.evaluation.summary import delta, gain, jsonable, pick_horizons
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

FROZEN = 0.3  # motion ratio below which a rollout is called frozen


@dataclass(frozen=True)
class SweepConfig:
    """The grid and the windows. steps empty: the K of the rollout configuration that is given."""

    taus: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9)  # tau_ctx: 0 clean, 1 noise
    steps: tuple[int, ...] = ()
    windows: int = 32
    context: int = 8
    horizon: int = 16
    horizons: tuple[int, ...] = (1, 4, 16)
    seed: int = 0
    batch: int = 32
    split: str = "val"  # choose on val, report on test
    delta: bool = False  # also the action delta against shuffled actions: twice the work
    delta_at: int = 4
    shown: int = 3  # windows kept for the comparison video


@dataclass(frozen=True)
class Sweep:
    """result: JSON-able. clips: (title, uint8 (shown, T, H, W, 3)) of the truth and of every cell, context included."""

    result: dict[str, Any]
    clips: list[tuple[str, np.ndarray]]


def sweep(
    world: World,
    store: EpisodeStore,
    config: SweepConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None = None,
    progress: Progress | None = None,
    on_cell: Callable[[dict[str, Any]], None] | None = None,
    budget_s: float | None = None,
) -> Sweep:
    """Measure every (K, tau_ctx). on_cell gets each finished row; after budget_s seconds no further cell is begun.

    The reference, tau_ctx = 0 or else the smallest, of the first K, runs first. Errors as `evaluate`.
    """
    started = time.monotonic()
    manifest = ready(world, store, config, rollout_config, manifest)
    grid = check_grid(world, config, rollout_config)
    evaluation, _ = prepare(world, store, _evaluation(config), grid[0], manifest)
    use_delta = config.delta and store.action_space.width > 0
    runner = _Runner(world, store, manifest, config, use_delta, progress, len(grid))
    horizons = pick_horizons(config.horizons, manifest.horizon)
    at = 16 if 16 in horizons else manifest.horizon
    cells: list[dict[str, Any]] = []
    tables: list[dict[str, Table]] = []
    for cell_config in grid:
        if cells and budget_s is not None and time.monotonic() - started > budget_s:
            break
        found, seconds, broken = runner.run(cell_config)
        tables.append(found)
        cells.append(_row(world, cell_config, found, tables[0], manifest, horizons, at, config, seconds, broken))
        if on_cell:
            on_cell(jsonable(cells[-1]))
    best = _best(cells, tables, manifest.episodes, at)
    notes = warnings(world, store, manifest.episodes) + _warnings(cells, config, best, at)
    if len(cells) < len(grid):
        notes.append(f"the budget ended after {len(cells)} of {len(grid)} cells")
    if config.delta and not use_delta:
        notes.append("no action delta: the action space is empty")
    not_finite = sum(c["not_finite_frames"] for c in cells)
    everything = settings(world, store, evaluation, rollout_config, manifest)
    floor, ceiling = ({h: runner.fixed[who]["psnr"][:, h - 1].mean() for h in horizons} for who in ("floor", "ceiling"))
    result = {
        "kind": "sweep-tau",
        "status": "nan" if not_finite else "ok",
        "not_finite_frames": not_finite,
        "settings": everything | {"taus": config.taus, "steps": config.steps or (rollout_config.steps,)},
        "n": {"windows": len(manifest.windows), "episodes": len(set(manifest.episodes)), "noise_seeds": 1},
        "reported": horizons,
        "compared_at": at,
        "reference": {"tau_ctx": grid[0].tau_ctx, "steps": grid[0].steps},
        "floor": floor,
        "ceiling": ceiling,
        "cells": cells,
        "best": best,
        "curves": _curves(cells, tables),
        "warnings": notes,
        "timing": {"seconds": time.monotonic() - started},
    }
    return Sweep(jsonable(result), runner.clips)


def ready(
    world: World,
    store: EpisodeStore,
    config: SweepConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None = None,
) -> WindowManifest:
    """Every check that can be made before the first rollout; the windows, drawn unless they are given."""
    grid = check_grid(world, config, rollout_config)
    _, manifest = prepare(world, store, _evaluation(config), grid[0], manifest)
    if config.delta and store.action_space.width and len(manifest.windows) < 2:
        raise UserError("1 window leaves nobody to borrow actions from: give --windows 2 or more, or leave out --delta")
    return manifest


def check_grid(world: World, config: SweepConfig, rollout_config: RolloutConfig) -> list[RolloutConfig]:
    """Every cell's settings, the reference first. UserError for an empty, repeated or impossible grid."""
    steps = config.steps or (rollout_config.steps,)
    for name, values in (("--taus", config.taus), ("--steps", steps)):
        if not values or len(set(values)) != len(values):
            raise UserError(
                f"{name} {', '.join(map(str, values)) or '(nothing)'} must be different values, at least one"
            )
    grid = [replace(rollout_config, tau_ctx=tau, steps=k) for k in steps for tau in sorted(config.taus)]
    for cell in grid:
        world.check_generation(cell)
    return grid


def _evaluation(config: SweepConfig) -> EvaluationConfig:
    shared = {f.name for f in fields(EvaluationConfig)} & {f.name for f in fields(SweepConfig)}
    return EvaluationConfig(**{name: getattr(config, name) for name in shared})


def walked(config: RolloutConfig, k_max: int) -> tuple[float, int]:
    """(tau at which a sampler really stops, model passes it really takes), found by walking it once on nothing."""
    passes = 0

    def denoise(z: torch.Tensor, tau: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
        nonlocal passes
        passes += 1
        return z

    sampler = SAMPLERS[config.sampler]
    _, _, end = sampler(
        denoise, torch.zeros(1, 1, 1, 1), config.steps, tau_ctx=config.tau_ctx, k_max=k_max, generator=None
    )
    return round(float(end), 9), passes


class _Runner:
    """Runs cells on common windows: floor and ceiling are measured once, with the first cell."""

    def __init__(self, world, store, manifest, config, use_delta, progress, cells: int) -> None:
        self.world, self.store, self.manifest, self.config = world, store, manifest, config
        self.wrong = wrong_actions(store, manifest, config.seed)["shuffled"] if use_delta else None
        self.fixed: dict[str, Table] = {}
        self.starts: list[np.ndarray] = []
        self.clips: list[tuple[str, np.ndarray]] = []
        self.progress = progress
        self.done, self.total = 0, cells * len(manifest.windows) * manifest.horizon * (2 if use_delta else 1)

    def run(self, rollout_config: RolloutConfig) -> tuple[dict[str, Table], float, int]:
        """Tables of floor, ceiling, truth, model (and shuffled), seconds of rollout, frames that were not finite."""
        context, seed = self.manifest.context, self.config.seed
        parts, fixed, clip, seconds, broken = [], [], [], 0.0, 0
        for i, (here, frames, actions) in enumerate(batches(self.store, self.manifest, self.config.batch)):
            keys, truth, part = self.manifest.keys[here], frames[:, context:], {}
            if not self.fixed:
                tables, before = references(self.world, frames, context, self.config.batch)
                fixed.append(tables)
                self.starts.append(before)
            for who, acts in (("model", actions), ("shuffled", None if self.wrong is None else self.wrong[here])):
                if acts is None:
                    continue
                made = generate(
                    self.world, frames, acts, keys, rollout_config,
                    seed=seed, context=context, batch=self.config.batch, tick=self._tick,
                )  # fmt: skip
                broken += int((~made.finite).sum())
                part[who] = score(made.frames, truth, before=self.starts[i], finite=made.finite)
                if who == "model":
                    seconds += made.seconds
                    clip.append(np.concatenate([frames[:, :context], made.frames], axis=1))
            parts.append(part)
            if not self.fixed and i == 0:
                self.clips.append(("truth", frames[: self.config.shown]))
        self.fixed = self.fixed or join(fixed)
        title = f"tau {rollout_config.tau_ctx:g}, K {rollout_config.steps}"
        self.clips.append((title, np.concatenate(clip)[: self.config.shown]))
        return self.fixed | join(parts), seconds, broken

    def _tick(self, frames: int) -> None:
        self.done += frames
        if self.progress:
            self.progress(self.done, self.total)


def _row(world, cell, found, reference, manifest, horizons, at, config, seconds, not_finite) -> dict[str, Any]:
    episodes, model, truth = manifest.episodes, found["model"], found["truth"]
    end, passes = walked(cell, world.k_max)
    return {
        "tau_ctx": cell.tau_ctx,
        "tau_end": end,
        "steps": cell.steps,
        "passes": passes,
        "psnr": {h: model["psnr"][:, h - 1].mean() for h in horizons},
        "gain_db": {h: gain(found, episodes, h) for h in horizons},
        "difference_db": _difference(found, reference, episodes, at),
        "motion_ratio": ratio(model["motion"][:, :at].mean(), truth["motion"][:, :at].mean()),
        "sharpness_ratio": ratio(model["energy"][:, at - 1].mean(), truth["energy"][:, at - 1].mean()),
        "action_delta_db": (
            delta(found, "shuffled", episodes, min(config.delta_at, manifest.horizon)) if "shuffled" in found else None
        ),
        "not_finite_frames": not_finite,
        "frames_per_s": len(episodes) * manifest.horizon / max(seconds, 1e-9),
    }


def _difference(a: dict[str, Table], b: dict[str, Table], episodes: Sequence[str], h: int) -> Interval:
    return paired_bootstrap(a["model"]["psnr"][:, h - 1] - b["model"]["psnr"][:, h - 1], episodes)


def _best(cells, tables, episodes, at: int) -> dict[str, Any] | None:
    """The finite cell of highest PSNR at frame `at`, and every other one whose distance to it may be nothing."""
    finite = [i for i, c in enumerate(cells) if np.isfinite(c["psnr"][at])]
    if not finite:
        return None
    top = max(finite, key=lambda i: cells[i]["psnr"][at])
    same = []
    for i in finite:
        gap = _difference(tables[top], tables[i], episodes, at)
        if i != top and not gap.lo > 0:  # with one episode there is no interval, and nothing can be told apart
            same.append({"tau_ctx": cells[i]["tau_ctx"], "steps": cells[i]["steps"], "behind_db": gap})
    return {"tau_ctx": cells[top]["tau_ctx"], "steps": cells[top]["steps"], "at": at, "not_told_apart": same}


def _warnings(cells, config: SweepConfig, best, at: int) -> list[str]:
    found = []
    if best and len(config.taus) > 1 and best["tau_ctx"] in (min(config.taus), max(config.taus)):
        found.append(f"the best tau {best['tau_ctx']:g} lies at the grid's edge: widen --taus if it can be widened")
    if best is None:
        found.append("no cell is finite, so there is no best")

    def name(cell) -> str:
        return f"{cell['tau_ctx']:g} (K = {cell['steps']})"

    below = [name(c) for c in cells if c["gain_db"][at].value < 0]
    frozen = [name(c) for c in cells if c["motion_ratio"] < FROZEN]
    if below:
        found.append(f"below persistence at frame {at}: tau {', '.join(below)}")
    if frozen:
        found.append(f"frozen (motion ratio below {FROZEN}): tau {', '.join(frozen)}")
    return found


def _curves(cells, tables) -> list[dict[str, Any]]:
    """PSNR in dB by generated frame of floor, ceiling and every cell."""
    rows = [{"name": who, "psnr": list(tables[0][who]["psnr"].mean(0))} for who in ("floor", "ceiling")]
    for cell, found in zip(cells, tables, strict=True):
        rows.append(
            {"name": f"tau {cell['tau_ctx']:g}, K {cell['steps']}", "psnr": list(found["model"]["psnr"].mean(0))}
        )
    return rows
