"""Distances between distributions of clips: closed forms, unbiasedness, and controls that must lie above the floor."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import small_dataset, small_world

from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation import distances
from ahriuwu_cli.evaluation.distances import (
    clip_latents,
    fit_basis,
    frechet_distance,
    kernel_distance,
    latent_distances,
    reference_clips,
    swap_test,
)
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer

SIDE, CONTEXT = 16, 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def bars(count: int, frames: int, seed: int) -> np.ndarray:
    """Clips of a soft bar of some colour that moves at some speed across a noisy background."""
    rng = np.random.default_rng(seed)
    speed, start = rng.uniform(0.1, 0.5, (count, 1)) * rng.choice([-1, 1], (count, 1)), rng.uniform(0, SIDE, (count, 1))
    place = start + speed * np.arange(frames)
    away = (np.arange(SIDE) - place[..., None] + SIDE / 2) % SIDE - SIDE / 2
    shape = np.exp(-(away**2) / 4)[:, :, None, :, None]  # (W, T, 1, W, 1)
    colour = rng.uniform(80, 200, (count, 1, 1, 1, 3))
    return (20 + shape * colour + rng.uniform(0, 16, (count, frames, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)


def names(count: int, per_episode: int = 2) -> list[str]:
    return [f"e{i // per_episode}" for i in range(count)]


@pytest.fixture(scope="module")
def world():
    tokenizer = LinearTokenizer(SIDE, SIDE, 8, 8, 24)
    tokenizer.fit(torch.from_numpy(clip) for clip in bars(40, 16, seed=9))
    return replace(small_world(), tokenizer=tokenizer.eval())


@pytest.fixture(scope="module")
def windows():
    return bars(48, CONTEXT + 16, seed=1)


def measured(world, windows, generated, **changes):
    count = len(windows)
    others = (bars(count, 16, seed=2), [f"o{i}" for i in range(count)])
    settings = {"context": CONTEXT, "episodes": names(count), "others": others, "reference": bars(256, 16, seed=3)}
    return latent_distances(world, generated, windows, **(settings | changes))


def controls(windows: np.ndarray) -> dict[str, np.ndarray]:
    truth, rng = windows[:, CONTEXT:], np.random.default_rng(4)
    near = [np.roll(truth.astype(float), (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    mean = bars(64, 16, seed=5).mean(axis=(0, 1)).round().astype(np.uint8)
    return {
        "blur": np.mean(near, axis=0).round().astype(np.uint8),
        "mean frame": np.broadcast_to(mean, truth.shape).copy(),
        "frozen": np.repeat(truth[:, :1], 16, axis=1),
        "shuffled": np.stack([clip[rng.permutation(16)] for clip in truth]),
        "noise": rng.integers(0, 256, truth.shape, dtype=np.uint8),
    }


def test_frechet_distance_of_gaussians_is_the_closed_form():
    turn = torch.linalg.qr(normal(5, 5, seed=3))[0]
    spread_x, spread_y = torch.tensor([1.0, 2, 3, 0.5, 1]).double(), torch.tensor([2.0, 1, 1, 0.5, 4]).double()
    shift = torch.tensor([1.0, 0, -2, 0, 0]).double()
    x = normal(200_000, 5) * spread_x @ turn
    y = (normal(200_000, 5, seed=1) * spread_y + shift) @ turn
    wanted = float(shift.square().sum() + (spread_x - spread_y).square().sum())  # covariances share their axes
    assert float(frechet_distance(x, y)) == pytest.approx(wanted, rel=0.01)
    assert float(frechet_distance(y, x)) == pytest.approx(wanted, rel=0.01)


def test_frechet_distance_agrees_with_the_square_root_of_the_product_of_covariances():
    x, y = normal(60, 6) @ normal(6, 6, seed=1), normal(80, 6, seed=2) @ normal(6, 6, seed=3) + 0.3
    cx, cy = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(cx @ cy).sqrt().sum().real  # of a matrix that is not symmetric, as FID's code has it
    wanted = (x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * root
    assert float(frechet_distance(x, y)) == pytest.approx(float(wanted), rel=1e-9)


def test_frechet_distance_of_a_set_to_itself_is_0_even_where_its_covariance_is_singular():
    x = normal(10, 30)  # rank 9 of 30
    for scale in (1e-3, 1.0, 1e3):
        assert abs(float(frechet_distance(x * scale, x * scale))) < 1e-5 * scale**2


def test_frechet_distance_is_biased_upwards_at_small_n():
    small = [float(frechet_distance(normal(16, 8, seed=2 * i), normal(16, 8, seed=2 * i + 1))) for i in range(50)]
    assert np.mean(small) > 1
    assert float(frechet_distance(normal(20_000, 8), normal(20_000, 8, seed=1))) < 0.01


def test_kernel_distance_is_unbiased_for_equal_distributions_and_above_0_for_others():
    same = [float(kernel_distance(normal(12, 3, seed=2 * i), normal(12, 3, seed=2 * i + 1))) for i in range(2000)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(len(same))
    assert np.std(same) < 2
    assert float(kernel_distance(normal(400, 3), normal(400, 3, seed=1) + 1)) > 1
    assert float(kernel_distance(normal(400, 3), normal(400, 3, seed=1) * 2)) > 1


def test_kernel_distance_is_the_slow_sum_over_pairs():
    x, y = normal(5, 3), normal(4, 3, seed=1)

    def k(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    wanted = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    wanted += sum(k(y[i], y[j]) for i in range(4) for j in range(4) if i != j) / 12
    wanted -= 2 * sum(k(a, b) for a in x for b in y) / 20
    assert float(kernel_distance(x, y)) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("same_episodes", [False, True])
def test_kernel_distance_is_unbiased_for_clips_that_share_episodes_only_when_it_knows_them(same_episodes):
    with_groups, without = [], []
    groups = torch.arange(6).repeat_interleave(4)
    for i in range(600):
        episode = normal(2, 6, 1, 3, seed=10_000 + i)
        draw = normal(2, 6, 4, 3, seed=i) * 0.3 + (episode[:1] if same_episodes else episode)
        x, y = draw.reshape(2, 24, 3)
        with_groups.append(float(kernel_distance(x, y, groups, groups if same_episodes else groups + 6)))
        without.append(float(kernel_distance(x, y)))
    assert abs(np.mean(with_groups)) < 3 * np.std(with_groups) / np.sqrt(len(with_groups))
    assert abs(np.mean(without)) > 5 * np.std(without) / np.sqrt(len(without))


def test_kernel_distance_without_two_episodes_is_nan():
    one = torch.zeros(8, dtype=torch.long)
    assert np.isnan(float(kernel_distance(normal(8, 3), normal(8, 3, seed=1), one, one)))


@pytest.mark.parametrize("name", ["frechet", "kernel"])
def test_the_swap_test_calls_a_perfect_model_different_in_one_case_of_twenty_and_a_wrong_one_always(name, monkeypatch):
    monkeypatch.setattr(distances, "SWAPS", 99)
    measure = {"frechet": lambda x, y, a, b: frechet_distance(x, y), "kernel": kernel_distance}[name]
    groups = torch.arange(8).repeat_interleave(3)
    chances = []
    for i in range(150):
        episode = normal(3, 8, 1, 4, seed=5000 + i)  # what happens in an episode is shared by its clips
        x, truth, other = (normal(3, 8, 3, 4, seed=i) * 0.3 + episode).reshape(3, 24, 4)
        chances.append(swap_test(measure, x, truth, other, groups, groups))
        if i < 5:
            assert swap_test(measure, x + 2, truth, other, groups, groups) < 0.05
    assert 0.4 < np.mean(chances) < 0.6
    assert np.mean(np.array(chances) <= 0.05) < 0.12


@pytest.mark.parametrize("name", ["blur", "mean frame", "frozen", "shuffled", "noise"])
def test_a_broken_video_lies_above_the_real_floor(world, windows, name):
    found = measured(world, windows, controls(windows)[name])
    for distance in ("latent_frechet", "latent_kernel"):
        row = found[distance]
        assert row["generated"] > 1.5 * row["real_floor"]
        assert row["excess"]["lo"] > 0
        assert row["p"] < 0.01


def test_other_real_clips_lie_at_the_floor_and_persistence_above_it(world, windows):
    found = measured(world, windows, bars(48, 16, seed=6))
    for distance in ("latent_frechet", "latent_kernel"):
        row = found[distance]
        assert row["excess"]["lo"] < 0 < row["excess"]["hi"]
        assert row["p"] > 0.05
        assert row["persistence"] > 1.5 * row["real_floor"]
    assert found["latent_frechet"]["real_floor"] > 0
    assert abs(found["latent_kernel"]["real_floor"]) < 0.2


def test_what_the_tokenizer_makes_of_the_truth_has_no_excess(world, windows):
    again = world.decode(world.encode(torch.from_numpy(windows))).numpy()[:, CONTEXT:]
    for distance in ("latent_frechet", "latent_kernel"):
        row = measured(world, windows, again)[distance]
        assert row["generated"] == row["ceiling"]
        assert row["excess"] == {"value": 0, "lo": 0, "hi": 0}
        assert row["p"] == 1


def test_facts_stand_beside_the_distances(world, windows):
    found = measured(world, windows, windows[:, CONTEXT:])
    assert (found["clips"], found["other_clips"], found["reference_clips"], found["episodes"]) == (48, 48, 256, 24)
    assert found["components"] == 8
    assert 0 < found["components_share"] < 1
    assert found["clip_frames"] == 16
    assert found["tokenizer_fingerprint"] == world.tokenizer.fingerprint()
    json.dumps(found, allow_nan=False)


def test_batch_size_changes_no_distance(world, windows):
    made = controls(windows)["blur"]
    one, other = (measured(world, windows, made, batch=b) for b in (7, 48))
    for distance in ("latent_frechet", "latent_kernel"):
        assert one[distance]["generated"] == pytest.approx(other[distance]["generated"], abs=1e-4)


def test_a_frame_that_is_not_finite_is_counted_and_makes_the_distance_null(world, windows):
    finite = np.ones((48, 16), bool)
    finite[3, 7] = finite[5, :] = False
    found = measured(world, windows, windows[:, CONTEXT:], finite=finite)
    assert found["not_finite_clips"] == 2
    for distance in ("latent_frechet", "latent_kernel"):
        row = found[distance]
        assert row["generated"] is None
        assert row["p"] is None
        assert row["excess"] == {"value": None, "lo": None, "hi": None}
        assert row["real_floor"] is not None


def test_only_the_last_16_frames_of_longer_clips_count(world):
    windows = bars(32, CONTEXT + 20, seed=1)
    made = windows[:, CONTEXT:].copy()
    made[:, :4] = 0
    assert measured(world, windows, made)["latent_frechet"]["excess"]["value"] == pytest.approx(0, abs=0.1)
    made[:, -1] = 0
    assert measured(world, windows, made)["latent_frechet"]["excess"]["value"] > 1
    finite = np.ones((32, 20), bool)
    finite[0, 3] = finite[1, 4] = finite[2, 16] = finite[3, 19] = False
    assert measured(world, windows, made, finite=finite)["not_finite_clips"] == 3


def test_the_interval_is_a_jackknife_over_episodes_with_all_their_clips(world, windows, monkeypatch):
    """Slow and obvious: everything again without one episode, scored and other clips alike; Student's t by table."""
    monkeypatch.setattr(distances, "SWAPS", 1)
    episodes, made, others = np.repeat(list("abcd"), 12), controls(windows)["blur"], bars(48, 16, seed=2)
    beside = np.repeat(list("dcba"), 12)

    def excess(left_out):
        own, other = episodes != left_out, beside != left_out
        asked = {"episodes": list(episodes[own]), "others": (others[other], list(beside[other]))}
        return measured(world, windows[own], made[own], **asked)

    whole, without = excess(None), [excess(name) for name in "abcd"]
    for distance in ("latent_frechet", "latent_kernel"):
        values = np.array([found[distance]["excess"]["value"] for found in without])
        half = 3.1824 * np.sqrt(3 / 4 * ((values - values.mean()) ** 2).sum())
        row = whole[distance]["excess"]
        assert (row["lo"], row["hi"]) == pytest.approx((row["value"] - half, row["value"] + half), abs=2e-3 * half)


