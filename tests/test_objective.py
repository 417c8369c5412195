"""The objective against eq. 7 and 8 typed in the paper's own direction, and against what a Gaussian world must give."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.forcing import FORCINGS
from ahriuwu_cli.diffusion.objective import (
    RAMPS,
    bootstrap_target,
    ramp_weight,
    shortcut_forcing_loss,
    x_prediction_loss,
)

K_MAX = 8


def draw(batch=3, frames=4, seed=0):
    """Latents, noise (B, T, N, D) and eq. 4 levels (B, T), drawn without our forcing."""
    g = torch.Generator().manual_seed(seed)
    z_clean, noise = torch.randn(2, batch, frames, 5, 6, generator=g)
    d = 2.0 ** -torch.randint(0, K_MAX.bit_length(), (batch, frames), generator=g)
    tau = d * (torch.floor(torch.rand(batch, frames, generator=g) / d) + 1)
    return z_clean, noise, tau, d


def mix(z_clean, noise, tau):
    level = tau[..., None, None]
    return (1 - level) * z_clean + level * noise


def curved(z, tau, d):
    """A denoiser that depends on everything it is told, and not linearly."""
    tau, d = tau[..., None, None], d[..., None, None]
    return torch.sin(2 * z) * (1.2 - tau) + 0.3 * torch.log2(d) * torch.cos(z + 3 * tau) + d


def gaussian(z, tau, d):
    """The exact denoiser of N(0, 1) data, in the paper's direction."""
    s = 1 - tau[..., None, None]
    return s * z / (s**2 + (1 - s) ** 2)


# Eq. 8: the ramp


def check_ramp(ramp):
    tau = torch.linspace(0, 1, 11)
    paper = torch.tensor([0.9 * s + 0.1 for s in [1 - t for t in tau.tolist()]])  # eq. 8 as printed
    torch.testing.assert_close(ramp(tau), paper)
    assert ramp(torch.zeros(1)).item() == pytest.approx(1.0)
    assert ramp(torch.ones(1)).item() == pytest.approx(0.1)


def check_ramp_by_correlation(ramp):
    """Whatever the direction is called: what is more like the clean latent weighs more."""
    g = torch.Generator().manual_seed(0)
    z_clean, noise = torch.randn(2, 1, 9, 50, 200, generator=g)
    tau = torch.linspace(0, 1, 9)[torch.randperm(9, generator=g)][None]
    z_tau = tau_.add_noise(z_clean, noise, tau)
    likeness = [torch.corrcoef(torch.stack([z_tau[0, t].flatten(), z_clean[0, t].flatten()]))[0, 1] for t in range(9)]
    weight = ramp(tau)[0][torch.stack(likeness).argsort()]
    assert (weight.diff() > 0).all()


def test_the_ramp_is_the_papers_eq_8_turned_to_our_direction():
    check_ramp(ramp_weight)
    check_ramp(lambda tau: ramp_weight(tau, "paper"))
    assert ramp_weight(torch.rand(2, 3)).shape == (2, 3)


def test_the_ramp_rises_with_the_correlation_of_noisy_and_clean_latents():
    check_ramp_by_correlation(ramp_weight)


@pytest.mark.parametrize(
    "wrong",
    [lambda t: 0.9 * t + 0.1, lambda t: ramp_weight(t, "inverted"), lambda t: ramp_weight(t, "flat"), lambda t: t],
)
@pytest.mark.parametrize("check", [check_ramp, check_ramp_by_correlation])
def test_a_ramp_that_was_not_turned_round_is_rejected(check, wrong):
    with pytest.raises(AssertionError):
        check(wrong)


def test_the_ablation_ramps_are_what_their_names_say():
    tau = torch.linspace(0, 1, 11)
    torch.testing.assert_close(ramp_weight(tau, "inverted"), 0.9 * tau + 0.1)
    assert torch.equal(ramp_weight(tau, "flat"), torch.ones(11))
    assert RAMPS == ("paper", "inverted", "flat", "velocity")
    with pytest.raises(ValueError, match="unknown ramp 'upside'"):
        ramp_weight(tau, "upside")


