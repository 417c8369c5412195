"""The folder of a run: when it is gone on with, who may write in it, what it says when disk or numbers fail."""

import errno
import fcntl
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import small_dataset

from ahriuwu_cli import lock
from ahriuwu_cli.errors import CheckpointError, TrainingError, UserError
from ahriuwu_cli.folders import replacing
from ahriuwu_cli.lock import refuse_alive
from ahriuwu_cli.training import run_folder, run_log
from ahriuwu_cli.training import versions as versions_module
from ahriuwu_cli.training.clock import TrainingClock
from ahriuwu_cli.training.run_folder import RunFolder, goes_on
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.states import States
from ahriuwu_cli.training.versions import _revision, versions

ASKED = {"kind": "dynamics", "config": {"lr": 0.1, "keep": 2, "size": "nano"}, "facts": {"dataset": "bar"}}
FREE = ("keep",)


def asked(**changes):
    return json.loads(json.dumps(ASKED)) | changes


def begun(folder, *steps: int, total: int = 9) -> RunFolder:
    run = RunFolder(folder, ASKED, "ahriuwu train", keep=2, free=FREE)
    run.begin(False, print)
    for step in steps:
        run.log({"step": step})
        run.save_state(step, {"a": torch.ones(2)}, {"step": step, "total": total})
    run.release()
    return run


def test_a_run_goes_on_when_all_that_counts_is_the_same(tmp_path):
    begun(tmp_path / "run")
    for resume in (False, True):
        assert goes_on(tmp_path / "run", ASKED, FREE, resume, False)
        assert goes_on(tmp_path / "run", asked(config={**ASKED["config"], "keep": 5}), FREE, resume, False)
        assert goes_on(tmp_path / "run", asked(facts={}), FREE, resume, False)  # not known yet
    assert not goes_on(tmp_path / "run", ASKED, FREE, False, True)
    assert not goes_on(tmp_path / "new", ASKED, FREE, False, False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".lock").touch()  # what a start that was killed at once leaves
    (tmp_path / "empty" / ".run.json.7.tmp").touch()
    assert not goes_on(tmp_path / "empty", ASKED, FREE, False, False)


def test_a_run_that_starts_again_leaves_what_lies_beside_its_own(tmp_path):
    begun(tmp_path / "run")
    for name in ("best", "tokenizer", "mine", "best.kept"):
        (tmp_path / "run" / name).mkdir()
    assert RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE).go_on(print) is None
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", "run.json", "mine", "best.kept"}


def test_a_run_says_that_a_state_is_saved_once_it_is_and_starts_again_until_then(tmp_path, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    run = begun(tmp_path / "run")
    for step in (3, 6):  # the kill falls after the state has its name, and before it is said
        monkeypatch.setattr("ahriuwu_cli.training.run_folder.write_whole", dies)
        with pytest.raises(KeyboardInterrupt):
            run.save_state(step, {"a": torch.ones(2)}, {"step": step, "total": 9})
        monkeypatch.undo()
        assert run.go_on(print)[2]["step"] == step
    shutil.rmtree(tmp_path / "run" / "state")
    assert run.go_on(print) is None
    run.save_state(3, {"a": torch.ones(2)}, {"step": 3, "total": 9})
    run.release()
    shutil.rmtree(tmp_path / "run" / "state")
    (tmp_path / "run" / "state" / ".step-00000006.partial").mkdir(parents=True)
    for _ in range(2):
        again = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
        with pytest.raises(CheckpointError, match=r"states of .* are gone.*state back or start over by --overwrite$"):
            again.go_on(print)
        again.release()
    again.begin(True, print)
    again.release()
    assert again.go_on(print) is None
    again.release()


def test_a_run_that_starts_over_takes_away_no_other_that_came_into_its_folder_meanwhile(tmp_path):
    begun(tmp_path / "run", 3)
    begun(tmp_path / "run" / "another", 3)
    with pytest.raises(UserError, match=r"--overwrite would take away the run .*run/another"):
        RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE).begin(True, print)
    assert len(list(tmp_path.rglob("step-00000003"))) == 2


