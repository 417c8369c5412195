"""Step sizes are judged honestly: a perfect shortcut passes, a model that ignores d does not, all K share noise."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import NO_ACTIONS, breaks_at, moving_pictures, oracle, persistence, puppet_world, tiny_world

from ahriuwu_cli.diffusion.objective import bootstrap_target
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation import oracles
from ahriuwu_cli.evaluation.evaluate import quick_gain
from ahriuwu_cli.evaluation.generate import generate
from ahriuwu_cli.evaluation.metrics import motion_ratio, psnr_per_frame, sharpness_ratio
from ahriuwu_cli.evaluation.protocol import make_manifest, paired_bootstrap, read_windows
from ahriuwu_cli.evaluation.step_sizes import consistency, step_size_curve
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig

K_MAX = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("data") / "a")


@pytest.fixture(scope="module")
def manifest(store):
    return make_manifest(store, "test", 4, 6, 8, 0)


@pytest.fixture(scope="module")
def tiny(store):
    world = tiny_world(store)
    return replace(world, generation=replace(world.generation, tau_ctx=0.1))


def standing_in(world, answer):
    """The world with a model that answers `answer(z, tau, d)`, whatever the context."""

    def extend(z, tau, d, actions, known, cache, keep, unread=0):
        cache.frames += keep
        return answer(z, tau, d)[:, unread:]

    dynamics = SimpleNamespace(
        config=world.dynamics.config,
        embed=world.dynamics.embed,
        new_cache=lambda batch: SimpleNamespace(window=6, frames=0),
        extend=extend,
    )
    return replace(world, dynamics=dynamics)


def exact_shortcut(z, tau, d):
    """The flow of data N(0, 2^2) in closed form, in the paper's direction: a step of d lands where the flow is."""
    spread = lambda s: torch.sqrt((2 * s) ** 2 + (1 - s) ** 2)  # noqa: E731
    s, jump = ((1 - tau)[..., None, None], d[..., None, None])
    velocity = (z * spread(s + jump) / spread(s) - z) / jump
    return z + (1 - s) * velocity


def one_row(result, d):
    return next(row for row in result["rows"] if row["d"] == d)


# One step against the steps it stands for


def test_a_perfect_shortcut_agrees_with_its_halves_and_with_the_fine_steps(tiny, store, manifest):
    result = consistency(standing_in(tiny, exact_shortcut), store, manifest)
    assert [row["d"] for row in result["rows"]] == [1.0, 0.5, 0.25]
    for row in result["rows"]:
        assert row["halves"]["hi"] < 1e-4
        assert row["fine"]["hi"] < 1e-4
        assert row["halves_blind"]["lo"] > 1e-2
        assert row["fine_blind"]["lo"] > 1e-2
        assert row["heard"]["value"] > 1e-3  # the naive comparison blames the perfect model
    assert result["verdict"]["ok"] is True
    assert result["verdict"]["gap_closed"] == pytest.approx(1, abs=1e-2)


def test_a_model_that_ignores_d_passes_the_naive_comparison_and_fails_here(tiny, store, manifest):
    result = consistency(standing_in(tiny, oracles.gaussian_denoiser), store, manifest)
    for row in result["rows"]:
        assert row["heard"]["value"] == 0
        assert row["halves"] == row["halves_blind"]
        assert row["fine"] == row["fine_blind"]
        assert row["fine_gain"] == row["halves_gain"] == {"value": 0, "lo": 0, "hi": 0}
        assert row["halves"]["value"] > 1e-3
    assert result["verdict"]["ok"] is False
    assert "blind to d" in result["verdict"]["reason"]


def test_one_step_from_noise_without_d_is_off_by_as_much_as_its_halves_go(tiny, store, manifest):
    """By hand, d = 1 on z = 1: the first half goes to 0.5 (z_hat 0), the second stays (z_hat 0.5); one goes to 0."""
    result = consistency(standing_in(tiny, oracles.gaussian_denoiser), store, manifest, levels=1)
    assert one_row(result, 1.0)["halves"]["value"] == pytest.approx(0.5 / 0.5, abs=1e-5)


