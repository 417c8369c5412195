"""Questions to one trained world: does its output hear d, tau, actions and context; is it finite; does its cache agree?

The second half of `ahriuwu verify`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation import oracles
from ahriuwu_cli.evaluation.checks import Check, Line, above, below, near, normal, relative, rms
from ahriuwu_cli.evaluation.metrics import psnr_of_mse
from ahriuwu_cli.models import needs
from ahriuwu_cli.models.dynamics import Dynamics, incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, rollout
from ahriuwu_cli.world import World

# An input counts as heard when changing it moves the output by this share of the output's own size (both RMS). A copy
# that ignores the input measures 0 and rounding stays near 1e-6, so a thousandth says "not ignored". It does not say
# "used well": that is what `ahriuwu eval` measures.
HEARD = 1e-3
CACHE_TOLERANCE = 1e-4  # relative to the output's RMS
PASSES = 64  # of a frame at most, where a clip's own latents stand in for a model's, which keeps its inputs
COMPONENTS = 16  # of an action space that are asked about, at most
WINDOWS = 8  # clips that a world is questioned on


def verify_world(world: World, store: EpisodeStore | None = None, seed: int = 0) -> list[Check]:
    """Question one world: does its output hear d, tau, action and context; is it finite; does its cache agree?

    With a store the clips are real windows of its val split (DataError when they do not fit); without one, latents are
    drawn from N(0, 1) and actions from the action space.
    """
    if isinstance(world.dynamics, Dynamics):  # not what stands in for one, and takes no memory
        needs.refuse_beyond_machine(_frames_at_once(world) * needs.of_a_frame(world.dynamics.config), world.device)
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

    def ask(
        self,
        world: World,
        *,
        d: float,
        mixed: float = 1.0,
        label: float | None = None,
        actions: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """z_hat (B, N, D) of the last frame, told d, its state mixed at one level and labelled with that or another.

        The frames before it are at tau_ctx, as in a rollout, and may be another clip's `context`.
        """
        shape, device = self.z_clean.shape[:2], self.z_clean.device
        tau = torch.full(shape, world.generation.tau_ctx, device=device)
        sizes = torch.full(shape, 1 / world.k_max, device=device)
        tau[:, -1], sizes[:, -1] = mixed, d
        before = self.z_clean if context is None else context
        z_clean = torch.cat([before[:, :-1], self.z_clean[:, -1:]], dim=1)
        z_tau = tau_.add_noise(z_clean, self.noise, tau)
        tau[:, -1] = mixed if label is None else label
        return world.dynamics(z_tau, tau, sizes, self.actions if actions is None else actions, self.known)[:, -1]


def _sensitivities(world: World, clips: _Clips) -> Iterator[Line]:
    trained = sorted(world.trained_d)
    base = clips.ask(world, d=trained[0])
    if len(trained) > 1:  # neighbours may rightly be close, the ends may not
        coarse, told = clips.ask(world, d=trained[-1]), [round(1 / d) for d in (trained[-1], trained[0])]
        yield above(f"d = 1/{told[0]} against d = 1/{told[1]}: change of output", relative(coarse, base), HEARD)
    else:
        yield "d: sizes trained", 1.0, "one, so there is nothing to tell apart", True
    for mixed, wrong in ((1.0, 0.5), (0.5, 0.25)):
        right, other = (clips.ask(world, d=trained[0], mixed=mixed, label=x) for x in (mixed, wrong))
        yield above(f"state at tau = {mixed:g} labelled {wrong:g}: change of output", relative(other, right), HEARD)
    for name, actions in _other_actions(world, clips.actions):
        changed = relative(clips.ask(world, d=trained[0], actions=actions), base)
        yield above(f"another action ({name}): change of output", changed, HEARD)
    elsewhere = clips.ask(world, d=trained[0], context=clips.z_clean.roll(1, 0))
    yield above("another clip's context: change of output", relative(elsewhere, base), HEARD)


def _other_actions(world: World, actions: Tensor) -> Iterator[tuple[str, Tensor]]:
    """For each of the first COMPONENTS of the action space, the same rows with that one of the last row changed."""
    for component, columns in islice(world.action_space.slices(), COMPONENTS):
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
    yield near("outputs that are not finite", bad, 0, 0)


def _beyond_windows(world: World) -> int:
    """Frames that a cache is asked about: two windows and a bit."""
    return 2 * world.dynamics.config.window + 1


def _frames_at_once(world: World) -> int:
    """The most frames, of all clips together, that one of the questions has in a pass."""
    return max(WINDOWS * world.dynamics.config.window, 2 * _beyond_windows(world))


def _cache(world: World, clips: _Clips) -> Iterator[Line]:
    """Frame by frame through the cache, two windows and a bit long, against one pass over everything."""
    frames = _beyond_windows(world)
    order = torch.arange(frames, device=clips.z_clean.device) % clips.z_clean.shape[1]
    d = torch.full((2, frames), 1 / world.k_max, device=order.device)
    tau = torch.full_like(d, world.generation.tau_ctx)
    z_tau = tau_.add_noise(clips.z_clean[:2, order], clips.noise[:2, order], tau)
    inputs = (z_tau, tau, d, clips.actions[:2, order], clips.known[:2, order])
    whole = world.dynamics(*inputs)
    cache, parts = world.dynamics.new_cache(2), []
    for t in range(frames):
        parts.append(world.dynamics.extend(*(x[:, t : t + 1] for x in inputs), cache, keep=1))
    difference = (torch.cat(parts, dim=1) - whole).abs().max() / rms(whole)
    yield below("cache against recomputation, two windows long: difference", difference, CACHE_TOLERANCE)


def _labels(world: World, clips: _Clips) -> Iterator[Line]:
    """A rollout with this world's own settings, in which a model that knows the clip by heart stands in for it."""
    z_clean = clips.z_clean.cpu()
    frames, prompt = z_clean.shape[1], max(1, z_clean.shape[1] // 2)
    noise = KeyedNoise(0, [str(i) for i in range(len(z_clean))], tuple(z_clean.shape[2:]))
    perfect = oracles.PerfectDynamics(z_clean, world.dynamics.config.window)
    settings = replace(world.generation, steps=min(world.generation.steps, PASSES))
    if settings.sampler == "renoise" or settings.ctx_mode == "renoise":
        yield "labels of a rollout", math.nan, "not read off: fresh noise is drawn by these settings", True
        return
    shown = rollout(perfect, z_clean[:, :prompt], clips.actions.cpu(), clips.known.cpu(), settings, noise, world.k_max)
    made, worst = 0, 0.0
    for _ in shown:
        worst = max(worst, perfect.worst_label(lambda t: noise(t, "prompt" if t < prompt else "start", 0)))
        perfect.calls.clear()  # of one frame at a time
        made += 1
    assert made == frames - prompt
    yield below("content of every frame of a rollout against its label", worst, 1e-4)


def _tokenizer(world: World, clips: _Clips) -> Iterator[Line]:
    some = max(1, needs.AT_ONCE // (3 * WINDOWS * world.tokenizer.height * world.tokenizer.width))  # of large frames
    frames = world.decode(clips.z_clean[:, :some]) if clips.frames is None else clips.frames[:, :some]
    again = world.decode(world.encode(frames))
    if clips.frames is None:
        ok = tuple(again.shape) == tuple(frames.shape)
        yield "tokenizer, frames of synthetic latents and back: PSNR (dB)", psnr_of_mse(again, frames), "same shape", ok
        return
    mean = frames.float().mean(dim=(0, 1), keepdim=True).round().to(torch.uint8).expand(frames.shape)
    floor = round(psnr_of_mse(mean, frames), 2)
    yield above("tokenizer, frames and back: PSNR (dB), above the mean frame's", psnr_of_mse(again, frames), floor)


def _synthetic_clips(world: World, seed: int) -> _Clips:
    import numpy as np

    config = world.dynamics.config
    z_clean, noise = normal(2, WINDOWS, config.window, config.tokens, config.latent_dim, seed=seed)
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
    return _clips(world, z_clean, normal(*z_clean.shape, seed=seed), rows, pixels)


def _clips(world: World, z_clean: Tensor, noise: Tensor, actions: Tensor, frames: Tensor | None) -> _Clips:
    labelled = torch.full((len(z_clean),), bool(world.action_space.width))
    incoming, known = incoming_actions(actions, labelled)
    return _Clips(*(x.to(world.device) for x in (z_clean, noise, incoming, known)), frames)