def test_two_who_only_look_at_a_run_do_not_take_each_other_for_it(tmp_path, monkeypatch):
    begun(tmp_path / "run")
    looks, locked = [], lock.lock

    def meanwhile(*arguments):
        looks.append(locked(*arguments))
        if len(looks) == 1:
            refuse_alive(tmp_path / "run")
        return looks[0]

    monkeypatch.setattr(lock, "lock", meanwhile)
    refuse_alive(tmp_path / "run")
    assert looks == [True, True]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_came_into_a_folder_until_it_was_held_is_not_taken_away(tmp_path, monkeypatch, overwrite):
    def late(folder, announce):
        monkeypatch.undo()
        begun(folder / "another" if overwrite else folder, 3)  # somebody was quicker
        return lock.take(folder, announce)

    monkeypatch.setattr(run_folder, "take", late)
    refused = r"--overwrite would take away the run .*run/another" if overwrite else r"run is not empty any more: run"
    with pytest.raises(UserError, match=refused):
        RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE).begin(overwrite, print)
    assert len(list(tmp_path.rglob("step-00000003"))) == 1


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "tokenizer"}, "train dynamics -> train tokenizer"),
        ({"config": {"lr": 0.2, "keep": 2, "size": "mini"}}, "lr 0.1 -> 0.2; size 'nano' -> 'mini'"),
        ({"config": {**ASKED["config"], "new": 1}}, "new None -> 1"),
        ({"config": {"lr": 0.1, "keep": 2}}, "size 'nano' -> None"),
        ({"facts": {"dataset": "a" * 90}}, "dataset differs"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, resume, changes, words):
    begun(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        goes_on(tmp_path / "run", asked(**changes), FREE, resume, False)
    assert f"was started with other settings ({words})" in str(caught.value)
    way = "resume with the same" if resume else "give the same to go on, another --out, or --overwrite"
    assert str(caught.value).endswith("choose another --out" if "kind" in changes else way)


FOREIGN = {
    "a file": (lambda f: f.write_text("x"), 2, 2),
    "notes": (lambda f: (f.mkdir(), (f / "notes.txt").write_text("x")), 2, 2),
    "another program's run.json": (lambda f: (f.mkdir(), (f / "run.json").write_text('{"a": 1}')), 2, 4),
    "a list": (lambda f: (f.mkdir(), (f / "run.json").write_text("[]")), 2, 4),
    "half a run.json": (lambda f: (f.mkdir(), (f / "run.json").write_text('{"config": {')), 2, 4),
    "deep nesting": (lambda f: (f.mkdir(), (f / "run.json").write_text("[" * 99999)), 2, 4),
}


@pytest.mark.parametrize(("make", "code", "code_of_resume"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_no_run_is_left_alone(tmp_path, make, code, code_of_resume):
    make(tmp_path / "run")
    for resume, expected in ((False, code), (True, code_of_resume)):
        with pytest.raises(UserError) as caught:
            goes_on(tmp_path / "run", ASKED, FREE, resume, False)
        assert caught.value.exit_code == expected
    with pytest.raises(UserError, match="not both"):
        goes_on(tmp_path / "run", ASKED, FREE, True, True)


def test_a_resume_of_nothing_says_to_start_it(tmp_path):
    with pytest.raises(UserError, match="no run to resume: start it without --resume"):
        goes_on(tmp_path / "run", ASKED, FREE, True, False)
    assert not (tmp_path / "run").exists()


def test_going_on_cuts_the_log_after_the_state_and_clears_what_a_kill_left(tmp_path):
    run = begun(tmp_path / "run", 3, 6)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7}\n{"a": 1, "step": 6}\n{"step": 5')
    for name in (".best.7.tmp", ".last.8.old", "state/.step-00000009.partial"):
        (tmp_path / "run" / name).mkdir()
    (tmp_path / "run" / ".mine").touch()
    _, _, document = run.go_on(print)
    run.release()
    assert document["step"] == 6
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 3}\n{"step": 6}\n{"a": 1, "step": 6}\n'
    names = {p.name for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")}
    assert names == {".lock", ".mine"}


@pytest.mark.parametrize("name", [".tokenizer.7.tmp", "state/.step-00000006.7.old"])
def test_what_a_kill_left_in_a_finished_run_is_cleared_away_and_nothing_else_is_touched(tmp_path, name):
    run = begun(tmp_path / "run", 6, total=6)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"]
    before = [p.stat().st_mtime_ns for p in files]
    (tmp_path / "run" / name).mkdir()
    assert run.go_on(print)[2]["step"] == 6
    run.release()
    assert "is finished: all 6 steps are done" in run.found
    assert not (tmp_path / "run" / name).exists()
    assert before == [p.stat().st_mtime_ns for p in files]


@pytest.mark.parametrize("total", [8, 13])  # finished, unfinished
@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ({8}, "7 to 8"),
        ({2, 4, 6, 7, 8}, "1 to 8"),
        ({4, 6}, "3 to 6"),
        ({2, 6}, "1 to 2 and 5 to 6"),
        ({3, 7}, None),  # previews
    ],
)
def test_lines_that_a_log_lost_anywhere_are_named(tmp_path, total, gone, said):
    settings = asked(config={**ASKED["config"], "log_every": 2, "steps": total})
    run = RunFolder(tmp_path / "run", settings, "ahriuwu train", keep=2, free=FREE)
    run.begin(False, print)
    for step in range(1, 9):
        run.log({"loss": 1.5, "step": step} if step % 2 == 0 else {"step": step, "preview": {}})
    run.save_state(8, {"a": torch.ones(2)}, {"step": 8, "total": total})
    run.release()
    whole = run.log_file.read_text().splitlines(keepends=True)
    run.log_file.write_text("".join(line for step, line in enumerate(whole, 1) if step not in gone))
    again, heard = RunFolder(tmp_path / "run", settings, "ahriuwu train", keep=2, free=FREE), []
    assert again.go_on(heard.append)[2]["step"] == 8
    again.release()
    named = f"{run.log_file} was cut short: it holds no line of steps {said}, which were trained"
    assert heard == ([] if said is None else [named])


def test_one_step_that_a_log_lost_is_named_as_one(tmp_path):
    (tmp_path / "log").write_text("".join(f'{{"loss": 1.0, "step": {step}}}\n' for step in (1, 3, 4)))
    run_log.look(tmp_path / "log", 5, 5, (heard := []).append, every=1)
    assert "no line of steps 2 and 5, which were trained" in heard[0]


def test_what_a_log_says_twice_is_dropped(tmp_path):
    run = begun(tmp_path / "run", 3, 6)
    before = run.log_file.read_bytes()
    run.log_file.write_bytes(before * 2)
    assert run.go_on(print)[2]["step"] == 6
    run.release()
    assert run.log_file.read_bytes() == before


def test_the_log_is_on_the_disk_before_a_state_counts(tmp_path, flushed):
    begun(tmp_path / "run", 3)
    calls = [call for call in flushed if call in ("sync metrics.jsonl", ".step-00000003.partial -> step-00000003")]
    assert calls == ["sync metrics.jsonl", ".step-00000003.partial -> step-00000003"]


def test_a_log_that_dies_while_it_is_cut_is_whole(tmp_path, monkeypatch):
    run = begun(tmp_path / "run", 3)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3}\n{"step": 4}\n')

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        run.go_on(print)
    run.release()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 3}\n{"step": 4}\n'


