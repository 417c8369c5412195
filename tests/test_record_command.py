"""record, import and info at the command line: what they make; bad input gets one sentence and changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ahriuwu_cli.cli import main
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.video_writing import write_mp4


def _run(capsys, *arguments):
    """Exit code, standard output, standard error."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _films(folder, n=3):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(n):
        write_mp4(folder / f"{i}.mp4", rng.integers(0, 256, (12, 32, 32, 3), np.uint8), 10)
        (folder / f"{i}.csv").write_text("action\n" + "".join(f"{rng.integers(3)}\n" for _ in range(11)))


def test_record_makes_a_dataset_that_info_describes_and_finds_sound(here, capsys):
    pytest.importorskip("vizdoom")
    options = ("--episodes", 3, "--max-frames", 40, "--size", "32x48", "--seed", 7)
    code, out, _ = _run(capsys, "record", "defend_the_center", "--out", "d", *options, "--json")
    assert code == 0
    assert json.loads(out)["splits"]["train"]["episodes"] == 1
    store = EpisodeStore.open("d")
    assert (store.height, store.width, store.fps) == (32, 48, 8.75)
    assert _run(capsys, "record", "doom:defend_the_center", "--out", "e", *options)[0] == 0
    again = EpisodeStore.open("e")
    assert [e.sha256 for e in again.episodes()] == [e.sha256 for e in store.episodes()]
    code, out, _ = _run(capsys, "info", "d", "--check")
    assert code == 0
    assert "TURN_LEFT" in out
    assert "FAIL" not in out
    assert sorted(p.name for p in here.iterdir()) == ["d", "e"]


def test_record_stops_after_the_episode_that_reaches_the_frames(here, capsys):
    pytest.importorskip("vizdoom")
    options = ("--frames", 70, "--max-frames", 32, "--json")
    assert _run(capsys, "record", "defend_the_center", "--out", "d", *options)[0] == 0
    assert len(EpisodeStore.open("d").episodes()) == 3


def test_import_makes_a_dataset_and_says_what_it_guessed(here, capsys):
    _films(here / "films")
    code, _, err = _run(capsys, "import", "films", "--out", "deep/d", "--size", 16)
    assert code == 0
    assert "note: inferred one discrete action" in err
    code, out, _ = _run(capsys, "info", "deep/d", "--json", "--check")
    facts = json.loads(out)
    assert code == 0
    assert facts["sound"]
    assert sum(row["share"] for row in facts["actions"]["action"]) == pytest.approx(1)


def test_info_exits_1_when_a_check_fails(here, capsys):
    _films(here / "films")
    _run(capsys, "import", "films", "--out", "d")
    file = EpisodeStore.open("d").file("000000")
    file.write_bytes(file.read_bytes()[:-1] + b"\x00")
    code, out, _ = _run(capsys, "info", "d", "--check")
    assert code == 1
    assert "FAIL" in out


def test_ctrl_c_while_recording_exits_130_and_leaves_nothing(here):
    pytest.importorskip("vizdoom")
    (here / "temporary").mkdir()
    command = [sys.executable, "-m", "ahriuwu_cli", "record", "defend_the_center", "--out", "d", "--episodes", "9999"]
    environment = os.environ | {"TMPDIR": str(here / "temporary")}
    process = subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
    )
    deadline = time.monotonic() + 60
    while not list(here.glob(".d.*.tmp/episodes/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert [str(p.relative_to(here)) for p in here.rglob("*")] == ["temporary"]


BAD = [
    (["record", "doom:defend_the_centre", "--out", "x"], 2, "did you mean 'defend_the_center'"),
    (["record", "gym:ALE/Brekout-v5", "--out", "x"], 2, "did you mean 'ALE/Breakout-v5'"),
    (["record", "dom:basic", "--out", "x"], 2, "did you mean 'doom'"),
    (["record", "doom:basic"], 2, "--out"),
    (["record", "doom:basic", "--out", "films"], 2, "left alone"),
    (["record", "doom:basic", "--out", "note.txt"], 2, "not a folder"),
    (["record", "doom:basic", "--out", "data"], 2, "--overwrite"),
    (["record", "doom:basic", "--out", "x", "--size", "huge"], 2, "'huge'"),
    (["record", "doom:basic", "--out", "x", "--size", "0"], 2, "'0'"),
    (["record", "doom:basic", "--out", "x", "--episodes", "0"], 2, "--episodes"),
    (["record", "doom:basic", "--out", "x", "--episodes", "many"], 2, "--episodes"),
    (["record", "doom:basic", "--out", "x", "--frame-skip", "0"], 2, "--frame-skip"),
    (["record", "doom:basic", "--out", "x", "--min-frames", "600"], 2, "600 to 512"),
    (["record", "doom:basic", "--out", "x", "--hold-min", "9"], 2, "9 to 8"),
    (["record", "doom:basic", "--out", "x", "--splits", "0.8,0.2"], 2, "three shares"),
    (["record", "doom:basic", "--out", "x", "--splits", "0.8,0.2,0.2"], 2, "sum to 1"),
    (["record", "doom:basic", "--out", "x", "--min-frames", "400", "--frame-skip", "300"], 3, "lower --min-frames"),
    (["import", "nowhere", "--out", "x"], 3, "not a folder"),
    (["import", "note.txt", "--out", "x"], 3, "not a folder"),
    (["import", "empty", "--out", "x"], 3, "no video file"),
    (["import", "films", "--out", "data"], 2, "--overwrite"),
    (["import", "films", "--out", "x", "--fps", "-3"], 2, "-3"),
    (["import", "films", "--out", "x", "--fps", "5"], 3, "has actions"),
    (["import", "films", "--out", "x", "--max-frames", "5"], 3, "more than 5 frames"),
    (["import", "broken", "--out", "x"], 3, "cannot be read"),
    (["info", "nowhere"], 3, "does not exist"),
    (["info", "films"], 3, "not a dataset, world, tokenizer or run"),
    (["info", "note.txt"], 3, "not a dataset, world, tokenizer or run"),
]


@pytest.mark.parametrize(("arguments", "code", "sentence"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_input_gets_one_sentence_and_changes_nothing(here, capsys, arguments, code, sentence):
    if arguments[0] == "record":
        pytest.importorskip("ale_py" if "ALE" in arguments[1] else "vizdoom")
    _films(here / "films", 1)
    _run(capsys, "import", "films", "--out", "data")
    (here / "note.txt").write_text("hello")
    (here / "empty").mkdir()
    (here / "broken").mkdir()
    (here / "broken" / "a.mp4").write_text("no video")
    before = {p: p.read_bytes() if p.is_file() else None for p in here.rglob("*")}
    found, _, err = _run(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert found == code, err
    assert len(lines) == 1, err
    assert sentence in lines[0]
    assert "Traceback" not in err
    assert {p: p.read_bytes() if p.is_file() else None for p in here.rglob("*")} == before
