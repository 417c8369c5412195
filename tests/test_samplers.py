"""Samplers against a Gaussian world, whose spread they must reach, and a spy who notes what the model is given."""

from __future__ import annotations

import itertools

import pytest
import torch

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.objective import bootstrap_target
from ahriuwu_cli.diffusion.samplers import SAMPLERS, WALKS, told_step_size

K_MAX = 64
STEPS = [2, 4, 8, 16, 64]
SPREADS = {  # std of z_hat for N(0, 1) data and the exact denoiser, walked to tau_ctx = 0 (SPEC 3.1)
    "implied noise": [0.50, 0.72, 0.85, 0.92, 0.98],
    "second order": [0.30, 0.79, 0.94, 0.985, 1.0],  # no fact of SPEC: `two_step_walk` below, typed apart
    "fresh noise": [0.50, 0.56, 0.62, 0.66, 0.69],
    "frozen noise": [0.50, 0.88, 1.32, 1.83, 3.24],
}
TAU_CTXS = [0.0, 0.02, 0.1, 0.25, 0.3, 0.5, 0.9]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(z, tau, d):
    """E[z_clean | z_tau] for N(0, 1) data."""
    t = tau[..., None, None]
    return (1 - t) * z / ((1 - t) ** 2 + t**2)


def curved(z, tau, d):
    return torch.sin(1.3 * z) * (1.1 - tau[..., None, None]) + 0.1 * torch.log2(d)[..., None, None]


class Spy:
    """A perfect denoiser that notes every call: the label, the step size told, and the state."""

    def __init__(self, z_clean):
        self.z_clean, self.calls = z_clean, []

    def __call__(self, z, tau, d):
        assert tau.shape == d.shape == z.shape[:2]
        assert tau.unique().numel() == d.unique().numel() == 1
        self.calls.append((tau.flatten()[0].item(), d.flatten()[0].item(), z.clone()))
        return self.z_clean

    def signal_in(self, z):
        """How much of z_clean is in a state, by regression."""
        return ((z * self.z_clean).sum() / self.z_clean.square().sum()).item()


def spy_and_noise(size=60):
    """z_clean and noise that are exactly orthogonal, so that a state's share of each can be read off."""
    z_clean, noise = torch.randn(2, 1, 1, size, size, generator=seeded(5), dtype=torch.float64)
    noise = noise - (noise * z_clean).sum() / z_clean.square().sum() * z_clean
    return Spy(z_clean), noise / noise.std()


# The table of spreads


def spreads(sample):
    noise = torch.randn(1, 1, 200, 500, generator=seeded(1))
    return [
        sample(gaussian, noise, steps, tau_ctx=0.0, k_max=K_MAX, generator=seeded(2))[0].std().item() for steps in STEPS
    ]


def frozen(denoise, noise, steps, *, tau_ctx, k_max, generator):
    """A real bug elsewhere: the noise of the start is mixed in again at every step."""
    z, tau = noise, 1.0
    for tau, s in tau_.equal_walk(steps, tau_ctx):
        z_hat = denoise(z, torch.full((1, 1), tau), torch.full((1, 1), 1 / k_max))
        z = (1 - tau + s) * z_hat + (tau - s) * noise
    return z_hat, z, tau - s


def check_spreads(sample, row):
    for steps, spread, expected in zip(STEPS, spreads(sample), SPREADS[row], strict=True):
        assert spread == pytest.approx(expected, abs=0.012), (steps, spread)


@pytest.mark.parametrize(
    ("sample", "row"),
    [
        (SAMPLERS["euler"], "implied noise"),
        (SAMPLERS["shortcut"], "implied noise"),
        (SAMPLERS["multistep"], "second order"),
        (SAMPLERS["renoise"], "fresh noise"),
        (frozen, "frozen noise"),
    ],
)
def test_the_spread_of_samples_is_the_measured_table(sample, row):
    check_spreads(sample, row)


@pytest.mark.parametrize("wrong", [SAMPLERS["renoise"], frozen])
def test_fresh_or_frozen_noise_in_the_place_of_euler_is_rejected(wrong):
    with pytest.raises(AssertionError):
        check_spreads(wrong, "implied noise")


def test_only_the_implied_noise_brings_the_spread_to_that_of_the_data():
    assert spreads(SAMPLERS["euler"])[-1] == pytest.approx(1, abs=0.03)
    assert spreads(SAMPLERS["renoise"])[-1] < 0.72
    assert spreads(frozen)[-1] > 3


def test_two_steps_cannot_tell_the_three_rules_apart():
    for sample in (SAMPLERS["euler"], SAMPLERS["renoise"], frozen):
        assert spreads(sample)[0] == pytest.approx(0.5, abs=0.012)


