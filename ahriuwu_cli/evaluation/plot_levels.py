"""Figures of `levels.error_by_level`, drawn without a display: error by tau bin, and maps over (position, tau)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.evaluation.plots import BLUE, GREY, floats, save_png

ORANGE, RED = "#c8641e", "#c22f2f"
FAINT = 0.002  # shares of draws at or below it have the coverage map's lightest colour


def plot_error_by_level(result: dict[str, Any], path: Path) -> None:
    """Error by tau bin: with context (95 % band), the first frame without, the linear reference; the ramp over it."""
    figure = _figure(6.4, 4.4)
    axes = figure.add_subplot()
    x, rows = result["levels"], result["by_bin"]
    axes.plot(x, floats(result["linear"]), color=GREY, linestyle="--", label="best linear denoiser of a value alone")
    axes.plot(x, floats(result["alone"]), color=GREY, marker="o", markersize=3, label="model, no context (position 0)")
    value, low, high = (floats([row[name] for row in rows]) for name in ("value", "lo", "hi"))
    axes.plot(x, value, color=BLUE, marker="o", markersize=4, label="model, with context (mean of positions 1 on)")
    axes.fill_between(x, low, high, color=BLUE, alpha=0.2, linewidth=0)
    axes.set_xlabel(LABEL)
    axes.set_ylabel("squared error / variance of clean latents")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines["top"].set_visible(False)
    lines = axes.get_lines()
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    if result["ramp"] is None:
        right.set_yticks([])
        ramp = "ramp unknown"
    else:
        lines += right.plot(x, result["ramp"], color=ORANGE, linewidth=1.4, linestyle="-.", label="loss weight (ramp)")
        right.set_ylabel("loss weight of training (ramp)", color=ORANGE)
        right.tick_params(axis="y", colors=ORANGE)
        right.set_ylim(0, 1.05)
        ramp = "band: 95 % over episodes"
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8, frameon=False, loc="upper center",
                bbox_to_anchor=(0.5, -0.16), ncols=2)  # fmt: skip
    n = result["n"]
    axes.set_title(f"{n['windows']} windows of {n['episodes']} episodes, {ramp}", fontsize=9)
    save_png(figure, path)


def plot_level_maps(result: dict[str, Any], path: Path) -> None:
    """Two heat maps over (position, tau): error, and share of training draws with the starved cells crossed."""
    from matplotlib.colors import LogNorm

    figure = _figure(8.6, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    error = [floats(row) for row in result["error"]]
    known = [v for row in error for v in row if v > 0]
    norm = LogNorm(min(known), max(known)) if known and min(known) < max(known) else None
    image = _map(left, error, result, norm, "viridis")
    figure.colorbar(image, ax=left, label="squared error / variance", format="%g")
    left.set_title("denoising error, true context", fontsize=9)
    left.set_ylabel("position in the window (frame)")
    if result["trained_positions"] < len(error):
        left.text(0.98, result["trained_positions"] - 0.3, "training clips end here", ha="right", va="top", fontsize=7)
    image = _map(right, result["coverage"], result, LogNorm(FAINT, 1, clip=True), "Blues")
    figure.colorbar(image, ax=right, label="share of a position's training draws", format="%g")
    bins = len(result["levels"])
    x = [(cell["bin"] + 0.5) / bins for cell in result["starved"]]
    y = [cell["position"] for cell in result["starved"]]
    right.scatter(x, y, marker="x", s=14, linewidths=1, color=RED)
    starved = f"{len(x)} starved (x: share below {result['starved_below']:g})" if x else "none starved"
    right.set_title(f"training draws, {result['forcing']}: {starved}", fontsize=9)
    save_png(figure, path)


def _map(axes, rows: list[list[float]], result: dict[str, Any], norm, colours: str):
    """rows (positions, bins) as cells that reach over their bin, position 0 at the top; null stays grey."""
    from matplotlib.ticker import MaxNLocator

    extent = (0, 1, len(rows) - 0.5, -0.5)
    axes.set_facecolor("#bbbbbb")
    axes.set_xlabel(LABEL)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if result["trained_positions"] < len(rows):
        axes.axhline(result["trained_positions"] - 0.5, color=ORANGE, linewidth=1.2, linestyle="--")
    return axes.imshow(rows, extent=extent, aspect="auto", norm=norm, cmap=colours, interpolation="nearest")


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure
