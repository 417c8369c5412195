"""The verdict of a sweep, on scores that are written down: best, set, warnings, and what becomes of the default."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ahriuwu_cli.diffusion.forcing import FORCINGS
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation import sweep_verdict as verdict
from ahriuwu_cli.evaluation.protocol import Interval
from ahriuwu_cli.evaluation.sweep_cells import CellScores
from ahriuwu_cli.evaluation.sweep_grid import WITH_CONTEXT, name, names, untrained_taus, varying, with_default
from ahriuwu_cli.evaluation.sweep_run import Done
from ahriuwu_cli.rollout import RolloutConfig

EPISODES = [f"e{i}" for i in range(12)]
NOISE = np.random.default_rng(0).normal(0, 1, 12)
WORLD = SimpleNamespace(k_max=8, forcing="independent", facts={})


def cell(tau, psnr, *, sharp=1.0, motion=1.0, wobble=0.0, **settings):
    """A cell of 12 windows of one frame: mean PSNR, sharpness and motion ratio, and how unlike its windows are."""
    values = (psnr + wobble * NOISE)[:, None]
    one = np.ones((12, 1))
    tables = {"model": {"psnr": values, "energy": sharp * one, "motion": motion * one}}
    fixed = {"floor": {"psnr": 20 * one}, "truth": {"energy": one, "motion": one}}
    return Done(RolloutConfig(tau_ctx=tau, **settings), CellScores(tables, np.zeros(0), 1.0, 1.0, 0), fixed)


def notes(done, world=WORLD):
    return verdict.warnings(world, done, verdict.find_best(done, EPISODES, 1), EPISODES, 1)


def test_the_best_and_those_whose_paired_difference_reaches_0():
    close, far, noisy = cell(0.2, 24.9, wobble=0.01), cell(0.5, 24.0), cell(0.3, 24.8, wobble=3)
    best = verdict.find_best([close, far, noisy, cell(0.1, 25.0)], EPISODES, 1)
    assert best.cell.cell.tau_ctx == 0.1
    assert [d.cell.tau_ctx for d, _ in best.same] == [0.3]
    gap = best.same[0][1]
    assert gap.value == pytest.approx(0.2 - 3 * NOISE.mean(), abs=1e-9)
    assert gap.lo < 0 < gap.hi


def test_a_cell_with_a_nan_is_never_best():
    broken = cell(0.1, 30.0)
    broken.scores.tables["model"]["psnr"][3, 0] = np.nan
    assert verdict.find_best([broken, cell(0.2, 21.0)], EPISODES, 1).cell.cell.tau_ctx == 0.2
    assert verdict.find_best([broken], EPISODES, 1) is None
    assert "no cell is finite, so there is no best" in notes([broken])


def test_with_one_episode_nothing_can_be_told_apart():
    done = [cell(0.1, 30.0), cell(0.2, 21.0)]
    assert len(verdict.find_best(done, ["e"] * 12, 1).same) == 1


def test_the_edge_of_taus_and_of_k_is_warned_of():
    done = [cell(t, p, steps=k) for k, up in ((2, 0), (4, 1)) for t, p in ((0.1, 25 + up), (0.2, 26 + up), (0.3, 25))]
    assert not any("tau" in w and "edge" in w for w in notes(done))
    assert "the best K 4 lies at the grid's edge: widen --steps" in notes(done)
    assert "the best tau 0.3 lies at the grid's edge: widen --taus" in notes([cell(0.1, 25), cell(0.3, 26)])
    assert "the best tau 0 lies at the grid's edge: nothing lies below it" in notes([cell(0.0, 26), cell(0.3, 25)])


def test_a_grid_is_warned_of_when_below_persistence_or_frozen():
    done = [cell(0.1, 19.9), cell(0.2, 25, motion=0.29), cell(0.3, 24, motion=0.31)]
    assert "below persistence at frame 1: tau 0.1 (K = 4)" in notes(done)
    assert "frozen (motion ratio below 0.3): tau 0.2 (K = 4)" in notes(done)


@pytest.mark.parametrize(
    ("best", "other", "warned"),
    [
        ({"sharp": 0.5}, {"psnr": 24.9, "sharp": 0.9, "wobble": 3}, True),  # cannot be told from it, and sharper
        ({"sharp": 0.5}, {"psnr": 22.0, "sharp": 0.9}, True),  # far behind, but the nearest to 1
        ({"sharp": 0.5}, {"psnr": 22.0, "sharp": 0.54}, False),  # sharper by too little
        ({"sharp": 0.9}, {"psnr": 24.9, "sharp": 1.4, "wobble": 3}, False),  # noise is not sharpness
        ({"sharp": 1.3}, {"psnr": 24.9, "sharp": 1.0, "wobble": 3}, False),  # the best is the sharper one
        ({"sharp": 0.9}, {"psnr": 24.9, "sharp": 0.5, "wobble": 3}, False),
    ],
)
def test_psnr_and_sharpness_disagree_when_the_best_is_clearly_blurrier(best, other, warned):
    done = [cell(0.5, 25.0, **best), cell(0.1, **other), cell(0.2, 15.0, sharp=0.3)]
    found = [w for w in notes(done) if "PSNR and sharpness disagree" in w]
    assert bool(found) == warned
    if warned:
        assert "the best, tau 0.5 (K = 4), has a sharpness ratio of 0.50, while tau 0.1 (K = 4) has 0.90" in found[0]


def test_both_the_nearest_in_sharpness_and_those_not_told_apart_are_compared():
    done = [cell(0.5, 25.0, sharp=0.5), cell(0.1, 24.9, sharp=0.7, wobble=3), cell(0.2, 15.0), cell(0.3, 15, sharp=0.8)]
    (found,) = [w for w in notes(done) if "disagree" in w]
    assert [tau in found for tau in ("tau 0.1 ", "tau 0.2 ", "tau 0.3 ")] == [True, True, False]


def test_a_difference_in_sharpness_that_is_not_clear_over_episodes_is_not_claimed():
    best, other = cell(0.5, 25.0, sharp=0.5), cell(0.1, 24.0, sharp=0.7)
    other.scores.tables["model"]["energy"][:, 0] += 2 * NOISE
    assert not any("disagree" in w for w in notes([best, other]))


def test_windows_of_one_episode_do_not_make_a_difference_in_sharpness_clear():
    best, other = cell(0.5, 25.0, sharp=0.5), cell(0.1, 24.0, sharp=0.5)
    other.scores.tables["model"]["energy"][:, 0] += np.repeat([0.0, 0.4], 6)
    found = verdict.find_best([best, other], EPISODES, 1)
    assert verdict.disagreement([best, other], found, EPISODES, 1) != []
    assert verdict.disagreement([best, other], found, ["a"] * 6 + ["b"] * 6, 1) == []


@pytest.mark.parametrize(
    ("forcing", "trained_at", "untrained"),
    [
        ("independent", None, [0.0, 0.05]),
        ("independent", 0.1, [0.0, 0.05]),  # it never looks at tau_ctx
        ("horizon", 0.1, [0.0, 0.05]),
        ("horizon", 0.3, [0.0, 0.05, 0.125, 0.2]),
        ("prefix", 0.05, [0.0]),
        ("prefix", 0.0, []),
        ("context", 0.0, []),
        ("resampled", 0.125, [0.0, 0.05, 0.2, 0.5, 0.9]),
        ("committed", 0.125, [0.0, 0.05, 0.2, 0.5, 0.9]),  # its context stands at one level, whatever it draws
    ],
)
def test_a_tau_that_the_forcing_never_drew_is_known(forcing, trained_at, untrained):
    facts = {} if trained_at is None else {"train": {"tau_ctx": trained_at}}
    world = SimpleNamespace(k_max=8, forcing=forcing, facts=facts)
    assert untrained_taus(world, [0.0, 0.05, 0.125, 0.2, 0.5, 0.9]) == untrained


def test_a_level_far_from_those_that_were_drawn_was_not_trained(monkeypatch):
    def coarse(batch, frames, k_max, tau_ctx, generator):
        return torch.tensor([0.25, 0.375, 1.0]).expand(batch, 3), None

    monkeypatch.setitem(FORCINGS, "coarse", coarse)
    world = SimpleNamespace(k_max=8, forcing="coarse", facts={"train": {"tau_ctx": 0.1}})
    assert untrained_taus(world, [0.25, 0.3, 0.375, 0.5, 0.9]) == [0.5, 0.9]
    taus = [0.0, 0.0002, *(i / 15 for i in range(1, 16))]
    for forcing in ("independent", "uniform", "prefix", "context"):  # a grid that draws of any number leave holes in
        for tau_ctx, untrained in ((0.1, [0.0, 0.0002]), (0.0001, [0.0])):
            fine = SimpleNamespace(k_max=4096, forcing=forcing, facts={"train": {"tau_ctx": tau_ctx}})
            assert untrained_taus(fine, taus) == (untrained if forcing in WITH_CONTEXT else [0.0, 0.0002])


def test_where_the_training_is_not_known_that_is_said():
    for forcing in ("horizon", "somebody's"):
        world = SimpleNamespace(k_max=8, forcing=forcing, facts={})
        assert untrained_taus(world, [0.0]) is None
        assert any("is not known" in w for w in notes([cell(0.5, 25)], world))


def test_a_clean_label_is_outside_the_trained_range_whatever_the_noise():
    done = [cell(0.0, 25), cell(0.5, 25), cell(0.5, 24, ctx_label="clean")]
    (found,) = [w for w in notes(done) if "outside the trained range" in w]
    assert found.endswith("tau 0 (K = 4, label honest), 0.5 (K = 4, label clean)")


def test_the_default_is_left_alone_unless_the_best_can_be_told_from_it():
    own = RolloutConfig(tau_ctx=0.1)
    sure = [cell(0.1, 24.0), cell(0.3, 25.0)]
    found = verdict.decide(sure, own, EPISODES, 1)
    assert (found["tau_ctx"], found["changed"], found["before"]) == (0.3, True, 0.1)
    assert found["ahead_db"].value == pytest.approx(1)
    unsure = [cell(0.1, 24.0, wobble=5), cell(0.3, 25.5)]
    found = verdict.decide(unsure, own, EPISODES, 1)
    assert (found["tau_ctx"], found["changed"]) == (0.1, False)
    assert "cannot be told from the best, tau 0.3" in found["why"]
    assert not verdict.decide(sure, own, ["e"] * 12, 1)["changed"]  # one episode: nothing can be told
    assert verdict.decide([cell(0.1, 25.0), cell(0.3, 24.0)], own, EPISODES, 1)["why"].endswith("is the best")


def test_the_default_is_compared_only_with_cells_that_differ_by_tau_ctx_alone():
    own = RolloutConfig(tau_ctx=0.1)
    done = [cell(0.1, 24.0), cell(0.3, 25.0), cell(0.5, 30.0, steps=8), cell(0.5, 31.0, ctx_label="clean")]
    assert verdict.decide(done, own, EPISODES, 1)["tau_ctx"] == 0.3
    assert not verdict.decide(done[2:], own, EPISODES, 1)["changed"]


def test_a_default_that_is_not_finite_gives_way():
    broken = cell(0.1, 30.0)
    broken.scores.tables["model"]["psnr"][0] = np.nan
    assert verdict.decide([broken, cell(0.3, 22.0)], RolloutConfig(tau_ctx=0.1), EPISODES, 1)["tau_ctx"] == 0.3
    assert not verdict.decide([broken], RolloutConfig(tau_ctx=0.1), EPISODES, 1)["changed"]


def test_test_can_take_a_choice_back_but_never_make_one():
    decision = {"tau_ctx": 0.3, "before": 0.1, "changed": True, "why": "", "ahead_db": None}
    worse, unclear = Interval(-1, -2, -0.1), Interval(-1, -2, 0.1)
    kept = dict(decision)
    assert verdict.check_on_test({"chosen_minus_own_db": {16: unclear}}, 16, kept) == []
    assert kept == decision
    verdict.check_on_test({"chosen_minus_own_db": {16: worse}}, 16, kept)
    assert (kept["tau_ctx"], kept["changed"]) == (0.1, False)
    assert "clearly worse on test" in kept["why"]
    assert verdict.check_on_test({"best_minus_own_db": {16: unclear}}, 16, None) == []
    (found,) = verdict.check_on_test({"best_minus_own_db": {16: worse}}, 16, None)
    assert "on test the best is clearly worse than the checkpoint's own settings" in found


def test_the_default_joins_its_own_group_in_order_and_a_grid_without_that_group_is_refused():
    grid = [RolloutConfig(tau_ctx=t, steps=k) for k in (2, 4) for t in (0.0, 0.5)]
    found = with_default(grid, RolloutConfig(tau_ctx=0.3, steps=2))
    assert [(c.steps, c.tau_ctx) for c in found] == [(2, 0.0), (2, 0.3), (2, 0.5), (4, 0.0), (4, 0.5)]
    assert with_default(grid, grid[1]) == grid
    with pytest.raises(UserError, match="add its --steps"):
        with_default(grid, RolloutConfig(steps=8))


def test_cells_are_named_by_what_varies():
    cells = [RolloutConfig(tau_ctx=t, steps=k) for k in (2, 4) for t in (0.0, 0.5)]
    assert varying(cells) == ["steps"]
    assert name(cells[0]) == "0 (K = 2)"
    assert names(cells) == "0, 0.5 (K = 2), 0, 0.5 (K = 4)"
    assert names([RolloutConfig(steps=k) for k in range(1, 10)]).endswith("and 3 more")


def test_flat_frames_are_neither_sharp_nor_blurry_and_nothing_is_divided_by_them():
    done = [cell(0.1, 25.0), cell(0.2, 24.9, wobble=3)]
    for d in done:
        d.fixed["truth"] = {name: np.zeros((12, 1)) for name in ("energy", "motion")}
    with warnings.catch_warnings(action="error"):
        assert not any("disagree" in note for note in notes(done))
