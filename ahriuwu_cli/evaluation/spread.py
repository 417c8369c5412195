"""Spread of samples: do rollouts with different noise differ from each other as much as the truth differs from them?

Rollouts of one window, same actions and other noise, are draws of the model's forecast. If it is calibrated, the truth
is one more draw: E|s - s'|^2 = E|x - s|^2. A blurry or collapsed sampler shows here, where PSNR rewards it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.generate import Tick, generate, persist, reconstruct
from ahriuwu_cli.evaluation.metrics import mse_per_frame, ratio
from ahriuwu_cli.evaluation.protocol import (
    RESAMPLES,
    Interval,
    WindowManifest,
    interval_of_ratio,
    paired_bootstrap,
    read_windows,
)
from ahriuwu_cli.evaluation.scores import Table
from ahriuwu_cli.evaluation.summary import jsonable, pick_horizons
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World


def sample_spread(
    world: World,
    store: EpisodeStore,
    manifest: WindowManifest,
    rollout_config: RolloutConfig,
    *,
    seeds: int = 4,
    seed: int = 0,
    horizons: Sequence[int] = (1, 4, 16),
    windows: int | None = None,
    batch: int = 32,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Spread ratio and energy score of `seeds` rollouts of every window (noise seed, seed + 1, ...), by horizon.

    windows: only so many, from the manifest's beginning. x is decode(encode(truth)): rounding to uint8 and what the
    tokenizer loses would add to |x - s| and not to |s - s'|, and make every model look too narrow. At each horizon:

    - `spread_ratio`: E|s - s'|^2 / E|x - s|^2, sums over windows. 1 is calibrated; 0 is one answer whatever the noise;
      below 1 is too narrow or off the mark; above 1 too wide, at most 2. Right on average is not right everywhere.
    - `energy_score`: E|x - s| - E|s - s'| / 2 (Gneiting & Raftery 2007), RMS of pixels on [0, 1], lower is better.
      Proper: too narrow, too wide and off the mark all lose. `energy_floor` is persistence's (the reconstructed last
      context frame), `energy_gain` the floor minus the score, paired.

    Intervals are 95 %, bootstrapped over episodes; they leave out the training seed. A frame that is not finite is
    counted and makes what it touches NaN (null). UserError for fewer than 2 seeds.
    """
    if seeds < 2:
        raise UserError(f"the spread of samples needs at least 2 noise seeds, got {seeds}")
    count = len(manifest.windows) if windows is None else min(windows, len(manifest.windows))
    if count < 1 or batch < 1:
        raise UserError(f"windows and batch must be at least 1, got {windows} and {batch}")
    world.check_dataset(store)
    parts, broken = [], 0
    for first in range(0, count, batch):
        here = slice(first, min(first + batch, count))
        frames, actions = read_windows(store, manifest, here.start, here.stop)
        made = [
            generate(
                world, frames, actions, manifest.keys[here], rollout_config,
                seed=seed + i, context=manifest.context, batch=batch, tick=tick,
            )
            for i in range(seeds)
        ]  # fmt: skip
        samples, finite = np.stack([m.frames for m in made]), np.stack([m.finite for m in made])
        again = reconstruct(world, frames, batch)
        truth = again[:, manifest.context :]
        floor = np.sqrt(mse_per_frame(persist(again, manifest.context), truth))
        parts.append(spread_of(samples, truth, finite) | {"floor": floor})
        broken += int((~finite).sum())
    table = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    episodes = manifest.episodes[:count]
    return jsonable(
        {
            "against": "decode(encode(truth))",
            "n": {"windows": count, "episodes": len(set(episodes)), "noise_seeds": seeds},
            "noise_seeds": [seed + i for i in range(seeds)],
            "not_finite_frames": broken,
            "horizons": {h: _row(table, episodes, h) for h in pick_horizons(horizons, manifest.horizon)},
        }
    )


def spread_of(samples: np.ndarray, truth: np.ndarray, finite: np.ndarray | None = None) -> Table:
    """between = |s - s'|^2, error = |x - s|^2 and energy = |x - s| - |s - s'| / 2 of every frame, (W, L) each.

    samples (S, W, L, H, W, 3), S >= 2, and truth (W, L, H, W, 3) are uint8 or on [0, 1]; |.|^2 is the mean over pixels,
    between the mean over pairs of different samples, so no expectation is biased by a small S. finite (S, W, L): one
    sample that is not makes all three NaN.
    """
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} sample(s) have no spread")
    error = np.stack([mse_per_frame(s, truth) for s in samples])
    between = np.stack([mse_per_frame(a, b) for a, b in combinations(samples, 2)])
    table = {
        "between": between.mean(axis=0),
        "error": error.mean(axis=0),
        "energy": np.sqrt(error).mean(axis=0) - np.sqrt(between).mean(axis=0) / 2,
    }
    if finite is None:
        return table
    return {name: np.where(finite.all(axis=0), values, np.nan) for name, values in table.items()}


def ratio_bootstrap(
    above: np.ndarray, below: np.ndarray, episodes: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """sum(above) / sum(below) of windows (W,) each, with a 95 % interval from resampling episodes, numerator and
    denominator together; for few episodes as `protocol.paired_bootstrap`. NaN where that is, and for 0 / 0."""
    value = ratio(np.sum(above), np.sum(below))
    names, cluster = np.unique(np.asarray(episodes), return_inverse=True)
    if not np.isfinite(value) or len(names) < 2:
        return Interval(value, np.nan, np.nan)
    return interval_of_ratio(value, np.bincount(cluster, above), np.bincount(cluster, below), resamples, seed)


def _row(table: Table, episodes: Sequence[str], h: int) -> dict[str, Any]:
    at = {name: values[:, h - 1] for name, values in table.items()}
    return {
        "spread_ratio": ratio_bootstrap(at["between"], at["error"], episodes),
        "energy_score": paired_bootstrap(at["energy"], episodes),
        "energy_floor": paired_bootstrap(at["floor"], episodes),
        "energy_gain": paired_bootstrap(at["floor"] - at["energy"], episodes),
        "sample_rms": float(np.sqrt(at["between"].mean() / 2)),  # spread of one sample about the forecast's mean
        "error_rms": float(np.sqrt(at["error"].mean())),
    }
