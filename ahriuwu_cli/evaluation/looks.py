"""Closer looks at a world, beside the scores of `evaluate`: each answers one question that PSNR cannot.

Each look is a part of the result under its own name, and is left out only by name or with its reason written down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import UserError, did_you_mean
from ahriuwu_cli.evaluation.components import error_by_component
from ahriuwu_cli.evaluation.distances import (
    CLIP_FRAMES,
    CLIPS_A_COMPONENT,
    MIN_CLIPS,
    REFERENCE_CLIPS,
    check_count,
    check_horizon,
    latent_distances,
    reference_clips,
    reference_windows,
)
from ahriuwu_cli.evaluation.generate import generate
from ahriuwu_cli.evaluation.levels import error_by_level
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_windows
from ahriuwu_cli.evaluation.spread import sample_spread
from ahriuwu_cli.evaluation.step_sizes import consistency, step_size_curve
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

SPREAD_WINDOWS, SPREAD_SEEDS = 32, 4
LEVEL_WINDOWS = 32
COMPONENT_WINDOWS = 64
DISTANCE_WINDOWS, MOST_BYTES = 512, 4 << 30  # clips are compared in pairs, a thousand times, and held together
STEP_WINDOWS = 8  # 190 passes a frame: more windows would take longer than all the rest
Look = Callable[[World, EpisodeStore, EvaluationConfig, RolloutConfig, WindowManifest], dict[str, Any]]


def look_closer(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    names: Sequence[str],
    say: Callable[[str], None] | None = None,
    extra: dict[str, Look] | None = None,
) -> dict[str, Any]:
    """{look: its result} for these names of LOOKS and of `extra`; say is told each before it begins.

    A look that these windows or this world do not allow (too few clips, no step size but one, ...) is {"skipped": why};
    one of `extra`, which somebody asked for by name, is an error then.
    """
    extra = extra or {}
    found, seconds = {}, {}
    for name in (*names, *extra):
        if say:
            say(name)
        started = time.monotonic()
        try:
            found[name] = (LOOKS | extra)[name](world, store, config, rollout_config, manifest)
        except UserError as error:
            if name in extra:
                raise
            found[name] = {"skipped": str(error)}
        seconds[name] = time.monotonic() - started
    return found | {"look_seconds": seconds}


def not_finite(looks: dict[str, Any]) -> dict[str, int]:
    """{look: how often something was not finite}, of the looks where anything was."""

    def count(value: Any) -> int:
        if isinstance(value, dict):
            return sum(
                int(v) if k.startswith("not_finite") and isinstance(v, int) else count(v) for k, v in value.items()
            )
        return sum(map(count, value)) if isinstance(value, list) else 0

    return {name: n for name, look in looks.items() if (n := count(look))}


def parse_looks(text: str) -> tuple[str, ...]:
    """'all', 'none' or names by commas. UserError for another."""
    if text in ("all", "none"):
        return tuple(LOOKS) if text == "all" else ()
    names = tuple(text.split(","))
    for name in names:
        if name in ("all", "none"):
            raise UserError(f"looks {text!r}: {name!r} stands alone, or give names by commas")
        if name not in LOOKS:
            raise UserError(f"unknown look {name!r}: {did_you_mean(name, ('all', 'none', *LOOKS))}")
    return tuple(name for name in LOOKS if name in names)


def optional_looks(
    features: Path | None, lpips: tuple[Path | None, str | None], fvd: tuple[Path | None, str | None]
) -> dict[str, Look]:
    """The looks that need networks: `features` of a weights file, `lpips` and `fvd` of (weights file, its sha256).

    Every file is read once now: a wrong one is refused before anything is generated, but for sound weights whose
    features of these frames are not finite. UserError, CheckpointError.
    """
    from functools import partial

    from ahriuwu_cli.evaluation import perceptual, standard

    looks: dict[str, Look] = {}
    if features is not None:
        perceptual.load_efficientnet_lite0(features)
        looks["features"] = partial(perceptual.perceptual_look, weights=features)
    for name, given, load in (("lpips", lpips, standard.load_lpips), ("fvd", fvd, standard.load_i3d)):
        weights = standard.Weights.given(name, *given)
        if weights is not None:
            load(weights)
            looks[name] = partial(_standard, name=name, weights=weights)
    return looks


def check_fits(looks: Collection[str], store: EpisodeStore, manifest: WindowManifest, seed: int) -> None:
    """UserError or DataError where frames or windows are too small, or clips too few, for one of `optional_looks`.

    All of it is known before any work.
    """
    from ahriuwu_cli.evaluation.perceptual import REFERENCE
    from ahriuwu_cli.evaluation.standard import check_size

    if "lpips" in looks:
        check_size(store)
    for name, what in (("fvd", "FVD"), ("features", "the look at features")):
        if name in looks:
            check_horizon(what, manifest)
            check_count("scored", len(manifest.windows))
            reference_windows(store, len(manifest.windows), split=manifest.split, seed=seed, avoid=manifest)
    if "features" in looks:
        reference_windows(store, REFERENCE, split="train", seed=seed, avoid=manifest)


def _standard(world, store, config, rollout_config, manifest, name, weights) -> dict[str, Any]:
    from ahriuwu_cli.evaluation.standard import standard_distances

    return standard_distances(world, store, config, rollout_config, manifest, **{name: weights})[name]


def _step_sizes(world, store, config, rollout_config, manifest) -> dict[str, Any]:
    return step_size_curve(
        world, store, manifest, rollout_config, windows=STEP_WINDOWS, seed=config.seed, batch=config.batch
    )


def _consistency(world, store, config, rollout_config, manifest) -> dict[str, Any]:
    return consistency(_asked(world, rollout_config), store, manifest, seed=config.seed, batch=config.batch)


def _spread(world, store, config, rollout_config, manifest) -> dict[str, Any]:
    return sample_spread(
        world, store, manifest, rollout_config,
        seeds=SPREAD_SEEDS, seed=config.seed, horizons=config.horizons, windows=SPREAD_WINDOWS, batch=config.batch,
    )  # fmt: skip


def _distances(world, store, config, rollout_config, manifest) -> dict[str, Any]:
    if manifest.horizon < CLIP_FRAMES:
        raise UserError(f"distances between clips need a horizon of at least {CLIP_FRAMES}, not {manifest.horizon}")

    def room(frames: int) -> int:  # for clips, with three sets that are made of them
        return MOST_BYTES // (4 * frames * 3 * store.height * store.width)

    most = min(DISTANCE_WINDOWS, max(MIN_CLIPS, room(manifest.length)))
    manifest = replace(manifest, windows=manifest.windows[:most])
    count = len(manifest.windows)
    others = reference_clips(store, count, split=manifest.split, seed=config.seed, avoid=manifest)
    most = min(REFERENCE_CLIPS, max(CLIPS_A_COMPONENT, room(CLIP_FRAMES)))
    reference, _ = reference_clips(store, most, split="train", seed=config.seed, avoid=manifest)
    frames, actions = read_windows(store, manifest)
    made = generate(
        world, frames, actions, manifest.keys, rollout_config,
        seed=config.seed, context=manifest.context, batch=config.batch,
    )  # fmt: skip
    return latent_distances(
        world, made.frames, frames,
        context=manifest.context, episodes=manifest.episodes, others=others, reference=reference, finite=made.finite,
        batch=config.batch,
    )  # fmt: skip


def _levels(world, store, config, rollout_config, manifest) -> dict[str, Any]:
    asked = _asked(world, rollout_config)
    return error_by_level(asked, store, manifest, windows=LEVEL_WINDOWS, seed=config.seed, batch=config.batch)


def _components(world, store, config, rollout_config, manifest) -> dict[str, Any]:
    return error_by_component(
        world, store, manifest, rollout_config,
        seed=config.seed, horizons=config.horizons, windows=COMPONENT_WINDOWS, batch=config.batch,
    )  # fmt: skip


def _asked(world: World, rollout_config: RolloutConfig) -> World:
    """The world with what was asked for as its own way to roll out."""
    return replace(world, generation=rollout_config)


LOOKS: dict[str, Look] = {
    "step_sizes": _step_sizes,
    "consistency": _consistency,
    "spread": _spread,
    "distances": _distances,
    "levels": _levels,
    "components": _components,
}