def test_the_velocity_ramp_makes_the_loss_the_squared_error_of_velocities():
    z_hat, target, tau, _ = draw()
    z_tau = mix(target, torch.randn_like(target), tau)
    t = tau[..., None, None]
    of_velocities = ((z_tau - z_hat) / t - (z_tau - target) / t).square().mean()
    torch.testing.assert_close(x_prediction_loss(z_hat, target, tau, "velocity"), of_velocities)


# The x-prediction loss


def loss_by_hand(z_hat, target, tau, weight):
    """Frame by frame, number by number."""
    rows = []
    for b in range(tau.shape[0]):
        row = []
        for t in range(tau.shape[1]):
            numbers = zip(z_hat[b, t].flatten().tolist(), target[b, t].flatten().tolist(), strict=True)
            squares = [(x - y) ** 2 for x, y in numbers]
            row.append(sum(squares) / len(squares) * weight(tau[b, t].item()))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("paper", lambda t: 1 - 0.9 * t), ("inverted", lambda t: 0.1 + 0.9 * t), ("flat", lambda t: 1.0)],
)
def test_the_loss_is_the_mean_square_over_the_latent_axes_then_the_ramp_per_frame(kind, weight):
    z_hat, target, tau, _ = draw()
    by_hand = loss_by_hand(z_hat, target, tau, weight)
    torch.testing.assert_close(x_prediction_loss(z_hat, target, tau, kind, "none"), by_hand)
    torch.testing.assert_close(x_prediction_loss(z_hat, target, tau, kind, "mean"), by_hand.mean())
    torch.testing.assert_close(x_prediction_loss(z_hat, target, tau, kind, "sum"), by_hand.sum())


def test_the_loss_uses_the_papers_ramp_and_the_mean_unless_told_otherwise():
    z_hat, target, tau, _ = draw()
    assert x_prediction_loss(z_hat, target, tau) == x_prediction_loss(z_hat, target, tau, "paper", "mean")
    assert x_prediction_loss(z_hat, z_hat, tau) == 0
    with pytest.raises(ValueError, match="unknown reduction"):
        x_prediction_loss(z_hat, target, tau, reduce="median")


def test_the_same_error_weighs_ten_times_more_on_a_clean_frame_than_on_noise():
    error = x_prediction_loss(
        torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), torch.tensor([[0.0, 1.0]]), reduce="none"
    )
    torch.testing.assert_close(error, torch.tensor([[1.0, 0.1]]))


def test_a_level_per_clip_weighs_whole_clips():
    z_hat, target, _, _ = draw()
    tau = torch.tensor([0.0, 0.5, 1.0])
    expected = (z_hat - target).square().mean(dim=(1, 2, 3)) * torch.tensor([1.0, 0.55, 0.1])
    torch.testing.assert_close(x_prediction_loss(z_hat, target, tau, reduce="none"), expected)


def test_half_precision_predictions_are_compared_in_float32():
    z_hat, target, tau, _ = draw()
    loss = x_prediction_loss(z_hat.bfloat16(), target, tau, reduce="none")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, x_prediction_loss(z_hat.bfloat16().float(), target, tau, reduce="none"))


# Eq. 7: the bootstrap target


def paper_velocity_target(f, x_s, s, d):
    """Eq. 7 as printed: s is the paper's tau (0 noise, 1 clean), x_s the noisy latent, velocities run towards data."""
    s, d = s[..., None, None], d[..., None, None]
    ask = lambda x, level: f(x, (1 - level)[..., 0, 0], (d / 2)[..., 0, 0])  # noqa: E731
    b1 = (ask(x_s, s) - x_s) / (1 - s)
    x_mid = x_s + b1 * d / 2
    s_mid = s + d / 2
    b2 = (ask(x_mid, s_mid) - x_mid) / (1 - s_mid)
    return (b1 + b2) / 2


