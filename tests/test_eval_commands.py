"""`ahriuwu eval` and `ahriuwu sweep-tau` from the command line: files, JSON, exit codes, bad input."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import typer
from worlds import NO_ACTIONS, moving_pictures, tiny_world

from ahriuwu_cli import cli
from ahriuwu_cli.commands import eval as eval_command
from ahriuwu_cli.commands import sweep_tau
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation import looks
from ahriuwu_cli.evaluation.cell_check import check_scores
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.training.checkpoint import load_world, save_world

QUICK = ["--windows", "4", "--context", "4", "--horizon", "5", "--device", "cpu", "--looks", "none"]
FEW = ["--windows", "4", "--context", "4", "--horizon", "5", "--device", "cpu"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("eval")
    store = moving_pictures(root / "data")
    save_world(tiny_world(store), root / "world")
    return root


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr)."""
    app = typer.Typer()
    app.callback()(lambda: None)
    eval_command.register(app)
    sweep_tau.register(app)
    monkeypatch.setattr(cli, "app", app)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return call


def test_eval_writes_its_files_and_prints_one_json_object(places, run, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = run("eval", places / "world", places / "data", "--out", out, *FEW, "--report", "--json")
    result = json.loads(printed)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "curve.png",
        "eval.csv",
        "eval.json",
        "levels.png",
        "levels_map.png",
        "report.html",
        "windows.csv",
        "windows.json",
    ]
    assert json.loads((out / "eval.json").read_text()) == result
    assert result["settings"]["split"] == "test"
    with open(out / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["frame"] for r in rows] == ["1", "4", "5"]
    assert float(rows[1]["gain_db"]) == result["horizons"]["4"]["gain_db"]["value"]
    assert float(rows[1]["delta_shuffled_db_lo"]) == result["action_delta_db"]["shuffled"]["4"]["lo"]
    assert rows[0]["delta_shuffled_db"] == ""
    with open(out / "windows.csv") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_eval_prints_a_table_for_people(places, run, tmp_path):
    code, printed, err = run("eval", places / "world", places / "data", "--out", tmp_path / "out", *QUICK)
    assert code == 0
    assert "4 windows of" in printed
    assert "tau (0 clean, 1 noise) 0" in printed
    assert "action delta dB against shuffled actions" in printed
    assert "Traceback" not in err


def test_one_window_is_refused_with_a_way_that_is_open(places, run, tmp_path):
    store = EpisodeStore.open(places / "data")
    make_manifest(store, "test", 4, 5, 1, 0).save(tmp_path / "one.json")
    given = ("--manifest", tmp_path / "one.json", "--looks", "none", "--out", tmp_path / "a")
    for command, ask, way in (
        ("eval", ("--windows", 1, "--looks", "none", "--out", tmp_path / "a"), ""),
        ("eval", given, ""),
        ("sweep-tau", ("--manifest", tmp_path / "one.json", "--out", tmp_path / "a"), ", or --no-delta"),
    ):
        code, _, err = run(command, places / "world", places / "data", *ask)
        assert code == 2, err
        advice = "give --windows 2 or more, or such a --manifest"
        assert err == f"error: 1 window leaves nobody to borrow actions from: {advice}{way}\n"


def test_a_stored_manifest_gives_the_same_numbers_again(places, run, tmp_path):
    _, first, _ = run("eval", places / "world", places / "data", "--out", tmp_path / "a", *QUICK, "--json")
    windows = tmp_path / "a" / "windows.json"
    code, second, _ = run(
        "eval", places / "world", places / "data", "--out", tmp_path / "b", "--manifest", windows, "--json"
    )
    assert code == 0
    assert json.loads(first)["horizons"] == json.loads(second)["horizons"]
    assert (tmp_path / "b" / "windows.json").read_bytes() == windows.read_bytes()
    code, _, err = run(
        "eval", places / "world", places / "data", "--out", tmp_path / "c", "--manifest", windows, "--horizon", 7
    )
    assert code == 2
    assert "--horizon 7 contradicts" in err


