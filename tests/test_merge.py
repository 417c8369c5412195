"""Merged cells say who is better by how much, window by window, and never compare what was not measured alike."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from worlds import moving_pictures, tiny_world

from ahriuwu_cli import cli
from ahriuwu_cli.commands import eval as eval_command
from ahriuwu_cli.commands import eval_plan
from ahriuwu_cli.data.documents import document_hash
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation.cells import FOLDER, read_cell, run_plan
from ahriuwu_cli.evaluation.merge import as_markdown, as_text, merge, merged_rows, read_cells
from ahriuwu_cli.evaluation.plan import read_plan
from ahriuwu_cli.evaluation.protocol import paired_bootstrap
from ahriuwu_cli.evaluation.shards import Shards
from ahriuwu_cli.training.checkpoint import save_world

PLAN = """
[defaults]
dataset = "data"
windows = 8
context = 3
horizon = 4
[[cell]]
checkpoint = "a"
[[cell]]
checkpoint = "a|b"
[[cell]]
checkpoint = "a"
tau_ctx = 0.3
[[cell]]
checkpoint = "a"
horizon = 5
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder of four finished cells: three of the same windows, one of others."""
    root = tmp_path_factory.mktemp("merge")
    store = moving_pictures(root / "data")
    for seed, name in enumerate(("a", "a|b")):
        save_world(tiny_world(store, seed), root / name)
    (root / "plan.toml").write_text(PLAN)
    run_plan(read_plan(root / "plan.toml"), root / "out", Shards(), device="cpu")
    return root / "out"


@pytest.fixture
def copy(done, tmp_path):
    """The same folder, to be spoilt."""
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    for path in (done / FOLDER).iterdir():
        (tmp_path / "out" / FOLDER / path.name).write_bytes(path.read_bytes())
    return tmp_path / "out"


@pytest.fixture
def run(monkeypatch, capsys):
    app = typer.Typer()
    app.callback()(lambda: None)
    eval_plan.register(app, "eval", eval_command.evaluate)
    monkeypatch.setattr(cli, "app", app)

    def call(*arguments):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["eval", "merge", *[str(a) for a in arguments]])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    return call


def edit(path, change):
    """Change a cell's document and make its checksum fit again."""
    document = read_cell(path)
    change(document)
    document["checksum"] = document_hash(document)
    path.write_text(json.dumps(document))


def test_differences_are_those_of_a_paired_bootstrap_of_the_stored_windows(done):
    cells, _ = read_cells(done)
    merged = merge(cells)
    (table,) = [t for t in merged["tables"] if t["horizon"] == 4]
    by_name = {c.name: c for c in cells}
    reference = by_name[table["reference"]["cell"]]
    assert len(table["rows"]) == 3
    for row in table["rows"]:
        other = by_name[row["cell"]]
        assert row["psnr"]["4"] == pytest.approx(other.result["horizons"]["4"]["psnr"]["value"], abs=1e-5)
        if other is reference:
            assert row["difference_db"] is None
            continue
        for h in (1, 4):
            pairs = zip(other.result["windows"], reference.result["windows"], strict=True)
            slow = np.array([a[f"psnr_{h}"] - b[f"psnr_{h}"] for a, b in pairs])
            wanted = paired_bootstrap(slow, [w["episode"] for w in other.result["windows"]])
            found = row["difference_db"][str(h)]
            assert found["value"] == pytest.approx(slow.mean(), abs=1e-5)
            assert (found["lo"], found["hi"]) == (
                pytest.approx(wanted.lo, abs=1e-5),
                pytest.approx(wanted.hi, abs=1e-5),
            )


def test_the_reference_is_the_best_at_the_last_frame_and_the_rest_follow_in_order(done):
    for table in merge(read_cells(done)[0])["tables"]:
        scores = [row["psnr"][str(table["frames"][-1])] for row in table["rows"]]
        assert scores == sorted(scores, reverse=True)
        assert table["reference"]["cell"] == table["rows"][0]["cell"]


