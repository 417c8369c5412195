"""The context window of a rollout: keys and values of committed frames in a ring buffer, preallocated, never copied.

Every time layer owns keys and values (rows, heads, (window + 1) * each, head_dim), as attention reads them: `each` is
the number of a frame's tokens in one line (all of them where tokens see across frames, else one). The first `window`
places of `each` are the ring, the last holds the frame that is being denoised. Keys are stored with their rotary
position, so that their order does not matter. The position counter lives in Python, and what a pass needs of positions
and masks is made on the device once and kept: nothing in the frame loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ahriuwu_cli.models.kernels import Tables

AHEAD = 64  # positions whose rotary tables are made at a time
KEPT = 1 << 24  # numbers of the tables of what may be seen that are kept for the next time


Held = tuple[Tensor, Tensor, Tensor]  # keys and values of all layers, and the places that new frames are written to


def hold(held: Held, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Write the new frames' keys and values (rows, heads, count * each, head_dim); give all of the layer's."""
    keys, values, places = held
    k, v = k.to(keys.dtype), v.to(values.dtype)  # under autocast projections have a format of their own
    return keys[layer].index_copy_(2, places, k), values[layer].index_copy_(2, places, v)


class ContextCache:
    """K and V of the last `window` committed frames of B rollouts, for `layers` time layers.

    shape: (rows, heads, each, head_dim) of one frame's keys; rotary: positions (T,) -> tables.
    """

    def __init__(
        self,
        window: int,
        layers: int,
        shape: tuple[int, int, int, int],
        rotary: Callable[[Tensor], Tables],
        like: Tensor,
    ) -> None:
        rows, heads, self.each, head_dim = shape
        self.window = window
        self.frames = 0  # committed so far
        self.keys = like.new_zeros((layers, rows, heads, (window + 1) * self.each, head_dim))
        self.values = torch.zeros_like(self.keys)
        self._rotary = rotary
        self._tables: tuple[int, Tables] | None = None  # (first position, tables of the AHEAD that follow)
        self._places = torch.arange((window + 1) * self.each, device=like.device).view(window + 1, self.each)
        self._known: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

    def slots(self, count: int, keep: int) -> list[int]:
        """Slots for `count` new frames of which the first `keep` are committed: ring places, then the scratch slot."""
        assert count - keep <= 1, count - keep
        return [(self.frames + i) % self.window for i in range(keep)] + [self.window] * (count - keep)

    def look(self, count: int, keep: int) -> tuple[Tensor, Tensor]:
        """(places (count * each,) that the new frames are written to, bias (count * each, (window + 1) * each)).

        The bias is 0 where a new frame, at position frames + i, may look, and -inf elsewhere: it sees the window that
        ends with itself. Once the ring is full this repeats with the window, so there are few of them.
        """
        turn = self.frames if self.frames < 2 * self.window else self.window + self.frames % self.window
        if (turn, count, keep) not in self._known:
            places = torch.cat([self._places[slot] for slot in self.slots(count, keep)])
            age = self._ages(turn, count, keep)  # by frame: only the table itself is as large as its tokens make it
            unseen = (age < 0) | (age >= self.window)
            if sum(bias.numel() for _, bias in self._known.values()) + unseen.numel() * self.each**2 > KEPT:
                self._known.clear()
            bias = self.keys.new_zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
            bias = bias.repeat_interleave(self.each, 0).repeat_interleave(self.each, 1)
            self._known[turn, count, keep] = places, bias
        return self._known[turn, count, keep]

    def tables(self, count: int) -> Tables:
        """Rotary tables of the next `count` positions."""
        first = self.frames
        if self._tables is None or not self._tables[0] <= first <= first + count <= self._tables[0] + AHEAD:
            ahead = torch.arange(first, first + max(AHEAD, count), device=self._places.device)
            self._tables = (first, self._rotary(ahead))
        skip = first - self._tables[0]
        cos, sin = self._tables[1]
        return cos[skip : skip + count], sin[skip : skip + count]

    def _ages(self, frames: int, count: int, keep: int) -> Tensor:
        """(count, window + 1): how many frames before new frame i each slot's frame lies; -1 where it holds none."""
        device = self._places.device
        slot, i = torch.arange(self.window + 1, device=device), torch.arange(count, device=device)[:, None]
        newest = frames + keep - 1  # after this call's commits
        held = newest - (newest - slot) % self.window
        age = torch.where(held >= 0, frames + i - held, -1)
        scratch = torch.where(i >= keep, 0, -1)  # the scratch slot holds the frame being denoised, seen by itself alone
        return torch.where(slot == self.window, scratch, age)
