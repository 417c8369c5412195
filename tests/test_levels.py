"""The view by noise level shows what is known beforehand: linear and perfect denoisers, ramps, starved schedules."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from worlds import moving_pictures, tiny_world

from ahriuwu_cli.diffusion.forcing import FORCINGS, coverage
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation import levels, oracles, plot_levels
from ahriuwu_cli.evaluation.levels import asked_levels, error_by_level
from ahriuwu_cli.evaluation.protocol import make_manifest, read_windows
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig

TRAIN = {
    "frames": 8,
    "long_frames": 0,
    "long_every": 0,
    "single_image_share": 0.0,
    "tau_ctx": 0.1,
    "ramp": "paper",
    "lr": 0.1,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("data") / "a")


@pytest.fixture(scope="module")
def manifest(store):
    return make_manifest(store, "test", 4, 6, 12, 0)


@pytest.fixture(scope="module")
def tiny(store):
    world = tiny_world(store)
    return replace(world, generation=RolloutConfig(2, "euler", 0.1), facts={"train": TRAIN})


@pytest.fixture(scope="module")
def result(tiny, store, manifest):
    return error_by_level(tiny, store, manifest)


def standing_in(world, answer):
    """The world with a model that answers `answer(z, tau, frames committed before)`; d and actions play no part."""

    def extend(z, tau, d, actions, known, cache, keep, unread=0):
        out = answer(z, tau, cache.frames)
        cache.frames += keep
        return out[:, unread:]

    dynamics = SimpleNamespace(
        config=world.dynamics.config,
        embed=world.dynamics.embed,
        new_cache=lambda batch: SimpleNamespace(window=6, frames=0),
        extend=extend,
    )
    return replace(world, dynamics=dynamics)


def clean_latents(world, store, manifest):
    """(W, T, N, D)"""
    return world.encode(torch.from_numpy(read_windows(store, manifest)[0]))


# The error


def test_the_table_is_that_of_whole_passes_over_clips_with_all_frames_before_at_tau_ctx(tiny, store, manifest, result):
    """Slow and obvious: for every position and level one pass over the clip, no cache; the clip outlasts the window."""
    assert manifest.length > tiny.dynamics.config.window
    z_clean = clean_latents(tiny, store, manifest)
    incoming, known = incoming_actions(
        torch.from_numpy(read_windows(store, manifest)[1]), torch.ones(len(z_clean), dtype=torch.bool)
    )
    noise = KeyedNoise(0, manifest.keys, tuple(z_clean.shape[2:]))
    variance = (z_clean - z_clean.mean(dim=(0, 1))).square().mean()
    for p in range(manifest.length):
        for i in (0, 4, 9):
            level, now = (i + 1) / 10, p + 1
            z = torch.stack([0.9 * z_clean[:, t] + 0.1 * noise(t, "prompt") for t in range(now)], dim=1)
            z[:, p] = (1 - level) * z_clean[:, p] + level * noise(p, "start")
            tau = torch.full((len(z), now), 0.1)
            tau[:, p] = level
            z_hat = tiny.dynamics(z, tau, torch.full_like(tau, 1 / 8), incoming[:, :now], known[:, :now])[:, p]
            expected = (z_hat - z_clean[:, p]).square().mean() / variance
            assert result["error"][p][i] == pytest.approx(expected.item(), rel=1e-4, abs=2e-6), (p, i)


def test_the_linear_denoiser_scores_its_own_reference_at_every_level(tiny, store, manifest):
    z_clean = clean_latents(tiny, store, manifest)
    mean, power = z_clean.mean(dim=(0, 1)), z_clean.var(dim=(0, 1), unbiased=False)

    def linear(z, tau, before):
        s = (1 - tau)[..., None, None]  # the paper's direction
        return mean + s * power * (z - s * mean) / (s**2 * power + (1 - s) ** 2)

    seeds = [error_by_level(standing_in(tiny, linear), store, manifest, seed=s) for s in range(10)]
    found = seeds[0]
    np.testing.assert_allclose(np.mean([s["error"] for s in seeds], axis=(0, 1)), found["linear"], rtol=0.02)
    assert found["linear"][-1] == pytest.approx(1, abs=1e-6)
    assert found["linear"] == sorted(found["linear"])


def test_the_mean_latent_scores_1_and_the_truth_0_at_every_level(tiny, store, manifest):
    z_clean = clean_latents(tiny, store, manifest)
    mean = z_clean.mean(dim=(0, 1))
    found = error_by_level(standing_in(tiny, lambda z, tau, n: mean.expand(z.shape)), store, manifest)
    np.testing.assert_allclose(np.mean(found["error"], axis=0), 1, atol=1e-4)
    found = error_by_level(standing_in(tiny, lambda z, tau, n: z_clean[:, n : n + 1]), store, manifest)
    np.testing.assert_allclose(found["error"], 0, atol=1e-6)


def test_a_model_that_needs_context_is_good_from_position_1_on_and_bad_alone(tiny, store, manifest):
    z_clean = clean_latents(tiny, store, manifest)
    answer = lambda z, tau, n: z_clean[:, n : n + 1] if n else torch.zeros_like(z)  # noqa: E731
    found = error_by_level(standing_in(tiny, answer), store, manifest)
    assert min(found["alone"]) > 0.5
    assert max(row["value"] for row in found["by_bin"]) < 1e-6


def test_a_bin_s_mean_is_over_positions_after_the_first_with_an_interval_over_episodes(result):
    for i, row in enumerate(result["by_bin"]):
        assert row["value"] == pytest.approx(np.mean([r[i] for r in result["error"][1:]]), abs=1e-5)
        assert row["lo"] < row["value"] < row["hi"]
    assert result["alone"] == result["error"][0]
    assert result["n"] == {"windows": 12, "episodes": 4, "noise_seeds": 1}


def test_every_frame_is_asked_at_every_level_and_committed_once_at_tau_ctx_as_labelled(tiny, store, manifest):
    calls, world = [], replace(tiny, generation=RolloutConfig(2, "euler", 0.3))

    def spy(z, tau, before):
        calls.append((before, round(tau.flatten()[0].item(), 6), z, tau))
        return z

    error_by_level(standing_in(world, spy), store, manifest, bins=4)
    assert [c[:2] for c in calls] == [(p, level) for p in range(10) for level in (0.25, 0.5, 0.75, 1.0, 0.3)]
    z_clean = clean_latents(tiny, store, manifest)
    noise = KeyedNoise(0, manifest.keys, tuple(z_clean.shape[2:]))
    for p, level, z, tau in calls:
        drawn = noise(p, "prompt" if level == 0.3 else "start")[:, None]
        torch.testing.assert_close(z, oracles.paper_mix(z_clean[:, p : p + 1], drawn, tau))


def test_batches_change_no_error_and_seeds_and_fewer_windows_do(tiny, store, manifest, result):
    parts = error_by_level(tiny, store, manifest, batch=5)
    np.testing.assert_allclose(parts["error"], result["error"], atol=2e-5)
    assert parts["coverage"] == result["coverage"]
    assert error_by_level(tiny, store, manifest) == result
    assert error_by_level(tiny, store, manifest, seed=1)["error"] != result["error"]
    fewer = error_by_level(tiny, store, manifest, windows=3)
    assert fewer["n"]["windows"] == 3


def test_predictions_that_are_not_finite_are_counted_and_empty_their_cell_alone(tiny, store, manifest):
    z_clean = clean_latents(tiny, store, manifest)

    def broken(z, tau, n):
        out = z_clean[:, n : n + 1].clone()
        if n == 2 and tau.flatten()[0] > 0.95:
            out[:3] = torch.nan
        return out

    found = error_by_level(standing_in(tiny, broken), store, manifest)
    assert found["not_finite"] == 3
    empty = [(p, i) for p, row in enumerate(found["error"]) for i, v in enumerate(row) if v is None]
    assert empty == [(2, 9)]
    assert found["by_bin"][9]["value"] is None
    assert found["by_bin"][8]["value"] is not None
    json.dumps(found, allow_nan=False)


# What training drew, and how it was weighted


def test_the_ramp_is_the_run_s_own_and_unknown_where_no_run_is_stated(tiny, store, manifest, result):
    taus = torch.arange(1, 11) / 10
    np.testing.assert_allclose(result["ramp"], oracles.paper_ramp(taus), atol=1e-6)
    inverted = replace(tiny, facts={"train": TRAIN | {"ramp": "inverted"}})
    found = error_by_level(inverted, store, manifest, windows=2)
    assert found["ramp"] == sorted(found["ramp"])
    assert found["ramp"][-1] == pytest.approx(1)
    bare = error_by_level(replace(tiny, facts={}), store, manifest, windows=2)
    assert bare["ramp"] is None
    assert bare["training"]["stated"] == []
    assert set(bare["training"]["assumed"]) == set(TRAIN) - {"lr"}
    assert bare["training"]["values"]["frames"] == tiny.dynamics.config.window
    assert result["training"]["assumed"] == []


def test_independent_forcing_starves_no_cell_and_horizon_all_beyond_its_ceiling(tiny, store, manifest, result):
    eighths = error_by_level(tiny, store, manifest, bins=8, windows=2)
    assert eighths["starved"] == []
    np.testing.assert_allclose(np.sum(eighths["coverage"], axis=1), 1, atol=1e-5)
    # a grid of k_max = 8 has no level in the tenths up to 0.1 and from 0.5 to 0.6, not even that of the context
    assert {c["bin"] for c in result["starved"]} == {0, 5}
    found = error_by_level(replace(tiny, forcing="horizon"), store, manifest, windows=2)
    starved = {(c["position"], c["bin"]) for c in found["starved"]}
    for p in range(1, 8):
        ceiling = oracles.horizon_ceiling(p, 8, 0.1)
        beyond = {(p, i) for i in range(10) if i / 10 > ceiling + 1e-6}
        assert beyond <= starved, p
        assert (p, 0) not in starved or p == 7
    assert (1, 9) in starved
    assert (7, 9) not in starved
    assert all(c["share"] < found["starved_below"] for c in found["starved"])
    assert not any(c["position"] == 0 for c in found["starved"])
    everywhere = error_by_level(replace(tiny, forcing="horizon"), store, manifest, windows=2, starved_below=1.1)
    assert len(everywhere["starved"]) == 9 * 10


def test_levels_below_tau_ctx_are_not_asked_for_and_the_world_s_own_walk_is_marked(tiny, store, manifest):
    world = replace(tiny, forcing="horizon", generation=RolloutConfig(2, "euler", 0.3))
    found = error_by_level(world, store, manifest, windows=2, starved_below=1.1)
    assert {c["bin"] for c in found["starved"]} == set(range(2, 10))
    own = {c["bin"] for c in found["starved"] if c["own_walk"]}
    assert own == {9, 6, 2}  # 1, 0.65, and 0.3, where the walk ends
    assert asked_levels(world.generation, 8) == (pytest.approx([1, 0.65]), pytest.approx(0.3))
    assert asked_levels(RolloutConfig(4, "shortcut", 0.3), 8) == ([1, 0.75, 0.5], pytest.approx(0.3))


def test_positions_beyond_the_training_clips_have_the_row_of_their_last(tiny, store, manifest):
    found = error_by_level(replace(tiny, forcing="horizon"), store, manifest, windows=2)
    assert found["trained_positions"] == 8
    assert found["positions"] == len(found["coverage"]) == 10
    assert found["coverage"][7] == found["coverage"][8] == found["coverage"][9]
    assert found["coverage"][6] != found["coverage"][7]


def test_single_images_are_drawn_at_position_0_and_long_clips_count_by_their_number(tiny, store, manifest):
    def found(**changes):
        world = replace(tiny, forcing="horizon", facts={"train": TRAIN | changes})
        return np.array(error_by_level(world, store, manifest, windows=2)["coverage"])

    draws = levels.DRAWS
    rows = {
        frames: coverage(FORCINGS["horizon"](draws, frames, 8, 0.1, torch.Generator().manual_seed(0))[0]).numpy()
        for frames in (8, 10)
    }
    np.testing.assert_allclose(found()[:8], rows[8], atol=1e-6)
    images = found(single_image_share=0.25)
    first = (0.75 * rows[8][0] + 0.25 * rows[8].sum(0)) / (0.75 + 0.25 * 8)
    np.testing.assert_allclose(images[0], first, atol=1e-6)
    np.testing.assert_allclose(images[1:8], rows[8][1:], atol=1e-6)
    mixed = found(long_every=3, long_frames=10)  # of 3 steps two with n clips of 8, one with 0.8 n clips of 10
    np.testing.assert_allclose(mixed[5], (2 * rows[8][5] + 0.8 * rows[10][5]) / 2.8, atol=1e-6)
    np.testing.assert_allclose(mixed[9], rows[10][9], atol=1e-6)


@pytest.mark.parametrize("forcing", ["independent", "horizon", "context"])
def test_draws_of_long_clips_are_made_a_part_at_a_time_and_show_the_same_coverage(forcing, monkeypatch):
    at_once = levels._drawn(forcing, 9, 8, 0.1, 10)
    whole, _ = FORCINGS[forcing](levels.DRAWS, 9, 8, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(at_once, coverage(whole, 10))
    seen, draw = [], FORCINGS[forcing]
    monkeypatch.setitem(FORCINGS, forcing, lambda clips, *rest: seen.append(clips) or draw(clips, *rest))
    monkeypatch.setattr(levels, "AT_ONCE", 9 * 1000)
    in_parts = levels._drawn(forcing, 9, 8, 0.1, 10)
    assert seen == [1000, 1000, 1000, 1000, 96]
    torch.testing.assert_close(in_parts, at_once, atol=0.03, rtol=0)  # 4,096 draws: a share is known to 0.008
    torch.testing.assert_close(in_parts.sum(1), torch.ones(9))


def test_what_cannot_be_read_is_refused_in_a_sentence(tiny, store, manifest):
    with pytest.raises(CheckpointError, match="unknown forcing 'horizont': did you mean 'horizon'"):
        error_by_level(replace(tiny, forcing="horizont"), store, manifest, windows=2)
    with pytest.raises(CheckpointError, match="unknown ramp 'steep'"):
        error_by_level(replace(tiny, facts={"train": TRAIN | {"ramp": "steep"}}), store, manifest, windows=2)
    for wrong in ({"bins": 0}, {"windows": 0}, {"batch": 0}):
        with pytest.raises(UserError, match="at least 1"):
            error_by_level(tiny, store, manifest, **wrong)
    with pytest.raises(DataError, match="another dataset"):
        error_by_level(tiny, store, replace(manifest, fingerprint="x"))


def test_clips_that_do_not_vary_are_refused_since_nothing_can_be_relative_to_them(tiny, store, manifest):
    same = replace(tiny)
    same.encode = lambda frames: torch.zeros(*frames.shape[:2], tiny.tokenizer.tokens, tiny.tokenizer.latent_dim)
    with pytest.raises(DataError, match="do not vary"):
        error_by_level(same, store, manifest)


# The figures


def drawn(draw, result, path, monkeypatch):
    """The figure that `draw` wrote to path."""
    kept, save = [], plot_levels.save_png
    monkeypatch.setattr(plot_levels, "save_png", lambda figure, p: (kept.append(figure), save(figure, p)))
    draw(result, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(path.parent.iterdir()) == [path]
    return kept[0]


def test_the_curve_shows_error_reference_and_ramp_over_tau(result, tmp_path, monkeypatch):
    figure = drawn(plot_levels.plot_error_by_level, result, tmp_path / "a.png", monkeypatch)
    axes, right = figure.axes
    assert axes.get_xlabel() == "tau (0 clean, 1 noise)"
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    assert len(lines) == 3
    np.testing.assert_allclose(lines["best linear denoiser of a value alone"], result["linear"])
    assert list(right.get_lines()[0].get_ydata()) == result["ramp"]
    assert len(axes.get_legend().get_texts() if axes.get_legend() else right.get_legend().get_texts()) == 4


def test_the_maps_show_error_and_coverage_by_position_and_cross_the_starved(
    tiny, store, manifest, tmp_path, monkeypatch
):
    found = error_by_level(replace(tiny, forcing="horizon"), store, manifest, windows=2)
    figure = drawn(plot_levels.plot_level_maps, found, tmp_path / "a.png", monkeypatch)
    left, right = figure.axes[:2]
    assert left.get_xlabel() == right.get_xlabel() == "tau (0 clean, 1 noise)"
    np.testing.assert_allclose(left.get_images()[0].get_array(), found["error"])
    np.testing.assert_allclose(right.get_images()[0].get_array(), found["coverage"])
    crosses = right.collections[0].get_offsets()
    assert len(crosses) == len(found["starved"]) > 0
    np.testing.assert_allclose(crosses, [((c["bin"] + 0.5) / 10, c["position"]) for c in found["starved"]])


def test_figures_are_drawn_without_a_ramp_and_with_cells_that_are_not_finite(result, tmp_path):
    bare = json.loads(json.dumps(result | {"ramp": None}))
    bare["error"][2][3] = bare["by_bin"][3]["value"] = bare["by_bin"][3]["lo"] = bare["by_bin"][3]["hi"] = None
    empty = bare | {"error": [[None] * 10] * 10}
    for name, document in (("a", bare), ("b", empty)):
        plot_levels.plot_error_by_level(document, tmp_path / f"{name}1.png")
        plot_levels.plot_level_maps(document, tmp_path / f"{name}2.png")
    assert len(list(tmp_path.iterdir())) == 4