def test_a_student_of_eq_7_agrees_with_its_halves_and_beats_its_blind_copy(tiny, store, manifest):
    student = oracles.bootstrapped_denoiser(bootstrap_target, 1 / K_MAX)
    result = consistency(standing_in(tiny, student), store, manifest)
    for row in result["rows"]:
        assert row["halves"]["hi"] < 1e-5
        assert row["fine_gain"]["lo"] > 0
    assert result["verdict"]["ok"] is True


def test_a_chain_of_d_that_left_the_flow_agrees_with_its_halves_and_still_fails(tiny, store, manifest):
    def left(z, tau, d):  # the flow at d_min, always the same answer above it
        return torch.where((d > 1 / K_MAX)[..., None, None], torch.full_like(z, 2.0), exact_shortcut(z, tau, d))

    result = consistency(standing_in(tiny, left), store, manifest)
    assert result["verdict"]["ok"] is False
    assert result["verdict"]["gap_closed"] < 0
    assert one_row(result, 1.0)["halves"]["hi"] < 1e-5
    assert one_row(result, 0.5)["halves"]["hi"] < 1e-5


def test_a_model_that_hears_d_and_makes_nothing_of_it_fails(tiny, store, manifest):
    louder = lambda z, tau, d: oracles.gaussian_denoiser(z, tau, d) * (1 - 0.2 * d)[..., None, None]  # noqa: E731
    result = consistency(standing_in(tiny, louder), store, manifest)
    assert one_row(result, 1.0)["heard"]["value"] == 0  # 0 from pure noise, whatever it is multiplied by ...
    assert one_row(result, 0.25)["heard"]["value"] > 1e-3  # ... but not from elsewhere
    assert result["verdict"]["ok"] is False
    assert "no nearer" in result["verdict"]["reason"]


def test_a_model_that_always_answers_the_same_is_not_praised_for_agreeing_with_itself(tiny, store, manifest):
    result = consistency(standing_in(tiny, lambda z, tau, d: torch.zeros_like(z)), store, manifest)
    assert all(row["halves"]["hi"] < 1e-5 for row in result["rows"])
    assert result["verdict"]["ok"] is None
    assert "straight" in result["verdict"]["reason"]


def test_a_real_model_whose_d_is_cut_off_is_caught(tiny, store, manifest):
    assert max(row["heard"]["value"] for row in consistency(tiny, store, manifest)["rows"]) > 1e-3
    deaf = tiny_world(store)
    deaf.dynamics.level.d_table.copy_(deaf.dynamics.level.d_table[:1].expand_as(deaf.dynamics.level.d_table))
    assert consistency(deaf, store, manifest)["verdict"]["ok"] is False


