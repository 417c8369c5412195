"""From scores (W, L) to the numbers that are published: by horizon, with intervals, as plain JSON values.

Horizon h is the h-th generated frame, alone; motion is over frames 1..h. Gain is PSNR minus the floor's, paired by
window. Ratios and cosines divide sums over all windows, so a still window does not make them infinite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ahriuwu_cli.evaluation.metrics import motion_cosine, psnr_from_mse, ratio
from ahriuwu_cli.evaluation.protocol import Interval, paired_bootstrap
from ahriuwu_cli.evaluation.scores import Table

EXACT = ("settings", "tau_ctx")  # names under which a number is what was asked for, and no measurement


def pick_horizons(wanted: Sequence[int], horizon: int) -> list[int]:
    """Those wanted that exist, and the last, in order."""
    return sorted({h for h in wanted if 1 <= h <= horizon} | {horizon})


def by_horizon(tables: dict[str, Table], episodes: Sequence[str], h: int) -> dict[str, Any]:
    """Everything about generated frame h. tables: model, floor, ceiling, mean_frame, truth."""
    model, floor, ceiling, mean, truth = (tables[who] for who in ("model", "floor", "ceiling", "mean_frame", "truth"))
    at = h - 1
    rows: dict[str, Any] = {
        "psnr": paired_bootstrap(model["psnr"][:, at], episodes),
        "floor": paired_bootstrap(floor["psnr"][:, at], episodes),
        "ceiling": paired_bootstrap(ceiling["psnr"][:, at], episodes),
        "gain_db": gain(tables, episodes, h),
    }
    for who, table in (("", model), ("floor_", floor), ("ceiling_", ceiling), ("mean_frame_", mean)):
        if who == "mean_frame_":
            rows["mean_frame_psnr"] = float(table["psnr"][:, at].mean())
        rows[f"{who}psnr_of_mse"] = float(psnr_from_mse(table["mse"][:, at].mean()))
        rows[f"{who}ssim"] = float(table["ssim"][:, at].mean())
        rows[f"{who}motion_ratio"] = ratio(table["motion"][:, :h].mean(), truth["motion"][:, :h].mean())
        rows[f"{who}sharpness_ratio"] = ratio(table["energy"][:, at].mean(), truth["energy"][:, at].mean())
        rows[f"{who}motion_cosine"] = motion_cosine(
            *(table[f"motion_{product}"][:, :h].mean() for product in ("gg", "gt", "tt"))
        )
        rows[f"{who}colour_shift"] = float(table["colour"][:, at].mean())
    return rows


def gain(tables: dict[str, Table], episodes: Sequence[str], h: int) -> Interval:
    """PSNR of the model minus that of the floor at generated frame h, dB, paired by window."""
    return paired_bootstrap(tables["model"]["psnr"][:, h - 1] - tables["floor"]["psnr"][:, h - 1], episodes)


def delta(
    tables: dict[str, Table], control: str, episodes: Sequence[str], h: int, chosen: np.ndarray | None = None
) -> Interval:
    """PSNR with true actions minus PSNR with the control's (Genie's delta PSNR) at frame h, dB, paired by window.

    chosen (W,) bool: these windows alone.
    """
    rows = slice(None) if chosen is None else chosen
    values = tables["model"]["psnr"][:, h - 1] - tables[control]["psnr"][:, h - 1]
    return paired_bootstrap(values[rows], np.asarray(episodes)[rows])


def moving_windows(tables: dict[str, Table], h: int) -> np.ndarray:
    """Which quarter of the windows (W,) bool, rounded up, moves most in truth over generated frames 1..h."""
    motion = tables["truth"]["motion"][:, :h].mean(axis=1)
    chosen = np.zeros(len(motion), dtype=bool)
    chosen[np.argsort(-motion, kind="stable")[: -(-len(motion) // 4)]] = True
    return chosen


def drift(tables: dict[str, Table], who: str, episodes: Sequence[str]) -> Interval | None:
    """Slope of PSNR over the generated frames, dB a frame: least squares in every window, then their mean.

    None for a single frame, which has no slope.
    """
    psnr = tables[who]["psnr"]
    frames = np.arange(psnr.shape[1]) - (psnr.shape[1] - 1) / 2
    if len(frames) < 2:
        return None
    return paired_bootstrap(psnr @ frames / (frames @ frames), episodes)


def curves(tables: dict[str, Table], episodes: Sequence[str]) -> dict[str, list]:
    """By generated frame 1..L: psnr of model (with its interval), floor and ceiling in dB, and the model's ssim."""
    frames = tables["model"]["psnr"].shape[1]
    bands = [paired_bootstrap(tables["model"]["psnr"][:, t], episodes) for t in range(frames)]
    return {
        "frame": list(range(1, frames + 1)),
        "psnr": [b.value for b in bands],
        "psnr_lo": [b.lo for b in bands],
        "psnr_hi": [b.hi for b in bands],
        "floor": list(tables["floor"]["psnr"].mean(0)),
        "ceiling": list(tables["ceiling"]["psnr"].mean(0)),
        "mean_frame": list(tables["mean_frame"]["psnr"].mean(0)),
        "ssim": list(tables["model"]["ssim"].mean(0)),
    }


def by_window(
    tables: dict[str, Table], windows: Sequence[tuple[str, int]], horizons: Sequence[int], controls: Sequence[str]
) -> list[dict[str, Any]]:
    """One row a window: episode, start, and at every horizon psnr, floor, ceiling, gain, ssim and action deltas."""
    rows = []
    for w, (episode, start) in enumerate(windows):
        row: dict[str, Any] = {"episode": episode, "start": start}
        for h in horizons:
            at = {who: tables[who]["psnr"][w, h - 1] for who in ("model", "floor", "ceiling", *controls)}
            row |= {f"psnr_{h}": at["model"], f"floor_{h}": at["floor"], f"ceiling_{h}": at["ceiling"]}
            row |= {f"gain_db_{h}": at["model"] - at["floor"], f"ssim_{h}": tables["model"]["ssim"][w, h - 1]}
            row |= {f"delta_{c}_db_{h}": at["model"] - at[c] for c in controls}
        rows.append(row)
    return rows


def jsonable(value: Any, exact: bool = False) -> Any:
    """The same with plain Python numbers of 6 decimals; NaN, which JSON cannot hold, becomes null.

    exact: numbers keep all their digits, as those under a name of EXACT do.
    """
    if isinstance(value, Interval):
        return jsonable(value.to_json(), exact)
    if isinstance(value, dict):
        return {str(k): jsonable(v, exact or k in EXACT) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v, exact) for v in value]
    if isinstance(value, float | np.floating):
        return (float(value) if exact else round(float(value), 6)) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
