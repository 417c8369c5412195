"""Real processes that are stopped or killed anywhere: the right exit code, one sentence, and nothing is left behind."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small import SPACE, small_place

from ahriuwu_cli import folders, stopping
from ahriuwu_cli.data.episodes import EpisodeStore, EpisodeWriter
from ahriuwu_cli.data.validate import validate

ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
PROGRAM = [sys.executable, "-m", "ahriuwu_cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A world, data, and videos to import."""
    return small_place(tmp_path_factory.mktemp("stopping"), {"a.mp4": 400, "b.mp4": 400})


def _fresh(words: str, cwd: Path, **options) -> subprocess.Popen:
    """A process of its own; a signal that this one may ignore (a background job, SIGINT) counts."""
    return subprocess.Popen(
        [*PROGRAM, *words.split()], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in ENDS[1:]]
        + [signal.signal(signal.SIGINT, signal.default_int_handler)], **options,
    )  # fmt: skip


def _until(there, life=None) -> None:
    until = time.monotonic() + 60
    while not there():
        assert time.monotonic() < until, "it never came"
        assert life is None or not life.has_ended(), life.said()
        time.sleep(0.001)


def test_a_signal_while_torch_and_numpy_are_imported_ends_with_its_own_code_and_one_sentence(place):
    """From a moment after the start, when Python itself is up, to training: imports take most of that second."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        for delay in (0.3, 0.7):
            process = _fresh(
                "train tokenizer data --kind transformer --out t --steps 100000 --batch 2 --frames 4 --overwrite", place
            )
            caught = Path(f"/proc/{process.pid}/status")
            _until(lambda caught=caught: int(caught.read_text().split("SigCgt:\t")[1][:16], 16) & 1 << 9)  # SIGUSR1
            time.sleep(delay)
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
            assert process.returncode == 128 + number, err
            assert err.count("error: stopped by signal") == 1, err
            assert "Traceback" not in err, err
            assert out == ""


LONG = {  # and what is there when it has begun
    "rollout": ("rollout {0}/world {0}/data --out made --length 100000 --actions random", ".made.*.tmp/*.mp4*"),
    "import": ("import {0}/films --out made --size 512", ".made.*.tmp/episodes"),
    "export": ("export {0}/world --out made --prompts {0}/data --split train --frames 30 --clips 10", ".made.*.tmp"),
    "eval": ("eval {0}/world {0}/data --out made --split train --windows 40 --context 4 --horizon 30", "made"),
}  # fmt: skip


@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_a_writing_command_leaves_nothing_and_one_sentence(start, place, tmp_path, command, number):
    words, sign = LONG[command]
    words = words.format(place)
    life = start(words, tmp_path)
    _until(lambda: next(tmp_path.glob(sign), None), life)
    life.signal(number)
    assert life.ends() == 128 + number, life.said()
    lines = [line for line in life.said().splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: stopped by signal {int(number)}; nothing half done is left, start again with: ahriuwu {words}"
    ]
    assert {p.name for p in tmp_path.iterdir()} == {"output.txt", "exit.txt"}


def _doom(here: Path) -> list[int]:
    """Engines that were started below a folder."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(cwd).startswith(str(here)):
                found.append(int(cwd.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_recorder_that_is_killed_takes_its_engine_along_and_the_next_clears_its_episodes(tmp_path, number):
    pytest.importorskip("vizdoom")
    (temporary := tmp_path / "temporary").mkdir()
    process = _fresh("record doom:basic --out d --episodes 9999", tmp_path, env=os.environ | {"TMPDIR": str(temporary)})
    _until(lambda: next(tmp_path.glob(".d.*.tmp/episodes/*"), None))
    (engine,) = _doom(temporary)
    own = Path(f"/proc/{engine}/cmdline").read_bytes().split(b"+viz_instance_id\0")[1].split(b"\0")[0].decode()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), err
    _until(lambda: not _doom(temporary) and not list(temporary.iterdir()))
    assert not list(Path("/dev/shm").glob(f"ViZDoom*{own}"))
    left = [p.name for p in tmp_path.iterdir() if p != temporary]
    if number == signal.SIGTERM:
        assert left == []
        assert err.count("error: stopped by signal 15") == 1
    else:
        assert len(left) == 1, left
        _write(tmp_path / "d")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "temporary"]


