"""A sweep compares like with like, and says what it cannot tell apart."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import moving_pictures, oracle, persistence, puppet_world, tiny_world

from ahriuwu_cli.errors import CheckpointError, UserError
from ahriuwu_cli.evaluation import report
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate
from ahriuwu_cli.evaluation.sweep import SweepConfig, sweep, walked
from ahriuwu_cli.rollout import RolloutConfig

CONFIG = SweepConfig(taus=(0.0, 0.1, 0.5), windows=8, context=4, horizon=5, horizons=(1, 4), batch=8, shown=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("data") / "a")


@pytest.fixture(scope="module")
def tiny(store):
    return tiny_world(store)


class HonestyTest:
    """Dynamics that answer the truth plus an error that grows with the label tau of the frame before."""

    def __init__(self, puppet, error_by_tau) -> None:
        self.puppet, self.error, self.config, self.embed = puppet, error_by_tau, puppet.config, puppet.embed

    def new_cache(self, batch):
        cache = self.puppet.new_cache(batch)
        cache.tau = 0.0
        return cache

    def extend(self, z_tau, tau, d, actions, known, cache, keep):
        if cache.rows is None:  # the puppet finds its window by the clean first frame
            cache.tau = float(tau[0, 0])
            cache.rows = self.rows
        z_hat = self.puppet.extend(z_tau, tau, d, actions, known, cache, keep)
        return z_hat + self.error(cache.tau)


def by_tau(store, windows, error):
    """A world whose error depends on tau_ctx alone."""
    world = puppet_world(store, oracle)
    dynamics = HonestyTest(world.dynamics, error)
    dynamics.rows = list(windows)
    return replace(world, dynamics=dynamics)


def test_a_cell_has_the_numbers_of_the_evaluation_with_its_settings(store, tiny):
    found = sweep(tiny, store, CONFIG, tiny.generation).result
    for cell in found["cells"]:
        config = EvaluationConfig(windows=8, context=4, horizon=5, horizons=(1, 4), split="val")
        alone = evaluate(tiny, store, config, replace(tiny.generation, tau_ctx=cell["tau_ctx"]))
        assert alone["settings"]["manifest_hash"] == found["settings"]["manifest_hash"]
        for h, row in alone["horizons"].items():
            assert cell["gain_db"][h] == pytest.approx(row["gain_db"], abs=1e-3)
        assert cell["motion_ratio"] == pytest.approx(alone["horizons"]["5"]["motion_ratio"], abs=1e-3)
        assert cell["sharpness_ratio"] == pytest.approx(alone["horizons"]["5"]["sharpness_ratio"], abs=1e-3)


def test_the_reference_cell_differs_from_itself_by_nothing_and_the_others_do_not(store, tiny):
    cells = sweep(tiny, store, CONFIG, tiny.generation).result["cells"]
    assert cells[0]["tau_ctx"] == 0
    assert cells[0]["difference_db"] == {"value": 0, "lo": 0, "hi": 0}
    assert all(c["difference_db"]["value"] != 0 for c in cells[1:])
    gap = cells[2]["psnr"]["5"] - cells[0]["psnr"]["5"]
    assert cells[2]["difference_db"]["value"] == pytest.approx(gap, abs=1e-5)


def test_the_best_tau_is_found_with_those_that_cannot_be_told_from_it(store):
    from ahriuwu_cli.evaluation.protocol import make_manifest

    manifest = make_manifest(store, "val", 4, 5, 8, 0)
    errors = {0.0: 0.5, 0.1: 0.0, 0.2: 0.0, 0.5: 2.0}
    world = by_tau(store, manifest.windows, lambda tau: errors[round(tau, 6)])
    config = replace(CONFIG, taus=tuple(errors))
    found = sweep(world, store, config, world.generation, manifest).result
    assert found["best"]["tau_ctx"] in (0.1, 0.2)
    same = [c["tau_ctx"] for c in found["best"]["not_told_apart"]]
    assert same == [0.2 if found["best"]["tau_ctx"] == 0.1 else 0.1]
    assert not any("edge" in w for w in found["warnings"])


def test_it_warns_at_the_grid_s_edge_below_persistence_and_when_frozen(store):
    from ahriuwu_cli.evaluation.protocol import make_manifest

    manifest = make_manifest(store, "val", 4, 5, 8, 0)
    world = by_tau(store, manifest.windows, lambda tau: 3 * tau + 0.05)
    found = sweep(world, store, replace(CONFIG, taus=(0.0, 0.9)), world.generation, manifest).result
    assert any("the best tau 0 lies at the grid's edge" in w for w in found["warnings"])
    assert any("below persistence at frame 5: tau 0.9 (K = 2)" in w for w in found["warnings"])
    still = puppet_world(store, persistence(4))
    found = sweep(still, store, replace(CONFIG, taus=(0.0,)), still.generation, manifest).result
    assert any("frozen" in w for w in found["warnings"])
    assert not any("edge" in w for w in found["warnings"])  # a grid of one has none


def test_what_the_sampler_really_does_is_stated():
    assert walked(RolloutConfig(steps=4, sampler="shortcut", tau_ctx=0.5), 64) == (0.5, 2)
    assert walked(RolloutConfig(steps=4, sampler="shortcut", tau_ctx=0.1), 64) == (0.1, 4)
    assert walked(RolloutConfig(steps=4, sampler="euler", tau_ctx=0.9), 64) == (0.9, 4)


def test_several_k_are_cells_of_one_table(store, tiny):
    config = replace(CONFIG, taus=(0.0, 0.1), steps=(1, 2))
    found = sweep(tiny, store, config, tiny.generation).result
    assert [(c["steps"], c["tau_ctx"]) for c in found["cells"]] == [(1, 0), (1, 0.1), (2, 0), (2, 0.1)]
    assert found["reference"] == {"tau_ctx": 0, "steps": 1}


def test_rows_come_out_as_they_finish_and_a_budget_ends_the_sweep(store, tiny):
    rows = []
    found = sweep(tiny, store, CONFIG, tiny.generation, on_cell=rows.append, budget_s=1e-9).result
    assert len(rows) == len(found["cells"]) == 1
    assert "the budget ended after 1 of 3 cells" in found["warnings"]
    rows.clear()
    found = sweep(tiny, store, CONFIG, tiny.generation, on_cell=rows.append).result
    assert rows == found["cells"]


def test_the_delta_is_measured_only_when_asked(store, tiny):
    plain = sweep(tiny, store, CONFIG, tiny.generation).result["cells"]
    asked = sweep(tiny, store, replace(CONFIG, delta=True), tiny.generation).result["cells"]
    assert all(c["action_delta_db"] is None for c in plain)
    assert all(c["action_delta_db"]["value"] != 0 for c in asked)
    assert [c["psnr"] for c in plain] == [c["psnr"] for c in asked]


def test_nan_cells_are_counted_and_never_best(store):
    from ahriuwu_cli.evaluation.protocol import make_manifest

    manifest = make_manifest(store, "val", 4, 5, 8, 0)
    world = by_tau(store, manifest.windows, lambda tau: torch.nan if tau < 0.05 else 0.1)
    found = sweep(world, store, CONFIG, world.generation, manifest).result
    assert found["status"] == "nan"
    assert found["cells"][0]["not_finite_frames"] == 8 * 5
    assert found["cells"][0]["gain_db"]["5"]["value"] is None
    assert found["best"]["tau_ctx"] in (0.1, 0.5)
    json.dumps(found, allow_nan=False)


def test_clips_show_the_truth_and_every_cell_with_a_common_context(store, tiny):
    clips = sweep(tiny, store, CONFIG, tiny.generation).clips
    assert [title for title, _ in clips] == ["truth", "tau 0, K 2", "tau 0.1, K 2", "tau 0.5, K 2"]
    for _, frames in clips:
        assert frames.shape == (2, 9, 16, 16, 3)
        np.testing.assert_array_equal(frames[:, :4], clips[0][1][:, :4])


def test_bad_grids_are_refused(store, tiny):
    for taus, match in (((0.1, 0.1), "different values"), ((), "at least one"), ((0.1, 1.0), r"not in \[0, 1\)")):
        with pytest.raises(UserError, match=match):
            sweep(tiny, store, replace(CONFIG, taus=taus), tiny.generation)
    with pytest.raises(CheckpointError, match="not trained for step size"):
        sweep(replace(tiny, trained_d=(0.125,)), store, CONFIG, tiny.generation)


def test_the_tables_state_the_convention_and_every_cell(store, tiny):
    found = sweep(tiny, store, replace(CONFIG, delta=True), tiny.generation).result
    text = report.sweep_text(found)
    assert "tau (0 clean, 1 noise)" in text
    assert "cannot be told from it" in text
    header, *lines = report.as_csv([report.sweep_row(c) for c in found["cells"]]).splitlines()
    assert header.startswith('"tau_ctx tau (0 clean, 1 noise)"')
    assert len(lines) == 3
    assert all("nan" not in line for line in lines)
