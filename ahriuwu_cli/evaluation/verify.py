"""The review's seven findings as numbers: our own functions against the closed forms of `evaluation.oracles`.

What `ahriuwu verify` runs first. Functions are looked up where training and rollouts find them, so that a formula
turned round anywhere fails its line here. `verify_world`, its second half, is handed on from `evaluation.question`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ahriuwu_cli.diffusion import forcing, objective, samplers
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.evaluation import oracles
from ahriuwu_cli.evaluation.checks import Check, Line, above, as_table, below, gap, near, normal, relative
from ahriuwu_cli.evaluation.question import verify_world

__all__ = ["Check", "as_table", "verify_mathematics", "verify_world"]


def verify_mathematics() -> list[Check]:
    """The seven findings of the review, each through the functions that training and rollouts really call."""
    parts = (_schedule, _ramp, _x_prediction, _forcing, _euler, _stop, _bootstrap)
    names = (
        "1 schedule",
        "2 ramp",
        "3 x-prediction loss",
        "4 forcing",
        "5 Euler sampling",
        "6 stop at tau_ctx",
        "7 shortcut",
    )
    checks = []
    for name, part in zip(names, parts, strict=True):
        try:
            checks.extend(Check(name, *line) for line in part())
        except Exception as error:  # code that breaks on an oracle has failed its finding; the others still count
            broke = f"broke with {type(error).__name__}: {' '.join(str(error).split())[:60]}"
            checks.append(Check(name, broke, math.nan, "no error", False))
    return checks


def _schedule() -> Iterator[Line]:
    z_clean, noise = normal(2, 4, 8, 16, 8)
    tau = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    clean, pure = torch.zeros(4, 8), torch.ones(4, 8)
    z_tau = tau_.add_noise(z_clean, noise, tau)
    yield near("tau = 0 is the clean latent: difference", gap(tau_.add_noise(z_clean, noise, clean), z_clean), 0, 0)
    yield near("tau = 1 is pure noise: difference", gap(tau_.add_noise(z_clean, noise, pure), noise), 0, 0)
    yield below("eq. 1 in the paper's direction: difference", gap(z_tau, oracles.paper_mix(z_clean, noise, tau)), 1e-5)
    wanted = noise - z_clean
    yield below("velocity is noise minus clean: difference", relative(tau_.velocity(z_tau, z_clean, tau), wanted), 1e-3)


def _ramp() -> Iterator[Line]:
    z_clean, noise = normal(2, 1, 11, 64, 64)
    tau = torch.linspace(0, 1, 11)[None]
    weight = objective.ramp_weight(tau)
    yield near("weight of a clean frame", weight[0, 0], 1.0, 1e-6)
    yield near("weight of pure noise", weight[0, -1], 0.1, 1e-6)
    yield below("eq. 8 in the paper's direction: difference", gap(weight, oracles.paper_ramp(tau)), 1e-6)
    z_tau = tau_.add_noise(z_clean, noise, tau)
    likeness = torch.stack(
        [torch.corrcoef(torch.stack([z_tau[0, t].flatten(), z_clean[0, t].flatten()]))[0, 1] for t in range(11)]
    )
    together = torch.corrcoef(torch.stack([likeness, weight[0]]))[0, 1]
    yield above("weight rises with likeness to the clean latent: r", together, 0.9)


def _x_prediction() -> Iterator[Line]:
    z_hat, target = normal(2, 3, 5, 4, 6)
    tau = torch.rand(3, 5, generator=torch.Generator().manual_seed(2))
    weight = oracles.paper_ramp(tau)
    by_hand = sum((z_hat[b, t] - target[b, t]).square().sum() / 24 * weight[b, t] for b in range(3) for t in range(5))
    total = objective.x_prediction_loss(z_hat, target, tau, reduce="sum")
    mean = objective.x_prediction_loss(z_hat, target, tau)
    yield near("sum over frames against a hand-written one: ratio", total / by_hand, 1, 1e-5)
    yield near("mean over frames against a hand-written one: ratio", mean / by_hand * 15, 1, 1e-5)
    yield near("loss of the true clean latent", objective.x_prediction_loss(target, target, tau), 0, 0)
    clean = objective.x_prediction_loss(target, target + 1, torch.zeros(3, 5))
    noisy = objective.x_prediction_loss(target, target + 1, torch.ones(3, 5))
    yield near("a clean frame's error against the same on noise: ratio", clean / noisy, 10, 1e-3)


def _forcing() -> Iterator[Line]:
    k_max, frames, clips = 64, 12, 4000
    draw = torch.Generator().manual_seed(0)
    tau, d = forcing.FORCINGS["independent"](clips, frames, k_max, tau_.TAU_CTX, draw)
    sizes = [2.0**-i for i in range(7)]
    counts = torch.tensor([(d == s).sum() for s in sizes]).double()
    expected = clips * frames / 7
    yield below("independent: chi-square of d over 7 sizes", ((counts - expected) ** 2 / expected).sum(), 27.9)
    yield near("independent: share of pure noise", (tau == 1).float().mean(), sum(sizes) / 7, 0.01)
    yield near("independent: share of tau below its d", (tau < d).float().mean(), 0, 0)
    lag = torch.corrcoef(torch.stack([tau[:, :-1].flatten(), tau[:, 1:].flatten()]))[0, 1]
    yield near("independent: correlation of neighbouring frames", lag, 0, 0.025)
    yield above("independent: rarest (position, tau bin)", forcing.coverage(tau).min(), 0.02)
    draw = torch.Generator().manual_seed(0)
    tau, _ = forcing.FORCINGS["horizon"](clips, frames, k_max, 0.1, draw)
    most = torch.tensor([oracles.horizon_ceiling(p, frames, 0.1) for p in range(frames)])
    yield below("horizon: most noise by position, against the formula", gap(tau.amax(0), most), 1e-5)
    yield near("horizon: tau of the first frame that can be a target", tau[:, 1].max(), 0.1, 1e-6)
    idle = (tau <= 0.1 + 1e-6).all(1).float().mean()
    yield near("horizon: share of clips without a noisy frame", idle, 1 / (frames - 1), 0.02)
    starved = (forcing.coverage(tau)[1:] == 0).float().mean()
    yield above("horizon: share of (position, tau bin) never drawn", starved, 0.3)


def _euler() -> Iterator[Line]:
    noise = normal(1, 1, 100, 400)
    spreads = {
        "euler": oracles.SPREAD_EULER,
        "multistep": oracles.SPREAD_MULTISTEP,
        "renoise": oracles.SPREAD_FRESH_NOISE,
    }
    for name, wanted in spreads.items():
        for steps, spread in zip(oracles.SPREAD_STEPS, wanted, strict=True):
            z_hat, _, _ = samplers.SAMPLERS[name](
                oracles.gaussian_denoiser,
                noise,
                steps,
                tau_ctx=0.0,
                k_max=64,
                generator=torch.Generator().manual_seed(1),
            )
            yield near(f"{name}, K = {steps}: spread of samples of N(0, 1)", z_hat.std(), spread, 0.015)


def _stop() -> Iterator[Line]:
    z_clean, noise = normal(2, 1, 1, 16, 16)
    for name in ("euler", "multistep", "shortcut"):
        worst_end, spy = 0.0, oracles.LabelSpy(z_clean, noise)
        for tau_ctx in (0.0, 0.02, 0.1, 0.25, 0.3, 0.5, 0.9):
            z_hat, z_end, tau_end = samplers.SAMPLERS[name](spy, noise, 4, tau_ctx=tau_ctx, k_max=64)
            state = oracles.paper_mix(z_clean, noise, torch.full((1, 1), tau_ctx))
            worst_end = max(
                worst_end, gap(torch.tensor(tau_end), torch.tensor(tau_ctx)), gap(z_end, state), gap(z_hat, z_clean)
            )
        yield below(f"{name}: end of the walk against tau_ctx", worst_end, 1e-5)
        yield below(f"{name}: content of every call against its label", spy.worst, 1e-5)
        told = 1 / 4 if name == "shortcut" else 1 / 64
        yield near(f"{name}: step size told, K = 4", max(spy.sizes), told, 0)


def _bootstrap() -> Iterator[Line]:
    one, half = torch.ones(1, 1), torch.full((1, 1), 0.5)
    z = normal(1, 1, 8, 8)
    target = objective.bootstrap_target(oracles.gaussian_denoiser, z, one, half)
    student, _ = tau_.step(z, target, one, half)
    yield near(
        "student from tau = 1 with d = 1/2 ends at, of its input", _slope(student, z), oracles.TWO_HALF_STEPS, 1e-4
    )
    jump = oracles.bootstrapped_denoiser(objective.bootstrap_target, 1 / 64)(z, one, one)
    walk, _, _ = samplers.SAMPLERS["euler"](oracles.gaussian_denoiser, z, 64, tau_ctx=0.0, k_max=64)
    yield below("one jump of a perfect student against 64 steps: difference", gap(jump, walk), 1e-4)
    z_clean, noise = normal(2, 4, 6, 8, 8, seed=3)
    tau, d = forcing.FORCINGS["independent"](4, 6, 8, 0.1, torch.Generator().manual_seed(4))
    z_tau = oracles.paper_mix(z_clean, noise, tau)
    ours = objective.bootstrap_target(_curved, z_tau, tau, d)
    paper = oracles.paper_bootstrap_target(_curved, z_tau, tau, d)
    yield below("target against eq. 7 in the paper's direction: difference", relative(ours, paper), 1e-4)
    result = objective.shortcut_forcing_loss(_curved, z_clean, noise, tau, d, k_max=8)
    big = (d > 1 / 8)[..., None, None]
    kept = objective.bootstrap_target(_curved, z_tau, tau, d, big[..., 0, 0])
    error = (_curved(z_tau, tau, d) - torch.where(big, kept, z_clean)).square().mean((2, 3))
    yield near("loss against eq. 7 and 8: ratio", result.loss / (error * oracles.paper_ramp(tau)).mean(), 1, 1e-4)


def _curved(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
    """A denoiser that hears everything and is linear in nothing."""
    return torch.sin(z + 2 * d[..., None, None]) * torch.cos(tau[..., None, None])


def _slope(y: Tensor, x: Tensor) -> float:
    return ((x * y).sum() / x.square().sum()).item()
