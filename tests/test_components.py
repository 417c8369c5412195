"""Error by component: forecasts whose error is known in each group of channels must get it there and nowhere else."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_spread import noisy, world_that  # noqa: F401  (frames that nobody can foresee, latents about N(0, 1))
from worlds import breaks_at, noise, oracle, persistence, tiny_world

from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.components import GROUPS, error_by_component, grouped, sums_of
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.evaluation.spread import ratio_bootstrap
from ahriuwu_cli.rollout import RolloutConfig

CONFIG = RolloutConfig(steps=1, tau_ctx=0.0)
CONTEXT, LENGTH, WINDOWS = 3, 6, 60
FINE = 12 - 2  # of 12 channels in 8 groups the first four groups have two each, the last two groups are these


def look(world, store, config=CONFIG, **changes):
    manifest = make_manifest(store, "test", CONTEXT, LENGTH, WINDOWS, 0)
    return error_by_component(world, store, manifest, config, **({"horizons": (1, 4), "batch": 32} | changes))


def by_frame(found):
    frames = dict.fromkeys(row["frame"] for row in found["rows"])
    return {str(t): [row for row in found["rows"] if row["frame"] == t] for t in frames}


def values(rows, name):
    return [row[name]["value"] for row in rows]


def test_sums_are_those_of_slow_loops():
    rng = np.random.default_rng(0)
    x, y, floor = (rng.standard_normal((4, 3, 5)) for _ in range(3))
    groups = [np.array([4, 0]), np.array([1, 2, 3])]
    table = sums_of(x, y, floor, groups)
    off_x, off_y = x - x.mean(axis=0), y - y.mean(axis=0)
    for w in range(4):
        for i, g in enumerate(groups):
            cells = [(n, c) for n in range(3) for c in g]
            assert table["error"][w, i] == pytest.approx(sum((y[w, n, c] - x[w, n, c]) ** 2 for n, c in cells))
            assert table["floor_error"][w, i] == pytest.approx(
                sum((floor[w, n, c] - x[w, n, c]) ** 2 for n, c in cells)
            )
            assert table["energy"][w, i] == pytest.approx(4 / 3 * sum(off_y[w, n, c] ** 2 for n, c in cells))
            assert table["variance"][w, i] == pytest.approx(4 / 3 * sum(off_x[w, n, c] ** 2 for n, c in cells))


def test_groups_are_all_channels_once_as_they_stand_or_by_variance():
    rng = np.random.default_rng(0)
    spread = np.array([1.0, 5, 3, 2, 4, 0.5, 7, 6, 0.1])
    latents = rng.standard_normal((50, 2, 4, 9)) * spread + 100 * np.arange(9)  # a mean is no variance
    assert np.concatenate(grouped(latents, True)).tolist() == list(range(9))
    assert np.concatenate(grouped(latents, False)).tolist() == np.argsort(-spread).tolist()
    assert [len(g) for g in grouped(latents, True)] == [2] + [1] * 7
    assert len(grouped(latents[..., :3], True)) == 3


def test_the_truth_has_no_error_and_all_energy_in_every_group(noisy):  # noqa: F811
    found = look(world_that(noisy, oracle), noisy)
    assert list(by_frame(found)) == ["1", "4", "6"]
    assert (len(found["channels"]), sum(found["channels"])) == (GROUPS, 12)
    assert sum(found["share_of_variance"]) == pytest.approx(1, abs=1e-4)
    for row in by_frame(found).values():
        assert max(values(row, "error")) < 0.02  # of rounding to uint8 and back
        assert values(row, "energy") == pytest.approx([1] * GROUPS, abs=0.02)


@pytest.mark.parametrize(("width", "error"), [(0.0, 1.0), (0.5, 1.25), (1.0, 2.0)])
def test_leaving_out_gets_1_and_another_draw_2(noisy, width, error):  # noqa: F811
    found = look(world_that(noisy, lambda scene: width * noise(scene)), noisy)
    for row in by_frame(found).values():
        assert np.mean(values(row, "error")) == pytest.approx(error, rel=0.12)
        assert np.mean(values(row, "energy")) == pytest.approx(width**2, abs=0.12)
        assert all(each["error"]["lo"] < each["error"]["value"] < each["error"]["hi"] for each in row)


def test_what_is_wrong_in_the_finest_channels_alone_is_seen_there_alone(noisy):  # noqa: F811
    def made_up(scene):
        z = oracle(scene).clone()
        z[..., FINE:] = noise(scene)[..., FINE:]
        return z

    def left_out(scene):
        z = oracle(scene).clone()
        z[..., FINE:] = 0
        return z

    for answer, error, energy in ((made_up, 2, 1), (left_out, 1, 0)):
        row = by_frame(look(world_that(noisy, answer), noisy))["4"]
        assert max(values(row, "error")[:-2]) < 0.02
        assert np.mean(values(row, "error")[-2:]) == pytest.approx(error, rel=0.2)
        assert np.mean(values(row, "energy")[-2:]) == pytest.approx(energy, abs=0.2)


def test_persistence_has_the_floor_s_error(noisy):  # noqa: F811
    for row in by_frame(look(world_that(noisy, persistence(CONTEXT)), noisy)).values():
        assert values(row, "error") == pytest.approx(values(row, "floor_error"), abs=0.02)
        assert min(values(row, "error")) > 1  # the last frame tells nothing of these


def test_a_frame_that_is_not_finite_is_counted_and_makes_its_horizon_null(noisy):  # noqa: F811
    found = look(world_that(noisy, breaks_at(CONTEXT + 2)), noisy)
    assert found["not_finite_frames"] > 0
    assert values(by_frame(found)["4"], "error") == values(by_frame(found)["4"], "energy") == [None] * GROUPS
    assert None not in values(by_frame(found)["1"], "error") + values(by_frame(found)["4"], "floor_error")
    json.dumps(found, allow_nan=False)


def test_batches_change_nothing_seeds_do_and_fewer_windows_are_the_first(noisy):  # noqa: F811
    world, config = tiny_world(noisy), RolloutConfig(steps=2)
    parts, whole = (by_frame(look(world, noisy, config, batch=b)) for b in (7, 32))
    for h in parts:
        assert values(parts[h], "error") == pytest.approx(values(whole[h], "error"), rel=1e-2)
    assert by_frame(look(world, noisy, config, seed=9)) != whole
    manifest = make_manifest(noisy, "test", CONTEXT, LENGTH, WINDOWS, 0)
    first = replace(manifest, windows=manifest.windows[:4])
    few = error_by_component(world, noisy, first, config, horizons=(1, 4), batch=32)
    assert look(world, noisy, config, windows=4) == few
    assert few["n"]["windows"] == 4


def test_an_unordered_tokenizer_has_its_channels_by_variance(noisy):  # noqa: F811
    world = world_that(noisy, oracle)
    assert look(world, noisy)["channels_ordered_by"] == "the tokenizer"
    world.tokenizer.ordered = False
    found = look(world, noisy)
    assert found["channels_ordered_by"] == "variance"
    each = np.array(found["share_of_variance"]) / np.array(found["channels"])
    assert (np.diff(each) < 1e-3).all()  # over other frames than the order is from: all there are


def test_channels_that_never_change_have_no_ratio_whatever_their_value():
    x = np.random.default_rng(0).standard_normal((64, 3, 4)).astype(np.float32)
    x[..., 2:] = np.float32(0.3)
    table = sums_of(x, x + np.float32(1e-3), x, [np.array([0, 1]), np.array([2, 3])])
    assert table["variance"][:, 1].sum() == 0
    assert np.isnan(ratio_bootstrap(table["error"][:, 1], table["variance"][:, 1], ["a", "b"] * 32).value)
    assert ratio_bootstrap(table["error"][:, 0], table["variance"][:, 0], ["a", "b"] * 32).value < 1e-5


def test_a_tokenizer_that_looks_back_sees_the_true_context_of_generated_frames(noisy, monkeypatch):  # noqa: F811
    world = world_that(noisy, oracle)
    encode, films = world.tokenizer.encode, []
    monkeypatch.setattr(world.tokenizer, "encode", lambda frames: films.append(frames) or encode(frames))
    look(world, noisy)
    true, made, still = (f for f in films[-3:])
    assert true.shape == made.shape == still.shape
    assert true.shape[1] == CONTEXT + LENGTH
    assert (true[:, :CONTEXT] == made[:, :CONTEXT]).all()
    assert (true[:, :CONTEXT] == still[:, :CONTEXT]).all()
    assert not (true == made).all()


def test_one_window_is_refused(noisy):  # noqa: F811
    with pytest.raises(UserError, match="at least 2 windows"):
        look(tiny_world(noisy), noisy, windows=1)
