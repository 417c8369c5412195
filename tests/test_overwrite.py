"""--overwrite replaces results, and never what a command reads or the folder that the user stands in."""

import importlib
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from small import small_dataset, small_world
from typer.main import get_command

from ahriuwu_cli import cli, places
from ahriuwu_cli.commands.guard import guarded
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.folders import replacing
from ahriuwu_cli.places import check_folder, keep_apart, refuse_other_kind, refuse_to_take_away
from ahriuwu_cli.training.checkpoint import save_tokenizer, save_world
from ahriuwu_cli.training.describe import describe_checkpoint
from ahriuwu_cli.training.run_folder import RunFolder

TRAIN = "--steps 1 --batch 1 --frames 2 --preview-windows 1 --device cpu"


@pytest.fixture
def place(tmp_path, monkeypatch):
    small_dataset(tmp_path / "data", episodes=4)
    save_world(small_world(), tmp_path / "world")
    save_tokenizer(small_world().tokenizer, tmp_path / "tok", {})
    (tmp_path / "videos").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def times(folder: Path) -> dict:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("link", "words"),
    [
        (None, "rollout world data --actions s/a.csv --out s"),
        ("a.csv", "rollout world data --actions random --actions a.csv --out s"),
        ("videos/a.csv", "import videos --out s"),
        ("world/model.safetensors", "rollout world data --out s"),
        ("world/tokenizer", "export world --out s"),
        ("data/dataset.json", "eval world data --out s"),
    ],
)
def test_what_is_read_through_a_link_is_never_replaced(place, link, words, capsys):
    (place / "s").mkdir()
    (place / "s" / "a.csv").write_text("dear")
    if link:
        path, inside = place / link, place / "s" / ("a.csv" if link.endswith("csv") else Path(link).name)
        if path.exists():
            path.rename(inside)
        path.symlink_to(inside)
    before = contents(place)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words.split(), "--overwrite"])
    assert stopped.value.code == 2
    assert "--overwrite would replace" in capsys.readouterr().err
    assert contents(place) == before


@pytest.mark.parametrize(
    "words",
    [
        f"train dynamics data --tokenizer tok --out data {TRAIN}",
        f"train dynamics data --tokenizer tok --out tok {TRAIN}",
        f"train dynamics data --tokenizer tok --out . {TRAIN}",
        f"train dynamics data --tokenizer tok --init-from world --out world {TRAIN}",
        f"train dynamics data --tokenizer tok --out data/episodes {TRAIN}",
        "train tokenizer data --patch 8 --latent-dim 6 --out data",
        "train tokenizer data --kind transformer --steps 1 --out data/latents",
        "rollout world data --out world",
        "rollout world data --out data",
        "rollout world data --out link",
        "export world --out world",
        "export world --prompts data --out data",
        "eval world data --out data",
        "eval world data --out ..",
        "eval score rollouts data --out rollouts",
        "sweep-tau world data --out world",
        "import videos --out videos",
        "record doom:basic --out .",
    ],
)
def test_what_is_read_is_never_replaced(place, words, capsys):
    os.symlink("data", "link")
    shutil.copytree("world", "rollouts")
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--overwrite"])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert "--overwrite would replace" in said
    assert contents(place) == before