def test_a_reference_is_named_by_checkpoint_or_cell_and_reverses_the_sign(done):
    cells, _ = read_cells(done)
    (best,) = [t for t in merge(cells)["tables"] if t["horizon"] == 4]
    last = best["rows"][-1]
    (turned,) = [t for t in merge(cells, last["cell"][:10])["tables"] if t["horizon"] == 4]
    assert turned["reference"] == {"cell": last["cell"], "label": last["label"], "chosen": True}
    top = next(r for r in turned["rows"] if r["cell"] == best["reference"]["cell"])
    assert top["difference_db"]["4"]["value"] == pytest.approx(-last["difference_db"]["4"]["value"], abs=1e-5)
    assert merge(cells, "a|b")["tables"]
    with pytest.raises(UserError, match="fits 2 cells"):
        merge(cells, "a")
    with pytest.raises(UserError, match="is none of the cells"):
        merge(cells, "c")


def test_cells_of_other_windows_stand_in_a_table_of_their_own_and_that_is_said(done):
    cells, _ = read_cells(done)
    merged = merge(cells)
    assert sorted(len(t["rows"]) for t in merged["tables"]) == [1, 3]
    assert len({t["manifest_hash"] for t in merged["tables"]}) == 2
    assert "cannot be compared" in as_text(merged)
    assert "cannot be compared" in as_markdown(merged)
    one = merge([c for c in cells if c.identity["evaluation"]["horizon"] == 4])
    assert "cannot be compared" not in as_text(one)


def test_labels_name_what_differs_and_nothing_else(done):
    cells, _ = read_cells(done)
    (table,) = [t for t in merge(cells)["tables"] if t["horizon"] == 4]
    assert sorted(r["label"] for r in table["rows"]) == ["a (tau_ctx 0.0)", "a (tau_ctx 0.3)", "a|b (tau_ctx 0.0)"]


def test_one_path_with_two_weights_is_told_apart_by_the_hash_of_the_weights(copy):
    (other,) = [p for p in (copy / FOLDER).iterdir() if read_cell(p)["names"]["checkpoint"] == "a|b"]
    edit(other, lambda d: d["names"].update(checkpoint="a"))
    (table,) = [t for t in merge(read_cells(copy)[0])["tables"] if t["horizon"] == 4]
    labels = [r["label"] for r in table["rows"]]
    assert len(set(labels)) == 3
    assert sum(" weights " in label for label in labels) == 2


def test_the_set_that_cannot_be_told_from_the_best_is_the_one_whose_interval_holds_0(done):
    cells = [c for c in read_cells(done)[0] if c.identity["evaluation"]["horizon"] == 4]
    psnr = [[30.0, 31, 30, 31, 30, 31, 30, 31], [29.0, 30, 29, 30, 29, 30, 29, 30], [40.0, 20, 31, 31, 28, 30, 31, 29]]
    for cell, values in zip(cells, psnr, strict=True):
        for row, value in zip(cell.result["windows"], values, strict=True):
            row["psnr_4"] = value
    merged = merge(cells)
    names = {r["cell"]: r["label"] for r in merged["tables"][0]["rows"]}
    best, below, unsure = (names[c.name] for c in cells)
    assert f"ref: {best} (the highest PSNR at frame 4); cannot be told from it at frame 4: {unsure}" in as_text(merged)
    assert f"\nintervals: {merged['tables'][0]['interval']}\n" in as_text(merged) + "\n"
    assert "PSNR@4 " in as_text(merged)  # of the last frame, as the reference is
    row = next(r for r in merged["tables"][0]["rows"] if r["label"] == below)
    assert row["difference_db"]["4"] == {"value": -1.0, "lo": -1.0, "hi": -1.0}  # the same in every window


