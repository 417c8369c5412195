"""Real processes at one folder: a reader beside a writer gets all of one save, two writers are refused or safe."""

import errno
import gc
import io
import multiprocessing
import os
import signal
import time
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from small import SPACE, small_dataset, small_world
from worlds import moving_pictures, tiny_world

from ahriuwu_cli import cli, disk, folders
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation.saved import score_rollouts
from ahriuwu_cli.folders import claimed, put_in_place, replacing, whole
from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world, save_world
from ahriuwu_cli.training.run_folder import RunFolder

FORK = multiprocessing.get_context("fork")
SAVES = 300


def _start(target, *arguments):
    gc.collect()  # what an earlier test left, FFmpeg's threads for one, cannot be freed in a fork: it would hang
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


def _ended(*processes):
    for process in processes:
        process.join(60)
        assert process.exitcode is not None, "it hangs"
    return [process.exitcode for process in processes]


def _weights(world):
    return {f"dynamics.{n}": t for n, t in world.dynamics.state_dict().items()} | {
        f"tokenizer.{n}": t for n, t in world.tokenizer.state_dict().items()
    }


def _is(world, other):
    mine, its = _weights(world), _weights(other)
    return all(torch.equal(mine[n], its[n]) for n in its) and world.facts == other.facts


def _worlds():
    first, second = small_world(0), small_world(1)
    first.facts, second.facts = {"save": "first"}, {"save": "second"}
    return first, second


def _save_in_turns(folder, times):
    worlds = _worlds()
    for i in range(times):
        save_world(worlds[i % 2], folder)


@pytest.mark.parametrize(("place", "swaps"), [("world", True), ("run/best", True), ("run/best", False)])
def test_a_reader_gets_one_world_or_the_other_while_a_process_saves_them_in_turns(tmp_path, place, swaps, monkeypatch):
    if not swaps:
        monkeypatch.setattr(folders, "exchange", lambda a, b: False)  # a system where names cannot swap in one step
    folder, worlds, seen = tmp_path / place, _worlds(), [0, 0]
    save_world(worlds[0], folder)
    if place != "world":
        (folder.parent / "run.json").write_text("{}")
    named = folder if place == "world" else folder.parent  # a run is read by its own name
    writer = _start(_save_in_turns, folder, SAVES)
    while writer.is_alive() or not sum(seen):
        world = load_world(named, "cpu")
        which = 0 if world.facts["save"] == "first" else 1
        assert _is(world, worlds[which]), "config, weights and tokenizer are of different saves"
        seen[which] += 1
        tokenizer = load_tokenizer(folder)
        assert tokenizer.fingerprint() in {w.tokenizer.fingerprint() for w in worlds}
    assert _ended(writer) == [0]
    assert min(seen) > 0, seen
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []


