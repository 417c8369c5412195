"""Real processes that are killed, stopped, starved of disk and doubled: nothing is lost, and what goes on is exact.

The long version is scripts/kill_test.py.
"""

import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from killing import DYNAMICS, TOKENIZER, Life, Nursery, differing_bytes, live_and_die, prepare, wait_for

from ahriuwu_cli.data.documents import read_object, to_json

STEPS = 32
COMMANDS = {"dynamics": f"{DYNAMICS} --steps {STEPS}", "tokenizer": f"{TOKENIZER} --steps {STEPS}"}
PRODUCTS = {"dynamics": "last", "tokenizer": "tokenizer"}
both = pytest.mark.parametrize("kind", COMMANDS)


@pytest.fixture(scope="module")
def start():
    with Nursery() as start:
        yield start


@pytest.fixture(scope="module")
def place(tmp_path_factory, start) -> Path:
    """Data, a tokenizer, and an unbroken run of each kind."""
    folder = tmp_path_factory.mktemp("kill")
    prepare(folder)
    for kind, command in COMMANDS.items():
        life = start(command, folder / f"{kind} whole")
        assert life.ends() == 0, life.said()
    return folder


def end(life: Life) -> tuple[int, str]:
    return life.ends(), life.said()


def snapshot(folder: Path) -> dict[Path, int]:
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.name not in ("output.txt", "exit.txt", folder.name)
    }


def forget_the_states(run: Path) -> None:
    """Let run.json say what it says before the first one is saved."""
    document = read_object(run / "run.json")
    assert document.pop("state_saved") is True
    (run / "run.json").write_text(to_json(document, 1) + "\n")


def until_saved(life: Life, run: Path, states: int = 1) -> None:
    while len(list(run.glob("state/step-*"))) < states:
        assert time.sleep(0.002) is None
        assert not life.has_ended(), life.said()


@both
def test_runs_killed_at_random_and_inside_saves_end_bit_for_bit_where_the_unbroken_one_does(start, place, kind):
    """A quick process may be through before its moment comes: as many runs as it takes to see what must be seen."""
    rng, kills, steps = random.Random(kind), Counter(), []
    for number in range(8):
        cwd = place / f"{kind} killed {number}"
        tally = live_and_die(start, COMMANDS[kind], cwd, 4, rng, longest=0.5)
        assert (tally.codes, tally.set_aside) == ([0], 0)
        assert differing_bytes(place / f"{kind} whole" / "run", cwd / "run") == {}
        kills, steps = kills + tally.kills, steps + tally.steps
        between = any(0 < step < STEPS for step in steps)
        if number and kills.total() >= 4 and kills["a state"] + kills["a world"] >= 1 and between:
            return
    raise AssertionError((kills, steps))


@both
def test_the_same_command_on_a_finished_run_says_so_prints_the_same_and_changes_nothing(start, place, kind):
    cwd = place / f"{kind} whole"
    first = (cwd / "output.txt").read_text().splitlines()[-1]
    before = snapshot(cwd / "run")
    for command in (COMMANDS[kind], f"{COMMANDS[kind]} --resume"):
        code, said = end(start(command, cwd))
        assert code == 0, said
        assert f"the run in run is finished: all {STEPS} steps are done" in said
        assert said.splitlines()[-1] == first
    assert snapshot(cwd / "run") == before


@both
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_says_how_to_go_on_and_ends_with_128_and_its_number(start, place, kind, number):
    """SIGTERM comes inside a save, SIGUSR1 inside a preview's world (dynamics), SIGINT between steps."""
    cwd = place / f"{kind} {number.name}"
    life = start(COMMANDS[kind], cwd)
    pattern = {signal.SIGTERM: "state/.step-*", signal.SIGUSR1: ".best.*" if kind == "dynamics" else "state/.step-*"}
    if number in pattern:
        wait_for(life, cwd / "run", pattern[number])
    else:
        until_saved(life, cwd / "run")
    life.signal(number)
    code, said = end(life)
    assert code == 128 + number, said
    assert said.count("error: ") == 1
    assert f"stopped by signal {int(number)} at step" in said
    again = said.split("go on with: ")[1].strip()
    assert again == f"ahriuwu {COMMANDS[kind]} --resume"
    code, said = end(start(again.removeprefix("ahriuwu "), cwd))
    assert code == 0, said
    assert "going on with the run in run after step" in said
    assert differing_bytes(place / f"{kind} whole" / "run", cwd / "run") == {}


