"""The tables of docs/results.md from what scripts/ablate.py found: means over seeds, with two kinds of interval.

`value [lo, hi]` is a 95 % interval of the mean: over held-out episodes (bootstrap, paired where it is a difference) and
over training seeds (Student's t; an arm's spread between seeds is drawn towards the usual one, since three seeds alone
hardly know it). A run with another seed, on the same windows, should come out within "value +- rerun".
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
from ablation_plots import plot_table

from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.evaluation.protocol import paired_bootstrap, student_975
from ahriuwu_cli.evaluation.report import number

BY_WINDOW = {  # columns that every window has, so that episodes and pairs count
    "gain@1": "gain_db_1", "gain@4": "gain_db_4", "gain@16": "gain_db_16",
    "gain@64": "gain_db_64", "delta@4": "delta_shuffled_db_4", "delta@16": "delta_shuffled_db_16",
}  # fmt: skip
PRIOR = 4  # degrees of freedom that the usual spread counts for
PLACES = {  # columns that a run has one number of: where it stands in the result; the intervals count seeds alone
    "SSIM": ("horizons", "16", "ssim"), "motion": ("horizons", "16", "motion_ratio"),
    "cosine": ("horizons", "16", "motion_cosine"), "sharp": ("horizons", "16", "sharpness_ratio"),
    "sharp@64": ("horizons", "64", "sharpness_ratio"), "motion@64": ("horizons", "64", "motion_ratio"),
    "spread@16": ("spread", "horizons", "16", "spread_ratio", "value"),
    "energy@16": ("spread", "horizons", "16", "energy_score", "value"),
    "Frechet": ("distances", "latent_frechet", "generated"),
    **{  # error of z_hat at generated frame 1 and 16, by level: position 7 + frame, tenth of tau
        f"tau {(bin + 1) / 10:g} @{frame}": ("levels", "error", 7 + frame, bin)
        for bin in (1, 4, 9) for frame in (1, 16)
    },
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """All seeds of one view of one arm."""

    arm: str
    view: str
    results: tuple[dict[str, Any], ...]

    def windows(self, column: str, beside: Found | None = None) -> np.ndarray:
        """(seeds, windows) of a column of BY_WINDOW; `beside` another: of the seeds that both have."""
        return np.array([[row[BY_WINDOW[column]] for row in r["windows"]] for r in self._of(beside)], float)

    def by_seed(self, column: str, beside: Found | None = None) -> np.ndarray:
        """(seeds,) means of a column; `beside` another: of the seeds that both have."""
        if column in BY_WINDOW:
            return self.windows(column, beside).mean(axis=1)
        return np.array([reduce(getitem, PLACES[column], r) for r in self._of(beside)], float)

    @property
    def seeds(self) -> set[int]:
        return {r["study"]["seed"] for r in self.results}

    def _of(self, beside: Found | None) -> list[dict[str, Any]]:
        return [r for r in self.results if beside is None or r["study"]["seed"] in beside.seeds]

    def has(self, column: str) -> bool:
        """Whether this view was looked at so."""
        try:
            self.by_seed(column)
        except KeyError:
            return False
        return True

    @property
    def episodes(self) -> list[str]:
        return [row["episode"] for row in self.results[0]["windows"]]


class Study:
    """What lies in OUT/results, and how far apart seeds of one arm are."""

    def __init__(self, folder: Path) -> None:
        found: dict[tuple[str, str], list] = {}
        for path in sorted(folder.glob("*.json")):
            result = json.loads(path.read_text())
            about = result["study"]
            found.setdefault((about["arm"], about["view"]), []).append(result)
        self.found = {key: Found(*key, tuple(sorted(r, key=lambda r: r["study"]["seed"]))) for key, r in found.items()}

    def usual(self, column: str) -> float:
        """The variance between seeds that most arms have: a median, so that one arm that fails at times stays alone.

        Views of an arm look at the same worlds, so their mean counts once.
        """
        arms: dict[str, list[float]] = {}
        for f in self.found.values():
            if f.has(column):
                arms.setdefault(f.arm, []).append(_variance(f.by_seed(column)))
        return _usual(arms)

    def usual_between_views(self, column: str) -> float:
        """The same of the difference between an arm's first view and another one: both look at the same worlds."""
        first: dict[str, Found] = {}
        arms: dict[str, list[float]] = {}
        for f in (f for f in self.found.values() if f.has(column)):
            other = first.setdefault(f.arm, f)
            if other is not f:
                arms.setdefault(f.arm, []).append(_variance(f.by_seed(column, other) - other.by_seed(column, f)))
        return _usual(arms)

    def spread(self, f: Found, column: str) -> tuple[float, int]:
        """(standard deviation between seeds of this arm, degrees of freedom): its own, drawn towards the usual one."""
        return _moderated(f.by_seed(column), self.usual(column))

    def rerun(self, f: Found, column: str) -> float:
        """Half of the 95 % interval that one more seed falls into, on the same windows."""
        sd, freedom = self.spread(f, column)
        return student_975(freedom) * sd * math.sqrt(1 + 1 / len(f.results))

    def mean(self, f: Found, column: str, minus: Found | None = None) -> tuple[float, float, float]:
        """(value, lo, hi) of the mean over seeds, or of its paired difference to another arm's or view's.

        Two views of an arm are paired by seed, two arms by window alone.
        """
        same = minus is not None and minus.arm == f.arm
        ours, theirs = f.by_seed(column, minus if same else None), np.zeros(1)
        if minus is not None:
            theirs = minus.by_seed(column, f if same else None)
        if same:
            sd, freedom = _moderated(ours - theirs, self.usual_between_views(column))
            half = student_975(freedom) * sd / math.sqrt(len(ours))
        else:
            parts = [(self.spread(arm, column), len(arm.results)) for arm in (f, minus) if arm is not None]
            half = math.hypot(*(student_975(freedom) * sd / math.sqrt(n) for (sd, freedom), n in parts))
        if column not in BY_WINDOW:
            value = ours.mean() - theirs.mean()
            return value, value - half, value + half
        values = f.windows(column, minus if same else None).mean(0)
        if minus is not None:
            values = values - minus.windows(column, f if same else None).mean(0)
        b = paired_bootstrap(values, f.episodes)
        return b.value, b.value - math.hypot(b.value - b.lo, half), b.value + math.hypot(b.hi - b.value, half)