def test_a_log_that_is_too_large_is_refused_and_one_of_millions_of_lines_takes_no_memory(tmp_path):
    run = begun(tmp_path / "run", 3)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(b'{"step": 3}\n' + b'{"a": 1}\n' * 500_000 + b'["step": 3}\n{"step": 3\n{"a": 1, "step": 3}\n')
    tracemalloc.start()
    try:
        run_log.cut(run.log_file, 3, 0, print)
        assert log.read_bytes() == b'{"step": 3}\n{"a": 1, "step": 3}\n'
        os.truncate(log, 3 << 30)
        with pytest.raises(CheckpointError, match=r"metrics.jsonl is larger than 100 MB: move it away, a new log"):
            run_log.cut(run.log_file, 3, 0, print)
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    log.rename(log.with_name("moved away"))
    assert run.go_on(print)[2]["step"] == 3
    run.release()


@pytest.mark.parametrize("gone", [1, 3, 5])
def test_an_overwrite_that_dies_on_the_way_leaves_no_mixture_of_two_runs(tmp_path, monkeypatch, gone):
    begun(tmp_path / "run", 3)
    for name in ("best", "last", "tokenizer"):
        (tmp_path / "run" / name).mkdir()
    other = RunFolder(tmp_path / "run", asked(config={"lr": 7}), "ahriuwu train", keep=2, free=FREE)
    calls, rename = [], os.rename

    def dies(a, b):
        calls.append(a)
        if len(calls) > gone:
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        other.begin(True, print)
    other.release()
    monkeypatch.undo()
    assert goes_on(tmp_path / "run", ASKED, FREE, False, False)  # still the old run, without its states
    assert States(tmp_path / "run" / "state", 2).newest() is None


def test_the_lock_says_who_holds_it_and_a_system_without_locks_is_announced(tmp_path, monkeypatch):
    run = begun(tmp_path / "run")
    run.go_on(print)
    with pytest.raises(UserError, match=rf"is alive \(pid {os.getpid()} on .+\): stop that one"):
        goes_on(tmp_path / "run", ASKED, FREE, False, False)
    with pytest.raises(UserError, match="is alive"):
        RunFolder(tmp_path / "run", ASKED, "", 2, FREE).go_on(print)
    run.release()
    assert goes_on(tmp_path / "run", ASKED, FREE, False, False)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = []
    run.go_on(said.append)
    run.release()
    assert "has no file locks: nothing keeps a second run out of it" in said[0]


@pytest.mark.parametrize(("number", "remedy"), [(errno.ENOSPC, "make room"), (errno.EROFS, "make it writable")])
def test_a_disk_that_cannot_be_written_is_a_sentence_with_the_last_good_state(tmp_path, monkeypatch, number, remedy):
    run = begun(tmp_path / "run", 3)

    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(TrainingError) as caught:
        run.save_state(6, {"a": torch.ones(2)}, {"step": 6})
    assert caught.value.exit_code == 1
    for part in (os.strerror(number), remedy, "state/step-00000003", "go on with: ahriuwu train --resume"):
        assert part in str(caught.value)
    monkeypatch.undo()
    assert run.go_on(print)[2]["step"] == 3


