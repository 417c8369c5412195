"""Which windows of a dataset to look at: pure functions on episode lengths, both counted in frames."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

from ahriuwu_cli.errors import DataError


class Windows(Sequence):
    """Every window (episode, first frame) of `length` frames, in order: a sequence that holds one number an episode."""

    def __init__(self, lengths: Mapping[str, int], length: int) -> None:
        self._names = [name for name, frames in lengths.items() if frames >= length]
        room = (lengths[name] - length + 1 for name in self._names)
        self._ends = list(itertools.accumulate(room))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> tuple[str, int]:
        index = range(len(self))[index]  # a negative one counts from the end, one outside is an IndexError
        episode = bisect.bisect_right(self._ends, index)
        return self._names[episode], index - (self._ends[episode - 1] if episode else 0)


def enumerate_windows(lengths: Mapping[str, int], length: int) -> Windows:
    """Every window (episode, first frame) of `length` frames. Raises DataError when no episode is long enough."""
    _require_room(lengths, length)
    return Windows(lengths, length)


def draw_windows(lengths: Mapping[str, int], length: int, count: int, seed: int) -> list[tuple[str, int]]:
    """`count` different windows, spread evenly over episodes and, within one, over its time; the same for a seed.

    They come in turns, one of every episode before the second of any, so any beginning of the list is spread as well.
    Raises DataError when no episode is long enough, or when there are fewer windows than wanted.
    """
    import numpy as np

    _require_room(lengths, length)
    room = {name: frames - length + 1 for name, frames in lengths.items() if frames >= length}
    if count < 1 or count > sum(room.values()):
        raise DataError(
            f"{count} windows of {length} frames were asked for, and {len(room)} episodes hold {sum(room.values())}: "
            "ask for fewer, or record more"
        )
    rng = np.random.default_rng(seed)
    names = list(room)
    order = [names[i] for i in rng.permutation(len(names))]
    quota = dict.fromkeys(order, 0)
    turns, free = [], order  # free: those that have another window
    while len(turns) < count:
        for name in free[: count - len(turns)]:
            turns.append((name, quota[name]))
            quota[name] += 1
        free = [name for name in free if quota[name] < room[name]]
    starts = {}
    for name, n in quota.items():  # one from each of n equal parts of the episode
        edges = [room[name] * i // n for i in range(n + 1)] if n else [0]
        drawn = [int(rng.integers(a, b)) for a, b in itertools.pairwise(edges)]
        starts[name] = [drawn[i] for i in rng.permutation(n)]
    return [(name, starts[name][turn]) for name, turn in turns]


def _require_room(lengths: Mapping[str, int], length: int) -> None:
    if length < 1:
        raise DataError(f"a window of {length} frames is empty: ask for at least 1")
    if not lengths:
        raise DataError(f"there is no episode to take a window of {length} frames from: is this split empty?")
    longest = max(lengths.values())
    if longest < length:
        raise DataError(
            f"no episode is long enough for a window of {length} frames: the longest of {len(lengths)} has {longest}; "
            "ask for shorter windows or record longer episodes"
        )