@pytest.mark.parametrize(
    "words",
    [
        "rollout world data --out other --overwrite",
        "eval world data --out other --overwrite --windows 2 --context 3 --horizon 4",
        "eval generate world data --out other --windows 2 --context 3 --horizon 4",
        "eval plan plan.toml --out other",
        "sweep-tau world data --out other --overwrite --windows 2 --context 3 --horizon 4",
    ],
)
@pytest.mark.parametrize("kind", ["dataset", "checkpoint", "run"])
def test_results_never_lie_among_the_files_of_another_kind(place, words, kind, capsys):
    (place / "plan.toml").write_text('[defaults]\ndataset = "data"\n[[cell]]\ncheckpoint = "world"\n')
    if kind == "run":
        (place / "other").mkdir()
        (place / "other" / "run.json").write_text("{}")
    else:
        shutil.copytree("data" if kind == "dataset" else "world", "other")
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    assert f"other holds a {kind}: choose another --out" in capsys.readouterr().err
    assert contents(place) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rollout world data --out data/episodes/x", "among the files of the dataset"),
        ("rollout world data --out run/state/x", "among the files of the run"),
        ("rollout world data --out run/best/x/y", "among the files of the run"),
        ("rollout world data --out link/tokenizer/x", "among the files of the checkpoint"),
        ("eval world data --out data/latents/x", "among the files of the dataset"),
        ("eval plan plan.toml --out run/last", "among the files of the run"),
        ("eval merge run --out data/dataset.csv", "data holds a dataset"),
        ("eval merge run --out run/state/x.csv", "among the files of the run"),
        (f"train dynamics data --tokenizer tok --out data/episodes/x {TRAIN}", "among the files of the dataset"),
        (f"train dynamics data --tokenizer tok --out run/best {TRAIN}", "among the files of the run"),
        ("train tokenizer data --out data/latents/tok --patch 8 --latent-dim 4", "among the files of the dataset"),
        ("train tokenizer data --kind transformer --steps 1 --out run/tokenizer", "among the files of the run"),
        ("export world --out run/best/shipped", "among the files of the run"),
        ("export world --out world/tokenizer/w", "among the files of the checkpoint"),
        ("import videos --out run/state/d", "among the files of the run"),
        ("record doom:basic --out data/episodes/d", "among the files of the dataset"),
    ],
)
def test_results_never_lie_in_a_part_of_another_kind(place, words, said, capsys):
    (place / "plan.toml").write_text('[defaults]\ndataset = "data"\n[[cell]]\ncheckpoint = "world"\n')
    (place / "run" / "state").mkdir(parents=True)
    (place / "run" / "run.json").write_text("{}")
    os.symlink("world", "link")
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        cli.main(words.split())
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert contents(place) == before


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("rollout world data --out loop", 2),
        ("rollout world data --out loop/x", 2),
        ("rollout world loop --out o", 3),
        ("rollout loop data --out o", 4),
        (f"train dynamics data --out loop {TRAIN}", 2),
        ("train tokenizer data --out loop", 2),
        ("export world --out o --notes loop", 2),
        ("import loop --out o", 3),
    ],
)
def test_a_link_to_itself_is_refused_in_a_sentence(place, words, code, capsys):
    os.symlink("loop", "loop")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--overwrite"])
    said = capsys.readouterr().err
    assert stop.value.code == code, said
    assert "loop" in said
    assert not (place / "o").exists()


@pytest.mark.parametrize(
    "words",
    [
        "rollout {0}/world {0}/data --out .",
        "export {0}/world --out .",
        "train tokenizer {0}/data --out .",
        "record doom:basic --out .",
        "import {0}/videos --out ../empty",
        "eval {0}/world {0}/data --out .",
        "eval score {0}/world {0}/data --out .",
        "sweep-tau {0}/world {0}/data --out . --taus 0,.1 --split train --windows 2 --context 3 --horizon 4 --no-test",
    ],
)
def test_what_is_put_in_place_as_a_whole_is_never_the_current_folder(place, words, capsys, monkeypatch):
    (place / "empty").mkdir()
    monkeypatch.chdir(place / "empty")
    with pytest.raises(SystemExit) as stop:
        cli.main([word.format(place) for word in words.split()])
    assert stop.value.code == 2
    assert "is the current folder" in capsys.readouterr().err
    assert os.path.samefile(".", place / "empty")


@pytest.mark.parametrize(
    ("words", "takes"),
    [
        ("train tokenizer data --out x --patch 8 --latent-dim 4", "training.tokenizer_quality.reconstruction"),
        ("export world --out x --prompts data --clips 1 --frames 4", "training.export.draw_windows"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_to_out_while_a_command_worked_stays_where_nothing_else_was_asked_for(
    place, monkeypatch, capsys, words, takes, overwrite
):
    module, name = takes.rsplit(".", 1)
    module = importlib.import_module(f"ahriuwu_cli.{module}")
    before = getattr(module, name)

    def meanwhile(*arguments, **named):
        (place / "x").mkdir()
        (place / "x" / "mine").touch()
        return before(*arguments, **named)

    monkeypatch.setattr(module, name, meanwhile)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), *(["--overwrite"] if overwrite else [])])
    assert (stop.value.code, (place / "x" / "mine").exists()) == ((0, False) if overwrite else (2, True))
    assert ("was filled by another process meanwhile" in capsys.readouterr().err) != overwrite


WINDOWS = "--split train --windows 2 --context 3 --horizon 4"
REPLACED = {
    f"eval world data --out x --looks none {WINDOWS}": {
        "curve.png", "eval.csv", "eval.json", "windows.csv", "windows.json",
    },
    "eval score saved data --out x": {"curve.png", "eval.csv", "eval.json", "windows.csv"},
    f"sweep-tau world data --out x --taus 0,.1 --no-video --no-test --no-delta {WINDOWS}": {
        "cells", "curves.png", "gain.png", "map.png", "sweep-windows.csv", "sweep.csv", "sweep.json", "sweep.md",
        "windows.json",
    },
    "rollout world data --out x --split train --length 2 --context 2 --scale 1": {
        "arrays.safetensors", "rollout.gif", "rollout.json", "rollout.mp4", "strip.png",
    },
}  # fmt: skip


