"""Error by component: where in the latents a world errs, from what is strongest in the picture to what is finest.

One number for a frame hides this: a world can be right about areas and make up every fine line, or leave it out. For
each group of channels stand the error and what is left of the energy, both over the variance of the truth there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.generate import Tick, generate, persist
from ahriuwu_cli.evaluation.metrics import ratio
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_windows
from ahriuwu_cli.evaluation.scores import Table
from ahriuwu_cli.evaluation.spread import ratio_bootstrap
from ahriuwu_cli.evaluation.summary import jsonable, pick_horizons
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

GROUPS = 8  # of channels, as equal in number as can be


def error_by_component(
    world: World,
    store: EpisodeStore,
    manifest: WindowManifest,
    rollout_config: RolloutConfig,
    *,
    seed: int = 0,
    horizons: Sequence[int] = (1, 4, 16),
    windows: int | None = None,
    batch: int = 32,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Error and energy of generated frames by group of latent channels and by horizon: `rows` of frame and group.

    windows: only so many, from the manifest's beginning. Frames are compared as they are shown, encoded again: x of the
    true frame, y of the generated one. Groups are GROUPS parts of the D channels: of an ordered tokenizer (principal
    components) as they stand, of another by their variance, strongest first. At each horizon, with sums over windows,
    tokens and the group's channels, and var the variance over windows (by n - 1):

    - `error`: |y - x|^2 / var x. 0 is right, 1 what leaving it out gets, 2 another draw of the same kind.
    - `energy`: var y / var x. 1 is as much as there is; with an error above 1 it is made up.
    - `floor_error`: the error of persistence, the last context frame.

    Intervals are 95 %, bootstrapped over episodes around fixed means. A frame of a reported horizon that is not finite
    is counted and makes it NaN (null), as are ratios of channels that never change. UserError for fewer than 2
    windows, which have no variance.
    """
    count = len(manifest.windows) if windows is None else min(windows, len(manifest.windows))
    if count < 2 or batch < 1:
        raise UserError(f"errors by component need at least 2 windows and a batch of 1, got {count} and {batch}")
    world.check_dataset(store)
    at = [h - 1 for h in pick_horizons(horizons, manifest.horizon)]
    parts: list[tuple[np.ndarray, ...]] = []
    for first in range(0, count, batch):
        here = slice(first, min(first + batch, count))
        frames, actions = read_windows(store, manifest, here.start, here.stop)
        made = generate(
            world, frames, actions, manifest.keys[here], rollout_config,
            seed=seed, context=manifest.context, batch=batch, tick=tick,
        )  # fmt: skip
        given, ends = frames[:, : manifest.context], (made.frames, persist(frames, manifest.context))
        films = (frames, *(np.concatenate([given, end], axis=1) for end in ends))
        latents = [world.encode(torch.from_numpy(f))[:, manifest.context :][:, at].cpu().numpy() for f in films]
        parts.append((*latents, made.finite[:, at]))
    x, y, floor, finite = (np.concatenate(each) for each in zip(*parts, strict=True))
    groups = grouped(x, world.tokenizer.ordered)
    episodes = manifest.episodes[:count]
    rows = []
    for i, t in enumerate(at):
        table = sums_of(x[:, i], y[:, i], floor[:, i], groups)
        table["error"][~finite[:, i]] = table["energy"][~finite[:, i]] = np.nan
        variance = table.pop("variance")
        for g in range(len(groups)):
            ratios = {n: ratio_bootstrap(sums[:, g], variance[:, g], episodes) for n, sums in table.items()}
            rows.append({"frame": t + 1, "group": g + 1, **ratios})
    power = x.var(axis=(0, 1), dtype=np.float64).mean(axis=0)
    return jsonable(
        {
            "n": {"windows": count, "episodes": len(set(episodes))},
            "noise_seed": seed,
            "not_finite_frames": int((~finite).sum()),
            "channels_ordered_by": "the tokenizer" if world.tokenizer.ordered else "variance",
            "channels": [len(g) for g in groups],
            "share_of_variance": [ratio(power[g].sum(), power.sum()) for g in groups],
            "rows": rows,
        }
    )


def grouped(latents: np.ndarray, ordered: bool) -> list[np.ndarray]:
    """Channels of latents (..., N, D) in GROUPS groups (fewer where D is less), the strongest first."""
    channels = np.arange(latents.shape[-1])
    if not ordered:
        flat = latents.reshape(-1, *latents.shape[-2:])
        channels = np.argsort(-flat.var(axis=0).sum(axis=0), kind="stable")
    return np.array_split(channels, min(GROUPS, len(channels)))


def sums_of(x: np.ndarray, y: np.ndarray, floor: np.ndarray, groups: Sequence[np.ndarray]) -> Table:
    """|y - x|^2, var y, |floor - x|^2 and var x of latents (W, N, D) by window and group: (W, G) each, W >= 2.

    A window's part of a variance is its squared distance from the mean of all, times W / (W - 1).
    """
    x, y, floor = (np.asarray(latents, np.float64) for latents in (x, y, floor))  # or a constant's variance is no 0
    unbiased = (len(x) / (len(x) - 1)) ** 0.5
    differences = {
        "error": y - x,
        "energy": unbiased * (y - y.mean(axis=0)),
        "floor_error": floor - x,
        "variance": unbiased * (x - x.mean(axis=0)),
    }
    return {
        name: np.stack([np.square(d[..., g]).sum(axis=(1, 2)) for g in groups], axis=1)
        for name, d in differences.items()
    }