def test_results_are_replaced_only_when_asked(places, run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    code, _, err = run("eval", places / "world", places / "data", "--out", out, *QUICK)
    assert code == 2
    assert "--overwrite" in err
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    code, _, _ = run("eval", places / "world", places / "data", "--out", out, *QUICK, "--overwrite")
    assert code == 0
    assert not (out / "mine.txt").exists()
    assert (out / "eval.json").exists()


def test_options_change_the_generation(places, run, tmp_path):
    options = ["--tau-ctx", "0.3", "--sampler", "euler", "--steps", "3", "--ctx-mode", "renoise"]
    _, printed, _ = run("eval", places / "world", places / "data", "--out", tmp_path / "o", *QUICK, *options, "--json")
    found = json.loads(printed)["settings"]["generation"]
    assert found == {"steps": 3, "sampler": "euler", "tau_ctx": 0.3, "ctx_mode": "renoise", "ctx_label": "honest"}


def test_a_rollout_that_is_not_finite_exits_1_unless_allowed(places, run, tmp_path, monkeypatch):
    from ahriuwu_cli.models.dynamics import Dynamics

    extend = Dynamics.extend

    def broken(self, *arguments, **named):
        return extend(self, *arguments, **named) * float("nan")

    monkeypatch.setattr(Dynamics, "extend", broken)
    code, printed, _ = run("eval", places / "world", places / "data", "--out", tmp_path / "o", *QUICK, "--json")
    assert code == 1
    assert json.loads(printed)["status"] == "nan"
    assert json.loads((tmp_path / "o" / "eval.json").read_text())["not_finite_frames"]["model"] == 4 * 5
    code, printed, _ = run("eval", places / "world", places / "data", "--out", tmp_path / "p", *QUICK, "--allow-nan")
    assert code == 0
    assert "FAILED" in printed
    code, _, _ = run("sweep-tau", places / "world", places / "data", "--out", tmp_path / "q", *FEW, "--taus", "0,.1")
    assert code == 1


def test_sweep_writes_its_files_and_prints_one_json_object(places, run, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = run(
        "sweep-tau",
        places / "world",
        places / "data",
        "--out",
        out,
        *FEW,
        "--taus",
        "0,.1,.5",
        "--steps",
        "1,2",
        "--json",
    )
    assert code == 0
    names = {"cells", "curves.png", "gain.png", "map.png", "sweep.csv", "sweep-windows.csv", "sweep.json", "sweep.md"}
    names |= {"sweep.mp4", "windows.json", "windows-test.json"}
    assert {p.name for p in out.iterdir()} == names
    result = json.loads(printed)
    assert result["settings"]["split"] == "val"
    assert len(result["cells"]) == 6
    with open(out / "sweep.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * len(result["reported"])  # a row a cell and horizon
    assert {float(r["tau_ctx tau (0 clean, 1 noise)"]) for r in rows} == {0, 0.1, 0.5}

    from ahriuwu_cli.data.video import read_video

    frames, fps = read_video(out / "sweep.mp4")
    assert (len(frames), fps) == (9, 10.0)


def test_sweep_prints_a_table_and_can_leave_out_the_video(places, run, tmp_path):
    out = tmp_path / "out"
    code, printed, _ = run(
        "sweep-tau", places / "world", places / "data", "--out", out, *FEW, "--taus", "0,.1", "--no-video", "--delta"
    )
    assert code == 0
    assert not (out / "sweep.mp4").exists()
    assert "best at frame 5 (*): tau" in printed


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["eval", "nowhere", "DATA"], 4, "no checkpoint at nowhere"),
        (["eval", "WORLD", "nowhere"], 3, "nowhere is not a folder"),
        (["eval", "DATA", "DATA"], 4, "is not a checkpoint"),
        (["eval", "WORLD", "WORLD"], 3, "is not a dataset"),
        (["eval", "WORLD", "MUTE"], 3, "has the actions [none], but the world was trained with [LEFT, RIGHT]"),
        (["eval", "WORLD", "DATA", "--windows", "40000"], 3, "40000 windows of 24 frames were asked for"),
        (["eval", "WORLD", "DATA", "--horizon", "500"], 3, "no episode is long enough"),
        (["eval", "WORLD", "DATA", "--split", "tset"], 2, "did you mean 'test'?"),
        (["eval", "WORLD", "DATA", "--tau-ctx", "1"], 2, "--tau-ctx 1.0 is not in [0, 1)"),
        (["eval", "WORLD", "DATA", "--steps", "3"], 2, "--steps 3 does not fit the shortcut sampler"),
        (["eval", "WORLD", "DATA", "--context", "0"], 2, "--context must be at least 1, got 0"),
        (["eval", "WORLD", "DATA", "--seed", "-1"], 2, "--seed must be at least 0, got -1"),
        (["eval", "WORLD", "DATA", "--noise-seeds", "0"], 2, "--noise-seeds must be at least 1"),
        (["eval", "WORLD", "DATA", "--manifest", "nowhere.json"], 3, "nowhere.json does not exist"),
        (["eval", "WORLD", "DATA", "--device", "tpu9"], 2, "device 'tpu9' cannot be used"),
        (["eval", "WORLD", "DATA", "--device", "xpu"], 2, "): try --device cpu"),
        (["sweep-tau", "WORLD", "DATA", "--taus", "0,x"], 2, "--taus 'x' is not a number"),
        (["sweep-tau", "WORLD", "DATA", "--taus", ""], 2, "nothing after '--taus'"),
        (["sweep-tau", "WORLD", "DATA", "--taus", "0,nan"], 2, "nan is not in [0, 1)"),
        (["sweep-tau", "WORLD", "DATA", "--steps", "1.5"], 2, "--steps '1.5' is not a whole number"),
        (["sweep-tau", "WORLD", "DATA", "--steps", "3"], 2, "--steps 3 does not fit"),
        (["sweep-tau", "WORLD", "DATA", "--budget", "soon"], 2, "--budget 'soon' is not a time"),
    ],
)
def test_bad_input_is_one_sentence_with_its_exit_code_and_leaves_nothing_behind(
    places, run, tmp_path, arguments, code, sentence
):
    if not (places / "mute").exists():
        moving_pictures(places / "mute", space=NO_ACTIONS)
    names = {"WORLD": places / "world", "DATA": places / "data", "MUTE": places / "mute"}
    few = [] if {"--windows", "--horizon"} & set(arguments) else ["--windows", "2", "--horizon", "3"]
    found, printed, err = run(*[names.get(a, a) for a in arguments], *few, "--out", tmp_path / "out")
    assert (found, printed) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_an_out_below_a_file_is_refused(places, run, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "deeper"):
        code, _, err = run("eval", places / "world", places / "data", "--out", out, *QUICK)
        assert code == 2
        assert "is a file" in err


