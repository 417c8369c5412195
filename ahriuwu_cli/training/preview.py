"""Previews during training: the free-running gain over persistence on held-out windows, by which `best` is chosen."""

from __future__ import annotations

from dataclasses import replace

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion.samplers import told_step_size
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation.evaluate import quick_gain
from ahriuwu_cli.evaluation.prepare import check_frames
from ahriuwu_cli.evaluation.protocol import WindowManifest, make_manifest
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

CONTEXT = 8


def preview_manifest(store: EpisodeStore, windows: int, seed: int) -> WindowManifest:
    """Windows of the val split: 8 frames of context and 16 generated, or as many as the longest episode allows."""
    check_frames(store)
    lengths = [e.frames for e in store.episodes("val") if e.labelled or not store.action_space.width]
    if not lengths or max(lengths) < CONTEXT + 1:
        raise DataError(
            f"{store.path} has no val episode of at least {CONTEXT + 1} frames"
            f"{' with actions' if store.action_space.width else ''}: previews need one; record more episodes"
        )
    horizon = min(16, max(lengths) - CONTEXT)
    available = sum(max(0, n - CONTEXT - horizon + 1) for n in lengths)
    return make_manifest(store, "val", CONTEXT, horizon, min(windows, available), seed)


def choose_sampler(world: World, store: EpisodeStore, manifest: WindowManifest) -> tuple[RolloutConfig, dict, dict]:
    """The better of `euler` and `shortcut` by gain at the last horizon: (settings, its preview, gain_db of each).

    Both take the same K; `shortcut` is asked only when the model was trained for d = 1/K.
    """
    results = {}
    for sampler in ("euler", "shortcut"):
        config = replace(world.generation, sampler=sampler)
        if told_step_size(sampler, config.steps, world.k_max) in world.trained_d:
            results[sampler] = quick_gain(world, store, manifest, config, seed=0)
    gains = {sampler: result["gain_db"] for sampler, result in results.items()}
    last = max(gains["euler"], key=int)
    best = max(gains, key=lambda sampler: gains[sampler][last])
    return replace(world.generation, sampler=best), results[best], gains


def preview(world: World, store: EpisodeStore, manifest: WindowManifest, batch: int = 32) -> dict:
    """{"gain_db": {horizon: dB}, ...} of the world's own generation settings."""
    return quick_gain(world, store, manifest, world.generation, seed=0, batch=batch)


def stands_still(before: dict | None, now: dict) -> bool:
    """Whether two previews, one after the other, are alike and worse than the last frame repeated: a dead network.

    docs/log.md has one, whose last norm's gains had gone to zero.
    """
    if before is None:
        return False
    first = min(now["gain_db"], key=int)
    alike = all(abs(gain - before["gain_db"][h]) < 0.005 for h, gain in now["gain_db"].items())
    return alike and now["gain_db"][first] < 0
