"""The convention, said once: tau = 0 is clean, tau = 1 is pure noise. Only this module does arithmetic on tau.

    z_tau = (1 - tau) * z_clean + tau * noise        signal = 1 - tau

The Dreamer 4 paper (arXiv 2509.24527) writes the same line with tau running the other way; `to_paper` and
`from_paper` are the only two places here where that direction appears. Elsewhere it is typed on purpose, as a second
opinion: `evaluation/oracles.py` and `evaluation/gaussian_world.py`.

Shapes: latents (B, T, N, D); tau and d are (B, T), (B,) or a float, and are broadcast over the trailing axes.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

CONVENTION = "tau: 0 clean, 1 noise"  # stated by every checkpoint, checked by every loader
LABEL = "tau (0 clean, 1 noise)"  # help texts, CSV headers, plot axes, JSON
TAU_CTX = 0.1  # the default noise of context frames (the paper's "tau_ctx = 0.1", section 3.2, read as noise)

Level = Tensor | float


def expand(tau: Level, like: Tensor) -> Level:
    """tau (B,) or (B, T) with ones appended until it broadcasts against `like` (B, T, N, D); a float stays a float."""
    if not isinstance(tau, Tensor):
        return float(tau)
    return tau.reshape(tau.shape + (1,) * (like.ndim - tau.ndim))


def signal(tau: Level) -> Level:
    """The share of the clean latent in z_tau: 1 - tau. This is the paper's own tau."""
    return 1 - tau


def to_paper(tau: Level) -> Level:
    """Our tau as the paper's signal level (0 noise, 1 clean)."""
    return 1 - tau


def from_paper(signal_level: Level) -> Level:
    """The paper's signal level (0 noise, 1 clean) as our tau."""
    return 1 - signal_level


def add_noise(z_clean: Tensor, noise: Tensor, tau: Level) -> Tensor:
    """z_tau (B, T, N, D) = (1 - tau) z_clean + tau noise (eq. 1, turned to our direction)."""
    t = expand(tau, z_clean)
    return signal(t) * z_clean + t * noise


def velocity(z_tau: Tensor, z_hat: Tensor, tau: Level) -> Tensor:
    """dz/dtau along the straight path = noise - z_clean, as implied by state and prediction: (z_tau - z_hat) / tau.

    tau must be above 0: at 0 there is no path left. The grids of `forcing` never touch 0.
    """
    return (z_tau - z_hat) / expand(tau, z_tau)


def velocity_weight(tau: Tensor) -> Tensor:
    """What a squared error of z_hat is worth as one of the velocity (z_tau - z_hat) / tau: 1 / tau^2. tau > 0."""
    return tau.square().reciprocal()


def clean_from_velocity(z_tau: Tensor, v: Tensor, tau: Level) -> Tensor:
    """The clean latent that a velocity points at: z_tau - tau v. Inverse of `velocity`."""
    return z_tau - expand(tau, z_tau) * v


def implied_noise(z_tau: Tensor, z_hat: Tensor, tau: Level) -> Tensor:
    """The noise that, mixed with z_hat at tau, gives z_tau: (z_tau - (1 - tau) z_hat) / tau. tau > 0."""
    t = expand(tau, z_tau)
    return (z_tau - signal(t) * z_hat) / t


def step(z_tau: Tensor, z_hat: Tensor, tau: Level, s: Level) -> tuple[Tensor, Level]:
    """One Euler step towards clean: (z at tau - s, tau - s). The implied noise is kept (eq. 2).

    z - s (z_tau - z_hat) / tau is the same as mixing z_hat and the implied noise anew at tau - s. 0 < s <= tau.
    """
    return move(z_tau, velocity(z_tau, z_hat, tau), tau, s)


def move(z_tau: Tensor, v: Tensor, tau: Level, s: Level) -> tuple[Tensor, Level]:
    """(z at tau - s, tau - s): s towards clean along a velocity dz/dtau."""
    return z_tau - expand(s, z_tau) * v, lower(tau, s)


def two_step_velocity(v: Tensor, v_before: Tensor, s: float, s_before: float) -> Tensor:
    """The velocity for a step of length s, from those here and one step of length s_before ago: their line, halfway on.

    Adams and Bashforth's rule of second order for unequal steps: v + s / (2 s_before) (v - v_before).
    """
    return v + s / (2 * s_before) * (v - v_before)


