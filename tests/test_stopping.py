"""Real processes that are stopped or killed anywhere: the right exit code, one sentence, and nothing is left behind."""

import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small import SPACE, small_place

from ahriuwu_cli import cli, disk, folders, startup, stopping
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.validate import validate
from ahriuwu_cli.disk import arriving, clear_files, remove
from ahriuwu_cli.evaluation import sweep_plots

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


@pytest.mark.parametrize(("words", "code"), [("--version", 0), ("info nowhere", 3)])
def test_a_signal_while_python_takes_itself_down_leaves_the_code_as_it_is(place, words, code):
    last = (
        "import os, sys\n"
        "class Last:\n"  # it goes with the modules, when Python has given the handlers back
        f"    def __del__(self, kill=os.kill, me=os.getpid()): [kill(me, n) for n in {[int(n) for n in ENDS]}]\n"
        f"last, sys.argv = Last(), ['ahriuwu', *'{words}'.split()]\n"
        "from ahriuwu_cli.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", last], cwd=place, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == bool(code)


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


FEW = "--windows 3 --context 2 --horizon 2 --device cpu"
AT_ONCE = {  # and how many changes before the last one is that which puts it all in place
    f"eval world data --out a/made --looks none {FEW}": 1,
    f"eval world data --out a/made --looks none {FEW} --overwrite": 1,
    "eval score saved data --out a/made": 1,
    "rollout world data --out a/made --length 2 --context 2 --scale 1 --device cpu": 1,
    "eval merge planned --out made.csv": 3,
    "export world --out a/made --prompts data --split train --clips 1 --frames 4": 1,
    "import films --out a/made --size 16": 1,
    "record doom:basic --out a/made --episodes 2 --size 16": 1,
    "train tokenizer data --out a/made --patch 4 --latent-dim 4": 1,
    "eval merge planned --out made.csv --overwrite": 3,
}
PIECE_BY_PIECE = (
    f"sweep-tau world data --out a/made --taus 0,.1 --no-video --no-test {FEW}",
    f"eval generate world data --out a/made {FEW}",
)


@pytest.fixture(scope="module")
def scored(place) -> Path:
    """The same place with saved rollouts and a finished plan; and what matplotlib writes when it is first imported."""
    importlib.import_module("matplotlib.font_manager")
    (place / "plan.jsonl").write_text(
        '{"checkpoint": "world", "dataset": "data", "windows": 3, "context": 2, "horizon": 2}'
    )
    for words in (f"eval generate world data --out saved {FEW}", "eval plan plan.jsonl --out planned --device cpu"):
        assert _ended(words, place)[0] == 0
    return place


