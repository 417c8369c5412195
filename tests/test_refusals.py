"""Disks that are full and streams that are closed, full or gone: one sentence, the right exit code, nothing half done.

Disks are made full by a limit on the size of files; streams are real descriptors of real processes.
"""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small import small_place

from ahriuwu_cli import cli
from ahriuwu_cli.disk import call_it, visible

AHRIUWU = f"{sys.executable} -m ahriuwu_cli"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Worlds, data and videos."""
    folder = small_place(tmp_path_factory.mktemp("refusals"), {"a.mp4": 9})
    (folder / "plan.jsonl").write_text(json.dumps({"checkpoint": "world", "dataset": "data", **WINDOWS}))
    for words in ("plan {0}/plan.jsonl --out {0}/planned", "generate {0}/world {0}/data --out {0}/saved " + FEW):
        with pytest.raises(SystemExit) as done:
            cli.main(["eval", *words.format(folder).split(), "--device", "cpu"])
        assert not done.value.code
    return folder


WINDOWS = {"split": "train", "windows": 4, "context": 2, "horizon": 3}
FEW = "--split train --windows 4 --context 2 --horizon 3"
FULL = {  # largest file in bytes, the command, the place that is named, what may be there afterwards
    "record a dataset": (4000, "import {0}/films --out made", "made", []),
    "rollout, its arrays": (8000, "rollout {0}/world {0}/data --out made --length 20 --context 4", "made", []),
    "rollout, its GIF": (40000, "rollout {0}/world {0}/data --out made --length 20 --context 4", "made", []),
    "rollout, its film": (  # while it grows: FFmpeg's own OSError
        150_000, "rollout {0}/world {0}/data --out made --length 60 --scale 8 --actions random", "made", [],
    ),
    "rollout, deep": (8000, "rollout {0}/world {0}/data --out a/made --length 20 --context 4", "a/made", []),
    "export": (8000, "export {0}/world --out made", "made", []),
    "export, its prompts": (
        27000, "export {0}/world --out made --prompts {0}/data --split train --clips 1 --frames 40", "made", [],
    ),
    "tokenizer": (2000, "train tokenizer {0}/data --out made --patch 8 --latent-dim 6", "made", []),
    "eval": (2000, "eval {0}/world {0}/data --out made --looks none " + FEW, "made", []),
    "eval score": (2000, "eval score {0}/saved {0}/data --out made", "made", []),
    "eval merge": (100, "eval merge {0}/planned --out made.csv", "made.csv", []),
    "eval generate": (
        9000, "eval generate {0}/world {0}/data --out made " + FEW, "made/part-000000-000004.safetensors",
        ["saved.json", "windows.json"],
    ),
    "sweep-tau": (
        2000, "sweep-tau {0}/world {0}/data --out made --taus 0,.1 --no-test " + FEW, "made/cells/*.safetensors", None,
    ),
    "sweep-tau, its beginning": (
        100, "sweep-tau {0}/world {0}/data --out made --taus 0,.1 --no-test " + FEW, "made", [],
    ),
    "eval plan": (2000, "eval plan {0}/plan.jsonl --out made", "made/cells/*.json", None),
}  # fmt: skip


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_is_one_sentence_that_names_what_was_asked_for_and_the_command_works_when_there_is_room(
    start, place, tmp_path, what
):
    largest, words, named, left = FULL[what]
    life = start(words.format(place), tmp_path, largest_file=largest)
    assert life.ends() == 1, life.said()
    (sentence,) = [line for line in life.said().splitlines() if line.startswith("error: ")]
    told, _, rest = sentence.removeprefix("error: ").partition(" would be larger than files may be (File too large): ")
    advice = "raise the limit on the size of files (`ulimit -f`), or choose another --out"
    assert rest[: len(advice)] == advice[: len(rest)]  # its output goes to a file that is limited as well
    assert rest.startswith("raise the limit")
    assert Path(told).match(named), sentence
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    if left is not None:
        assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == sorted([*left, "exit.txt", "output.txt"])
    life = start(words.format(place), tmp_path)
    assert life.ends() == 0, life.said()


def test_an_error_names_what_people_call_a_file_and_not_a_hidden_name(tmp_path):
    hidden = tmp_path / ".d.77.tmp"
    for inside in (str(hidden), f"{hidden}/episodes/0", os.fsencode(hidden / "x")):
        error = OSError(errno.EACCES, "no", inside)
        call_it(error, tmp_path / "d", hidden)
        assert error.filename == str(tmp_path / "d")
    for errors, named in (((errno.ENOSPC, "full"), str(tmp_path / "d")), ((errno.EPIPE, "gone"), None)):
        error = OSError(*errors)
        call_it(error, tmp_path / "d", hidden)
        assert error.filename == named
    error = OSError(errno.ENOSPC, "full", f"{hidden}2")
    call_it(error, tmp_path / "d", hidden)
    assert error.filename == f"{hidden}2"
    assert visible("a/.b.tmp.12.tmp/c/.d.mp4.partial-7") == "a/b.tmp/c/d.mp4"
    assert visible(".config/x.12.tmp") == ".config/x.12.tmp"
    assert visible("r/state/.step-3.partial/state.safetensors.partial") == "r/state/step-3/state.safetensors"
    assert visible("r/.step-3.partial/state.json.partial") == "r/step-3/state.json"
    assert visible("a/x.partial") == "a/x.partial"


REFUSED = {
    errno.ENOSPC: "no room for its output (",
    errno.EDQUOT: "no room for its output (",
    errno.EFBIG: "its output would be larger than files may be (",
    errno.EROFS: "its output is on a disk that cannot be written to (",
    errno.EIO: "the disk of its output fails (",
}


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_too_many_open_files_are_a_sentence_on_their_limit(monkeypatch, capsys, number):
    from ahriuwu_cli.training import describe

    def refused():
        raise OSError(number, os.strerror(number), "some/module.py")

    monkeypatch.setattr(describe, "describe_sizes", refused)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: too many open files: raise the limit (`ulimit -n`)\n"


def test_no_folder_for_temporary_files_is_a_sentence(monkeypatch, capsys):
    import tempfile

    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/at/all"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == (
        "error: no folder for temporary files can be written to: make room in /tmp, or set TMPDIR to another one\n"
    )


@pytest.mark.parametrize("number", REFUSED)
def test_a_disk_that_refuses_without_a_name_is_a_sentence_on_out(monkeypatch, capsys, number):
    from ahriuwu_cli.training import describe

    def refused():
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(describe, "describe_sizes", refused)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info"])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {REFUSED[number]}{os.strerror(number)}): ")
    assert said.count("\n") == 1
    assert cli._out(["rollout", "w", "--out", "a b"]) == cli._out(["rollout", "--out=a b", "w"]) == "a b"


def _shell(line: str, cwd: Path) -> tuple[int, str, str]:
    """Exit code of the first process of a pipe, and what was said."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"], cwd=cwd, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


