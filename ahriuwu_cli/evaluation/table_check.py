"""Tables of scores held to each other: what one metric says of a frame, no other may deny.

A file of scores whose hash fits may have been written by anybody. Numbers that contradict nothing are taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ahriuwu_cli.evaluation.metrics import CAP_DB, psnr_from_mse
from ahriuwu_cli.evaluation.scores import Table

REFERENCES = ("floor", "ceiling", "truth", "mean_frame")  # tables of frames that no world generated
_SLACK = 1e-6  # of numbers that are made of the same ones in another order


def check_tables(tables: Mapping[str, Table], seeds: int) -> dict[str, int]:
    """How many frames have no score, by what was generated: as `Measured.not_finite` counts them, for one noise seed.

    ValueError where the tables of `measure`, or of a sweep, averaged over so many noise seeds, contradict each other.
    """
    lost: dict[str, int] = {}
    for who, table in tables.items():
        missing = _missing(who, table)
        if who not in (*REFERENCES, "forced_1"):  # frame 1 from true context is frame 1 of the rollout
            name = "teacher_forced" if who.startswith("forced_") else who
            lost[name] = lost.get(name, 0) + int(missing.sum())
        if "mse" in table:
            least, most = _psnr_of(table["mse"], 1 if who in REFERENCES else seeds)
            if ((table["psnr"] < least - _SLACK) | (table["psnr"] > most + _SLACK)).any():  # NaN is neither
                raise ValueError(f"'{who}/psnr' is not what its mse gives")
        if "motion_gt" in table:
            most = table["motion_gg"] * table["motion_tt"]
            if (table["motion_gt"] ** 2 > most * (1 + _SLACK) + _SLACK**2).any():
                raise ValueError(f"'{who}/motion_gt' is above what any two motions give")
    if "forced_1" in tables:
        for metric, values in (("psnr", tables["model"]["psnr"]), ("floor", tables["floor"]["psnr"])):
            if not np.allclose(tables["forced_1"][metric], values[:, :1], 0, _SLACK, equal_nan=True):
                raise ValueError(f"'forced_1/{metric}' is not that of the first frame")
    return lost


def _missing(who: str, table: Table) -> np.ndarray:
    """Which frames (W, L) have no score. ValueError where some have one metric alone, or a real picture has none."""
    gaps = {metric: np.isnan(values) for metric, values in table.items()}
    floor = gaps.pop("floor", np.False_)  # of real pictures
    missing = next(iter(gaps.values()))
    if floor.any() or not all(np.array_equal(each, missing) for each in gaps.values()):
        raise ValueError(f"{who!r} has some scores of a frame and lacks others")
    none = who == "mean_frame" and missing.all()  # the dataset has no train split
    if who in REFERENCES and missing.any() and not none:
        raise ValueError(f"{who!r} lacks scores of real frames")
    return missing


def _psnr_of(mse: np.ndarray, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most dB that a mean over noise seeds can be, by the mean of their errors.

    PSNR falls with the error along a convex curve that is cut off at the cap. So it is least where all seeds err alike,
    or, near the cap, where they lie on the line from no error that touches the curve; most where one errs alone.
    """
    mse = np.clip(mse, 0, 1)
    alike = psnr_from_mse(mse)
    if seeds == 1:
        return alike, alike
    capped = 10 ** (-CAP_DB / 10)  # the largest error that still gives the cap
    line = CAP_DB - 10 / math.log(10) * mse / (math.e * capped)
    alone = psnr_from_mse(np.clip(seeds * mse - (seeds - 1) * capped, 0, 1))
    return np.where(mse < math.e * capped, line, alike), ((seeds - 1) * CAP_DB + alone) / seeds
