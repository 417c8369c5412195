"""A plan is read strictly, shared without gaps or overlaps, and its cells are finished once and never lost."""

import inspect
import itertools
import json
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from worlds import NO_ACTIONS, SPACE, moving_pictures, tiny_world

from ahriuwu_cli import cli
from ahriuwu_cli.commands import eval as eval_command
from ahriuwu_cli.commands import eval_plan
from ahriuwu_cli.data.documents import document_hash
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.tensors import read_arrays
from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation import cells as cells_module
from ahriuwu_cli.evaluation import score_files
from ahriuwu_cli.evaluation.cells import FOLDER, read_cell, run_plan, weights_hash
from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, evaluate, measure_share, ready
from ahriuwu_cli.evaluation.merge import read_cells
from ahriuwu_cli.evaluation.plan import read_plan
from ahriuwu_cli.evaluation.protocol import make_manifest
from ahriuwu_cli.evaluation.score_files import flat, write_scores
from ahriuwu_cli.evaluation.shards import Shards, choose_device, find_shards, read_part, shard_windows
from ahriuwu_cli.evaluation.sweep_cells import note_asked
from ahriuwu_cli.ranges import as_number
from ahriuwu_cli.training.checkpoint import load_world, save_world

DEFAULTS = '[defaults]\ndataset = "data"\nwindows = 5\ncontext = 3\nhorizon = 4\n'
ONE = DEFAULTS + '[[cell]]\ncheckpoint = "a"\n'


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    store = moving_pictures(root / "data")
    for seed, name in enumerate("ab"):
        save_world(tiny_world(store, seed), root / name)
    return root


@pytest.fixture
def plan(places):
    """plan(text, suffix) -> the path of a plan beside the worlds and the data."""
    number = itertools.count()

    def write(text, suffix=".toml"):
        path = places / f"plan-{next(number)}{suffix}"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of `ahriuwu eval ...`, outside torchrun and SLURM."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
    app.callback()(lambda: None)
    eval_plan.register(app, "eval", eval_command.evaluate)
    monkeypatch.setattr(cli, "app", app)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["eval", *[str(a) for a in arguments]])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return call


def without_times(path):
    document = json.loads(path.read_text())
    document["result"].pop("timing")
    document.pop("checksum")
    return document


def test_a_cell_has_the_defaults_and_its_own_settings_over_them_with_paths_beside_the_plan(plan, places):
    text = (
        DEFAULTS + 'tau_ctx = 0\n[[cell]]\ncheckpoint = "a"\n[[cell]]\ncheckpoint = "b"\ntau_ctx = 0.3\nwindows = 7\n'
    )
    a, b = read_plan(plan(text))
    assert (a.checkpoint, a.dataset, a.names) == (places / "a", places / "data", ("a", "data"))
    assert (a.tau_ctx, a.windows, a.steps) == (0.0, 5, None)
    assert (b.checkpoint, b.tau_ctx, b.windows, b.horizon) == (places / "b", 0.3, 7, 4)


def test_minus_zero_is_zero_as_a_cells_name_is_made_of_its_digits(plan):
    (cell,) = read_plan(plan(CELL + "tau_ctx = -0.0\n"))
    assert str(cell.tau_ctx) == "0.0"
    assert str(as_number("-0")) == "0.0"


def test_a_cell_with_a_number_of_many_digits_is_found_again_and_merged(plan, run, tmp_path):
    path = plan(ONE.replace("[[cell]]", "[[cell]]\ntau_ctx = 0.08333333333333333", 1))
    for state in ("1 done, 0 were there", "0 done, 1 were there"):
        code, out, err = run("plan", path, "--out", tmp_path / "cells")
        assert code == 0, err
        assert state in out
    (cell,) = (tmp_path / "cells").glob("**/????????????????.json")
    assert json.loads(cell.read_text())["result"]["settings"]["generation"]["tau_ctx"] == 1 / 12
    assert run("merge", tmp_path / "cells")[0] == 0


def test_json_lines_say_the_same_as_toml(plan):
    lines = ['{"defaults": {"dataset": "data", "windows": 5, "context": 3, "horizon": 4}}', "", '{"checkpoint": "a"}']
    assert read_plan(plan("\n".join(lines), ".jsonl")) == read_plan(plan(ONE))


CELL = '[[cell]]\ncheckpoint = "a"\ndataset = "data"\n'


