"""Which size and batch fit on a card: the peak of a step as a function of its clips, solved for the card's memory.

Every tensor's bytes are constant or proportional to the clips. Two traces therefore tell the bytes alive after every
operation for any number of clips, and the peak is the largest of those lines: no search is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.training.shadow import PARTS, Shadow

CARDS = (16, 24, 80)  # GB, of 10^9 bytes
MARGIN = 0.10  # of a card, left for what the allocator loses between tensors
CONTEXT = 0.6e9  # bytes of a CUDA context with its libraries' workspaces: assumed, not measured
TRACED = (8, 16)  # clips
MOST = 4096  # clips beyond which nobody asks


@dataclass(frozen=True)
class Growth:
    """Bytes alive at every operation of a step: constant + clips * each."""

    constant: np.ndarray
    each: np.ndarray

    def peak(self, clips: float) -> int:
        return round(float((self.constant + clips * self.each).max()))

    def clips_within(self, bytes: float) -> int:
        """The most clips whose peak is within so many bytes; 0 where not one fits."""
        room = bytes - self.constant
        if (room < 0).any():
            return 0
        grows = self.each > 0
        return int(min((room[grows] / self.each[grows]).min(), MOST))


def growths(shadow: Shadow, frames: int) -> tuple[Growth, Growth]:
    """How the peak of a step grows with its clips of `frames` frames: plain, and with activations checkpointed."""
    pairs = [[shadow.passes(clips, frames, again).bytes for clips in TRACED] for again in (False, True)]
    update = shadow.update().bytes
    held = update[:, [PARTS.index(part) for part in ("batch", "activations")]].sum(1)  # what the last passes left
    found = []
    for few, many in pairs:
        assert len(few) == len(many), (len(few), len(many))
        each = np.concatenate([(many - few).sum(1) / (TRACED[1] - TRACED[0]), held / TRACED[1]])
        found.append(Growth(np.concatenate([many.sum(1), update.sum(1)]) - TRACED[1] * each, each))
    return found[0], found[1]


def usable(card: float) -> float:
    """Bytes of a card of so many GB that a step may fill."""
    return card * 1e9 * (1 - MARGIN) - CONTEXT


def what_fits(
    config: TrainConfig,
    architectures: dict[str, DynamicsConfig],
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """For every size, the most clips of config.frames in a micro-batch on every card, plain and checkpointed."""
    rows = []
    few = TRACED[0]  # of which a whole number is bootstrapped, so that bytes stay proportional to the clips
    micro = replace(
        config, batch=few * min(config.accumulate, 2), accumulate=min(config.accumulate, 2),
        bootstrap_share=math.ceil(config.shortcut_share * few) / few, single_image_share=0.0,
        long_every=0, long_frames=0,
    )  # fmt: skip
    for i, (size, architecture) in enumerate(architectures.items()):
        for g, checkpointed in zip(
            growths(Shadow(micro, architecture, "cuda"), config.frames), (False, True), strict=True
        ):
            fits = {f"{card} GB": g.clips_within(usable(card)) for card in CARDS}
            rows.append({"size": size, "checkpointed": checkpointed, "clips": fits})
        if progress is not None:
            progress(i + 1, len(architectures))
    return rows


def as_text(rows: list[dict[str, Any]], config: TrainConfig) -> str:
    """The table for a terminal."""
    names = [f"{card} GB" for card in CARDS]
    lines = [
        f"clips of {config.frames} frames that fit in a micro-batch, {config.precision}, {config.optimizer}; with "
        f"--checkpoint-activations after the stroke:",
        "size    " + "".join(f"{name:>14}" for name in names),
    ]
    for plain, again in zip(rows[::2], rows[1::2], strict=True):
        cells = (f"{_count(plain['clips'][n])} / {_count(again['clips'][n])}" for n in names)
        lines.append(f"{plain['size']:<8}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append(
        f"computed, with {MARGIN:.0%} of a card left free and {CONTEXT / 1e9:g} GB for the CUDA context; kernels as a "
        "GPU chooses them"
    )
    return "\n".join(lines)


def _count(clips: int) -> str:
    return f"{clips}+" if clips >= MOST else str(clips) if clips else "-"
