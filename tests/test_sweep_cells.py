"""A sweep can be stopped at any moment and goes on where it was; damaged files are seen, kept and made anew."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from worlds import moving_pictures, tiny_world

from ahriuwu_cli.data.tensors import read_arrays
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation import sweep_run
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.evaluation.score_files import write_scores
from ahriuwu_cli.evaluation.sweep import Storage, SweepConfig, sweep
from ahriuwu_cli.evaluation.sweep_cells import (
    ASKED,
    CellScores,
    begin,
    cell_file,
    check_results,
    identity,
    read_cell,
    write_cell,
)
from ahriuwu_cli.rollout import RolloutConfig

CONFIG = SweepConfig(taus=(0.0, 0.1, 0.5), windows=4, context=4, horizon=5, horizons=(1, 4), shown=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return moving_pictures(tmp_path_factory.mktemp("data") / "a")


@pytest.fixture(scope="module")
def tiny(store):
    return tiny_world(store)


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "cells").mkdir()
    return Storage(tmp_path / "cells", "the weights")


@pytest.fixture(scope="module")
def finished(store, tiny, tmp_path_factory):
    """(configuration, result, cells) of a sweep."""
    config, folder = replace(CONFIG, test=False, taus=(0.0, 0.1)), tmp_path_factory.mktemp("finished")
    return config, sweep(tiny, store, config, tiny.generation, storage=Storage(folder, "the weights")), folder


@pytest.fixture
def measured(finished, storage):
    """The same, its cells in the storage of this test."""
    shutil.copytree(finished[2], storage.folder, dirs_exist_ok=True)
    return finished[:2]


@pytest.fixture
def rolled(monkeypatch):
    """The settings of every rollout that really ran with true and with shuffled actions."""
    ran, generate = [], sweep_run.generate

    def spy(world, frames, actions, keys, config, **named):
        ran.append(config)
        return generate(world, frames, actions, keys, config, **named)

    monkeypatch.setattr(sweep_run, "generate", spy)
    return ran


def but_times(result):
    """The result without anything that a clock measured."""
    result = {key: value for key, value in json.loads(json.dumps(result)).items() if key != "timing"}
    result["settings"].pop("checkpoint_hash")
    for cell in [*result["cells"], *(result["test"] or {"cells": {}})["cells"].values()]:
        cell.pop("frames_per_s")
    return result


def files(storage):
    return sorted(p.name for p in storage.folder.iterdir())


def test_finished_cells_are_not_run_again_and_give_the_same_result(store, tiny, storage, rolled):
    plain = sweep(tiny, store, CONFIG, tiny.generation)
    rolled.clear()
    first = sweep(tiny, store, CONFIG, tiny.generation, storage=storage)
    assert len(rolled) >= 2 * 3
    assert len(files(storage)) == len(rolled) // 2  # true and shuffled actions, one file
    rolled.clear()
    second = sweep(tiny, store, CONFIG, tiny.generation, storage=storage)
    assert rolled == []
    assert but_times(plain.result) == but_times(first.result) == but_times(second.result)
    assert first.windows == second.windows
    for (title, frames), (again, same) in zip(first.clips, second.clips, strict=True):
        assert title == again
        np.testing.assert_array_equal(frames, same)


def test_a_sweep_that_was_interrupted_goes_on_where_it_stopped(store, tiny, storage, rolled):
    whole = sweep(tiny, store, CONFIG, tiny.generation)

    def interrupt(cell):
        if cell["tau_ctx"] == 0.1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(tiny, store, CONFIG, tiny.generation, storage=storage, on_cell=interrupt)
    assert len(files(storage)) == 2
    rolled.clear()
    again = sweep(tiny, store, CONFIG, tiny.generation, storage=storage)
    assert {c.tau_ctx for c in rolled[:2]} == {0.5}  # on val only this one was missing
    assert but_times(again.result) == but_times(whole.result)


def test_a_budget_ends_the_sweep_and_the_same_call_goes_on_later(store, tiny, storage, rolled):
    states = []
    for _ in range(5):
        found = sweep(tiny, store, CONFIG, tiny.generation, storage=storage, budget_s=1e-9).result
        states.append((len(found["cells"]), found["complete"]))
        assert (found["test"] is None) == (len(found["cells"]) < 3)  # test is not looked at before the grid is done
    assert [n for n, _ in states] == [1, 2, 3, 3, 3]
    assert states[-1][1]
    assert not states[0][1]
    whole = sweep(tiny, store, CONFIG, tiny.generation)
    assert but_times(found) == but_times(whole.result)


def test_no_cell_is_begun_that_would_not_end_in_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(sweep_run.time, "monotonic", lambda: now[0])
    budget = sweep_run.Budget(10)
    assert budget.allows(1000)  # nothing is known yet: the first is always begun
    now[0] += 4
    budget.note(4, 40)
    assert budget.needs(60) == pytest.approx(6)
    assert budget.allows(60)
    assert not budget.allows(61)
    assert sweep_run.Budget(None).allows(10**9)


def test_the_eta_is_the_time_that_the_passes_left_will_take(store, tiny, monkeypatch):
    said = []
    monkeypatch.setattr(sweep_run.time, "monotonic", iter(np.arange(0, 1000, 3.0)).__next__)
    sweep(tiny, store, replace(CONFIG, test=False, steps=(1, 4)), tiny.generation, say=said.append)
    assert len(said) == 6
    assert said[0].startswith("1/6: tau 0 (K = 1, shortcut, stop, label honest) took ")
    assert said[-1].endswith("ETA 0 s")
    etas = [float(line.split("ETA ")[1].split()[0]) for line in said]
    assert etas[0] > etas[1] > etas[2] > etas[3] > etas[4] > 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "swap", "text"])
def test_a_damaged_cell_is_named_set_aside_and_done_again(store, tiny, storage, rolled, damage):
    config = replace(CONFIG, test=False)
    whole = sweep(tiny, store, config, tiny.generation, storage=storage)
    path, other = sorted(storage.folder.iterdir())[:2]
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "swap":
        content = other.read_bytes()
    path.write_bytes({"cut": content[:-9], "empty": b"", "text": b"{}"}.get(damage, content))
    broken = path.read_bytes()
    rolled.clear()
    complaints = []
    again = sweep(tiny, store, config, tiny.generation, storage=storage, complain=complaints.append)
    assert len(complaints) == 1
    assert f"{path} is damaged (" in complaints[0]
    assert f"set aside as {path.name}.damaged, and done again" in complaints[0]
    assert path.with_name(f"{path.name}.damaged").read_bytes() == broken
    assert len({c.tau_ctx for c in rolled}) == 1
    assert but_times(again.result) == but_times(whole.result)


def _drop(name):
    return lambda arrays, facts: arrays.pop(name)


def _array(name, change):
    return lambda arrays, facts: arrays.update({name: change(arrays[name])})


def _fact(name, value):
    return lambda arrays, facts: facts.update({name: value})


def _nothing(arrays, facts):
    """No frame has a score, and none is counted as broken."""
    arrays.update({name: values * np.nan for name, values in arrays.items() if name.startswith("model/")})


def _frozen(arrays, facts):
    """It neither moves nor has edges, and still is like the truth and moves as that does."""
    for name, value in {"motion": 0, "motion_gg": 1e-3, "motion_gt": 1e-3, "motion_tt": 1e-3, "ssim": 1}.items():
        arrays[f"model/{name}"][:] = value


def _swapped(arrays, facts):
    """Scores of windows in another order: each is sound for itself."""
    arrays.update({name: values[::-1].copy() for name, values in arrays.items() if name.startswith("model/")})


def _film(part):
    def change(arrays, facts):
        arrays["clip"][part] = 255 - arrays["clip"][part]

    return change


HOSTILE = {  # what somebody made the checksum fit to
    "no psnr": _drop("model/psnr"), "no ssim": _drop("model/ssim"), "no shuffled": _drop("shuffled/psnr"),
    "no clip": _drop("clip"), "another array": lambda arrays, facts: arrays.update({"x": arrays["model/psnr"]}),
    "fewer frames": _array("model/psnr", lambda v: v[:, :1]), "fewer axes": _array("model/psnr", lambda v: v[:, 0]),
    "whole numbers": _array("model/psnr", lambda v: v.astype(np.int32)),
    "infinite": _array("model/psnr", lambda v: v * np.inf), "huge": _array("model/mse", lambda v: v - 1e308),
    "above the cap": _array("model/psnr", lambda v: v + 60), "not alike at all": _array("model/ssim", lambda v: v - 3),
    "a larger clip": _array("clip", lambda v: v.repeat(2, 2)), "a shorter clip": _array("clip", lambda v: v[:, :1]),
    "seconds as text": _fact("seconds", "x"), "negative seconds": _fact("seconds", -1), "no wall": _fact("wall", None),
    "endless seconds": _fact("seconds", 1e308), "a list of counts": _fact("not_finite", [1]),
    "half a frame": _fact("not_finite", 0.5), "true": _fact("not_finite", True), "another fact": _fact("x", 1),
    "far above its error": _array("model/psnr", lambda v: v * 0 + 59), "nothing": _nothing,
    "shuffled alone": _array("shuffled/mse", lambda v: v * 0 + 1), "a count of nothing": _fact("not_finite", 5),
    "no likeness": _array("model/ssim", lambda v: v * np.nan),
    "motion": _array("model/motion_gt", lambda v: v * 0 + 0.9), "frozen": _frozen, "other windows": _swapped,
    "another truth": _array("model/motion_tt", lambda v: v * 1.01), "a film of 7s": _array("clip", lambda v: v * 0 + 7),
    "other context": _film(np.s_[:, 1]), "another film": _film(np.s_[-1, -1]), "blur": _array("model/energy", np.sqrt),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_cell_whose_hash_fits_but_not_its_content_is_set_aside_as_well(store, tiny, storage, measured, rolled, what):
    config, whole = measured
    (path, *_) = sorted(storage.folder.iterdir())
    arrays, metadata = read_arrays(path)
    arrays = {name: values.copy() for name, values in arrays.items()}
    about, facts = json.loads(metadata["identity"]), json.loads(metadata["facts"])
    HOSTILE[what](arrays, facts)
    write_scores(path, metadata["format"], arrays, about, facts)
    complaints = []
    again = sweep(tiny, store, config, tiny.generation, storage=storage, complain=complaints.append)
    (said,) = complaints
    assert f"{path} is damaged (" in said
    assert f"set aside as {path.name}.damaged, and done again" in said
    assert len(rolled) == 2
    assert but_times(again.result) == but_times(whole.result)


def test_everything_that_scores_depend_on_names_another_file(store, tmp_path):
    manifest = make_manifest(store, "val", 4, 5, 4, 0)
    cell, named = RolloutConfig(), {"seed": 0, "delta_at": 4, "shown": 2}
    others = [replace(cell, steps=2), replace(cell, sampler="euler"), replace(cell, tau_ctx=0.2)]
    others += [replace(cell, ctx_mode="renoise"), replace(cell, ctx_label="clean")]
    base = identity("w", manifest, cell, **named)
    changed = [
        identity("x", manifest, cell, **named),
        identity("w", make_manifest(store, "val", 4, 5, 4, 1), cell, **named),
        identity("w", make_manifest(store, "test", 4, 5, 4, 0), cell, **named),
        *(identity("w", manifest, cell, **(named | c)) for c in ({"seed": 1}, {"delta_at": None}, {"shown": 1})),
        *(identity("w", manifest, other, **named) for other in others),
    ]
    assert len({cell_file(tmp_path, about) for about in [base, *changed]}) == 1 + len(changed)
    assert cell_file(tmp_path, base) == cell_file(tmp_path, json.loads(json.dumps(base)))


def test_a_cell_is_read_as_it_was_written_nan_included(tmp_path):
    about, shapes = {"a": 1}, {"model/psnr": (2, 2), "clip": (2, 3, 4, 4, 3)}
    psnr = np.array([[1.0, np.nan], [3.0, 4.0]])
    clip = np.arange(2 * 3 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 4, 3)
    write_cell(tmp_path, about, CellScores({"model": {"psnr": psnr}}, clip, 1.5, 2.5, 1))
    found = read_cell(tmp_path, about, shapes, lambda cell: cell.not_finite == 1)
    np.testing.assert_array_equal(found.tables["model"]["psnr"], psnr)
    np.testing.assert_array_equal(found.clip, clip)
    assert (found.seconds, found.wall, found.not_finite) == (1.5, 2.5, 1)
    assert read_cell(tmp_path, {"a": 2}, shapes, bool) is None
    with pytest.raises(DataError, match="'model/psnr' is not what these settings give"):
        read_cell(tmp_path, about, shapes | {"model/psnr": (3, 2)}, bool)


def test_a_folder_is_gone_on_with_when_it_holds_the_same_sweep_and_else_only_when_asked(tmp_path):
    asked, out = {"grid": [1], "seed": 0}, tmp_path / "out"
    assert check_results(out, asked, resume=False, overwrite=False)
    assert check_results(out, asked, resume=True, overwrite=False)  # so that a first start may say --resume as well
    (out / "cells").mkdir(parents=True)  # of one that was stopped
    assert check_results(out, asked, resume=False, overwrite=False)
    begin(out, asked, overwrite=False)
    assert [str(p.relative_to(out)) for p in sorted(out.rglob("*"))] == ["cells", f"cells/{ASKED}"]
    assert not check_results(out, asked, resume=False, overwrite=False)
    with pytest.raises(UserError, match=r"other settings \(grid\)"):
        check_results(out, asked | {"grid": [1, 2]}, resume=False, overwrite=False)
    assert not check_results(out, asked | {"grid": [1, 2]}, resume=True, overwrite=False)
    assert check_results(out, asked | {"grid": [1, 2]}, resume=False, overwrite=True)
    with pytest.raises(UserError, match="give one of them"):
        check_results(out, asked, resume=True, overwrite=True)
    for content in ("", "[]", "{}"):
        (out / "cells" / ASKED).write_text(content)
        with pytest.raises(UserError, match="cannot be read"):
            check_results(out, asked, resume=False, overwrite=False)
    (out / "cells" / ASKED).rename(out / "cells" / "mine")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty"):
            check_results(out, asked, resume=resume, overwrite=False)