@pytest.mark.parametrize("words", REPLACED)
def test_overwrite_leaves_nothing_of_what_was_there(place, words, capsys):
    if "saved" in words:
        with pytest.raises(SystemExit):
            cli.main(f"eval generate world data --out saved {WINDOWS}".split())
    (place / "x" / "cells").mkdir(parents=True)
    for name in ("report.html", "sweep.mp4", "eval.json", "cells/asked.json", "cells/0123456789abcdef.safetensors"):
        (place / "x" / name).write_text("old")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--overwrite"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert {p.name for p in (place / "x").iterdir()} == REPLACED[words]
    assert len(list((place / "x").glob("cells/*"))) in (0, 3)
    assert "old" not in {p.read_text() for p in (place / "x").rglob("*.json")}
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


MADE = [
    f"train dynamics data --tokenizer tok --out x {TRAIN}",
    f"train dynamics data --tokenizer tok --out x --dry-run {TRAIN}",
    "train tokenizer data --out x --patch 8 --latent-dim 4",
    "train tokenizer data --kind transformer --steps 1 --patch 8 --out x",
    "export world --out x",
    "import videos --out x",
    "record doom:basic --out x",
]


@pytest.mark.parametrize("words", [*REPLACED, *MADE])
@pytest.mark.parametrize("kind", ["dataset", "checkpoint", "run"])
def test_a_dataset_a_checkpoint_or_a_run_is_taken_away_by_nothing_that_replaces_the_folder_around_it(
    place, words, kind, capsys
):
    if words.startswith(("import", "record")):
        shutil.copytree("data", "x")  # only a dataset is replaced by one
    inside = place / "x" / "mine" / "it"
    if kind == "run":
        inside.mkdir(parents=True)
        (inside / "run.json").write_text("{}")
    else:
        shutil.copytree("data" if kind == "dataset" else "world", inside)
    before = contents(place)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--overwrite"])
    assert stop.value.code == 2
    assert f"--overwrite would take away the {kind} x/mine/it: choose another --out than x" in capsys.readouterr().err
    assert contents(place) == before


LINEAR, TRANSFORMER = (
    "train tokenizer data --patch 8 --latent-dim 4",
    "train tokenizer data --kind transformer --steps 1",
)
BY = {  # command: what may take its name
    f"train dynamics data --tokenizer tok {TRAIN}": {"run"},
    LINEAR: {"tokenizer", "tokenizer's run"},
    f"{TRANSFORMER} --patch 8 --frames 2 --batch 1": {"tokenizer", "tokenizer's run"},
    "export world": {"world"},
}


@pytest.mark.parametrize("words", BY)
@pytest.mark.parametrize("what", ["dataset", "world", "tokenizer", "run", "tokenizer's run"])
def test_overwrite_replaces_its_own_kind_alone(place, words, what, capsys):
    if "run" in what:
        command = next(w for w in BY if w.startswith(TRANSFORMER if "tok" in what else "train dynamics"))
        with pytest.raises(SystemExit) as stop:
            cli.main([*command.split(), "--out", "x"])
        assert stop.value.code == 0, capsys.readouterr().err
    else:
        shutil.copytree({"dataset": "data", "world": "world", "tokenizer": "tok"}[what], "x")
    before, then = contents(place / "x"), times(place / "x")
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--out", "x", "--overwrite"])
    said = capsys.readouterr().err
    if what in BY[words]:
        assert stop.value.code == 0, said
        assert times(place / "x") != then  # the same command may well write the same bytes
    else:
        assert stop.value.code == 2
        assert f"--overwrite would take away the {what} x: choose another --out" in said
        with pytest.raises(SystemExit) as stop:  # and it is not advised
            cli.main([*words.split(), "--out", "x"])
        said = capsys.readouterr().err
        assert stop.value.code == 2
        assert "choose another --out" in said
        assert "give --overwrite" not in said
        assert "or --overwrite" not in said
        assert contents(place / "x") == before


def test_what_does_not_say_what_it_is_of_is_replaced_by_either(tmp_path):
    save_tokenizer(small_world().tokenizer, tmp_path / "x", {})
    (tmp_path / "x" / "config.json").unlink()
    refuse_other_kind(tmp_path / "x", "world")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text("{")
    refuse_other_kind(tmp_path / "r", "tokenizer's run")


