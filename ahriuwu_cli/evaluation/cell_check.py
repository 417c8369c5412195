"""Results of evaluations held to what the same work would write: entries, types, ranges, and no contradiction.

What the scores of a result's own windows decide is made from them anew, by the functions that made it. Of the rest
form and range are known, and that metrics of the same frames must not deny each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ahriuwu_cli.evaluation.cells import first_difference, identity
from ahriuwu_cli.evaluation.evaluate import delta_note
from ahriuwu_cli.evaluation.measure import CONTROLS, table_shapes
from ahriuwu_cli.evaluation.metrics import CAP_DB, psnr_from_mse
from ahriuwu_cli.evaluation.prepare import INTERVAL_BEFORE, NO_MEAN, of_few
from ahriuwu_cli.evaluation.protocol import FEW
from ahriuwu_cli.evaluation.score_files import MOST, tables_of
from ahriuwu_cli.evaluation.scores import Table
from ahriuwu_cli.evaluation.settings_check import (
    IDENTITY,
    SETTINGS,
    Check,
    Form,
    check_rollouts,
    exactly,
    hold,
    number,
    or_none,
    text,
    whole,
)
from ahriuwu_cli.evaluation.summary import by_horizon, by_window, delta, drift, jsonable, pick_horizons
from ahriuwu_cli.evaluation.table_check import LEVELS, STILL, errors_of, likeness_of

CLOSE = 1e-5  # results have 6 decimals, and some numbers are made of several
DRAWS = 0.2  # of an interval's length: more than two bootstraps of the same numbers ever differ
DB = number(0, CAP_DB)
DIFFERENCE = number(-CAP_DB, CAP_DB)
ENDS = number(-20 * CAP_DB, 20 * CAP_DB)  # of an interval, which with two episodes is 12.7 standard errors wide
_RANGES = {  # by the end of a number's name
    "_db": DIFFERENCE, "psnr": DB, "floor": DB, "ceiling": DB, "mse": DB, "mean_frame": DB, "_lo": ENDS, "_hi": ENDS,
    "ssim": number(-1, 1), "ratio": number(0, MOST), "cosine": number(-1 - CLOSE, 1 + CLOSE), "shift": number(0, 1),
}  # fmt: skip
_TOLD = ("psnr", "floor", "ceiling", "gain_db", "ssim")  # of a horizon: windows tell it
_LOOKS = ("psnr_of_mse", "ssim", "colour_shift", "sharpness_ratio", "motion_ratio", "motion_cosine")
_ROUNDED = 1e-6  # of one number
_CURVES = ("psnr", "psnr_lo", "psnr_hi", "floor", "ceiling", "mean_frame", "ssim")
_ENTRIES = (
    "kind", "status", "not_finite_frames", "settings", "n", "last", "horizons", "action_delta_db",
    "action_delta_moving_db", "action_delta_note", "drift_db_per_frame", "curves", "windows", "warnings", "timing",
)  # fmt: skip
_CELL = {
    "format": text, "names": {"checkpoint": text, "dataset": text}, "identity": IDENTITY,
    "result": dict.fromkeys(_ENTRIES, lambda value: True),
}  # fmt: skip


def check_cell(document: dict[str, Any]) -> None:
    """ValueError unless a document is one that `cells.write_cell` writes, but for its checksum and its name."""
    told = _with_precision(document.get("identity"))
    hold(document | {"identity": told}, _CELL)
    result = document["result"] | {"settings": _with_precision(document["result"]["settings"])}
    check_result(result)
    if differs := first_difference(told, identity(result["settings"], told["checkpoint_hash"])):
        raise ValueError(f"the {differs} of its result is another")


def check_scores(scores: dict[str, Any]) -> None:
    """ValueError or KeyError unless an eval.json holds what `evaluate` returns, whatever looks came with it."""
    settings, timing = scores["settings"], scores["timing"]
    kept = {name: scores[name] for name in _ENTRIES}
    if type(settings) is dict and type(timing) is dict:
        kept["settings"] = _with_precision({n: v for n, v in settings.items() if n != "checkpoint_hash"})
        kept["timing"] = {name: value for name, value in timing.items() if name != "looks"}
    if scores.get("not_finite_looks"):  # then the rollouts themselves may well be
        hold(scores["status"], exactly("nan"), "status")
        kept["status"] = "nan" if any(scores["not_finite_frames"].values()) else "ok"
    check_result(kept)


def check_result(result: dict[str, Any]) -> None:
    """ValueError unless a result, of the entries of `evaluate.summarise`, is one that it makes."""
    settings, counts, rows = result["settings"], result["not_finite_frames"], result["windows"]
    hold(settings, SETTINGS, "settings")
    check_rollouts(settings["generation"], settings["k_max"])
    told = settings["evaluation"]
    hold(told["split"], exactly(settings["split"]), "split")
    last, horizons = told["horizon"], pick_horizons(told["horizons"], told["horizon"])
    controls = CONTROLS if type(counts) is dict and CONTROLS[0] in counts else ()
    made = ("model", *controls, *(["teacher_forced"] if last > 1 else []))
    hold(counts, dict.fromkeys(made, whole(0, int(MOST))), "not_finite_frames")
    tables = _tables(rows, told["windows"], horizons, controls, counts)
    _check_likeness(tables["model"], told["noise_seeds"])
    if no_mean := type(result["warnings"]) is list and NO_MEAN in result["warnings"]:
        tables["mean_frame"] = {name: np.full_like(each, np.nan) for name, each in tables["mean_frame"].items()}
    episodes = [row["episode"] for row in rows]
    older = settings["interval"] == INTERVAL_BEFORE and len(set(episodes)) < FEW
    n = {"windows": len(rows), "episodes": len(set(episodes)), "noise_seeds": told["noise_seeds"]}
    at = pick_horizons((told["delta_at"],), last)

    def delta_at(control: str, h: int) -> Form:
        return near(delta(tables, control, episodes, horizons.index(h) + 1), older) if h in horizons else _interval

    deltas = {c: {str(h): delta_at(c, h) for h in at} for c in controls}
    slope = _interval if last > 1 else exactly(None)
    forms = {
        "kind": exactly("eval"),
        "status": exactly("nan" if any(counts.values()) else "ok"),
        "n": {name: exactly(value) for name, value in n.items()},
        "last": exactly(last),
        "horizons": {str(h): _of_horizon(tables, episodes, i, h, counts, older) for i, h in enumerate(horizons)},
        "action_delta_db": deltas or exactly(None),
        "action_delta_moving_db": {c: dict.fromkeys(map(str, at), _interval) for c in controls} or exactly(None),
        "action_delta_note": exactly(delta_note(controls, episodes)),
        "drift_db_per_frame": dict.fromkeys(("model", "floor", "ceiling"), slope),
        "curves": {"frame": exactly(list(range(1, last + 1)))} | {name: _curve(name, last) for name in _CURVES},
        "warnings": _warnings([NO_MEAN] * no_mean + of_few(episodes)),
        "timing": dict.fromkeys(("seconds", "frames_per_s"), number(0, MOST)),
    }
    for name, form in forms.items():
        hold(result[name], form, name)
    for i, h in enumerate(horizons):
        psnr = {who: tables[who]["psnr"][:, i] for who in ("model", "floor", "ceiling")}
        _check_horizon(result["horizons"][str(h)], psnr, told["noise_seeds"], counts["model"] > 0)
    _check_curves(result["curves"], result["horizons"], counts["model"] > 0, no_mean)
    curves = {name: np.array(result["curves"][name], float) for name in _CURVES}
    _check_likeness(curves, told["noise_seeds"] * len(rows))
    for who, name in (("model", "psnr"), ("floor", "floor"), ("ceiling", "ceiling")) if last > 1 else ():
        slope = drift({who: {"psnr": curves[name][None]}}, who, episodes[:1])
        hold(result["drift_db_per_frame"][who]["value"], near(slope.value), f"drift_db_per_frame.{who}")


def near(value: Any, of_few: bool = False) -> Form:
    """What a value of `summary` is in a file, but for rounding; ends of an interval may be of other draws (NumPy's).

    of_few: older versions made the ends of these few episodes in another way, so anything between is taken.
    """
    value = jsonable(value)
    if of_few and isinstance(value, dict) and value["value"] is not None:
        return {name: _within(each, CLOSE) if name == "value" else or_none(ENDS) for name, each in value.items()}
    if isinstance(value, dict):
        wide = 0.0 if None in value.values() else DRAWS * (value["hi"] - value["lo"])
        return {name: _within(each, CLOSE + wide * (name != "value")) for name, each in value.items()}
    return _within(value, CLOSE)


def _within(value: float | None, most: float) -> Form:
    """A number not farther off than that, or null where it is null."""
    return exactly(None) if value is None else number(value - most, value + most)


def _with_precision(settings: Any) -> Any:
    return {"precision": "float32"} | settings if type(settings) is dict else settings  # from when there was no other


def _range(name: str) -> Check:
    return next(check for end, check in _RANGES.items() if name.endswith(end))


def _interval(value: Any) -> bool:
    """A difference in dB between its ends, or without any; null altogether where a frame was not finite."""
    if type(value) is not dict or value.keys() != {"value", "lo", "hi"}:
        return False
    mean, lo, hi = value["value"], value["lo"], value["hi"]
    if lo is None or hi is None:
        return lo is hi and or_none(DIFFERENCE)(mean)
    return DIFFERENCE(mean) and ENDS(lo) and ENDS(hi) and lo - CLOSE <= mean <= hi + CLOSE


def _warnings(own: list[str]) -> Check:
    """What must be said, then at most that world and dataset run at other rates: a line each."""

    def fits(value: Any) -> bool:
        if type(value) is not list or value[: len(own)] != own or len(value) > len(own) + 1:
            return False
        return all(text(line) and line.isprintable() for line in value)

    return fits


def _tables(
    rows: Any, windows: int, horizons: Sequence[int], controls: Sequence[str], counts: Mapping[str, int]
) -> dict[str, Table]:
    """The tables of `measure` at the horizons alone, as far as the windows tell; what they do not is 0.

    ValueError for a window that contradicts itself or the counts.
    """
    if type(rows) is not list or len(rows) != windows:
        raise ValueError("its windows are not as many as its settings say")
    nothing = {name: np.broadcast_to(0.0, shape) for name, shape in table_shapes(1, horizons[-1], (), controls).items()}
    (names,) = by_window(tables_of(nothing), [("", 0)], horizons, controls)
    form = {name: or_none(_range(name.rpartition("_")[0])) for name in names if name not in ("episode", "start")}
    form |= {"episode": text, "start": whole(0, int(MOST))}
    for row in rows:
        hold(row, form, "windows")
    if len({(row["episode"], row["start"]) for row in rows}) < windows:
        raise ValueError("it lists a window twice")
    shapes = table_shapes(windows, len(horizons), (), controls)
    tables = tables_of({name: np.zeros(shape) for name, shape in shapes.items()})
    for i, h in enumerate(horizons):
        told = {name: np.array([row[f"{name}_{h}"] for row in rows], float) for name in _TOLD}  # null becomes NaN
        broken = np.isnan(told["psnr"])
        sound = np.allclose(told["gain_db"], told["psnr"] - told["floor"], 0, CLOSE, equal_nan=True)
        sound &= np.array_equal(np.isnan(told["ssim"]), broken) and (counts["model"] > 0 or not broken.any())
        sound &= bool(np.isfinite(told["floor"]).all() and np.isfinite(told["ceiling"]).all())
        for metric in tables["model"].values():
            metric[broken, i] = np.nan
        for who, name in (("model", "psnr"), ("model", "ssim"), ("floor", "floor"), ("ceiling", "ceiling")):
            tables[who][name if who == "model" else "psnr"][:, i] = told[name]
        for c in controls:
            psnr = told["psnr"] - np.array([row[f"delta_{c}_db_{h}"] for row in rows], float)
            sound &= bool((np.isnan(psnr) | (psnr >= -CLOSE) & (psnr <= CAP_DB + CLOSE)).all())
            sound &= counts[c] > 0 or np.array_equal(np.isnan(psnr), broken)
            tables[c]["psnr"][:, i] = psnr
        if not sound:
            raise ValueError(f"its windows contradict themselves at frame {h}")
    return tables


def _of_horizon(
    tables: dict[str, Table], episodes: Sequence[str], i: int, h: int, counts: Mapping[str, int], older: bool
) -> dict[str, Form]:
    """The form of the i-th horizon, which is frame h. older: as `near` takes it."""
    forms: dict[str, Form] = {}
    made = jsonable(by_horizon(tables, episodes, i + 1))
    for name, value in made.items():
        if name in _TOLD:
            forms[name] = near(value, older)
        elif name.startswith("mean_frame_") and made["mean_frame_psnr"] is None:
            forms[name] = exactly(None)
        elif name.endswith(("ratio", "cosine")):  # null where the truth does not move, too
            forms[name] = or_none(_range(name))
        else:
            forms[name] = exactly(None) if value is None else _range(name)
    if h == 1:  # frame 1 of the rollout is its own step from true context
        forced = near(made["psnr"]["value"]), near(made["floor"]["value"])
    else:
        forced = or_none(DB) if counts["teacher_forced"] else DB, DB
    return forms | dict(zip(("teacher_forced_psnr", "teacher_forced_floor"), forced, strict=True))


def _check_likeness(table: Table, draws: int) -> None:
    """ValueError where SSIM denies PSNR, each a mean of so many frames."""
    low, high = likeness_of(*errors_of(table["psnr"], draws))
    if ((table["ssim"] < low - CLOSE) | (table["ssim"] > high + CLOSE)).any():  # NaN is neither
        raise ValueError("its ssim and psnr contradict each other")


def _check_horizon(row: Mapping[str, Any], psnr: Mapping[str, np.ndarray], seeds: int, broken: bool) -> None:
    """ValueError where the metrics of one frame deny each other. psnr: dB of model, floor and ceiling, (W,) each.

    broken: whether a frame of the model was not finite, which makes its motion null.
    """
    unmoved, flat = row["floor_motion_ratio"] is None, row["floor_sharpness_ratio"] is None  # as the truth is, then
    for who in ("model", "floor", "ceiling", "mean_frame"):
        name = "" if who == "model" else f"{who}_"
        at = {metric: row[f"{name}{metric}"] for metric in _LOOKS}
        if at["psnr_of_mse"] is None:
            continue  # nothing is known of these frames
        if who == "mean_frame":
            least, most = errors_of(np.array(row["mean_frame_psnr"]), len(psnr["floor"]))
        else:
            least, most = errors_of(psnr[who], seeds if who == "model" else 1)
        low, high = psnr_from_mse(most.mean()) - CLOSE, psnr_from_mse(least.mean()) + CLOSE
        hold(at["psnr_of_mse"], number(low, high), f"{name}psnr_of_mse")
        least, most = errors_of(np.array(at["psnr_of_mse"]), 1)
        low, high = likeness_of(least, most)
        hold(at["ssim"], number(low - CLOSE, high + CLOSE), f"{name}ssim")
        hold(at["colour_shift"], number(0, most**0.5 + CLOSE), f"{name}colour_shift")
        hold(at["sharpness_ratio"] is None, exactly(flat), f"{name}sharpness_ratio")
        for metric in ("motion_ratio", "motion_cosine"):
            if not (broken and who == "model" and at[metric] is None):
                hold(at[metric] is None, exactly(unmoved), f"{name}{metric}")
        if at["motion_ratio"] is not None and at["motion_cosine"] is not None:
            if who in STILL:
                hold(at["motion_ratio"], number(0, 0), f"{name}motion_ratio")
            reach = LEVELS * (at["motion_ratio"] + _ROUNDED * (who not in STILL)) ** 0.5
            hold(at["motion_cosine"], number(-reach, reach), f"{name}motion_cosine")


def _curve(name: str, length: int) -> Check:
    check = or_none(_range(name))
    return lambda value: type(value) is list and len(value) == length and all(map(check, value))


def _check_curves(found: Mapping[str, list], rows: Mapping[str, Any], broken: bool, no_mean: bool) -> None:
    """ValueError where curves contradict the horizons, themselves or what is known of frames that are not finite."""
    values = {name: np.array(found[name], float) for name in _CURVES}
    missing = {name: np.isnan(each) for name, each in values.items()}
    sound = missing["psnr"].any() == broken and np.array_equal(missing["psnr"], missing["ssim"])
    sound &= np.array_equal(missing["psnr_lo"], missing["psnr_hi"]) and not any(
        missing[name].any() for name in ("floor", "ceiling")
    )
    sound &= (missing["mean_frame"] == no_mean).all()
    sound &= not ((values["psnr_lo"] > values["psnr"] + CLOSE) | (values["psnr_hi"] < values["psnr"] - CLOSE)).any()
    for h, row in rows.items():
        psnr, at = row["psnr"], int(h) - 1
        wanted = psnr["value"], psnr["lo"], psnr["hi"], row["floor"]["value"], row["ceiling"]["value"]
        wanted += row["mean_frame_psnr"], row["ssim"]
        for name, value in zip(_CURVES, wanted, strict=True):
            hold(found[name][at], near(value), f"curves.{name}")
    if not sound:
        raise ValueError("its curves contradict themselves")
