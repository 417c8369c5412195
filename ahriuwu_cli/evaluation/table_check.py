"""Scores held to each other: what one metric says of a frame, no other may deny.

A file of scores whose hash fits may have been written by anybody. Numbers that contradict nothing are taken.

Bounds hold for every picture of 8 bits, and, since all are means of squares or linear, for means over noise seeds too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ahriuwu_cli.evaluation.metrics import CAP_DB, psnr_from_mse
from ahriuwu_cli.evaluation.scores import Table

REFERENCES = ("floor", "ceiling", "truth", "mean_frame")  # tables of frames that no world generated
LEVELS = 255
STILL = ("floor", "mean_frame")  # of those the ones that show one frame throughout
_SLACK = 1e-6  # of numbers that are made of the same ones in another order, and rounded to 6 decimals
_FLOAT32 = 1e-4  # of products of motion, relative: float32 holds a difference of one level to 2e-5
_TINY = 1e-12
_CAPPED = 10 ** (-CAP_DB / 10)  # the largest error that still gives the cap
_UNLIKE = 49 * 2.51  # mse / (1 - SSIM) at most: 49 where the error lies in a corner, which few windows see
_LOUD = 49 / 0.01**2  # (1 - SSIM) / mse at most, by C1 of SSIM, in frames of one window
_EDGES = 4 * (7 / 6 + 7 / 6)  # energy of an error / mse at most, in frames of 7 x 7
Bound = tuple[str, str, np.ndarray, np.ndarray, np.ndarray]  # whose, which metric, its values, least, most


def check_tables(tables: Mapping[str, Table], seeds: int) -> dict[str, int]:
    """How many frames have no score, by what was generated: as `Measured.not_finite` counts them, for one noise seed.

    ValueError where the tables of `measure`, or of a sweep with its references, averaged over so many noise seeds,
    contradict each other.
    """
    lost: dict[str, int] = {}
    for who, table in tables.items():
        missing = _missing(who, table)
        if who not in (*REFERENCES, "forced_1"):  # frame 1 from true context is frame 1 of the rollout
            name = "teacher_forced" if who.startswith("forced_") else who
            lost[name] = lost.get(name, 0) + int(missing.sum())
    for bounds in (_of_errors(tables, seeds), _of_motion(tables), _of_stills(tables), _of_first_steps(tables)):
        for who, metric, values, least, most in bounds:
            if ((values < least - _TINY) | (values > most + _TINY)).any():  # NaN is neither
                raise ValueError(f"'{who}/{metric}' is denied by other scores of the same frames")
    return lost


def errors_of(psnr: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most that the mean error of so many frames can be, by the mean of their PSNRs in dB.

    PSNR falls with the error along a convex curve that is cut off at the cap. So the error is least where all err
    alike, or, near the cap, where they lie on the line from no error that touches the curve; most where as many as can
    be are wholly wrong, one is between, and the others are at the cap. Of one frame both are its error.
    """
    low, high = np.clip(psnr - _SLACK, 0, CAP_DB), np.clip(psnr + _SLACK, 0, CAP_DB)
    alike, fall = 10 ** (-high / 10), (CAP_DB - high) * math.log(10) / 10
    line = fall * math.e * _CAPPED
    least = np.where(high < CAP_DB, alike, 0.0) if draws == 1 else np.where(fall < 1, line, alike)
    wrong = draws * (CAP_DB - low) / CAP_DB
    wholly = np.minimum(np.floor(wrong), draws - 1)
    most = (wholly + 10 ** (-CAP_DB * (1 + wholly - wrong) / 10) + (draws - 1 - wholly) * _CAPPED) / draws
    return np.where(np.isnan(psnr), np.nan, least), most


