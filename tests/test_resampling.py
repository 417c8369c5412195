"""Pasts of a model's own making: against a perfect model, against whole clips, and where nothing may change."""

from __future__ import annotations

import pytest
import torch
from conftest import make_clip
from test_dynamics import VARIANTS, named

from ahriuwu_cli.diffusion.forcing import true_copies, walked_copies
from ahriuwu_cli.diffusion.tau import add_noise, step
from ahriuwu_cli.models.dynamics import Past
from ahriuwu_cli.training.resampling import STEPS, resampled

FRAMES, TAU_CTX = 8, 0.125


def start_of(model, tau, seed=5):
    """(clean latents, their noise, copies of them at levels tau) for a clip of this model's shape."""
    c, generator = model.config, torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(*tau.shape, c.tokens, c.latent_dim, generator=generator) for _ in range(2))
    return clean, noise, Past(add_noise(clean, noise, tau), tau, torch.full_like(tau, 1 / c.k_max))


def levels(batch, seed=3):
    return walked_copies(batch, FRAMES, 64, TAU_CTX, torch.Generator().manual_seed(seed))


class Perfect:
    """A model that knows the clean latents of the frame that it is asked for."""

    def __init__(self, clean):
        self.clean, self.frame, self.told = clean, 0, []

    def new_cache(self, batch):
        return None

    def extend(self, z_tau, tau, d, actions, known, cache, keep, unread=0):
        self.told.append((tau[:, -1], d[:, -1]))
        self.frame += keep
        return self.clean[:, self.frame : self.frame + 1]


def test_a_perfect_model_walks_every_copy_to_the_true_one(make_dynamics):
    model = make_dynamics()
    tau = levels(32)
    clean, noise, start = start_of(model, tau)
    perfect = Perfect(clean)
    past = resampled(perfect, start, torch.zeros(32, FRAMES, 1), torch.ones(32, FRAMES), TAU_CTX)
    torch.testing.assert_close(past.z[:, :-1], add_noise(clean, noise, TAU_CTX)[:, :-1], atol=1e-5, rtol=1e-5)
    assert bool((past.tau == TAU_CTX).all())
    assert torch.equal(past.d, start.d)
    assert len(perfect.told) == STEPS * (FRAMES - 2)
    for i, (told, d) in enumerate(perfect.told):
        t, step_ = divmod(i, STEPS)
        torch.testing.assert_close(told, tau[:, t + 1] + (TAU_CTX - tau[:, t + 1]) * step_ / STEPS)
        assert bool((d == 1 / model.config.k_max).all())


@pytest.mark.parametrize("fields", VARIANTS, ids=named)
def test_each_copy_is_walked_behind_the_copies_before_it(make_dynamics, fields):
    """By whole clips: at the result, all frames at once take the same walk behind it and end there."""
    model = make_dynamics(**fields)
    clip = make_clip(frames=FRAMES)
    tau = levels(len(clip.tau))
    assert bool((tau > TAU_CTX).any())
    _, _, start = start_of(model, tau)
    past = resampled(model, start, clip.actions, clip.known, TAU_CTX)
    z, s = start.z, (tau - TAU_CTX) / STEPS
    for _ in range(STEPS):
        with torch.no_grad():
            z_hat = model(z, tau, start.d, clip.actions, clip.known, past)
        z, tau = step(z, z_hat, tau, s)
    torch.testing.assert_close(past.z[:, :-1], z[:, :-1], atol=2e-4, rtol=2e-4)
    moved = (past.z - start.z).abs().amax((2, 3))
    assert torch.equal(moved[:, :-1] > 0, (start.tau > TAU_CTX)[:, :-1])  # and nothing else was touched
    assert not past.z.requires_grad


def test_a_past_that_stands_at_tau_ctx_is_left_alone_to_the_last_bit(make_dynamics):
    model, clip = make_dynamics(), make_clip(frames=FRAMES)
    for tau_ctx in (0.0, TAU_CTX):  # at 0 there is no velocity
        tau = true_copies(len(clip.tau), FRAMES, 64, tau_ctx)
        _, _, start = start_of(model, tau)
        assert torch.equal(resampled(model, start, clip.actions, clip.known, tau_ctx).z, start.z)


def test_a_walk_to_a_clean_context_ends_at_the_last_prediction(make_dynamics):
    model, clip = make_dynamics(), make_clip(frames=FRAMES)
    tau = walked_copies(len(clip.tau), FRAMES, 64, 0.0, torch.Generator().manual_seed(1))
    clean, _, start = start_of(model, tau)
    past = resampled(Perfect(clean), start, clip.actions, clip.known, 0.0)
    torch.testing.assert_close(past.z[:, :-1], clean[:, :-1], atol=1e-5, rtol=1e-5)


def test_walks_begin_behind_a_prompt_of_any_length_from_any_level_above_tau_ctx():
    tau = walked_copies(20_000, FRAMES, 16, TAU_CTX, torch.Generator().manual_seed(0))
    prompt = tau == TAU_CTX
    assert bool(prompt[:, 0].all())  # the first frame has no past to be made from
    assert not bool((prompt[:, 1:] & ~prompt[:, :-1]).any())  # a prompt is a beginning
    assert bool((prompt[:, :-1] | (tau[:, 1:] == tau[:, :-1])).all())  # and the rest of a clip has one level
    last = tau[:, -1]  # never part of the prompt
    found, counts = last.unique(return_counts=True)
    assert found.tolist() == pytest.approx([TAU_CTX + (1 - TAU_CTX) * i / 16 for i in range(1, 17)])
    assert (counts / 20_000).tolist() == pytest.approx([1 / 16] * 16, abs=0.01)
    lengths = prompt.sum(1)
    shares = torch.bincount(lengths, minlength=FRAMES)[1:] / len(lengths)
    assert shares.tolist() == pytest.approx([1 / (FRAMES - 1)] * (FRAMES - 1), abs=0.01)
    with pytest.raises(ValueError, match="2 frames"):
        walked_copies(1, 1, 16)


def test_under_autocast_the_walk_is_finite_and_near_that_of_float32(make_dynamics):
    model, clip = make_dynamics(time_attention="frame"), make_clip(frames=FRAMES)
    _, _, start = start_of(model, levels(len(clip.tau)))
    whole = resampled(model, start, clip.actions, clip.known, TAU_CTX)
    with torch.autocast("cpu", torch.bfloat16):
        half = resampled(model, start, clip.actions, clip.known, TAU_CTX)
    assert half.z.dtype == torch.float32
    assert not torch.equal(half.z, whole.z)
    torch.testing.assert_close(half.z, whole.z, atol=0.1, rtol=0.1)