def test_a_run_that_cannot_hold_its_new_folder_leaves_none(tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    (tmp_path / "there").mkdir()
    monkeypatch.setattr("ahriuwu_cli.lock._open", full)
    for folder in (tmp_path / "new" / "run", tmp_path / "there"):
        with pytest.raises(TrainingError, match=r"\.lock \(No space left .*: make room; nothing was trained"):
            begun(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    monkeypatch.undo()
    monkeypatch.setattr("ahriuwu_cli.training.run_folder.write_whole", full)  # there is room for the lock alone
    with pytest.raises(TrainingError, match=r"run\.json \(No space left .*: make room; nothing was trained"):
        begun(tmp_path / "new" / "run")
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_parents_that_were_made_for_a_folder_that_could_not_be_are_removed(tmp_path, monkeypatch):
    mkdir = os.mkdir

    def full(path, *more, **named):
        if os.fspath(path).endswith("b"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        mkdir(path, *more, **named)

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(TrainingError, match="make room; nothing was trained"):
        begun(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_bad_usage(tmp_path, monkeypatch):
    """As in /proc, which says that it may be written to."""

    def refused(path, *more, **named):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(UserError, match=r"cannot make .*run \(No such file or directory\): choose another --out"):
        begun(tmp_path / "run")


def test_a_file_that_cannot_be_written_in_a_folder_that_was_made_is_named(tmp_path, monkeypatch):
    def broken(path, *more, **named):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("ahriuwu_cli.training.run_folder.write_whole", broken)
    with pytest.raises(TrainingError, match=r"cannot write .*run\.json \(Input/output error\)"):
        begun(tmp_path / "new" / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_link_whose_name_leads_too_far_is_a_sentence(tmp_path):
    run = begun(tmp_path / "run", 3)
    (tmp_path / "run" / "best").symlink_to("a" * 300)
    with pytest.raises(CheckpointError, match="best is a link: it leads to nothing, so remove it"):
        run.go_on(print)


def test_a_line_for_which_there_is_no_room_leaves_no_half_of_itself(tmp_path):
    run = begun(tmp_path / "run", 3)
    file = tmp_path / "run" / "metrics.jsonl"
    before, limits = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 5, limits[1]))
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl .*: make room; the last good state"):
            run.log({"step": 4, "loss": 0.123456})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before


def test_a_log_that_lost_its_last_lines_is_gone_on_with_aloud(tmp_path):
    run, said = begun(tmp_path / "run"), []
    for step in (3, 6):
        run.log({"step": step, "loss": 1.0})
    run.save_state(8, {"a": torch.ones(2)}, {"step": 8, "total": 9})  # the next line is not due yet
    run.go_on(said.append)
    run.release()
    assert said == []
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    run.go_on(said.append)
    run.release()
    assert "cut short: it holds no line of steps 4 to 6" in said[0]


def test_the_lock_of_a_run_that_cannot_go_on_is_closed(tmp_path):
    run = begun(tmp_path / "run", 3)
    (tmp_path / "run" / "state" / "step-00000003" / "state.json").write_text("x")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError, match="not JSON"):
            run.go_on(print)
        del run
        gc.collect()
    assert [str(warning.message) for warning in said] == []
    refuse_alive(tmp_path / "run")


def test_a_state_of_another_run_is_set_aside(tmp_path):
    run, said = begun(tmp_path / "run", 3), []
    for name, differs in (("kept", {**ASKED["config"], "keep": 7}), ("other", {**ASKED["config"], "lr": 0.2})):
        other = RunFolder(tmp_path / name, asked(config=differs), "ahriuwu train", keep=2, free=FREE)
        other.begin(False, print)
        other.save_state(5, {"a": torch.zeros(2)}, {"step": 5, "total": 9})
        other.release()
    state = "state/step-00000005"
    shutil.copytree(tmp_path / "other" / state, tmp_path / "run" / state)
    assert run.go_on(said.append)[2]["step"] == 3
    run.release()
    assert "is of another run" in said[0]
    shutil.copytree(tmp_path / "kept" / state, tmp_path / "run" / state)
    assert run.go_on(said.append)[2]["step"] == 5


def test_nothing_takes_the_place_of_a_run_that_is_alive(tmp_path):
    run = begun(tmp_path / "run", 3)
    run.go_on(print)
    with pytest.raises(UserError, match="belongs to a run that is alive"), replacing(tmp_path / "run") as folder:
        (folder / "mine").touch()
    run.save_state(6, {"a": torch.ones(2)}, {"step": 6, "total": 9})
    run.release()
    with replacing(tmp_path / "run") as folder:
        (folder / "mine").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


def test_a_state_that_is_not_finite_is_never_saved(tmp_path):
    run = begun(tmp_path / "run", 3)
    with pytest.raises(TrainingError, match=r"model\.w is not finite after step 6.*last good state is .*step-00000003"):
        run.save_state(6, {"model.w": torch.tensor([1.0, float("inf")])}, {"step": 6})
    assert run.states.newest().name == "step-00000003"


LOST = {
    "gone": (Path.unlink, "is missing"),
    "empty": (lambda path: path.write_text(""), "cannot be read"),
    "cut": (lambda path: path.write_text(path.read_text()[:40]), "cannot be read"),
    "another tool's": (lambda path: path.write_text('{"id": 7}'), "it has no config"),
    "no facts": (lambda path: path.write_text(path.read_text().replace('"facts"', '"fact"')), "it has no facts"),
    "no kind of ours": (lambda path: path.write_text(path.read_text().replace('"dynamics"', '"foo"')), "kind is 'foo'"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "cannot be read"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("lost", LOST)
def test_a_run_that_lost_its_run_json_has_it_again_from_its_newest_state(tmp_path, lost, resume):
    begun(tmp_path / "run", 3, 5)
    path = tmp_path / "run" / "run.json"
    whole = path.read_bytes()
    damage, why = LOST[lost]
    damage(path)
    assert whole != (path.read_bytes() if path.is_file() else b"")
    with pytest.raises(UserError, match=r"with other settings \(lr 0\.1 -> 0\.2\)"):
        goes_on(tmp_path / "run", asked(config={**ASKED["config"], "lr": 0.2}), FREE, resume, False)
    assert goes_on(tmp_path / "run", ASKED, FREE, resume, False)
    assert not path.is_file() or path.read_bytes() != whole  # nothing is written until the run is held
    said = []
    run = RunFolder(tmp_path / "run", ASKED, "another command", keep=2, free=FREE)
    assert run.go_on(said.append)[2]["step"] == 5
    run.release()
    assert len(said) == 1
    assert re.search(rf"run\.json .*{why}.*: made anew from the copy in \S*state/step-00000005", said[0]), said
    assert ("set aside as run.json.damaged" in said[0]) == (lost != "gone")
    assert os.path.lexists(tmp_path / "run" / "run.json.damaged") == (lost != "gone")
    assert path.read_bytes() == whole
    assert run.command == "ahriuwu train"  # what started it, which its worlds state
    assert run.go_on(said.append)[2]["step"] == 5
    assert len(said) == 1


def a_strangers_state_came(folder, step: int) -> dict:
    """A state of a run with other settings lies among the folder's own. What that run was asked for."""
    other = asked(config={**ASKED["config"], "lr": 0.2})
    run = RunFolder(folder.with_name("other"), other, "ahriuwu train", keep=2, free=FREE)
    run.begin(False, print)
    run.save_state(step, {"a": torch.ones(2)}, {"step": step, "total": 9})
    run.release()
    (folder / "state").mkdir(exist_ok=True)
    shutil.move(run.states.newest(), folder / "state")
    return other


def altered(folder, change) -> None:
    path = folder / "run.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["config"].update(lr=0.3),
        lambda said: said.update(kind="tokenizer"),
        lambda said: said["facts"].pop("dataset"),
        lambda said: said.update(command="HELLO"),
        lambda said: said.pop("versions"),
    ],
    ids=["setting", "kind", "fact", "command", "versions"],
)
def test_a_run_json_that_all_states_deny_was_altered_and_is_made_anew(tmp_path, change):
    begun(tmp_path / "run", 3, 5)
    path = tmp_path / "run" / "run.json"
    whole = path.read_bytes()
    altered(tmp_path / "run", change)
    assert goes_on(tmp_path / "run", ASKED, FREE, False, False)
    said = []
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(said.append)[2]["step"] == 5
    run.release()
    assert re.search(r"run\.json was altered: made anew from the copy in \S*step-00000005", said[0])
    assert path.read_bytes() == whole


def test_a_run_json_that_was_altered_is_made_anew_from_the_states_that_are_asked_for_among_others(tmp_path):
    begun(tmp_path / "run", 3)
    whole = (tmp_path / "run" / "run.json").read_bytes()
    other = a_strangers_state_came(tmp_path / "run", 5)
    altered(tmp_path / "run", lambda said: said["config"].update(lr=0.3))
    said = []
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert goes_on(tmp_path / "run", ASKED, FREE, False, False)
    assert run.go_on(said.append)[2]["step"] == 3
    run.release()
    assert (tmp_path / "run" / "run.json").read_bytes() == whole
    assert "run.json was altered: made anew from the copy in" in said[-1]
    with pytest.raises(UserError, match="with other settings"):
        goes_on(tmp_path / "run", other, FREE, False, False)


def test_a_run_json_that_a_state_agrees_with_is_the_folder_s_own_and_the_other_state_is_set_aside(tmp_path):
    begun(tmp_path / "run", 3)
    other = a_strangers_state_came(tmp_path / "run", 5)
    whole = (tmp_path / "run" / "run.json").read_bytes()
    assert goes_on(tmp_path / "run", ASKED, FREE, False, False)
    with pytest.raises(UserError, match="with other settings"):
        goes_on(tmp_path / "run", other, FREE, False, False)
    said = []
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(said.append)[2]["step"] == 3
    run.release()
    assert len(said) == 1
    assert "of another run" in said[0]
    assert (tmp_path / "run" / "run.json").read_bytes() == whole


def deep(levels: int) -> list:
    return [deep(levels - 1)] if levels > 1 else []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda said: said.update(more=deep(16)), "nested more than 16 deep"),
        (lambda said: said["facts"].update(more=[0] * 400_000), "more than 400000 values"),
        (lambda said: said.update(command="\u20ac" * 1_500_000), "larger than 9 MB"),
        *[
            (lambda said, s=s: said["facts"].update(init_from=s), "init_from is no path")
            for s in (5, True, ["a"], {}, "a\0")
        ],
    ],
)
def test_a_run_json_that_a_state_has_no_room_for_or_that_names_no_path_is_damaged(tmp_path, change, words):
    begun(tmp_path / "run")
    altered(tmp_path / "run", change)
    with pytest.raises(CheckpointError, match=rf"run\.json cannot be read \(.*{words}"):
        RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE).go_on(print)