def test_a_folder_of_many_folders_is_not_walked_for_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "MOST_FOLDERS", 3)
    for name in "ab":
        (tmp_path / "x" / name).mkdir(parents=True)
    with pytest.raises(UserError, match="x is not empty: choose another --out, or give --overwrite"):
        check_folder(tmp_path / "x", overwrite=False)
    (tmp_path / "x" / "c").mkdir()
    with pytest.raises(UserError, match=r"x is not empty, and holds more than 3 folders: choose another --out$"):
        check_folder(tmp_path / "x", overwrite=False)
    refuse_to_take_away(tmp_path / "x")


@pytest.mark.parametrize("lost", ["gone", "cut"])
def test_a_run_that_lost_its_run_json_is_one_by_its_states(tmp_path, lost):
    run = RunFolder(tmp_path / "r", {"kind": "dynamics", "config": {}, "facts": {}}, "train", keep=2, free=())
    run.begin(False, print)
    run.save_state(1, {"a": torch.ones(2)}, {"step": 1, "total": 9})
    run.release()
    (tmp_path / "r" / "run.json").unlink()
    if lost == "cut":
        (tmp_path / "r" / "run.json").write_text("{")
    (tmp_path / "r" / "best").mkdir()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / "r" / "best" / file).touch()
    with pytest.raises(UserError, match="holds a run: choose another --out"):
        check_folder(tmp_path / "r", overwrite=True)
    with pytest.raises(UserError, match="would take away the run"):
        refuse_to_take_away(tmp_path)
    with pytest.raises(UserError, match="would take away the run"):
        refuse_other_kind(tmp_path / "r", "tokenizer's run")
    refuse_other_kind(tmp_path / "r", "run")
    shutil.rmtree(tmp_path / "r" / "best")
    with pytest.raises(DataError, match="is a run that has not saved a world yet"):
        describe_checkpoint(tmp_path / "r")
    refuse_to_take_away(tmp_path / "r")  # by the run itself
    shutil.rmtree(tmp_path / "r" / "state")
    refuse_other_kind(tmp_path / "r", "tokenizer's run")


def test_what_replaces_a_folder_takes_away_the_parts_of_that_folder_itself(tmp_path):
    for name in ("best", "last/prompt", "tokenizer", ".best.12.tmp", ".last.3.old"):
        (folder := tmp_path / "run" / name).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (folder / file).touch()
    with pytest.raises(UserError, match="take away the checkpoint"):
        refuse_to_take_away(tmp_path / "run")  # of no run yet
    (tmp_path / "run" / "run.json").touch()
    refuse_to_take_away(tmp_path / "run")
    with pytest.raises(UserError, match="take away the run"):
        refuse_to_take_away(tmp_path)
    (tmp_path / "run" / "best").rename(tmp_path / "run" / "best.kept")
    with pytest.raises(UserError, match=r"take away the checkpoint .*run/best\.kept"):
        refuse_to_take_away(tmp_path / "run")


@pytest.mark.parametrize("gone", [{"config.json"}, {"model.safetensors"}, {"config.json", "model.safetensors"}])
def test_a_world_that_lost_a_file_is_replaced_by_one_with_its_parts_and_by_nothing_else(place, gone, capsys):
    for folder in ("run/best", "x", "inside/it"):
        shutil.copytree("world", folder)
        for name in gone:
            (place / folder / name).unlink()
    (place / "run" / "run.json").touch()
    save_world(small_world(), place / "run" / "best")  # by its place, whatever it lost
    assert {p.name for p in (place / "run" / "best").iterdir()} == {p.name for p in (place / "world").iterdir()}
    before = contents(place)
    for words in (f"eval world data --out x --overwrite {WINDOWS}", "export world --out inside --overwrite"):
        with pytest.raises(SystemExit) as stop:
            cli.main(words.split())
        assert stop.value.code == 2, words
        assert re.search("take away the checkpoint|holds a checkpoint", capsys.readouterr().err), words
    assert contents(place) == before
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", "world", "--out", "x", "--overwrite"])
    assert stop.value.code == (2 if len(gone) == 2 else 0), capsys.readouterr().err  # a tokenizer in a folder


def test_what_came_into_the_folder_that_is_to_be_replaced_while_a_command_worked_is_not_taken_away(tmp_path):
    (tmp_path / "x").mkdir()
    writer = replacing(tmp_path / "x")
    (writer.__enter__() / "new").touch()
    (tmp_path / "x" / "data").mkdir()
    (tmp_path / "x" / "data" / "dataset.json").touch()
    with pytest.raises(UserError, match="take away the dataset"):
        writer.__exit__(None, None, None)
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "data", "dataset.json"]


