"""Scores of windows: every metric for every window and generated frame, as arrays (W, L) that can be averaged later.

A table is a dict from metric to array. `floor` and `ceiling` come from the same truth as the model's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation import metrics
from ahriuwu_cli.evaluation.generate import persist, reconstruct
from ahriuwu_cli.world import World

BLOCK_BYTES = 16 << 20  # of frames that are added up at a time
Table = dict[str, np.ndarray]  # metric -> (W, L)
BASIC, LOOK = ("mse", "psnr"), ("motion", "energy")  # what `score` gives, and `look`
FULL = (*BASIC, "ssim", "colour", *LOOK, "motion_gg", "motion_gt", "motion_tt")  # `score` with full


def score(
    frames: np.ndarray,
    truth: np.ndarray,
    *,
    before: np.ndarray,
    true_before: np.ndarray | None = None,
    finite: np.ndarray | None = None,
    full: bool = True,
) -> Table:
    """psnr (dB) and mse of frames uint8 (W, L, H, W, 3) against truth; with `full` also ssim, colour, motion, energy.

    before (W, H, W, 3): the frame that motion starts from, true_before the truth's own (default: the same). finite
    (W, L): every score is NaN where it is False.
    """
    table = {"mse": metrics.mse_per_frame(frames, truth)}
    table["psnr"] = metrics.psnr_from_mse(table["mse"])
    if full:
        table["ssim"], table["colour"] = metrics.ssim(frames, truth), metrics.colour_shift(frames, truth)
        start = before if true_before is None else true_before
        products = metrics.motion_products(_clip(before, frames), _clip(start, truth))
        table |= look(frames, before) | dict(zip(("motion_gg", "motion_gt", "motion_tt"), products, strict=True))
    if finite is not None:
        table = {name: np.where(finite, values, np.nan) for name, values in table.items()}
    return table


def look(frames: np.ndarray, before: np.ndarray) -> Table:
    """What needs no truth: motion (from `before` on) and energy (gradient energy), (W, L) each."""
    return {"motion": metrics.motion_per_frame(_clip(before, frames)), "energy": metrics.gradient_energy(frames)}


def _clip(before: np.ndarray, frames: np.ndarray) -> np.ndarray:
    return np.concatenate([before[:, None], frames], axis=1)


def mean_frame(store: EpisodeStore, frames: int = 512) -> np.ndarray | None:
    """The mean of about `frames` evenly spaced frames of the train split, uint8 (H, W, 3): what a collapse shows.

    Of the train split, since a model could not know more; None where the dataset has no such split.
    """
    episodes = store.episodes("train")
    if not episodes:
        return None
    every = max(1, sum(e.frames for e in episodes) // frames)
    some = max(1, BLOCK_BYTES // (3 * store.height * store.width))
    total, count = np.zeros((store.height, store.width, 3), np.uint64), 0  # whole numbers: exact in any order
    for i, e in enumerate(episodes):
        for at in range(i % every, e.frames, every * some):  # other phases in other episodes
            taken = store.frames(e.id, at, min(at + every * some, e.frames), every)
            total, count = total + taken.sum(axis=0, dtype=np.uint64), count + len(taken)
    return (total / count).round().astype(np.uint8)


def references(
    world: World | None,
    frames: np.ndarray,
    context: int,
    batch: int,
    full: bool = True,
    mean: np.ndarray | None = None,
    again: np.ndarray | None = None,
) -> tuple[dict[str, Table], np.ndarray]:
    """Tables of `floor`, `ceiling` (with `full` of `truth`, with a mean frame (H, W, 3) of `mean_frame`) for windows
    uint8 (W, T, H, W, 3), and the reconstruction of the last context frame (W, H, W, 3): the start from which a frozen
    rollout moves by 0. again (W, T, H, W, 3): the reconstructions, where they are known already; no world is needed
    then."""
    truth, last = frames[:, context:], frames[:, context - 1]
    again = reconstruct(world, frames, batch) if again is None else again
    tables = {
        "floor": score(persist(frames, context), truth, before=last, full=full),
        "ceiling": score(again[:, context:], truth, before=again[:, context - 1], true_before=last, full=full),
    }
    if mean is not None:
        shown = np.tile(mean, (*truth.shape[:2], 1, 1, 1))
        tables["mean_frame"] = score(shown, truth, before=shown[:, 0], true_before=last, full=full)
    if full:
        tables["truth"] = look(truth, last)
    return tables, again[:, context - 1]


def join(parts: Sequence[dict[str, Table]]) -> dict[str, Table]:
    """Tables of batches, one after the other along the windows."""
    return {who: {name: np.concatenate([p[who][name] for p in parts]) for name in parts[0][who]} for who in parts[0]}


def mean_over_seeds(tables: Sequence[Table]) -> Table:
    """The mean of the same windows' scores over noise seeds; NaN in one is NaN."""
    return {name: np.mean([t[name] for t in tables], axis=0) for name in tables[0]}
