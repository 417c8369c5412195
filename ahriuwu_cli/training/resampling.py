"""Pasts that a model made itself: copies of frames walked to tau_ctx one after another, each behind those before it.

Under teacher forcing a frame is trained behind true frames, in a rollout it stands behind generated ones, and small
errors grow ("exposure bias"). Resampling Forcing (arXiv 2512.15702) degrades the past by the model that is trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.models.dynamics import Dynamics, Past

STEPS = 2  # Euler steps of a copy


@torch.no_grad()
def resampled(model: Dynamics, start: Past, actions: Tensor, known: Tensor, tau_ctx: float, steps: int = STEPS) -> Past:
    """The copies of `start` at tau_ctx: each walked there by the model from its own level, behind the ones before it.

    start: z (B, T, N, D) at levels tau (B, T) of at least tau_ctx, and the d that the model is told. A copy that stands
    at tau_ctx stays as it is; so does the last one, which no frame looks back at, and one that starts higher is left
    where a rollout leaves a frame: at tau_ctx with its implied noise, as of `samplers.euler_walk`. No gradient.
    """
    cache, frames = model.new_cache(len(start.z)), start.z.shape[1]
    ends = [start.z[:, :1]]
    end = torch.full_like(start.tau[:, :1], tau_ctx)
    for t in range(1, frames - 1):
        here = slice(t, t + 1)
        first = z = start.z[:, here]
        begin, d, given = start.tau[:, here], start.d[:, here], (actions[:, here], known[:, here])
        tau, moves = begin, tau_.expand(begin > end, z)
        for i in range(steps):
            if i == 0:  # the copy before is committed with the first pass
                taus, sizes = torch.cat([end, tau], dim=1), start.d[:, t - 1 : t + 1]
                both = (actions[:, t - 1 : t + 1], known[:, t - 1 : t + 1])
                z_hat = model.extend(torch.cat([ends[-1], z], dim=1), taus, sizes, *both, cache, keep=1, unread=1)
            else:
                z_hat = model.extend(z, tau, d, *given, cache, keep=0)
            lower = tau_.between(begin, end, (i + 1) / steps)
            z, tau = tau_.step(z, z_hat, tau, tau_.lower(tau, lower))
        ends.append(torch.where(moves, z, first))
    ends.append(start.z[:, len(ends) :])
    return Past(torch.cat(ends, dim=1), end.expand_as(start.tau), start.d)
