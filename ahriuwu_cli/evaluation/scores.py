"""Scores of windows: every metric for every window and generated frame, as arrays (W, L) that can be averaged later.

A table is a dict from metric to array. `floor` and `ceiling` come from the same truth as the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ahriuwu_cli.evaluation import metrics
from ahriuwu_cli.evaluation.generate import persist, reconstruct
from ahriuwu_cli.world import World

Table = dict[str, np.ndarray]  # metric -> (W, L)


def score(
    frames: np.ndarray, truth: np.ndarray, *, before: np.ndarray, finite: np.ndarray | None = None, full: bool = True
) -> Table:
    """psnr (dB) and mse of frames uint8 (W, L, H, W, 3) against truth; with `full` also ssim, motion and energy.

    before (W, H, W, 3): the frame that motion starts from. finite (W, L): every score is NaN where it is False.
    """
    table = {"mse": metrics.mse_per_frame(frames, truth)}
    table["psnr"] = metrics.psnr_from_mse(table["mse"])
    if full:
        table["ssim"] = metrics.ssim(frames, truth)
        table |= look(frames, before)
    if finite is not None:
        table = {name: np.where(finite, values, np.nan) for name, values in table.items()}
    return table


def look(frames: np.ndarray, before: np.ndarray) -> Table:
    """What needs no truth: motion (from `before` on) and energy (gradient energy), (W, L) each."""
    clips = np.concatenate([before[:, None], frames], axis=1)
    return {"motion": metrics.motion_per_frame(clips), "energy": metrics.gradient_energy(frames)}


def references(
    world: World, frames: np.ndarray, context: int, batch: int, full: bool = True
) -> tuple[dict[str, Table], np.ndarray]:
    """Tables of `floor`, `ceiling` (and with `full` of `truth`) for windows uint8 (W, T, H, W, 3), and the
    reconstruction of the last context frame (W, H, W, 3): the start from which a frozen rollout moves by 0."""
    truth, last = frames[:, context:], frames[:, context - 1]
    again = reconstruct(world, frames, batch)
    tables = {
        "floor": score(persist(frames, context), truth, before=last, full=full),
        "ceiling": score(again[:, context:], truth, before=again[:, context - 1], full=full),
    }
    if full:
        tables["truth"] = look(truth, last)
    return tables, again[:, context - 1]


def join(parts: Sequence[dict[str, Table]]) -> dict[str, Table]:
    """Tables of batches, one after the other along the windows."""
    return {who: {name: np.concatenate([p[who][name] for p in parts]) for name in parts[0][who]} for who in parts[0]}


def mean_over_seeds(tables: Sequence[Table]) -> Table:
    """The mean of the same windows' scores over noise seeds; NaN in one is NaN."""
    return {name: np.mean([t[name] for t in tables], axis=0) for name in tables[0]}
