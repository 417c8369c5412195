"""What a shell or a cluster leaves around a command: variables, a folder that is gone, no home, no compiler."""

import os
import shlex
import shutil
import subprocess
import sys

import pytest
from small import small_place

from ahriuwu_cli.errors import UserError
from ahriuwu_cli.places import keep_apart
from ahriuwu_cli.printing import one_sentence, printable
from ahriuwu_cli.training import restart
from ahriuwu_cli.training.restart import launcher, stoppable

TRAIN = "train dynamics data --tokenizer world/tokenizer --steps 1 --batch 2 --frames 4 --preview-windows 2"
RANKS = {  # variables of torchrun -> exit code of training, what it says
    "WORLD_SIZE=abc": (0, "1 steps in"),
    "GROUP_WORLD_SIZE=abc WORLD_SIZE=2": (0, "1 steps in"),
    "RANK=1 WORLD_SIZE=many": (2, "error: the environment variable WORLD_SIZE is 'many', not a whole number"),
    "RANK=1 WORLD_SIZE=1": (2, "error: RANK 1 is not below WORLD_SIZE 1: unset both"),
    "RANK=0 WORLD_SIZE=2": (2, "error: RANK 0 of WORLD_SIZE 2 finds no other processes"),
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x": (2, "error: RANK 0 of WORLD_SIZE 2 finds no other"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return small_place(tmp_path_factory.mktemp("environment"), {})


def ahriuwu(before: str, words: str, cwd) -> tuple[int, str]:
    """Exit code and what was said by a command after the lines `before` of a shell."""
    done = subprocess.run(
        ["bash", "-c", f"{before} {sys.executable} -m ahriuwu_cli {words}"], cwd=cwd, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("variables", RANKS)
def test_variables_of_a_launcher_that_is_not_there_are_ignored_or_refused_in_a_sentence(place, variables, tmp_path):
    code, said = RANKS[variables]
    found = ahriuwu(variables, f"{TRAIN} --out {tmp_path / 'run'}", place)
    assert found[0] == code, found[1]
    assert said in found[1]
    assert (tmp_path / "run").exists() == (code == 0)


@pytest.mark.parametrize("variables", RANKS)
def test_how_a_run_is_started_again_is_told_whatever_the_variables_are(variables, monkeypatch):
    for each in variables.split():
        monkeypatch.setenv(*each.split("="))
    with stoppable():
        assert launcher().startswith("torchrun") == ("RANK=0" in variables)


def test_the_command_of_several_nodes_says_where_they_meet(monkeypatch):
    where = {"RANK": 0, "WORLD_SIZE": 16, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 8, "GROUP_WORLD_SIZE": 2}
    for name, value in (where | {"MASTER_ADDR": "node7"}).items():
        monkeypatch.setenv(name, str(value))
    said = launcher()
    assert said.startswith("torchrun --nnodes 2 --rdzv-backend c10d --rdzv-endpoint node7:29400 --nproc-per-node 8 ")


def test_the_command_to_type_starts_this_very_program(monkeypatch, tmp_path):
    words = ["train", "dynamics", "data"]
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ahriuwu").write_text("#!/bin/sh\n")
        (tmp_path / name / "ahriuwu").chmod(0o755)
    program = str(tmp_path / "mine" / "ahriuwu")
    ways = {
        "ahriuwu": ("mine", ["python", program], program),
        program: ("other", ["python", program], program),
        "./ahriuwu": ("nothing", ["python", "./ahriuwu"], "./ahriuwu"),
        "/bin/python -m ahriuwu_cli": ("other", ["/bin/python", "-m", "ahriuwu_cli"], "/x/__main__.py"),
        "python -u -X dev -m ahriuwu_cli": (
            "mine",
            ["python", "-u", "-X", "dev", "-m", "ahriuwu_cli"],
            "/x/__main__.py",
        ),
    }
    monkeypatch.chdir(tmp_path / "mine")
    for typed, (found, started, named) in ways.items():
        monkeypatch.setenv("PATH", str(tmp_path / found))
        monkeypatch.setattr(sys, "orig_argv", [*started, *words])
        monkeypatch.setattr(sys, "argv", [named, *words])
        assert restart.command_line() == f"{typed} train dynamics data"


@pytest.mark.parametrize(("typed", "goes_on"), [
    ("train dynamics data --out r", "train dynamics data --out r --resume"),
    ("train dynamics --resume --out r -- -odd", "train dynamics --out r --resume -- -odd"),
    ("train dynamics --out 'a b' -- '--resume'", "train dynamics --out 'a b' --resume -- --resume"),
    ("train dynamics --out 'a -- b' data", "train dynamics --out 'a -- b' data --resume"),
])  # fmt: skip
def test_resume_stands_before_the_end_of_options(monkeypatch, typed, goes_on):
    monkeypatch.setattr(sys, "argv", ["ahriuwu", *shlex.split(typed)])
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    assert restart.resuming(restart.command_line()) == f"ahriuwu {goes_on}"


ODD = [
    "my  runs", "tab\tx", "a\nb", " end ", "\u00a0", "em\u2003space", "it's", "it's\n\\n", '"', "$HOME`x`", "\x1b[31m",
    "\u202eabc", "ü 漢", "\udce9", "\udce9\n9", "\x01f", "\x9f", "a -- b", "*", "", "~", "d" * 5000, "!", "a\r\nb",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_the_printed_command_is_what_was_typed_whatever_is_in_it(monkeypatch):
    words = ["train", "dynamics", *ODD, "--out=a\t b", "--", "\n--"]
    monkeypatch.setattr(sys, "argv", ["ahriuwu", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    resumed = [*words[:-2], "--resume", *words[-2:]]
    for command, meant in ((restart.typed(), words), (restart.resuming(restart.command_line()), resumed)):
        said = one_sentence(f"stopped\n  by {'x' * 9000}; go on with: {command}")
        assert (said[:12], len(said.partition("; go on")[0]) < 2100) == ("stopped by x", True)
        pasted = said.split("go on with: ahriuwu ")[1]
        got = subprocess.run(["bash", "-c", f"printf '%s\\0' {pasted}"], capture_output=True, check=True).stdout
        assert [os.fsdecode(word) for word in got.split(b"\0")[:-1]] == meant
        assert printable(pasted) == pasted


@pytest.mark.parametrize("variable", [
    "TQDM_MININTERVAL=abc", "TQDM_NCOLS=wide", "TQDM_BAR_FORMAT={nope}", "_AHRIUWU_COMPLETE=complete_bash",
    "_AHRIUWU_COMPLETE=bogus",
])  # fmt: skip
def test_variables_that_a_library_dies_of_are_named(place, variable):
    code, said = ahriuwu(f"export {variable};", f"info {place}/data", place)
    assert (code, said.count("\n"), said.count("error: ")) == (2, 1, 1), said
    assert variable.partition("=")[0] in said


def test_variables_that_say_no_and_a_shell_that_completes_are_served(place):
    code, said = ahriuwu("AHRIUWU_DEBUG=0 TQDM_NCOLS=60", f"info {place}/nowhere", place)
    assert (code, said.count("\n")) == (3, 1), said
    code, said = ahriuwu("_AHRIUWU_COMPLETE=complete_bash COMP_WORDS='ahriuwu ev' COMP_CWORD=1", "", place)
    assert (code, said.split()) == (0, ["eval"])


def test_a_current_folder_that_is_gone_is_one_sentence(place):
    for words in ("--version", f"rollout {place}/world {place}/data --out {place}/made"):
        code, said = ahriuwu("mkdir gone; cd gone; rmdir ../gone;", words, place)
        assert code == 2
        assert said == "error: the current folder cannot be used (No such file or directory): change to another one\n"


def test_a_user_whom_the_system_does_not_know_has_no_home_to_protect(tmp_path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    keep_apart(tmp_path / "out", [tmp_path / "data"])
    with pytest.raises(UserError, match="which is read"):
        keep_apart(tmp_path / "data", [tmp_path / "data"])


@pytest.mark.parametrize("variables", ["CXX=/nowhere/g++", pytest.param("CXX=/bin/true", marks=pytest.mark.slow)])
def test_without_a_compiler_compile_is_refused_before_anything_is_written(place, variables):
    fresh = f"TORCHINDUCTOR_CACHE_DIR={place}/none-{variables[-3:]} {variables}"  # nothing that was compiled before
    for words in ("rollout world data --split train --length 2 --compile --out no", f"{TRAIN} --compile --out no"):
        code, said = ahriuwu(fresh, f"{words} --device cpu", place)
        assert code == 2, said
        assert said.splitlines()[-1].startswith("error: --compile does not work on this machine (")
        assert not (place / "no").exists()


def test_a_backend_of_matplotlib_that_is_nowhere_is_not_asked_for(place):
    words = "eval world data --out made --looks none --split train --windows 2 --context 2 --horizon 3"
    code, said = ahriuwu("MPLBACKEND=nowhere", words, place)
    assert code == 0, said
    assert (place / "made" / "curve.png").is_file()


@pytest.mark.parametrize("all_of_them", [False, True])
def test_only_what_torchrun_started_ends_with_its_parent(monkeypatch, all_of_them):
    asked = []
    monkeypatch.setattr(restart, "_end_with_parent", lambda: asked.append(1))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # a shell may have kept it
    if all_of_them:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            monkeypatch.setenv(name, value)
    stoppable()
    assert bool(asked) == all_of_them
