"""Tables that were really measured contradict nothing, whatever happened; bounds on a mean of PSNRs are bounds."""

import numpy as np
import pytest
from worlds import NO_ACTIONS, SPACE, breaks_at, moving_pictures, oracle, persistence, puppet_world, tiny_world

from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, measure_share, ready
from ahriuwu_cli.evaluation.metrics import psnr_from_mse
from ahriuwu_cli.evaluation.table_check import _psnr_of, check_tables


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
def test_a_mean_of_psnr_lies_within_what_the_mean_of_the_errors_allows_and_reaches_it(seeds):
    rng = np.random.default_rng(0)
    mse = 10 ** rng.uniform(-9, 0, (20_000, seeds)) * (rng.random((20_000, seeds)) < 0.8)
    least, most = _psnr_of(mse.mean(1), seeds)
    found = psnr_from_mse(mse).mean(1)
    assert (found >= least - 1e-9).all()
    assert (found <= most + 1e-9).all()
    alike, alone = np.full(seeds, 1e-3), np.array([1e-3, *[1e-6] * (seeds - 1)])
    assert _psnr_of(alike.mean(), seeds)[0] == pytest.approx(psnr_from_mse(alike).mean(), abs=1e-9)
    assert _psnr_of(alone.mean(), seeds)[1] == pytest.approx(psnr_from_mse(alone).mean(), abs=1e-9)