def test_one_episode_gives_no_interval(world, windows):
    others = (bars(48, 16, seed=2), ["a"] * 48)
    found = measured(world, windows, controls(windows)["blur"], episodes=["a"] * 48, others=others)
    assert found["latent_frechet"]["excess"]["value"] > 0
    assert found["latent_frechet"]["excess"]["lo"] is None
    assert found["latent_kernel"]["generated"] is None


def test_too_few_clips_and_too_short_ones_are_refused_in_a_sentence(world, windows):
    with pytest.raises(UserError, match=r"15 generated clips say nothing about a distribution: give at least 16"):
        measured(world, windows[:15], windows[:15, CONTEXT:])
    with pytest.raises(UserError, match="16 frames, but the generated clips have 12: give --horizon 16 or more"):
        measured(world, windows[:, :16], windows[:, CONTEXT:16])
    with pytest.raises(UserError, match="20 reference clips fit no component: give at least 32"):
        measured(world, windows, windows[:, CONTEXT:], reference=bars(20, 16, seed=3))
    with pytest.raises(DataError, match="all alike"):
        measured(world, windows, windows[:, CONTEXT:], reference=np.zeros((64, 16, SIDE, SIDE, 3), np.uint8))


def test_features_of_fresh_real_clips_have_mean_0_and_spread_1(world):
    basis = fit_basis(clip_latents(world, bars(512, 16, seed=3)))
    fresh = basis.features(clip_latents(world, bars(400, 16, seed=8)))
    assert fresh.shape == (400, 16 + 3)
    assert fresh.mean(dim=0).abs().max() < 0.3
    assert (fresh.std(dim=0) - 1).abs().max() < 0.3


