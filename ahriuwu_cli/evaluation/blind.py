"""Blind copies: the same world with one of its senses taken away, as a control that every metric must tell from it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ahriuwu_cli.rollout import CachedDenoiser
from ahriuwu_cli.world import World

SENSES = ("tau", "d", "action", "context")


def blind_copy(world: World, sense: str) -> World:
    """The world told always tau = 1/2, always d_min, always the action of zeros, or never any frame before."""
    if sense not in SENSES:
        raise ValueError(f"unknown sense {sense!r}, choose one of {', '.join(SENSES)}")
    return replace(world, dynamics=BlindDynamics(world.dynamics, sense))


class BlindDynamics:
    """Stands in for a `Dynamics`, and hands it on all that it is given but for one sense."""

    def __init__(self, seeing: CachedDenoiser, sense: str) -> None:
        self.seeing, self.sense = seeing, sense
        self.config, self.embed = seeing.config, seeing.embed

    def __call__(self, z_tau: Tensor, tau: Tensor, d: Tensor, actions: Tensor, known: Tensor) -> Tensor:
        if self.sense == "context":  # every frame a clip of its own
            alone = (x.flatten(0, 1)[:, None] for x in (z_tau, tau, d, actions, known))
            return self.seeing(*alone)[:, 0].unflatten(0, z_tau.shape[:2])
        return self.seeing(z_tau, *self._told(tau, d, actions), known)

    def new_cache(self, batch: int):
        return self.seeing.new_cache(batch)

    def extend(self, z_tau, tau, d, actions, known, cache, keep: int, unread: int = 0) -> Tensor:
        if self.sense == "context":
            cache.frames += keep
            return self(z_tau, tau, d, actions, known)[:, unread:]
        return self.seeing.extend(z_tau, *self._told(tau, d, actions), known, cache, keep, unread)

    def _told(self, tau: Tensor, d: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.sense == "tau":
            tau = torch.full_like(tau, 0.5)
        elif self.sense == "d":
            d = torch.full_like(d, 1 / self.config.k_max)
        elif self.sense == "action":
            actions = torch.zeros_like(actions)
        return tau, d, actions


class CleanContextTold(BlindDynamics):
    """Stands in for a `Dynamics`, and tells it of every frame at tau 0 that it is at another level.

    Such labels on clean context frames were a bug of other systems; `RolloutConfig.ctx_label` tells the opposite lie.
    """

    def __init__(self, seeing: CachedDenoiser, told: float) -> None:
        super().__init__(seeing, "label")
        self.told = told

    def _told(self, tau: Tensor, d: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.where(tau == 0, self.told, tau), d, actions
