"""Calls that may never return: their results, their errors, and their loss once the other side is gone."""

import os
import signal
import threading
import time

import pytest

from ahriuwu_cli.data import calls
from ahriuwu_cli.data.calls import Calls, Lost


def fail(error: BaseException):
    raise error


def test_a_call_that_waits_for_somebody_who_is_gone_is_lost_and_another_is_waited_for(monkeypatch):
    monkeypatch.setattr(calls, "PATIENCE", 0.02)
    gone, blocked = [False], threading.Event()
    served = Calls(lambda: gone[0])
    assert [served.do(lambda i=i: i * i) for i in range(3)] == [0, 1, 4]
    for error in (KeyError("a"), SystemExit(3)):
        with pytest.raises(type(error)) as caught:
            served.do(lambda error=error: fail(error))
        assert caught.value is error
    assert served.do(lambda: time.sleep(0.2) or "late") == "late"  # ten looks
    gone[0] = True
    with pytest.raises(Lost):
        served.do(lambda: blocked.wait(20))
    assert served.lost
    blocked.set()


def test_a_signal_is_heeded_while_a_call_waits_and_the_thread_ends_when_it_is_let_go():
    before, blocked, seen = threading.active_count(), threading.Event(), []
    served = Calls(lambda: False)
    handler = signal.signal(signal.SIGUSR2, lambda *_: seen.append(1) or blocked.set())
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        assert served.do(lambda: blocked.wait(20))
    finally:
        signal.signal(signal.SIGUSR2, handler)
    assert seen == [1]
    served.end()
    until = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == before