@pytest.mark.parametrize("more", [[deep(14), [0] * 399_000], ["\u20ac" * 1_499_000]], ids=["values", "bytes"])
def test_the_largest_run_json_that_is_taken_has_room_in_a_state(tmp_path, more):
    run = begun(tmp_path / "run")
    altered(tmp_path / "run", lambda said: said.update(more=more))
    assert run.go_on(print) is None
    altered(tmp_path / "run", lambda said: said.update(more=more))
    run._said = json.loads((tmp_path / "run" / "run.json").read_text())
    run.save_state(3, {"a": torch.ones(2)}, {"step": 3, "total": 9})
    run.release()
    assert run.go_on(print)[2]["step"] == 3


def test_a_finished_run_that_lost_its_run_json_has_it_again(tmp_path):
    begun(tmp_path / "run", 9)
    whole = (tmp_path / "run" / "run.json").read_bytes()
    (tmp_path / "run" / "run.json").unlink()
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(print)[2]["step"] == 9
    assert "is finished" in run.found
    assert (tmp_path / "run" / "run.json").read_bytes() == whole


def test_the_copy_of_a_damaged_newest_state_is_not_used_and_the_one_before_gives_it(tmp_path):
    begun(tmp_path / "run", 3, 5)
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "state" / "step-00000005" / "state.json").write_text("{")
    said = []
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(said.append)[2]["step"] == 3
    assert "step-00000005 is damaged" in said[0]
    assert "made anew from the copy in" in said[1]
    assert "step-00000003" in said[1]
    run.release()


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_without_run_json_whose_states_have_no_copy_of_it_is_refused_and_stays(tmp_path, resume):
    run = begun(tmp_path / "run")
    run._said = {}  # as an older version
    run.save_state(3, {"a": torch.ones(2)}, {"step": 3, "total": 9})
    run.release()
    (tmp_path / "run" / "run.json").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        CheckpointError,
        match=r"run\.json cannot be read .*no state beside it has a copy of it: put \S*run\.json back or start over by "
        "--overwrite$",
    ):
        goes_on(tmp_path / "run", ASKED, FREE, resume, False)
    assert sorted(tmp_path.rglob("*")) == before
    assert not goes_on(tmp_path / "run", ASKED, FREE, False, True)


