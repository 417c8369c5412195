"""The training clock: a process that stands still spends nothing, one that is slow does."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from ahriuwu_cli.training.clock import SHORTEST, TICK, TrainingClock, Watch
from ahriuwu_cli.training.loop import DynamicsTrainer


class Hands:
    """A clock that is moved by hand."""

    def __init__(self):
        self.at = 0.0

    def __call__(self):
        return self.at


@pytest.fixture
def moved():
    """(hands, watch, clock, what was announced); the watch's own thread is not started."""
    hands, said = Hands(), []
    watch = Watch(hands)
    return hands, watch, TrainingClock(said.append, hands, watch.taken), said


def pass_by(hands, watch, seconds):
    """Time in which the process runs, so that its watch looks every second."""
    for _ in range(round(seconds / TICK)):
        hands.at += TICK
        watch.look(ticks=True)


def test_time_that_the_process_ran_counts_however_long_a_step_or_what_is_between_took(moved):
    hands, watch, clock, said = moved
    pass_by(hands, watch, 60)  # compilation, or a large batch
    assert clock.lap() == 60
    pass_by(hands, watch, 100)  # a preview, a save
    pass_by(hands, watch, 1)
    assert clock.lap() == 101
    assert said == []


@pytest.mark.parametrize("laps_before", [0, 1, 20])
def test_a_standstill_is_left_out_and_announced_from_the_first_step_on(moved, laps_before):
    hands, watch, clock, said = moved
    for _ in range(laps_before):
        pass_by(hands, watch, 1)
        clock.lap()
    pass_by(hands, watch, 2)
    hands.at += 1000
    if laps_before == 1:
        watch.look(ticks=True)  # its thread was awake first
    assert clock.lap() == 2 + TICK
    assert said == [1000 - TICK]
    pass_by(hands, watch, 5)
    assert clock.lap() == 5


def test_a_hiccup_counts_as_it_was(moved):
    hands, _, clock, said = moved
    hands.at += SHORTEST
    assert clock.lap() == SHORTEST
    assert said == []


def test_no_more_is_left_out_than_a_lap_took():
    hands = Hands()
    clock = TrainingClock(lambda s: None, hands, lambda: 99.0)
    hands.at = 3
    assert clock.lap() == 0


def test_standstills_of_two_processes_add_up(monkeypatch):
    """Ten steps of a second on two processes; one stands 100 s in the third of them, the other 100 s in the sixth."""
    laps = [[1.0] * 10, [1.0] * 10]
    laps[1][2] = laps[0][5] = 101.0  # who waits for the other does not know of it
    told = iter(zip(*laps, strict=True))
    group = SimpleNamespace(agree=lambda mine, signal: (min(next(told)), signal))
    logged, mine = [], iter(laps[0])
    trainer = SimpleNamespace(group=group, elapsed=5.0, step=3, run=SimpleNamespace(log=lambda line: line))
    for _ in range(10):
        clock, stop = SimpleNamespace(lap=lambda: next(mine)), SimpleNamespace(number=0)
        DynamicsTrainer._agree(trainer, clock, stop, logged.append)
    assert trainer.elapsed == 15
    assert logged == [{"step": 3, "stood_still_s": 100}]  # the lead says so of the other's


STANDS = """
import time
from ahriuwu_cli.training import clock
clock.TICK, clock.SHORTEST = 0.02, 0.5
with clock.Watch() as watch:
    print("here", flush=True)
    until = time.monotonic() + 60
    stood = 0
    while not stood and time.monotonic() < until:
        stood = watch.taken()
print(stood)
"""


def test_a_process_that_is_stopped_knows_for_how_long():
    process = subprocess.Popen([sys.executable, "-c", STANDS], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    os.kill(process.pid, signal.SIGSTOP)
    threading.Event().wait(1.5)
    os.kill(process.pid, signal.SIGCONT)
    assert 1.3 < float(process.communicate(timeout=60)[0]) < 10


def test_the_watch_ends_with_its_run():
    with Watch():
        assert "standstill" in {thread.name for thread in threading.enumerate()}
    assert "standstill" not in {thread.name for thread in threading.enumerate()}
