"""`ahriuwu verify`: the review's seven findings as numbers, and what a trained world does when its inputs change.

`verify_mathematics` runs our own functions against `evaluation.oracles`; `verify_world` questions one model. Every
check carries the measured value, what was expected in words, and whether it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.diffusion import forcing, objective, samplers
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation import oracles
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, rollout
from ahriuwu_cli.world import World

# An input counts as heard when changing it moves the output by this share of the output's own size (both RMS). A copy
# that ignores the input measures 0 and rounding stays near 1e-6, so a thousandth says "not ignored". It does not say
# "used well": that is what `ahriuwu eval` measures.
HEARD = 1e-3
CACHE_TOLERANCE = 1e-4  # relative to the output's RMS
WINDOWS = 8  # clips that a world is questioned on


@dataclass(frozen=True)
class Check:
    """One line of the table. `finding` is the review's number and subject, or "model"."""

    finding: str
    name: str
    measured: float
    expected: str
    ok: bool


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
    return [Check(name, *line) for name, part in zip(names, parts, strict=True) for line in part()]


Line = tuple[str, float, str, bool]  # name, measured, expected, ok


def _near(name: str, measured: float | Tensor, wanted: float, slack: float) -> Line:
    measured = float(measured)
    return name, measured, f"{wanted:g} +- {slack:g}", abs(measured - wanted) <= slack


def _below(name: str, measured: float | Tensor, bound: float) -> Line:
    measured = float(measured)
    return name, measured, f"below {bound:g}", measured < bound


def _above(name: str, measured: float | Tensor, bound: float) -> Line:
    measured = float(measured)
    return name, measured, f"above {bound:g}", measured > bound


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _schedule() -> Iterator[Line]:
    z_clean, noise = _normal(2, 4, 8, 16, 8)
    tau = torch.rand(4, 8, generator=torch.Generator().manual_seed(1))
    clean, pure = torch.zeros(4, 8), torch.ones(4, 8)
    z_tau = tau_.add_noise(z_clean, noise, tau)
    yield _near("tau = 0 is the clean latent: difference", _gap(tau_.add_noise(z_clean, noise, clean), z_clean), 0, 0)
    yield _near("tau = 1 is pure noise: difference", _gap(tau_.add_noise(z_clean, noise, pure), noise), 0, 0)
    yield _below(
        "eq. 1 in the paper's direction: difference", _gap(z_tau, oracles.paper_mix(z_clean, noise, tau)), 1e-5
    )
    wanted = noise - z_clean
    yield _below(
        "velocity is noise minus clean: difference", _relative(tau_.velocity(z_tau, z_clean, tau), wanted), 1e-3
    )


def _ramp() -> Iterator[Line]:
    z_clean, noise = _normal(2, 1, 11, 64, 64)
    tau = torch.linspace(0, 1, 11)[None]
    weight = objective.ramp_weight(tau)
    yield _near("weight of a clean frame", weight[0, 0], 1.0, 1e-6)
    yield _near("weight of pure noise", weight[0, -1], 0.1, 1e-6)
    yield _below("eq. 8 in the paper's direction: difference", _gap(weight, oracles.paper_ramp(tau)), 1e-6)
    z_tau = tau_.add_noise(z_clean, noise, tau)
    likeness = torch.stack(
        [torch.corrcoef(torch.stack([z_tau[0, t].flatten(), z_clean[0, t].flatten()]))[0, 1] for t in range(11)]
    )
    together = torch.corrcoef(torch.stack([likeness, weight[0]]))[0, 1]
    yield _above("weight rises with likeness to the clean latent: r", together, 0.9)


def _x_prediction() -> Iterator[Line]:
    z_hat, target = _normal(2, 3, 5, 4, 6)
    tau = torch.rand(3, 5, generator=torch.Generator().manual_seed(2))
    by_hand = sum(
        (z_hat[b, t] - target[b, t]).square().sum() / 24 * (0.9 * (1 - tau[b, t]) + 0.1)
        for b in range(3)
        for t in range(5)
    )
    total = objective.x_prediction_loss(z_hat, target, tau, reduce="sum")
    mean = objective.x_prediction_loss(z_hat, target, tau)
    yield _near("sum over frames against a hand-written one: ratio", total / by_hand, 1, 1e-5)
    yield _near("mean over frames against a hand-written one: ratio", mean / by_hand * 15, 1, 1e-5)
    yield _near("loss of the true clean latent", objective.x_prediction_loss(target, target, tau), 0, 0)
    ends = objective.x_prediction_loss(target, target + 1, torch.arange(2.0).expand(3, 2)[:, :1].repeat(1, 5))
    noisy = objective.x_prediction_loss(target, target + 1, torch.ones(3, 5))
    yield _near("a clean frame's error against the same on noise: ratio", ends / noisy, 10, 1e-3)


