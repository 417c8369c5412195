"""Tables that were really measured contradict nothing, whatever happened; bounds on a mean of PSNRs are bounds."""

import warnings

import numpy as np
import pytest
from worlds import NO_ACTIONS, SPACE, breaks_at, moving_pictures, oracle, persistence, puppet_world, tiny_world

from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, measure_share, ready
from ahriuwu_cli.evaluation.generate import Generated
from ahriuwu_cli.evaluation.measure import Made, score_made
from ahriuwu_cli.evaluation.metrics import psnr_from_mse
from ahriuwu_cli.evaluation.table_check import check_tables, errors_of, likeness_of


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("space", [SPACE, NO_ACTIONS], ids=["actions", "none"])
@pytest.mark.parametrize("split", [None, "test"], ids=["three splits", "no train"])
def test_what_is_measured_passes_and_its_lost_frames_are_those_that_were_counted(tmp_path, seeds, space, split):
    store = moving_pictures(tmp_path / "data", episodes=6, space=space, split=split)
    for world in (tiny_world(store), *(puppet_world(store, w) for w in (oracle, persistence(3), breaks_at(5)))):
        asked = EvaluationConfig(windows=3, context=3, horizon=5, noise_seeds=seeds)
        config, manifest = ready(world, store, asked, world.generation)
        measured = measure_share(world, store, config, world.generation, manifest)
        lost = check_tables(measured.tables, seeds)
        assert {name: count * seeds for name, count in lost.items()} == measured.not_finite  # breaks for every seed


@pytest.mark.parametrize("seeds", [1, 2, 7])
def test_a_mean_of_errors_lies_within_what_the_mean_of_their_psnr_allows_and_reaches_it(seeds):
    rng = np.random.default_rng(0)
    mse = 10 ** rng.uniform(-9, 0, (20_000, seeds)) * (rng.random((20_000, seeds)) < 0.8)
    mse[rng.random((20_000, seeds)) < 0.2] = 1
    least, most = errors_of(psnr_from_mse(mse).mean(1), seeds)
    assert (least <= mse.mean(1)).all()
    assert (mse.mean(1) <= most).all()
    alike = np.full(seeds, 1e-3)
    assert errors_of(psnr_from_mse(alike).mean(), seeds)[0] == pytest.approx(1e-3, rel=1e-6)
    for wholly in range(seeds):  # the others but one at the cap
        apart = np.array([*[1.0] * wholly, 1e-3, *[1e-6] * (seeds - 1 - wholly)])
        assert errors_of(psnr_from_mse(apart).mean(), seeds)[1] == pytest.approx(apart.mean(), rel=1e-4)


def pictures(rng, truth):
    """What a world might show of truth uint8 (W, L, H, W, 3): the worst that each bound could meet."""
    noise = rng.integers(0, 256, truth.shape, dtype=np.uint8)
    corner, level, dots = truth.copy(), truth.copy(), truth.copy()
    corner[..., 0, 0, :] = 255 - corner[..., 0, 0, :]
    level[:] = np.where(truth < 255, truth + 1, 254)
    dots[rng.random(truth.shape) < 0.01] ^= 1
    checks = (np.indices(truth.shape[2:4]).sum(0) % 2 * 255).astype(np.uint8)[..., None] * np.ones(3, np.uint8)
    board = np.broadcast_to(checks, truth.shape).copy()
    board[:, ::2] = 255 - board[:, ::2]  # in turn
    return [noise, corner, level, dots, board, truth.copy(), 255 - truth, truth * 0, truth * 0 + 255]


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize("kind", ["noise", "flat", "still", "black", "slow", "board"])
def test_no_pictures_however_odd_have_scores_that_deny_each_other(side, kind):
    rng, context, horizon = np.random.default_rng(side), 2, 4
    shape = (3, context + horizon, side, side, 3)
    frames = rng.integers(0, 256, shape, dtype=np.uint8)
    if kind == "flat":
        frames[:] = frames[..., :1, :1, :]
    elif kind == "still":
        frames[:] = frames[:, :1]
    elif kind == "black":
        frames[:] = 0
    elif kind == "slow":  # a level a frame
        frames[:] = frames[:, :1] // 2 + np.arange(shape[1], dtype=np.uint8)[:, None, None, None]
    elif kind == "board":
        frames = pictures(rng, frames)[4]
    mean, shown = frames[0, 0], pictures(rng, frames)
    for again in shown:
        for seeds in (1, 3):
            made = {"model": [], "shuffled": [], "forced_3": []}
            for who, rollouts in made.items():
                for i in rng.integers(len(shown), size=seeds):
                    picked = shown[i][:, context + 2 : context + 3] if who == "forced_3" else shown[i][:, context:]
                    finite = rng.random(picked.shape[:2]) < 0.9
                    rollouts.append(Generated(picked, finite, 1.0))
            with warnings.catch_warnings(action="error"):
                tables = score_made(Made(again, made), frames, context, (1, 3), 8, None if seeds == 3 else mean)
                lost = check_tables(tables, seeds)
            assert lost["model"] == int((~np.all([r.finite for r in made["model"]], axis=0)).sum())


DENIALS = {  # of a frame's scores, by who and metric
    "moves without moving": {"model/motion": 0.0}, "moves too far": {"model/motion": 0.9},
    "no error but one": {"model/ssim": 1.0}, "no colour": {"model/colour": 0.9}, "sharp": {"model/energy": 1.9},
    "another truth": {"model/motion_tt": 1e-3, "model/motion_gt": 0.0},
    "a still one moves": {"floor/motion": 1e-3, "floor/motion_gg": 1e-5}, "no such psnr": {"shuffled/psnr": 59.0},
    "more than two motions give at first": {"model/motion_gt": 0.9}, "another first step": {"forced_1/psnr": 3.0},
    "against": {"ceiling/motion_gt": -0.01, "ceiling/motion_gg": 0.05, "ceiling/motion": 0.1},
    "the truth": {"truth/motion": 0.5}, "flat truth": {"truth/energy": 0.0}, "another mean": {"mean_frame/energy": 0.0},
    "another step": {"forced_4/floor": 20.0}, "a still one changes": {"floor/energy": 0.3},
}  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    store = moving_pictures(tmp_path_factory.mktemp("tables") / "data", episodes=6)
    world = tiny_world(store)
    config, manifest = ready(world, store, EvaluationConfig(windows=3, context=3, horizon=5), world.generation)
    return measure_share(world, store, config, world.generation, manifest).tables


@pytest.mark.parametrize("what", DENIALS)
def test_a_score_that_others_of_the_same_frame_deny_is_refused(tables, what):
    changed = {who: {metric: values.copy() for metric, values in table.items()} for who, table in tables.items()}
    for name, value in DENIALS[what].items():
        who, metric = name.split("/")
        changed[who][metric][1, 0 if "first" in what else -1] = value
    check_tables(tables, 1)
    with pytest.raises(ValueError, match="is denied by other scores of the same frames"):
        check_tables(changed, 1)


def test_without_an_error_ssim_is_1_and_with_one_it_is_not():
    assert likeness_of(0.0, 0.0) == (1, 1)
    assert likeness_of(1e-3, 1e-3)[1] < 1
