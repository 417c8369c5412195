"""`ahriuwu sweep-tau` from the command line: its files, going on, and a default that is written back with evidence."""

import csv
import errno
import json
import os
import shutil

import numpy as np
import pytest
import typer
from small import small_world
from worlds import moving_pictures, tiny_world

from ahriuwu_cli import cli
from ahriuwu_cli.commands import sweep_tau
from ahriuwu_cli.errors import CheckpointError, DataError
from ahriuwu_cli.evaluation import report, sweep_plots, sweep_run, sweep_verdict
from ahriuwu_cli.evaluation.cells import weights_hash
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training import checkpoint
from ahriuwu_cli.training.checkpoint import load_world, save_world, write_tau_ctx
from ahriuwu_cli.training.config_json import seal

FEW = ["--windows", "4", "--context", "4", "--horizon", "5", "--device", "cpu"]
FILES = [
    "cells", "curves.png", "gain.png", "map.png", "sweep-windows.csv", "sweep.csv", "sweep.json", "sweep.md",
    "sweep.mp4", "windows-test.json", "windows.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    store = moving_pictures(root / "data")
    save_world(tiny_world(store), root / "world")
    return root


@pytest.fixture
def world(places, tmp_path):
    """A copy that may be written to."""
    return shutil.copytree(places / "world", tmp_path / "world")


@pytest.fixture
def run(monkeypatch, capsys, places):
    """run(world, out, *options) -> (exit code, stdout, stderr), without the figures, which take most of the time."""
    for draw in ("plot_gain_by_tau", "plot_sweep_curves", "plot_gain_map"):
        monkeypatch.setattr(sweep_plots, draw, lambda _, path: path.write_bytes(b""))
    app = typer.Typer()
    app.callback()(lambda: None)
    sweep_tau.register(app)
    monkeypatch.setattr(cli, "app", app)

    def call(world, out, *options):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in ("sweep-tau", world, places / "data", "--out", out, *FEW, *options)])
        printed, err = capsys.readouterr()
        return exit_.value.code, printed, err

    return call


@pytest.fixture
def rolled(monkeypatch):
    ran, generate = [], sweep_run.generate
    monkeypatch.setattr(sweep_run, "generate", lambda *a, **k: ran.append(a[4]) or generate(*a, **k))
    return ran