def _variance(values: np.ndarray) -> float:
    """Of few values, as one of many whose median is taken: that of a chi-square is low (Wilson & Hilferty 1931)."""
    return values.var(ddof=1) / (1 - 2 / (9 * (len(values) - 1))) ** 3 if len(values) > 1 else math.nan


def _usual(arms: dict[str, list[float]]) -> float:
    """The median over arms of the mean over what each has; NaN where no arm has anything."""
    means = [np.nanmean(v) for v in arms.values() if not np.isnan(v).all()]
    return float(np.median(means)) if means else math.nan


def _moderated(values: np.ndarray, usual: float) -> tuple[float, int]:
    """(standard deviation, degrees of freedom) of few values, drawn towards the usual one.

    Three seeds hardly know their spread; the usual one counts as PRIOR further ones (moderated t, Smyth 2004).
    """
    own, freedom = (values.var(ddof=1), len(values) - 1) if len(values) > 1 else (0.0, 0)
    return math.sqrt((PRIOR * usual + freedom * own) / (PRIOR + freedom)), PRIOR + freedom


def write_report(plan: dict[str, Any], out: Path, docs: Path, numbers: Path) -> None:
    """Put every table of the plan between its marks in docs/results.md; `numbers` (JSON) holds the means by seed."""
    study = Study(out / "results")
    path = docs / "results.md"
    text = path.read_text()
    for table in plan["table"]:
        mark = re.compile(rf"(<!-- table {table['name']} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert mark.search(text), f"{path} has no place for the table {table['name']}"
        filled = as_markdown(study, table)
        figure = plot_table(study, table, docs / "results")
        if figure is not None:
            filled += f"\n![{table['name']}: the table as a plot](results/{figure.name})\n"
        text = mark.sub(lambda found, filled=filled: found[1] + filled + found[2], text)
    write_whole(path, text)
    columns = (*BY_WINDOW, *PLACES)
    rows = [
        {
            "arm": f.arm, "view": f.view, "seed": r["study"]["seed"], "steps": r["study"]["steps"],
            "cpu_seconds": r["study"]["cpu_seconds"],
            **{c: round(float(f.by_seed(c)[i]), 4) for c in columns if f.has(c)},
        }
        for f in study.found.values() for i, r in enumerate(f.results)
    ]  # fmt: skip
    usual = {c: round(math.sqrt(study.usual(c)), 4) for c in columns if not math.isnan(study.usual(c))}
    write_whole(numbers, json.dumps({"usual_sd_between_seeds": usual, "rows": rows}, indent=1) + "\n")


def as_markdown(study: Study, table: dict[str, Any]) -> str:
    """One row an arm and view; the reference's own values, then differences to it where the table asks for them."""
    columns = table.get("columns", ["gain@1", "gain@4", "gain@16", "delta@4", "sharp", "motion"])
    rows = [study.found.get(tuple(row)) for row in table["rows"]]
    lacking = [" ".join(key) for key, f in zip(table["rows"], rows, strict=True) if f is None]
    against = study.found.get(tuple(table["reference"])) if "reference" in table else None
    compared = table.get("compared", "gain@16" if "gain@16" in columns else columns[0])
    lines = [["arm, view", "seeds", "steps", *columns, f"rerun, {compared}"]]
    if against:
        lines[0].append(f"{compared} minus {' '.join(table['reference'])}")
    for f in rows:
        if f is None:
            continue
        steps = round(np.mean([r["study"]["steps"] for r in f.results]))
        cells = [f"{f.arm}, {f.view}", str(len(f.results)), str(steps)]
        cells += [_interval(study.mean(f, c), sign=c in BY_WINDOW) if f.has(c) else "-" for c in columns]
        cells.append(f"+- {number(study.rerun(f, compared))}")
        if against:
            cells.append("ref" if f is against else _interval(study.mean(f, compared, against), sign=True))
        lines.append(cells)
    text = "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], ["---"] * len(lines[0]), *lines[1:]]) + "\n"
    return text + (f"\nNot yet run: {', '.join(lacking)}.\n" if lacking else "")


def _interval(values: tuple[float, float, float], sign: bool) -> str:
    value, lo, hi = (number(float(v), sign=sign) for v in values)
    return f"{value} [{lo}, {hi}]"