def test_a_bootstrapped_shortcut_model_reaches_in_one_step_the_spread_of_64():
    def student(z, tau, d):
        return gaussian(z, tau, d) if d.max() <= 1 / K_MAX else bootstrap_target(student, z, tau, d)

    noise = torch.randn(1, 1, 50, 50, generator=seeded())
    fine = SAMPLERS["euler"](gaussian, noise, 64, tau_ctx=0.0, k_max=K_MAX)
    for steps in (1, 2, 4, 16):
        z_hat, z_end, _ = SAMPLERS["shortcut"](student, noise, steps, tau_ctx=0.0, k_max=K_MAX)
        torch.testing.assert_close(z_end, fine[1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(z_hat, z_end)


# What the model is given: the label of every call, the step size told, and the content


@pytest.mark.parametrize("tau_ctx", TAU_CTXS)
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
@pytest.mark.parametrize("name", ["euler", "shortcut", "multistep", "renoise"])
def test_the_label_of_every_call_is_the_level_that_was_really_applied(name, steps, tau_ctx):
    spy, noise = spy_and_noise()
    z_hat, z_end, tau_end = SAMPLERS[name](spy, noise, steps, tau_ctx=tau_ctx, k_max=K_MAX, generator=seeded())
    slack = 0.05 if name == "renoise" else 1e-6  # fresh noise is only nearly orthogonal to z_clean
    for label, _, z in spy.calls:
        assert spy.signal_in(z) == pytest.approx(1 - label, abs=slack)
        assert (z - (1 - label) * spy.z_clean).std().item() == pytest.approx(label, abs=slack)
    assert spy.calls[0][0] == 1.0
    assert torch.equal(spy.calls[0][2], noise)
    assert tau_end == pytest.approx(tau_ctx, abs=1e-6)
    assert spy.signal_in(z_end) == pytest.approx(1 - tau_ctx, abs=slack)
    assert torch.equal(z_hat, spy.z_clean)


@pytest.mark.parametrize("tau_ctx", TAU_CTXS)
@pytest.mark.parametrize("steps", [1, 3, 4, 10])
@pytest.mark.parametrize("name", ["euler", "renoise"])
def test_euler_and_renoise_take_equal_steps_and_are_told_d_min(name, steps, tau_ctx):
    spy, noise = spy_and_noise(8)
    SAMPLERS[name](spy, noise, steps, tau_ctx=tau_ctx, k_max=K_MAX, generator=seeded())
    labels = [label for label, _, _ in spy.calls]
    assert labels == pytest.approx([1 - i * (1 - tau_ctx) / steps for i in range(steps)], abs=1e-6)
    assert {d for _, d, _ in spy.calls} == {1 / K_MAX}


@pytest.mark.parametrize("tau_ctx", TAU_CTXS)
@pytest.mark.parametrize("steps", [1, 3, 4, 10])
def test_multistep_takes_steps_equal_in_the_root_of_tau_and_is_told_d_min(steps, tau_ctx):
    spy, noise = spy_and_noise(8)
    SAMPLERS["multistep"](spy, noise, steps, tau_ctx=tau_ctx, k_max=K_MAX)
    roots = [label**0.5 for label, _, _ in spy.calls]
    assert roots == pytest.approx([1 - i * (1 - tau_ctx**0.5) / steps for i in range(steps)], abs=1e-6)
    assert {d for _, d, _ in spy.calls} == {1 / K_MAX}


@pytest.mark.parametrize("tau_ctx", TAU_CTXS)
@pytest.mark.parametrize("steps", [1, 2, 4, 16])
def test_shortcut_stays_on_its_grid_is_told_the_d_that_it_jumps_and_cuts_only_the_last_step(steps, tau_ctx):
    spy, noise = spy_and_noise(8)
    _, _z_end, tau_end = SAMPLERS["shortcut"](spy, noise, steps, tau_ctx=tau_ctx, k_max=K_MAX)
    labels = [label for label, _, _ in spy.calls]
    on_grid = [1 - i / steps for i in range(steps) if 1 - i / steps > tau_ctx]
    assert labels == pytest.approx(on_grid, abs=1e-6)
    assert {d for _, d, _ in spy.calls} == {1 / steps}
    jumps = [a - b for a, b in zip(labels, [*labels[1:], tau_end], strict=True)]
    assert jumps[:-1] == pytest.approx([1 / steps] * (len(jumps) - 1), abs=1e-6)
    assert 0 < jumps[-1] <= 1 / steps + 1e-6


def next_label(denoise, noise, steps, *, tau_ctx, k_max, generator=None):
    """Euler, but the model is told the level that it is to reach."""
    z = noise
    for tau, s in tau_.equal_walk(steps, tau_ctx):
        z_hat = denoise(z, torch.full((1, 1), tau - s), torch.full((1, 1), 1 / k_max))
        z, tau = tau_.step(z, z_hat, tau, s)
    return z_hat, z, tau


def test_a_sampler_that_tells_the_model_the_next_level_is_caught_by_the_spy():
    spy, noise = spy_and_noise(8)
    next_label(spy, noise, 4, tau_ctx=0.1, k_max=K_MAX)
    assert any(abs(spy.signal_in(z) - (1 - label)) > 0.1 for label, _, z in spy.calls)


# The walk itself


@pytest.mark.parametrize("name", ["euler", "shortcut"])
def test_each_state_follows_from_the_last_by_keeping_the_implied_noise(name):
    noise = torch.randn(2, 1, 3, 4, generator=seeded())
    d = 1 / K_MAX if name == "euler" else 1 / 4
    z, tau = noise, 1.0
    for z_hat, z_next, level in WALKS[name](curved, noise, 4, tau_ctx=0.1, k_max=K_MAX):
        torch.testing.assert_close(z_hat, curved(z, torch.full((2, 1), tau), torch.full((2, 1), d)))
        kept = (z - (1 - tau) * z_hat) / tau
        torch.testing.assert_close(z_next, (1 - level) * z_hat + level * kept, atol=1e-5, rtol=1e-5)
        z, tau = z_next, level
    assert tau == pytest.approx(0.1, abs=1e-6)


def two_step_walk(denoise, noise, steps, tau_ctx, order=2):
    """Adams and Bashforth's rule in the paper's direction: signal s from 0 up, dz/ds = (z_hat - z) / (1 - s).

    Each step integrates the line through the last two slopes, given as a line, over the step."""
    nodes = [1 - (1 + (tau_ctx**0.5 - 1) * i / steps) ** 2 for i in range(steps + 1)]
    z, slopes, ends = noise, [], []
    for i, (here, there) in enumerate(itertools.pairwise(nodes)):
        whole = noise.shape[:2]
        z_hat = denoise(z, torch.full(whole, 1 - here), torch.full(whole, 1 / K_MAX))
        slopes.append((z_hat - z) / (1 - here))
        if i == 0 or order == 1:
            z = z + (there - here) * slopes[-1]
        else:
            rise = (slopes[-1] - slopes[-2]) / (here - nodes[i - 1])
            z = z + (there - here) * slopes[-1] + (there - here) ** 2 / 2 * rise
        ends.append((z_hat, z))
    return ends


def gaussian_end_error(sample, steps, tau_ctx=0.1):
    """How far from the exact end of the flow: on N(0, 1) data z keeps sqrt(signal^2 + tau^2) of the noise."""
    noise = torch.randn(1, 1, 8, 8, generator=seeded(), dtype=torch.float64)
    end = sample(gaussian, noise, steps, tau_ctx=tau_ctx, k_max=K_MAX)[1]
    return (end / noise - ((1 - tau_ctx) ** 2 + tau_ctx**2) ** 0.5).abs().max().item()


@pytest.mark.parametrize("tau_ctx", [0.0, 0.1, 0.5])
def test_multistep_is_the_two_step_rule_of_adams_and_bashforth(tau_ctx):
    noise = torch.randn(2, 1, 3, 4, generator=seeded())
    states = list(WALKS["multistep"](curved, noise, 5, tau_ctx=tau_ctx, k_max=K_MAX))
    for (z_hat, z, _), (same_hat, same_z) in zip(states, two_step_walk(curved, noise, 5, tau_ctx), strict=True):
        torch.testing.assert_close(z_hat, same_hat, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(z, same_z, atol=1e-4, rtol=1e-4)
    one_step = two_step_walk(curved, noise, 5, tau_ctx, order=1)[-1][1]
    assert (states[-1][1] - one_step).abs().max() > 1e-2


def test_multistep_is_of_second_order_and_euler_of_first():
    for name, order in (("multistep", 2), ("euler", 1)):
        coarse, fine = (gaussian_end_error(SAMPLERS[name], steps) for steps in (32, 64))
        assert coarse / fine == pytest.approx(2**order, rel=0.06), name
    assert gaussian_end_error(SAMPLERS["multistep"], 8) < gaussian_end_error(SAMPLERS["euler"], 32)


def test_one_step_of_multistep_is_eulers():
    noise = torch.randn(1, 1, 3, 4, generator=seeded())
    for a, b in zip(
        SAMPLERS["multistep"](curved, noise, 1, k_max=K_MAX),
        SAMPLERS["euler"](curved, noise, 1, k_max=K_MAX),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_renoise_mixes_every_prediction_with_fresh_noise_at_the_next_level():
    noise = torch.randn(2, 1, 3, 4, generator=seeded())
    keyed = [torch.randn(2, 1, 3, 4, generator=seeded(10 + i)) for i in range(4)]
    asked = []

    def source(i):
        asked.append(i)
        return keyed[i]

    z, tau = noise, 1.0
    for i, (z_hat, z_next, level) in enumerate(
        WALKS["renoise"](curved, noise, 4, tau_ctx=0.1, k_max=K_MAX, generator=source)
    ):
        torch.testing.assert_close(z_hat, curved(z, torch.full((2, 1), tau), torch.full((2, 1), 1 / K_MAX)))
        assert level == pytest.approx(1 - (i + 1) * 0.9 / 4)
        torch.testing.assert_close(z_next, (1 - level) * z_hat + level * keyed[i])
        z, tau = z_next, level
    assert asked == [0, 1, 2, 3]


def test_renoise_draws_from_the_generator_it_is_given_and_the_others_draw_nothing():
    noise = torch.randn(1, 1, 3, 4, generator=seeded())

    def end(name, seed):
        generator = seeded(seed)
        before = generator.get_state()
        result = SAMPLERS[name](curved, noise, 4, tau_ctx=0.1, k_max=K_MAX, generator=generator)
        return result[1], not torch.equal(before, generator.get_state())

    assert torch.equal(end("renoise", 1)[0], end("renoise", 1)[0])
    assert not torch.equal(end("renoise", 1)[0], end("renoise", 2)[0])
    assert end("renoise", 1)[1]
    for name in ("euler", "multistep", "shortcut"):
        assert torch.equal(end(name, 1)[0], end(name, 2)[0])
        assert not end(name, 1)[1]


def test_the_keyed_and_the_drawn_noise_of_renoise_are_used_alike():
    noise = torch.randn(1, 1, 3, 4, generator=seeded())
    drawn = seeded(7)
    same = [torch.randn(1, 1, 3, 4, generator=drawn) for _ in range(3)]
    by_key = SAMPLERS["renoise"](curved, noise, 3, tau_ctx=0.1, k_max=K_MAX, generator=lambda i: same[i])
    by_draw = SAMPLERS["renoise"](curved, noise, 3, tau_ctx=0.1, k_max=K_MAX, generator=seeded(7))
    assert torch.equal(by_key[1], by_draw[1])


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_sampler_returns_the_last_state_of_its_walk(name):
    noise = torch.randn(1, 2, 3, 4, generator=seeded())
    states = list(WALKS[name](curved, noise, 4, tau_ctx=0.1, k_max=K_MAX, generator=seeded(1)))
    last = SAMPLERS[name](curved, noise, 4, tau_ctx=0.1, k_max=K_MAX, generator=seeded(1))
    assert len(states) == 4
    assert torch.equal(last[0], states[-1][0])
    assert torch.equal(last[1], states[-1][1])
    assert last[2] == states[-1][2]
    assert SAMPLERS[name].__name__ == name


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_samplers_leave_the_noise_alone_and_default_to_tau_ctx_0_1(name):
    noise = torch.randn(1, 1, 3, 4, generator=seeded())
    before = noise.clone()
    assert SAMPLERS[name](curved, noise, 4)[2] == pytest.approx(0.1)
    assert torch.equal(noise, before)


def test_the_output_changes_with_tau_ctx():
    noise = torch.randn(1, 1, 3, 4, generator=seeded())
    for name in SAMPLERS:
        ends = [SAMPLERS[name](curved, noise, 4, tau_ctx=t, k_max=K_MAX, generator=seeded())[1] for t in TAU_CTXS]
        for a, b in itertools.pairwise(ends):
            assert (a - b).abs().max() > 1e-3


def test_the_step_size_that_a_checkpoint_must_know_is_the_one_that_is_told():
    for name in SAMPLERS:
        spy, noise = spy_and_noise(4)
        SAMPLERS[name](spy, noise, 4, tau_ctx=0.1, k_max=K_MAX, generator=seeded())
        assert {told_step_size(name, 4, K_MAX)} == {d for _, d, _ in spy.calls}


@pytest.mark.parametrize("steps", [0, 3, 128])
def test_shortcut_refuses_step_counts_off_the_trained_grid(steps):
    with pytest.raises(ValueError, match="steps"):
        SAMPLERS["shortcut"](curved, torch.zeros(1, 1, 2, 2), steps, tau_ctx=0.1, k_max=K_MAX)
