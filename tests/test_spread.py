"""Spread of samples: forecasts of known calibration must get their closed-form ratio, also through a rollout."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import NO_ACTIONS, breaks_at, fitted_tokenizer, noise, oracle, persistence, puppet_world, tiny_world

from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.oracles import SPREAD_EULER, SPREAD_FRESH_NOISE, SPREAD_STEPS, gaussian_denoiser
from ahriuwu_cli.evaluation.protocol import make_manifest, paired_bootstrap
from ahriuwu_cli.evaluation.spread import ratio_bootstrap, sample_spread, spread_of
from ahriuwu_cli.rollout import RolloutConfig

CONFIG = RolloutConfig(steps=1, tau_ctx=0.0)


def forecast(width: float, bias: float = 0.0, samples: int = 3, seed: int = 0):
    """Samples (S, 40, 2, 16, 16, 3) and truth of a Gaussian posterior of spread 0.05, drawn with `width` times that."""
    rng = np.random.default_rng(seed)
    shape = (40, 2, 16, 16, 3)
    middle = rng.uniform(0.3, 0.7, shape)
    truth = middle + 0.05 * rng.standard_normal(shape)
    return middle + bias + 0.05 * width * rng.standard_normal((samples, *shape)), truth


def ratio_of(table) -> float:
    return table["between"].sum() / table["error"].sum()


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Frames that nobody can foresee, of which the tokenizer keeps 12 whitened numbers a patch, each about N(0, 1)."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "noisy"
    with EpisodeWriter(
        path, height=16, width=16, fps=10.0, action_space=NO_ACTIONS, fractions=(0.4, 0.2, 0.4)
    ) as writer:
        for _ in range(10):
            writer.add((127 + 25 * rng.standard_normal((30, 16, 16, 3))).clip(0, 255).astype(np.uint8), None)
    return EpisodeStore.open(path)


def world_that(store, answer):
    """A puppet with latents whitened to N(0, 1) each, over the very frames that are scored."""
    world = puppet_world(store, answer)
    tokenizer = fitted_tokenizer(store)
    tokenizer.fit((torch.from_numpy(store.frames(e.id)) for e in store.episodes("test")), whitening=1.0)
    puppet = type(world.dynamics)(store, tokenizer, answer)
    return replace(world, tokenizer=tokenizer, dynamics=puppet)


def spread(world, store, config=CONFIG, **changes):
    manifest = make_manifest(store, "test", 3, 6, 12, 0)
    return sample_spread(world, store, manifest, config, **({"horizons": (1, 4), "batch": 5} | changes))


@pytest.mark.parametrize("width", [0.0, 0.5, 1.0, 2**0.5, 3.0])
def test_a_gaussian_forecast_gets_its_closed_form_ratio(width):
    samples, truth = forecast(width)
    assert ratio_of(spread_of(samples, truth)) == pytest.approx(2 * width**2 / (1 + width**2), abs=0.01)


def test_a_calibrated_sampler_has_ratio_1_doubled_variance_4_thirds_and_the_posterior_mean_0():
    found = [ratio_of(spread_of(*forecast(width))) for width in (1, 2**0.5, 0)]
    assert found == pytest.approx([1, 4 / 3, 0], abs=0.01)


def test_a_forecast_that_is_off_the_mark_has_a_ratio_below_1():
    assert ratio_of(spread_of(*forecast(1, bias=0.05))) == pytest.approx(2 / 3, abs=0.01)


def test_the_energy_score_is_best_for_the_calibrated_sampler():
    scores = {w: spread_of(*forecast(w))["energy"].mean() for w in (0, 0.5, 0.8, 1, 1.25, 2, 4)}
    assert min(scores, key=scores.get) == 1
    assert scores[1] == pytest.approx(0.05 * 2**0.5 / 2, rel=0.01)
    assert scores[0] == pytest.approx(0.05, rel=0.01)
    assert spread_of(*forecast(1, bias=0.05))["energy"].mean() > scores[1]


def test_the_number_of_samples_changes_no_expectation():
    few, many = (spread_of(*forecast(1, samples=s)) for s in (2, 8))
    for name in few:
        assert few[name].mean() == pytest.approx(many[name].mean(), rel=0.01)


def test_spread_is_the_slow_mean_over_pairs():
    rng = np.random.default_rng(0)
    samples, truth = rng.random((3, 2, 4, 5, 5, 3)), rng.random((2, 4, 5, 5, 3))
    table = spread_of(samples, truth)
    for w in range(2):
        for t in range(4):
            s, x = samples[:, w, t], truth[w, t]
            pairs = [((s[i] - s[j]) ** 2).mean() for i in range(3) for j in range(3) if i != j]
            errors = [((s[i] - x) ** 2).mean() for i in range(3)]
            assert table["between"][w, t] == pytest.approx(np.mean(pairs))
            assert table["error"][w, t] == pytest.approx(np.mean(errors))
            assert table["energy"][w, t] == pytest.approx(np.mean(np.sqrt(errors)) - np.mean(np.sqrt(pairs)) / 2)


def test_fresh_noise_per_step_is_seen_as_too_narrow_where_the_mean_squared_error_prefers_it():
    z = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 8, 5, 16, 48))).float()  # 5 samples, and a truth
    found = {}
    for name, spreads in (("euler", SPREAD_EULER), ("renoise", SPREAD_FRESH_NOISE)):
        for steps, width in zip(SPREAD_STEPS, spreads, strict=True):
            if steps not in (4, 16):
                continue
            generator = torch.Generator().manual_seed(2)
            drawn = [
                SAMPLERS[name](gaussian_denoiser, s, steps, tau_ctx=0.0, k_max=64, generator=generator)[0]
                for s in z[:5]
            ]
            frames = [(0.5 + 0.05 * v.numpy()).reshape(8, 5, 16, 16, 3) for v in (*drawn, z[5])]
            table = found[name, steps] = spread_of(np.stack(frames[:5]), frames[5])
            assert ratio_of(table) == pytest.approx(2 * width**2 / (1 + width**2), abs=0.03)
    assert found["renoise", 16]["error"].mean() < found["euler", 16]["error"].mean()
    assert found["renoise", 16]["energy"].mean() > found["euler", 16]["energy"].mean()


def test_a_sample_that_is_not_finite_makes_its_frame_nan_and_no_other():
    samples, truth = forecast(1)
    finite = np.ones((3, 40, 2), bool)
    finite[1, 7, 0] = False
    for values in spread_of(samples, truth, finite).values():
        assert np.isnan(values[7, 0])
        assert np.isfinite(np.delete(values.ravel(), 14)).all()


def test_the_ratio_of_sums_is_bootstrapped_with_numerator_and_denominator_together():
    rng = np.random.default_rng(0)
    below, episodes = rng.uniform(0.1, 5, 40), [f"e{i // 4}" for i in range(40)]
    exact = ratio_bootstrap(0.7 * below, below, episodes)
    assert (exact.value, exact.lo, exact.hi) == pytest.approx((0.7, 0.7, 0.7))
    above = below * rng.uniform(0.5, 1.5, 40)
    found = ratio_bootstrap(above, below, episodes)
    assert found.value == pytest.approx(above.sum() / below.sum())
    assert found.lo < found.value < found.hi
    plain, wanted = ratio_bootstrap(above, np.ones(40), episodes), paired_bootstrap(above, episodes)
    assert (plain.value, plain.lo, plain.hi) == pytest.approx((wanted.value, wanted.lo, wanted.hi))


def test_the_interval_of_the_ratio_covers_it_in_about_19_of_20_cases():
    hits = 0
    for i in range(200):
        rng = np.random.default_rng(i)
        scale = rng.gamma(2, size=(8, 1))  # episodes differ in how much there is to foresee
        share = 0.8 + 0.2 * rng.standard_normal((8, 1))
        below = scale * rng.uniform(0.8, 1.2, (8, 6))
        found = ratio_bootstrap(
            (share * below).ravel(), below.ravel(), [f"e{k // 6}" for k in range(48)], resamples=500
        )
        hits += found.lo <= 0.8 <= found.hi
    assert 0.88 < hits / 200 <= 0.99


def test_a_ratio_of_nothing_to_nothing_is_nan_and_so_is_the_interval_of_one_episode():
    none = ratio_bootstrap(np.zeros(4), np.zeros(4), list("abcd"))
    assert np.isnan([none.value, none.lo, none.hi]).all()
    broken = ratio_bootstrap(np.array([1.0, np.nan]), np.ones(2), list("ab"))
    assert np.isnan([broken.value, broken.lo, broken.hi]).all()
    alone = ratio_bootstrap(np.ones(4), np.full(4, 2.0), list("aaaa"))
    assert alone.value == 0.5
    assert np.isnan([alone.lo, alone.hi]).all()


@pytest.mark.parametrize(("width", "wanted"), [(1.0, 1.0), (0.5, 0.4), (0.0, 0.0)])
def test_rollouts_that_draw_from_the_truth_s_own_distribution_have_ratio_1_and_narrower_ones_less(noisy, width, wanted):
    rows = spread(world_that(noisy, lambda scene: width * noise(scene)), noisy)["horizons"]
    assert list(rows) == ["1", "4", "6"]
    for row in rows.values():
        assert row["spread_ratio"]["value"] == pytest.approx(wanted, abs=0.06)
        if width:
            assert row["spread_ratio"]["lo"] < row["spread_ratio"]["value"] < row["spread_ratio"]["hi"]


def test_the_energy_score_of_true_draws_beats_narrow_ones_and_persistence(noisy):
    draws, narrow = (
        spread(world_that(noisy, lambda scene, w=w: w * noise(scene)), noisy)["horizons"]["6"] for w in (1.0, 0.5)
    )
    assert draws["energy_score"]["value"] < narrow["energy_score"]["value"]
    assert draws["energy_gain"]["lo"] > 0
    assert draws["energy_floor"] == narrow["energy_floor"]


def test_persistence_has_no_spread_and_no_gain(noisy):
    for row in spread(world_that(noisy, persistence(3)), noisy)["horizons"].values():
        assert row["spread_ratio"]["value"] == 0
        assert row["sample_rms"] == 0
        assert row["energy_gain"]["value"] == pytest.approx(0, abs=1e-4)
        assert row["energy_score"]["value"] == pytest.approx(row["energy_floor"]["value"], abs=1e-4)


def test_the_truth_is_what_the_tokenizer_makes_of_it(noisy):
    """A perfect model errs by nothing, though the tokenizer loses most of these frames."""
    found = spread(world_that(noisy, oracle), noisy)
    assert found["against"] == "decode(encode(truth))"
    for row in found["horizons"].values():
        assert row["error_rms"] < 1e-3
        assert row["energy_floor"]["value"] > 0.01


def test_nan_is_counted_and_makes_the_horizons_that_it_touches_null(noisy):
    found = spread(world_that(noisy, breaks_at(3 + 2)), noisy, seeds=2)  # the 3rd generated frame of 3 batches
    assert found["not_finite_frames"] == 2 * 3 * 4
    assert found["horizons"]["4"]["spread_ratio"] == {"value": None, "lo": None, "hi": None}
    assert found["horizons"]["4"]["energy_score"]["value"] is None
    assert found["horizons"]["1"]["energy_score"]["value"] is not None
    json.dumps(found, allow_nan=False)


def test_batch_size_changes_nothing_and_another_seed_does(noisy):
    world, config = tiny_world(noisy), RolloutConfig(steps=2)
    results = [spread(world, noisy, config, batch=b) for b in (1, 5, 12)]
    for other in results[1:]:
        for h, row in results[0]["horizons"].items():
            assert row["spread_ratio"]["value"] == pytest.approx(
                other["horizons"][h]["spread_ratio"]["value"], abs=1e-3
            )
    moved = spread(world, noisy, config, seed=100)
    assert moved["noise_seeds"] == [100, 101, 102, 103]
    assert moved["horizons"] != results[1]["horizons"]


def test_fewer_windows_are_the_manifest_s_first_ones(noisy):
    world, ticks = world_that(noisy, noise), []
    found = spread(world, noisy, windows=4, seeds=3, tick=ticks.append)
    assert found["n"]["windows"] == 4
    assert sum(ticks) == 4 * 6 * 3
    manifest = make_manifest(noisy, "test", 3, 6, 12, 0)
    first = replace(manifest, windows=manifest.windows[:4])
    assert sample_spread(world, noisy, first, CONFIG, seeds=3, horizons=(1, 4), batch=5) == found


def test_what_has_no_spread_is_refused_in_a_sentence(noisy):
    with pytest.raises(UserError, match="needs at least 2 noise seeds, got 1"):
        spread(tiny_world(noisy), noisy, seeds=1)
    with pytest.raises(UserError, match="windows and batch must be at least 1, got 0 and 5"):
        spread(tiny_world(noisy), noisy, windows=0)