def _forcing() -> Iterator[Line]:
    k_max, frames, clips = 64, 12, 4000
    draw = torch.Generator().manual_seed(0)
    tau, d = forcing.FORCINGS["independent"](clips, frames, k_max, tau_.TAU_CTX, draw)
    sizes = [2.0**-i for i in range(7)]
    counts = torch.tensor([(d == s).sum() for s in sizes]).double()
    expected = clips * frames / 7
    yield _below("independent: chi-square of d over 7 sizes", ((counts - expected) ** 2 / expected).sum(), 27.9)
    yield _near("independent: share of pure noise", (tau == 1).float().mean(), sum(sizes) / 7, 0.01)
    yield _near("independent: least tau / d", (tau / d).min(), 1, 0)
    lag = torch.corrcoef(torch.stack([tau[:, :-1].flatten(), tau[:, 1:].flatten()]))[0, 1]
    yield _near("independent: correlation of neighbouring frames", lag, 0, 0.025)
    yield _above("independent: rarest (position, tau bin)", forcing.coverage(tau).min(), 0.02)
    draw = torch.Generator().manual_seed(0)
    tau, _ = forcing.FORCINGS["horizon"](clips, frames, k_max, 0.1, draw)
    most = torch.tensor([oracles.horizon_ceiling(p, frames, 0.1) for p in range(frames)])
    yield _below("horizon: most noise by position, against the formula", _gap(tau.amax(0), most), 1e-5)
    yield _near("horizon: tau of the first frame that can be a target", tau[:, 1].max(), 0.1, 1e-6)
    idle = (tau <= 0.1 + 1e-6).all(1).float().mean()
    yield _near("horizon: share of clips without a noisy frame", idle, 1 / (frames - 1), 0.02)
    starved = (forcing.coverage(tau)[1:] == 0).float().mean()
    yield _above("horizon: share of (position, tau bin) never drawn", starved, 0.3)


def _euler() -> Iterator[Line]:
    noise = _normal(1, 1, 100, 400)
    for name, wanted in (("euler", oracles.SPREAD_EULER), ("renoise", oracles.SPREAD_FRESH_NOISE)):
        for steps, spread in zip(oracles.SPREAD_STEPS, wanted, strict=True):
            z_hat, _, _ = samplers.SAMPLERS[name](
                oracles.gaussian_denoiser,
                noise,
                steps,
                tau_ctx=0.0,
                k_max=64,
                generator=torch.Generator().manual_seed(1),
            )
            yield _near(f"{name}, K = {steps}: spread of samples of N(0, 1)", z_hat.std(), spread, 0.015)


def _stop() -> Iterator[Line]:
    z_clean, noise = _normal(2, 1, 1, 16, 16)
    for name in ("euler", "shortcut"):
        worst_end, spy = 0.0, oracles.LabelSpy(z_clean, noise)
        for tau_ctx in (0.0, 0.02, 0.1, 0.25, 0.3, 0.5, 0.9):
            z_hat, z_end, tau_end = samplers.SAMPLERS[name](spy, noise, 4, tau_ctx=tau_ctx, k_max=64)
            state = oracles.paper_mix(z_clean, noise, torch.full((1, 1), tau_ctx))
            worst_end = max(worst_end, abs(tau_end - tau_ctx), _gap(z_end, state), _gap(z_hat, z_clean))
        yield _below(f"{name}: end of the walk against tau_ctx", worst_end, 1e-5)
        yield _below(f"{name}: content of every call against its label", spy.worst, 1e-5)
        told = 1 / 64 if name == "euler" else 1 / 4
        yield _near(f"{name}: step size told, K = 4", max(spy.sizes), told, 0)