def test_of_states_of_several_runs_the_copy_is_taken_that_is_asked_for(tmp_path):
    begun(tmp_path / "run", 3, 5)
    a_strangers_state_came(tmp_path / "run", 7)
    whole = (tmp_path / "run" / "run.json").read_bytes()
    (tmp_path / "run" / "run.json").unlink()
    changed = asked(config={**ASKED["config"], "keep": 5})  # as going on may
    assert goes_on(tmp_path / "run", changed, FREE, False, False)
    said = []
    run = RunFolder(tmp_path / "run", changed, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(said.append)[2]["step"] == 5
    run.release()
    assert "of another run" in said[0]
    assert "made anew from the copy in" in said[1]
    assert "step-00000005" in said[1]
    assert (tmp_path / "run" / "run.json").read_bytes() == whole


def test_a_copy_is_taken_from_a_state_that_is_there_when_all_is_done(tmp_path):
    begun(tmp_path / "run", 3, 5)
    (tmp_path / "run" / "run.json").unlink()
    next((tmp_path / "run" / "state" / "step-00000005").glob("*.safetensors")).write_bytes(b"")
    said = []
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(said.append)[2]["step"] == 3
    run.release()
    assert "set aside as step-00000005.damaged" in said[0]
    assert re.search(r"made anew from the copy in \S*step-00000003", said[1])


def test_the_only_copy_is_taken_from_a_state_whose_tensors_are_damaged_where_the_one_before_has_none(tmp_path):
    begun(tmp_path / "run", 5)
    older = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    older.save_state(3, {"a": torch.ones(2)}, {"step": 3, "total": 9})  # as a version before copies
    older.release()
    whole = (tmp_path / "run" / "run.json").read_bytes()
    (tmp_path / "run" / "run.json").unlink()
    next((tmp_path / "run" / "state" / "step-00000005").glob("*.safetensors")).write_bytes(b"")
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    assert run.go_on(print)[2]["step"] == 3
    run.release()
    assert (tmp_path / "run" / "run.json").read_bytes() == whole


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_whose_states_are_somebody_elses_is_no_run(tmp_path, resume):
    (tmp_path / "x" / "state" / "step-00000001").mkdir(parents=True)
    (tmp_path / "x" / "state" / "step-00000001" / "state.json").write_text("{}")
    words = "holds no run to resume but other files" if resume else "is not empty: choose another --out, or give"
    with pytest.raises(UserError, match=words) as stop:
        goes_on(tmp_path / "x", ASKED, FREE, resume, False)
    assert stop.value.exit_code == 2


def test_a_run_json_that_is_what_is_asked_for_is_believed_whatever_a_strangers_state_says(tmp_path):
    begun(tmp_path / "run")
    a_strangers_state_came(tmp_path / "run", 5)
    before = (tmp_path / "run" / "run.json").read_bytes()
    assert goes_on(tmp_path / "run", ASKED, FREE, False, False)
    run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    with pytest.raises(CheckpointError, match="is of another run"):
        run.go_on(print)
    run.release()
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_what_is_damaged_is_set_aside_beside_what_was_before(tmp_path):
    path = tmp_path / "run" / "run.json"
    begun(tmp_path / "run", 3)
    for i in range(3):
        path.write_text(f"[{i}")
        run = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
        assert run.go_on(print)[2]["step"] == 3
        run.release()
    for i, name in enumerate(("run.json.damaged", "run.json.damaged-2", "run.json.damaged-3")):
        assert (tmp_path / "run" / name).read_text() == f"[{i}"


def test_a_run_json_of_another_tool_in_a_folder_without_states_is_in_use(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="not empty"):
        goes_on(tmp_path / "run", ASKED, FREE, False, False)
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read"):
        goes_on(tmp_path / "run", ASKED, FREE, True, False)


def test_a_run_whose_last_tidying_failed_keeps_as_many_states_as_was_asked(tmp_path, monkeypatch):
    run = begun(tmp_path / "run", 3, 5)
    monkeypatch.setattr(States, "prune", lambda states: None)
    run.save_state(7, {"a": torch.ones(2)}, {"step": 7, "total": 9})
    run.release()
    monkeypatch.undo()
    assert len(list((tmp_path / "run" / "state").iterdir())) == 3
    assert run.go_on(print)[2]["step"] == 7
    run.release()
    assert [s.name for s in sorted((tmp_path / "run" / "state").iterdir())] == ["step-00000005", "step-00000007"]


def stopped(capfd, by: list[signal.Signals], waits: bool = False, after: str | None = None, **options) -> tuple:
    """Signals come, in the loop or before it; then the loop is over: (exit code, what was said) of that process."""
    gc.collect()  # a fork that frees FFmpeg's threads hangs
    child = os.fork()
    if not child:
        with StopRequest(**options) as stop:
            if waits:
                stop.wait_for_step()
            for number in by:
                os.kill(os.getpid(), number)
            if stop.number == by[0] and waits and after:
                stop.end_at_once(after)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, capfd.readouterr().err


def test_a_signal_before_the_loop_ends_at_once_and_one_in_it_waits(capfd):
    once = {"at_once": "start again"}
    assert stopped(capfd, [signal.SIGUSR1], **once) == (138, "error: stopped by signal 10; start again\n")
    assert stopped(capfd, [signal.SIGTERM], **once, speaks=False) == (143, "")
    assert stopped(capfd, [signal.SIGTERM], waits=True, **once) == (0, "")
    said = "error: stopped by signal 15; nearly done\n"
    assert stopped(capfd, [signal.SIGTERM], waits=True, after="nearly done", **once) == (143, said)
    code, said = stopped(capfd, [signal.SIGINT, signal.SIGTERM], waits=True)
    assert code == 130
    assert said == "error: stopped by signal 2; asked twice\n"


def test_who_asks_twice_is_told_what_is_saved_and_what_to_type(tmp_path):
    run = RunFolder(tmp_path / "run", {"kind": "dynamics", "config": {}, "facts": {}}, "ahriuwu train", 2, ())
    run.begin(False, print)
    assert run.asked_twice() == (
        "asked twice, so this step was not saved: no state is saved yet, start again with: ahriuwu train"
    )
    run.save_state(3, {"x": torch.zeros(1)}, {"total": 9})
    assert run.asked_twice() == (
        f"asked twice, so this step was not saved: the last good state is {run.states.newest()}, "
        "go on with: ahriuwu train --resume"
    )


def test_a_time_budget_decides_its_steps_once_and_a_kill_cannot_undo_it(tmp_path, monkeypatch):
    """The clock decides at step 6 that there are 10; killed in step 8, a slower clock must not decide again."""
    from test_training import CONFIG, TINY

    from ahriuwu_cli.models.sizes import SIZES
    from ahriuwu_cli.training.assemble import assemble, fit_linear_tokenizer
    from ahriuwu_cli.training.loop import DynamicsTrainer

    monkeypatch.setitem(SIZES, "test", TINY)
    store = small_dataset(tmp_path / "data", frames=14)
    tokenizer = fit_linear_tokenizer(store, (8, 8), 6, 0.5)
    config = replace(CONFIG, steps=None, budget=100.0, decay=0.4)

    def trained(out, seconds: float, dies_at: int = -1):
        update, stepped = DynamicsTrainer._update, []

        def lap(clock):  # a step takes its seconds, a preview none
            return seconds if stepped and stepped.pop() else 0.0

        def dies(trainer):
            stepped.append(True)
            if trainer.step == dies_at:
                raise KeyboardInterrupt
            return update(trainer)

        with monkeypatch.context() as patch:
            patch.setattr(TrainingClock, "lap", lap)
            patch.setattr(DynamicsTrainer, "_update", dies)
            trainer = assemble(store, tokenizer, config, out, "train", device=torch.device("cpu"))
            trainer.train(lambda line: None, StopRequest())
        return trainer

    whole = trained(tmp_path / "whole", 10.0)
    assert whole.step == 10
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", 10.0, dies_at=7)
    assert States(tmp_path / "killed" / "state", 2).glance()["total"] == 10
    resumed = trained(tmp_path / "killed", 1.0)
    assert resumed.step == 10
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "folder"])
def test_a_lock_that_no_run_made_is_neither_followed_nor_waited_for(tmp_path, kind):
    run = begun(tmp_path / "run", 3)
    lock, precious = tmp_path / "run" / ".lock", tmp_path / "precious"
    lock.unlink()
    if kind == "link":
        precious.write_text("precious")
    if kind in ("link", "dangling"):
        lock.symlink_to(precious)
    else:
        os.mkfifo(lock) if kind == "pipe" else lock.mkdir()
    for ask in (lambda: goes_on(tmp_path / "run", ASKED, FREE, False, False), lambda: run.go_on(print)):
        with pytest.raises(CheckpointError, match="is no file that a run made"):
            ask()
    assert not precious.exists() or precious.read_text() == "precious"


