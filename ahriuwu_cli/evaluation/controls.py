"""Wrong actions on purpose: what a model is given when it is asked whether it follows actions at all.

Only actions that lead to generated frames are replaced; those between context frames have been seen and stay true.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ahriuwu_cli.data.actions import ActionSpace

HOLD = (2, 8)  # frames that a random action lasts, as the recorders hold theirs


def partners(episodes: Sequence[str]) -> np.ndarray:
    """For every window another one to borrow actions from, (W,) a fixed derangement; of other episodes where possible.

    Windows sorted by episode are shifted by the size of the largest: all partners are of another episode unless one
    episode holds more than half of the windows. ValueError for fewer than 2 windows.
    """
    if len(episodes) < 2:
        raise ValueError(f"{len(episodes)} window(s) leave nobody to borrow actions from")
    names, counts = np.unique(np.asarray(episodes), return_counts=True)
    order = np.argsort(np.asarray(episodes), kind="stable")
    shift = int(counts.max()) if len(names) > 1 else 1
    chosen = np.empty(len(episodes), dtype=int)
    chosen[order] = np.roll(order, -shift)
    return chosen


def random_actions(space: ActionSpace, keys: Sequence[str], steps: int, seed: int) -> np.ndarray:
    """(W, steps, A) float32 held random actions; a window's depend on (seed, key) alone."""
    rows = []
    for key in keys:
        digest = hashlib.blake2b(f"{seed}/{key}/random actions".encode(), digest_size=8).digest()
        rows.append(space.random(steps, HOLD, np.random.default_rng(int.from_bytes(digest, "little"))))
    return np.stack(rows)


def with_future(actions: np.ndarray, others: np.ndarray, context: int) -> np.ndarray:
    """actions (W, T-1, A) with those that lead to frames context..T-1 taken from others."""
    changed = actions.copy()
    changed[:, context - 1 :] = others[:, context - 1 :]  # actions[t] takes frame t to t + 1
    return changed