def _bootstrap() -> Iterator[Line]:
    one, half = torch.ones(1, 1), torch.full((1, 1), 0.5)
    z = _normal(1, 1, 8, 8)
    target = objective.bootstrap_target(oracles.gaussian_denoiser, z, one, half)
    student, _ = tau_.step(z, target, one, half)
    yield _near(
        "student from tau = 1 with d = 1/2 ends at, of its input", _slope(student, z), oracles.TWO_HALF_STEPS, 1e-4
    )
    jump = oracles.bootstrapped_denoiser(objective.bootstrap_target, 1 / 64)(z, one, one)
    walk, _, _ = samplers.SAMPLERS["euler"](oracles.gaussian_denoiser, z, 64, tau_ctx=0.0, k_max=64)
    yield _below("one jump of a perfect student against 64 steps: difference", _gap(jump, walk), 1e-4)
    z_clean, noise = _normal(2, 4, 6, 8, 8, seed=3)
    tau, d = forcing.FORCINGS["independent"](4, 6, 8, 0.1, torch.Generator().manual_seed(4))
    z_tau = oracles.paper_mix(z_clean, noise, tau)
    ours = objective.bootstrap_target(_curved, z_tau, tau, d)
    paper = oracles.paper_bootstrap_target(_curved, z_tau, tau, d)
    yield _below("target against eq. 7 in the paper's direction: difference", _relative(ours, paper), 1e-4)
    result = objective.shortcut_forcing_loss(_curved, z_clean, noise, tau, d, k_max=8)
    big = (d > 1 / 8)[..., None, None]
    kept = objective.bootstrap_target(_curved, z_tau, tau, d, big[..., 0, 0])
    error = (_curved(z_tau, tau, d) - torch.where(big, kept, z_clean)).square().mean((2, 3))
    yield _near("loss against eq. 7 and 8: ratio", result.loss / (error * oracles.paper_ramp(tau)).mean(), 1, 1e-4)


