"""The rollout: honest labels, K passes a frame, and the same numbers as recomputing the whole past every time."""

from __future__ import annotations

import pytest
import torch
from conftest import make_clip, random_actions

from ahriuwu_cli.evaluation.oracles import PerfectDynamics
from ahriuwu_cli.models.cache import ContextCache
from ahriuwu_cli.models.layers import rotary
from ahriuwu_cli.rollout import CTX_LABELS, CTX_MODES, KeyedNoise, RolloutConfig, rollout

K_MAX = 8
NAMES = ("first", "second")


class Recorder:
    """Passes everything on to a model and keeps what it was asked and what it said."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def new_cache(self, batch):
        return self.model.new_cache(batch)

    def extend(self, z_tau, tau, d, actions, known, cache, keep, unread=0):
        first = cache.frames
        z_hat = self.model.extend(z_tau, tau, d, actions, known, cache, keep)
        self.calls.append((first, (z_tau, tau, d, actions, known), keep, z_hat))
        return z_hat[:, unread:]


def generate(model, *, prompt_frames=3, length=8, config=None, noise=None, batch=2, prompt=None, actions=None):
    """A rollout on random latents and actions: (B, L, N, D)."""
    total = prompt_frames + length
    prompt = make_clip(batch=batch, frames=total).z_clean[:, :prompt_frames] if prompt is None else prompt
    actions = random_actions(batch, total, torch.Generator().manual_seed(4)) if actions is None else actions
    known = torch.ones(batch, total, dtype=torch.bool)
    known[:, 0] = False
    noise = noise or KeyedNoise(0, NAMES[:batch], (4, 8))
    frames = list(rollout(model, prompt, actions, known, config or RolloutConfig(), noise, K_MAX))
    assert len(frames) == length
    return torch.stack(frames, dim=1)


def perfect(frames, window=5):
    return PerfectDynamics(make_clip(frames=frames, seed=2).z_clean, window)


def imagine(model, prompt_frames, config, noise):
    """A rollout of the model that knows its clip by heart."""
    total = model.z_clean.shape[1]
    return generate(model, prompt_frames=prompt_frames, length=total - prompt_frames, config=config, noise=noise,
                    prompt=model.z_clean[:, :prompt_frames])  # fmt: skip


# Equal to recomputation


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"conditioning": "token", "registers": 2},
        {"conditioning": "modulate", "kv_heads": 2},
        {"time_every": 1, "depth": 3, "window": 3},
        {"time_attention": "frame"},
        {"time_attention": "frame", "conditioning": "token", "registers": 1, "kv_heads": 2, "window": 3},
    ],
    ids=lambda f: "-".join(f"{k}={v}" for k, v in f.items()) or "default",
)
@pytest.mark.parametrize("sampler", ["shortcut", "euler", "multistep", "renoise"])
def test_the_cached_rollout_equals_full_recomputation_five_windows_long(make_dynamics, fields, sampler):
    model = make_dynamics(**fields)
    recorder = Recorder(model)
    config = RolloutConfig(steps=2, sampler=sampler, ctx_mode="renoise" if sampler == "euler" else "stop")
    frames = generate(recorder, prompt_frames=2, length=5 * model.config.window, config=config)
    committed = []  # every committed frame, as it was committed
    for first, inputs, keep, z_hat in recorder.calls:
        assert first == len(committed)
        committed += [[x[:, i : i + 1] for x in inputs] for i in range(keep)]
        draft = [[x[:, i : i + 1] for x in inputs] for i in range(keep, inputs[0].shape[1])]
        whole = [torch.cat(parts, dim=1) for parts in zip(*committed, *draft, strict=True)]
        again = model(*whole)[:, first:]
        assert (z_hat - again).abs().max() < 1e-4 * again.square().mean().sqrt()
    assert torch.equal(frames[:, -1], recorder.calls[-1][3][:, -1])
    assert len(committed) == 2 + 5 * model.config.window - 1


def plainly(model, prompt, actions, known, tau_ctx, steps, noise):
    """The whole rollout again without a cache or a sampler of ours: the shortcut walk, passes over everything."""
    total, prompt_frames = actions.shape[1], prompt.shape[1]
    states = [(1 - tau_ctx) * prompt[:, t] + tau_ctx * noise(t, "prompt", 0) for t in range(prompt_frames)]
    shown = []
    for t in range(prompt_frames, total):
        z, level = noise(t, "start", 0), 1.0
        while level > tau_ctx + 1e-9:
            tau = torch.full((len(prompt), t + 1), tau_ctx)
            d = torch.full((len(prompt), t + 1), 1 / K_MAX)
            tau[:, t], d[:, t] = level, 1 / steps
            z_hat = model(torch.stack([*states, z], 1), tau, d, actions[:, : t + 1], known[:, : t + 1])[:, t]
            after = max(level - 1 / steps, tau_ctx)
            z = (1 - after) * z_hat + after * (z - (1 - level) * z_hat) / level
            level = after
        states.append(z)
        shown.append(z_hat)
    return torch.stack(shown, 1)


@pytest.mark.parametrize("tau_ctx", [0.0, 0.1, 0.3])
def test_the_rollout_equals_one_written_out_plainly(tiny_dynamics, tau_ctx):
    clip = make_clip(frames=14)
    noise = KeyedNoise(0, NAMES, (4, 8))
    config = RolloutConfig(steps=4, tau_ctx=tau_ctx)
    arguments = (clip.z_clean[:, :4], clip.actions, clip.known)
    ours = torch.stack(list(rollout(tiny_dynamics, *arguments, config, noise, K_MAX)), dim=1)
    torch.testing.assert_close(ours, plainly(tiny_dynamics, *arguments, tau_ctx, 4, noise), atol=1e-3, rtol=1e-3)


# Labels


@pytest.mark.parametrize("tau_ctx", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("sampler", ["shortcut", "euler"])
@pytest.mark.parametrize("prompt_frames", [1, 3, 9])
def test_every_label_is_the_level_that_the_frame_really_has(sampler, tau_ctx, prompt_frames):
    model, noise = perfect(12), KeyedNoise(0, NAMES, (4, 8))
    shown = imagine(model, prompt_frames, RolloutConfig(steps=4, sampler=sampler, tau_ctx=tau_ctx), noise)
    assert torch.equal(shown, model.z_clean[:, prompt_frames:])
    assert model.worst_label(lambda t: noise(t, "prompt" if t < prompt_frames else "start", 0)) < 1e-5
    for first, _, tau, d, keep in model.calls:
        assert tau[:, :keep] == pytest.approx(tau_ctx, abs=1e-6)
        assert (d[:, :keep] == 1 / K_MAX).all()
        told = 1 / 4 if sampler == "shortcut" else 1 / K_MAX
        assert (d[:, keep:] == told).all()
        assert first + keep <= 11  # the last frame is never committed


class Mislabelling(PerfectDynamics):
    """A copy that is told the labels of something else: what the check above must notice."""

    def __init__(self, z_clean, window, change):
        super().__init__(z_clean, window)
        self.change = change

    def extend(self, z_tau, tau, d, actions, known, cache, keep, unread=0):
        return super().extend(*self.change(z_tau, tau, keep), d, actions, known, cache, keep, unread)


@pytest.mark.parametrize(
    "change",
    [
        lambda z, tau, keep: (z, tau - 0.05 * torch.tensor([1.0] * keep + [0.0] * (z.shape[1] - keep))),
        lambda z, tau, keep: (z, torch.full_like(tau, float(tau[0, -1]))),
        lambda z, tau, keep: (z, torch.cat([tau[:, :keep], tau[:, keep:] - 0.25], dim=1)),
        lambda z, tau, keep: (torch.cat([z[:, :keep] / 0.9, z[:, keep:]], dim=1), tau),
    ],
    ids=["context label", "one label for all", "next level", "clean context labelled noisy"],
)
def test_a_wrong_label_is_caught(change):
    noise = KeyedNoise(0, NAMES, (4, 8))
    model = Mislabelling(perfect(8).z_clean, 5, change)
    imagine(model, 3, RolloutConfig(steps=4), noise)
    assert model.worst_label(lambda t: noise(t, "prompt" if t < 3 else "start", 0)) > 0.01


@pytest.mark.parametrize("ctx_mode", CTX_MODES)
@pytest.mark.parametrize("prompt_frames", [1, 3, 9])
def test_with_clean_labels_the_context_says_0_and_nothing_else_changes(prompt_frames, ctx_mode):
    calls = {}
    for label in CTX_LABELS:
        model, noise = perfect(12), KeyedNoise(0, NAMES, (4, 8))
        imagine(model, prompt_frames, RolloutConfig(steps=4, tau_ctx=0.3, ctx_mode=ctx_mode, ctx_label=label), noise)
        calls[label] = model.calls
    for honest, clean in zip(calls["honest"], calls["clean"], strict=True):
        keep = honest[4]
        assert torch.equal(honest[1], clean[1])  # the noise is there all the same
        assert torch.equal(honest[3], clean[3])
        assert honest[2][:, :keep] == pytest.approx(0.3)
        assert (clean[2][:, :keep] == 0).all()
        assert torch.equal(honest[2][:, keep:], clean[2][:, keep:])  # the frame being made is labelled as it is


def test_in_renoise_mode_the_context_is_the_prediction_with_fresh_noise_at_tau_ctx():
    model, noise = perfect(8), KeyedNoise(0, NAMES, (4, 8))
    imagine(model, 3, RolloutConfig(steps=4, tau_ctx=0.2, ctx_mode="renoise"), noise)
    for first, z, tau, _, keep in model.calls:
        for i in range(keep):
            t = first + i
            kind = "prompt" if t < 3 else "context"
            expected = 0.8 * model.z_clean[:, t] + 0.2 * noise(t, kind, 0)
            torch.testing.assert_close(z[:, i], expected, atol=1e-5, rtol=1e-5)
            assert tau[:, i] == pytest.approx(0.2)


def test_in_stop_mode_what_is_committed_is_the_state_at_tau_ctx_itself(tiny_dynamics):
    recorder = Recorder(tiny_dynamics)
    config = RolloutConfig(steps=1, tau_ctx=0.25)
    generate(recorder, prompt_frames=1, length=3, config=config)
    noise = KeyedNoise(0, NAMES, (4, 8))
    for (_, _, _, before), (_, inputs, keep, _) in zip(recorder.calls[:-1], recorder.calls[1:], strict=True):
        assert keep == 1
        t = recorder.calls.index(next(c for c in recorder.calls if c[3] is before)) + 1
        expected = 0.75 * before[:, -1] + 0.25 * noise(t, "start", 0)  # one step from pure noise to tau_ctx
        torch.testing.assert_close(inputs[0][:, 0], expected, atol=1e-5, rtol=1e-5)


# Passes


@pytest.mark.parametrize("ctx_mode", CTX_MODES)
@pytest.mark.parametrize(("prompt_frames", "prefill"), [(1, 0), (2, 1), (6, 1), (9, 4)])
def test_a_frame_costs_k_passes_after_the_prompt(prompt_frames, prefill, ctx_mode):
    model, noise = perfect(prompt_frames + 4), KeyedNoise(0, NAMES, (4, 8))
    imagine(model, prompt_frames, RolloutConfig(steps=4, ctx_mode=ctx_mode), noise)
    assert len(model.calls) == prefill + 4 * 4
    for i, (first, z, _, _, keep) in enumerate(model.calls[prefill:]):
        t = prompt_frames + i // 4
        rides = i % 4 == 0
        assert keep == int(rides)
        assert z.shape[1] == 1 + int(rides)
        assert first == (t - 1 if rides else t)


@pytest.mark.parametrize("prompt_frames", [1, 4, 5, 6, 7, 14])
def test_prompts_shorter_and_longer_than_the_window_are_committed_frame_by_frame_in_order(tiny_dynamics, prompt_frames):
    recorder = Recorder(tiny_dynamics)
    generate(recorder, prompt_frames=prompt_frames, length=2, config=RolloutConfig(steps=1))
    order = [first + i for first, _, keep, _ in recorder.calls for i in range(keep)]
    assert order == list(range(prompt_frames + 1))


# What the rollout answers to


def test_the_rollout_answers_to_tau_ctx_steps_sampler_mode_actions_and_noise(tiny_dynamics):
    base = generate(tiny_dynamics)
    other = random_actions(2, 11, torch.Generator().manual_seed(9))
    changed = [
        generate(tiny_dynamics, config=RolloutConfig(tau_ctx=0.2)),
        generate(tiny_dynamics, config=RolloutConfig(tau_ctx=0.12)),
        generate(tiny_dynamics, config=RolloutConfig(steps=2)),
        generate(tiny_dynamics, config=RolloutConfig(sampler="euler")),
        generate(tiny_dynamics, config=RolloutConfig(sampler="renoise")),
        generate(tiny_dynamics, config=RolloutConfig(ctx_mode="renoise")),
        generate(tiny_dynamics, config=RolloutConfig(ctx_label="clean")),
        generate(tiny_dynamics, actions=other),
        generate(tiny_dynamics, noise=KeyedNoise(1, NAMES, (4, 8))),
    ]
    for i, frames in enumerate(changed):
        assert (frames - base).abs().max() > 1e-3, i
    assert torch.equal(generate(tiny_dynamics), base)


def test_an_action_changes_the_frame_that_it_leads_to_and_none_before(tiny_dynamics):
    actions = random_actions(2, 11, torch.Generator().manual_seed(4))
    base = generate(tiny_dynamics, actions=actions)
    actions = actions.clone()
    actions[:, 7, 0] = 1 - actions[:, 7, 0]  # incoming to frame 7, the fifth that is generated
    moved = (generate(tiny_dynamics, actions=actions) - base).abs().amax(dim=(0, 2, 3))
    assert (moved[:4] == 0).all()
    assert (moved[4:] > 1e-5).all()


def test_frames_are_yielded_one_by_one_as_they_are_made():
    model, noise = perfect(8), KeyedNoise(0, NAMES, (4, 8))
    stream = rollout(model, model.z_clean[:, :3], torch.zeros(2, 8, 4), torch.ones(2, 8, dtype=torch.bool),
                     RolloutConfig(steps=2), noise, K_MAX)  # fmt: skip
    assert next(stream).shape == (2, 4, 8)
    assert len(model.calls) == 1 + 2
    assert torch.equal(next(stream), model.z_clean[:, 4])
    assert len(model.calls) == 1 + 4


# Keyed noise


def test_every_noise_is_asked_for_once_by_frame_purpose_and_step():
    def keys_of(**settings):
        asked = []
        keyed = KeyedNoise(0, NAMES, (4, 8))

        def noise(frame, purpose, step=0):
            asked.append((frame, purpose, step))
            return keyed(frame, purpose, step)

        imagine(perfect(4), 2, RolloutConfig(steps=2, **settings), noise)
        return asked

    prompt = [(0, "prompt", 0), (1, "prompt", 0)]
    assert keys_of() == [*prompt, (2, "start", 0), (3, "start", 0)]
    context = [(2, "start", 0), (2, "context", 0), (3, "start", 0), (3, "context", 0)]
    assert keys_of(ctx_mode="renoise") == prompt + context
    fresh = [(t, *key) for t in (2, 3) for key in (("start", 0), ("renoise", 0), ("renoise", 1))]
    assert keys_of(sampler="renoise") == prompt + fresh


def test_keyed_noise_depends_on_its_key_and_on_nothing_else():
    both, swapped = KeyedNoise(3, ["a", "b"], (4, 8)), KeyedNoise(3, ["b", "a"], (4, 8))
    alone = KeyedNoise(3, ["b"], (4, 8))
    for key in [(0, "start", 0), (5, "prompt", 0), (5, "renoise", 2)]:
        assert torch.equal(both(*key)[1], alone(*key)[0])
        assert torch.equal(both(*key).flip(0), swapped(*key))
        assert torch.equal(both(*key), both(*key))
    draws = [both(f, p, s) for f in (0, 1) for p in ("start", "prompt") for s in (0, 1)]
    draws += [KeyedNoise(4, ["a", "b"], (4, 8))(0, "start", 0)]
    rows = torch.cat(draws).flatten(1)
    assert len({tuple(r.tolist()) for r in rows}) == len(rows)


def test_keyed_noise_is_standard_normal():
    noise = KeyedNoise(0, [str(i) for i in range(50)], (16, 32))(0, "start")
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_a_window_is_imagined_the_same_alone_and_in_a_batch(tiny_dynamics):
    clip = make_clip(frames=9)
    both = torch.stack(
        list(rollout(tiny_dynamics, clip.z_clean[:, :3], clip.actions, clip.known, RolloutConfig(),
                     KeyedNoise(0, NAMES, (4, 8)), K_MAX)), dim=1)  # fmt: skip
    alone = torch.stack(
        list(rollout(tiny_dynamics, clip.z_clean[1:, :3], clip.actions[1:], clip.known[1:], RolloutConfig(),
                     KeyedNoise(0, NAMES[1:], (4, 8)), K_MAX)), dim=1)  # fmt: skip
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


# The ring of the cache, against a list that is simply cut off


@pytest.mark.parametrize("window", [2, 3, 5])
def test_the_ring_shows_a_frame_exactly_the_window_that_ends_with_itself(window):
    cache = ContextCache(window, 1, (1, 1, 1, 2), lambda positions: rotary(positions, 2), torch.zeros(1))
    holds = {}  # slot -> frame
    for now in range(4 * window):
        for count, keep in ((1, 0), (2, 1)):  # a pass over the next frame, then a commit with a frame riding behind
            slots = cache.slots(count, keep)
            trial = dict(holds)
            for i, slot in enumerate(slots):
                trial[slot] = now + i
            places, bias = cache.look(count, keep)
            assert places.tolist() == slots
            mask = bias == 0
            for i in range(count):
                seen = sorted(trial[s] for s in range(window + 1) if mask[i, s])
                assert seen == list(range(max(0, now + i - window + 1), now + i + 1)), (now, i, keep)
        holds[cache.slots(1, 1)[0]] = now
        cache.frames += 1
    assert cache.keys.shape == (1, 1, 1, window + 1, 2)
