"""Worlds whose answer is known in closed form: what `ahriuwu verify` and the tests measure our mathematics against.

The formulas here are typed a second time on purpose, in the Dreamer 4 paper's own direction (signal 0 = noise,
1 = clean), and share no code with `diffusion/tau.py`: a formula turned round there disagrees with this page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]

# Standard deviation of samples of N(0, 1) data with the exact denoiser, walked in K steps to clean; 1 would be true.
SPREAD_STEPS = (2, 4, 8, 16, 64)
SPREAD_EULER = (0.50, 0.72, 0.85, 0.92, 0.98)
SPREAD_FRESH_NOISE = (0.50, 0.56, 0.62, 0.66, 0.69)
SPREAD_MULTISTEP = (0.30, 0.79, 0.94, 0.985, 1.0)
TWO_HALF_STEPS = 0.6  # where two half steps with d = 1/2 end, of an input at pure noise, on the same oracle


def gaussian_denoiser(z_tau: Tensor, tau: Tensor, d: Tensor) -> Tensor:
    """E[z_clean | z_tau] for data N(0, 1): signal z / (signal^2 + noise^2). Blind to d, and rightly so."""
    signal = _signal(tau, z_tau)
    return signal * z_tau / (signal**2 + (1 - signal) ** 2)


def bootstrapped_denoiser(bootstrap_target: Callable, d_min: float) -> Denoise:
    """The student that has learnt its targets perfectly: exact at d_min, `bootstrap_target` of itself above."""

    def student(z_tau: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        if float(d.max()) <= d_min:
            return gaussian_denoiser(z_tau, tau, d)
        return bootstrap_target(student, z_tau, tau, d)

    return student


def paper_mix(z_clean: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """Eq. 1 as printed, x = (1 - s) x_0 + s x_1 with x_0 noise and x_1 data, for our tau = 1 - s."""
    signal = _signal(tau, z_clean)
    return (1 - signal) * noise + signal * z_clean


def paper_ramp(tau: Tensor) -> Tensor:
    """Eq. 8 as printed, w = 0.9 s + 0.1, for our tau = 1 - s."""
    return 0.9 * (1 - tau) + 0.1


def paper_bootstrap_target(denoise: Denoise, z_tau: Tensor, tau: Tensor, d: Tensor) -> Tensor:
    """Eq. 7 as printed, velocities running from noise to data, then the clean latent that the mean velocity reaches."""
    s, half = _signal(tau, z_tau), _over(d / 2, z_tau)
    first = (denoise(z_tau, tau, d / 2) - z_tau) / (1 - s)
    middle = z_tau + half * first
    second = (denoise(middle, tau - d / 2, d / 2) - middle) / (1 - s - half)
    return z_tau + (1 - s) * (first + second) / 2


def horizon_ceiling(position: int, frames: int, tau_ctx: float) -> float:
    """The most noise that the review's horizon schedule ever shows at a position (counted from 0) of a clip."""
    return tau_ctx + (1 - tau_ctx) * max(position - 1, 0) / (frames - 2)


@dataclass
class LabelSpy:
    """A perfect denoiser of one clip that notes how far each state is from what its label says it is.

    The clip's clean latents and the noise that was mixed in are known, so a state labelled tau must be exactly
    (1 - tau) z_clean + tau noise. `worst` is the largest difference over all calls; `levels` are the labels given.
    """

    z_clean: Tensor
    noise: Tensor
    worst: float = 0.0
    levels: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)

    def __call__(self, z_tau: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        expected = paper_mix(self.z_clean, self.noise, tau)
        self.worst = max(self.worst, (z_tau - expected).abs().max().item())
        self.levels.append(tau.flatten()[0].item())
        self.sizes.append(d.flatten()[0].item())
        return self.z_clean


@dataclass
class PerfectCache:
    """Stands in for a context window: it only counts the committed frames."""

    window: int
    frames: int = 0


@dataclass
class PerfectDynamics:
    """Stands in for `models.dynamics.Dynamics` in a rollout: knows the clean latents of every frame, predicts them.

    z_clean (B, T, N, D) of the whole clip. Every call is kept as (first frame, z, tau, d, keep), so that labels and
    contents of prompt, committed frames and the frame being made can be compared.
    """

    z_clean: Tensor
    window: int
    calls: list[tuple[int, Tensor, Tensor, Tensor, int]] = field(default_factory=list)

    def new_cache(self, batch: int) -> PerfectCache:
        return PerfectCache(self.window)

    def extend(
        self,
        z_tau: Tensor,
        tau: Tensor,
        d: Tensor,
        actions: Tensor,
        known: Tensor,
        cache: PerfectCache,
        keep: int,
        unread: int = 0,
    ) -> Tensor:
        first, count = cache.frames, z_tau.shape[1]
        self.calls.append((first, z_tau.clone(), tau.clone(), d.clone(), keep))
        cache.frames += keep
        return self.z_clean[:, first + unread : first + count]

    def worst_label(self, noise_of: Callable[[int], Tensor]) -> float:
        """Largest difference between a state and its label's mixture; noise_of(frame) is (B, N, D)."""
        worst = 0.0
        for first, z, tau, _, _ in self.calls:
            noise = torch.stack([noise_of(first + i) for i in range(z.shape[1])], dim=1)
            expected = paper_mix(self.z_clean[:, first : first + z.shape[1]], noise, tau)
            worst = max(worst, (z - expected).abs().max().item())
        return worst


def paper_level(tau):
    """The paper's tau (signal: 0 noise, 1 clean) of ours, a tensor or a number."""
    return 1 - tau


def _signal(tau: Tensor, like: Tensor) -> Tensor:
    """The paper's tau of ours, shaped to broadcast over latents."""
    return _over(paper_level(tau), like)


def _over(level: Tensor, like: Tensor) -> Tensor:
    return level.reshape(level.shape + (1,) * (like.ndim - level.ndim))
