"""Rollouts of many windows: context frames and actions in, uint8 frames out, with noise keyed by window.

What is returned is exactly what is scored. Batches change nothing but the speed: noise belongs to the window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig, rollout
from ahriuwu_cli.world import World

Tick = Callable[[int], None]  # called with the number of frames that were just generated


@dataclass(frozen=True)
class Generated:
    """frames uint8 (W, L, H, W, 3); finite (W, L) is False where a latent was NaN or infinite: score that as NaN."""

    frames: np.ndarray
    finite: np.ndarray
    seconds: float  # of the rollout, decoding included


def generate(
    world: World,
    frames: np.ndarray,
    actions: np.ndarray,
    keys: Sequence[str],
    config: RolloutConfig,
    *,
    seed: int,
    context: int,
    batch: int = 32,
    tick: Tick | None = None,
) -> Generated:
    """Imagine frames context..T-1 of windows from their first `context` frames and their actions (W, T-1, A).

    frames: uint8 (W, >= context, H, W, 3), of which only the first `context` are looked at. keys: one a window; equal
    (seed, key) get equal noise. UserError or CheckpointError for settings that the world was not trained for.
    """
    world.check_generation(config)
    if not len(frames) == len(actions) == len(keys) or not 1 <= context <= min(frames.shape[1], actions.shape[1]):
        raise ValueError(f"frames {frames.shape}, actions {actions.shape}, {len(keys)} keys and context {context}")
    started = time.monotonic()
    parts = [
        _one_batch(
            world, frames[i : i + batch, :context], actions[i : i + batch], keys[i : i + batch], config, seed, tick
        )
        for i in range(0, len(frames), batch)
    ]
    shown, finite = (np.concatenate(part) for part in zip(*parts, strict=True))
    return Generated(shown, finite, time.monotonic() - started)


def _one_batch(world, prompt, actions, keys, config, seed, tick) -> tuple[np.ndarray, np.ndarray]:
    device, context = world.device, prompt.shape[1]
    latents = world.encode(torch.from_numpy(prompt))  # (B, P, N, D)
    labelled = torch.full((len(prompt),), actions.shape[2] > 0)
    incoming, known = incoming_actions(torch.from_numpy(actions), labelled)
    noise = KeyedNoise(seed, keys, tuple(latents.shape[2:]), device)
    imagined = []
    for z_hat in rollout(world.dynamics, latents, incoming.to(device), known.to(device), config, noise, world.k_max):
        imagined.append(z_hat)
        if tick:
            tick(len(prompt))
    z = torch.stack(imagined, dim=1)  # (B, L, N, D)
    finite = torch.isfinite(z).all(dim=3).all(dim=2)
    z = z.masked_fill(~finite[..., None, None], 0)  # must not leak into other frames of the decoder; scored as NaN
    shown = world.decode(torch.cat([latents, z], dim=1))[:, context:]  # a decoder may look back
    return shown.numpy(), finite.cpu().numpy()


def reconstruct(world: World, frames: np.ndarray, batch: int = 32) -> np.ndarray:
    """decode(encode(frames)), uint8 as given (W, T, H, W, 3): against the frames themselves this is the ceiling."""
    parts = [torch.from_numpy(frames[i : i + batch]) for i in range(0, len(frames), batch)]
    return np.concatenate([world.decode(world.encode(part)).numpy() for part in parts])


def persist(frames: np.ndarray, context: int) -> np.ndarray:
    """The floor: the last context frame, the real one, repeated to the end of the window: uint8 (W, L, H, W, 3)."""
    return np.repeat(frames[:, context - 1 : context], frames.shape[1] - context, axis=1)
