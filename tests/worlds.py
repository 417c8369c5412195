"""A dataset of moving pictures and worlds whose scores are known beforehand: oracles, persistence, noise, NaN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training.checkpoint import action_slots
from ahriuwu_cli.world import World

SPACE = ActionSpace((ActionComponent("keys", "binary", 2, ("LEFT", "RIGHT")),))
NO_ACTIONS = ActionSpace()
SIDE = 16


def moving_pictures(
    path: Path, episodes: int = 12, frames: int = 30, space: ActionSpace = SPACE, seed: int = 0, split=None
):
    """A smooth picture that turns left or right as the action says; many val and test episodes, or all of one split.
    Returns the store."""
    rng = np.random.default_rng(seed)
    ramp = np.arange(SIDE) / SIDE * 2 * np.pi
    with EpisodeWriter(
        path, height=SIDE, width=SIDE, fps=10.0, action_space=space, seed=0, fractions=(0.34, 0.33, 0.33)
    ) as writer:
        for _ in range(episodes):
            actions = space.random(frames - 1, (2, 5), rng) if space.width else None
            turn = np.ones(frames - 1) if actions is None else actions[:, 1] - actions[:, 0]
            place = rng.uniform(0, 2 * np.pi) + 0.5 * np.concatenate([[0], np.cumsum(turn)])
            phase = rng.uniform(0, 2 * np.pi, (1, 1, 1, 3))
            wave = np.cos(ramp[None, None, :, None] + place[:, None, None, None] + phase)
            tilt = np.cos(ramp[None, :, None, None] + phase)
            clip = 127 + 80 * wave + 25 * tilt + rng.integers(-10, 11, (frames, SIDE, SIDE, 3))
            writer.add(clip.clip(0, 255).astype(np.uint8), actions, split=split)
    return EpisodeStore.open(path)


def fitted_tokenizer(store: EpisodeStore, channels: int = 12) -> LinearTokenizer:
    tokenizer = LinearTokenizer(store.height, store.width, 8, 8, channels)
    tokenizer.fit(torch.from_numpy(store.frames(e.id)) for e in store.episodes())
    return tokenizer.eval()


def tiny_world(store: EpisodeStore, seed: int = 0) -> World:
    """Untrained, but loud enough that noise, actions and tau_ctx all show."""
    tokenizer = fitted_tokenizer(store)
    config = DynamicsConfig(
        tokens=tokenizer.tokens, latent_dim=tokenizer.latent_dim, width=16, depth=2, heads=2, kv_heads=2, mlp_hidden=32,
        time_every=2, window=6, k_max=8, action_space=action_slots(store.action_space),
    )  # fmt: skip
    torch.manual_seed(seed)
    dynamics = Dynamics(config).eval().requires_grad_(False)
    dynamics.head.weight.mul_(5)
    return _world(dynamics, tokenizer, store.action_space)


Answer = Callable[["Scene"], Tensor]  # (B, F, N, D)


class Scene:
    """What a puppet is asked about: the true latents of the frames (B, F, N, D) and what else it may look at."""

    def __init__(self, puppet, cache, first, z_tau, actions) -> None:
        self.z_tau, self.actions, self.positions = z_tau, actions, range(first, first + z_tau.shape[1])
        self._latents, self._rows = puppet.latents, cache.rows
        self.true_actions = torch.stack(
            [torch.stack([puppet.incoming[e][s + p] for p in self.positions]) for e, s in cache.rows]
        )

    def truth(self, positions) -> Tensor:
        return torch.stack([torch.stack([self._latents[e][s + p] for p in positions]) for e, s in self._rows])


class Puppet:
    """Stands in for Dynamics: knows every episode, finds its window by the first context frame (so tau_ctx must be 0
    and context at least 2), and answers what `answer` makes of the truth."""

    def __init__(self, store: EpisodeStore, tokenizer: LinearTokenizer, answer: Answer) -> None:
        self.answer, self.config = answer, SimpleNamespace(k_max=8)
        self.embed = SimpleNamespace(weight=torch.zeros(1))
        self.latents = {e.id: tokenizer.encode(torch.from_numpy(store.frames(e.id))[None])[0] for e in store.episodes()}
        width = store.action_space.width
        self.incoming = {
            e.id: torch.cat([torch.zeros(1, width), torch.from_numpy(store.actions(e.id))])
            if width
            else torch.zeros(e.frames, 0)
            for e in store.episodes()
        }
        self._places = [(e, t) for e, z in self.latents.items() for t in range(len(z))]
        self._all = torch.cat(list(self.latents.values())).flatten(1)

    def new_cache(self, batch: int):
        return SimpleNamespace(window=10**6, frames=0, rows=None)

    def extend(self, z_tau, tau, d, actions, known, cache, keep: int, unread: int = 0) -> Tensor:
        if cache.rows is None:
            distance = torch.cdist(z_tau[:, 0].flatten(1), self._all, compute_mode="donot_use_mm_for_euclid_dist")
            assert float(distance.min(dim=1).values.max()) < 1e-3
            cache.rows = [self._places[i] for i in distance.argmin(dim=1).tolist()]
        z_hat = self.answer(Scene(self, cache, cache.frames, z_tau, actions))
        cache.frames += keep
        return z_hat[:, unread:]


def puppet_world(store: EpisodeStore, answer: Answer) -> World:
    tokenizer = fitted_tokenizer(store)
    return _world(Puppet(store, tokenizer, answer), tokenizer, store.action_space)


def oracle(scene: Scene) -> Tensor:
    return scene.truth(scene.positions)


def persistence(context: int) -> Answer:
    return lambda scene: scene.truth([min(p, context - 1) for p in scene.positions])


def noise(scene: Scene) -> Tensor:
    return scene.z_tau


def obedient(scene: Scene) -> Tensor:
    """The truth where the action is the true one, else the truth of five frames earlier."""
    wrong = (scene.actions != scene.true_actions).any(-1)[..., None, None]
    return torch.where(wrong, scene.truth([max(0, p - 5) for p in scene.positions]), scene.truth(scene.positions))


def breaks_at(position: int) -> Answer:
    """The truth, but NaN in the batch's first row from one frame on."""

    def answer(scene: Scene) -> Tensor:
        z = scene.truth(scene.positions).clone()
        z[0, torch.tensor(scene.positions) >= position] = torch.nan
        return z

    return answer


def _world(dynamics, tokenizer, space: ActionSpace) -> World:
    levels = (1.0, 0.5, 0.25, 0.125)
    generation = RolloutConfig(steps=2, tau_ctx=0.0)
    return World(dynamics, tokenizer, space, 10.0, 1, levels, "independent", False, generation)
