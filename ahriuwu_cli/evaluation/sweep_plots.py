"""Figures of a sweep, drawn without a display: curves by generated frame, metrics by tau, and gain by both as a map."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.evaluation.plots import BLUE, GREY, floats, save_png
from ahriuwu_cli.evaluation.report import Row
from ahriuwu_cli.evaluation.sweep_grid import OTHERS

MISSING = "#d9d9d9"
BANDS = 3  # more groups than these are drawn without bands, which would hide each other


def groups(result: dict[str, Any]) -> list[tuple[str, list[Row]]]:
    """(title, cells by rising tau_ctx) of every K, sampler, context mode and label that was swept."""
    found: dict[tuple, list[Row]] = {}
    for cell in result["cells"]:
        found.setdefault(tuple(cell[n] for n in OTHERS), []).append(cell)
    titles = {key: _title(cells[0], result["varying"] or ["steps"]) for key, cells in found.items()}
    return [(titles[key], sorted(cells, key=lambda c: c["tau_ctx"])) for key, cells in found.items()]


def plot_sweep_curves(result: dict[str, Any], path: Path) -> None:
    """A row a group: left PSNR by generated frame of every cell with floor and ceiling, and the 95 % band of its best;
    right a small panel a cell with the paired difference to the reference and its 95 % band."""
    parts = groups(result)
    across = max(2, *(-(-(len(cells) - 1) // 2) for _, cells in parts))
    figure, grid = _grid(2 * len(parts), 2 + across, (5.2 + 2.1 * across, 3.9 * len(parts)))
    frames = range(1, len(result["curves"]["floor"]) + 1)
    for row, (title, cells) in enumerate(parts):
        left = figure.add_subplot(grid[2 * row : 2 * row + 2, :2])
        best = max(cells, key=lambda c: floats([c["psnr"][str(result["compared_at"])] or -1])[0])
        colors = _colors(len(cells))
        for color, cell in zip(colors, cells, strict=True):
            alpha = 0.18 if cell is best else 0
            _band(left, frames, cell["curve"]["psnr"], color, f"tau {cell['tau_ctx']:g}", alpha)
        for who, style in (("ceiling", ":"), ("floor", "--")):
            label = {"ceiling": "ceiling (tokenizer)", "floor": "floor (persistence)"}[who]
            left.plot(frames, floats(result["curves"][who]), color=GREY, linestyle=style, label=label)
        _dress(left, f"{title}; band: tau {best['tau_ctx']:g}", "generated frame", "PSNR (dB)")
        left.legend(fontsize=7, frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.15))
        small = None
        for i, (color, cell) in enumerate(zip(colors[1:], cells[1:], strict=True)):
            small = figure.add_subplot(grid[2 * row + i // across, 2 + i % across], sharex=small, sharey=small)
            _band(small, frames, cell["curve"]["difference_db"], color, "")
            small.axhline(0, color=GREY, linestyle="--", linewidth=1)
            _dress(small, f"tau {cell['tau_ctx']:g} minus tau {cells[0]['tau_ctx']:g}", "frame", "dB")
            if i % across:
                small.tick_params(labelleft=False)
                small.set_ylabel(None)
            if i + across < len(cells) - 1:
                small.tick_params(labelbottom=False)
                small.set_xlabel(None)
    _headline(figure, result, "bands: 95 % over episodes, on the right of the paired difference")
    save_png(figure, path)


def plot_gain_by_tau(result: dict[str, Any], path: Path) -> None:
    """Metrics by tau_ctx: gain at every reported frame for the best cell's group, and at the compared frame, for every
    group, the difference to the reference, motion, sharpness, action delta and drift."""
    at, parts = str(result["compared_at"]), groups(result)
    figure, grid = _grid(2, 3, (15.6, 7))
    axes = [[figure.add_subplot(grid[row, column]) for column in range(3)] for row in range(2)]
    best = _best_group(result, parts)
    x = [c["tau_ctx"] for c in best[1]]
    for color, h in zip(_colors(len(result["reported"])), map(str, result["reported"]), strict=True):
        _band(axes[0][0], x, [c["gain_db"][h] for c in best[1]], color, f"frame {h}")
    axes[0][0].axhline(0, color=GREY, linestyle="--", linewidth=1)
    _dress(axes[0][0], f"{best[0]}: gain over persistence", None, "dB")
    panels = (
        (axes[0][1], "difference_db", f"difference to the least tau, frame {at}", "dB", 0),
        (axes[0][2], "drift_db_per_frame", "drift of the gain", "dB a frame", 0),
        (axes[1][0], "sharpness_ratio", f"sharpness ratio, frame {at}", "generated / true", 1),
        (axes[1][1], "motion_ratio", f"motion ratio, frames 1 to {at}", "generated / true", 1),
        (axes[1][2], "action_delta_db", "action delta against shuffled actions", "dB", 0),
    )
    for panel, metric, title, unit, neutral in panels:
        for color, (label, cells) in zip(_group_colors(len(parts)), parts, strict=True):
            values = [c[metric][at] if metric.endswith(("ratio", "difference_db")) else c[metric] for c in cells]
            x = [c["tau_ctx"] for c in cells]
            if any(isinstance(v, dict) for v in values):
                _band(panel, x, [v or {} for v in values], color, label, 0.15 if len(parts) <= BANDS else 0)
            else:
                panel.plot(x, floats(values), color=color, marker="o", markersize=3, label=label)
        panel.axhline(neutral, color=GREY, linestyle="--", linewidth=1)
        _dress(panel, title, None, unit)
    if not any(c["action_delta_db"] for c in result["cells"]):
        axes[1][2].text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes[1][2].transAxes, color=GREY)
    for panel in axes[0] + axes[1]:
        _tau_axis(panel, [c["tau_ctx"] for c in result["cells"]])
    for panel in axes[1]:
        panel.set_xlabel(f"tau_ctx: {LABEL}; square-root axis", fontsize=9)
    axes[0][0].legend(fontsize=7, frameon=False)
    if len(parts) > 1:
        handles = axes[0][1].get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    bands = "bands: 95 % over episodes" + (" (left panel only)" if len(parts) > BANDS else "")
    _headline(figure, result, bands)
    save_png(figure, path)


def plot_gain_map(result: dict[str, Any], path: Path) -> None:
    """Heat maps, tau_ctx by generated frame, a row a group: gain over persistence (a ring marks each frame's best tau)
    and difference to the reference (a dot where its 95 % interval leaves out 0). Grey: not finite."""
    import numpy as np

    parts = groups(result)
    tallest = max(len(cells) for _, cells in parts)
    figure, grid = _grid(len(parts), 2, (14, len(parts) * max(1.6, 0.34 * tallest + 0.9) + 0.5))
    for column, metric in enumerate(("gain_db", "difference_db")):
        maps = [np.array([floats(_part(c["curve"][metric], "value")) for c in cells]) for _, cells in parts]
        limit = max((float(np.nanmax(np.abs(m))) for m in maps if np.isfinite(m).any()), default=1.0) or 1.0
        panels = [figure.add_subplot(grid[row, column]) for row in range(len(parts))]
        for panel, (title, cells), values in zip(panels, parts, maps, strict=True):
            shown = _map(panel, values, limit, [f"{c['tau_ctx']:g}" for c in cells])
            if metric == "gain_db":
                panel.set_title(f"{title}: gain over persistence; ring: best of its frame", fontsize=9)
                columns = [t for t in range(values.shape[1]) if np.isfinite(values[:, t]).any()]
                best = [np.nanargmax(values[:, t]) for t in columns]
                panel.plot(columns, best, "o", color="black", markersize=5, markerfacecolor="none")
            else:
                panel.set_title(f"{title}: difference to the least tau; dot: its interval leaves out 0", fontsize=9)
                clear = [[_clear(value) for value in c["curve"][metric]] for c in cells]
                panel.plot(*np.nonzero(np.array(clear).T), "o", color="black", markersize=3)
        panels[-1].set_xlabel("generated frame", fontsize=9)
        figure.colorbar(shown, ax=panels, label="dB", fraction=0.03, pad=0.01)
    _headline(figure, result, f"rows: tau_ctx, {LABEL}")
    save_png(figure, path)


def _map(axes, values, limit: float, rows: Sequence[str]):
    """values (rows, frames) in colours from -limit to limit."""
    from matplotlib import colormaps

    palette = colormaps["RdBu"].with_extremes(bad=MISSING)
    shown = axes.imshow(values, cmap=palette, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    frames, step = values.shape[1], max(1, values.shape[1] // 16)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(0, frames, step), range(1, frames + 1, step), fontsize=8)
    axes.set_ylabel("tau_ctx", fontsize=9)
    return shown


def _clear(value: Row) -> bool:
    """Whether an interval leaves out 0."""
    return value["lo"] is not None and (value["lo"] > 0 or value["hi"] < 0)


def _grid(rows: int, columns: int, size: tuple[float, float]):
    """(figure, grid to put panels on); size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_gridspec(rows, columns)


def _band(axes, x: Sequence[float], values: Sequence[Row], color, label: str, alpha: float = 0.15) -> None:
    """A line of interval values with their band; null leaves a gap."""
    axes.plot(x, floats(_part(values, "value")), color=color, marker="o", markersize=3, linewidth=1.4, label=label)
    if not alpha:
        return
    low, high = floats(_part(values, "lo")), floats(_part(values, "hi"))
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)


