"""Figures of `evaluate`, drawn without a display: PSNR by generated frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

GREY, BLUE = "#777777", "#1f6fb4"


def plot_curve(result: dict[str, Any], path: Path) -> None:
    """`evaluate`: PSNR of model, floor and ceiling by generated frame, with the model's 95 % band."""
    curve = result["curves"]
    figure, axes = _figure()
    x = curve["frame"]
    axes.plot(x, floats(curve["ceiling"]), color=GREY, linestyle=":", label="ceiling (tokenizer)")
    axes.plot(x, floats(curve["floor"]), color=GREY, linestyle="--", label="floor (persistence)")
    axes.plot(x, floats(curve["psnr"]), color=BLUE, marker="o", markersize=3, label="model")
    low, high = axes.get_ylim()
    axes.fill_between(x, floats(curve["psnr_lo"]), floats(curve["psnr_hi"]), color=BLUE, alpha=0.2, linewidth=0)
    beyond, (bottom, top) = max(10.0, high - low), axes.get_ylim()  # a band of two episodes goes far off
    axes.set_ylim(max(bottom, low - beyond), min(top, high + beyond))
    axes.set_xlabel("generated frame")
    axes.set_ylabel("PSNR (dB)")
    n = result["n"]
    axes.set_title(f"{n['windows']} windows of {n['episodes']} episodes, band: 95 % over episodes", fontsize=9)
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
    save_png(figure, path)


def floats(values: list[float | None]) -> list[float]:
    """null as NaN, which leaves a gap in the line."""
    return [float("nan") if v is None else v for v in values]


def save_png(figure, path: Path) -> None:
    """The same bytes for the same figure, whatever the name."""
    figure.savefig(path, format="png", metadata={"Software": None})
