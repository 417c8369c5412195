"""Figures of results, drawn without a display: PSNR by generated frame, and gain by tau."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ahriuwu_cli.diffusion.tau import LABEL

GREY, BLUE = "#777777", "#1f6fb4"


def plot_curve(result: dict[str, Any], path: Path) -> None:
    """`evaluate`: PSNR of model, floor and ceiling by generated frame, with the model's 95 % band."""
    curve = result["curves"]
    figure, axes = _figure()
    x = curve["frame"]
    axes.plot(x, _floats(curve["ceiling"]), color=GREY, linestyle=":", label="ceiling (tokenizer)")
    axes.plot(x, _floats(curve["floor"]), color=GREY, linestyle="--", label="floor (persistence)")
    axes.plot(x, _floats(curve["psnr"]), color=BLUE, marker="o", markersize=3, label="model")
    axes.fill_between(x, _floats(curve["psnr_lo"]), _floats(curve["psnr_hi"]), color=BLUE, alpha=0.2, linewidth=0)
    axes.set_xlabel("generated frame")
    axes.set_ylabel("PSNR (dB)")
    n = result["n"]
    axes.set_title(f"{n['windows']} windows of {n['episodes']} episodes, band: 95 % over episodes", fontsize=9)
    _finish(figure, axes, path)


def plot_gain_by_tau(result: dict[str, Any], path: Path) -> None:
    """`sweep`: gain over persistence by tau_ctx, one line a horizon (of the first K), with 95 % bands."""
    figure, axes = _figure()
    first = result["reference"]["steps"]
    cells = [c for c in result["cells"] if c["steps"] == first]
    x = [c["tau_ctx"] for c in cells]
    for h in map(str, result["reported"]):
        gains = [c["gain_db"][h] for c in cells]
        (line,) = axes.plot(x, _floats([g["value"] for g in gains]), marker="o", markersize=3, label=f"frame {h}")
        low, high = _floats([g["lo"] for g in gains]), _floats([g["hi"] for g in gains])
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xlabel(f"tau_ctx: {LABEL}")
    axes.set_ylabel("gain over persistence (dB)")
    axes.set_title(f"K = {first}, {result['n']['windows']} windows of {result['n']['episodes']} episodes", fontsize=9)
    _finish(figure, axes, path)


def plot_sweep_curves(result: dict[str, Any], path: Path) -> None:
    """`sweep`: PSNR by generated frame of every cell (of the first K), floor and ceiling."""
    from matplotlib import colormaps

    figure, axes = _figure()
    last = f", K {result['reference']['steps']}"
    cells = [row for row in result["curves"] if row["name"].endswith(last)]
    for row in result["curves"][:2]:
        style = "--" if row["name"] == "floor" else ":"
        axes.plot(range(1, len(row["psnr"]) + 1), _floats(row["psnr"]), color=GREY, linestyle=style, label=row["name"])
    for i, row in enumerate(cells):
        color = colormaps["viridis"](i / max(1, len(cells) - 1) * 0.9)
        label = row["name"].removesuffix(last)
        axes.plot(range(1, len(row["psnr"]) + 1), _floats(row["psnr"]), color=color, label=label)
    axes.set_xlabel("generated frame")
    axes.set_ylabel("PSNR (dB)")
    axes.set_title(f"context noise {LABEL}", fontsize=9)
    _finish(figure, axes, path)


def _figure():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _finish(figure, axes, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    if axes.get_xlabel() == "generated frame":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _floats(values: list[float | None]) -> list[float]:
    """null as NaN, which leaves a gap in the line."""
    return [float("nan") if v is None else v for v in values]
