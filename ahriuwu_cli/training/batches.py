"""What one training step sees: clips, noise, tau and d, all a function of (seed, step, clip) alone.

A resumed run therefore draws exactly what the unbroken run would have drawn; no state of a generator is ever saved. The
clips of a step are laid out as [bootstrap | flow | single images]: the first may hold d > d_min, the last are split up.
They are dealt like cards to all micro-batches of all processes, so every share has that layout, and the step is the
same at any number of them. A process draws the levels of all clips, which is cheap, and reads and noises its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.latents import LatentPack
from ahriuwu_cli.diffusion.forcing import BEHIND_COPIES, FORCINGS, finest
from ahriuwu_cli.diffusion.tau import add_noise, levels
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.models.dynamics import Past, incoming_actions


@dataclass(frozen=True)
class Kinds:
    """Which kinds of clips some process sees in a micro-batch: what a sharded model must run on all of them."""

    bootstrap: bool
    video: bool
    images: bool


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
    kinds: Kinds
    past: Past | None = None  # where the copies that frames look back at, instead of one another, are walked from


def key(*parts: object) -> int:
    """A 63-bit seed from any parts, so that neighbouring steps and clips share nothing."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw_batch(
    pack: LatentPack,
    config: TrainConfig,
    k_max: int,
    step: int,
    micro: int = 0,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Batch:
    """The micro-batch `micro` of process `rank` of `world`: every (world * accumulate)-th clip of this (seed, step)."""
    count, frames = shape_of(config, step)
    seed, shares = key(config.seed, step), world * config.accumulate
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    drawn = pack.draw(count, frames, rng)
    tau, d = FORCINGS[config.forcing](count, frames, k_max, config.tau_ctx, generator)
    walked_from = BEHIND_COPIES.get(config.forcing)
    tau_past = walked_from(count, frames, k_max, config.tau_ctx, generator) if walked_from else None
    rows = share_of(config.shortcut_share, count, step, config.seed)
    both = share_of(config.shortcut_share + config.single_image_share, count, step, config.seed)
    images = min(both, count) - rows  # by one draw, so that each share holds where both are rounded
    d[rows:] = finest(d[rows:], k_max)  # a flow row keeps the tau of its draw (28 % pure noise), labelled d_min

    # from here on this process's own clips
    dealt = [range(micro * world + r, count, shares) for r in range(world)]
    mine = dealt[rank]
    windows = [drawn[clip] for clip in mine]
    z_clean, actions, labelled = pack.read(windows, frames)

    def noise_of(name: str) -> Tensor:
        each = (generator.manual_seed(key(seed, name, clip)) for clip in mine)
        return torch.stack([torch.randn(z_clean.shape[1:], generator=g) for g in each])

    noise, past = noise_of("noise"), None
    if tau_past is not None:
        tau_past = tau_past[mine.start :: shares]
        z_past = add_noise(z_clean, noise_of("past"), tau_past)
        past = Past(*(t.to(device, non_blocking=True) for t in (z_past, tau_past, finest(tau_past, k_max))))
    incoming, known = incoming_actions(actions, labelled)
    image_rows = sum(clip >= count - images for clip in mine)
    if image_rows:
        known[len(mine) - image_rows :] = False
    tensors = (z_clean, noise, tau[mine.start :: shares], d[mine.start :: shares], incoming, known)
    clips = [clip for hand in dealt for clip in hand]
    kinds = Kinds(min(clips) < rows, min(clips) < count - images, max(clips) >= count - images)
    return Batch(
        *(t.to(device, non_blocking=True) for t in tensors),
        bootstrap_rows=sum(clip < rows for clip in mine),
        image_rows=image_rows,
        windows=tuple(pack.name(w) for w in windows),
        kinds=kinds,
        past=past,
    )


def shape_of(config: TrainConfig, step: int) -> tuple[int, int]:
    """(clips, frames) of a whole step: many short clips, or now and then fewer long ones."""
    if config.long_every and step % config.long_every == config.long_every - 1:
        return _long_clips(config), config.long_frames
    return config.batch, config.frames


def trained_sizes(config: TrainConfig, k_max: int, steps: int) -> tuple[float, ...]:
    """Step sizes d that so many steps of a run have trained: all of them once a clip was bootstrapped, else 1/k_max."""
    share = config.shortcut_share
    draws = (share_of(share, shape_of(config, step)[0], step, config.seed) for step in range(steps if share else 0))
    return tuple(levels(k_max)) if any(draws) else (1 / k_max,)


def check_shares(config: TrainConfig, world: int) -> None:
    """UserError when the clips of a step cannot be dealt out evenly to `world` processes times `accumulate`."""
    shares = world * config.accumulate
    among = f"{world} process{'es' if world > 1 else ''} x --accumulate {config.accumulate} = {shares} shares"
    if config.batch % shares:
        raise UserError(
            f"--batch {config.batch} does not divide by {among}: it is the batch of all processes, choose a multiple"
        )
    if config.long_every and _long_clips(config) % shares:
        raise UserError(
            f"a step has {_long_clips(config)} clips of --long-frames {config.long_frames}, which do not divide by "
            f"{among}: choose another --long-frames or --batch"
        )


def _long_clips(config: TrainConfig) -> int:
    return config.batch * config.frames // config.long_frames


def share_of(share: float, count: int, step: int, seed: int) -> int:
    """share * count clips, rounded up or down by a keyed draw so that the share holds on average, however small."""
    wanted = share * count
    return int(wanted) + int(np.random.default_rng(key("share", seed, step)).random() < wanted - int(wanted))
