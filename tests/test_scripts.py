"""The scripts that make everything on a fresh machine take nothing away, and say what is wrong before the work."""

import os
import shutil
import subprocess
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def _run(script: Path, cwd: Path, **variables: str) -> tuple[int, str]:
    environment = os.environ | variables
    done = subprocess.run(
        ["bash", str(script)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr


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
    assert list(tmp_path.iterdir()) == []


def test_a_python_that_is_not_there_is_not_called_old(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(SCRIPTS.parent / name, tmp_path)
    code, err = _run(tmp_path / "scripts" / "demo.sh", tmp_path, PYTHON="python-of-nowhere")
    assert (code, err) == (2, "error: there is no python-of-nowhere: set PYTHON to a Python of 3.11 or newer\n")


def test_an_environment_that_was_killed_as_it_was_made_is_made_again(tmp_path):
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(SCRIPTS.parent / name, tmp_path)
    said, fake = tmp_path / "said", tmp_path / ".venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text("#!/bin/sh\nexit 1\n")  # it is there, and has no pip
    fake.chmod(0o755)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> "{said}"\n')
    python.chmod(0o755)
    assert _run(tmp_path / "scripts" / "demo.sh", tmp_path, PYTHON=str(python))[0] == 1  # this pip is none either
    assert said.read_text().splitlines()[-1] == "-m venv .venv"
