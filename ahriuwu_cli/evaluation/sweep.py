"""The sweep over tau_ctx (and K, sampler, context mode and label): common windows and noise, so that cells are paired.

Chosen on val, reported on test: the best cell, its reference and the world's own settings run once more on fresh
windows. Says which cell is best and, as important, which cannot be told from it on these windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import enumerate_windows
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation import sweep_verdict as verdict
from ahriuwu_cli.evaluation.prepare import prepare, settings
from ahriuwu_cli.evaluation.prepare import warnings as reading_warnings
from ahriuwu_cli.evaluation.protocol import WindowManifest, make_manifest
from ahriuwu_cli.evaluation.summary import jsonable, pick_horizons
from ahriuwu_cli.evaluation.sweep_grid import (
    OTHERS,
    SweepConfig,
    check_grid,
    evaluation_config,
    reference_of,
    walked,
    with_default,
)
from ahriuwu_cli.evaluation.sweep_rows import Rows
from ahriuwu_cli.evaluation.sweep_run import Bar, Budget, Runner, Say, Storage
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

__all__ = ["Ready", "Storage", "Sweep", "SweepConfig", "check_grid", "ready", "sweep", "walked"]


@dataclass(frozen=True)
class Ready:
    """What is going to be run: the cells, and the windows of choice and report (None: no report on test)."""

    grid: list[RolloutConfig]
    manifest: WindowManifest
    test: WindowManifest | None


@dataclass(frozen=True)
class Sweep:
    """result: JSON-able. clips: (title, uint8 (shown, T, H, W, 3)) of the truth and of every cell, context included.

    windows: one row for each cell, window and reported frame.
    """

    result: dict[str, Any]
    clips: list[tuple[str, np.ndarray]]
    windows: list[dict[str, Any]]


def ready(
    world: World,
    store: EpisodeStore,
    config: SweepConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None = None,
    write_back: bool = False,
) -> Ready:
    """Every check that can be made before the first rollout; the windows, drawn unless they are given.

    With write_back the world's own settings are a cell as well. Errors as `evaluate`.
    """
    grid = check_grid(world, config, rollout_config)
    _, manifest = prepare(world, store, evaluation_config(config), grid[0], manifest)
    if write_back:
        grid = with_default(grid, world.generation)
        world.check_generation(world.generation)
    if config.delta and store.action_space.width and len(manifest.windows) < 2:
        raise UserError(
            "1 window leaves nobody to borrow actions from: give --windows 2 or more, or such a --manifest, "
            "or --no-delta"
        )
    test = _test_windows(store, manifest, config.seed) if config.test and manifest.split != "test" else None
    if test:
        world.check_generation(world.generation)  # it is reported on test
    return Ready(grid, manifest, test)


def sweep(
    world: World,
    store: EpisodeStore,
    config: SweepConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None = None,
    *,
    storage: Storage | None = None,
    write_back: bool = False,
    bar: Bar | None = None,
    on_cell: Callable[[dict[str, Any]], None] | None = None,
    say: Say = lambda _: None,
    complain: Say = lambda _: None,
    budget_s: float | None = None,
) -> Sweep:
    """Measure every cell, choose, and report the choice on test. Errors as `evaluate`.

    on_cell gets each finished row; no cell is begun that would not end within budget_s seconds, and test is not looked
    at before the grid is finished. storage: where finished cells are kept and found again. write_back: decide as well
    whether the world's default tau_ctx should change (`result["write_back"]`); nothing is written here.
    """
    began, plan = time.monotonic(), ready(world, store, config, rollout_config, manifest, write_back)
    manifest, budget = plan.manifest, Budget(budget_s)
    runner = Runner(world, store, manifest, config, storage, complain)
    about = Rows(world, manifest, pick_horizons(config.horizons, manifest.horizon), runner.delta_at, plan.grid)
    done, rows = [], []
    for d in runner.run_all(plan.grid, budget, bar, say):
        done.append(d)
        rows.append(about.of_cell(d, done))
        if on_cell:
            on_cell(jsonable(rows[-1]))
    best, complete = verdict.find_best(done, manifest.episodes, about.at), len(done) == len(plan.grid)
    notes = reading_warnings(world, store, manifest.episodes)
    notes += verdict.warnings(world, done, best, manifest.episodes, about.at)
    notes += _notes(config, plan, runner, len(done))
    if write_back and not complete:
        notes.append("nothing was written back: the grid is not finished")
    decision = verdict.decide(done, world.generation, manifest.episodes, about.at) if write_back and complete else None
    test, tested, test_windows = None, [], []
    if plan.test and best and complete:
        roles = {"best": best.cell.cell, "reference": reference_of(plan.grid, best.cell.cell), "own": world.generation}
        if decision and decision["changed"]:
            roles["chosen"] = replace(world.generation, tau_ctx=decision["tau_ctx"])
        test, tested, test_windows = _report(world, store, config, plan, roles, storage, budget, bar, say, complain)
        notes += test.pop("warnings") + verdict.check_on_test(test, about.at, decision)
    not_finite = sum(d.scores.not_finite for d in [*done, *tested])
    evaluation, _ = prepare(world, store, evaluation_config(config), plan.grid[0], manifest)
    base = settings(world, store, evaluation, rollout_config, manifest)
    base.pop("generation")  # each cell has its own
    how = {"sweep": asdict(config), "grid": [asdict(c) for c in plan.grid], "own": asdict(world.generation)}
    result = {
        "kind": "sweep-tau",
        "status": "nan" if not_finite else "ok",
        "complete": complete and (not plan.test or not best or test["complete"]),
        "not_finite_frames": not_finite,
        "settings": base | how | {"checkpoint_hash": storage.weights if storage else None},
        "n": _counts(manifest),
        "cells_asked": len(plan.grid),
        "common": {n: getattr(plan.grid[0], n) for n in OTHERS if n not in about.varying},
        "varying": about.varying,
        "reported": about.horizons,
        "compared_at": about.at,
        "reference": {"tau_ctx": plan.grid[0].tau_ctx},
        **about.references(runner),
        "cells": rows,
        "best": best.to_json(about.at) if best else None,
        "test": test,
        "write_back": decision,
        "warnings": notes,
        "timing": {"seconds": time.monotonic() - began},
    }
    clips = [("truth", runner.truth_clip()), *((about.title(d.cell), d.scores.clip) for d in done)]
    windows = [row for d in done for row in about.by_window(d)]
    return Sweep(jsonable(result), clips, jsonable(windows + test_windows))


def _report(world, store, config, plan: Ready, roles: dict[str, RolloutConfig], storage, budget, bar, say, complain):
    """Cells by their roles (best, reference, own, chosen) on the windows of test: (facts, cells, rows)."""
    runner = Runner(world, store, plan.test, config, storage, complain)
    cells = list(dict.fromkeys(roles.values()))
    about = Rows(
        world, plan.test, pick_horizons(config.horizons, plan.test.horizon), runner.delta_at, [*plan.grid, *cells]
    )
    done = list(runner.run_all(cells, budget, bar, say))
    by_cell, episodes = {d.cell: d for d in done}, plan.test.episodes
    rows = {}
    for role, cell in roles.items():
        if cell in by_cell:
            rows[role] = about.of_cell(by_cell[cell], done)
            rows[role].pop("difference_db")  # to whom is said below
            rows[role].pop("curve")
    differences = {}
    for a, b in (("best", "reference"), ("best", "own"), ("chosen", "own")):
        pair = [by_cell.get(roles.get(role)) for role in (a, b)]
        if all(pair):
            differences[f"{a}_minus_{b}_db"] = {h: verdict.difference(*pair, episodes, h) for h in about.horizons}
    complete = len(done) == len(cells)
    facts = {
        "complete": complete,
        "split": plan.test.split,
        "manifest_hash": plan.test.hash,
        "n": _counts(plan.test),
        "cells": rows,
        **differences,
        "warnings": [f"on test: {w}" for w in reading_warnings(world, store, episodes)]
        + ([] if complete else ["the budget ended before test: the same command goes on where it stopped"]),
    }
    return facts, done, [row for d in done for row in about.by_window(d)]


def _notes(config: SweepConfig, plan: Ready, runner: Runner, done: int) -> list[str]:
    found = []
    if done < len(plan.grid):
        found.append(f"the budget ended after {done} of {len(plan.grid)} cells")
    if config.delta and not runner.delta_at:
        found.append("no action delta: the action space is empty")
    if config.test and plan.test is None:
        found.append("chosen on the test split itself, so there are no fresh windows to report the choice on")
    elif plan.test is None:
        found.append("not reported on test: the best of several is flattered by the windows that it was chosen on")
    return found


def _test_windows(store: EpisodeStore, manifest: WindowManifest, seed: int) -> WindowManifest:
    """As many windows of the test split as were chosen on, or all that there are."""
    lengths = {e.id: e.frames for e in store.episodes("test") if e.labelled or not store.action_space.width}
    try:
        count = min(len(manifest.windows), len(enumerate_windows(lengths, manifest.length)))
        return make_manifest(store, "test", manifest.context, manifest.horizon, count, seed)
    except DataError as error:
        raise DataError(f"the choice cannot be reported on test ({error}): give --no-test") from None


def _counts(manifest: WindowManifest) -> dict[str, int]:
    return {"windows": len(manifest.windows), "episodes": len(set(manifest.episodes)), "noise_seeds": 1}
