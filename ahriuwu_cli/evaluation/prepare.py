"""What is asked of an evaluation, and whether world, dataset and windows fit together: refused in a sentence if not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ahriuwu_cli import __version__
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation.controls import HOLD
from ahriuwu_cli.evaluation.metrics import CAP_DB, SSIM_WINDOW
from ahriuwu_cli.evaluation.protocol import FEW, RESAMPLES, WindowManifest, make_manifest
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

_HOW = f"bootstrap with {RESAMPLES} resamples, Student's t below {FEW} episodes"
INTERVAL = f"95 % over episodes: {_HOW}; leaves out training seeds"
# as older results say it
INTERVAL_BEFORE = "95 %, bootstrap over episodes, 2000 resamples; leaves out noise seeds and training seeds"
NO_MEAN = "the dataset has no train split, so there is no mean frame to compare with"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured. windows, context, horizon, seed and split describe windows that are still to be drawn."""

    windows: int = 64
    context: int = 8  # frames that are given
    horizon: int = 16  # frames that are generated
    horizons: tuple[int, ...] = (1, 4, 16)  # reported, beside the last
    seed: int = 0  # of the windows, of the noise and of random actions
    batch: int = 32
    split: str = "test"
    delta_at: int = 4  # generated frame at which action following is reported, beside the last
    noise_seeds: int = 1  # rollouts of every window with different noise, averaged


def prepare(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest | None,
) -> tuple[EvaluationConfig, WindowManifest]:
    """Check everything and draw the windows unless they are given. UserError, DataError or CheckpointError.

    The configuration comes back with the windows' own split, context, horizon and count.
    """
    world.check_generation(rollout_config)
    for name in ("batch", "delta_at", "noise_seeds"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}")
    if config.seed < 0:
        raise UserError(f"--seed must be 0 or more, got {config.seed}")
    world.check_dataset(store)
    check_frames(store)
    if manifest is None:
        manifest = make_manifest(store, config.split, config.context, config.horizon, config.windows, config.seed)
    elif manifest.fingerprint != store.fingerprint:
        raise DataError(f"the windows were made for another dataset than {store.path}: make new ones")
    return of_windows(config, manifest), manifest


def of_windows(config: EvaluationConfig, manifest: WindowManifest) -> EvaluationConfig:
    """The same with the windows' own split, context, horizon and count."""
    own = {"windows": len(manifest.windows), "context": manifest.context, "horizon": manifest.horizon}
    return replace(config, split=manifest.split, **own)


def check_frames(store: EpisodeStore) -> None:
    """DataError for frames that are too small to be scored."""
    if min(store.height, store.width) < SSIM_WINDOW:
        raise DataError(
            f"{store.path} has frames of {store.height}x{store.width}: SSIM needs at least {SSIM_WINDOW} pixels a side"
        )


def warnings(world: World, store: EpisodeStore, episodes: list[str]) -> list[str]:
    """What a reader of the numbers must know and cannot see in them."""
    return of_few(episodes) + of_rates(world, store)


def of_rates(world: World, store: EpisodeStore) -> list[str]:
    """The warning of a dataset that runs at another rate than its world."""
    if (store.fps, store.frame_skip) == (world.fps, world.frame_skip):
        return []
    return [f"the dataset runs at {store.fps:g} frames/s (frame skip {store.frame_skip}), {trained_at(world)}"]


def trained_at(world: World) -> str:
    """The end of such a warning."""
    return f"the world was trained at {world.fps:g} (frame skip {world.frame_skip})"


def of_few(episodes: Sequence[str]) -> list[str]:
    """The warnings that these episodes, one a window, give alone."""
    if len(set(episodes)) < 2:
        return ["all windows are of one episode: there are no intervals, since others may differ by any amount"]
    if len(set(episodes)) < 5:
        return [f"only {len(set(episodes))} episodes: the intervals are rough"]
    return []


def settings(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
) -> dict[str, Any]:
    """All that the numbers depend on, and what they came from. Intervals leave out the training seed."""
    return {
        "tau": LABEL,
        "checkpoint": str(world.path) if world.path else None,
        "checkpoint_git": world.facts.get("git"),
        "tokenizer_fingerprint": world.tokenizer.fingerprint(),
        "dataset": str(store.path),
        "dataset_fingerprint": store.fingerprint,
        "split": manifest.split,
        "manifest_hash": manifest.hash,
        "window_seed": manifest.seed,
        "evaluation": asdict(config),
        "generation": asdict(rollout_config),
        "k_max": world.k_max,
        "random_action_hold": list(HOLD),
        "psnr_cap_db": CAP_DB,
        "interval": INTERVAL,
        "device": str(world.device),
        "precision": world.precision,
        "ahriuwu": __version__,
        "torch": torch.__version__,
    }