def test_importing_the_commands_imports_nothing_heavy():
    script = (
        "import sys; from ahriuwu_cli.commands import eval, sweep_tau; "
        "print([m for m in ('torch', 'numpy', 'matplotlib', 'tqdm') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_looks_are_chosen_by_name_and_one_that_cannot_be_taken_says_why(places, run, tmp_path):
    looks = ("--looks", "spread,distances")
    code, out, err = run("eval", places / "world", places / "data", "--out", tmp_path / "e", *FEW, *looks, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert {"spread", "distances"} <= set(result)
    assert not {"step_sizes", "consistency", "levels"} & set(result)
    assert "horizon of at least 16" in result["distances"]["skipped"]
    assert set(result["spread"]["horizons"]) == set(result["horizons"])
    assert set(result["timing"]["looks"]) == {"spread", "distances"}
    code, printed, _ = run("eval", places / "world", places / "data", "--out", tmp_path / "f", *FEW, *looks)
    assert "spread ratio over" in printed
    assert "distances: skipped, distances between clips need a horizon" in printed
    code, _, err = run(
        "eval", places / "world", places / "data", "--out", tmp_path / "g", *FEW, "--looks", "none,spread"
    )
    assert code == 2
    assert "'none' stands alone" in err
    code, _, err = run("eval", places / "world", places / "data", "--out", tmp_path / "g", *FEW, "--looks", "spred")
    assert code == 2
    assert "did you mean 'spread'?" in err
    assert not (tmp_path / "g").exists()


def test_a_clean_label_on_noisy_context_changes_the_scores_and_is_written_down(places, run, tmp_path):
    results = {}
    for label in ("honest", "clean"):
        asked = (*QUICK, "--tau-ctx", "0.5", "--ctx-label", label, "--json")
        code, printed, _ = run("eval", places / "world", places / "data", "--out", tmp_path / label, *asked)
        assert code == 0
        results[label] = json.loads(printed)
        assert results[label]["settings"]["generation"]["ctx_label"] == label
    assert results["honest"]["curves"]["psnr"] != results["clean"]["curves"]["psnr"]
    code, _, err = run(
        "eval", places / "world", places / "data", "--out", tmp_path / "x", *QUICK, "--ctx-label", "cleen"
    )
    assert code == 2
    assert "clean" in err


WRONG_WEIGHTS = [
    (("--features-weights", "{out}/none"), 4, "EfficientNet-Lite0"),
    (("--features-weights", "{world}/model.safetensors"), 4, "other tensors"),
    (("--lpips-weights", "{world}/model.safetensors"), 2, "belong together"),
    (("--fvd-weights", "{world}/model.safetensors", "--fvd-hash", "12"), 2, "sha256"),
    (("--fvd-weights", "{world}/model.safetensors", "--fvd-hash", "0" * 64), 4, "has the sha256"),
    (("--lpips-weights", "{world}/model.safetensors", "--lpips-hash", "0" * 64), 4, "has the sha256"),
]


@pytest.mark.parametrize(("options", "code", "words"), WRONG_WEIGHTS)
def test_wrong_weights_are_refused_before_anything_is_generated(
    places, run, tmp_path, monkeypatch, options, code, words
):
    monkeypatch.setattr("ahriuwu_cli.evaluation.measure.generate", None)
    names = {"world": places / "world", "out": tmp_path}
    asked = [o.format(**names) for o in options]
    found, _, err = run("eval", places / "world", places / "data", "--out", tmp_path / "x", *QUICK, *asked)
    assert found == code
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_closer_look_at_what_is_not_finite_fails_the_command(places, run, tmp_path):
    world = load_world(places / "world", "cpu")
    world.dynamics.level.d_table.data[0] = 3e38  # d = 1, which this world's own rollouts never ask for
    save_world(world, tmp_path / "broken")
    words = ("eval", tmp_path / "broken", places / "data", "--out", tmp_path / "out", *FEW)
    code, out, _ = run(*words, "--looks", "step_sizes", "--report")
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert (code, result["status"]) == (1, "nan")
    assert not any(result["not_finite_frames"].values())
    assert result["not_finite_looks"]["step_sizes"] > 0
    assert "FAILED: frames that are not finite" in out
    assert "step sizes" in (tmp_path / "out" / "report.html").read_text().split("This run failed")[1][:300]
    check_scores(result)


def test_closer_looks_are_of_what_was_asked_for(places, run, tmp_path):
    words = ("eval", places / "world", places / "data", "--out", tmp_path / "out", *FEW)
    assert run(*words, "--looks", "levels,consistency", "--tau-ctx", "0.3")[0] == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [result[name]["tau_ctx"] for name in ("levels", "consistency")] == [0.3, 0.3]


@pytest.mark.parametrize(("most", "room", "clips"), [(18, 1 << 40, 18), (512, 1 << 40, 24), (512, 1, 16)])
def test_distances_are_of_so_many_windows_at_most(places, monkeypatch, most, room, clips):
    store, world = EpisodeStore.open(places / "data"), load_world(places / "world", "cpu")
    monkeypatch.setattr(looks, "DISTANCE_WINDOWS", most)
    monkeypatch.setattr(looks, "MOST_BYTES", room)
    monkeypatch.setattr(looks, "reference_clips", lambda store, count, **_: (np.zeros(count), None))
    monkeypatch.setattr(looks, "latent_distances", lambda world, made, frames, **_: {"clips": len(made)})
    manifest = make_manifest(store, "test", 2, 16, 24, seed=0)
    found = looks.LOOKS["distances"](world, store, EvaluationConfig(), world.generation, manifest)
    assert found == {"clips": clips}
