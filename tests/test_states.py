"""The states of a run: the last few are kept, a save is there whole or not at all, a damaged one is set aside."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from small import small_world

from ahriuwu_cli import folders
from ahriuwu_cli.disk import write_inside, write_whole
from ahriuwu_cli.errors import CheckpointError
from ahriuwu_cli.folders import holding, replacing
from ahriuwu_cli.training import checkpoint, state
from ahriuwu_cli.training.checkpoint import is_sound, is_sound_tokenizer, save_world
from ahriuwu_cli.training.state import save_state
from ahriuwu_cli.training.states import States, step_of


def saved(folder: Path, *steps: int, keep: int = 3) -> States:
    states = States(folder / "state", keep)
    for step in steps:
        states.save(step, {"a": torch.full((4,), float(step))}, {"step": step, "total": 9})
    return states


def test_the_newest_is_the_one_of_most_steps_beyond_eight_digits_too(tmp_path):
    states = saved(tmp_path, 99_999_999, 100_000_000, keep=1)
    assert names(states) == ["step-100000000"]
    assert states.load(silent)[2]["step"] == 100_000_000


@pytest.mark.parametrize("digits", ["9" * 19, "9" * 200, "1" * 7, "١" * 8])
def test_a_folder_whose_number_no_run_could_have_is_no_state(tmp_path, digits):
    states = saved(tmp_path, 3)
    (states.folder / f"step-{digits}").mkdir()
    assert step_of(states.newest()) == 3


def names(states: States) -> list[str]:
    return sorted(path.name for path in states.folder.iterdir())


def silent(sentence: str) -> None:
    raise AssertionError(sentence)


def tensors_of(states: States, step: int) -> Path:
    return next((states.folder / f"step-{step:08d}").glob("state-*"))


DAMAGE = {
    "truncated tensors": lambda s: tensors_of(s, 3).write_bytes(tensors_of(s, 3).read_bytes()[:-5]),
    "altered tensors": lambda s: tensors_of(s, 3).write_bytes(tensors_of(s, 3).read_bytes()[:-1] + b"!"),
    "no tensors": lambda s: tensors_of(s, 3).unlink(),
    "bad JSON": lambda s: (s.folder / "step-00000003" / "state.json").write_text("{"),
    "no JSON": lambda s: (s.folder / "step-00000003" / "state.json").unlink(),
    "nothing": lambda s: [p.unlink() for p in (s.folder / "step-00000003").iterdir()],
}


def test_the_last_few_are_kept_and_the_newest_is_loaded(tmp_path):
    states = saved(tmp_path, 1, 2, 3, 4)
    assert names(states) == ["step-00000002", "step-00000003", "step-00000004"]
    path, tensors, document = states.load(silent)
    assert (path.name, document["step"]) == ("step-00000004", 4)
    assert torch.equal(tensors["a"], torch.full((4,), 4.0))
    assert saved(tmp_path / "new").load(silent) is None


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_newest_state_is_named_and_set_aside_and_the_one_before_is_used(tmp_path, damage):
    states, said = saved(tmp_path, 1, 2, 3), []
    damage(states)
    with pytest.raises(CheckpointError):
        states.load(silent, mend=False)
    assert "step-00000003" in names(states)
    assert states.load(said.append)[2]["step"] == 2
    (sentence,) = said
    assert "step-00000003 is damaged" in sentence
    assert "set aside as step-00000003.damaged, going on from" in sentence
    assert "step-00000002 instead" in sentence
    assert names(states) == ["step-00000001", "step-00000002", "step-00000003.damaged"]
    states.save(3, {"a": torch.zeros(1)}, {"step": 3})  # trained again, and damaged again
    damage(states)
    assert states.load(said.append)[2]["step"] == 2
    assert names(states)[-2:] == ["step-00000003.damaged", "step-00000003.damaged-2"]
    saved(tmp_path, 4, 5, 6)
    assert names(states)[-5:] == [
        "step-00000003.damaged", "step-00000003.damaged-2", "step-00000004", "step-00000005", "step-00000006",
    ]  # fmt: skip


@pytest.mark.parametrize("step", ["2", 2.0, None, 1, True])
def test_a_state_that_says_another_step_than_its_name_is_damaged(tmp_path, step):
    states, said = saved(tmp_path, 1, 2), []
    save_state(states.folder / "step-00000002", {"a": torch.zeros(1)}, {"step": step})
    assert states.glance() is None
    assert states.load(said.append)[2]["step"] == 1
    assert "says that it is of step" in said[0]


@pytest.mark.parametrize("what", ["a state", "a world", "a tokenizer"])
def test_sizes_are_compared_before_a_hash_is_made_which_takes_as_long_as_the_file_is_large(tmp_path, monkeypatch, what):
    if what == "a state":
        states = saved(tmp_path, 1)
        large = tensors_of(states, 1)
    else:
        save_world(small_world(), tmp_path / "world")
        folder = tmp_path / "world" / ("tokenizer" if what == "a tokenizer" else "")
        large = folder / "model.safetensors"
    os.truncate(large, 20 << 30)  # a hole
    for module in (state, checkpoint):
        monkeypatch.setattr(module, "file_hash", lambda path: pytest.fail(f"{path} was hashed"))
    if what == "a state":
        with pytest.raises(CheckpointError, match="its header describes"):
            states.load(silent)
    else:
        assert not is_sound_tokenizer(folder) if what == "a tokenizer" else not is_sound(folder)


def test_when_all_are_damaged_it_is_an_error_every_time_and_they_stay(tmp_path):
    states = saved(tmp_path, 2, 3, keep=2)
    for path in states.folder.glob("*/state.json"):
        path.write_text("")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no other state is left"):
            states.load(silent)
    assert names(states) == ["step-00000002", "step-00000003"]
    for path in states.folder.iterdir():
        path.rename(path.with_name(path.name + ".damaged"))
    with pytest.raises(CheckpointError, match="holds damaged states only"):
        states.load(silent)


@pytest.mark.parametrize("steps", [(1, 2), (2, 2)], ids=["another step", "the same step again"])
def test_a_save_that_dies_at_any_call_of_the_system_leaves_the_state_before_it_or_its_own(tmp_path, monkeypatch, steps):
    """Every fsync, rename, replace, unlink, mkdir and rmdir in turn is the last thing that the process does."""

    class Dies(BaseException):
        pass

    def fatal(at: int) -> bool:
        """Save a first state, then a second that dies at call number `at`. Whether it got that far."""
        states, calls = saved(tmp_path / str(at), steps[0], keep=1), []
        real = {name: getattr(os, name) for name in ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir", "open")}

        def counted(name):
            def call(*args, **kwargs):
                calls.append(name)
                if len(calls) > at:
                    raise Dies
                return real[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, counted(name))
            try:
                states.save(steps[1], {"a": torch.full((4,), 77.0)}, {"step": steps[1]})
            except Dies:
                pass
            else:
                return False
        states.clean()
        _, tensors, document = states.load(silent)
        assert (document["step"], tensors["a"][0].item()) in ((steps[0], float(steps[0])), (steps[1], 77.0)), calls
        assert all(name.startswith("step-") for name in names(states)), names(states)
        return True

    at = 0
    while fatal(at):
        at += 1
    assert at > 8


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_save_on_a_full_disk_leaves_the_states_before_it_and_no_trace(tmp_path, monkeypatch, number):
    states = saved(tmp_path, 1, 2)

    def full(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(number)):
        states.save(3, {"a": torch.zeros(2)}, {"step": 3})
    assert names(states) == ["step-00000001", "step-00000002"]
    assert states.load(silent)[2]["step"] == 2


def test_all_of_a_state_is_on_the_disk_before_it_counts_and_its_names_after(tmp_path, flushed):
    """Without a flush before a rename a power cut leaves a name with nothing behind it; without one after it, none."""
    for step in (1, 2):
        states, partial = saved(tmp_path, step), f".step-0000000{step}.partial"
        assert flushed == [
            *["sync tmp_path"] * (step == 1),  # which holds the folder of the states, made now
            "sync state.safetensors.partial",
            "state.safetensors.partial -> state-HASH.safetensors",
            f"sync {partial}",
            "sync state.json.partial",
            "state.json.partial -> state.json",
            f"sync {partial}",
            f"{partial} -> step-0000000{step}",
            "sync state",
        ]
        flushed.clear()
    tensors_of(states, 2).unlink()
    assert states.load(lambda sentence: None)[2]["step"] == 1
    assert flushed == ["step-00000002 -> step-00000002.damaged", "sync state"]


def test_an_old_state_loses_its_name_before_any_of_its_files(tmp_path, monkeypatch):
    taken, rmtree = [], shutil.rmtree

    def noted(path, **options):
        taken.extend([Path(path).name] * Path(path).exists())
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", noted)
    assert names(saved(tmp_path, 1, 2, keep=1)) == ["step-00000002"]
    assert taken == [f".step-00000001.{os.getpid()}.old"]


def test_all_of_a_world_is_on_the_disk_before_it_has_its_name(tmp_path, flushed, monkeypatch):
    monkeypatch.setattr(folders, "exchange", lambda a, b: False)
    parts = ["config.json", "model.safetensors"] * 2 + ["tokenizer", ".w.N.tmp"]
    for old in ([], ["w -> .w.N.old"]):
        save_world(small_world(), tmp_path / "w")
        assert sorted(flushed[: len(parts)]) == sorted(f"sync {part}" for part in parts)
        assert flushed[len(parts) :] == [*old, ".w.N.tmp -> w", "sync tmp_path"]
        flushed.clear()


@pytest.mark.parametrize("replaces", [True, False])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, flushed, replaces):
    assert write_whole(tmp_path / "a", "whole", replaces)
    assert flushed == ["sync .a.N.tmp", *[".a.N.tmp -> a"] * replaces, "sync tmp_path"]
    flushed.clear()
    with holding(tmp_path) as (held, _):
        write_inside(held, "b", "whole")
    assert flushed == ["sync .b.N.tmp", ".b.N.tmp -> b", "sync tmp_path"]


def test_what_a_killed_save_left_is_no_state_and_is_cleared_away(tmp_path):
    states = saved(tmp_path, 1)
    left = states.folder / ".step-00000002.partial"
    left.mkdir()
    (left / "state.safetensors.partial").write_text("half")
    assert states.load(silent)[2]["step"] == 1
    states.clean()
    assert names(states) == ["step-00000001"]


@pytest.mark.parametrize("swap", [True, False], ids=["swapped in one step", "renamed twice"])
def test_a_folder_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path, monkeypatch, swap):
    away, rename = [], os.rename

    def noted(old, new):
        away.extend([new] * str(new).endswith(".old"))
        rename(old, new)

    monkeypatch.setattr(os, "rename", noted)
    if not swap:
        monkeypatch.setattr(folders, "exchange", lambda a, b: False)
    elif not _swaps(tmp_path):
        pytest.skip("this file system cannot swap names")
    for content in ("old", "new"):
        with replacing(tmp_path / "world") as temporary:
            (temporary / "file").write_text(content)
        assert (tmp_path / "world" / "file").read_text() == content
        assert [p.name for p in tmp_path.iterdir()] == ["world"]
    assert len(away) == (0 if swap else 1)  # the way that is meant was taken


def _swaps(folder: Path) -> bool:
    for name in ("a", "b"):
        (folder / name).mkdir()
    swapped = folders.exchange(folder / "a", folder / "b")
    for name in ("a", "b"):
        (folder / name).rmdir()
    return swapped


def test_a_reader_never_finds_a_folder_gone_while_it_is_replaced(tmp_path):
    """On systems that swap two names in one step; the loop dies with the writer's process if it ever fails."""
    import subprocess
    import sys

    if not _swaps(tmp_path):
        pytest.skip("this file system cannot swap names")
    script = (
        "import sys\nfrom pathlib import Path\nfrom ahriuwu_cli.folders import replacing\n"
        "for i in range(300):\n    with replacing(Path(sys.argv[1])) as t:\n        (t / 'file').write_text(str(i))\n"
    )
    with replacing(tmp_path / "world") as temporary:
        (temporary / "file").write_text("first")
    writer = subprocess.Popen([sys.executable, "-c", script, tmp_path / "world"])
    looks = 0
    while writer.poll() is None:
        assert (tmp_path / "world").is_dir()
        looks += 1
    assert writer.returncode == 0
    assert looks > 300
    assert (tmp_path / "world" / "file").read_text() == "299"


def test_after_a_kill_between_two_renames_the_old_folder_is_put_back(tmp_path):
    from ahriuwu_cli.disk import mend

    for name in (".best.7.old", ".best.7.tmp", ".last.7.tmp", ".mine.7.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    mend(tmp_path, ("best", "last"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.7.tmp", "best"]
    assert (tmp_path / "best" / "file").read_text() == ".best.7.old"


def test_what_is_saved_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_state(tmp_path / "state", {"a": torch.ones(2)}, {"step": 1})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "state").iterdir()} == {0o640}
