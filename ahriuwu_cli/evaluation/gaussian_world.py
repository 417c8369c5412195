"""A world whose every answer is known in closed form: a coloured random picture that pans as the action says.

Latents are pairs that turn with the pan, forget a little and get fresh noise, so all that any denoiser could know of
the next frame is a Gaussian, which a Kalman filter (Kalman 1960) follows exactly. From it come the exact denoiser and
the exact shortcut for every tau, d, action and context: a perfect model, not an oracle that peeks. As in `oracles`, the
formulas are written in the paper's direction (signal 0 = noise, 1 = clean), and share nothing with `diffusion`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation.oracles import paper_level
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

SIDE = 16  # pixels
WAVES = (1, 2, 3, 5)  # periods across the picture; a pan by one pixel turns wave k by 2 pi k / SIDE
KEPT = 0.96  # share of a latent that lives on in the next frame; the rest of its unit variance is fresh noise
SPREAD = 0.11  # standard deviation of a pixel, on [0, 1]
GRAIN = 2  # levels of pixel noise that no latent holds, so that the tokenizer has a ceiling
SPACE = ActionSpace((ActionComponent("pan", "binary", 2, ("LEFT", "RIGHT")),))
K_MAX = 64


def record(path: Path, episodes: int = 72, frames: int = 72, seed: int = 0) -> EpisodeStore:
    """Write episodes of this world, a third of them to each split, and open the dataset."""
    rng = np.random.default_rng(seed)
    tokenizer, turn = exact_tokenizer(), _turns()
    with EpisodeWriter(
        path, height=SIDE, width=SIDE, fps=10.0, action_space=SPACE, seed=seed, fractions=(0.34, 0.33, 0.33)
    ) as writer:
        for _ in range(episodes):
            actions = SPACE.random(frames - 1, (2, 8), rng)
            z = [torch.from_numpy(rng.standard_normal(tokenizer.latent_dim))]
            for action in torch.from_numpy(actions).double():
                fresh = torch.from_numpy(rng.standard_normal(tokenizer.latent_dim))
                z.append(KEPT * _pan(z[-1], action, turn) + math.sqrt(1 - KEPT**2) * fresh)
            clean = tokenizer.decode(torch.stack(z)[None, :, None].float())[0].numpy() * 255
            grain = rng.integers(-GRAIN, GRAIN + 1, clean.shape)
            writer.add((clean + grain).round().clip(0, 255).astype(np.uint8), actions)
    return EpisodeStore.open(path)


def exact_world(tau_ctx: float = 0.0) -> World:
    """The world with the perfect model: 16 x 16 frames, one token of 18 channels, K = 4 by the shortcut sampler.

    tau_ctx is 0, or the shortened last step of the shortcut sampler would commit states that are a little too wide.
    """
    levels = tuple(2.0**-i for i in range(K_MAX.bit_length()))
    generation = RolloutConfig(tau_ctx=tau_ctx)
    return World(ExactDynamics(), exact_tokenizer(), SPACE, 10.0, 1, levels, "independent", False, generation)


def exact_tokenizer() -> LinearTokenizer:
    """Waves across, flat or one period down, white or blue-red, of spread 1 / k, and two even colours that do not pan.

    Orthonormal pictures, scaled so that every latent is N(0, 1).
    """
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    white, blue_red = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, -1.0])
    pictures, spreads = [], []
    for i, k in enumerate(WAVES):
        for down in (0, 1):
            for wave in (torch.cos, torch.sin):
                picture = wave(2 * math.pi * k * x / SIDE) * torch.cos(2 * math.pi * down * y / SIDE)
                pictures.append(picture[..., None] * (white, blue_red)[(i + down) % 2])
                spreads.append(1 / k)
    pictures += [torch.ones(SIDE, SIDE, 1) * colour for colour in (white, blue_red)]
    scale = torch.tensor([*spreads, min(spreads), min(spreads)])
    columns = torch.stack([picture.flatten() / picture.norm() for picture in pictures], dim=1)
    tokenizer = LinearTokenizer(SIDE, SIDE, SIDE, SIDE, columns.shape[1])
    tokenizer.mean.fill_(0.5)
    tokenizer.components.copy_(columns)
    tokenizer.scale.copy_(scale * SPREAD * (SIDE * SIDE * 3 / scale.square().sum()).sqrt())
    return tokenizer.eval()


@dataclass
class Belief:
    """What the frames so far say of the last one: mean (B, N, D) and variance (B, 1, 1); before the first, N(0, 1)."""

    window: int
    frames: int = 0
    mean: Tensor | None = None
    variance: Tensor | None = None


class ExactDynamics:
    """Stands in for `models.dynamics.Dynamics`: predicts z_clean exactly as well as can be known, for every tau and d.

    At d = 1 / k_max the posterior mean E[z_clean | z_tau, frames before]; above it the clean end of the straight line
    to where the probability flow arrives after d, as a perfectly bootstrapped student says (eq. 7). Frames before are
    heard at their own levels, all of them: nothing falls out of a window.
    """

    def __init__(self) -> None:
        tokenizer = exact_tokenizer()
        self.config = SimpleNamespace(
            k_max=K_MAX, window=12, tokens=1, latent_dim=tokenizer.latent_dim, action_space=(("binary", 2, (), ()),)
        )
        self.embed = SimpleNamespace(weight=torch.zeros(1))
        self._turns = _turns()

    def __call__(self, z_tau: Tensor, tau: Tensor, d: Tensor, actions: Tensor, known: Tensor) -> Tensor:
        return self.extend(z_tau, tau, d, actions, known, self.new_cache(len(z_tau)), keep=z_tau.shape[1])

    def new_cache(self, batch: int) -> Belief:
        return Belief(10**6)

    def extend(
        self,
        z_tau: Tensor,
        tau: Tensor,
        d: Tensor,
        actions: Tensor,
        known: Tensor,
        cache: Belief,
        keep: int,
        unread: int = 0,
    ) -> Tensor:
        belief, predictions = cache, []
        for t in range(z_tau.shape[1]):
            z, signal = z_tau[:, t].double(), paper_level(tau[:, t].double())[:, None, None]
            mean, variance = self._next(belief, z, actions[:, t].double())
            predictions.append(self._answer(z, signal, d[:, t].double()[:, None, None], mean, variance))
            gain = variance * signal / (signal**2 * variance + (1 - signal) ** 2)
            heard = (mean + gain * (z - signal * mean), variance * (1 - gain * signal))
            belief = Belief(cache.window, belief.frames + 1, *heard)
            if t == keep - 1:
                cache.frames, cache.mean, cache.variance = belief.frames, belief.mean, belief.variance
        return torch.stack(predictions[unread:], dim=1).float()

    def _answer(self, z: Tensor, signal: Tensor, d: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """z_hat of latents known to be N(mean, variance) before z = signal * z_clean + (1 - signal) * noise is seen."""
        apart = z - signal * mean
        spread = (signal**2 * variance + (1 - signal) ** 2).sqrt()
        at_once = mean + variance * signal / spread**2 * apart
        after = (signal + d).clamp(max=1)  # the flow only stretches the distance to the mean
        there = after * mean + (after**2 * variance + (1 - after) ** 2).sqrt() / spread * apart
        jumped = z + (1 - signal) / (after - signal).clamp(min=1e-12) * (there - z)
        return torch.where((d > 1 / K_MAX) & (signal < 1), jumped, at_once)

    def _next(self, belief: Belief, like: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the next frame's latents, before it is looked at."""
        if belief.mean is None:
            return torch.zeros_like(like), like.new_ones(len(like), 1, 1)
        mean = KEPT * _pan(belief.mean, action[:, None], self._turns)
        return mean, KEPT**2 * belief.variance + 1 - KEPT**2