@pytest.mark.parametrize(
    ("text", "suffix", "error", "sentence"),
    [
        ("[[cell]\n", ".toml", UserError, "is not TOML"),
        (b"\xff\xfe", ".toml", UserError, "cannot be read as text"),
        ("", ".toml", UserError, "has no cell: add one"),
        ("\n\n", ".jsonl", UserError, "has no cell: add one"),
        (CELL, ".txt", UserError, "is no plan by its name"),
        ("[[cells]]\n", ".toml", UserError, "unknown entry 'cells': did you mean 'cell'?"),
        ('cell = "a"\n', ".toml", UserError, "begin every cell with [[cell]]"),
        ("defaults = 3\n" + CELL, ".toml", UserError, "defaults is 3, not a table"),
        (CELL + "tau_ctxt = 0.1\n", ".toml", UserError, "unknown key 'tau_ctxt': did you mean 'tau_ctx'?"),
        ("[defaults]\nstepz = 1\n" + CELL, ".toml", UserError, "unknown key 'stepz': did you mean 'steps'?"),
        (CELL + "steps = 4.0\n", ".toml", UserError, "cell 1 of PLAN: steps is 4.0, not a whole number"),
        (CELL + "steps = true\n", ".toml", UserError, "steps is True, not a whole number"),
        (CELL + 'tau_ctx = "0.1"\n', ".toml", UserError, "tau_ctx is '0.1', not a number"),
        (CELL + "tau_ctx = nan\n", ".toml", UserError, "tau_ctx is nan, not a finite number"),
        (CELL + "sampler = 1\n", ".toml", UserError, "sampler is 1, not text"),
        (CELL + CELL, ".toml", UserError, "cell 2 of PLAN repeats cell 1 of PLAN"),
        (
            CELL + "tau_ctx = 0\n" + CELL + "tau_ctx = -0.0\n",
            ".toml",
            UserError,
            "cell 2 of PLAN repeats cell 1 of PLAN",
        ),
        ('[[cell]]\ncheckpoint = "a"\n', ".toml", UserError, "cell 1 of PLAN names no dataset"),
        (CELL + 'manifest = "w.json"\nsplit = "test"\n', ".toml", UserError, "which has its own split"),
        (CELL.replace('"a"', '"none"'), ".toml", CheckpointError, "cell 1 of PLAN: the checkpoint"),
        (CELL.replace('"data"', '"none"'), ".toml", DataError, "cell 1 of PLAN: the dataset"),
        (CELL + 'manifest = "none.json"\n', ".toml", DataError, "cell 1 of PLAN: the manifest"),
        ('{"checkpoint": "a"\n', ".jsonl", UserError, "line 1 of PLAN is not JSON"),
        ('{"steps": 1, "steps": 2}\n', ".jsonl", UserError, "a key stands twice in it"),
        ("[1]\n", ".jsonl", UserError, "not an object of settings"),
        ('{"checkpoint": "a", "dataset": "data"}\n{"defaults": {}}\n', ".jsonl", UserError, "must be the first line"),
        (("a." * 60 + '"\u2028".') * 40 + "a = 1\n", ".toml", UserError, "a line has more than 64 dots"),
        ("[" * 100_000, ".jsonl", UserError, "line 1 of PLAN is not JSON"),
    ],
)
def test_a_bad_plan_is_refused_in_one_sentence_that_names_the_place(plan, text, suffix, error, sentence):
    path = plan(text, suffix)
    with pytest.raises(UserError) as refused:
        read_plan(path)
    assert type(refused.value) is error
    assert sentence.replace("PLAN", path.name) in str(refused.value)


def test_a_plan_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UserError, match="there is no plan at"):
        read_plan(tmp_path / "none.toml")


def test_shards_of_cells_cover_every_cell_once():
    for count, of in itertools.product((0, 1, 5, 8), (1, 2, 3, 9)):
        shares = [find_shards(f"{i}/{of}", "windows", {}).of_cells(count) for i in range(1, of + 1)]
        assert sorted(itertools.chain(*shares)) == list(range(count))


def test_shards_of_windows_are_runs_that_cover_every_window_once_and_differ_by_one_at_most():
    for count, world_size in itertools.product((1, 2, 5, 64), (1, 2, 3, 7)):
        manifest = SimpleNamespace(windows=list(range(count)))
        shares = [shard_windows(manifest, rank, world_size) for rank in range(world_size)]
        assert list(itertools.chain(*shares)) == list(range(count))
        sizes = [len(s) for s in shares if s]
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == min(count, world_size)


SLURM = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}


