"""The grid of a sweep: which settings are tried, what a sampler really makes of them, and which were never trained.

Cells that differ in tau_ctx alone are a group; each group has its own reference, tau_ctx = 0 or else its smallest.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.forcing import BEHIND_COPIES, FORCINGS
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

TAUS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.9)
OTHERS = ("steps", "sampler", "ctx_mode", "ctx_label")  # all settings of a cell but tau_ctx
NAMED = 6  # groups that a sentence lists
DRAWS = (1024, 24)  # clips and frames by which it is found out what a forcing draws
WITH_CONTEXT = ("prefix", "context")  # forcings that draw tau_ctx as well
ON_THE_WHOLE_GRID = ("independent", "uniform", *WITH_CONTEXT)  # that draw all of 1/k_max, 2/k_max, ... 1


@dataclass(frozen=True)
class SweepConfig:
    """The grid and the windows. An empty tuple: the value of the rollout configuration that is given."""

    taus: tuple[float, ...] = TAUS  # tau_ctx: 0 clean, 1 noise
    steps: tuple[int, ...] = ()  # K
    samplers: tuple[str, ...] = ()
    ctx_modes: tuple[str, ...] = ()
    ctx_labels: tuple[str, ...] = ()
    windows: int = 32
    context: int = 8
    horizon: int = 16
    horizons: tuple[int, ...] = (1, 4, 16)
    seed: int = 0
    batch: int = 32
    split: str = "val"  # choose on val, report on test
    test: bool = True  # report the choice on fresh windows of the test split
    delta: bool = True  # also the action delta against shuffled actions, at generated frame delta_at
    delta_at: int = 4
    shown: int = 3  # windows kept for the comparison video


def check_grid(world: World, config: SweepConfig, rollout_config: RolloutConfig) -> list[RolloutConfig]:
    """Every cell's settings, group after group, each group's reference first.

    UserError for an empty, repeated or impossible grid, CheckpointError for a step size that was never trained.
    """
    axes = {
        "steps": ("--steps", config.steps or (rollout_config.steps,)),
        "sampler": ("--sampler", config.samplers or (rollout_config.sampler,)),
        "ctx_mode": ("--ctx-mode", config.ctx_modes or (rollout_config.ctx_mode,)),
        "ctx_label": ("--ctx-label", config.ctx_labels or (rollout_config.ctx_label,)),
        "tau_ctx": ("--taus", config.taus),
    }
    for option, values in axes.values():
        if not values or len(set(values)) != len(values):
            raise UserError(
                f"{option} {', '.join(map(str, values)) or '(nothing)'} must be different values, at least one"
            )
    lists = [sorted(values) if name == "tau_ctx" else values for name, (_, values) in axes.items()]
    grid = [RolloutConfig(**dict(zip(axes, values, strict=True))) for values in itertools.product(*lists)]
    for cell in grid:
        world.check_generation(cell)
    return grid


def group(cell: RolloutConfig) -> tuple[Any, ...]:
    """All settings but tau_ctx: cells with the same group are compared with one reference."""
    return tuple(getattr(cell, n) for n in OTHERS)


def reference_of(grid: Sequence[RolloutConfig], cell: RolloutConfig) -> RolloutConfig:
    """The cell of the same group with the smallest tau_ctx, which is 0 in the default grid."""
    return min((c for c in grid if group(c) == group(cell)), key=lambda c: c.tau_ctx)


def with_default(grid: Sequence[RolloutConfig], own: RolloutConfig) -> list[RolloutConfig]:
    """The grid with the world's own settings in their place among it. UserError when that group is not swept."""
    if own in grid:
        return list(grid)
    same = [i for i, c in enumerate(grid) if group(c) == group(own)]
    if not same:
        raise UserError(
            f"--write-back compares with the checkpoint's own settings, tau {name(own, OTHERS)}: add its "
            f"--steps, --sampler, --ctx-mode and --ctx-label to the grid"
        )
    first, stop = same[0], same[-1] + 1
    return [*grid[:first], *sorted([*grid[first:stop], own], key=lambda c: c.tau_ctx), *grid[stop:]]


def varying(grid: Sequence[RolloutConfig]) -> list[str]:
    """Which settings besides tau_ctx differ between cells, in their order."""
    return [n for n in OTHERS if len({getattr(c, n) for c in grid}) > 1]


def name(cell: RolloutConfig | dict[str, Any], also: Sequence[str] = ()) -> str:
    """'0.1 (K = 4)', or with `also` '0.1 (K = 4, euler, label clean)': how sentences call a cell, after "tau"."""
    get = cell.get if isinstance(cell, dict) else lambda n: getattr(cell, n)
    more = [f"label {get(n)}" if n == "ctx_label" else str(get(n)) for n in also if n != "steps"]
    inside = ", ".join([f"K = {get('steps')}", *more])
    return f"{get('tau_ctx'):g} ({inside})"


def names(cells: Sequence[RolloutConfig | dict[str, Any]], also: Sequence[str] = ()) -> str:
    """Several cells in words, those of a group together: '0.1, 0.2 (K = 4), 0.5 (K = 8)'; long lists are cut."""
    found: dict[str, list[str]] = {}
    for cell in cells:
        tau, rest = name(cell, also).split(" ", 1)
        found.setdefault(rest, []).append(tau)
    parts = [f"{', '.join(taus)} {rest}" for rest, taus in found.items()]
    more = f" and {sum(map(len, list(found.values())[NAMED:]))} more" if len(parts) > NAMED else ""
    return ", ".join(parts[:NAMED]) + more


def evaluation_config(config: SweepConfig) -> EvaluationConfig:
    """What `prepare` checks and draws windows by."""
    shared = {f.name for f in fields(EvaluationConfig)} & {f.name for f in fields(SweepConfig)}
    return EvaluationConfig(**{n: getattr(config, n) for n in shared})


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


def untrained_taus(world: World, taus: Sequence[float]) -> list[float] | None:
    """Those levels that this world's forcing never draws; None when the checkpoint does not say how it was trained.

    Found by drawing. A level counts as trained when it was drawn, or lies between two drawn ones that are no further
    apart than d_min = 1/k_max, the spacing of the embedding that is interpolated between them.
    """
    trained_at = (world.facts.get("train") or {}).get("tau_ctx")
    if world.forcing not in FORCINGS or (trained_at is None and world.forcing != "independent"):
        return None
    k_max, generator = world.k_max, torch.Generator().manual_seed(0)
    context = tau_.TAU_CTX if trained_at is None else trained_at  # `independent` does not look at it
    if world.forcing in BEHIND_COPIES:  # whatever it draws for a frame, what is behind it stands at one level
        return [tau for tau in taus if round(tau, 6) != round(context, 6)]
    if world.forcing in ON_THE_WHOLE_GRID:  # of which so few draws need not touch every level
        least = min(1 / k_max, context) if world.forcing in WITH_CONTEXT else 1 / k_max
        return [tau for tau in taus if round(tau, 6) < round(least, 6)]
    drawn, _ = FORCINGS[world.forcing](*DRAWS, k_max, context, generator)
    levels = sorted({round(v, 6) for v in drawn.flatten().tolist()})

    def trained(tau: float) -> bool:
        at = bisect.bisect_left(levels, round(tau, 6))
        if at < len(levels) and levels[at] == round(tau, 6):
            return True
        return 0 < at < len(levels) and tau_.lower(levels[at], 1 / k_max) <= levels[at - 1] + 1e-5

    return [tau for tau in taus if not trained(tau)]
