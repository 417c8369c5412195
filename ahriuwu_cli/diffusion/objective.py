"""The objective: choose a clean target for every frame, then one ramp-weighted squared error (Dreamer 4, eq. 7 and 8).

The paper's bootstrap loss tau^2 ||(z_tau - z_hat)/tau - v||^2 is exactly ||z_hat - (z_tau - tau v)||^2, so the flow
term and the bootstrap term differ only in their target. Nothing is drawn here: noise, tau and d come in as arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ahriuwu_cli.diffusion import tau as tau_

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z_tau, tau, d) -> z_hat
RAMPS = ("paper", "inverted", "flat", "velocity")
BOOTSTRAPS = ("eq7", "second")


def ramp_weight(tau: Tensor, kind: str = "paper") -> Tensor:
    """Weight of a frame's loss by its noise level, same shape as tau (eq. 8).

    `paper`: 0.9 signal + 0.1 = 1 - 0.9 tau, so clean weighs 1.0 and pure noise 0.1. `inverted` (the reviewed bug),
    `flat` and `velocity` (1 / tau^2: the plain error of v) exist for ablation. An unknown kind raises ValueError.
    """
    signal = tau_.signal(tau)
    if kind == "paper":
        return 0.9 * signal + 0.1
    if kind == "inverted":
        return 0.9 * tau_.signal(signal) + 0.1
    if kind == "flat":
        return torch.ones_like(tau)
    if kind == "velocity":
        return tau_.velocity_weight(tau)
    raise ValueError(f"unknown ramp {kind!r}, choose one of {', '.join(RAMPS)}")


def x_prediction_loss(z_hat: Tensor, target: Tensor, tau: Tensor, ramp: str = "paper", reduce: str = "mean") -> Tensor:
    """Squared error of z_hat (B, T, N, D) averaged over the latent axes, then weighted per frame by the ramp.

    reduce: `mean` or `sum` over the frames of tau, or `none` for one value per entry of tau (B, T).
    """
    error = (z_hat.float() - target.float()).square()
    per_frame = error.flatten(tau.ndim).mean(-1) * ramp_weight(tau, ramp)
    if reduce == "mean":
        return per_frame.mean()
    if reduce == "sum":
        return per_frame.sum()
    if reduce == "none":
        return per_frame
    raise ValueError(f"unknown reduction {reduce!r}, choose one of mean, sum, none")


@torch.no_grad()
def bootstrap_target(
    denoise: Denoise, z_tau: Tensor, tau: Tensor, d: Tensor, moves: Tensor | None = None, aim: str = "eq7"
) -> Tensor:
    """The clean target that two half steps of d/2 agree on (eq. 7), (B, T, N, D) float32, gradient stopped.

    aim: `eq7`, or for ablation `second`, the second half step's own prediction, which leads elsewhere (SPEC 3.3).

    moves (B, T) bool: frames that take the half steps. Frames outside it (those at d_min, whose target is z_clean
    anyway) are context: they keep their state, tau and d in both passes, so that every label stays true.
    """
    z_tau = z_tau.float()
    moves = torch.ones_like(tau, dtype=torch.bool) if moves is None else moves
    half = torch.where(moves, d / 2, d)
    z_hat1 = denoise(z_tau, tau, half).float()
    b1 = tau_.velocity(z_tau, z_hat1, tau)
    z_mid, tau_mid = tau_.step(z_tau, z_hat1, tau, d / 2)
    z_mid = torch.where(tau_.expand(moves, z_tau), z_mid, z_tau)
    tau_mid = torch.where(moves, tau_mid, tau)
    z_hat2 = denoise(z_mid, tau_mid, half).float()
    if aim == "second":
        return z_hat2
    assert aim == "eq7", aim
    b2 = tau_.velocity(z_mid, z_hat2, tau_mid)
    return tau_.clean_from_velocity(z_tau, (b1 + b2) / 2, tau)


@dataclass(frozen=True)
class ShortcutLoss:
    """What one evaluation of the objective gives. `loss` carries the gradient; the rest is detached, for the log."""

    loss: Tensor  # ()      ramp-weighted mean over all frames
    flow: Tensor  # ()      mean over the frames at d_min; NaN where there is none
    bootstrap: Tensor  # ()      mean over the frames with d > d_min; NaN where there is none
    per_frame: Tensor  # (B, T)  squared error before the ramp


def shortcut_forcing_loss(
    denoise: Denoise,
    z_clean: Tensor,
    noise: Tensor,
    tau: Tensor,
    d: Tensor,
    *,
    k_max: int,
    ramp: str = "paper",
    teacher: Callable[[int], Denoise] | None = None,
    bootstrap_rows: int | None = None,
    always_teach: bool = False,
    aim: str = "eq7",
) -> ShortcutLoss:
    """Shortcut forcing (eq. 7, 8): frames at d_min aim at z_clean, the others at `bootstrap_target`.

    Latents (B, T, N, D), tau and d (B, T). Only the first `bootstrap_rows` clips may hold d > d_min (default: all);
    the two teacher passes run on those alone. `teacher(rows)` gives the denoiser for the first `rows` clips; without
    it `denoise` itself teaches, which needs bootstrap_rows to cover all clips. always_teach: the passes run even where
    no frame needs them, so that processes which share a model take the same number of passes. aim: as in
    `bootstrap_target`.
    """
    rows = z_clean.shape[0] if bootstrap_rows is None else bootstrap_rows
    z_tau = tau_.add_noise(z_clean, noise, tau)
    big = d > 1 / k_max
    assert not bool(big[rows:].any()), f"d > d_min in a clip after the first {rows}"
    target = z_clean.float()
    if rows and (always_teach or bool(big.any())):
        assert teacher is not None or rows == z_clean.shape[0], "a share of the clips needs its own teacher"
        teach = denoise if teacher is None else teacher(rows)
        boot = bootstrap_target(teach, z_tau[:rows], tau[:rows], d[:rows], big[:rows], aim)
        head = torch.where(tau_.expand(big[:rows], boot), boot, target[:rows])
        target = torch.cat([head, target[rows:]])
    z_hat = denoise(z_tau, tau, d)
    weighted = x_prediction_loss(z_hat, target, tau, ramp, reduce="none")
    per_frame = (weighted / ramp_weight(tau, ramp)).detach()
    return ShortcutLoss(weighted.mean(), weighted[~big].detach().mean(), weighted[big].detach().mean(), per_frame)
