"""The whole toolkit once through on a real game, in small: what scripts/demo.sh does, command by command."""

import json
import subprocess
import sys

import pytest
from small import small_world

from ahriuwu_cli.training.checkpoint import save_world


def ahriuwu(*arguments, cwd):
    """Run the command line in its own process; returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "ahriuwu_cli", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_record_train_imagine_evaluate_sweep_and_verify_on_a_real_game(tmp_path):
    pytest.importorskip("vizdoom")
    commands = [
        "record doom:defend_the_center --out data --episodes 10 --size 32 --max-frames 48 --min-frames 28",
        "info data --check",
        "train tokenizer data --out tok --patch 8 --latent-dim 16",
        "train dynamics data --tokenizer tok --out run --steps 6 --batch 4 --preview-windows 4 --log-every 2",
        "rollout run data --out rollout --length 16",
        "eval run data --out eval --windows 4",
        "sweep-tau run data --out sweep --taus 0,.1,.5 --windows 4",
        "verify run --dataset data",
    ]
    for command in commands:
        code, _, err = ahriuwu(*command.split(), "--json", cwd=tmp_path)
        assert code == 0, (command, err)
    result = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert result["n"]["windows"] == 4
    assert set(result["horizons"]) == {"1", "4", "16"}
    assert not (tmp_path / "_vizdoom").exists()  # the engine litters the working directory, but not ours


@pytest.mark.parametrize("command", ["", "record", "import", "train", "train dynamics", "rollout", "eval", "sweep-tau"])
def test_help_needs_no_torch(command):
    """Help must answer within 0.3 s, which importing torch alone would exceed several times."""
    script = (
        "import sys; from ahriuwu_cli.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'numpy', 'matplotlib', 'av', 'rich', 'vizdoom', 'gymnasium'} & set(sys.modules)\n"
        "    assert stop.code == 0 and not heavy, heavy\n"
    )
    arguments = [*command.split(), "--help"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_debug_shows_the_traceback_and_nothing_else_does(tmp_path):
    save_world(small_world(), tmp_path / "world")
    quiet = ahriuwu("rollout", "world", "nowhere", "--out", "o", cwd=tmp_path)
    loud = ahriuwu("--debug", "rollout", "world", "nowhere", "--out", "o", cwd=tmp_path)
    assert quiet[0] == 3
    assert "Traceback" not in quiet[2]
    assert "Traceback" in loud[2]


def test_the_version_is_printed(tmp_path):
    from ahriuwu_cli import __version__

    assert ahriuwu("--version", cwd=tmp_path)[1].strip() == f"ahriuwu {__version__}"
