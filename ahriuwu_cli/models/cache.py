"""The context window of a rollout: keys and values of committed frames in a ring buffer, preallocated, never copied.

Each time layer owns two tensors (B, lines, kv_heads, window + 1, S / lines, head_dim). A line is the tokens that attend
to one another over time: one token place (S lines) or the whole frame (one line), so that keys are read in place. The
first `window` slots are the ring, the last holds the frame that is being denoised. Keys are stored with their rotary
position, so slot order does not matter.
The position counter lives in Python: building the mask needs no synchronisation with the device.
"""

from __future__ import annotations

import torch
from torch import Tensor


class ContextCache:
    """K and V of the last `window` committed frames of B rollouts, for `layers` time layers of S tokens a frame."""

    def __init__(
        self, batch: int, window: int, layers: int, tokens: int, lines: int, kv_heads: int, head_dim: int, like: Tensor
    ) -> None:
        shape = (layers, batch, lines, kv_heads, window + 1, tokens // lines, head_dim)
        self.window = window
        self.frames = 0  # committed so far
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)

    def slots(self, count: int, keep: int) -> list[int]:
        """Slots for `count` new frames of which the first `keep` are committed: ring places, then the scratch slot."""
        assert count - keep <= 1, count - keep
        return [(self.frames + i) % self.window for i in range(keep)] + [self.window] * (count - keep)

    def mask(self, count: int, keep: int, device: torch.device) -> Tensor:
        """(count, window + 1) bool: new frame i, at position frames + i, sees the window that ends with itself."""
        rows = []
        for i in range(count):
            now = self.frames + i
            rows.append([self._age_of(slot, now, keep, i) for slot in range(self.window + 1)])
        age = torch.tensor(rows, device=device)
        return (age >= 0) & (age < self.window)

    def _age_of(self, slot: int, now: int, keep: int, i: int) -> int:
        if slot == self.window:  # the scratch slot holds the frame being denoised, seen by itself alone
            return 0 if i >= keep else -1
        newest = self.frames + keep - 1  # after this call's commits
        held = newest - (newest - slot) % self.window
        return now - held if held >= 0 else -1