@both
def test_a_signal_before_the_first_step_ends_at_once_and_says_how_to_start_again(start, place, kind):
    cwd = place / f"{kind} early"
    life = start(COMMANDS[kind], cwd)
    while (line := Path(f"/proc/{life.pid}/status").read_text().split("SigCgt:\t")[1][:16]) and not int(line, 16) & 512:
        time.sleep(0.0005)  # until SIGUSR1 is asked for
    life.signal(signal.SIGUSR1)
    code, said = end(life)
    assert code == 138, said
    assert said.startswith("error: stopped by signal 10; nothing ")  # the same, from the program's start on
    assert said.endswith(f", start again with: ahriuwu {COMMANDS[kind]}\n")
    assert said.count("\n") == 1


@both
def test_a_second_run_into_the_folder_of_one_that_is_alive_is_refused_by_name_and_a_killed_one_blocks_nobody(
    start, place, kind
):
    cwd = place / f"{kind}-twice"
    alive = start(COMMANDS[kind], cwd)
    until_saved(alive, cwd / "run")
    alive.signal(signal.SIGSTOP)
    before = snapshot(cwd / "run")
    for options in ("", " --overwrite"):
        code, said = end(start(COMMANDS[kind].replace(" run ", f" {cwd}/run ") + options, place / "other"))
        assert code == 2, said
        assert said.count("\n") == 1
        assert f"run belongs to a run that is alive (pid {alive.pid} on " in said
    assert snapshot(cwd / "run") == before
    alive.signal(signal.SIGKILL)
    assert alive.ends() == -9
    code, said = end(start(COMMANDS[kind], cwd))
    assert code == 0, said
    assert differing_bytes(place / f"{kind} whole" / "run", cwd / "run") == {}


@both
def test_a_disk_that_fills_stops_the_run_with_a_sentence_and_the_last_good_state_goes_on(start, place, kind):
    cwd = place / f"{kind} full"
    life = start(COMMANDS[kind], cwd)
    until_saved(life, cwd / "run")
    life.signal(signal.SIGTERM)
    assert life.ends() == 143
    newest = sorted((cwd / "run" / "state").iterdir())[-1].name
    code, said = end(start(COMMANDS[kind], cwd, largest_file=20_000))
    assert code == 1, said
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (
        "(File too large): raise the limit on the size of files (`ulimit -f`); the last good state is run/state/"
        in sentence
    )
    assert sentence.endswith(f"go on with: ahriuwu {COMMANDS[kind]} --resume")
    assert newest in sentence
    assert not [p.name for p in (cwd / "run" / "state").iterdir() if p.name.startswith(".")]
    code, said = end(start(COMMANDS[kind], cwd))
    assert code == 0, said
    assert differing_bytes(place / f"{kind} whole" / "run", cwd / "run") == {}


@both
def test_a_run_killed_before_its_first_state_starts_again_from_step_0_and_says_so(start, place, kind):
    cwd = place / f"{kind} unborn"
    run = cwd / "run"
    cwd.mkdir()
    shutil.copytree(place / f"{kind} whole" / "run", run)
    for name in ("state", PRODUCTS[kind]):
        shutil.rmtree(run / name)
    forget_the_states(run)
    code, said = end(start(COMMANDS[kind] + " --resume", cwd))
    assert code == 0, said
    assert "run holds this run, stopped before its first saved state: starting again from step 0" in said
    assert differing_bytes(place / f"{kind} whole" / "run", run) == {}


@both
@pytest.mark.parametrize("before", ["finished", "of an older version", "stopped by a signal"])
def test_a_run_whose_states_are_gone_is_refused_and_nothing_that_came_of_it_is_taken_away(start, place, kind, before):
    cwd = place / f"{kind} stateless {before}"
    run = cwd / "run"
    if before == "stopped by a signal":  # which saved it at a step at which no state was due
        life = start(f"{COMMANDS[kind]} --save-every 1000", cwd)
        while not (run / "metrics.jsonl").exists():
            assert time.sleep(0.002) is None
            assert not life.has_ended(), life.said()
        life.signal(signal.SIGTERM)
        assert life.ends() == 143
    else:
        cwd.mkdir()
        shutil.copytree(place / f"{kind} whole" / "run", run)
    shutil.rmtree(run / "state")
    if before == "of an older version":
        forget_the_states(run)
    kept = snapshot(run)
    for _ in range(2):
        code, said = end(start(COMMANDS[kind], cwd))
        assert code == 4, said
        world = ", take its weights into another --out by --init-from run/best" if (run / "best").exists() else ""
        ways = f"put run/state back{world} or start over by --overwrite"
        assert said.splitlines()[-1] == f"error: the states of run are gone, so this run cannot go on: {ways}"
        assert snapshot(run) == kept | {run / ".lock": (run / ".lock").stat().st_mtime_ns}
