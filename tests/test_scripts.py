"""The scripts that make everything on a fresh machine take nothing away, and say what is wrong before the work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import collapse  # noqa: E402
import expected  # noqa: E402


def _run(script: Path, cwd: Path, **variables: str) -> tuple[int, str]:
    environment = os.environ | variables
    done = subprocess.run(
        ["bash", str(script)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


def _clone(folder: Path) -> None:
    """What the scripts need of the project, without an environment."""
    shutil.copytree(SCRIPTS, folder / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(SCRIPTS.parent / name, folder)


def test_the_demo_replaces_nothing_but_a_demos_results(tmp_path):
    (tmp_path / "my own").mkdir()
    (tmp_path / "my own" / "thesis.tex").touch()
    for out in ("my own", str(tmp_path / "my own")):
        code, err = _run(SCRIPTS / "demo.sh", tmp_path, OUT=out)
        assert (code, err.count("\n")) == (2, 1)
        assert "my own holds something else than a demo's results" in err
    assert [p.name for p in (tmp_path / "my own").iterdir()] == ["thesis.tex"]


def test_the_demo_reads_its_budget_before_the_work(tmp_path):
    code, err = _run(SCRIPTS / "demo.sh", tmp_path, BUDGET="5 minutes", OUT="new")
    assert (code, err) == (2, "error: BUDGET '5 minutes' is not a time: write 90s, 4m or 2h\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    there = [tmp_path / "mine"]
    for budget in ("14400", "10000s", "90.5s", "240m", "4h", "0.5h"):
        code, err = _run(SCRIPTS / "demo.sh", tmp_path, BUDGET=budget, OUT="mine")
        assert "holds something else than a demo's results" in err, err
    for budget in ("0s", "0.0", "0m", "99999h"):  # which the program itself would refuse in the third stage
        code, err = _run(SCRIPTS / "demo.sh", tmp_path, BUDGET=budget, OUT="new")
        assert (code, err) == (2, f"error: BUDGET '{budget}' is not a time: write 90s, 4m or 2h\n")
    assert list(tmp_path.iterdir()) == there


def test_a_python_that_is_not_there_is_not_called_old(tmp_path):
    _clone(tmp_path)
    code, err = _run(tmp_path / "scripts" / "demo.sh", tmp_path, PYTHON="python-of-nowhere")
    assert (code, err) == (2, "error: there is no python-of-nowhere: set PYTHON to a Python of 3.11 or newer\n")


def test_an_environment_that_was_killed_as_it_was_made_is_made_again(tmp_path):
    _clone(tmp_path)
    said, fake = tmp_path / "said", tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\nexit 1\n")  # it is there, and has no pip
    fake.chmod(0o755)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{said}"\n')
    python.chmod(0o755)
    assert _run(tmp_path / "scripts" / "demo.sh", tmp_path, PYTHON=str(python))[0] == 1  # this pip is none either
    assert said.read_text().splitlines()[-1] == "-m venv .venv"


def test_an_environment_of_other_releases_does_not_count_as_this_one(tmp_path):
    _clone(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")  # whatever it is asked to install, it has done
    python.chmod(0o755)
    (tmp_path / "use.sh").write_text('source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"\n')

    def marks() -> set[str]:
        assert _run(tmp_path / "use.sh", tmp_path, AHRIUWU_EXTRAS="doom")[0] == 0
        return {p.name for p in (tmp_path / ".venv").glob(".installed-*")}

    first, wanted = marks(), (tmp_path / "constraints.txt").read_text()
    (tmp_path / "constraints.txt").write_text(wanted + "# other releases\n")
    second = marks()
    assert len(second) == 1
    assert second != first
    (tmp_path / "constraints.txt").write_text(wanted)
    assert marks() == first


def test_training_scripts_leave_the_length_to_an_option_that_says_it(tmp_path):
    command = tmp_path / "bin" / "ahriuwu"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path / "said"}"\n')
    command.chmod(0o755)
    shutil.copy(command, command.parent / "torchrun")
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    state = tmp_path / "out" / "world" / "state" / "step-00000001" / "state.json"
    state.parent.mkdir(parents=True)
    state.touch()  # a run goes on by the same command: --resume would contradict --overwrite
    path = f"{command.parent}:{os.environ['PATH']}"
    for script, before in (("train_gpu.sh", []), ("train_torchrun.sh", ["2"])):
        for options, said in (
            ([], "--steps 100000"),
            (["--budget", "2h"], "--budget 2h"),
            (["--steps=7"], "--steps=7"),
            (["--overwrite"], "--overwrite"),
        ):
            (tmp_path / "said").unlink(missing_ok=True)
            words = ["bash", str(SCRIPTS / script), "data", str(tmp_path / "out"), *before, *options]
            subprocess.run(words, env=os.environ | {"PATH": path}, check=True, timeout=60)
            line = (tmp_path / "said").read_text()
            assert said in line
            assert line.count("--steps") + line.count("--budget") == 1, line
            assert "--resume" not in line


def test_a_job_that_comes_back_from_the_queue_does_not_start_over(tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, does in (
        ("scontrol", "echo node1"),
        ("srun", f'echo "$@" >> "{tmp_path / "said"}"'),
        ("ahriuwu", "false"),
    ):
        (bin / name).write_text(f"#!/bin/sh\n{does}\n")
        (bin / name).chmod(0o755)
    (tmp_path / "out" / "tokenizer").mkdir(parents=True)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "node1"}
    words = ["bash", str(SCRIPTS / "train_slurm.sh"), "my data", str(tmp_path / "out"), "--overwrite", "--lr", "1e-3"]
    for restarts, start in (("0", True), ("1", False)):
        (tmp_path / "said").unlink(missing_ok=True)
        there = {"PATH": f"{bin}:{os.environ['PATH']}", "SLURM_RESTART_COUNT": restarts}
        subprocess.run(words, env=os.environ | slurm | there, check=True, timeout=60)
        line = (tmp_path / "said").read_text()
        assert ("--overwrite" in line) is start
        assert line.endswith("--lr 1e-3\n")
        assert "--steps 500000" in line


@pytest.mark.parametrize("frames", ["0", "20", "49", "-25"])
def test_frames_that_no_stretch_would_look_at_are_refused(frames, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["collapse.py", "world", "dataset", "--frames", frames])
    with pytest.raises(SystemExit) as stop:
        collapse.main()
    assert stop.value.code == 2
    assert f"error: --frames {frames}: give a multiple of 25" in capsys.readouterr().err


def test_times_are_told_and_count_neither_as_right_nor_as_wrong(monkeypatch, capsys):
    done = {"ok": True, "failed": 0, "horizons": {"4": {"gain_db": {"value": 4.0}}}}
    slow = lambda *words, check=True: (999.0, done)  # noqa: E731
    monkeypatch.setattr(expected, "_run", slow)
    form = {"windows": 2, "scores": {"gain_4": [4.1, 0.2]}}
    of = {"record": ["doom:x"], "rollout_seconds": 6}
    lines = expected.verify({"seconds": 3}) + expected.world("w", of, form, Path("nowhere"))
    assert expected.count(lines) == (2, 2)
    assert sum(holds is None for *_, holds in lines) == 2
    form["scores"]["gain_4"] = [5.0, 0.2]
    assert expected.count(expected.world("w", of, form, Path("nowhere"))) == (0, 1)
    horizons, delta = {"4": {"gain_db": {"value": 4.0}}}, {"value": 3.0}
    summary = {"horizons": horizons, "action_delta_db": delta, "seconds": {"whole": 1e6}}
    assert expected.count(expected.demo({"gain_4": [4, 1], "minutes": [9, 4]}, summary)) == (1, 1)


@pytest.mark.parametrize(
    ("script", "arguments", "code", "words"),
    [
        ("collapse.py", ("nowhere", "nowhere"), 1, "error: there is no checkpoint at nowhere"),
        ("collapse.py", ("nowhere", "nowhere", "--prompts", "0"), 2, "--prompts and --context must be at least 1"),
        ("collapse.py", ("nowhere", "nowhere", "--json", "no/where.json"), 2, "there is no folder for --json"),
        ("long_rollout.py", ("nowhere",), 1, "error: there is no checkpoint at nowhere"),
        ("kill_test.py", ("--kills", "0"), 2, "must be above 0"),
        ("kill_test.py", ("--json", "no/where.json"), 2, "there is no folder for --json"),
    ],
)
def test_scripts_refuse_what_they_cannot_do_in_a_sentence_before_they_begin(tmp_path, script, arguments, code, words):
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr
