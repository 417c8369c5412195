"""An evaluation must tell good models from bad ones: worlds with known scores, and rules that no model may bend."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from worlds import (
    NO_ACTIONS,
    breaks_at,
    fitted_tokenizer,
    moving_pictures,
    noise,
    obedient,
    oracle,
    persistence,
    puppet_world,
    tiny_world,
)

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.errors import CheckpointError, DataError, TrainingError, UserError
from ahriuwu_cli.evaluation import measure
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate, measure_share, quick_gain, ready
from ahriuwu_cli.evaluation.generate import generate, persist, reconstruct
from ahriuwu_cli.evaluation.metrics import psnr_per_frame
from ahriuwu_cli.evaluation.protocol import make_manifest, read_windows
from ahriuwu_cli.evaluation.scores import mean_frame, mean_over_seeds
from ahriuwu_cli.evaluation.summary import delta, drift, moving_windows
from ahriuwu_cli.rollout import RolloutConfig

CONFIG = EvaluationConfig(windows=10, context=4, horizon=6, horizons=(1, 4), batch=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("data") / "a")


@pytest.fixture(scope="module")
def tiny(store):
    return tiny_world(store)


def run(world, store, config=CONFIG, **changes):
    return evaluate(world, store, config, replace(world.generation, **changes))


def test_the_oracle_scores_at_the_ceiling_at_every_horizon(store):
    result = run(puppet_world(store, oracle), store)
    assert list(result["horizons"]) == ["1", "4", "6"]
    for row in result["horizons"].values():
        assert row["psnr"]["value"] == pytest.approx(row["ceiling"]["value"], abs=0.01)
        assert row["psnr_of_mse"] == pytest.approx(row["ceiling_psnr_of_mse"], abs=0.01)
        assert row["ssim"] == pytest.approx(row["ceiling_ssim"], abs=1e-3)
        assert row["teacher_forced_psnr"] == pytest.approx(row["ceiling"]["value"], abs=0.01)
        assert row["gain_db"]["lo"] > 2
        assert row["ceiling"]["value"] < 60
    assert result["status"] == "ok"


def test_persistence_gains_nothing_and_does_not_move(store):
    result = run(puppet_world(store, persistence(CONFIG.context)), store)
    assert abs(result["horizons"]["6"]["gain_db"]["value"]) < 0.5  # up to what the tokenizer loses
    assert result["horizons"]["6"]["motion_ratio"] < 0.01
    assert result["horizons"]["6"]["floor_motion_ratio"] == 0


def test_noise_scores_far_below_persistence_and_flickers(store):
    rows = run(puppet_world(store, noise), store)["horizons"]
    assert rows["1"]["gain_db"]["hi"] < -3
    row = rows["6"]
    assert row["ceiling"]["value"] - row["psnr"]["value"] > 10
    assert row["motion_ratio"] > 1.5
    assert row["sharpness_ratio"] > 1.5


def test_a_model_that_ignores_actions_has_a_delta_of_exactly_0(store):
    deltas = run(puppet_world(store, oracle), store)["action_delta_db"]
    for control in ("shuffled", "random"):
        assert list(deltas[control]) == ["4", "6"]
        assert all(v == {"value": 0, "lo": 0, "hi": 0} for v in deltas[control].values())


def test_a_model_that_follows_actions_has_a_delta_above_0(store):
    result = run(puppet_world(store, obedient), store)
    for control in ("shuffled", "random"):
        assert result["action_delta_db"][control]["4"]["lo"] > 0
    for row in result["horizons"].values():  # free-running and from true context, it is given the true actions
        assert row["psnr"]["value"] == pytest.approx(row["ceiling"]["value"], abs=0.01)
        assert row["teacher_forced_psnr"] == pytest.approx(row["ceiling"]["value"], abs=0.01)


def test_nan_is_counted_and_fails_instead_of_being_dropped(store):
    result = run(puppet_world(store, breaks_at(CONFIG.context + 2)), store)  # the 3rd generated frame of 3 batches
    assert result["status"] == "nan"
    assert result["not_finite_frames"]["model"] == 3 * 4
    assert result["horizons"]["1"]["psnr"]["value"] > 20
    assert result["horizons"]["4"]["psnr"] == {"value": None, "lo": None, "hi": None}
    assert result["horizons"]["4"]["gain_db"]["value"] is None
    assert result["horizons"]["4"]["psnr_of_mse"] is None
    assert result["horizons"]["4"]["floor"]["value"] > 5
    json.dumps(result, allow_nan=False)


def test_a_step_from_true_context_that_is_not_finite_has_no_score(store):
    result = run(puppet_world(store, breaks_at(CONFIG.context)), store)  # where the step from true context stands
    assert result["not_finite_frames"]["teacher_forced"] == 3 * 2  # of 3 batches, at frames 4 and 6
    assert result["horizons"]["4"]["teacher_forced_psnr"] is None
    assert result["horizons"]["4"]["teacher_forced_floor"] > 5


def test_a_preview_with_nan_stops_with_a_sentence(store):
    manifest = make_manifest(store, "val", 4, 6, 6, 0)
    world = puppet_world(store, breaks_at(5))
    with pytest.raises(TrainingError, match="rollouts of 2 of 6 windows are not finite"):
        quick_gain(world, store, manifest, world.generation, batch=3)


def test_a_preview_agrees_with_the_full_evaluation(store, tiny):
    manifest = make_manifest(store, "test", 4, 6, 10, 0)
    quick = quick_gain(tiny, store, manifest, tiny.generation, seed=0)
    full = evaluate(tiny, store, CONFIG, tiny.generation, manifest)
    assert list(quick["gain_db"]) == ["1", "4", "6"]
    for h in quick["gain_db"]:
        assert quick["gain_db"][h] == pytest.approx(full["horizons"][h]["gain_db"]["value"], abs=1e-3)


def test_batch_size_changes_no_score(store, tiny):
    results = [run(tiny, store, replace(CONFIG, batch=b), tau_ctx=0.1) for b in (1, 7, 10)]
    for other in results[1:]:
        for h, row in results[0]["horizons"].items():
            for name in ("psnr", "gain_db"):
                assert row[name]["value"] == pytest.approx(other["horizons"][h][name]["value"], abs=1e-3)
            assert row["teacher_forced_psnr"] == pytest.approx(other["horizons"][h]["teacher_forced_psnr"], abs=1e-3)
        at4 = [r["action_delta_db"]["random"]["4"]["value"] for r in (results[0], other)]
        assert at4[0] == pytest.approx(at4[1], abs=1e-3)


def test_the_same_evaluation_twice_is_the_same_but_for_times(store, tiny):
    first, second = run(tiny, store), run(tiny, store)
    assert first.pop("timing") != second.pop("timing")
    assert json.dumps(first) == json.dumps(second)


def test_frames_after_the_context_are_never_looked_at(store, tiny):
    frames, actions = read_windows(store, make_manifest(store, "test", 4, 6, 3, 0))
    blanked = frames.copy()
    blanked[:, 4:] = 0
    made = [
        generate(tiny, f, actions, ["a", "b", "c"], RolloutConfig(steps=2), seed=0, context=4).frames
        for f in (frames, blanked)
    ]
    np.testing.assert_array_equal(*made)
    assert made[0].shape == (3, 6, 16, 16, 3)


def test_noise_belongs_to_the_window_s_key_and_to_the_seed(store, tiny):
    frames, actions = (a[:1].repeat(2, 0) for a in read_windows(store, make_manifest(store, "test", 4, 6, 1, 0)))
    config = RolloutConfig(steps=2)
    same = generate(tiny, frames, actions, ["a", "a"], config, seed=0, context=4).frames
    np.testing.assert_array_equal(same[0], same[1])
    differ = generate(tiny, frames, actions, ["a", "b"], config, seed=0, context=4).frames
    assert (differ[0] != differ[1]).any()
    assert (generate(tiny, frames, actions, ["a", "a"], config, seed=1, context=4).frames != same).any()


def test_a_step_from_true_context_is_the_first_frame_of_the_window_that_begins_later(store, tiny):
    manifest = make_manifest(store, "test", 4, 6, 5, 0)
    later = replace(manifest, horizon=1, windows=tuple((episode, start + 3) for episode, start in manifest.windows))
    whole, alone = (evaluate(tiny, store, CONFIG, tiny.generation, asked) for asked in (manifest, later))
    first = alone["horizons"]["1"]["psnr"]["value"]  # of the same noise
    assert whole["horizons"]["4"]["teacher_forced_psnr"] == pytest.approx(first, abs=1e-3)


def test_the_speed_is_that_of_the_rollouts_with_true_actions_of_all_noise_seeds(store, tiny, monkeypatch):
    def timed(*arguments, **named):  # a second a frame
        made = generate(*arguments, **named)
        return replace(made, seconds=float(made.finite.size))

    monkeypatch.setattr(measure, "generate", timed)
    config, manifest = ready(tiny, store, replace(CONFIG, noise_seeds=2), tiny.generation)
    measured = measure_share(tiny, store, config, tiny.generation, manifest)
    assert (measured.frames, measured.seconds) == (10 * 6 * 2, 10 * 6 * 2)


def test_the_ceiling_is_decode_of_encode_against_the_frame_itself(store, tiny):
    manifest = make_manifest(store, "test", 4, 6, 10, 0)
    frames, _ = read_windows(store, manifest)
    tokenizer = fitted_tokenizer(store)
    again = (tokenizer.decode(tokenizer.encode(torch.from_numpy(frames))) * 255).round().to(torch.uint8)
    expected = psnr_per_frame(again, frames)[:, 4:].mean(0)
    result = evaluate(tiny, store, CONFIG, tiny.generation, manifest)
    np.testing.assert_allclose(result["curves"]["ceiling"], expected, atol=1e-3)
    np.testing.assert_array_equal(reconstruct(tiny, frames, batch=3), again)


def test_the_floor_repeats_the_real_last_context_frame(store, tiny):
    manifest = make_manifest(store, "test", 4, 6, 10, 0)
    frames, _ = read_windows(store, manifest)
    np.testing.assert_array_equal(persist(frames, 4)[:, 5], frames[:, 3])
    expected = [psnr_per_frame(frames[:, 3], frames[:, 3 + h]).mean() for h in range(1, 7)]
    result = evaluate(tiny, store, CONFIG, tiny.generation, manifest)
    np.testing.assert_allclose(result["curves"]["floor"], expected, atol=1e-5)
    for h, row in result["horizons"].items():
        assert row["floor"]["value"] == pytest.approx(expected[int(h) - 1], abs=1e-5)
        assert row["teacher_forced_floor"] == pytest.approx(
            psnr_per_frame(frames[:, 2 + int(h)], frames[:, 3 + int(h)]).mean(), abs=1e-5
        )


def test_gain_is_the_mean_difference_over_the_same_windows(store, tiny):
    result = run(tiny, store)
    rows = result["windows"]
    assert len(rows) == result["n"]["windows"] == 10
    mean = np.mean([r["psnr_4"] - r["floor_4"] for r in rows])
    assert result["horizons"]["4"]["gain_db"]["value"] == pytest.approx(mean, abs=1e-5)
    interval = result["horizons"]["4"]["gain_db"]
    assert interval["lo"] < interval["value"] < interval["hi"]


def test_more_noise_seeds_average_over_the_rollouts_of_each(store, tiny):
    manifest = make_manifest(store, "test", 4, 6, 10, 0)
    both = evaluate(tiny, store, replace(CONFIG, noise_seeds=2), tiny.generation, manifest)
    single = [evaluate(tiny, store, replace(CONFIG, seed=s), tiny.generation, manifest) for s in (0, 1)]
    values = [r["horizons"]["6"]["psnr"]["value"] for r in single]
    assert values[0] != values[1]
    assert both["horizons"]["6"]["psnr"]["value"] == pytest.approx(np.mean(values), abs=1e-4)


def test_nan_in_one_noise_seed_is_nan_in_the_mean():
    tables = [{"psnr": np.array([[1.0, 2.0]])}, {"psnr": np.array([[3.0, np.nan]])}]
    np.testing.assert_array_equal(mean_over_seeds(tables)["psnr"], [[2.0, np.nan]])


def test_progress_counts_to_its_total(store, tiny):
    seen = []
    evaluate(tiny, store, CONFIG, tiny.generation, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert all(a[0] < b[0] for a, b in pairwise(seen))


def test_without_actions_there_is_no_delta_and_the_result_says_so(tmp_path):
    store = moving_pictures(tmp_path / "mute", space=NO_ACTIONS)
    result = run(tiny_world(store), store)
    assert result["action_delta_db"] is None
    assert "action space is empty" in result["action_delta_note"]
    assert result["status"] == "ok"


def test_settings_name_everything_that_the_numbers_depend_on(store, tiny):
    found = run(tiny, store, tau_ctx=0.2)["settings"]
    assert found["tau"] == "tau (0 clean, 1 noise)"
    assert found["dataset_fingerprint"] == store.fingerprint
    assert found["tokenizer_fingerprint"] == tiny.tokenizer.fingerprint()
    assert found["manifest_hash"] == make_manifest(store, "test", 4, 6, 10, 0).hash
    assert found["generation"] == {
        "steps": 2,
        "sampler": "shortcut",
        "tau_ctx": 0.2,
        "ctx_mode": "stop",
        "ctx_label": "honest",
    }
    assert found["evaluation"]["noise_seeds"] == 1


def test_what_does_not_fit_is_refused_before_anything_is_generated(store, tiny, tmp_path):
    other = ActionSpace((ActionComponent("keys", "binary", 2, ("UP", "DOWN")),))
    with pytest.raises(DataError, match=r"actions \[LEFT, RIGHT\], but the world was trained with \[UP, DOWN\]"):
        run(replace(tiny, action_space=other), store)
    bigger = fitted_tokenizer(store)
    bigger.height = 32
    with pytest.raises(DataError, match="frames of 16x16, but the world has 32x16"):
        run(replace(tiny, tokenizer=bigger), store)
    with pytest.raises(CheckpointError, match="not trained for step size d = 1/4"):
        run(replace(tiny, trained_d=(0.5, 0.125)), store, steps=4)
    with pytest.raises(UserError, match="did you mean 'euler'"):
        run(tiny, store, sampler="eular")
    with pytest.raises(UserError, match="--windows 2 or more"):
        run(tiny, store, replace(CONFIG, windows=1))
    with pytest.raises(UserError, match="--batch must be at least 1, got 0"):
        run(tiny, store, replace(CONFIG, batch=0))
    foreign = make_manifest(moving_pictures(tmp_path / "b", seed=1), "test", 4, 6, 5, 0)
    with pytest.raises(DataError, match="another dataset"):
        evaluate(tiny, store, CONFIG, tiny.generation, foreign)


def test_windows_of_a_single_episode_give_no_interval_and_a_warning(store, tiny):
    manifest = make_manifest(store, "test", 4, 6, 10, 0)
    episode = manifest.windows[0][0]
    alone = replace(manifest, windows=((episode, 0), (episode, 9)))
    result = evaluate(tiny, store, CONFIG, tiny.generation, alone)
    assert result["horizons"]["6"]["gain_db"]["lo"] is None
    assert result["horizons"]["6"]["gain_db"]["value"] is not None
    assert "one episode" in result["warnings"][0]


def test_the_mean_frame_is_of_the_train_split_and_scored_as_any_picture(store):
    train = np.concatenate([store.frames(e.id) for e in store.episodes("train")]).astype(float).mean(0)
    assert np.abs(mean_frame(store, frames=10**9) - train).max() <= 0.5  # every frame of the split, rounded
    some = [store.frames(e.id)[i % 7 :: 7] for i, e in enumerate(store.episodes("train"))]  # phase by phase
    every = sum(e.frames for e in store.episodes("train")) // 7
    assert np.abs(mean_frame(store, frames=every) - np.concatenate(some).astype(float).mean(0)).max() <= 0.5
    manifest = make_manifest(store, "test", 4, 6, 10, seed=0)
    frames, _ = read_windows(store, manifest)
    result = run(puppet_world(store, oracle), store)
    by_hand = psnr_per_frame(np.broadcast_to(mean_frame(store), frames[:, 4:].shape).copy(), frames[:, 4:])
    for h in (1, 4, 6):
        assert result["horizons"][str(h)]["mean_frame_psnr"] == pytest.approx(by_hand[:, h - 1].mean(), abs=1e-4)
        assert result["horizons"][str(h)]["mean_frame_motion_cosine"] == 0


def test_motion_cosine_separates_the_oracle_from_persistence_and_noise(store):
    def cosine(kind):
        return run(puppet_world(store, kind), store)["horizons"]["6"]["motion_cosine"]

    good, frozen, bad = cosine(oracle), cosine(persistence(CONFIG.context)), cosine(noise)
    assert good > 0.9
    assert abs(frozen) < 0.2
    assert bad < 0.5 * good


def test_drift_is_the_slope_of_psnr_over_the_generated_frames():
    psnr = np.array([[30.0, 29, 28, 27], [20.0, 20, 20, 20]])
    found = drift({"model": {"psnr": psnr}}, "model", ["a", "b"])
    assert found.value == pytest.approx(-0.5)
    assert drift({"model": {"psnr": psnr[:, :1]}}, "model", ["a", "b"]) is None


def test_the_moving_quarter_is_chosen_by_the_truth_alone_up_to_the_frame_asked_for():
    motion = np.array([[0, 0, 9], [1, 1, 0], [5, 0, 0], [2, 2, 0], [0, 0, 0]], float)
    chosen = moving_windows({"truth": {"motion": motion}}, 2)
    assert list(np.flatnonzero(chosen)) == [2, 3]  # a quarter of five, rounded up; the late mover does not count
    tables = {"model": {"psnr": np.arange(5.0)[:, None]}, "shuffled": {"psnr": np.zeros((5, 1))}}
    assert delta(tables, "shuffled", list("abcde"), 1, chosen).value == pytest.approx(2.5)