def test_with_one_episode_no_cell_can_be_told_from_the_best(done):
    cells = [c for c in read_cells(done)[0] if c.identity["evaluation"]["horizon"] == 4]
    for cell in cells:
        for row in cell.result["windows"]:
            row["episode"] = "alone"
    merged = merge(cells)
    (table,) = merged["tables"]
    others = [r["label"] for r in table["rows"] if r["difference_db"]]
    assert len(others) == 2
    assert f"cannot be told from it at frame 4: {', '.join(others)}\n" in as_text(merged)


@pytest.mark.parametrize("names", [{"checkpoint": "a", "dataset": 2}, {"checkpoint": [], "dataset": "b"}, 3])
def test_a_cell_whose_names_are_no_texts_is_none_of_ours(copy, names):
    edit(sorted((copy / FOLDER).iterdir())[0], lambda document: document.update(names=names))
    with pytest.raises(DataError, match="no cell of this version"):
        read_cells(copy)


def test_a_rollout_that_broke_is_nan_in_the_table_and_never_the_reference(done):
    cells = read_cells(done)[0]
    broken = next(c for c in cells if c.identity["evaluation"]["horizon"] == 4)
    broken.result["status"] = "nan"
    for row in broken.result["windows"]:
        row["psnr_4"] = 59.0
    broken.result["windows"][0]["psnr_4"] = None
    merged = merge(cells)
    (table,) = [t for t in merged["tables"] if t["horizon"] == 4]
    assert table["reference"]["cell"] != broken.name
    assert table["rows"][-1]["cell"] == broken.name
    assert table["rows"][-1]["psnr"]["4"] is None
    assert table["rows"][-1]["difference_db"]["4"]["value"] is None
    assert merged["status"] == "nan"
    assert f"FAILED: cells with frames that are not finite: {broken.name}" in as_text(merged)
    assert table["rows"][-1]["label"] not in as_text(merged).split("cannot be told from it")[1].split("\n")[0]


def test_the_csv_has_a_row_a_cell_and_horizon_with_what_eval_reports(done, run):
    assert run(done)[0] == 0
    with open(done / "merged.csv") as file:
        rows = list(csv.DictReader(file))
    cells, _ = read_cells(done)
    assert [(r["cell"], int(r["frame"])) for r in rows] == [(c.name, h) for c in cells for h in c.horizons]
    for row in rows:
        cell = next(c for c in cells if c.name == row["cell"])
        wanted = cell.result["horizons"][row["frame"]]
        assert float(row["gain_db_lo"]) == wanted["gain_db"]["lo"]
        assert float(row["ssim"]) == wanted["ssim"]
        assert row["manifest_hash"] == cell.identity["manifest_hash"]
        assert float(row["tau_ctx tau (0 clean, 1 noise)"]) == cell.identity["generation"]["tau_ctx"]


def test_cells_with_and_without_actions_make_one_csv(done):
    cells, _ = read_cells(done)
    mute = json.loads(json.dumps(cells[0].result)) | {"action_delta_db": None}
    rows = merged_rows([type(cells[0])("x", "x", "x", cells[0].identity, mute), cells[1]])
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["ctx_label"] == "honest"
    assert rows[0]["delta_random_db"] is None
    assert rows[-1]["delta_random_db"] is not None


def test_markdown_tables_have_equal_columns_whatever_a_path_is_called(done):
    text = as_markdown(merge(read_cells(done)[0]))
    assert r"a\|b" in text
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line.startswith("|")]
        assert len({line.replace("\\|", "").count("|") for line in lines}) <= 1


@pytest.mark.parametrize("render", [as_text, as_markdown])
def test_names_and_warnings_of_cells_are_text_in_every_report(done, render):
    def rendered(text):
        cells = [replace(c, checkpoint=text, dataset=text) for c in read_cells(done)[0]]
        for cell in cells:
            cell.result["warnings"] = [text]
        return render(merge(cells, notes=[text]))

    forged = rendered("<img src=x>\n\n# Certified\r\nFAILED: everything\u2028![a](http://b)\n[c]: d")
    assert len(forged.splitlines()) == len(rendered("a").splitlines())
    assert not any(line.startswith(("# ", "FAILED")) for line in forged.splitlines())
    if render is as_markdown:
        assert not re.search(r"<|(?<!\\)\][(:]", forged)


