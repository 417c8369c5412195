"""Evaluation of a world on held-out windows: measured, compared with floor, ceiling and controls, as JSON-able values.

`evaluate` is what `ahriuwu eval` prints; `quick_gain` is the cheap form that training uses for its previews.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import TrainingError, UserError
from ahriuwu_cli.evaluation.controls import partners
from ahriuwu_cli.evaluation.generate import generate
from ahriuwu_cli.evaluation.measure import CONTROLS, Measured, Progress, Source, batches, measure
from ahriuwu_cli.evaluation.prepare import NO_MEAN, EvaluationConfig, prepare, settings, warnings
from ahriuwu_cli.evaluation.protocol import WindowManifest
from ahriuwu_cli.evaluation.scores import join, references, score
from ahriuwu_cli.evaluation.summary import (
    by_horizon,
    by_window,
    curves,
    delta,
    drift,
    gain,
    jsonable,
    moving_windows,
    pick_horizons,
)
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

__all__ = ["EvaluationConfig", "evaluate", "measure_share", "quick_gain", "ready", "summarise"]


def evaluate(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """All scores; `status` is "nan" when a rollout was not finite, and the means that it touches are null then.

    `horizons` is keyed by generated frame, as text. UserError, DataError or CheckpointError, before anything is
    generated, when settings, dataset and world do not fit together. Definitions: `summary` and `metrics`.
    """
    started = time.monotonic()
    config, manifest = ready(world, store, config, rollout_config, manifest)
    measured = measure_share(world, store, config, rollout_config, manifest, progress)
    return summarise(world, store, config, rollout_config, manifest, measured, time.monotonic() - started)


def ready(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None = None,
) -> tuple[EvaluationConfig, WindowManifest]:
    """Every check that can be made before the first rollout; the windows, drawn unless they are given."""
    config, manifest = prepare(world, store, config, rollout_config, manifest)
    if world.action_space.width and len(manifest.windows) < 2:
        raise UserError("1 window leaves nobody to borrow actions from: give --windows 2 or more, or such a --manifest")
    return config, manifest


def measure_share(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    progress: Progress | None = None,
    share: range | None = None,
    source: Source | None = None,
) -> Measured:
    """`measure` at the horizons of the configuration, on these windows alone (default: all)."""
    horizons = pick_horizons(config.horizons, manifest.horizon)
    return measure(world, store, config, rollout_config, manifest, horizons, progress, share, source)


def summarise(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    measured: Measured,
    seconds: float,
) -> dict[str, Any]:
    """The result of `evaluate` from scores of all windows, whichever processes measured them."""
    episodes, controls = manifest.episodes, CONTROLS if world.action_space.width else ()
    horizons = pick_horizons(config.horizons, manifest.horizon)
    tables = measured.tables
    rows = {h: by_horizon(tables, episodes, h) for h in horizons}
    for h, row in rows.items():
        row["teacher_forced_psnr"] = tables[f"forced_{h}"]["psnr"].mean()
        row["teacher_forced_floor"] = tables[f"forced_{h}"]["floor"].mean()
    at = pick_horizons((config.delta_at,), manifest.horizon)
    moving = {h: moving_windows(tables, h) for h in at}
    result = {
        "kind": "eval",
        "status": "nan" if any(measured.not_finite.values()) else "ok",
        "not_finite_frames": measured.not_finite,
        "settings": settings(world, store, config, rollout_config, manifest),
        "n": {"windows": len(episodes), "episodes": len(set(episodes)), "noise_seeds": config.noise_seeds},
        "last": manifest.horizon,
        "horizons": rows,
        "action_delta_db": {c: {h: delta(tables, c, episodes, h) for h in at} for c in controls} or None,
        "action_delta_moving_db": {c: {h: delta(tables, c, episodes, h, moving[h]) for h in at} for c in controls}
        or None,
        "action_delta_note": delta_note(controls, episodes),
        "drift_db_per_frame": {who: drift(tables, who, episodes) for who in ("model", "floor", "ceiling")},
        "curves": curves(tables, episodes),
        "windows": by_window(tables, manifest.windows, horizons, controls),
        "warnings": [NO_MEAN] * (not store.episodes("train")) + warnings(world, store, episodes),
        "timing": {
            "seconds": seconds,
            "frames_per_s": measured.frames / max(measured.seconds, 1e-9),
        },
    }
    return jsonable(result)


def quick_gain(
    world: World,
    store: EpisodeStore,
    manifest: WindowManifest,
    rollout_config: RolloutConfig,
    seed: int = 0,
    batch: int = 32,
) -> dict[str, Any]:
    """{"gain_db": {horizon: dB}, "psnr": {...}, "floor": {...}} at 1, 4, 16 and the last: no controls, no SSIM.

    TrainingError when a rollout is not finite, since nothing could be compared with it.
    """
    prepare(world, store, EvaluationConfig(seed=seed, batch=batch), rollout_config, manifest)
    parts, broken = [], 0
    for here, frames, actions in batches(store, manifest, batch):
        part, before = references(world, frames, manifest.context, batch, full=False)
        made = generate(
            world,
            frames,
            actions,
            manifest.keys[here],
            rollout_config,
            seed=seed,
            context=manifest.context,
            batch=batch,
        )
        truth = frames[:, manifest.context :]
        part["model"] = score(made.frames, truth, before=before, finite=made.finite, full=False)
        parts.append(part)
        broken += int((~made.finite).any(axis=1).sum())
    if broken:
        raise TrainingError(
            f"the rollouts of {broken} of {len(manifest.windows)} windows are not finite: try a lower learning rate, "
            f"or another --tau-ctx"
        )
    tables = join(parts)
    horizons = pick_horizons((1, 4, 16), manifest.horizon)
    return jsonable(
        {
            "gain_db": {h: gain(tables, manifest.episodes, h).value for h in horizons},
            "psnr": {h: tables["model"]["psnr"][:, h - 1].mean() for h in horizons},
            "floor": {h: tables["floor"]["psnr"][:, h - 1].mean() for h in horizons},
        }
    )


def delta_note(controls: Sequence[str], episodes: Sequence[str]) -> str:
    """What the controls were, for people."""
    if not controls:
        return "no action delta: the action space is empty"
    same = sum(episodes[i] == episodes[p] for i, p in enumerate(partners(episodes)))
    return f"shuffled: another window's actions, of the same episode for {same} of {len(episodes)}; same noise in all"
