"""A sweep compares like with like, and says what it cannot tell apart."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from worlds import moving_pictures, oracle, persistence, puppet_world, tiny_world

from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation import report, sweep_report, sweep_run
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate
from ahriuwu_cli.evaluation.sweep import SweepConfig, sweep, walked
from ahriuwu_cli.rollout import RolloutConfig

CONFIG = SweepConfig(
    taus=(0.0, 0.1, 0.5), windows=8, context=4, horizon=5, horizons=(1, 4), batch=8, shown=2, test=False, delta=False
)


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

    def extend(self, z_tau, tau, d, actions, known, cache, keep, unread=0):
        if cache.rows is None:  # the puppet finds its window by the clean first frame
            cache.tau = float(tau[0, 0])
            cache.rows = self.rows
        z_hat = self.puppet.extend(z_tau, tau, d, actions, known, cache, keep, unread)
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
        assert cell["motion_ratio"]["5"] == pytest.approx(alone["horizons"]["5"]["motion_ratio"], abs=1e-3)
        assert cell["sharpness_ratio"]["5"] == pytest.approx(alone["horizons"]["5"]["sharpness_ratio"], abs=1e-3)


def test_the_reference_cell_differs_from_itself_by_nothing_and_the_others_do_not(store, tiny):
    cells = sweep(tiny, store, CONFIG, tiny.generation).result["cells"]
    assert cells[0]["tau_ctx"] == 0
    assert cells[0]["difference_db"]["5"] == {"value": 0, "lo": 0, "hi": 0}
    assert all(c["difference_db"]["5"]["value"] != 0 for c in cells[1:])
    gap = cells[2]["psnr"]["5"] - cells[0]["psnr"]["5"]
    assert cells[2]["difference_db"]["5"]["value"] == pytest.approx(gap, abs=1e-5)


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


def test_several_k_are_cells_of_one_table_each_with_its_own_reference(store, tiny):
    config = replace(CONFIG, taus=(0.1, 0.0), steps=(1, 2))
    found = sweep(tiny, store, config, tiny.generation).result
    cells = found["cells"]
    assert [(c["steps"], c["tau_ctx"]) for c in cells] == [(1, 0), (1, 0.1), (2, 0), (2, 0.1)]
    assert found["reference"] == {"tau_ctx": 0}
    assert found["varying"] == ["steps"]
    for first, second in (cells[:2], cells[2:]):
        assert first["difference_db"]["5"]["value"] == 0
        gap = second["psnr"]["5"] - first["psnr"]["5"]
        assert second["difference_db"]["5"]["value"] == pytest.approx(gap, abs=1e-5)


def test_every_setting_of_the_grid_is_a_cell_with_the_numbers_of_the_evaluation(store, tiny):
    config = replace(CONFIG, taus=(0.3,), samplers=("euler", "shortcut"), ctx_modes=("stop", "renoise"),
                     ctx_labels=("honest", "clean"))  # fmt: skip
    cells = sweep(tiny, store, config, tiny.generation).result["cells"]
    assert len({(c["sampler"], c["ctx_mode"], c["ctx_label"]) for c in cells}) == len(cells) == 8
    assert len({c["psnr"]["5"] for c in cells}) == 8  # every one of them matters
    assert {c["label"] for c in cells if c["ctx_label"] == "clean"} == {0}
    settings = EvaluationConfig(windows=8, context=4, horizon=5, horizons=(1, 4), split="val")
    for cell in cells[::3]:
        own = {n: cell[n] for n in ("steps", "sampler", "tau_ctx", "ctx_mode", "ctx_label")}
        alone = evaluate(tiny, store, settings, RolloutConfig(**own))
        assert cell["gain_db"]["5"] == pytest.approx(alone["horizons"]["5"]["gain_db"], abs=1e-3)


def test_the_drift_is_the_mean_slope_of_the_gain_and_rows_by_window_average_to_the_cell(store, tiny):
    config = replace(CONFIG, taus=(0.1,), horizons=(1, 2, 3, 4, 5))
    found = sweep(tiny, store, config, tiny.generation)
    (cell,) = found.result["cells"]
    assert len(found.windows) == 8 * 5
    slopes = []
    for w in range(8):
        rows = found.windows[5 * w : 5 * w + 5]
        assert len({(r["episode"], r["start"]) for r in rows}) == 1
        slopes.append(np.polyfit([r["frame"] for r in rows], [r["gain_db"] for r in rows], 1)[0])
    assert cell["drift_db_per_frame"]["value"] == pytest.approx(np.mean(slopes), abs=1e-4)
    for h in (1, 5):
        mean = np.mean([r["psnr"] for r in found.windows if r["frame"] == h])
        assert cell["psnr"][str(h)] == pytest.approx(mean, abs=1e-5)
        energies = [sum(r[n] for r in found.windows if r["frame"] == h) for n in ("energy", "true_energy")]
        assert cell["sharpness_ratio"][str(h)] == pytest.approx(energies[0] / energies[1], abs=1e-2)


def test_the_batch_changes_no_number(store, tiny):
    whole = sweep(tiny, store, replace(CONFIG, delta=True), tiny.generation).result["cells"]
    parts = sweep(tiny, store, replace(CONFIG, delta=True, batch=3), tiny.generation).result["cells"]
    for a, b in zip(whole, parts, strict=True):
        for metric in ("psnr", "gain_db", "difference_db", "motion_ratio", "sharpness_ratio"):
            for h in ("1", "4", "5"):
                assert a[metric][h] == pytest.approx(b[metric][h], abs=1e-3), (metric, h)
        assert a["action_delta_db"] == pytest.approx(b["action_delta_db"], abs=1e-3)


def test_the_choice_is_reported_on_windows_of_the_test_split(store, tiny):
    world = replace(tiny, generation=replace(tiny.generation, tau_ctx=0.2))
    found = sweep(world, store, replace(CONFIG, test=True), world.generation)
    test, best = found.result["test"], found.result["best"]
    assert [test["cells"][role]["tau_ctx"] for role in ("best", "reference", "own")] == [best["tau_ctx"], 0, 0.2]
    ids = {e.id for e in store.episodes("test")}
    rows = [r for r in found.windows if r["split"] == "test"]
    assert rows
    assert {r["episode"] for r in rows} <= ids
    assert not ids & {r["episode"] for r in found.windows if r["split"] == "val"}
    config = EvaluationConfig(windows=8, context=4, horizon=5, horizons=(1, 4), split="test")
    for role in ("best", "reference", "own"):
        alone = evaluate(world, store, config, replace(world.generation, tau_ctx=test["cells"][role]["tau_ctx"]))
        assert test["manifest_hash"] == alone["settings"]["manifest_hash"]
        assert test["cells"][role]["gain_db"]["5"] == pytest.approx(alone["horizons"]["5"]["gain_db"], abs=1e-3)
    gap = test["cells"]["best"]["psnr"]["4"] - test["cells"]["own"]["psnr"]["4"]
    assert test["best_minus_own_db"]["4"]["value"] == pytest.approx(gap, abs=1e-5)


def test_what_was_chosen_on_test_itself_is_not_reported_as_if_it_were_fresh(store, tiny):
    found = sweep(tiny, store, replace(CONFIG, test=True, split="test"), tiny.generation).result
    assert found["test"] is None
    assert any("chosen on the test split itself" in w for w in found["warnings"])
    found = sweep(tiny, store, CONFIG, tiny.generation).result
    assert any("not reported on test" in w for w in found["warnings"])


def test_a_dataset_without_test_windows_is_refused_before_anything_runs(store, tiny, monkeypatch):
    episodes = type(store).episodes
    monkeypatch.setattr(type(store), "episodes", lambda s, split=None: [] if split == "test" else episodes(s, split))
    monkeypatch.setattr(sweep_run, "generate", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(DataError, match="--no-test"):
        sweep(tiny, store, replace(CONFIG, test=True), tiny.generation)


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
    config = EvaluationConfig(windows=8, context=4, horizon=5, horizons=(1, 4), split="val", delta_at=4)
    for cell in asked:  # only four frames are rolled out with shuffled actions: the same number as with all
        alone = evaluate(tiny, store, config, replace(tiny.generation, tau_ctx=cell["tau_ctx"]))
        assert cell["action_delta_db"] == pytest.approx(alone["action_delta_db"]["shuffled"]["4"], abs=1e-3)


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
    text = sweep_report.sweep_text(found)
    assert "tau (0 clean, 1 noise)" in text
    assert "cannot be told from it" in text
    rows = [row for c in found["cells"] for row in sweep_report.sweep_rows(c)]
    header, *lines = report.as_csv(rows).splitlines()
    assert header.startswith('"tau_ctx tau (0 clean, 1 noise)"')
    assert len(lines) == 3 * 3
    assert all("nan" not in line for line in lines)
    page = sweep_report.sweep_markdown(found)
    assert page.count("\n| 0") >= 3
    assert found["settings"]["manifest_hash"] in page
    found["settings"]["checkpoint_git"], found["warnings"] = "`\n\n# Certified\n<b>", ["<b>\nFAILED: everything"]
    forged = sweep_report.sweep_markdown(found)
    assert "<b>" not in forged
    assert not re.search("^(# Cert|FAILED)", forged + "\n" + sweep_report.sweep_text(found), re.MULTILINE)
