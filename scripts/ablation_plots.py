"""The plots of docs/results.md: differences to a reference, quality over seconds, and samplers over their passes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.evaluation.protocol import student_975

if TYPE_CHECKING:
    from ablation_tables import Found, Study

ACROSS = 3  # panels beside each other
COLOURS = ("#1f6fb4", "#c44e52", "#55a868", "#8172b2", "#937860")
LABELS = {
    "delta@4": "action delta at 4, dB", "sharp": "sharpness over truth", "motion": "motion over truth",
    "spread@16": "spread at 16 (1: calibrated)", "energy@16": "energy score at 16", "Frechet": "Fréchet distance",
    "sharp@64": "sharpness at 64", "motion@64": "motion at 64",
}  # fmt: skip


def plot_table(study: Study, table: dict[str, Any], folder: Path) -> Path | None:
    """The figure of one table of the plan, into `folder`; None where fewer than two of its rows are there."""
    rows = [f for row in table["rows"] if (f := study.found.get(tuple(row)))]
    if len(rows) < 2:
        return None
    columns = table.get("columns", ["gain@1", "gain@4", "gain@16", "delta@4", "sharp", "motion"])
    kind: Callable = {"seconds": _curves, "steps": _curves}.get(table.get("over", ""), _forest)
    figure = kind(study, table, rows, columns)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    folder.mkdir(exist_ok=True)
    path = folder / f"{table['name']}.png"
    write_whole(path, data.getvalue())
    return path


def _forest(study: Study, table: dict[str, Any], rows: list[Found], columns: list[str]):
    """A panel a column, a row an arm: paired differences to the reference, or values where there is none."""
    against = study.found.get(tuple(table["reference"])) if "reference" in table else None
    figure, panels = _panels(len(columns), width=2.3, height=0.75 + 0.24 * len(rows))
    for axes, column in zip(panels, columns, strict=True):
        for i, f in enumerate(rows):
            if not f.has(column):
                continue
            other = against if against is not f else None
            value, lo, hi = study.mean(f, column, other) if against is not f else (0.0, 0.0, 0.0)
            axes.errorbar(
                value, -i, xerr=[[value - lo], [hi - value]], color=COLOURS[0 if against is not f else 1], marker="o",
                markersize=4, capsize=2, linewidth=1,
            )  # fmt: skip
        if against is not None:
            axes.axvline(0, color="#777777", linewidth=0.8)
        axes.set_title(("difference in " if against else "") + LABELS.get(column, f"{column}, dB"), fontsize=7)
        axes.set_yticks([-i for i in range(len(rows))], [f"{f.arm}, {f.view}" for f in rows], fontsize=7)
        axes.locator_params(axis="x", nbins=5)
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        if not axes.get_subplotspec().is_first_col():
            axes.tick_params(labelleft=False)
    return figure


def _curves(study: Study, table: dict[str, Any], rows: list[Found], columns: list[str]):
    """A panel a column, a line a family of arms or views, over the seconds of training or the passes K of a frame.

    The same windows everywhere, so bars are those of training seeds alone.
    """
    figure, panels = _panels(len(columns), width=2.6, height=2.6)
    over = table["over"]
    families: dict[str, list[tuple[float, Found]]] = {}
    for f in rows:
        name = f.arm if over == "seconds" else f.view
        x = f.results[0]["study"]["cpu_seconds"] if over == "seconds" else float(re.search(r"(\d+)$", f.view)[1])
        family = table.get("families", {}).get(name, re.sub(r"-?\d+$", "", name))
        if family:
            families.setdefault(family, []).append((x, f))
    for axes, column in zip(panels, columns, strict=True):
        for colour, (family, points) in zip(COLOURS, families.items(), strict=False):
            points = sorted([p for p in points if p[1].has(column)], key=lambda p: p[0])
            if not points:
                continue
            bars = []
            for _, f in points:
                sd, freedom = study.spread(f, column)
                bars.append(student_975(freedom) * sd / math.sqrt(len(f.results)))
            axes.errorbar(
                [x for x, _ in points], [f.by_seed(column).mean() for _, f in points], yerr=bars, label=family,
                color=colour, marker="o", markersize=4, capsize=2, linewidth=1,
            )  # fmt: skip
        axes.set_title(LABELS.get(column, f"{column}, dB"), fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("CPU seconds of training" if over == "seconds" else "passes a frame (K)", fontsize=7)
        ticks = sorted({x for points in families.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7)
        axes.minorticks_off()
        if column == "spread@16":
            axes.axhline(1, color="#777777", linewidth=0.8, linestyle="--")
    panels[0].legend(fontsize=7, frameon=False)
    return figure


def _panels(count: int, width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = math.ceil(count / ACROSS)
    figure = Figure(figsize=(1.2 + width * min(count, ACROSS), height * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, min(count, ACROSS), squeeze=False).flatten()
    for unused in panels[count:]:
        unused.remove()
    panels = panels[:count]
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return figure, panels