STDOUT = {  # how a command is run, its exit code, what it says
    "{} info data >&-": (0, ""),
    "{} info data <&- >&- 2>&-": (0, ""),
    "{} info data 2>&-": (0, None),
    "{} info data | true": (141, ""),
    "{} --help | true": (141, ""),
    "{} | true": (141, ""),
    "{} info data >/dev/full": (1, "error: stdout takes no output (No space left on device): send it elsewhere"),
    "{} --version >/dev/full": (1, "error: stdout takes no output (No space left on device): send it elsewhere"),
    "{} info data >/dev/full 2>&1": (1, ""),
    "{} info nowhere 2>/dev/full": (3, ""),
    "{} info nowhere 2>&-": (3, ""),
}


@pytest.mark.parametrize("line", STDOUT)
def test_streams_that_are_closed_full_or_gone_end_in_the_right_code_and_no_internal_error(place, line):
    code, said = STDOUT[line]
    found, out, err = _shell(line.format(AHRIUWU), place)
    assert found == code, err
    if said is None:
        assert "episodes" in out
    else:
        assert out == ""
        assert err.startswith(said) if said else err == ""
        assert err.count("\n") <= 1


TRAIN = (
    f"{AHRIUWU} train tokenizer data --kind transformer --patch 8 --tokens 4 --latent-dim 6 --steps 4 --batch 2 "
    "--frames 4 --log-every 1 --device cpu --overwrite --out {}"
)


@pytest.mark.parametrize(("streams", "code"), [("2>&1 | head -c 10", 141), (">/dev/full 2>&-", 1)])
def test_a_run_goes_on_to_its_end_when_nobody_listens_any_more(place, tmp_path, streams, code):
    found, _, err = _shell(f"{TRAIN.format(tmp_path / 'run')} {streams}", place)
    assert found == code, err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4
    assert (tmp_path / "run" / "tokenizer" / "config.json").is_file()