def check_target_is_eq_7(target_of):
    """(1 - s)^2 ||(z_hat - x_s) / (1 - s) - v||^2, the paper's loss, equals ||z_hat - target||^2 for any z_hat."""
    z_clean, noise, tau, d = draw()
    z_tau, s = mix(z_clean, noise, tau), 1 - tau
    target = target_of(curved, z_tau, tau, d)
    v = paper_velocity_target(curved, z_tau, s, d)
    signal = s[..., None, None]
    z_hat = torch.randn(z_tau.shape, generator=torch.Generator().manual_seed(9))
    paper_loss = (1 - signal) ** 2 * ((z_hat - z_tau) / (1 - signal) - v).square()
    torch.testing.assert_close((z_hat - target).square(), paper_loss, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(target, z_tau + (1 - signal) * v, atol=2e-5, rtol=2e-5)


def two_half_steps(f, z, tau, d):
    """Where the walk with d/2 arrives after two steps, in the review's words: keep the implied noise, mix again."""
    for _ in range(2):
        z_hat = f(z, tau, d / 2)
        t, after = tau[..., None, None], (tau - d / 2)[..., None, None]
        z = (1 - after) * z_hat + after * (z - (1 - t) * z_hat) / t
        tau = tau - d / 2
    return z


def check_student_arrives_where_two_half_steps_arrive(target_of):
    z_clean, noise, tau, d = draw(seed=1)
    z_tau = mix(z_clean, noise, tau)
    target = target_of(curved, z_tau, tau, d)
    t = tau[..., None, None]
    student = z_tau - d[..., None, None] * (z_tau - target) / t
    torch.testing.assert_close(student, two_half_steps(curved, z_tau, tau, d), atol=2e-5, rtol=2e-5)


def check_gaussian_student(target_of, end=0.6):
    """From tau = 1 with d = 1/2: two half steps of the exact denoiser end at 0.600 of the input."""
    z = torch.linspace(-2, 2, 6).view(1, 1, 2, 3)
    one, half = torch.ones(1, 1), torch.full((1, 1), 0.5)
    target = target_of(gaussian, z, one, half)
    student, level = tau_.step(z, target, one, half)
    torch.testing.assert_close(student, end * z)
    torch.testing.assert_close(two_half_steps(gaussian, z, one, half), 0.6 * z)
    assert level == 0.5


TARGET_CHECKS = [check_target_is_eq_7, check_student_arrives_where_two_half_steps_arrive, check_gaussian_student]


@pytest.mark.parametrize("check", TARGET_CHECKS)
def test_the_bootstrap_target_is_what_eq_7_and_two_half_steps_agree_on(check):
    check(bootstrap_target)


def second_prediction(f, z, tau, d):
    z_hat1 = f(z, tau, d / 2)
    mid, tau_mid = tau_.step(z, z_hat1, tau, d / 2)
    return f(mid, tau_mid, d / 2)


def _variant(first=0.5, second=0.5, label=0.5, last_divisor="mid", sign=1.0):
    def target(f, z, tau, d):
        t, e = tau[..., None, None], d[..., None, None]
        z_hat1 = f(z, tau, d * label)
        b1 = (z - z_hat1) / t
        mid = z - sign * e * first * b1
        tau_mid = tau - d * second
        z_hat2 = f(mid, tau_mid, d * label)
        b2 = (mid - z_hat2) / (tau_mid[..., None, None] if last_divisor == "mid" else t)
        return z - t * (b1 + b2) / 2

    return target


WRONG_TARGETS = {
    "second prediction": second_prediction,
    "mean of predictions": lambda f, z, tau, d: (f(z, tau, d / 2) + second_prediction(f, z, tau, d)) / 2,
    "second step unlabelled": _variant(second=0.0),
    "whole first step": _variant(first=1.0),
    "quarter first step": _variant(first=0.25),
    "second divided by tau": _variant(last_divisor="tau"),
    "uphill": _variant(sign=-1.0),
}


@pytest.mark.parametrize("check", TARGET_CHECKS)
@pytest.mark.parametrize("name", WRONG_TARGETS)
def test_another_target_than_eq_7_is_rejected(name, check):
    with pytest.raises(AssertionError):
        check(WRONG_TARGETS[name])


@pytest.mark.parametrize("label", [1.0, 0.25])
def test_a_teacher_that_is_told_another_step_size_than_d_over_2_is_rejected(label):
    check_target_is_eq_7(_variant())
    with pytest.raises(AssertionError):
        check_target_is_eq_7(_variant(label=label))


def test_the_student_of_the_second_prediction_would_end_at_0_650():
    check_gaussian_student(second_prediction, end=0.65)


def test_the_target_called_second_is_the_second_half_steps_prediction_and_not_eq_7():
    z_clean, noise, tau, d = draw()
    z = mix(z_clean, noise, tau)
    second = bootstrap_target(curved, z, tau, d, aim="second")
    torch.testing.assert_close(second, second_prediction(curved, z, tau, d))
    assert (second - bootstrap_target(curved, z, tau, d)).abs().max() > 0.01


def test_the_teacher_is_asked_twice_at_d_over_2_first_at_tau_then_at_tau_minus_d_over_2():
    z_clean, noise, tau, d = draw()
    z_tau, calls = mix(z_clean, noise, tau), []

    def spy(z, level, size):
        calls.append((z.clone(), level.clone(), size.clone()))
        return curved(z, level, size)

    bootstrap_target(spy, z_tau, tau, d)
    (z1, tau1, d1), (z2, tau2, d2) = calls
    assert torch.equal(z1, z_tau)
    assert torch.equal(tau1, tau)
    torch.testing.assert_close(tau2, tau - d / 2)
    assert torch.equal(d1, d / 2)
    assert torch.equal(d2, d / 2)
    level, before = tau2[..., None, None], tau[..., None, None]
    z_hat = curved(z_tau, tau, d / 2)
    kept = (z_tau - (1 - before) * z_hat) / before
    torch.testing.assert_close(z2, (1 - level) * z_hat + level * kept, atol=1e-5, rtol=1e-5)  # content = label


def test_context_frames_keep_state_level_and_step_size_in_both_teacher_passes():
    z_clean, noise, tau, d = draw()
    z_tau, calls = mix(z_clean, noise, tau), []
    moves = torch.tensor([[True, False, True, False]] * 3)

    def spy(z, level, size):
        calls.append((z.clone(), level.clone(), size.clone()))
        return curved(z, level, size) + z.mean(dim=1, keepdim=True)  # frames see each other

    bootstrap_target(spy, z_tau, tau, d, moves)
    for z, level, size in calls:
        assert torch.equal(z[~moves], z_tau[~moves])
        assert torch.equal(level[~moves], tau[~moves])
        assert torch.equal(size[~moves], d[~moves])
        assert torch.equal(size[moves], d[moves] / 2)
    assert torch.equal(calls[0][1][moves], tau[moves])
    torch.testing.assert_close(calls[1][1][moves], (tau - d / 2)[moves])
    assert not torch.equal(calls[1][0][moves], z_tau[moves])


def test_moving_frames_get_the_same_target_whether_or_not_others_move():
    z_clean, noise, tau, d = draw()
    z_tau = mix(z_clean, noise, tau)
    moves = torch.rand(3, 4, generator=torch.Generator().manual_seed(3)) < 0.5
    some, every = bootstrap_target(curved, z_tau, tau, d, moves), bootstrap_target(curved, z_tau, tau, d)
    torch.testing.assert_close(some[moves], every[moves])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_target_is_formed_in_float32_from_the_predictions_of_a_half_precision_model(dtype):
    z_clean, noise, tau, d = draw(seed=2)
    z_tau = mix(z_clean, noise, tau)
    given = []

    def half_precision(z, level, size):
        assert z.dtype == torch.float32  # the state between the two half steps is never rounded
        given.append(curved(z, level, size).to(dtype))
        return given[-1]

    target = bootstrap_target(half_precision, z_tau, tau, d)
    assert target.dtype == torch.float32
    z, t, e = z_tau.double(), tau.double()[..., None, None], d.double()[..., None, None]
    b1 = (z - given[0].double()) / t
    b2 = (z - e / 2 * b1 - given[1].double()) / (t - e / 2)
    exact = z - t * (b1 + b2) / 2
    torch.testing.assert_close(target.double(), exact, atol=1e-5, rtol=1e-5)
    assert bootstrap_target(half_precision, z_tau.to(dtype), tau, d).dtype == torch.float32


# The whole loss


class Small(nn.Module):
    """A denoiser with weights, whose clips do not see each other and whose frames do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lines = nn.Linear(8, 6)

    def forward(self, z, tau, d):
        told = torch.stack([tau, torch.log2(d)], dim=-1)[:, :, None].expand(*z.shape[:3], 2)
        return torch.sin(self.lines(torch.cat([z, told], dim=-1))) + 0.2 * z.mean(dim=1, keepdim=True)


def target_by_hand(model, z_clean, z_tau, tau, d):
    """Eq. 7, first line for d = d_min, second for the rest, which leaves the frames at d_min where they are."""
    at_d_min = d == 1 / K_MAX
    half = torch.where(at_d_min, d, d / 2)
    with torch.no_grad():
        b1 = (z_tau - model(z_tau, tau, half)) / tau[..., None, None]
        z_mid = torch.where(at_d_min[..., None, None], z_tau, z_tau - (d / 2)[..., None, None] * b1)
        tau_mid = torch.where(at_d_min, tau, tau - d / 2)
        b2 = (z_mid - model(z_mid, tau_mid, half)) / tau_mid[..., None, None]
        bootstrapped = z_tau - tau[..., None, None] * (b1 + b2) / 2
    return torch.where(at_d_min[..., None, None], z_clean, bootstrapped)


def check_loss_per_tau_and_d(loss_of):
    """Weights and targets of every pair (tau, d) against eq. 7 and 8, and the two terms apart."""
    model = Small()
    z_clean, noise, tau, d = draw(batch=40, frames=4, seed=4)
    z_tau = mix(z_clean, noise, tau)
    target = target_by_hand(model, z_clean, z_tau, tau, d)
    error = (model(z_tau, tau, d) - target).square().mean(dim=(2, 3)).detach()
    weighted = error * (0.9 * (1 - tau) + 0.1)
    result = loss_of(model, z_clean, noise, tau, d)
    for size in d.unique():
        for level in tau[d == size].unique():
            here = (d == size) & (tau == level)
            torch.testing.assert_close(result.per_frame[here], error[here], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(result.loss.detach(), weighted.mean())
    torch.testing.assert_close(result.flow, weighted[d == 1 / K_MAX].mean())
    torch.testing.assert_close(result.bootstrap, weighted[d > 1 / K_MAX].mean())


def ours(model, z_clean, noise, tau, d):
    return shortcut_forcing_loss(model, z_clean, noise, tau, d, k_max=K_MAX)


def test_weights_and_targets_are_eq_7_and_8_for_every_pair_of_tau_and_d():
    check_loss_per_tau_and_d(ours)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda m, z, n, t, d: shortcut_forcing_loss(m, z, n, t, d, k_max=K_MAX, ramp="inverted"),
        lambda m, z, n, t, d: shortcut_forcing_loss(m, z, n, t, d, k_max=K_MAX, ramp="flat"),
        lambda m, z, n, t, d: shortcut_forcing_loss(m, n, z, t, d, k_max=K_MAX),
        lambda m, z, n, t, d: shortcut_forcing_loss(m, z, n, t, torch.full_like(d, 1 / K_MAX), k_max=K_MAX),
        lambda m, z, n, t, d: shortcut_forcing_loss(m, z, n, t, d, k_max=K_MAX // 2),
        lambda m, z, n, t, d: shortcut_forcing_loss(m, z, n, t, d, k_max=K_MAX, teacher=lambda rows: lambda z, *_: z),
    ],
    ids=["inverted ramp", "flat ramp", "noise for clean", "flow at every d", "another d_min", "another teacher"],
)
def test_another_loss_than_eq_7_and_8_is_rejected(wrong):
    with pytest.raises(AssertionError):
        check_loss_per_tau_and_d(wrong)


def test_at_d_min_the_target_is_the_clean_latent_and_no_teacher_is_asked():
    z_clean, noise, tau, _ = draw()
    calls = []

    def spy(z, level, size):
        calls.append((z, level, size))
        return z_clean

    d = torch.full_like(tau, 1 / K_MAX)
    result = shortcut_forcing_loss(spy, z_clean, noise, tau, d, k_max=K_MAX)
    assert result.loss == 0
    assert result.flow == 0
    assert torch.isnan(result.bootstrap)  # there is none, and the log must not say 0
    ((z, level, size),) = calls
    torch.testing.assert_close(z, mix(z_clean, noise, tau))
    assert torch.equal(level, tau)
    assert torch.equal(size, d)


def test_a_batch_without_d_min_has_no_flow_term():
    z_clean, noise, _, _ = draw()
    one = torch.ones(3, 4)
    result = shortcut_forcing_loss(curved, z_clean, noise, one, one, k_max=K_MAX)
    assert torch.isnan(result.flow)
    torch.testing.assert_close(result.bootstrap, result.loss)


def test_the_student_is_asked_at_tau_and_the_whole_d():
    z_clean, noise, tau, d = draw()
    calls = []

    def spy(z, level, size):
        calls.append((z, level, size))
        return curved(z, level, size)

    ours(spy, z_clean, noise, tau, d)
    student = calls[-1]
    assert len(calls) == 3
    torch.testing.assert_close(student[0], mix(z_clean, noise, tau))
    assert torch.equal(student[1], tau)
    assert torch.equal(student[2], d)


def test_no_gradient_flows_through_the_target():
    z_clean, noise, tau, d = draw(seed=5)
    model = Small()
    ours(model, z_clean, noise, tau, d).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    z_tau = mix(z_clean, noise, tau)
    target = target_by_hand(model, z_clean, z_tau, tau, d)
    error = (model(z_tau, tau, d) - target).square().mean(dim=(2, 3))
    (error * (1 - 0.9 * tau)).mean().backward()
    for mine, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-4)
    assert not bootstrap_target(model, z_tau, tau, d).requires_grad


def test_the_gradient_check_would_notice_a_target_that_is_not_stopped():
    z_clean, noise, tau, d = draw(seed=5)
    grads = []
    for stopped in (True, False):
        model = Small()
        z_tau = mix(z_clean, noise, tau)
        target = bootstrap_target.__wrapped__(model, z_tau, tau, d)
        error = (model(z_tau, tau, d) - (target.detach() if stopped else target)).square().mean()
        error.backward()
        grads.append(model.lines.weight.grad)
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()


def test_a_share_of_the_clips_with_their_own_teacher_gives_the_same_loss_as_all_of_them():
    model = Small()
    z_clean, noise, tau, d = draw(batch=6, seed=6)
    tau[2:], d[2:] = tau[2:].clamp(min=1 / K_MAX), 1 / K_MAX
    seen = []

    def teacher(rows):
        def teach(z, level, size):
            seen.append((rows, z.shape[0]))
            return model(z, level, size)

        return teach

    whole = ours(model, z_clean, noise, tau, d)
    share = shortcut_forcing_loss(model, z_clean, noise, tau, d, k_max=K_MAX, teacher=teacher, bootstrap_rows=2)
    assert seen == [(2, 2), (2, 2)]
    torch.testing.assert_close(share.per_frame, whole.per_frame)
    torch.testing.assert_close(share.loss, whole.loss)
    torch.testing.assert_close(share.bootstrap, whole.bootstrap)


def test_large_steps_outside_the_bootstrap_rows_are_a_broken_invariant():
    z_clean, noise, tau, d = draw()
    d[2] = 1.0
    with pytest.raises(AssertionError, match="after the first 2"):
        shortcut_forcing_loss(
            curved, z_clean, noise, tau, d, k_max=K_MAX, teacher=lambda rows: curved, bootstrap_rows=2
        )
    d[:1], d[1:] = 1.0, 1 / K_MAX
    with pytest.raises(AssertionError, match="its own teacher"):
        shortcut_forcing_loss(curved, z_clean, noise, tau, d, k_max=K_MAX, bootstrap_rows=2)


def test_a_perfectly_bootstrapped_student_jumps_in_one_step_where_64_small_steps_arrive():
    """Eq. 7 all the way up on Gaussian data: f(., d) is bootstrap_target of f(., d/2), the exact denoiser at d_min."""
    k_max = 64

    def student(z, tau, d):
        return gaussian(z, tau, d) if d.max() <= 1 / k_max else bootstrap_target(student, z, tau, d)

    z = torch.ones(1, 1, 1, 1)
    one = torch.ones(1, 1)
    jump = student(z, one, one)
    walked = z
    for i in range(k_max):
        s = torch.tensor([[i / k_max]])  # the paper's direction
        walked = walked + (gaussian(walked, 1 - s, one) - walked) / (1 - s)[..., None, None] / k_max
    torch.testing.assert_close(jump, walked)
    assert jump.item() == pytest.approx(0.98, abs=0.005)


def test_clean_context_of_prefix_forcing_gives_finite_losses():
    tau, d = FORCINGS["prefix"](16, 4, K_MAX, 0.0, torch.Generator().manual_seed(0))
    z_clean, noise = torch.randn(2, 16, 4, 5, 6)
    assert (tau == 0).any()
    model = Small()
    result = ours(model, z_clean, noise, tau, d)
    result.loss.backward()
    assert torch.isfinite(result.per_frame).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