def _ended(words: str, cwd: Path, at: int = 0, by: int = signal.SIGTERM) -> tuple[int, str, int]:
    """Of a command in a fork: exit code, what it said on stderr, and how often it changed what lies on the disk.

    at: the change right after which it gets the signal `by`.
    """
    gc.collect()  # a fork that frees FFmpeg's threads hangs
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        count, code = 0, 70

        def counted(real):
            def call(*arguments, **named):
                nonlocal count
                result, count = real(*arguments, **named), count + 1
                if count == at:
                    os.kill(os.getpid(), by)
                return result

            return call

        try:
            for name in ("fsync", "mkdir", "rename", "replace", "link"):
                setattr(os, name, counted(getattr(os, name)))
            folders.exchange, startup._stop = counted(folders.exchange), None
            os.chdir(cwd)
            error = os.open(cwd / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(error, 2)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", closefd=False)  # noqa: SIM115
            sys.argv = ["ahriuwu", *words.split()]
            cli.main()
        except SystemExit as end:
            code = end.code
        finally:
            sys.stderr.flush()
            os.write(writes, str(count).encode())
            os._exit(code)
    os.close(writes)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = int(os.read(reads, 99) or 0)
    os.close(reads)
    said = (cwd / "said").read_text()
    (cwd / "said").unlink()
    return code, said, changes


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def bench(scored, tmp_path, monkeypatch) -> Path:
    """A folder with everything that is read, and no figures of sweeps, which take most of the time."""
    for draw in ("plot_gain_by_tau", "plot_sweep_curves", "plot_gain_map"):
        monkeypatch.setattr(sweep_plots, draw, lambda _, path: path.write_bytes(b""))
    for name in ("world", "data", "films", "saved", "planned"):
        (tmp_path / name).symlink_to(scored / name)
    return tmp_path


@pytest.mark.parametrize("words", AT_ONCE)
def test_what_is_stopped_while_it_writes_its_results_has_left_all_of_them_or_what_was_there(bench, words):
    if "doom" in words:
        pytest.importorskip("vizdoom")
    changes, before = _ended(words, bench)[2], AT_ONCE[words]
    whole = _contents(bench)
    if "--overwrite" in words:
        changes = _ended(words, bench)[2]
    for moment in (changes - before - 1, changes - before):
        if "--overwrite" not in words:
            for name in {Path(name).parts[0] for name in _contents(bench)}:
                remove(bench / name)
        seen = _contents(bench)
        code, said, _ = _ended(words, bench, at=moment)
        assert (code, said.count("error: ")) == (143, 1), said
        assert not list(bench.rglob(".*"))
        if moment == changes - before:
            assert f"{words.split()[words.split().index('--out') + 1]} is complete" in said
            assert _contents(bench).keys() == whole.keys()
        else:
            assert f"nothing half done is left, start again with: ahriuwu {words}" in said
            assert _contents(bench) == seen


@pytest.mark.parametrize(
    "words", [*PIECE_BY_PIECE, "eval merge planned --out made.csv --overwrite", "eval plan plan.jsonl --out made"]
)
def test_files_that_a_killed_command_left_go_with_the_next(bench, scored, words):
    (bench / "plan.jsonl").symlink_to(scored / "plan.jsonl")
    changes, left, dead = _ended(words, bench)[2], 0, -signal.SIGKILL
    for moment in range(1, changes + 1, max(1, changes // 8)):
        for made in ("a", "made"):
            shutil.rmtree(bench / made, ignore_errors=True)
        assert _ended(words, bench, at=moment, by=signal.SIGKILL)[0] == dead
        left += bool(list(bench.rglob(".*")))
        assert _ended(words, bench)[0] == 0
        assert not list(bench.rglob(".*")), moment
    assert left


@pytest.mark.parametrize("change", [Path.unlink, lambda path: os.replace(path.with_name("other"), path)])
def test_a_file_whose_name_was_taken_away_before_it_had_its_lock_is_not_held(tmp_path, monkeypatch, change):
    (tmp_path / "other").touch()
    locked, files = disk.lock, []

    def late(*arguments, **options):
        if not files:
            files.extend(p for p in tmp_path.iterdir() if p.name != "other")
            change(files[0])
        return locked(*arguments, **options)

    monkeypatch.setattr(disk, "lock", late)
    assert disk.hold(tmp_path / "a", os.O_RDWR | os.O_CREAT) is None
    files.clear()
    (tmp_path / "a").unlink(missing_ok=True)
    (tmp_path / "other").touch()
    with arriving(tmp_path / "a") as hidden, open(hidden, "rb") as file:
        assert len(files) == 1
        with pytest.raises(BlockingIOError):
            locked(file.fileno())  # what has the name is what is held


def test_files_that_are_being_written_stay_and_what_is_not_ours(tmp_path):
    reads, writes = os.pipe()
    children = []
    for _ in range(2):
        gc.collect()
        children.append(os.fork())
        if not children[-1]:
            with arriving(tmp_path / "a.csv") as hidden:
                hidden.write_text("half")
                os.write(writes, b"x")
                time.sleep(60)
    assert os.read(reads, 1) + os.read(reads, 1) == b"xx"
    os.kill(children[0], signal.SIGKILL)
    os.waitpid(children[0], 0)
    for name in (".a.csv.7.tmp", "..a.csv.7.tmp.8.tmp"):
        (tmp_path / name).touch()
    others = {"a.csv", ".b.csv.7.tmp", ".a.csv.tmp", ".a.csv.x.tmp", ".a.csv.9.tmp", ".a.csv.10.tmp"}
    for name in others:
        if name == ".a.csv.9.tmp":
            (tmp_path / name).symlink_to("a.csv")
        else:
            os.mkfifo(tmp_path / name) if name == ".a.csv.10.tmp" else (tmp_path / name).touch()
    try:
        clear_files(tmp_path, r"a\.csv")
        (alive,) = {p.name for p in tmp_path.iterdir()} - others
        assert (tmp_path / alive).read_text() == "half"
    finally:
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
    clear_files(tmp_path, r"a\.csv")
    assert {p.name for p in tmp_path.iterdir()} == others
    clear_files(tmp_path / "nowhere", ".+")


@pytest.mark.parametrize("words", PIECE_BY_PIECE)
@pytest.mark.parametrize("moment", [2, 3, 5])
def test_what_is_stopped_as_it_begins_goes_on_by_the_command_that_it_says(bench, words, moment):
    code, said, _ = _ended(words, bench, at=moment)
    assert (code, said.count("error: ")) == (143, 1), said
    assert f"nothing half done is left, start again with: ahriuwu {words}" in said
    assert not list(bench.rglob(".*"))
    assert _ended(words, bench)[0] == 0
    if "generate" in words:
        assert _ended("eval score a/made data --out a/score", bench)[0] == 0


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


def test_a_thread_that_an_environment_left_behind_keeps_no_process_alive():
    code = """
import threading, time
from ahriuwu_cli import startup
startup.begin()
threading.Thread(target=time.sleep, args=(600,)).start()
print("a result")
startup.ended(3)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (3, b"a result\n")


def test_a_folder_that_nobody_may_look_into_goes_with_its_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as of one of mode 000

    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders, "hold", refused)
    with pytest.raises(PermissionError), folders.replacing(tmp_path / "o"):
        pass
    assert list(tmp_path.iterdir()) == []


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


def test_no_second_signal_cuts_the_undoing_short(capfd):
    def undo():
        calls.append(None)
        if len(calls) == 1:
            for number in ENDS:
                os.kill(os.getpid(), number)
            time.sleep(0)
        os.write(1, b"undone ")

    gc.collect()
    child = os.fork()
    if not child:
        calls = []
        for number in ENDS:
            signal.signal(number, lambda number, _: stopping.end(number, f"stopped by {number}"))
        with stopping.undoing(undo):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    assert tuple(capfd.readouterr()) == ("undone ", "error: stopped by 15\n")


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