class MeanForecast(ExactDynamics):
    """The collapsed sampler: shows the mean of all futures whatever the noise. PSNR likes it best of all."""

    def _answer(self, z: Tensor, signal: Tensor, d: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        return mean


def exact_error(signal: float, variance: float) -> float:
    """Squared error of a latent that the exact denoiser cannot avoid, given its variance before it is looked at."""
    return variance * (1 - signal) ** 2 / (signal**2 * variance + (1 - signal) ** 2)


def settled_variance(tau_ctx: float) -> float:
    """Variance of a latent given many frames before it, all at tau_ctx: the fixed point of the Riccati recursion."""
    variance = 1.0
    for _ in range(200):
        variance = KEPT**2 * exact_error(paper_level(tau_ctx), variance) + 1 - KEPT**2
    return variance


def _turns() -> Tensor:
    """Angle (P,) by which one pixel of pan to the right turns each pair of latents."""
    return torch.tensor([2 * math.pi * k / SIDE for k in WAVES for _ in (0, 1)] + [0.0], dtype=torch.float64)


def _pan(z: Tensor, action: Tensor, turns: Tensor) -> Tensor:
    """Latents (..., 2 P) after a pan by RIGHT - LEFT pixels; action (..., 2)."""
    angle = (action[..., 1:] - action[..., :1]) * turns  # (..., P)
    across, up = z.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * across - sin * up, sin * across + cos * up], dim=-1).flatten(-2)