def likeness_of(least: np.ndarray, most: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the most that SSIM can be where the mean squared error lies between these: 1 is no error at all."""
    return 1 - _LOUD * most, 1 - least / _UNLIKE


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


def _of_errors(tables: Mapping[str, Table], seeds: int) -> Iterator[Bound]:
    """PSNR, SSIM, colour and sharpness by the error; sharpness as far from the truth's as the error can take it."""
    sharp = np.sqrt(np.maximum(tables["truth"]["energy"], 0))
    for who, table in tables.items():
        if "mse" not in table:
            continue
        yield who, "mse", table["mse"], *errors_of(table["psnr"], 1 if who in REFERENCES else seeds)
        if "ssim" in table:
            mse = np.maximum(table["mse"], 0)
            error, reach = np.sqrt(mse) * (1 + _SLACK), np.sqrt(_EDGES * mse) + _SLACK
            yield who, "ssim", table["ssim"], *likeness_of(mse, mse)
            yield who, "colour", table["colour"], np.zeros(()), error
            yield who, "energy", table["energy"], np.maximum(sharp - reach, 0) ** 2, (sharp + reach) ** 2


def _of_motion(tables: Mapping[str, Table]) -> Iterator[Bound]:
    """Mean and mean square of a motion by each other; products of two; and motion as far from the truth's as the errors
    of the two frames that it leads from and to can take it. The truth's is the same for all."""
    less, more = 1 - _FLOAT32, 1 + _FLOAT32
    true = tables["floor"]["motion_tt"]
    yield "truth", "motion", true, *_squares(tables["truth"]["motion"])
    for who, table in tables.items():
        if "motion_tt" not in table:
            continue
        gg, gt, tt = (table[f"motion_{product}"] for product in ("gg", "gt", "tt"))
        yield who, "motion_tt", tt, true * (1 - _SLACK), true * (1 + _SLACK)
        yield who, "motion_gg", gg, *_squares(table["motion"])
        both = np.sqrt(np.maximum(gg * tt, 0)) * (1 + _SLACK)
        yield who, "motion_gt", gt, -both, both
        error = np.sqrt(np.maximum(table["mse"], 0))
        before, after = error[:, :-1], error[:, 1:]  # of frame 1 the start may be a reconstruction
        apart = (gg - 2 * gt + tt)[:, 1:]
        yield who, "motion_gt", apart, (before - after) ** 2 * less, (before + after) ** 2 * more


def _squares(motion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Between what the mean square of differences lies whose mean size is known: each is 0, or a level to 1."""
    return np.maximum(motion**2, motion / LEVELS) * (1 - _FLOAT32), motion * (1 + _FLOAT32)


def _of_stills(tables: Mapping[str, Table]) -> Iterator[Bound]:
    """One frame throughout does not move, and is as sharp everywhere: the floor in a window, the mean frame in all."""
    for who in STILL:
        if who in tables:
            motion, energy = tables[who]["motion"], tables[who]["energy"]
            same = energy[:, :1] if who == "floor" else energy[:1, :1]
            yield who, "motion", motion, np.zeros(()), np.zeros(())
            yield who, "energy", energy, same * (1 - _SLACK), same * (1 + _SLACK)


def _of_first_steps(tables: Mapping[str, Table]) -> Iterator[Bound]:
    """Steps from true context: the first is the rollout's, and each one's floor is how far the truth moves there."""
    for who, table in tables.items():
        if not who.startswith("forced_"):
            continue
        at = int(who.removeprefix("forced_")) - 1
        moved = psnr_from_mse(np.maximum(tables["floor"]["motion_tt"][:, at : at + 1], 0))
        slack = 10 * _FLOAT32  # dB
        yield who, "floor", table["floor"], moved - slack, moved + slack
        if at == 0:
            for metric, of in (("psnr", "model"), ("floor", "floor")):
                first = tables[of]["psnr"][:, :1]
                if not np.array_equal(np.isnan(first), np.isnan(table[metric])):
                    raise ValueError(f"'{who}/{metric}' is not that of the first frame")
                yield who, metric, table[metric], first - _SLACK, first + _SLACK
