"""The training clock: steps are counted, a machine's standstill is not."""

from ahriuwu_cli.training.clock import TrainingClock


def clock(laps, elapsed=0.0):
    times = [0.0]
    for lap in laps:
        times.append(times[-1] + lap)
    pauses = []
    ticking = TrainingClock(elapsed, pauses.append, iter(times).__next__)
    return [ticking.lap() for _ in laps][-1], pauses


def test_ordinary_laps_add_up_to_the_wall_clock_and_earlier_parts_count():
    assert clock([0.5, 0.25, 0.75], elapsed=10.0) == (11.5, [])


def test_a_standstill_counts_as_one_usual_lap_and_is_announced():
    total, pauses = clock([0.5] * 10 + [1000.0] + [0.5] * 10)
    assert total == 21 * 0.5
    assert pauses == [999.5]


def test_a_slow_model_and_a_slow_first_step_are_no_standstill():
    assert clock([30.0, 31.0, 29.0, 40.0])[1] == []
    assert clock([60.0, 0.2, 0.2])[1] == []  # compilation
    assert clock([0.2] * 10 + [5.0])[1] == []  # a hiccup counts as it was


def test_the_work_between_laps_counts_however_long():
    times = iter([0.0, 1.0, 101.0, 102.0])
    ticking = TrainingClock(0.0, lambda s: None, times.__next__)
    ticking.lap()
    ticking.rest()
    assert ticking.elapsed == 101.0
    assert ticking.lap() == 102.0