@pytest.fixture(scope="module")
def result(places, tmp_path_factory):
    """A finished sweep of two K: (its folder, the object that --json printed)."""
    from typer.testing import CliRunner

    out = tmp_path_factory.mktemp("one") / "out"
    app = typer.Typer()
    app.callback()(lambda: None)
    sweep_tau.register(app)
    arguments = [places / "world", places / "data", "--out", out, *FEW, "--taus", "0,.1,.5", "--steps", "1,2", "--json"]
    done = CliRunner().invoke(app, ["sweep-tau", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return out, json.loads(done.stdout)


def test_it_writes_every_file_and_the_tables_agree(result):
    out, found = result
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert json.loads((out / "sweep.json").read_text()) == found
    assert len(found["settings"]["grid"]) == len(found["cells"]) == 6
    with open(out / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 3  # frames 1, 4 and the last, 5
    for row in rows:
        tau, k, frame = float(row["tau_ctx tau (0 clean, 1 noise)"]), int(row["steps"]), row["frame"]
        (cell,) = [c for c in found["cells"] if (c["tau_ctx"], c["steps"]) == (tau, k)]
        assert float(row["gain_db_lo"]) == cell["gain_db"][frame]["lo"]
        assert float(row["difference_db"]) == cell["difference_db"][frame]["value"]
        assert float(row["sharpness_ratio"]) == cell["sharpness_ratio"][frame]
    with open(out / "sweep-windows.csv") as file:
        windows = list(csv.DictReader(file))
    assert sum(r["split"] == "val" for r in windows) == 6 * 4 * 3
    assert sum(r["split"] == "test" for r in windows) >= 4 * 3
    page = (out / "sweep.md").read_text()
    assert "cannot be told from it" in page
    assert "## On test" in page
    assert found["settings"]["checkpoint_hash"] in page


def test_the_same_command_goes_on_and_another_is_refused_unless_resumed(places, run, rolled, tmp_path):
    out = tmp_path / "out"
    code, first, err = run(places / "world", out, "--taus", "0,.1", "--json")
    assert (code, err) == (0, "")
    rolled.clear()
    code, second, _ = run(places / "world", out, "--taus", "0,.1", "--json")
    assert code == 0
    assert rolled == []
    first, second = json.loads(first), json.loads(second)
    first.pop("timing"), second.pop("timing")
    assert first == second  # finished cells keep their frames/s
    code, printed, err = run(places / "world", out, "--taus", "0,.1,.2")
    assert (code, printed) == (2, "")
    assert "holds a sweep with other settings (grid)" in err
    code, _, err = run(places / "world", out, "--taus", "0,.1,.2", "--resume")
    assert code == 0
    assert "2 of 3 cells are there already" in err
    assert {c.tau_ctx for c in rolled[:2]} == {0.2}
    rolled.clear()
    code, _, _ = run(places / "world", out, "--taus", "0,.1,.2", "--overwrite", "--no-video")
    assert code == 0
    assert len(rolled) >= 2 * 3  # with true and with shuffled actions


@pytest.mark.parametrize("way", ["gone", "folder", "link", "text"])
def test_a_sweep_that_lost_what_it_was_asked_for_keeps_its_cells_by_resume(places, run, rolled, tmp_path, way):
    out, ask = tmp_path / "out", ("--taus", "0,.1", "--no-video")
    assert run(places / "world", out, *ask)[0] == 0
    path = out / "cells" / "asked.json"
    whole = path.read_bytes()
    path.unlink()
    if way == "folder":
        (path / "x").mkdir(parents=True)
    elif way == "link":
        path.symlink_to("nowhere")
    elif way == "text":
        path.write_text("{")
    rolled.clear()
    before = sorted(out.rglob("*"))
    code, _, err = run(places / "world", out, *ask)
    assert code == 2
    assert "settings that cannot be read): choose another --out, or give --resume to keep those finished cells" in err
    assert sorted(out.rglob("*")) == before
    assert run(places / "world", out, *ask, "--resume")[0] == 0
    assert rolled == []
    assert path.read_bytes() == whole
    assert run(places / "world", out, *ask)[0] == 0


def test_a_sweep_that_goes_on_with_other_windows_and_fails_leaves_the_results_of_before(
    places, run, tmp_path, monkeypatch
):
    out = tmp_path / "sweep"
    assert run(places / "world", out, "--taus", ".1")[0] == 0
    before = {p: p.read_bytes() for p in out.iterdir() if p.is_file()}

    def gone(*_, **__):
        raise DataError("an episode is not what was recorded")

    monkeypatch.setattr(sweep_run, "generate", gone)
    code, _, err = run(places / "world", out, "--taus", ".1", "--seed", "9", "--resume")
    assert (code, err.count("error: ")) == (3, 1)
    assert {p: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_a_folder_where_a_result_goes_is_refused_before_the_work(places, run, tmp_path, rolled):
    out = tmp_path / "sweep"
    run(places / "world", out, "--taus", ".1,.2")
    (out / "map.png").unlink()
    (out / "map.png" / "kept").mkdir(parents=True)
    before, rolled[:] = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}, []
    code, _, err = run(places / "world", out, "--taus", ".1,.2,.3", "--resume")
    assert code == 2
    assert "map.png is a folder" in err
    assert rolled == []
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_what_a_sweep_is_asked_to_leave_out_does_not_stay_of_the_one_before(places, run, tmp_path):
    out = tmp_path / "sweep"
    run(places / "world", out, "--taus", ".1,.2")
    assert {"windows-test.json", "sweep.mp4"} <= set(os.listdir(out))
    run(places / "world", out, "--taus", ".1,.2", "--resume", "--no-test", "--no-video")
    assert {"cells", *json.loads((out / "sweep.json").read_text())["files"]} == set(os.listdir(out))


@pytest.mark.parametrize("at", ["sweep.md", "gain.png", "sweep.json"])
def test_results_that_cannot_all_be_written_leave_the_former_ones(places, run, tmp_path, monkeypatch, at):
    out, made = tmp_path / "sweep", ("sweep-windows.csv", "sweep.md", "gain.png", "curves.png", "map.png", "sweep.json")
    run(places / "world", out, "--taus", ".1,.2")
    before = {name: (out / name).read_bytes() for name in made}
    sync = report.sync

    def full(path):
        if path.name.startswith(f".{at}."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    monkeypatch.setattr(report, "sync", full)
    code, _, err = run(places / "world", out, "--taus", ".1,.2,.3", "--resume")
    assert code == 1
    assert "No space left" in err
    assert {name: (out / name).read_bytes() for name in made} == before
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_a_damaged_cell_is_named_even_with_json(places, run, tmp_path):
    out = tmp_path / "out"
    _, first, _ = run(places / "world", out, "--taus", "0,.1", "--json")
    path = sorted((out / "cells").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-50])
    code, second, err = run(places / "world", out, "--taus", "0,.1", "--json")
    assert code == 0
    assert err.count("\n") == 1
    assert f"{path} is damaged" in err
    for key in ("best", "curves", "warnings", "floor"):
        assert json.loads(first)[key] == json.loads(second)[key]


def test_a_budget_stops_and_the_same_command_finishes(places, run, tmp_path):
    out, states = tmp_path / "out", []
    for _ in range(4):
        code, printed, _ = run(places / "world", out, "--taus", "0,.1", "--budget", "0.001s", "--json", "--no-video")
        assert code == 0
        states.append(json.loads(printed)["complete"])
        assert (out / "sweep.md").exists()
    assert states[0] is False
    assert states[-1] is True


def full(path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_write_back_stores_what_beats_the_default_with_its_evidence_and_touches_nothing_else(
    run, world, tmp_path, monkeypatch
):
    sure = sweep_verdict.decide

    def beaten(done, own, episodes, at):  # untrained cells differ by chance: let the best count as told apart
        best = max(done, key=lambda d: (d.cell != own, d.psnr[:, at - 1].mean()))
        gap = sweep_verdict.Interval(1.0, 0.5, 1.5)
        return sure(done, own, episodes, at) | {"tau_ctx": best.cell.tau_ctx, "changed": True, "ahead_db": gap}

    monkeypatch.setattr(sweep_verdict, "decide", beaten)
    monkeypatch.setattr(sweep_verdict, "check_on_test", lambda *_: [])
    config = world / "config.json"
    rewrite(config, json.loads(config.read_text()) | {"facts": {"git": "abc"}})
    before = {p: p.read_bytes() for p in world.rglob("*") if p.is_file()}
    old = load_world(world, "cpu")
    with monkeypatch.context() as patch:  # the disk is full once the results are to be written
        patch.setattr(report, "sync", full)
        code, _, err = run(world, tmp_path / "out", "--taus", "0,.3", "--write-back", "--json")
    assert (code, "no room" in err) == (1, True), err
    assert {p: p.read_bytes() for p in world.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "out" / "sweep.json").exists()
    code, printed, _ = run(world, tmp_path / "out", "--taus", "0,.3", "--write-back", "--json")
    assert code == 0
    found = json.loads(printed)
    assert found["write_back"]["written"]
    assert {p for p in world.rglob("*") if p.is_file()} == set(before)
    assert [p.name for p in before if p.read_bytes() != before[p]] == ["config.json"]
    new = load_world(world, "cpu")
    assert weights_hash(new) == weights_hash(old)
    assert new.generation == RolloutConfig(**{**found["settings"]["own"], "tau_ctx": 0.3})
    evidence = new.facts.pop("tau_ctx_evidence")
    assert new.facts == {"git": "abc"}
    assert evidence["manifest_hash"] == found["settings"]["manifest_hash"]
    (cell,) = [c for c in found["cells"] if c["tau_ctx"] == 0.3]
    assert evidence["gain_db"] == cell["gain_db"]["5"]
    assert evidence["ahead_of_before_db"] == {"value": 1, "lo": 0.5, "hi": 1.5}
    assert (evidence["tau_ctx_before"], evidence["tau_ctx"], evidence["tried"]) == (0, 0.3, [0, 0.3])
    assert evidence["checkpoint_hash"] == weights_hash(new)
    assert evidence["test"]["manifest_hash"] == found["test"]["manifest_hash"]
    code, _, err = run(world, tmp_path / "out", "--taus", "0,.3", "--json")
    assert (code, err) == (0, "")  # the same command still fits: the weights are the same


def test_write_back_leaves_a_default_that_cannot_be_told_from_the_best(run, world, tmp_path):
    before = (world / "config.json").read_bytes()
    code, printed, _ = run(world, tmp_path / "out", "--taus", "0,.001", "--write-back")
    assert code == 0
    assert "default left as it is: tau_ctx 0" in printed
    assert (world / "config.json").read_bytes() == before


def test_write_back_measures_the_default_too_and_waits_for_the_whole_grid(run, world, tmp_path):
    code, printed, _ = run(world, tmp_path / "a", "--taus", ".1,.5", "--write-back", "--json")
    assert code == 0
    assert [c["tau_ctx"] for c in json.loads(printed)["cells"]] == [0, 0.1, 0.5]
    before = (world / "config.json").read_bytes()
    code, printed, _ = run(world, tmp_path / "b", "--taus", ".1,.5", "--write-back", "--budget", "0.001s")
    assert code == 0
    assert "nothing was written back: the grid is not finished" in printed
    assert (world / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "1", "--write-back"], "add its --steps, --sampler, --ctx-mode and --ctx-label to the grid"),
        (["--ctx-label", "clear"], "unknown --ctx-label 'clear': did you mean 'clean'?"),
        (["--ctx-mode", "stop,renoised"], "did you mean 'renoise'?"),
        (["--sampler", "euler,"], "unknown --sampler ''"),
        (["--sampler", "euler,euler"], "--sampler 'euler,euler' names a value twice"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--windows", "1"], "--no-delta"),
    ],
)
def test_a_bad_grid_is_one_sentence_and_leaves_nothing_behind(places, run, tmp_path, options, sentence):
    code, printed, err = run(places / "world", tmp_path / "out", *options)
    assert (code, printed) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def rewrite(config, document):
    """A config.json with other contents and the hash that fits them."""
    config.write_text(json.dumps(seal(document)))


def test_a_checkpoint_without_a_context_label_was_honest_and_nothing_else_is_defaulted(world):
    config = world / "config.json"
    whole = json.loads(config.read_text())
    assert whole["generation"].pop("ctx_label") == "honest"
    rewrite(config, whole)
    assert load_world(world, "cpu").generation.ctx_label == "honest"
    for change in ({"tau_ctx": None}, {"steps": None}, {"ctx_lable": "clean"}):
        stored = {k: v for k, v in (whole["generation"] | change).items() if v is not None}
        rewrite(config, whole | {"generation": stored})
        with pytest.raises(CheckpointError, match=next(iter(change))):
            load_world(world, "cpu")
    rewrite(config, whole | {"generation": None})
    with pytest.raises(CheckpointError, match="wrong type"):
        load_world(world, "cpu")


def test_a_failed_write_back_leaves_the_checkpoint_whole(world, monkeypatch):
    before, loaded = (world / "config.json").read_bytes(), load_world(world, "cpu")
    with pytest.raises(ValueError, match="JSON"):
        write_tau_ctx(loaded, 0.2, {"gain": float("nan")})

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("ahriuwu_cli.disk.os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_tau_ctx(loaded, 0.2, {})
    assert (world / "config.json").read_bytes() == before
    assert sorted(p.name for p in world.iterdir()) == ["config.json", "model.safetensors", "tokenizer"]


@pytest.mark.parametrize("when", ["before", "while it is written"])
def test_a_world_that_took_the_place_of_the_measured_one_keeps_its_own_tau_ctx(world, monkeypatch, when):
    loaded, other = load_world(world, "cpu"), small_world(seed=5)
    written = checkpoint.write_inside

    def late(*arguments):
        save_world(other, world)
        written(*arguments)

    if when == "before":
        save_world(other, world)
    else:
        monkeypatch.setattr(checkpoint, "write_inside", late)
    with pytest.raises(CheckpointError, match="measure again"):
        write_tau_ctx(loaded, 0.2, {})
    assert load_world(world, "cpu").generation == other.generation
    assert sorted(p.name for p in world.iterdir()) == ["config.json", "model.safetensors", "tokenizer"]


@pytest.mark.parametrize("shape", ["one tau", "one frame", "all nan"])
def test_the_figures_can_be_drawn_of_every_sweep(result, tmp_path, shape):
    from PIL import Image

    found = json.loads(json.dumps(result[1]))
    if shape == "one tau":
        found["cells"] = found["cells"][:1]
    if shape == "one frame":
        found |= {"reported": [1], "compared_at": 1, "curves": {k: v[:1] for k, v in found["curves"].items()}}
    for cell in found["cells"]:
        if shape == "one frame":
            cell["curve"] = {name: values[:1] for name, values in cell["curve"].items()}
            cell |= {"drift_db_per_frame": None, "action_delta_db": None}
        if shape == "all nan":
            found["best"] = None
            nothing = {"value": None, "lo": None, "hi": None}
            cell["curve"] = {name: [nothing] * 5 for name in cell["curve"]}
            cell |= {m: dict.fromkeys(cell[m], nothing) for m in ("gain_db", "difference_db")}
            cell |= {m: dict.fromkeys(cell[m]) for m in ("psnr", "motion_ratio", "sharpness_ratio")}
    for draw in (sweep_plots.plot_gain_by_tau, sweep_plots.plot_sweep_curves, sweep_plots.plot_gain_map):
        draw(found, tmp_path / "a.png")
        assert np.asarray(Image.open(tmp_path / "a.png")).std() > 5


def test_a_figure_is_the_same_bytes_every_time(result, tmp_path):
    for name in "ab":
        sweep_plots.plot_gain_map(result[1], tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