def _write(folder: Path, pause=lambda: None) -> None:
    with EpisodeWriter(folder, height=16, width=16, fps=10.0, action_space=SPACE) as writer:
        for _ in range(3):
            writer.add(np.zeros((5, 16, 16, 3), np.uint8), np.zeros((4, 2), np.float32))
        pause()


def test_what_a_killed_writer_left_is_cleared_by_the_next_and_what_a_live_one_fills_is_not(tmp_path):
    reads, writes = os.pipe()
    children = []
    for _ in range(2):
        gc.collect()  # a fork that frees FFmpeg's threads hangs
        children.append(os.fork())
        if not children[-1]:
            _write(tmp_path / "d", lambda: (os.write(writes, b"x"), time.sleep(60)))
    assert os.read(reads, 1) + os.read(reads, 1) == b"xx"
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    (tmp_path / ".d.partial-7").mkdir()  # not ours to judge
    (tmp_path / ".dd.7.tmp").mkdir()  # of another folder
    assert len(list(tmp_path.glob(".d.*.tmp"))) == 2
    _write(tmp_path / "d")
    try:
        (alive,) = tmp_path.glob(".d.*.tmp")
        assert len(list(alive.glob("episodes/*"))) == 3
        assert {p.name for p in tmp_path.iterdir()} == {"d", ".d.partial-7", ".dd.7.tmp", alive.name}
    finally:
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    assert {p.name for p in (tmp_path / "d" / "episodes").iterdir()} == {f"{i:06d}.safetensors" for i in range(3)}


def test_every_file_of_a_dataset_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, put = [], folders.put_in_place

    def put_in_place(new: Path, *rest) -> None:
        assert {str(p.relative_to(new)) for p in new.rglob("*")} | {"."} == set(synced)
        put(new, *rest)
        synced.append("in place")

    def sync(path: Path) -> None:
        inside = path.parts[path.parts.index(tmp_path.name) + 1 :]
        synced.append(str(Path(*inside[1:])) if inside else "parent")

    monkeypatch.setattr(folders, "put_in_place", put_in_place)
    monkeypatch.setattr(folders, "sync", sync)
    _write(tmp_path / "d")
    assert synced[-2:] == ["in place", "parent"]


def test_a_check_names_files_that_no_dataset_has(tmp_path):
    _write(tmp_path / "d")
    assert all(check.ok for check in validate(EpisodeStore.open(tmp_path / "d")) if "other files" in check.name)
    (tmp_path / "d" / "episodes" / "000077.safetensors").write_text("of another recording")
    (tmp_path / "d" / "notes.txt").write_text("mine")
    found = {c.name: c for c in validate(EpisodeStore.open(tmp_path / "d")) if not c.ok}
    among, beside = found["no other files among the episodes"], found["no other files"]
    assert (among.detail, among.warning) == ("000077.safetensors", False)
    assert (beside.detail, beside.warning) == ("unknown: notes.txt", True)


def test_a_signal_waits_for_the_end_of_what_must_not_be_broken_and_undoes_the_last_first(capfd):
    gc.collect()  # a fork that frees FFmpeg's threads hangs
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, lambda number, _: stopping.end(number, "stopped \x1b[31m"))
        with stopping.undoing(lambda: os.write(1, b"first")), stopping.undoing(lambda: 1 / 0):
            with stopping.undoing(lambda: os.write(1, b"never")):
                pass
            with stopping.undoing(lambda: os.write(1, b"last ")), stopping.unbroken():
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)
                os.write(1, b"whole ")
            os.write(1, b"not reached")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert tuple(capfd.readouterr()) == ("whole last first", "error: stopped \\x1b[31m\n")


def test_a_program_that_was_started_without_sigint_or_under_nohup_goes_on_without_them(place):
    process = subprocess.Popen(
        [*PROGRAM, "info", "data", "--json"], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: [signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGHUP)],
    )  # fmt: skip
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    time.sleep(0.25)
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b'"episodes"' in out


def test_an_interrupt_of_a_program_that_calls_ours_is_one_sentence(place, monkeypatch, capsys):
    from ahriuwu_cli import cli
    from ahriuwu_cli.data import describe

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "describe", interrupted)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", str(place / "data")])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"