@pytest.mark.parametrize("context", [4, 9])
def test_the_distances_are_those_of_whole_passes_over_clips_as_a_rollout_has_them(tiny, store, context):
    """Slow and obvious: no cache, the paper's own steps, context mixed and labelled at tau_ctx, as much as is seen."""
    manifest = make_manifest(store, "test", context, 6, 8, 0)
    result = consistency(tiny, store, manifest, windows=3, levels=4, seed=5)
    frames, actions = read_windows(store, manifest, 0, 3)
    given = range(context)[-tiny.dynamics.config.window :]
    seen = slice(given[0], context + 1)
    z_clean = tiny.encode(torch.from_numpy(frames[:, : context + 1]))
    incoming, known = incoming_actions(torch.from_numpy(actions), torch.ones(3, dtype=torch.bool))
    noise = KeyedNoise(5, manifest.keys[:3], tuple(z_clean.shape[2:]))
    before = torch.stack([0.9 * z_clean[:, t] + 0.1 * noise(t, "prompt") for t in given], dim=1)

    def model(z, tau, d):
        taus, sizes = (torch.full((3, len(given) + 1), value) for value in (0.1, 1 / K_MAX))
        taus[:, -1], sizes[:, -1] = tau, d
        z = torch.cat([before, z[:, None]], dim=1)
        return tiny.dynamics(z, taus, sizes, incoming[:, seen], known[:, seen])[:, -1]

    def walk(z, tau, d, told, steps):
        for i in range(steps):
            here = tau - i * d
            z = z - d * (z - model(z, here, told)) / here
        return z

    for d, taus in ((1.0, (1.0,)), (0.5, (0.5, 1.0)), (0.25, (0.25, 0.5, 0.75, 1.0))):
        sums = dict.fromkeys(("halves", "two", "fine", "fine_blind", "walk", "heard"), 0.0)
        for tau in taus:
            z = (1 - tau) * z_clean[:, context] + tau * noise(context, "start")
            one, blind = walk(z, tau, d, d, 1), walk(z, tau, d, 1 / K_MAX, 1)
            two, end = walk(z, tau, d / 2, d / 2, 2), walk(z, tau, 1 / K_MAX, 1 / K_MAX, round(d * K_MAX))
            found = {"halves": one - two, "two": two - z, "fine": one - end, "fine_blind": blind - end}
            for name, value in (found | {"walk": end - z, "heard": one - blind}).items():
                sums[name] = sums[name] + value.square().sum(dim=(1, 2))
        row = one_row(result, d)
        for name, size in (("halves", "two"), ("fine", "walk"), ("fine_blind", "walk"), ("heard", "walk")):
            expected = (sums[name] / sums[size]).sqrt().mean().item()
            assert row[name]["value"] == pytest.approx(expected, rel=1e-4, abs=2e-6), (d, name)


def test_levels_lie_on_the_grid_of_d_above_tau_ctx_and_context_is_what_its_label_says(tiny, store, manifest):
    asked, committed = [], []

    def spy(z, tau, d):
        if tau.shape[1] == 1:
            asked.append((d.flatten()[0].item(), tau.flatten()[0].item()))
        else:
            committed.append((z, tau, d))
        return exact_shortcut(z, tau, d)

    world = replace(standing_in(tiny, spy), trained_d=(0.25, 0.125), generation=RolloutConfig(1, "euler", 0.3))
    consistency(world, store, manifest, levels=8)
    assert {tau for d, tau in asked if d == 0.25} == {0.5, 0.75, 1.0}
    ((z, tau, d),) = committed
    assert torch.equal(tau, torch.full((8, 4), 0.3))
    assert torch.equal(d, torch.full((8, 4), 0.125))
    z_clean = tiny.encode(torch.from_numpy(read_windows(store, manifest)[0]))[:, :4]
    noise = KeyedNoise(0, manifest.keys, tuple(z.shape[2:]))
    drawn = torch.stack([noise(t, "prompt") for t in range(4)], dim=1)
    torch.testing.assert_close(z, oracles.paper_mix(z_clean, drawn, tau))


def test_step_sizes_that_cannot_be_asked_are_named(tiny, store, manifest):
    tiny = replace(tiny, generation=RolloutConfig(sampler="euler"))
    holes = consistency(replace(tiny, trained_d=(1.0, 0.25, 0.125)), store, manifest)
    assert [row["d"] for row in holes["rows"]] == [0.25]
    assert holes["skipped"] == [{"d": 1.0, "reason": "d/2 = 0.5 was not trained"}]
    alone = consistency(replace(tiny, trained_d=(0.125,)), store, manifest)
    assert alone["rows"] == []
    assert alone["verdict"]["ok"] is None


def test_predictions_that_are_not_finite_are_counted_and_fail(tiny, store, manifest):
    def broken(z, tau, d):
        out = exact_shortcut(z, tau, d)
        return torch.where((torch.arange(len(z)) == 0)[:, None, None, None], out / 0, out)

    result = consistency(standing_in(tiny, broken), store, manifest, batch=4)
    assert [row["not_finite_windows"] for row in result["rows"]] == [2, 2, 2]
    assert result["rows"][0]["halves"]["value"] is None
    assert result["verdict"]["ok"] is False
    json.dumps(result, allow_nan=False)


