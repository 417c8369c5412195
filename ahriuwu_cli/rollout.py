"""Rollout: context frames and actions in, imagined latents out, one frame at a time, at K passes a frame.

Every frame is walked from pure noise to tau_ctx by a sampler. Its last prediction z_hat is what is shown and scored;
its state at tau_ctx is what the next frames see (`ctx_mode="stop"`), committed to the cache by a pass at
(tau_ctx, d_min) that rides along with the next frame's first pass. Labels are honest: prompt frames are really mixed
with noise at tau_ctx, and every frame is labelled with the level that was applied to it (but for one ablation,
`ctx_label="clean"`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.errors import UserError, did_you_mean

CTX_MODES = ("stop", "renoise")
CTX_LABELS = ("honest", "clean")
NoiseSource = Callable[[int, str, int], Tensor]  # (frame, purpose, step) -> (B, N, D)


@dataclass(frozen=True)
class RolloutConfig:
    """How frames are generated. tau_ctx is noise: 0 is a clean context, 1 would be pure noise."""

    steps: int = 4  # K, model passes a frame
    sampler: str = "shortcut"
    tau_ctx: float = tau_.TAU_CTX
    ctx_mode: str = "stop"  # what becomes context: the state at tau_ctx, or z_hat with fresh noise ("renoise")
    ctx_label: str = "honest"  # what prompt and committed frames are labelled: their level, or 0, a lie ("clean")


def check_generation(config: RolloutConfig, k_max: int) -> None:
    """UserError for names that are unknown and numbers that no world of this k_max goes by."""
    if config.sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {config.sampler!r}: {did_you_mean(config.sampler, tuple(SAMPLERS))}")
    if config.ctx_mode not in CTX_MODES:
        raise UserError(f"unknown --ctx-mode {config.ctx_mode!r}: {did_you_mean(config.ctx_mode, CTX_MODES)}")
    if config.ctx_label not in CTX_LABELS:
        raise UserError(f"unknown --ctx-label {config.ctx_label!r}: {did_you_mean(config.ctx_label, CTX_LABELS)}")
    if not 0 <= config.tau_ctx < 1:
        raise UserError(f"--tau-ctx {config.tau_ctx} is not in [0, 1) where 0 is clean and 1 is noise")
    if config.steps < 1:
        raise UserError(f"--steps must be at least 1, got {config.steps}")
    if config.sampler == "shortcut" and (config.steps & (config.steps - 1) or config.steps > k_max):
        raise UserError(
            f"--steps {config.steps} does not fit the shortcut sampler: use a power of two up to {k_max}, "
            f"or --sampler euler"
        )


class CachedDenoiser(Protocol):
    """What a rollout needs of a model: `models.dynamics.Dynamics`, or a control that stands in for one."""

    def new_cache(self, batch: int): ...

    def extend(self, z_tau, tau, d, actions, known, cache, keep: int, unread: int = 0) -> Tensor: ...


class KeyedNoise:
    """Noise as a function of (seed, window, frame, purpose, step), whatever the batch, its order or the processes."""

    def __init__(self, seed: int, windows: Sequence[str], shape: tuple[int, int], device: torch.device | str = "cpu"):
        self.seed, self.windows, self.shape, self.device = seed, list(windows), shape, device

    def __call__(self, frame: int, purpose: str, step: int = 0) -> Tensor:
        """(B, N, D) standard normal, drawn on the CPU so that every device sees the same numbers."""
        rows = []
        for window in self.windows:
            key = hashlib.blake2b(f"{self.seed}/{window}/{frame}/{purpose}/{step}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
            rows.append(torch.randn(self.shape, generator=generator))
        drawn = torch.stack(rows)
        if torch.device(self.device).type == "cuda":
            drawn = drawn.pin_memory()  # so that the copy does not wait for the frames that are still being made
        return drawn.to(self.device, non_blocking=True)


@torch.no_grad()
def rollout(
    dynamics: CachedDenoiser,
    prompt: Tensor,
    actions: Tensor,
    known: Tensor,
    config: RolloutConfig,
    noise: NoiseSource,
    k_max: int,
    passes: list[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Yields z_hat (B, N, D) of every frame after the prompt.

    prompt: clean latents (B, P, N, D), P >= 1. actions: incoming (B, P + L, A) for prompt and new frames, known
    (B, P + L) likewise (`models.dynamics.incoming_actions`); L frames are generated. noise: see NoiseSource. passes:
    a list that then holds, for each pass of the frame that was yielded last, whether z_hat is finite: a bool tensor ().
    """
    batch, prompt_frames = prompt.shape[:2]
    device = prompt.device
    d_min = 1 / k_max
    cache = dynamics.new_cache(batch)

    def level(value: float, frames: int) -> Tensor:
        return torch.full((batch, frames), value, device=device)

    def told(tau: float) -> float:
        return tau if config.ctx_label == "honest" else 0.0

    def inputs(first: int, stop: int) -> tuple[Tensor, Tensor]:
        return actions[:, first:stop], known[:, first:stop]

    noisy = [tau_.add_noise(prompt[:, t], noise(t, "prompt", 0), config.tau_ctx) for t in range(prompt_frames)]
    for first, stop in _prefill_chunks(prompt_frames - 1, cache.window):
        z = torch.stack(noisy[first:stop], dim=1)
        frames = stop - first
        dynamics.extend(
            z, level(told(config.tau_ctx), frames), level(d_min, frames), *inputs(first, stop), cache, keep=frames
        )

    pending, pending_tau = noisy[-1][:, None], told(config.tau_ctx)  # waits to be committed with the next first pass
    for t in range(prompt_frames, actions.shape[1]):
        uncommitted = True
        if passes is not None:
            passes.clear()

        def denoise(
            z: Tensor, tau: Tensor, d: Tensor, t: int = t, last: Tensor = pending, last_tau: float = pending_tau
        ) -> Tensor:
            nonlocal uncommitted
            if uncommitted:
                uncommitted = False
                both = torch.cat([last, z], dim=1)
                taus = torch.cat([level(last_tau, 1), tau], dim=1)
                sizes = torch.cat([level(d_min, 1), d], dim=1)
                z_hat = dynamics.extend(both, taus, sizes, *inputs(t - 1, t + 1), cache, keep=1, unread=1)
            else:
                z_hat = dynamics.extend(z, tau, d, *inputs(t, t + 1), cache, keep=0)
            if passes is not None:
                passes.append(torch.isfinite(z_hat).all())
            return z_hat

        z_hat, z_end, tau_end = SAMPLERS[config.sampler](
            denoise,
            noise(t, "start", 0)[:, None],
            config.steps,
            tau_ctx=config.tau_ctx,
            k_max=k_max,
            generator=lambda i, t=t: noise(t, "renoise", i)[:, None],
        )
        if config.ctx_mode == "renoise":
            z_end, tau_end = tau_.add_noise(z_hat, noise(t, "context", 0)[:, None], config.tau_ctx), config.tau_ctx
        pending, pending_tau = z_end, told(tau_end)
        yield z_hat[:, 0]


def _prefill_chunks(frames: int, window: int) -> Iterator[tuple[int, int]]:
    """The prompt's frames in one chunk while the window fills, then one by one."""
    if frames:
        yield 0, min(frames, window)
    for t in range(window, frames):
        yield t, t + 1