def test_the_option_comes_before_slurm_and_torchrun_shares_what_is_left():
    assert find_shards(None, "windows", {}) == Shards()
    assert find_shards(None, "windows", SLURM).cells == (2, 4)
    assert find_shards("1/2", "windows", SLURM).cells == (0, 2)
    both = find_shards(None, "windows", SLURM | TORCHRUN)
    assert (both.cells, both.windows, both.local_rank) == ((2, 4), (2, 3), 1)
    whole = find_shards(None, "cells", TORCHRUN)
    assert (whole.cells, whole.windows) == ((2, 3), (0, 1))
    shares = [
        find_shards(f"{i}/2", "cells", TORCHRUN | {"RANK": str(r)}).of_cells(17) for i in (1, 2) for r in range(3)
    ]
    assert sorted(itertools.chain(*shares)) == list(range(17))
    strided = SLURM | {"SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_STEP": "4"}
    assert find_shards(None, "windows", strided | {"SLURM_ARRAY_TASK_MAX": "12"}).cells == (2, 4)


@pytest.mark.parametrize(
    ("shard", "share", "environment", "sentence"),
    [
        ("0/2", "windows", {}, "--shard '0/2' is not a share"),
        ("3/2", "windows", {}, "--shard '3/2' is not a share"),
        ("1", "windows", {}, "write 1/4 to 4/4"),
        (None, "window", {}, "did you mean 'windows'?"),
        (None, "windows", SLURM | {"SLURM_ARRAY_TASK_ID": "9"}, "array has gaps"),
        (None, "windows", SLURM | {"SLURM_ARRAY_TASK_MAX": "11"}, "array has gaps"),
        (None, "windows", {"SLURM_ARRAY_TASK_ID": "1"}, "but not SLURM_ARRAY_TASK_COUNT"),
        (None, "windows", SLURM | {"SLURM_ARRAY_TASK_ID": "x"}, "'x', not a whole number"),
        (None, "windows", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_a_share_that_cannot_be_is_refused(shard, share, environment, sentence):
    with pytest.raises(UserError) as refused:
        find_shards(shard, share, environment)
    assert sentence in str(refused.value)


def test_a_share_of_processes_that_are_not_there_is_refused(plan, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["eval", "plan", str(plan(ONE)), "--out", str(tmp_path / "o"), "--share", "cells"])
    assert end.value.code == 2
    assert "--share is about torchrun's processes" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_local_rank_chooses_the_gpu_where_there_are_gpus(monkeypatch):
    local = Shards(local_rank=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", local) == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(d, local) for d in ("auto", "cuda", "cpu", "cuda:0")] == ["cuda:1", "cuda:1", "cpu", "cuda:0"]
    assert choose_device("auto", Shards()) == "auto"
    with pytest.raises(UserError, match="this box has 2 GPU"):
        choose_device("auto", Shards(local_rank=2))


def test_a_cell_holds_what_evaluate_finds(plan, places, tmp_path):
    rows = run_plan(read_plan(plan(ONE + "seed = 3\n")), tmp_path, Shards(), device="cpu")
    found = read_cell(tmp_path / FOLDER / f"{rows[0]['cell']}.json")["result"]
    world = load_world(places / "a", "cpu")
    config = EvaluationConfig(windows=5, context=3, horizon=4, seed=3)
    wanted = evaluate(world, EpisodeStore.open(places / "data"), config, world.generation)
    for result in (found, wanted):
        result.pop("timing")
    assert found == wanted


def test_the_folder_of_a_sweep_is_no_plan_s_and_its_merge_does_not_call_it_damaged(plan, tmp_path):
    (tmp_path / "out" / "cells").mkdir(parents=True)
    note_asked(tmp_path / "out", {"grid": [0.1]})
    for name in ("asked.json", "0123456789abcdef.safetensors"):
        with pytest.raises(UserError, match="out holds a sweep: choose another --out"):
            run_plan(read_plan(plan(ONE)), tmp_path / "out", Shards(), device="cpu")
        with pytest.raises(DataError, match="out holds a sweep, not cells of a plan"):
            read_cells(tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").rglob("*")] == ["cells", name]
        (tmp_path / "out" / "cells" / name).unlink()
        (tmp_path / "out" / "cells" / "0123456789abcdef.safetensors").write_bytes(b"")  # a cell alone tells as well


def test_processes_that_share_windows_write_the_cell_that_one_process_writes(plan, tmp_path):
    cells = read_plan(plan(ONE + "noise_seeds = 2\n"))
    (one,) = run_plan(cells, tmp_path / "1", Shards(), device="cpu")
    alone = without_times(tmp_path / "1" / FOLDER / f"{one['cell']}.json")
    for world_size, order in ((2, (1, 0)), (3, (0, 2, 1)), (9, range(9))):  # 9 processes for 5 windows
        out = tmp_path / str(world_size)
        states = [run_plan(cells, out, Shards(windows=(rank, world_size)), device="cpu")[0]["state"] for rank in order]
        last_with_work = min(world_size, 5) - 1
        assert states[:last_with_work] == ["part"] * last_with_work
        assert states[last_with_work] == "done"
        assert [p.name for p in (out / FOLDER).iterdir()] == [f"{one['cell']}.json"]
        joined = without_times(out / FOLDER / f"{one['cell']}.json")
        assert joined["identity"] == alone["identity"]
        for h, row in joined["result"]["horizons"].items():
            for name in ("psnr", "gain_db", "floor", "ceiling"):
                for end in ("value", "lo", "hi"):
                    assert row[name][end] == pytest.approx(alone["result"]["horizons"][h][name][end], abs=1e-3)
        for deltas in ("action_delta_db", "action_delta_moving_db"):
            for control in ("shuffled", "random"):
                for h, value in joined["result"][deltas][control].items():
                    assert value["value"] == pytest.approx(alone["result"][deltas][control][h]["value"], abs=1e-3)
        assert joined["result"]["n"] == alone["result"]["n"]


def test_a_part_that_is_there_is_not_measured_again_and_a_damaged_one_is(plan, tmp_path, monkeypatch):
    cells = read_plan(plan(ONE))
    first, second = (Shards(windows=(rank, 2)) for rank in (0, 1))
    run_plan(cells, tmp_path, first, device="cpu")
    (part,) = (tmp_path / FOLDER).iterdir()
    measured = []
    real = cells_module.measure_share
    monkeypatch.setattr(cells_module, "measure_share", lambda *a: measured.append(a[-1]) or real(*a))
    run_plan(cells, tmp_path, first, device="cpu")
    assert measured == []
    part.write_bytes(part.read_bytes()[:-9])
    run_plan(cells, tmp_path, first, device="cpu")
    assert measured == [range(2)]
    assert run_plan(cells, tmp_path, second, device="cpu")[0]["state"] == "done"
    assert measured == [range(2), range(2, 5)]
    assert sorted(p.suffix for p in (tmp_path / FOLDER).iterdir()) == [".damaged", ".json"]


@pytest.mark.parametrize("spoil", ["cut", "other settings"])
def test_a_damaged_part_of_another_process_is_never_joined_and_its_owner_redoes_it(plan, tmp_path, spoil):
    cells = read_plan(plan(ONE + '[[cell]]\ncheckpoint = "b"\n'))
    folder = tmp_path / FOLDER
    first, second = (Shards(windows=(rank, 2)) for rank in (0, 1))
    a, b = (r["cell"] for r in run_plan(cells, tmp_path, first, device="cpu"))
    part, other = (folder / f"{name}.part-1-of-2.safetensors" for name in (a, b))
    part.write_bytes(part.read_bytes()[:-9] if spoil == "cut" else other.read_bytes())
    with pytest.raises(DataError, match=r"part-1-of-2.safetensors is damaged .*: run the plan again"):
        run_plan(cells[:1], tmp_path, second, device="cpu")
    assert not (folder / f"{a}.json").exists()
    assert run_plan(cells[:1], tmp_path, first, device="cpu")[0]["state"] == "done"


def _drop(arrays, facts):
    arrays.pop("model/psnr")


def _cut(arrays, facts):
    arrays["model/psnr"] = arrays["model/psnr"][:, :1]


def _score(name, value):
    def change(arrays, facts):
        arrays[name][:] = value

    return change


def _fact(**other):
    return lambda arrays, facts: facts.update(other)


def _counts(**counts):
    return _fact(not_finite=counts)


def _broken(arrays, facts):
    """Frames without a score that are not counted."""
    for name, values in arrays.items():
        if name.startswith("model/"):
            values[0] = math.nan


SPOILT = [
    _drop, _cut, _score("model/psnr", 61.0), _score("floor/psnr", -1.0), _score("model/ssim", 2.0),
    _score("truth/motion", -0.1), _score("ceiling/mse", 1.5), _score("forced_1/floor", 99.0), _fact(not_finite=[1]),
    _fact(not_finite={"model": "x"}), _fact(frames="x"), _fact(seconds=-1.0),
    _score("model/psnr", 59.0), _score("shuffled/mse", 0.9), _score("floor/psnr", 0.0), _score("model/ssim", math.nan),
    _score("floor/mse", math.nan), _score("forced_4/psnr", math.nan), _score("forced_1/psnr", 3.0),
    _score("model/motion_gt", 0.9), _score("mean_frame/ssim", math.nan), _broken, _fact(frames=7), _counts(model=5),
    _counts(model=0), _counts(model=0, shuffled=0, random=0, teacher_forced=0, other=3),
]  # fmt: skip


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_part_whose_hash_fits_but_not_its_content_is_damaged_as_well(plan, tmp_path, spoil):
    cells, said = read_plan(plan(ONE)), []
    first, second = (Shards(windows=(rank, 2)) for rank in (0, 1))
    run_plan(cells, tmp_path, first, device="cpu")
    (part,) = (tmp_path / FOLDER).iterdir()
    arrays, metadata = read_arrays(part)
    facts = json.loads(metadata["facts"])
    spoil(arrays, facts)
    write_scores(part, metadata["format"], arrays, json.loads(metadata["identity"]), facts)
    with pytest.raises(DataError, match=r"part-1-of-2.safetensors is damaged .*: run the plan again"):
        run_plan(cells, tmp_path, second, device="cpu")
    assert run_plan(cells, tmp_path, first, device="cpu", say=said.append)[0]["state"] == "done"
    assert f"set aside as {part.name}.damaged, and measured again" in said[0]


@pytest.mark.parametrize("metric", ["all", "energy"])
def test_parts_that_make_no_cell_together_are_set_aside_and_not_lost(plan, tmp_path, metric):
    cells = read_plan(plan(ONE))
    first, second = (Shards(windows=(rank, 2)) for rank in (0, 1))
    run_plan(cells, tmp_path, first, device="cpu")
    (part,) = (tmp_path / FOLDER).iterdir()
    arrays, metadata = read_arrays(part)
    for name, values in arrays.items():
        if name.startswith("mean_frame/") and metric == "all":
            values[:] = math.nan  # as where there is no train split, and this dataset has one
        elif name == f"mean_frame/{metric}":
            values *= 1.01  # another mean frame than the other part's
    write_scores(part, metadata["format"], arrays, json.loads(metadata["identity"]), json.loads(metadata["facts"]))
    with pytest.raises(DataError, match=r"cell 1 of .*: its parts contradict each other \(.*set aside: run the plan"):
        run_plan(cells, tmp_path, second, device="cpu")
    assert sorted(p.suffix for p in (tmp_path / FOLDER).iterdir()) == [".damaged", ".damaged"]
    assert [run_plan(cells, tmp_path, s, device="cpu")[0]["state"] for s in (first, second)] == ["part", "done"]


def test_a_part_that_another_process_joins_while_it_is_read_is_not_damaged(tmp_path, monkeypatch):
    (tmp_path / "part").touch()

    def joined(path, *rest):
        path.unlink()
        raise DataError("gone")

    monkeypatch.setattr(score_files, "read_scores", joined)
    with pytest.raises(FileNotFoundError):
        read_part(tmp_path / "part", {}, {})


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("space", [SPACE, NO_ACTIONS])
def test_parts_are_held_to_the_tables_that_are_really_measured(tmp_path, seeds, space):
    store = moving_pictures(tmp_path / "data", episodes=6, space=space)
    world = tiny_world(store)
    config, manifest = ready(
        world, store, EvaluationConfig(windows=3, context=2, horizon=5, noise_seeds=seeds), world.generation
    )
    measured = flat(measure_share(world, store, config, world.generation, manifest).tables)
    expected = cells_module._shapes((world, store, config, world.generation, manifest), 3)
    assert {name: values.shape for name, values in measured.items()} == expected
    assert {values.dtype.name for values in measured.values()} == {"float64"}


def test_a_write_that_fails_leaves_what_was_there_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "cell.json"
    write_whole(path, b"old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("cell.json", b"old")]


def test_finished_cells_are_skipped_and_their_bytes_stay(plan, tmp_path, monkeypatch):
    path = plan(ONE + '[[cell]]\ncheckpoint = "b"\n')
    cells = read_plan(path)
    run_plan(cells[:1], tmp_path, Shards(), device="cpu")
    (done,) = (tmp_path / FOLDER).iterdir()
    before = done.read_bytes()
    rows = run_plan(cells, tmp_path, Shards(), device="cpu")
    assert [r["state"] for r in rows] == ["skipped", "done"]
    assert done.read_bytes() == before
    monkeypatch.setattr(cells_module, "measure_share", None)  # would break if it were called
    assert [r["state"] for r in run_plan(cells, tmp_path, Shards(), device="cpu")] == ["skipped", "skipped"]


def test_the_name_of_a_cell_depends_on_weights_data_and_settings_and_on_nothing_else(plan, places, tmp_path):
    store = moving_pictures(tmp_path / "other", seed=1)

    def name(text, batch=32):
        return cells_module.prepare_cell(cells_module._Files("cpu"), read_plan(plan(text))[0], batch).digest

    base = name(ONE)
    save_world(load_world(places / "a", "cpu"), places / "copy")
    assert name(ONE, batch=2) == base
    assert name(ONE.replace('"a"', '"copy"')) == base
    changes = ["steps = 1", "tau_ctx = 0.2", 'sampler = "euler"', 'ctx_mode = "renoise"', 'split = "val"', "seed = 1"]
    changes += ["noise_seeds = 2", "windows = 6", "context = 4", "horizon = 3"]
    names = [name(f"{ONE}{change}\n") for change in changes]
    names += [base, name(ONE.replace('"a"', '"b"')), name(ONE.replace('"data"', f'"{store.path}"'))]
    assert len(set(names)) == len(names)


def test_the_hash_of_weights_sees_a_single_changed_weight(places):
    world = load_world(places / "a", "cpu")
    before = weights_hash(world)
    world.dynamics.head.weight[0, 0] += 1e-6
    assert weights_hash(world) != before


def test_the_hash_of_weights_sees_for_which_step_sizes_they_were_trained(places):
    world = load_world(places / "a", "cpu")
    assert weights_hash(replace(world, trained_d=world.trained_d[1:])) != weights_hash(world)


@pytest.mark.parametrize("damage", [lambda t: t[: len(t) // 2], lambda t: "[]", lambda t: t.replace("0", "1", 1)])
def test_a_damaged_cell_is_named_set_aside_and_done_again(plan, tmp_path, damage):
    cells, said = read_plan(plan(ONE)), []
    run_plan(cells, tmp_path, Shards(), device="cpu")
    (path,) = (tmp_path / FOLDER).iterdir()
    good = without_times(path)
    bad = damage(path.read_text())
    path.write_text(bad)
    rows = run_plan(cells, tmp_path, Shards(), device="cpu", say=said.append)
    assert rows[0]["state"] == "done"
    assert path.name in said[0]
    assert "set aside" in said[0]
    assert without_times(path) == good
    assert path.with_name(path.name + ".damaged").read_text() == bad


def _without(*names):
    def spoil(document):
        for name in names[:-1]:
            document = document[name]
        del document[names[-1]]

    return spoil


SEALED = {  # somebody made the checksum fit: what was done to the document, and whether it is set aside or refused
    "no result": (_without("result"), True),
    "no status": (_without("result", "status"), True),
    "no windows": (_without("result", "windows"), True),
    "a list": (lambda d: d.update(result=[1]), True),
    "another status": (lambda d: d["result"].update(status={"a": 1}), True),
    "a huge number": (lambda d: d["result"]["windows"][0].update(psnr_4=1e308), True),
    "no names": (_without("names"), True),
    "no identity": (_without("identity"), False),
    "identity is a list": (lambda d: d.update(identity=[1]), False),
    "identity is null": (lambda d: d.update(identity=None), False),
    "identity lacks something": (_without("identity", "generation"), False),
}


@pytest.mark.parametrize("what", SEALED)
def test_a_cell_whose_hash_fits_but_not_its_content_is_set_aside_or_refused(plan, tmp_path, what):
    (spoil, aside), cells, said = SEALED[what], read_plan(plan(ONE)), []
    run_plan(cells, tmp_path, Shards(), device="cpu")
    (path,) = (tmp_path / FOLDER).iterdir()
    good, document = without_times(path), json.loads(path.read_text())
    spoil(document)
    document.pop("checksum")
    path.write_text(json.dumps(document | {"checksum": document_hash(document)}))
    with pytest.raises(DataError, match=r"is no cell of this version|than its name says"):
        read_cells(tmp_path)
    if not aside:
        with pytest.raises(DataError, match=r"was measured with other settings than cell 1 .* differs\): move it away"):
            run_plan(cells, tmp_path, Shards(), device="cpu")
        return
    assert run_plan(cells, tmp_path, Shards(), device="cpu", say=said.append)[0]["state"] == "done"
    assert f"{path} is no cell of this version (" in said[0]
    assert f"set aside as {path.name}.damaged, and done again" in said[0]
    assert without_times(path) == good
    assert [cell.name for cell in read_cells(tmp_path)[0]] == [path.stem]


def test_a_cell_whose_stored_settings_differ_is_refused_before_anything_is_done(plan, tmp_path):
    text = ONE + '[[cell]]\ncheckpoint = "a"\ntau_ctx = 0.2\n[[cell]]\ncheckpoint = "b"\n'
    cells = read_plan(plan(text))
    a, other = (r["cell"] for r in run_plan(cells[:2], tmp_path, Shards(), device="cpu"))
    folder = tmp_path / FOLDER
    (folder / f"{a}.json").write_bytes((folder / f"{other}.json").read_bytes())
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(DataError, match=r"generation.tau_ctx differs"):
        run_plan(cells, tmp_path, Shards(), device="cpu")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_checkpoint_that_changes_while_the_plan_runs_is_refused(plan, places, tmp_path):
    world = load_world(places / "a", "cpu")
    save_world(world, places / "moving")
    text = DEFAULTS + '[[cell]]\ncheckpoint = "moving"\n[[cell]]\ncheckpoint = "b"\n'
    cells = read_plan(plan(text))
    world.dynamics.head.weight.mul_(2)
    saved = []

    def say(line):
        if not saved:
            saved.append(save_world(world, places / "moving"))

    with pytest.raises(CheckpointError, match="changed while the plan ran"):
        run_plan([cells[1], cells[0]], tmp_path, Shards(), device="cpu", say=say)
    assert len(list((tmp_path / FOLDER).iterdir())) == 1  # what was finished stays


def test_two_cells_that_come_to_the_same_settings_are_refused(plan, tmp_path):
    text = ONE + '[[cell]]\ncheckpoint = "a"\nsteps = 2\n'  # the checkpoint's own K
    with pytest.raises(UserError, match=r"cell 2 of .* comes to the same settings as cell 1"):
        run_plan(read_plan(plan(text)), tmp_path / "out", Shards(), device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "code", "sentence"),
    [
        ("steps = 3", 2, ": steps 3 does not fit the shortcut sampler: use a power of two up to 8, or sampler euler"),
        ('sampler = "eular"', 2, "did you mean 'euler'?"),
        ("tau_ctx = 1.0", 2, "is not in [0, 1)"),
        ("windows = 1", 2, "1 window leaves nobody to borrow actions from: give windows 2 or more, or such a manifest"),
        ('split = "tset"', 2, "did you mean 'test'?"),
        ("horizon = 500", 3, "no episode is long enough"),
        ('dataset = "a"', 3, "is not a dataset"),
        ('checkpoint = "data"', 4, "is not a checkpoint"),
        ("sample = 3", 2, "did you mean 'sampler'?"),
    ],
)
def test_a_bad_cell_is_one_sentence_that_names_it_before_the_good_ones_are_run(
    plan, run, tmp_path, line, code, sentence
):
    own = {"checkpoint": 'checkpoint = "b"\n', "seed": "seed = 1\n"}
    own.pop(line.split()[0], None)
    path = plan(ONE + "[[cell]]\n" + "".join(own.values()) + line + "\n")
    found, printed, err = run("plan", path, "--out", tmp_path / "out", "--device", "cpu")
    assert (found, printed) == (code, "")
    assert err.startswith(f"error: cell 2 of {path.name}")
    assert err.count("\n") == 1
    assert sentence in err
    assert not (tmp_path / "out").exists()


def test_a_manifest_is_followed_and_one_of_other_data_is_refused(plan, run, places, tmp_path):
    store = EpisodeStore.open(places / "data")
    mine = make_manifest(store, "val", 3, 4, 4, seed=9)
    mine.save(places / "windows.json")
    make_manifest(moving_pictures(tmp_path / "other", seed=1), "val", 3, 4, 4, seed=9).save(places / "foreign.json")
    text = '[[cell]]\ncheckpoint = "a"\ndataset = "data"\nmanifest = "NAME"\n'
    code, printed, _ = run("plan", plan(text.replace("NAME", "windows.json")), "--out", tmp_path / "o", "--json")
    assert code == 0
    cell = read_cell(tmp_path / "o" / FOLDER / f"{json.loads(printed)['cells'][0]['cell']}.json")
    assert cell["identity"]["manifest_hash"] == mine.hash
    code, _, err = run("plan", plan(text.replace("NAME", "foreign.json")), "--out", tmp_path / "p")
    assert code == 3
    assert "was made for another dataset" in err
    assert not (tmp_path / "p").exists()


def test_the_command_prints_one_object_and_shares_cells_by_the_option(plan, run, tmp_path):
    path = plan(ONE + '[[cell]]\ncheckpoint = "b"\n')
    _, printed, err = run("plan", path, "--out", tmp_path, "--shard", "2/2", "--device", "cpu", "--json")
    result = json.loads(printed)
    assert [c["checkpoint"] for c in result["cells"]] == ["b"]
    assert "cells 2/2 by --shard" in err
    code, printed, _ = run("plan", path, "--out", tmp_path, "--device", "cpu")
    assert code == 0
    assert "2 of 2 cells: 1 done, 1 were there" in printed


def test_a_rollout_that_is_not_finite_exits_1_unless_allowed_also_when_it_was_there(plan, run, tmp_path, monkeypatch):
    from ahriuwu_cli.models.dynamics import Dynamics

    extend = Dynamics.extend
    monkeypatch.setattr(Dynamics, "extend", lambda self, *a, **n: extend(self, *a, **n) * float("nan"))
    path = plan(ONE)
    code, printed, _ = run("plan", path, "--out", tmp_path, "--device", "cpu")
    assert code == 1
    assert "FAILED" in printed
    assert run("plan", path, "--out", tmp_path, "--device", "cpu")[0] == 1
    assert run("plan", path, "--out", tmp_path, "--device", "cpu", "--allow-nan")[0] == 0
    assert run("merge", tmp_path)[0] == 1
    code, printed, _ = run("merge", tmp_path, "--allow-nan")
    assert code == 0
    assert "nan" in printed


def test_eval_without_a_subcommand_is_still_the_command_and_its_help_names_the_others(run, places, tmp_path):
    few = ["--windows", "4", "--context", "3", "--horizon", "2", "--device", "cpu"]
    code, printed, _ = run(places / "a", places / "data", "--out", tmp_path / "o", *few)
    assert code == 0
    assert "4 windows of" in printed
    for asked in ("--help", "-h"):
        code, printed, _ = run(asked)
        assert code == 0
        assert "ahriuwu eval [OPTIONS]" in printed
        assert "--noise-seeds" in printed
        assert "\n  plan " in printed
        assert "\n  merge " in printed
    assert "--share" in run("plan", "--help")[1]
    assert "--reference" in run("merge", "--help")[1]
    assert run("palm")[0] == 2


RANGES = {
    "steps": 65536,
    "windows": 50_000,
    "context": 10_000,
    "horizon": 100_000,
    "noise_seeds": 1024,
    "seed": 2**63 - 1,
}


def test_a_plan_allows_what_the_command_line_allows(plan):
    options = inspect.signature(eval_command.evaluate).parameters
    for name, most in RANGES.items():
        assert options[name].default.parser.high == most
        least = 0 if name == "seed" else 1
        base = ONE.replace(f"{name} =", "# ")
        assert [getattr(read_plan(plan(f"{base}{name} = {v}\n"))[0], name) for v in (least, most)] == [least, most]
        for value in (least - 1, most + 1, 2**64, int("9" * 400)):
            with pytest.raises(UserError, match=f"cell 1 of .*: {name} .* is not in {least} to {most}"):
                read_plan(plan(f"{base}{name} = {value}\n"))
    assert options["tau_ctx"].default.parser.high == 1


@pytest.mark.parametrize("suffix", [".toml", ".jsonl"])
@pytest.mark.parametrize("settings", [("seed", "0x" + "f" * 5000), ("steps", "[0x" + "f" * 5000 + "]")])
def test_numbers_with_thousands_of_digits_are_a_sentence_wherever_they_stand(plan, run, suffix, settings):
    name, value = settings
    text = f"{ONE}{name} = {value}\n" if suffix == ".toml" else f'{{"{name}": {value}}}\n'
    for written in (text, f"defaults = {value}\n"):
        code, out, said = run("plan", plan(written, suffix), "--out", "unused")
        assert (code, out, said.count("\n")) == (2, "", 1)
        assert len(said) < 600


def test_ten_thousand_cells_are_read_and_more_are_refused(plan):
    text = ONE + "".join(f'[[cell]]\ncheckpoint = "a"\nseed = {i}\n' for i in range(1, 10_000))
    assert len(read_plan(plan(text))) == 10_000
    with pytest.raises(UserError, match="has 10001 cells, more than 10000: make several plans of it"):
        read_plan(plan(text + '[[cell]]\ncheckpoint = "b"\n'))