def gaussian_gain(tau: Level, spread: Tensor) -> Tensor:
    """Best linear denoiser of N(0, spread^2) data: E[z_clean | z_tau] = gain * z_tau (Wiener). At tau = 0 it is 1.

    spread is above 0."""
    power = spread.square()
    return signal(tau) * power / (signal(tau) ** 2 * power + tau**2)


def between(tau_from: Level, tau_to: Level, fraction: Level) -> Level:
    """The level that lies `fraction` (0..1) of the way from tau_from to tau_to."""
    return tau_from + (tau_to - tau_from) * fraction


def on_grid(u: Tensor, d: Tensor) -> Tensor:
    """u uniform on [0, 1) turned into tau uniform on {d, 2d, ..., 1} (eq. 4): the grid never touches clean."""
    return d * (torch.floor(u / d) + 1)


def lower(tau: Level, s: Level) -> Level:
    """The level one step of length s closer to clean: tau - s."""
    return tau - s


def bin_index(tau: Tensor, bins: int) -> Tensor:
    """Which of `bins` equal bins a level falls into: bin i is (i, i + 1] / bins, and 0 belongs to the first."""
    return (tau * bins).ceil().long().clamp(1, bins) - 1


def noisiest(z_like: Tensor) -> Tensor:
    """tau = 1 for every frame of z_like: (B, T)."""
    return torch.ones(z_like.shape[:2], device=z_like.device)


def grid_neighbours(tau: Tensor, k_max: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where tau lies among the k_max + 1 grid points 0, 1/k_max, ..., 1: (lower index, upper index, share of upper).

    Embedding tau by this interpolation makes every level usable, on the grid or off it.
    """
    place = tau.float() * k_max
    lower = place.floor().clamp(0, k_max).long()
    upper = (lower + 1).clamp(max=k_max)
    return lower, upper, place - lower


def levels(k_max: int) -> list[float]:
    """Step sizes d from coarse to fine: 1, 1/2, ..., 1/k_max. k_max must be a power of two (ValueError)."""
    if k_max < 1 or k_max & (k_max - 1):
        raise ValueError(f"k_max must be a power of two, got {k_max}")
    return [2.0**-i for i in range(k_max.bit_length())]


def equal_walk(steps: int, tau_ctx: float) -> list[tuple[float, float]]:
    """[(tau, step length s)] of K equal steps from 1 to tau_ctx, each (1 - tau_ctx) / K long."""
    _check_walk(steps, tau_ctx)
    return _steps_of([between(1.0, tau_ctx, i / steps) for i in range(steps)] + [tau_ctx])


def quadratic_walk(steps: int, tau_ctx: float) -> list[tuple[float, float]]:
    """[(tau, step length s)] of K steps from 1 to tau_ctx, equal in the square root of tau: short ones near clean.

    Song et al. 2021, "Denoising Diffusion Implicit Models", appendix D.2, the quadratic choice.
    """
    _check_walk(steps, tau_ctx)
    return _steps_of([between(1.0, math.sqrt(tau_ctx), i / steps) ** 2 for i in range(steps)] + [tau_ctx])


def grid_walk(steps: int, tau_ctx: float, k_max: int) -> list[tuple[float, float]]:
    """[(tau, step length s)] on the grid of d = 1/K from 1 towards 0; the step that would pass tau_ctx is shortened.

    K must be a power of two up to k_max, since the model knows no other d (ValueError).
    """
    _check_walk(steps, tau_ctx)
    if 1 / steps not in levels(k_max):
        raise ValueError(f"shortcut steps must be a power of two up to k_max = {k_max}, got {steps}")
    walk = []
    for i in range(steps):
        here, there = 1 - i / steps, 1 - (i + 1) / steps
        if here <= tau_ctx:
            break
        walk.append((here, here - max(there, tau_ctx)))
    return walk


def _steps_of(stops: list[float]) -> list[tuple[float, float]]:
    return [(a, a - b) for a, b in itertools.pairwise(stops)]


def _check_walk(steps: int, tau_ctx: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= tau_ctx < 1:
        raise ValueError(f"tau_ctx must be in [0, 1) where 0 is clean, got {tau_ctx}")