def _curved(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
    """A denoiser that hears everything and is linear in nothing."""
    return torch.sin(z + 2 * d[..., None, None]) * torch.cos(tau[..., None, None])


def verify_world(world: World, store: EpisodeStore | None = None, seed: int = 0) -> list[Check]:
    """Question one world: does its output hear d, tau, action and context; is it finite; does its cache agree?

    With a store the clips are real windows of its val split (DataError when they do not fit); without one, latents are
    drawn from N(0, 1) and actions from the action space.
    """
    with torch.no_grad():
        clips = _synthetic_clips(world, seed) if store is None else _real_clips(world, store, seed)
        parts = (_sensitivities, _finite, _cache, _labels, _tokenizer)
        return [Check("model", *line) for part in parts for line in part(world, clips)]


@dataclass(frozen=True)
class _Clips:
    """Clips to question a world on: clean latents and noise (B, T, N, D), incoming actions (B, T, A), known (B, T)."""

    z_clean: Tensor
    noise: Tensor
    actions: Tensor
    known: Tensor
    frames: Tensor | None  # (B, T, H, W, 3) uint8 where the clips are real

    def ask(self, world: World, **other: Tensor) -> Tensor:
        """z_hat (B, N, D) of the last frame, the context at tau_ctx and the last frame at pure noise unless told else.

        other: tau or d of the last frame (a float), its state's level `mixed` (a float), actions, context (latents).
        """
        shape, device = self.z_clean.shape[:2], self.z_clean.device
        tau = torch.full(shape, world.generation.tau_ctx, device=device)
        d = torch.full(shape, 1 / world.k_max, device=device)
        tau[:, -1] = other.get("mixed", 1.0)
        z_clean = torch.cat([other.get("context", self.z_clean)[:, :-1], self.z_clean[:, -1:]], dim=1)
        z_tau = tau_.add_noise(z_clean, self.noise, tau)
        tau[:, -1], d[:, -1] = other.get("tau", other.get("mixed", 1.0)), other.get("d", 1 / world.k_max)
        actions = other.get("actions", self.actions)
        return world.dynamics(z_tau, tau, d, actions, self.known)[:, -1]


def _sensitivities(world: World, clips: _Clips) -> Iterator[Line]:
    trained = sorted(world.trained_d)
    base = clips.ask(world, d=trained[0])
    if len(trained) > 1:
        told = [clips.ask(world, d=d) for d in trained]
        for coarse, fine, d in zip(told[1:], told[:-1], trained[1:], strict=True):
            label = f"d = 1/{round(1 / d)} against d = 1/{round(2 / d)}: change of output"
            yield _above(label, _relative(coarse, fine), HEARD)
    else:
        yield "d: sizes trained", 1.0, "one, so there is nothing to tell apart", True
    for mixed, wrong in ((1.0, 0.5), (0.5, 0.25)):
        right, other = clips.ask(world, mixed=mixed), clips.ask(world, mixed=mixed, tau=wrong)
        yield _above(f"state at tau = {mixed:g} labelled {wrong:g}: change of output", _relative(other, right), HEARD)
    for name, actions in _other_actions(world, clips.actions):
        changed = _relative(clips.ask(world, d=trained[0], actions=actions), base)
        yield _above(f"another action ({name}): change of output", changed, HEARD)
    elsewhere = clips.ask(world, d=trained[0], context=clips.z_clean.roll(1, 0))
    yield _above("another clip's context: change of output", _relative(elsewhere, base), HEARD)


def _other_actions(world: World, actions: Tensor) -> Iterator[tuple[str, Tensor]]:
    """For each component of the action space, the same rows with that component of the last one changed."""
    for component, columns in world.action_space.slices():
        changed = actions.clone()
        values = changed[:, -1, columns]
        if component.kind == "binary":
            values = 1 - values
        elif component.kind == "discrete":
            values = (values + 1) % component.size
        else:
            low, high = (torch.tensor(x, device=values.device) for x in (component.low, component.high))
            values = torch.where(values > (low + high) / 2, low, high)
        changed[:, -1, columns] = values
        if component.kind != "discrete" or component.size > 1:
            yield component.name, changed


def _finite(world: World, clips: _Clips) -> Iterator[Line]:
    bad = 0
    for d in world.trained_d:
        for i in (1, 2, 4):
            level = tau_.between(1.0, world.generation.tau_ctx, i / 4)
            bad += int((~torch.isfinite(clips.ask(world, d=d, mixed=level))).sum())
        bad += int((~torch.isfinite(clips.ask(world, d=d))).sum())
    yield _near("outputs that are not finite", bad, 0, 0)


def _cache(world: World, clips: _Clips) -> Iterator[Line]:
    """Frame by frame through the cache, two windows and a bit long, against one pass over everything."""
    frames = 2 * world.dynamics.config.window + 1
    order = torch.arange(frames, device=clips.z_clean.device) % clips.z_clean.shape[1]
    d = torch.full((2, frames), 1 / world.k_max, device=order.device)
    tau = torch.full_like(d, world.generation.tau_ctx)
    z_tau = tau_.add_noise(clips.z_clean[:2, order], clips.noise[:2, order], tau)
    inputs = (z_tau, tau, d, clips.actions[:2, order], clips.known[:2, order])
    whole = world.dynamics(*inputs)
    cache, parts = world.dynamics.new_cache(2), []
    for t in range(frames):
        parts.append(world.dynamics.extend(*(x[:, t : t + 1] for x in inputs), cache, keep=1))
    difference = (torch.cat(parts, dim=1) - whole).abs().max() / _rms(whole)
    yield _below("cache against recomputation, two windows long: difference", difference, CACHE_TOLERANCE)


def _labels(world: World, clips: _Clips) -> Iterator[Line]:
    """A rollout with this world's own settings, in which a model that knows the clip by heart stands in for it."""
    z_clean = clips.z_clean.cpu()
    frames, prompt = z_clean.shape[1], max(1, z_clean.shape[1] // 2)
    noise = KeyedNoise(0, [str(i) for i in range(len(z_clean))], tuple(z_clean.shape[2:]))
    perfect = oracles.PerfectDynamics(z_clean, world.dynamics.config.window)
    settings = world.generation
    if settings.sampler == "renoise" or settings.ctx_mode == "renoise":
        yield "labels of a rollout", math.nan, "not read off: fresh noise is drawn by these settings", True
        return
    shown = rollout(perfect, z_clean[:, :prompt], clips.actions.cpu(), clips.known.cpu(), settings, noise, world.k_max)
    assert len(list(shown)) == frames - prompt
    worst = perfect.worst_label(lambda t: noise(t, "prompt" if t < prompt else "start", 0))
    yield _below("content of every frame of a rollout against its label", worst, 1e-4)


def _tokenizer(world: World, clips: _Clips) -> Iterator[Line]:
    frames = world.decode(clips.z_clean) if clips.frames is None else clips.frames
    again = world.decode(world.encode(frames))
    if clips.frames is None:
        ok = tuple(again.shape) == tuple(frames.shape)
        yield "tokenizer, frames of synthetic latents and back: PSNR (dB)", _psnr(again, frames), "same shape", ok
        return
    blank = frames.float().mean(dim=(0, 1), keepdim=True).expand(frames.shape)
    floor = _psnr(blank, frames)
    yield _above("tokenizer, frames and back: PSNR (dB), above the mean frame's", _psnr(again, frames), round(floor, 2))


def _synthetic_clips(world: World, seed: int) -> _Clips:
    import numpy as np

    config = world.dynamics.config
    z_clean, noise = _normal(2, WINDOWS, config.window, config.tokens, config.latent_dim, seed=seed)
    rng = np.random.default_rng(seed)
    rows = [world.action_space.random(config.window - 1, (1, 3), rng) for _ in range(WINDOWS)]
    return _clips(world, z_clean, noise, torch.from_numpy(np.stack(rows)), None)


def _real_clips(world: World, store: EpisodeStore, seed: int) -> _Clips:
    import numpy as np

    tokenizer = world.tokenizer
    if (store.height, store.width) != (tokenizer.height, tokenizer.width):
        raise DataError(
            f"{store.path} has frames of {store.height}x{store.width}, but this world was trained on "
            f"{tokenizer.height}x{tokenizer.width}: give a dataset of that size"
        )
    if world.action_space.width and store.action_space.to_json() != world.action_space.to_json():
        raise DataError(f"{store.path} has other actions than this world was trained with: give a dataset of the same")
    lengths = {e.id: e.frames for e in store.episodes("val") if e.labelled or not world.action_space.width}
    if not lengths:
        raise DataError(f"{store.path} has no val episode to take windows from: record more episodes")
    frames = min(world.dynamics.config.window, max(lengths.values()))
    room = sum(max(0, n - frames + 1) for n in lengths.values())
    if frames < 2 or room < 2:
        raise DataError(f"the val episodes of {store.path} are too short to question a world on: record longer ones")
    windows = draw_windows(lengths, frames, min(WINDOWS, room), seed)
    pixels = torch.from_numpy(np.stack([store.frames(e, s, s + frames) for e, s in windows]))
    if world.action_space.width:
        rows = torch.from_numpy(np.stack([store.actions(e, s, s + frames - 1) for e, s in windows]))
    else:
        rows = torch.zeros(len(windows), frames - 1, 0)
    z_clean = world.encode(pixels).float()
    return _clips(world, z_clean, _normal(*z_clean.shape, seed=seed), rows, pixels)


def _clips(world: World, z_clean: Tensor, noise: Tensor, actions: Tensor, frames: Tensor | None) -> _Clips:
    labelled = torch.full((len(z_clean),), bool(world.action_space.width))
    incoming, known = incoming_actions(actions, labelled)
    return _Clips(*(x.to(world.device) for x in (z_clean, noise, incoming, known)), frames)


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


def _gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over the RMS of b."""
    return (_rms(a - b) / _rms(b)).item()


def _slope(y: Tensor, x: Tensor) -> float:
    return ((x * y).sum() / x.square().sum()).item()


def _psnr(a: Tensor, b: Tensor) -> float:
    """Of uint8 values, capped at 100 dB."""
    error = ((a.float() - b.float()) / 255).square().mean().item()
    return 100.0 if error < 1e-10 else -10 * math.log10(error)


def as_table(checks: list[Check]) -> str:
    """Aligned text: finding, check, measured, expected, ok."""
    rows = [("finding", "check", "measured", "expected", "ok")]
    rows += [(c.finding, c.name, f"{c.measured:.4g}", c.expected, "ok" if c.ok else "FAIL") for c in checks]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