def test_a_run_whose_folder_went_away_ends_with_a_sentence_and_makes_no_other(tmp_path):
    run = begun(tmp_path / "run", 3)
    run.go_on(print)
    shutil.rmtree(tmp_path / "run")
    for write in (lambda: run.log({"step": 4}), lambda: run.save_state(4, {}, {"step": 4, "total": 9})):
        with pytest.raises(TrainingError, match="was removed or replaced while this run was writing there"):
            write()
    assert not (tmp_path / "run").exists()


def test_a_run_leaves_nothing_in_the_folder_that_another_run_has_made_anew(tmp_path, monkeypatch):
    first = begun(tmp_path / "run", 3)
    first.go_on(print)
    save = States.save

    def slow_save(states, *given):
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "run")
        begun(tmp_path / "run", 1)
        return save(states, *given)

    monkeypatch.setattr(States, "save", slow_save)
    with pytest.raises(TrainingError, match="was removed or replaced"):
        first.save_state(5, {"a": torch.zeros(2)}, {"step": 5, "total": 9})
    second = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    _, tensors, document = second.go_on(print)
    assert document["step"] == 1
    assert torch.equal(tensors["a"], torch.ones(2))
    second.release()


def test_what_lies_under_a_hidden_name_is_cleared_away_whatever_it_is_and_a_link_is_never_followed(tmp_path):
    run = begun(tmp_path / "run", 3)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    (tmp_path / "run" / "state" / ".step-file").touch()
    (tmp_path / "run" / "state" / ".step-link").symlink_to(precious)
    (tmp_path / "run" / ".best.12.tmp").symlink_to(precious)
    (tmp_path / "run" / ".last.12.old").symlink_to(precious)
    assert run.go_on(print)[2]["step"] == 3
    run.release()
    assert (precious / "file").exists()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "metrics.jsonl", "run.json", "state"]
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("name", ["state", "best", "last", "tokenizer", "metrics.jsonl", "state/step-00000003"])
def test_a_part_of_a_run_that_is_a_link_is_refused_and_nothing_is_written_or_deleted_through_it(tmp_path, name):
    run = begun(tmp_path / "real", 3)
    (tmp_path / "run").symlink_to("real")  # the whole folder may lie on another disk
    assert goes_on(tmp_path / "run", ASKED, FREE, True, False)
    part, outside = tmp_path / "run" / name, tmp_path / "outside"
    part.rename(outside) if part.exists() else outside.mkdir()
    part.symlink_to(outside)
    if outside.is_dir():
        (outside / ".step-precious").mkdir()
        (outside / "step-00000000").mkdir()
    before = sorted(outside.rglob("*"))
    for ask in (lambda: goes_on(tmp_path / "run", ASKED, FREE, True, False), lambda: run.go_on(print)):
        with pytest.raises(CheckpointError, match=f"{name} is a link: put what it leads to in its place"):
            ask()
    assert sorted(outside.rglob("*")) == before
    outside.rename(tmp_path / "gone")
    way = "put what it led to in its place" if name == "state" or "/" in name else "remove it"
    with pytest.raises(CheckpointError, match=f"{name} is a link: it leads to nothing, so {way}"):
        run.go_on(print)
    (tmp_path / "gone").rename(outside)
    assert not goes_on(tmp_path / "run", ASKED, FREE, False, True)
    again = RunFolder(tmp_path / "run", ASKED, "ahriuwu train", keep=2, free=FREE)
    again.begin(True, print)  # starting over takes the link away, not what it leads to
    again.save_state(1, {"a": torch.ones(2)}, {"step": 1, "total": 9})
    again.release()
    assert sorted(outside.rglob("*")) == before
    assert not part.is_symlink()


def test_a_machine_without_git_trains_all_the_same(monkeypatch):
    _revision.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    assert versions()["git"] is None
    _revision.cache_clear()


def test_code_that_is_installed_inside_another_project_does_not_state_that_projects_revision(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    (tmp_path / "lib").mkdir()
    file = tmp_path / "lib" / "versions.py"
    file.touch()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "the project's own")
    monkeypatch.setattr(versions_module, "__file__", str(file))
    for tracked in (False, True):
        _revision.cache_clear()
        assert versions()["git"] == (git("rev-parse", "HEAD").strip() if tracked else None)
        git("add", "lib")
    _revision.cache_clear()