def _dress(axes, title: str, x: str | None, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if x:
        axes.set_xlabel(x, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _tau_axis(axes, taus: Sequence[float]) -> None:
    """Small levels are swept more densely than large ones: a square-root axis gives each its room."""
    import numpy as np

    axes.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
    ticks = sorted(set(taus))
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=7, rotation=45 if len(ticks) > 6 else 0)
    axes.minorticks_off()
    axes.set_xlim(-0.0005 if min(ticks) == 0 else min(ticks) * 0.9, max(ticks) * 1.06 + 1e-3)


def _headline(figure, result: dict[str, Any], more: str) -> None:
    n, common = result["n"], result["common"]
    how = ", ".join(f"K {v}" if key == "steps" else str(v) for key, v in common.items() if key != "ctx_label")
    about = (
        f"{n['windows']} windows of {n['episodes']} episodes ({result['settings']['split']}){'; ' + how if how else ''}"
    )
    figure.suptitle(f"{about}; {more}", fontsize=9)


def _colors(count: int) -> list:
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.9) for i in range(count)]


def _group_colors(count: int) -> list:
    from matplotlib import colormaps

    return [BLUE] if count == 1 else [colormaps["tab20"](i % 20) for i in range(count)]


def _title(cell: Row, varying: Sequence[str]) -> str:
    words = {"steps": f"K {cell['steps']}", "ctx_label": f"label {cell['ctx_label']}"}
    return ", ".join(words.get(n, str(cell[n])) for n in varying)


def _best_group(result: dict[str, Any], parts: list[tuple[str, list[Row]]]) -> tuple[str, list[Row]]:
    best = result["best"]
    if not best:
        return parts[0]
    return next(p for p in parts if all(p[1][0][n] == best[n] for n in OTHERS))


def _part(values: Sequence[Row], end: str) -> list[float | None]:
    return [v.get(end) for v in values]