def test_merging_twice_gives_the_same_bytes(done, run):
    names = ("merged.csv", "merged.txt", "merged.md")
    run(done)
    before = [(done / name).read_bytes() for name in names]
    code, printed, _ = run(done, "--json")
    assert code == 0
    assert [(done / name).read_bytes() for name in names] == before
    result = json.loads(printed)
    assert result["cells"] == 4
    assert result["files"]["md"] == str(done / "merged.md")


def test_files_elsewhere_are_replaced_only_when_asked(done, run, tmp_path):
    out = tmp_path / "mine.csv"
    (tmp_path / "mine.md").write_text("keep me")
    code, _, err = run(done, "--out", out)
    assert code == 2
    assert "--overwrite" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.md"]
    assert run(done, "--out", out, "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.csv", "mine.md", "mine.txt"]
    assert run(done, "--out", tmp_path / "mine.md", "--overwrite")[0] == 2
    assert run(done, "--out", tmp_path / "nowhere" / "mine.csv")[0] == 2


def test_a_damaged_cell_stops_the_merge_and_nothing_is_written_or_moved(copy, run):
    victim = sorted((copy / FOLDER).iterdir())[1]
    victim.write_text(victim.read_text()[:-40])
    before = {p.name: p.read_bytes() for p in (copy / FOLDER).iterdir()}
    code, printed, err = run(copy)
    assert (code, printed) == (3, "")
    assert str(victim) in err
    assert "run its plan again" in err
    assert err.count("\n") == 1
    assert {p.name: p.read_bytes() for p in (copy / FOLDER).iterdir()} == before
    assert [p.name for p in copy.iterdir()] == [FOLDER]


def test_a_cell_under_another_name_or_with_other_windows_is_refused(copy):
    path = sorted((copy / FOLDER).iterdir())[0]
    good = path.read_bytes()
    path.rename(path.with_name("0123456789abcdef.json"))
    with pytest.raises(DataError, match="other settings or windows than its name says"):
        read_cells(copy)
    path.with_name("0123456789abcdef.json").unlink()
    path.write_bytes(good)
    edit(path, lambda d: d["result"]["windows"][0].update(start=d["result"]["windows"][0]["start"] + 1))
    with pytest.raises(DataError, match="other settings or windows than its name says"):
        read_cells(copy)
    path.write_bytes(good)
    edit(path, lambda d: d["result"].pop("windows"))
    with pytest.raises(DataError, match="of its result 'windows' is missing"):
        read_cells(copy)


def higher(result, floor, ceiling):
    """So many dB more in all that tells of floor and ceiling; all that follows from them is adjusted."""
    for who, more in (("floor", floor), ("ceiling", ceiling)):
        result["curves"][who] = [value + more for value in result["curves"][who]]
        for h, row in result["horizons"].items():
            for window in result["windows"]:
                window[f"{who}_{h}"] += more
                window[f"gain_db_{h}"] -= more * (who == "floor")
            row[f"{who}_psnr_of_mse"] += more
            for name, by in ((who, more), ("gain_db", -more * (who == "floor"))):
                row[name] = {end: value + by for end, value in row[name].items()}
    result["horizons"]["1"]["teacher_forced_floor"] += floor


def other_means(result):
    for row in result["horizons"].values():
        row["mean_frame_sharpness_ratio"] += 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: higher(r, -1.0, 0.0), "the data alone decide"),
        (lambda r: higher(r, 0.0, -5.0), "the data and their tokenizer alone decide"),
        (other_means, r"the data alone decide \(horizons.1.mean_frame_sharpness_ratio\)"),
    ],
)
def test_cells_of_the_same_windows_that_differ_in_what_no_world_decides_are_not_compared(copy, run, change, said):
    cells = [c for c in read_cells(copy)[0] if c.identity["evaluation"]["horizon"] == 4]
    edit(copy / FOLDER / f"{cells[1].name}.json", lambda d: change(d["result"]))
    assert len(read_cells(copy)[0]) == 4  # alone it contradicts nothing
    code, _, err = run(copy)
    assert code == 3
    assert re.search(rf"cells {cells[0].name} and {cells[1].name} are of the same windows, but .* {said}", err)
    assert [p.name for p in copy.iterdir()] == [FOLDER]