def test_a_model_that_hardly_hears_d_is_not_called_consistent(tiny, store, manifest):
    def deaf(share):
        def denoise(z, tau, d):
            blind = oracles.gaussian_denoiser(z, tau, d)
            return blind + share * (exact_shortcut(z, tau, d) - blind)

        return consistency(standing_in(tiny, denoise), store, manifest)["verdict"]

    assert deaf(0.005) == {"ok": False, "reason": deaf(0.005)["reason"], "gap_closed": pytest.approx(0.005, abs=0.005)}
    assert "hardly lands nearer" in deaf(0.005)["reason"]
    assert deaf(0.5)["ok"] is True


def test_with_one_episode_a_gain_cannot_be_told_from_chance(tiny, store, manifest):
    episode = manifest.episodes[0]
    alone = replace(manifest, windows=tuple((episode, start) for start in (0, 5, 9)))
    result = consistency(standing_in(tiny, exact_shortcut), store, alone)
    assert result["verdict"]["ok"] is None
    assert result["verdict"]["gap_closed"] == pytest.approx(1, abs=1e-2)


def test_batches_change_no_distance_and_seeds_do(tiny, store, manifest):
    whole, parts = (consistency(tiny, store, manifest, batch=b) for b in (8, 3))
    for a, b in zip(whole["rows"], parts["rows"], strict=True):
        for name in ("halves", "halves_blind", "fine", "fine_blind", "heard"):
            assert a[name]["value"] == pytest.approx(b[name]["value"], abs=1e-5)
    assert consistency(tiny, store, manifest, seed=1)["rows"] != whole["rows"]


# Free-running by K


def test_a_row_is_the_rollout_of_its_own_settings_scored_beside_persistence(tiny, store, manifest):
    result = step_size_curve(tiny, store, manifest, steps=(1, 2, 8), windows=5, seed=3)
    frames, actions = read_windows(store, manifest, 0, 5)
    episodes, truth, psnr, made = manifest.episodes[:5], frames[:, 4:], {}, {}
    for row in result["rows"]:
        config = RolloutConfig(row["steps"], row["sampler"], 0.1)
        shown = generate(tiny, frames, actions, manifest.keys[:5], config, seed=3, context=4).frames
        cell = row["sampler"], row["steps"]
        psnr[cell], made[cell] = psnr_per_frame(shown, truth), shown
        floor = psnr_per_frame(np.repeat(frames[:, 3:4], 6, axis=1), truth)
        assert row["psnr"]["6"] == pytest.approx(psnr[cell][:, 5].mean(), abs=1e-5)
        assert row["gain_db"]["4"]["value"] == pytest.approx((psnr[cell] - floor)[:, 3].mean(), abs=1e-5)
        assert row["sharpness_ratio"]["6"] == pytest.approx(sharpness_ratio(shown[:, 5], truth[:, 5]), abs=1e-5)
    assert len(psnr) == 6
    assert result["reference"] == {"sampler": "shortcut", "steps": 2}
    for row in result["rows"]:
        expected = paired_bootstrap((psnr[row["sampler"], row["steps"]] - psnr["shortcut", 2])[:, 5], episodes)
        for name, value in row["difference_db"]["6"].items():
            assert value == pytest.approx(getattr(expected, name), abs=1e-5)
    assert len({row["psnr"]["6"] for row in result["rows"]}) > 3
    assert motion_ratio(made["euler", 8], truth) > 0


def test_the_reference_differs_from_itself_by_nothing_and_agrees_with_the_preview(tiny, store, manifest):
    result = step_size_curve(tiny, store, manifest, steps=(1,), windows=100)
    row = next(row for row in result["rows"] if row["reference"])
    assert (row["sampler"], row["steps"]) == (tiny.generation.sampler, tiny.generation.steps)  # added, though not asked
    assert row["difference_db"]["6"] == {"value": 0, "lo": 0, "hi": 0}
    quick = quick_gain(tiny, store, manifest, tiny.generation)
    assert row["gain_db"]["6"]["value"] == pytest.approx(quick["gain_db"]["6"], abs=1e-5)


