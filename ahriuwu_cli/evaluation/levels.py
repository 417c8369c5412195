"""Denoising error by noise level and position, beside what training drew there and how it was weighted.

Free-running scores say that a world is bad; this says where. An inverted ramp shows as error that falls the wrong way,
a starved schedule as cells that a rollout asks for and training hardly ever drew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.forcing import FORCINGS, coverage
from ahriuwu_cli.diffusion.objective import RAMPS, ramp_weight
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.errors import CheckpointError, DataError, UserError, did_you_mean
from ahriuwu_cli.evaluation.generate import Tick
from ahriuwu_cli.evaluation.measure import batches
from ahriuwu_cli.evaluation.prepare import EvaluationConfig, prepare
from ahriuwu_cli.evaluation.protocol import WindowManifest, paired_bootstrap
from ahriuwu_cli.evaluation.summary import jsonable
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig
from ahriuwu_cli.world import World

STARVED = 0.01  # share of a position's draws below which a cell counts as hardly ever trained; even shares are 0.1
DRAWS = 4096  # clips drawn from the forcing to measure its coverage
AT_ONCE = 1 << 20  # frames of them that are held at a time


def error_by_level(
    world: World,
    store: EpisodeStore,
    manifest: WindowManifest,
    *,
    bins: int = 10,
    windows: int | None = None,
    seed: int = 0,
    batch: int = 32,
    starved_below: float = STARVED,
    tick: Tick | None = None,
) -> dict[str, Any]:
    """Error of z_hat by (position in the window, tau bin), with ramp, coverage and the best linear denoiser beside it.

    Teacher-forced: the frame at a position is at a level, all frames before it are the true ones at tau_ctx (of the
    world's rollouts), labelled so, d_min told. Bin i is (i, i + 1] / bins and asked at its upper end, so the last bin
    is pure noise and, at tau_ctx = 0.1 in ten bins, the first is what context frames have. Noise is keyed as in a
    rollout and the same for all bins. windows: only so many, from the manifest's beginning.

    - `error` (positions, bins): mean over windows of |z_hat - z_clean|^2, over the variance of the clean latents (each
      value about its own mean over all windows and frames). 1 is the mean latent's score, 0 perfect.
    - `by_bin`: the mean over positions 1.. with a 95 % interval over episodes; `alone`: position 0, which has no
      context; `linear`: the best linear denoiser of each latent value alone, in closed form from the variances of these
      windows. Below `linear` the model uses more than the value itself, below `alone` it uses context.
    - `ramp`: the loss weight of the training run at each level. `coverage` (positions, bins): share of a position's
      training draws in each bin, by the checkpoint's own forcing; a position that training never reached has the row of
      its last. `training`: which facts of the run the checkpoint states, and what was assumed where it does not.
    - `starved`: cells that some rollout asks for (from tau_ctx up; position 0 is always given) and whose share is below
      `starved_below`; `own_walk`: whether this world's own sampler and K do. Where k_max is below `bins`, a bin may
      hold no level of the grid that training draws from, and is starved for that reason.

    A prediction that is not finite is counted and makes its cell null.
    """
    for name, value in (("bins", bins), ("windows", 1 if windows is None else windows)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    prepare(world, store, EvaluationConfig(seed=seed, batch=batch), world.generation, manifest)
    manifest = replace(manifest, windows=manifest.windows[:windows])
    edges = torch.arange(1, bins + 1) / bins
    errors, power = _errors(world, store, manifest, edges, seed, batch, tick)  # (W, T, bins), (N, D)
    if not power.mean() > 0:
        raise DataError(f"the clean latents of these windows of {store.path} do not vary: choose other windows")
    relative = errors / float(power.mean())
    training = _training(world)
    share = _coverage(world.forcing, world.k_max, training, manifest.length, bins)
    shown = relative[:, 1:].mean(axis=1)
    ramp = training.values["ramp"]
    return jsonable(
        {
            "kind": "levels",
            "tau": tau_.LABEL,
            "tau_ctx": world.generation.tau_ctx,
            "n": {"windows": len(manifest.windows), "episodes": len(set(manifest.episodes)), "noise_seeds": 1},
            "seed": seed,
            "levels": edges.tolist(),
            "positions": manifest.length,
            "trained_positions": training.positions,
            "error": relative.mean(axis=0).tolist(),
            "by_bin": [paired_bootstrap(shown[:, i], manifest.episodes) for i in range(bins)],
            "alone": relative[:, 0].mean(axis=0).tolist(),
            "linear": [_linear_error(level, power) / float(power.mean()) for level in edges],
            "not_finite": int((~np.isfinite(errors)).sum()),
            "ramp": None if ramp is None else ramp_weight(edges, ramp).tolist(),
            "forcing": world.forcing,
            "coverage": share.tolist(),
            "starved_below": starved_below,
            "starved": _starved(world, share, edges, starved_below),
            "training": asdict(training),
        }
    )


def asked_levels(settings: RolloutConfig, k_max: int) -> tuple[list[float], float]:
    """The levels at which one frame's passes are asked, in order, and where the walk ends: walked once on nothing."""
    levels, nothing = [], torch.zeros(1, 1, 1, 1)

    def denoise(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        levels.append(float(tau.flatten()[0]))
        return z

    _, _, end = SAMPLERS[settings.sampler](
        denoise, nothing, settings.steps, tau_ctx=settings.tau_ctx, k_max=k_max, generator=lambda i: nothing
    )
    return levels, round(float(end), 9)


@torch.no_grad()
def _errors(world, store, manifest, edges, seed, batch, tick) -> tuple[np.ndarray, Tensor]:
    """Squared error of z_hat (W, T, bins), averaged over a frame's values, and the variance of each value (N, D)."""
    parts, count, total, squares = [], 0, 0.0, 0.0
    for here, frames, actions in batches(store, manifest, batch):
        z_clean = world.encode(torch.from_numpy(frames))  # (B, T, N, D)
        parts.append(_errors_of(world, z_clean, actions, manifest.keys[here], edges, seed, tick))
        wide = z_clean.double().flatten(0, 1)
        count, total, squares = count + len(wide), total + wide.sum(0), squares + wide.square().sum(0)
    return np.concatenate(parts), (squares / count - (total / count).square()).clamp(min=0).cpu()


def _errors_of(world, z_clean: Tensor, actions: np.ndarray, keys, edges: Tensor, seed, tick) -> np.ndarray:
    """(B, T, bins): every frame is asked at every level, then committed at tau_ctx for those after it."""
    labelled = torch.full((len(z_clean),), actions.shape[2] > 0)
    incoming, known = (x.to(world.device) for x in incoming_actions(torch.from_numpy(actions), labelled))
    noise = KeyedNoise(seed, keys, tuple(z_clean.shape[2:]), world.device)
    cache, rows = world.dynamics.new_cache(len(z_clean)), []

    def ask(p: int, purpose: str, level: float, keep: int) -> Tensor:
        here = slice(p, p + 1)
        tau = torch.full((len(z_clean), 1), level, device=world.device)
        z_tau = tau_.add_noise(z_clean[:, here], noise(p, purpose)[:, None], tau)
        d = torch.full_like(tau, 1 / world.k_max)
        return world.dynamics.extend(z_tau, tau, d, incoming[:, here], known[:, here], cache, keep=keep)

    for p in range(z_clean.shape[1]):
        asked = torch.stack([ask(p, "start", level, keep=0) for level in edges.tolist()], dim=1)  # (B, bins, 1, N, D)
        error = asked[:, :, 0].double() - z_clean[:, p : p + 1].double()
        rows.append(error.square().flatten(2).mean(2).cpu().numpy())
        ask(p, "prompt", world.generation.tau_ctx, keep=1)
        if tick:
            tick(len(z_clean))
    return np.stack(rows, axis=1)


def _linear_error(level: Tensor, power: Tensor) -> float:
    """Expected squared error of gain * z_tau on values of this variance (about their mean), averaged over values."""
    kept = tau_.gaussian_gain(level.double(), power.sqrt()) * tau_.signal(level.double())
    return float((power * (1 - kept)).mean())


@dataclass(frozen=True)
class _Training:
    """What is known of the run that trained a checkpoint. values: as used here; stated: by the checkpoint; the rest of
    `values` is assumed, and a ramp that nobody states is None."""

    values: dict[str, Any]
    stated: tuple[str, ...]
    assumed: tuple[str, ...]

    @property
    def positions(self) -> int:
        """Frames of the longest training clip."""
        return max(self.values["frames"], self.values["long_frames"] if self.values["long_every"] else 0)


def _training(world: World) -> _Training:
    """The run's settings from the checkpoint's facts, with announced assumptions for those that are not there."""
    facts = world.facts.get("train")
    facts = facts if isinstance(facts, dict) else {}
    assumed = {
        "frames": getattr(world.dynamics.config, "window", 2),
        "long_frames": 0,
        "long_every": 0,
        "single_image_share": 0.0,
        "tau_ctx": world.generation.tau_ctx,
        "ramp": None,
    }
    stated = {name: facts[name] for name in assumed if name in facts}
    if stated.get("ramp", RAMPS[0]) not in RAMPS:
        raise CheckpointError(f"the checkpoint states an unknown ramp {stated['ramp']!r}: choose another checkpoint")
    return _Training(assumed | stated, tuple(stated), tuple(n for n in assumed if n not in stated))


def _coverage(forcing: str, k_max: int, training: _Training, positions: int, bins: int) -> Tensor:
    """Share of a position's training draws in each tau bin, (positions, bins): short and long clips, single images."""
    if forcing not in FORCINGS:
        raise CheckpointError(f"unknown forcing {forcing!r}: {did_you_mean(forcing, tuple(FORCINGS))}")
    v = training.values
    clips = {v["frames"]: 1.0}  # frames of a clip -> how many such clips, relatively
    if v["long_every"]:
        clips = {v["frames"]: v["long_every"] - 1.0}
        clips[v["long_frames"]] = clips.get(v["long_frames"], 0.0) + v["frames"] / v["long_frames"]
    counts = torch.zeros(training.positions, bins)
    for frames, weight in clips.items():
        drawn = weight * _drawn(forcing, frames, k_max, v["tau_ctx"], bins)
        counts[:frames] += drawn * (1 - v["single_image_share"])
        counts[0] += drawn.sum(0) * v["single_image_share"]  # single images have no past: all are at position 0
    rows = counts / counts.sum(1, keepdim=True).clamp(min=1e-12)
    return rows[torch.arange(positions).clamp(max=len(rows) - 1)]


def _drawn(forcing: str, frames: int, k_max: int, tau_ctx: float, bins: int) -> Tensor:
    """Coverage (frames, bins) by DRAWS clips, so many at a time that the longest ones take no more memory."""
    generator, shares, most = torch.Generator().manual_seed(0), torch.zeros(frames, bins), max(1, AT_ONCE // frames)
    for first in range(0, DRAWS, most):
        clips = min(most, DRAWS - first)
        tau, _ = FORCINGS[forcing](clips, frames, k_max, tau_ctx, generator)
        shares += coverage(tau, bins) * (clips / DRAWS)
    return shares


def _starved(world: World, share: Tensor, edges: Tensor, below: float) -> list[dict[str, Any]]:
    """Cells from tau_ctx up, positions 1 on, that training drew with a share under `below`."""
    bins = len(edges)
    lowest = int(tau_.bin_index(torch.tensor(world.generation.tau_ctx), bins))
    asked, end = asked_levels(world.generation, world.k_max)
    own = {int(tau_.bin_index(torch.tensor(level), bins)) for level in (*asked, end)}
    return [
        {"position": p, "bin": i, "level": float(edges[i]), "share": float(share[p, i]), "own_walk": i in own}
        for p in range(1, len(share))
        for i in range(lowest, bins)
        if share[p, i] < below
    ]