def test_what_was_read_of_two_saves_counts_for_nothing_and_is_read_again(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("config", "weights"):
            (tmp_path / name / file).write_text(name)
    os.rename(tmp_path / "a", tmp_path / "it")
    tries = []

    def read():
        config = (tmp_path / "it" / "config").read_text()
        if not tries:
            put_in_place(tmp_path / "b", tmp_path / "it")  # a save in the middle of reading
        tries.append(config)
        return config + (tmp_path / "it" / "weights").read_text()

    assert whole(tmp_path / "it", read) == "bb"
    assert tries == ["a", "b"]

    def fails():
        tries.append("c")
        if len(tries) == 3:
            os.rename(tmp_path / "it", tmp_path / "away")
            (tmp_path / "it").mkdir()
            raise CheckpointError("half of it is gone")
        return "fine"

    assert whole(tmp_path / "it", fails) == "fine"  # an error while it was replaced counts for nothing, too
    with pytest.raises(CheckpointError, match="really"):
        whole(tmp_path / "it", lambda: (_ for _ in ()).throw(CheckpointError("really damaged")))


def test_a_save_cut_short_between_its_two_renames_is_waited_for_and_then_named(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.05)
    save_world(small_world(), tmp_path / ".w.123.old")
    with pytest.raises(UserError, match=r"rename .*\.w\.123\.old back"):
        load_world(tmp_path / "w", "cpu")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_world(tmp_path / "nowhere", "cpu")
    assert time.monotonic() - began < 1


def test_a_folder_whose_successor_cannot_have_its_name_gets_it_back(tmp_path, monkeypatch):
    """On systems that cannot swap: the old one is renamed away by then."""
    monkeypatch.setattr(folders, "exchange", lambda a, b: False)
    for name in ("w", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    away, rename = [], os.rename

    def fails(old, new):
        if away and old == tmp_path / "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)
        away.extend([new] * str(new).endswith(".old"))

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        put_in_place(tmp_path / "new", tmp_path / "w")
    assert len(away) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "w"]
    assert (tmp_path / "w" / "file").read_text() == "w"


def _shade(folder, value, overwrite=True, barrier=None, errors=None):
    """A dataset of one shade: 4 episodes, every pixel of the same value."""
    try:
        with EpisodeWriter(
            folder, height=16, width=16, fps=10.0, action_space=SPACE, name="shade", overwrite=overwrite
        ) as writer:
            for i in range(4):
                writer.add(np.full((20 + i, 16, 16, 3), value, np.uint8), np.zeros((19 + i, 2), np.float32))
            if barrier is not None:
                barrier.wait(30)
    except UserError as error:
        errors.put(str(error))


def _shades_in_turns(folder, times):
    for i in range(times):
        _shade(folder, 1 + i % 2)


def test_a_dataset_is_read_whole_or_said_to_be_replaced_while_a_process_replaces_it(tmp_path):
    _shade(tmp_path / "d", 1)
    whole_ones, said = set(), set()
    writer = _start(_shades_in_turns, tmp_path / "d", 150)
    while writer.is_alive():
        try:
            store = EpisodeStore.open(tmp_path / "d")
            shades = {int(v) for e in store.episodes() for v in np.unique(store.frames(e.id))}
        except DataError as error:
            said.add(str(error))
            continue
        assert len(shades) == 1, f"frames of two datasets: {shades}"
        whole_ones |= shades
    assert _ended(writer) == [0]
    assert whole_ones == {1, 2}
    assert said == {f"{tmp_path / 'd'} was replaced by another dataset while it was read: start again"}


def test_a_run_whose_dataset_was_replaced_says_that_it_goes_on_with_the_old_one_alone(tmp_path):
    _shade(tmp_path / "d", 1)
    store = EpisodeStore.open(tmp_path / "d")
    run = RunFolder(tmp_path / "run", {"kind": "dynamics", "config": {}, "facts": {}}, "ahriuwu train", 2, ())
    run.begin(False, print)
    run.save_state(3, {}, {"step": 3, "total": 9})
    _shade(tmp_path / "d", 2)
    words = (
        r"replaced by another dataset while it was read: put the old one back; the last good state is \S*step-00000003"
    )
    with pytest.raises(DataError, match=words) as stop, run.training():
        store.frames("000000")
    assert stop.value.exit_code == 3


def test_a_dataset_that_was_only_touched_goes_on(tmp_path):
    store = small_dataset(tmp_path / "d")
    os.utime(tmp_path / "d" / "dataset.json")
    assert store.frames("000000").shape[1:] == (16, 16, 3)


def test_of_two_recorders_into_one_folder_one_is_refused_and_the_dataset_is_whole(tmp_path):
    for turn in range(5):
        folder, errors, barrier = tmp_path / str(turn), FORK.Queue(), FORK.Barrier(2)
        pair = [_start(_shade, folder, value, False, barrier, errors) for value in (1, 2)]
        assert _ended(*pair) == [0, 0]
        said = errors.get(timeout=5)
        assert "already holds a dataset" in said or "filled by another process" in said
        assert errors.empty()
        store = EpisodeStore.open(folder)
        assert len({int(v) for e in store.episodes() for v in np.unique(store.frames(e.id))}) == 1
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def _hold(out, held):
    with claimed(out, True, print):
        held.set()
        time.sleep(60)


def _cli(*words):
    err = io.StringIO()
    with pytest.raises(SystemExit) as stop, redirect_stdout(io.StringIO()), redirect_stderr(err):
        cli.main([str(w) for w in words])
    return stop.value.code, err.getvalue()


def test_a_second_evaluation_or_sweep_into_one_folder_is_refused_until_the_first_has_ended(tmp_path):
    store = moving_pictures(tmp_path / "data")
    save_world(tiny_world(store), tmp_path / "world")
    few = ("--windows", 2, "--context", 2, "--horizon", 3, "--device", "cpu", "--out", tmp_path / "out", "--json")
    both = (
        ("eval", tmp_path / "world", tmp_path / "data", *few, "--looks", "none"),
        ("sweep-tau", tmp_path / "world", tmp_path / "data", *few, "--taus", "0,.1", "--no-video", "--no-test"),
    )
    held = FORK.Event()
    first = _start(_hold, tmp_path / "out", held)
    assert held.wait(30)
    for words in both:
        code, said = _cli(*words)
        assert code == 2
        assert "another process is writing to" in said
        assert list((tmp_path / "out").iterdir()) == []
    os.kill(first.pid, signal.SIGKILL)  # however it ends
    assert _ended(first) == [-signal.SIGKILL]
    code, said = _cli(*both[0])
    assert code == 0, said
    assert (tmp_path / "out" / "eval.json").is_file()
    assert "not empty" in _cli(*both[0])[1]


def _fill(out, value, barrier, errors):
    try:
        with replacing(out, overwrite=False) as folder:
            (folder / "value").write_text(str(value))
            barrier.wait(30)
    except UserError as error:
        errors.put(str(error))


def test_of_two_rollouts_into_one_new_folder_one_is_refused_and_the_other_is_whole(tmp_path):
    for turn in range(10):
        out, errors, barrier = tmp_path / str(turn), FORK.Queue(), FORK.Barrier(2)
        assert _ended(*(_start(_fill, out, v, barrier, errors) for v in (1, 2))) == [0, 0]
        assert "filled by another process" in errors.get(timeout=5)
        assert (out / "value").read_text() in "12"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def _generate(place, out, seed, barrier, answers):
    """`eval generate`, whose index is filled, and has no name yet, when the other's is too."""
    flush = disk.sync

    def wait(path):
        if path.name.startswith(".saved.json."):
            barrier.wait(30)
        flush(path)

    disk.sync = wait
    words = ("--windows", 2, "--context", 2, "--horizon", 2, "--seed", seed, "--device", "cpu", "--json")
    answers.put((seed, *_cli("eval", "generate", place / "world", place / "data", "--out", out, *words)))


def test_of_two_eval_generate_with_other_settings_into_one_folder_exactly_one_begins(tmp_path):
    store = moving_pictures(tmp_path / "data")
    save_world(tiny_world(store), tmp_path / "world")
    out, answers, barrier = tmp_path / "out", FORK.Queue(), FORK.Barrier(2)
    assert _ended(*(_start(_generate, tmp_path, out, seed, barrier, answers) for seed in (1, 2))) == [0, 0]
    began, refused = sorted((answers.get(timeout=5) for _ in range(2)), key=lambda answer: answer[1])
    assert (began[1], refused[1]) == (0, 2), (began, refused)
    assert "holds rollouts of other settings" in refused[2]
    assert score_rollouts(out, store)["settings"]["evaluation"]["seed"] == began[0]  # all files are of that one


def test_a_claim_on_a_folder_that_another_process_puts_its_own_in_place_of_is_refused(tmp_path, monkeypatch):
    locked = folders.lock

    def late(held, **options):
        monkeypatch.setattr(folders, "lock", locked)
        with replacing(tmp_path / "out") as folder:
            (folder / "theirs").touch()
        return locked(held, **options)

    monkeypatch.setattr(folders, "lock", late)
    with pytest.raises(UserError, match="another process is writing to"), claimed(tmp_path / "out", True, print):
        pass
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_claim_that_comes_to_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(RuntimeError), claimed(tmp_path / "a" / "b", False, print):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