MEANWHILE = {  # command: where it works, and what may not go
    f"train dynamics data --tokenizer tok --out x {TRAIN}": ("training.assemble.open_pack", "world"),
    "train tokenizer data --out x --patch 8 --latent-dim 4": ("training.tokenizer_quality.reconstruction", "run"),
    "export world --out x --prompts data --clips 1 --frames 4": ("training.export.draw_windows", "tokenizer"),
    "rollout world data --out x --split train --length 2 --context 2": ("imagine.read_prompts", "world"),
}


@pytest.mark.parametrize("words", MEANWHILE)
def test_another_kind_that_came_to_out_while_a_command_worked_is_not_taken_away(place, monkeypatch, capsys, words):
    takes, what = MEANWHILE[words]
    module, name = takes.rsplit(".", 1)
    module = importlib.import_module(f"ahriuwu_cli.{module}")
    before = getattr(module, name)

    def meanwhile(*arguments, **named):
        if what == "run":
            (place / "x").mkdir()
            (place / "x" / "run.json").write_text('{"kind": "dynamics"}')
        else:
            shutil.copytree(place / {"world": "world", "tokenizer": "tok"}[what], place / "x")
        return before(*arguments, **named)

    monkeypatch.setattr(module, name, meanwhile)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words.split(), "--overwrite"])
    assert stop.value.code == 2
    assert f"--overwrite would take away the {what} x: choose another --out" in capsys.readouterr().err
    there = {p.name for p in (place / "x").iterdir()}
    assert there == (
        {"run.json"} if what == "run" else {p.name for p in (place / {"tokenizer": "tok"}.get(what, what)).iterdir()}
    )
    assert not [p for p in place.iterdir() if p.name.startswith(".")]


def test_a_folder_that_cannot_lose_its_name_is_refused_before_the_work(tmp_path, monkeypatch):
    (out := tmp_path / "out").mkdir()
    for holds in ("results", "rollout", "world"):
        check_folder(out, overwrite=False, holds=holds)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    for holds in ("results", "rollout", "world"):
        with pytest.raises(UserError, match=r"is a disk of its own, which .* cannot replace: choose a folder on it"):
            check_folder(out, overwrite=False, holds=holds)
    monkeypatch.setattr(os.path, "ismount", lambda path: False)
    monkeypatch.setattr(os, "access", lambda path, how: Path(path) != tmp_path)
    with pytest.raises(UserError, match="cannot be written to, so nothing takes the place of"):
        check_folder(out, overwrite=True)
    for holds in ("pieces", "run"):  # written into it, file by file
        check_folder(out, overwrite=True, holds=holds)


def test_no_folder_is_made_only_to_go_back_out_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for out in ("../x", "here/../x", "new/x", "here/../../x/y"):
        check_folder(Path(out), overwrite=False)
    for out in ("gone/../x", "here/gone/../../x", "new/.."):
        with pytest.raises(UserError, match="which does not exist"):
            check_folder(Path(out), overwrite=False)


def test_a_config_json_alone_makes_no_checkpoint(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.json").write_text("{}")
    check_folder(tmp_path / "project" / "prompt" / "x", overwrite=False)
    save_world(small_world(), tmp_path / "world")
    with pytest.raises(UserError, match="lies among the files of the checkpoint"):
        check_folder(tmp_path / "world" / "prompt" / "x", overwrite=False)


def test_pieces_of_results_are_not_written_through_a_link_but_the_whole_folder_may_be_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    check_folder(tmp_path / "out", overwrite=True, holds="pieces")
    (tmp_path / "outside").mkdir()
    (tmp_path / "out" / "cells").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="cells is a link, through which nothing is written"):
        check_folder(tmp_path / "out", overwrite=True, holds="pieces")


def test_results_may_lie_inside_of_a_run_and_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in ("run/eval", "run/rollout-3", "runs", "other"):
        keep_apart(Path(out), [Path("run"), Path("data")])
    with pytest.raises(UserError, match="which is read"):
        keep_apart(Path("run/best"), [Path("run")])
    with pytest.raises(UserError, match="home folder"):
        keep_apart(Path.home(), [])


def test_every_command_with_overwrite_is_guarded_and_only_once():
    def leaves(command):
        below = getattr(command, "commands", {})
        return [leaf for each in below.values() for leaf in leaves(each)] or [command]

    tree = guarded(guarded(get_command(cli.app)))
    able = [leaf for leaf in leaves(tree) if any(p.name == "overwrite" for p in leaf.params)]
    assert len(able) >= 9
    for leaf in able:
        assert leaf.callback.guarded
        assert not hasattr(leaf.callback.__wrapped__, "guarded")
