"""What one training step sees: clips, noise, tau and d, all a function of (seed, rank, step, micro-batch) alone.

A resumed run therefore draws exactly what the unbroken run would have drawn; no state of a generator is ever saved.
Clips are laid out as [bootstrap | flow | single images]: the first rows may hold d > d_min, the last are split up.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.latents import LatentPack
from ahriuwu_cli.diffusion.forcing import FORCINGS, finest
from ahriuwu_cli.models.dynamics import incoming_actions


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Latents and noise (B, T, N, D); tau, d, known (B, T); actions incoming (B, T, A)."""

    z_clean: Tensor
    noise: Tensor
    tau: Tensor
    d: Tensor
    actions: Tensor
    known: Tensor
    bootstrap_rows: int
    image_rows: int
    windows: tuple[str, ...]


def key(*parts: object) -> int:
    """A 63-bit seed from any parts, so that neighbouring steps and ranks share nothing."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_batch(
    pack: LatentPack, config: TrainConfig, k_max: int, step: int, micro: int = 0, rank: int = 0, device: str = "cpu"
) -> Batch:
    """The micro-batch of this (seed, rank, step, micro)."""
    count, frames = shape_of(config, step)
    seed = key(config.seed, rank, step, micro)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    windows = pack.draw(count, frames, rng)
    z_clean, actions, labelled = pack.read(windows, frames)
    incoming, known = incoming_actions(actions, labelled)
    tau, d = FORCINGS[config.forcing](count, frames, k_max, config.tau_ctx, generator)
    rows = share_of(config.bootstrap_share, count, step, config.seed)
    d[rows:] = finest(d[rows:], k_max)  # a flow row keeps the tau of its draw (28 % pure noise), labelled d_min
    images = min(share_of(config.single_image_share, count, step, config.seed + 1), count - rows)
    if images:
        known[count - images :] = False
    noise = torch.randn(z_clean.shape, generator=generator)
    tensors = (t.to(device, non_blocking=True) for t in (z_clean, noise, tau, d, incoming, known))
    return Batch(*tensors, rows, images, tuple(pack.name(w) for w in windows))


def shape_of(config: TrainConfig, step: int) -> tuple[int, int]:
    """(clips, frames) of a micro-batch at this step: many short clips, or now and then fewer long ones."""
    clips = config.batch // config.accumulate
    if config.long_every and step % config.long_every == config.long_every - 1:
        return max(1, clips * config.frames // config.long_frames), config.long_frames
    return clips, config.frames


def share_of(share: float, count: int, step: int, seed: int) -> int:
    """share * count clips, rounded up or down by a keyed draw so that the share holds on average, however small."""
    wanted = share * count
    return int(wanted) + int(np.random.default_rng(key("share", seed, step)).random() < wanted - int(wanted))
