"""Samplers: pure functions that walk one latent from pure noise to tau_ctx with any `denoise(z, tau, d) -> z_hat`.

    SAMPLERS[name](denoise, noise, steps, *, tau_ctx, k_max, generator) -> (z_hat, z_end, tau_end)

z_hat is the last prediction (what is shown and scored); z_end is the state at tau_end = tau_ctx (what becomes context).
noise is (B, T, N, D), usually T = 1; context lives inside `denoise`, which is called with tau and d of shape (B, T).
The generators `*_walk` yield every state, so that a caller can film the walk; SAMPLERS keeps the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.objective import Denoise

State = tuple[Tensor, Tensor, float]  # (z_hat, z at tau, tau)
Source = Generator | Callable[[int], Tensor] | None  # fresh noise: a generator, or step index -> noise like the state


def euler_walk(
    denoise: Denoise, noise: Tensor, steps: int, *, tau_ctx: float, k_max: int, generator: Source = None
) -> Iterator[State]:
    """K equal steps of (1 - tau_ctx) / K; the model is told d_min = 1/k_max (eq. 2). The implied noise is kept."""
    z = noise
    for tau, s in tau_.equal_walk(steps, tau_ctx):
        z_hat = _ask(denoise, z, tau, 1 / k_max)
        z, tau = tau_.step(z, z_hat, tau, s)
        yield z_hat, z, tau


def shortcut_walk(
    denoise: Denoise, noise: Tensor, steps: int, *, tau_ctx: float, k_max: int, generator: Source = None
) -> Iterator[State]:
    """The grid of d = 1/K, the model told the d that it jumps (eq. 7); only the step that would pass tau_ctx is cut."""
    z = noise
    for tau, s in tau_.grid_walk(steps, tau_ctx, k_max):
        z_hat = _ask(denoise, z, tau, 1 / steps)
        z, tau = tau_.step(z, z_hat, tau, s)
        yield z_hat, z, tau


def multistep_walk(
    denoise: Denoise, noise: Tensor, steps: int, *, tau_ctx: float, k_max: int, generator: Source = None
) -> Iterator[State]:
    """Second order for no more passes: K steps, shorter near clean, along the line through the last two velocities.

    Adams and Bashforth's rule, as in Zhang & Chen 2022 (DEIS, arXiv 2204.13902) and Liu et al. 2022 (PNDM, arXiv
    2202.09778), on the quadratic grid of DDIM. The model is told d_min = 1/k_max; the first step is Euler's.
    """
    z, before = noise, None
    for tau, s in tau_.quadratic_walk(steps, tau_ctx):
        z_hat = _ask(denoise, z, tau, 1 / k_max)
        v = tau_.velocity(z, z_hat, tau)
        along = tau_.two_step_velocity(v, before[0], s, before[1]) if before else v
        before = v, s
        z, tau = tau_.move(z, along, tau, s)
        yield z_hat, z, tau


def renoise_walk(
    denoise: Denoise, noise: Tensor, steps: int, *, tau_ctx: float, k_max: int, generator: Source = None
) -> Iterator[State]:
    """The review's rule: fresh noise at every step. Not an Euler step: Gaussian samples keep .7 of the spread.

    generator: a torch.Generator, or a callable from the step index to noise shaped like `noise` (keyed noise).
    """
    z = noise
    for i, (tau, s) in enumerate(tau_.equal_walk(steps, tau_ctx)):
        z_hat = _ask(denoise, z, tau, 1 / k_max)
        tau = tau_.lower(tau, s)
        z = tau_.add_noise(z_hat, _fresh(generator, i, noise), tau)
        yield z_hat, z, tau


def _ask(denoise: Denoise, z: Tensor, tau: float, d: float) -> Tensor:
    """One call of the model: the label of every frame is the level that was really applied to it."""
    frames = z.shape[:2]
    return denoise(z, torch.full(frames, tau, device=z.device), torch.full(frames, d, device=z.device))


def _fresh(source: Source, index: int, like: Tensor) -> Tensor:
    if callable(source):
        return source(index)
    return torch.randn(like.shape, generator=source, device=like.device, dtype=like.dtype)


def _last(walk: Callable[..., Iterator[State]]) -> Callable[..., State]:
    def sample(
        denoise: Denoise,
        noise: Tensor,
        steps: int,
        *,
        tau_ctx: float = tau_.TAU_CTX,
        k_max: int = 64,
        generator: Source = None,
    ) -> State:
        for state in walk(denoise, noise, steps, tau_ctx=tau_ctx, k_max=k_max, generator=generator):
            last = state
        return last

    sample.__doc__ = walk.__doc__
    sample.__name__ = walk.__name__.removesuffix("_walk")
    return sample


WALKS = {"euler": euler_walk, "shortcut": shortcut_walk, "multistep": multistep_walk, "renoise": renoise_walk}
SAMPLERS: dict[str, Callable[..., State]] = {name: _last(walk) for name, walk in WALKS.items()}


def told_step_size(sampler: str, steps: int, k_max: int) -> float:
    """The d that a sampler tells the model: 1/steps for `shortcut`, d_min for the others. A checkpoint must know it."""
    return 1 / steps if sampler == "shortcut" else 1 / k_max