def test_the_number_of_components_is_bounded_by_both_sets(world):
    latents = clip_latents(world, bars(256, 16, seed=3))
    assert fit_basis(latents).components.shape[1] == 8
    assert fit_basis(latents[:96]).components.shape[1] == 3
    assert fit_basis(latents, most=4).components.shape[1] == 4


def test_a_faint_component_is_one_and_what_rounding_leaves_is_none():
    """Two directions, the second with 1e-4 of the first one's power: neither lost nor joined by made-up ones."""
    clips = torch.zeros(128, 16, 1, 2, dtype=torch.float64)
    clips[..., 0, 0], clips[..., 0, 1] = normal(128, 1, seed=1), 1e-2 * normal(128, 1, seed=2)
    assert fit_basis(clips).components.shape[1] == 2


def test_reference_clips_share_no_frame_with_the_scored_windows(tmp_path):
    store = small_dataset(tmp_path / "a", frames=120)
    manifest = make_manifest(store, "train", 4, 16, 6, 0)
    clips, episodes = reference_clips(store, 60, split="train", seed=1, avoid=manifest)
    assert clips.shape == (60, 16, 16, 16, 3)
    assert set(episodes) <= set(store.lengths("train"))
    scored = {}
    for episode, start in manifest.windows:
        for frame in store.frames(episode, start, start + manifest.length):
            scored.setdefault(episode, set()).add(
                frame.tobytes()
            )  # the background is noise, so no frame is like another
    assert set(scored) & set(episodes)
    shared = sum(f.tobytes() in scored.get(e, ()) for clip, e in zip(clips, episodes, strict=True) for f in clip)
    assert shared == 0
    again, _ = reference_clips(store, 60, split="train", seed=1, avoid=manifest)
    np.testing.assert_array_equal(clips, again)
    unhindered, _ = reference_clips(store, 60, split="train", seed=1)
    assert (unhindered != clips).any()
    with pytest.raises(DataError, match="ask for fewer"):
        reference_clips(store, 10_000, split="train", avoid=manifest)


def test_where_there_is_no_distance_the_swap_test_says_nothing():
    x, truth, other = (torch.randn(20, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    several, one = torch.arange(20) // 4, torch.zeros(20, dtype=torch.long)
    assert np.isnan(swap_test(kernel_distance, x, truth, other, one, one))  # no two clips are of different episodes
    assert 0 < swap_test(kernel_distance, x, truth, other, several, several) <= 1
