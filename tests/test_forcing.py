"""What diffusion forcing draws: shares, grids, independence, and what the review's schedule never shows a model."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ahriuwu_cli.diffusion.forcing import FORCINGS, coverage, finest

K_MAX = 64
LEVELS = [2.0**-i for i in range(7)]
PURE_NOISE = sum(LEVELS) / 7  # P(tau = 1) = mean over d of 1 in 1/d
# chi-square bounds at 1 in 10,000 by degrees of freedom, so that a fixed seed is no lucky one
CHI2 = {1: 15.1, 3: 21.1, 6: 27.9, 7: 29.9, 15: 44.3, 31: 65.6, 63: 112.3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chi_square(counts, expected):
    return sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True))


def check_uniform(values, support):
    counts = Counter(values.flatten().tolist())
    assert set(counts) <= set(support), sorted(set(counts) - set(support))[:3]
    if len(support) > 1:
        expected = [values.numel() / len(support)] * len(support)
        assert chi_square([counts[s] for s in support], expected) < CHI2[len(support) - 1]


def check_independent(draw):
    """Eq. 4 for every frame by itself, and no link between frames of a clip."""
    tau, d = draw(4000, 10, K_MAX, 0.1, seeded())
    assert tau.shape == d.shape == (4000, 10)
    assert tau.dtype == d.dtype == torch.float32
    assert tau.min() > 0
    check_uniform(d, LEVELS)
    for size in LEVELS:
        check_uniform(tau[d == size], [i * size for i in range(1, round(1 / size) + 1)])
    assert (tau == 1).float().mean().item() == pytest.approx(PURE_NOISE, abs=0.01)
    for x in (tau, d.log2()):
        for lag in (1, 2):
            assert abs(torch.corrcoef(torch.stack([x[:, :-lag].flatten(), x[:, lag:].flatten()]))[0, 1]) < 0.025
        position = torch.arange(10.0).expand_as(x)
        assert abs(torch.corrcoef(torch.stack([position.flatten(), x.flatten()]))[0, 1]) < 0.025
    for position in range(10):
        check_uniform(d[:, position], LEVELS)
    assert coverage(tau).min() > 0.02


def test_pure_noise_is_drawn_for_28_percent_of_frames_at_k_max_64():
    assert pytest.approx(0.2835, abs=1e-4) == PURE_NOISE
    tau, _ = FORCINGS["independent"](20_000, 5, K_MAX, 0.1, seeded(3))
    assert (tau == 1).float().mean().item() == pytest.approx(0.2835, abs=0.005)


def test_every_frame_draws_its_own_step_size_and_its_own_level_on_that_grid():
    check_independent(FORCINGS["independent"])


def _by_rarity(batch, frames, k_max, tau_ctx, generator):
    share = torch.tensor([1 / s for s in LEVELS])
    d = torch.tensor(LEVELS)[torch.multinomial(share, batch * frames, True, generator=generator)].view(batch, frames)
    return d * (torch.floor(torch.rand(batch, frames, generator=generator) / d) + 1), d


def _one_d_per_clip(batch, frames, k_max, tau_ctx, generator):
    d = torch.tensor(LEVELS)[torch.randint(7, (batch, 1), generator=generator)].expand(-1, frames)
    return d * (torch.floor(torch.rand(batch, frames, generator=generator) / d) + 1), d


def _one_tau_per_clip(batch, frames, k_max, tau_ctx, generator):
    d = torch.tensor(LEVELS)[torch.randint(7, (batch, frames), generator=generator)]
    return d * (torch.floor(torch.rand(batch, 1, generator=generator) / d) + 1), d


def _grid_touches_clean(batch, frames, k_max, tau_ctx, generator):
    tau, d = FORCINGS["independent"](batch, frames, k_max, tau_ctx, generator)
    return tau - d, d


def _off_the_grid(batch, frames, k_max, tau_ctx, generator):
    _, d = FORCINGS["independent"](batch, frames, k_max, tau_ctx, generator)
    return 1 - torch.rand(batch, frames, generator=generator), d


def _never_d_1(batch, frames, k_max, tau_ctx, generator):
    d = torch.tensor(LEVELS[1:])[torch.randint(6, (batch, frames), generator=generator)]
    return d * (torch.floor(torch.rand(batch, frames, generator=generator) / d) + 1), d


@pytest.mark.parametrize(
    "wrong",
    [
        _by_rarity,
        _one_d_per_clip,
        _one_tau_per_clip,
        _grid_touches_clean,
        _off_the_grid,
        _never_d_1,
        FORCINGS["horizon"],
        FORCINGS["prefix"],
    ],
)
def test_another_draw_than_eq_4_is_rejected(wrong):
    with pytest.raises(AssertionError):
        check_independent(wrong)


@pytest.mark.parametrize("k_max", [1, 2, 8])
def test_the_grid_follows_k_max(k_max):
    tau, d = FORCINGS["independent"](500, 4, k_max, 0.1, seeded())
    levels = [2.0**-i for i in range(k_max.bit_length())]
    assert sorted(set(d.flatten().tolist()), reverse=True) == levels
    assert torch.equal(torch.remainder(tau, d), torch.zeros_like(tau))
    assert (tau >= d).all()
    assert tau.max() == 1


@pytest.mark.parametrize("name", sorted(FORCINGS))
def test_the_same_generator_draws_the_same_levels(name):
    first, second, other = (FORCINGS[name](6, 8, K_MAX, 0.1, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def horizon_by_hand(h, frames, tau_ctx, tau_max=1.0):
    """SPEC 2, one frame at a time."""
    return [
        tau_ctx if pos < h else tau_ctx + (tau_max - tau_ctx) * (pos - h) / max(frames - 1 - h, 1)
        for pos in range(frames)
    ]


def furthest(rows, candidates):
    """Largest difference of each row (B, T) from each candidate (H, T): (B, H)."""
    return (rows[:, None] - candidates[None]).abs().amax(-1)


@pytest.mark.parametrize(("frames", "tau_ctx"), [(2, 0.1), (3, 0.1), (9, 0.1), (17, 0.3)])
def test_the_horizon_schedule_is_the_reviews_formula_for_a_uniform_h(frames, tau_ctx):
    tau, d = FORCINGS["horizon"](8000, frames, K_MAX, tau_ctx, seeded())
    by_h = torch.tensor([horizon_by_hand(h, frames, tau_ctx) for h in range(1, frames)])
    distance = furthest(tau, by_h)
    assert distance.min(dim=1).values.max() < 1e-5
    check_uniform(distance.argmin(dim=1), list(range(frames - 1)))
    assert torch.equal(d, torch.full_like(d, 1 / K_MAX))
    assert tau.dtype == torch.float32


def test_the_horizon_schedule_rises_to_the_tau_max_that_is_asked_for():
    tau, _ = FORCINGS["horizon"](500, 6, K_MAX, 0.2, seeded(), tau_max=0.6)
    by_h = torch.tensor([horizon_by_hand(h, 6, 0.2, 0.6) for h in range(1, 6)])
    assert furthest(tau, by_h).min(dim=1).values.max() < 1e-5


def test_the_horizon_schedule_starves_the_pairs_that_a_rollout_asks_for():
    frames = 12
    tau, _ = FORCINGS["horizon"](20_000, frames, K_MAX, 0.1, seeded())
    assert torch.equal(tau[:, :2], torch.full((20_000, 2), 0.1))  # the first frame that can be a target has tau_ctx
    for p in range(1, frames):
        assert tau[:, p].max().item() == pytest.approx(0.1 + 0.9 * (p - 1) / (frames - 2), abs=1e-6)
    no_noisy_frame = (tau == 0.1).all(dim=1).float().mean().item()
    assert no_noisy_frame == pytest.approx(1 / (frames - 1), abs=0.01)
    lag = torch.corrcoef(torch.stack([tau[:, 1:-1].flatten(), tau[:, 2:].flatten()]))[0, 1]
    assert lag > 0.8
    cells = coverage(tau)
    assert (cells[1, 1:] == 0).all()
    assert (cells[frames // 2, 6:] == 0).all()
    # the first target frame, given its h: tau_ctx always, so never the pure noise that a rollout starts from
    first_noisy = (tau > 0.1).float().argmax(dim=1)
    first_target = tau.gather(1, (first_noisy - 1).clamp(min=0)[:, None])
    assert first_target.max() == pytest.approx(0.1)


def test_independent_covers_every_position_and_tau_bin():
    cells = coverage(FORCINGS["independent"](20_000, 12, K_MAX, 0.1, seeded())[0])
    assert cells.shape == (12, 10)
    assert cells.min() > 0.025
    assert (cells[:, -1] > PURE_NOISE).all()


def test_prefix_gives_half_of_the_clips_a_context_at_exactly_tau_ctx_and_d_min():
    frames, clips = 6, 20_000
    tau, d = FORCINGS["prefix"](clips, frames, K_MAX, 0.33, seeded())
    context = tau == torch.tensor(0.33)  # on no grid of eq. 4
    length = context.sum(dim=1)
    assert torch.equal(context, torch.arange(frames)[None] < length[:, None])  # always a beginning of the clip
    assert (d[context] == 1 / K_MAX).all()
    assert (length > 0).float().mean().item() == pytest.approx(0.5, abs=0.015)
    shares = torch.bincount(length[length > 0], minlength=frames)[1:] / (length > 0).sum()
    torch.testing.assert_close(shares, torch.full((5,), 0.2), atol=0.02, rtol=0)
    rest_tau, rest_d = tau[~context], d[~context]
    check_uniform(rest_d, LEVELS)
    for size in LEVELS:
        check_uniform(rest_tau[rest_d == size], [i * size for i in range(1, round(1 / size) + 1)])


@pytest.mark.parametrize("name", ["horizon", "prefix"])
def test_schedules_that_need_a_context_refuse_a_single_frame(name):
    with pytest.raises(ValueError, match="at least 2 frames"):
        FORCINGS[name](4, 1, K_MAX, 0.1, seeded())


def test_the_finest_step_size_is_1_over_k_max():
    assert torch.equal(finest(torch.ones(2, 3), 16), torch.full((2, 3), 0.0625))


def test_coverage_counts_each_draw_in_the_bin_that_ends_at_it():
    tau = torch.tensor([[0.0, 0.1, 1.0], [0.05, 0.11, 0.95], [0.1, 0.5, 0.9], [0.3, 0.7, 0.91]])
    by_hand = torch.zeros(3, 10)
    for row in tau.tolist():
        for position, value in enumerate(row):
            inside = [i for i in range(10) if i / 10 + 1e-6 < value <= (i + 1) / 10 + 1e-6]
            by_hand[position, inside[0] if inside else 0] += 1 / 4
    assert torch.equal(coverage(tau), by_hand)
    assert coverage(tau, bins=4)[2].tolist() == [0, 0, 0, 1]


def test_context_forcing_commits_half_of_the_frames_and_draws_the_rest_as_eq_4():
    tau, d = FORCINGS["context"](2000, 12, 64, 0.1, torch.Generator().manual_seed(0))
    committed = (tau == torch.tensor(0.1)) & (d == 1 / 64)
    assert committed.float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert tau[~committed].eq(1).float().mean().item() == pytest.approx(sum(2.0**-i for i in range(7)) / 7, abs=0.01)
    steps = tau[~committed] / d[~committed]
    assert torch.equal(steps, steps.round())
    assert steps.min() >= 1


def test_context_forcing_draws_the_pairs_of_a_rollout_more_than_twice_as_often_as_independent():
    """A noisy frame whose past can be seen: tau above .75 after a frame below .2."""

    def share(name):
        tau, _ = FORCINGS[name](4000, 12, 64, 0.1, torch.Generator().manual_seed(0))
        return ((tau[:, 1:] > 0.75) & (tau[:, :-1] < 0.2)).float().mean().item()

    assert share("context") > 2.5 * share("independent")


def test_uniform_forcing_draws_every_level_of_the_finest_grid_equally_often_and_no_shortcut():
    tau, d = FORCINGS["uniform"](2000, 16, 8, 0.1, torch.Generator().manual_seed(0))
    found = torch.bincount((tau * 8).round().long().flatten(), minlength=9) / tau.numel()
    assert found[0] == 0
    assert (found[1:] - 1 / 8).abs().max() < 0.01
    assert torch.equal(d, torch.full_like(d, 1 / 8))