def test_a_reconstruction_that_another_device_rounds_otherwise_or_another_tokenizer_makes_may_differ(done):
    cells = [c for c in read_cells(done)[0] if c.identity["evaluation"]["horizon"] == 4]
    higher(cells[1].result, 1e-6, 0.3)
    merge(cells)
    higher(cells[1].result, 0.0, -5.0)
    with pytest.raises(DataError, match="their tokenizer"):
        merge(cells)
    cells[1].identity["tokenizer_fingerprint"] = "0" * 64
    merge(cells)


def test_a_folder_without_cells_says_what_to_run_and_parts_are_mentioned(copy, run, tmp_path):
    code, _, err = run(tmp_path)
    assert code == 3
    assert "run `ahriuwu eval plan PLAN --out" in err
    (copy / FOLDER / "beefbeefbeefbeef.part-1-of-2.safetensors").write_bytes(b"")
    code, printed, _ = run(copy)
    assert code == 0
    assert "cell beefbeefbeefbeef has only parts" in printed


def test_a_merge_of_a_plan_names_the_cells_that_no_task_began_and_leaves_out_those_of_others(done, copy, run):
    plan = done.parent / "plan.toml"
    code, printed, _ = run(copy, "--plan", plan, "--json")
    assert (code, json.loads(printed)["status"], json.loads(printed)["missing"]) == (0, "ok", [])
    lost = next(c for c in read_cells(copy)[0] if c.checkpoint == "a|b")
    (copy / FOLDER / f"{lost.name}.json").unlink()
    assert run(copy)[0] == 0
    code, printed, _ = run(copy, "--plan", plan, "--allow-nan", "--json")
    told = json.loads(printed)
    assert (code, told["status"], told["cells"], told["missing"]) == (1, "incomplete", 3, ["cell 2 of plan.toml"])
    assert "FAILED: 1 cell(s) of the plan are not finished (cell 2 of plan.toml)" in (copy / "merged.txt").read_text()
    shorter = done.parent / "shorter.toml"
    shorter.write_text(
        PLAN.replace('[[cell]]\ncheckpoint = "a|b"\n', "").replace("horizon = 5", "horizon = 4\nsteps = 8")
    )
    code, printed, err = run(copy, "--plan", shorter)
    assert code == 1, err
    assert "1 finished cell(s) there are not of this plan and are left out" in printed
    assert len(list(csv.DictReader((copy / "merged.csv").open()))) == 2 * len((1, 4))
    shorter.write_text(PLAN.replace("windows = 8", "windows = 7"))
    code, _, err = run(copy, "--plan", shorter)
    assert code == 3
    assert "none of the plan's cells is finished there" in err


@pytest.mark.slow
def test_the_recipe_for_one_box_gives_the_same_cells_with_one_process_and_with_two(done, tmp_path):
    script, found = Path(__file__).parents[1] / "scripts" / "eval_torchrun.sh", []
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("SLURM", "RANK", "WORLD", "LOCAL"))}
    for processes in ("1", "2"):
        command = ["bash", script, done.parent / "plan.toml", tmp_path / processes, processes, "--device", "cpu"]
        subprocess.run(command, check=True, capture_output=True, env=environment | {"PATH": path})
        found.append(read_cells(tmp_path / processes)[0])
    assert [c.name for c in found[0]] == [c.name for c in found[1]] == [c.name for c in read_cells(done)[0]]
    for one, two in zip(*found, strict=True):
        for h in one.horizons:
            assert two.psnr(h) == pytest.approx(one.psnr(h), abs=1e-3)
