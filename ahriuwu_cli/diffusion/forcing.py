"""Diffusion forcing: draws tau and the step size d for every frame of every clip (Dreamer 4, eq. 4 and 6).

Every forcing is a function (batch, frames, k_max, tau_ctx, generator) -> (tau, d), both (B, T) float32, and is found
by name in FORCINGS. tau is 0 for clean and 1 for noise; `independent` never draws 0, so nothing divides by zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ahriuwu_cli.diffusion import tau as tau_

Forcing = Callable[[int, int, int, float, Generator | None], tuple[Tensor, Tensor]]


def independent(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Each frame its own d, uniform over {1, 1/2, ..., 1/k_max}, and its own tau, uniform on {d, 2d, ..., 1} (eq. 4).

    tau_ctx plays no part. Pure noise is drawn for (1 + 1/2 + ... + 1/k_max) / (log2 k_max + 1) of the frames.
    """
    sizes = torch.tensor(tau_.levels(k_max))
    d = sizes[torch.randint(len(sizes), (batch, frames), generator=generator)]
    return tau_.on_grid(torch.rand(batch, frames, generator=generator), d), d


def uniform(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Plain diffusion forcing (arXiv 2407.01392): each frame its own tau, uniform on the finest grid; d = 1/k_max.

    Kept for ablation: next to eq. 4 it hardly draws pure noise (1/k_max of the frames), and trains no shortcut.
    """
    d = torch.full((batch, frames), 1 / k_max)
    return tau_.on_grid(torch.rand(batch, frames, generator=generator), d), d


def horizon(
    batch: int,
    frames: int,
    k_max: int,
    tau_ctx: float = tau_.TAU_CTX,
    generator: Generator | None = None,
    tau_max: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The review's schedule: tau_ctx before a random h in 1..T-1, then a straight rise to tau_max; d = 1/k_max.

    Kept because the review calls it correct. It ties tau to the position: the first target frame always gets tau_ctx,
    and the pairs that a rollout asks for are hardly ever trained (`coverage` shows it). Needs frames >= 2.
    """
    if frames < 2:
        raise ValueError(f"horizon forcing needs at least 2 frames, got {frames}")
    h = torch.randint(1, frames, (batch, 1), generator=generator)
    position = torch.arange(frames)[None]
    rise = (position - h) / (frames - 1 - h).clamp(min=1)
    tau = torch.where(position < h, torch.tensor(tau_ctx), tau_.between(tau_ctx, tau_max, rise.clamp(min=0)))
    return tau, torch.full_like(tau, 1 / k_max)


def prefix(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`independent`, but half of the clips have their frames before a random h in 1..T-1 at exactly tau_ctx.

    A departure from the paper: small budgets see the pairs of a rollout (context at tau_ctx, the next frame noisy) far
    more often. d of those context frames is 1/k_max, the d by which a rollout commits a frame. Needs frames >= 2.
    """
    if frames < 2:
        raise ValueError(f"prefix forcing needs at least 2 frames, got {frames}")
    tau, d = independent(batch, frames, k_max, tau_ctx, generator)
    h = torch.randint(1, frames, (batch, 1), generator=generator)
    chosen = torch.rand(batch, 1, generator=generator) < 0.5
    context = chosen & (torch.arange(frames)[None] < h)
    return tau.masked_fill(context, tau_ctx), d.masked_fill(context, 1 / k_max)


def context(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`independent`, but each frame has, with chance 1/2, exactly tau_ctx and the d of a committed frame, 1/k_max.

    A departure from the paper, for small budgets: in a rollout every frame is noisy behind frames that can be seen. Of
    the draws of eq. 4 (k_max 64) 3.9 % have tau above .75 behind a frame below .2; of these 10.8 %.
    """
    tau, d = independent(batch, frames, k_max, tau_ctx, generator)
    committed = torch.rand(batch, frames, generator=generator) < 0.5
    return tau.masked_fill(committed, tau_ctx), d.masked_fill(committed, 1 / k_max)


def committed(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`independent`, for frames that look back at committed copies of those before them (BEHIND_COPIES).

    A departure from the paper, "complete teacher forcing" (arXiv 2501.12389) with noise in the context: every frame is
    trained as a rollout asks for it, noisy behind frames at tau_ctx, where of the draws of eq. 4 hardly any are. The
    copies are made by training/batches.py; a step costs about 1.6 times as much.
    """
    return independent(batch, frames, k_max, tau_ctx, generator)


def resampled(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`independent`, for frames that look back at copies which the model itself made (BEHIND_COPIES).

    A departure from the paper: Resampling Forcing (arXiv 2512.15702). As `committed`, but from a random frame on the
    copies are walked to tau_ctx by the model, each behind the copies before it: what a rollout stands behind. A step
    costs about 2.6 times as much.
    """
    return independent(batch, frames, k_max, tau_ctx, generator)


def true_copies(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> Tensor:
    """The level (B, T) that a copy is walked from, for `committed`: tau_ctx, where it ends as well."""
    return torch.full((batch, frames), tau_ctx)


def walked_copies(
    batch: int, frames: int, k_max: int, tau_ctx: float = tau_.TAU_CTX, generator: Generator | None = None
) -> Tensor:
    """The level (B, T) that a copy is walked from, for `resampled`: tau_ctx before a random h in 1..T-1, the prompt.

    From h on one level for the whole clip, uniform in k_max steps above tau_ctx: at 1 the past is a rollout, below it
    keeps so much of the true frames that their futures are still the true one. Needs frames >= 2.
    """
    if frames < 2:
        raise ValueError(f"resampled forcing needs at least 2 frames, got {frames}")
    h = torch.randint(1, frames, (batch, 1), generator=generator)
    above = tau_.on_grid(torch.rand(batch, 1, generator=generator), torch.full((batch, 1), 1 / k_max))
    return torch.where(torch.arange(frames)[None] < h, torch.tensor(tau_ctx), tau_.between(tau_ctx, 1.0, above))


def finest(d: Tensor, k_max: int) -> Tensor:
    """The plain flow's step size 1/k_max for every frame of d (B, T): what a run without shortcut training uses."""
    return torch.full_like(d, 1 / k_max)


def coverage(tau: Tensor, bins: int = 10) -> Tensor:
    """Share of draws (T, bins) by position and tau bin, from drawn tau (B, T); rows sum to 1, bin i is (i, i+1]/bins"""
    frames = tau.size(1)
    rows = torch.arange(frames, device=tau.device) * bins
    counts = torch.bincount((tau_.bin_index(tau, bins) + rows).flatten(), minlength=frames * bins)
    return counts.view(frames, bins).float() / len(tau)


FORCINGS: dict[str, Forcing] = {
    "independent": independent,
    "uniform": uniform,
    "horizon": horizon,
    "prefix": prefix,
    "context": context,
    "committed": committed,
    "resampled": resampled,
}
BEHIND_COPIES = {"committed": true_copies, "resampled": walked_copies}  # frames see copies at tau_ctx of those before