def test_every_k_is_either_measured_or_skipped_with_its_reason(tiny, store, manifest):
    result = step_size_curve(replace(tiny, trained_d=(0.125,)), store, manifest, RolloutConfig(2, "euler"), windows=2)
    cells = [(r["sampler"], r["steps"]) for r in [*result["rows"], *result["skipped"]]]
    assert sorted(cells) == sorted((s, k) for s in ("euler", "shortcut") for k in (1, 2, 4, 8, 16, 64))
    assert {r["steps"] for r in result["rows"] if r["sampler"] == "euler"} == {1, 2, 4, 8, 16, 64}
    assert {r["steps"] for r in result["rows"] if r["sampler"] == "shortcut"} == {8}
    reasons = {r["steps"]: r["reason"] for r in result["skipped"]}
    assert "not trained for step size d = 1/4" in reasons[4]
    assert "power of two up to 8" in reasons[16]


def test_passes_are_those_that_the_model_really_took(tiny, store, manifest):
    count = 0

    def counted(z, tau, d):
        nonlocal count
        count += 1
        return exact_shortcut(z, tau, d)

    short = replace(manifest, horizon=1)
    for steps in (2, 8):
        count = 0
        world = standing_in(tiny, counted)
        world = replace(world, generation=RolloutConfig(steps, "shortcut", 0.3))
        result = step_size_curve(world, store, short, steps=(steps,), windows=2)
        assert count - 2 == sum(row["passes"] for row in result["rows"])  # and one pass a rollout for its context
    assert {r["sampler"]: r["passes"] for r in result["rows"]} == {"euler": 8, "shortcut": 6}


def test_the_oracle_is_at_the_ceiling_at_every_k_and_persistence_stands_still(store, manifest):
    perfect = step_size_curve(puppet_world(store, oracle), store, manifest, steps=(1, 4))
    for row in perfect["rows"]:
        assert row["psnr"]["6"] == pytest.approx(perfect["ceiling"]["6"], abs=0.01)
        assert row["difference_db"]["6"]["value"] == pytest.approx(0, abs=0.01)
    still = step_size_curve(puppet_world(store, persistence(4)), store, manifest, steps=(1, 4))
    for row in still["rows"]:
        assert row["motion_ratio"]["6"] < 0.01


def test_frames_that_are_not_finite_are_counted_and_touch_only_what_they_must(store, manifest):
    result = step_size_curve(puppet_world(store, breaks_at(6)), store, manifest, steps=(2,))
    for row in result["rows"]:
        assert row["not_finite_frames"] == 4
        assert row["psnr"]["1"] is not None
        assert row["psnr"]["6"] is row["gain_db"]["6"]["value"] is row["sharpness_ratio"]["6"] is None
    json.dumps(result, allow_nan=False)


def test_what_does_not_fit_is_refused_in_a_sentence(tiny, store, manifest, tmp_path):
    with pytest.raises(UserError, match="at least 1"):
        step_size_curve(tiny, store, manifest, windows=0)
    with pytest.raises(UserError, match="at least 1"):
        step_size_curve(tiny, store, manifest, steps=(0, 2))
    with pytest.raises(UserError, match="tau-ctx"):
        step_size_curve(tiny, store, manifest, RolloutConfig(tau_ctx=1.0))
    with pytest.raises(UserError, match="levels"):
        consistency(tiny, store, manifest, levels=0)
    other = moving_pictures(tmp_path / "b", space=NO_ACTIONS)
    with pytest.raises(DataError):
        consistency(tiny, other, manifest)
    with pytest.raises(DataError, match="another dataset"):
        consistency(tiny, store, replace(manifest, fingerprint="x"))
