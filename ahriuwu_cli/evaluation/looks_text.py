"""The closer looks in a few lines for a terminal; all of their numbers are in eval.json and on the HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.evaluation.report import interval, number
from ahriuwu_cli.printing import some_of


def looks_text(result: dict[str, Any]) -> str:
    """Lines for every look that the result has; one that was skipped says why. Empty without looks."""
    lines: list[str] = []
    for name, describe in DESCRIBE.items():
        if name in result:
            why = result[name].get("skipped") if isinstance(result[name].get("skipped"), str) else None
            lines += [f"{name}: skipped, {why}"] if why else list(describe(result[name]))
    return "\n".join(lines)


def _step_sizes(look: dict[str, Any]) -> Iterator[str]:
    h = str(look["reported"][-1])
    for sampler in dict.fromkeys(row["sampler"] for row in look["rows"]):
        cells = [
            f"{row['steps']}: {number(row['gain_db'][h]['value'], sign=True)} ({number(row['sharpness_ratio'][h])})"
            for row in look["rows"]
            if row["sampler"] == sampler
        ]
        windows = look["n"]["windows"]
        yield f"gain dB at {h} by K, {sampler}, {windows} windows (sharpness): {', '.join(cells)}"


def _consistency(look: dict[str, Any]) -> Iterator[str]:
    verdict = look["verdict"]
    said = {True: "yes", False: "NO", None: "cannot be told"}[verdict["ok"]]
    why = verdict["reason"]
    if verdict["gap_closed"] is not None:
        why += f"; share of the copy's distance done away with: {number(verdict['gap_closed'])}"
    yield f"one step of d does the work of smaller ones better than a d-blind copy: {said} ({why})"


def _spread(look: dict[str, Any]) -> Iterator[str]:
    cells = [f"{interval(row['spread_ratio'], sign=False)} at {h}" for h, row in look["horizons"].items()]
    n = look["n"]
    of = f"{n['noise_seeds']} seeds, {n['windows']} windows (1 calibrated, 0 one answer)"
    yield f"spread ratio over {of}: {', '.join(cells)}"


def _distances(look: dict[str, Any]) -> Iterator[str]:
    for name in ("latent_frechet", "latent_kernel"):
        row = look[name]
        cells = [f"{who} {number(row[who], 3)}" for who in ("generated", "real_floor", "ceiling", "persistence")]
        of = f"{look['clips']} clips of {look['clip_frames']} frames, {look['components']} components"
        yield f"{name}, {of}: {', '.join(cells)}"


def _levels(look: dict[str, Any]) -> Iterator[str]:
    row, level = look["by_bin"][-1], look["levels"][-1]
    yield (
        f"error at {LABEL} {level:g}: {interval(row, sign=False)} of the latents' variance with context, "
        f"{number(look['alone'][-1])} without"
    )
    starved = [f"({cell['position']}, {cell['level']:g})" for cell in look["starved"]]
    if starved:
        yield f"hardly ever trained, but asked for by a rollout (position, tau): {some_of(starved, 6)}"


def _components(look: dict[str, Any]) -> Iterator[str]:
    windows = look["n"]["windows"]
    for h in dict.fromkeys(row["frame"] for row in look["rows"]):
        rows = [row for row in look["rows"] if row["frame"] == h]
        cells = [f"{number(row['error']['value'])} ({number(row['energy']['value'])})" for row in rows]
        said = f"error over variance (energy) by component at {h}, strongest to finest, {windows} windows"
        yield f"{said}: {', '.join(cells)}"


def _features(look: dict[str, Any]) -> Iterator[str]:
    network = look["network"]
    for h, row in look[f"{network}_distance"].items():
        yield f"{network}_distance at {h}: {_beside(row)}"
    for name in (f"{network}_frechet", f"{network}_kernel"):
        row = {who: look[name][who] for who in ("generated", "real_floor", "ceiling", "persistence")}
        yield f"{name}, {look['clips']} clips of {look['clip_frames']} frames: {_beside(row)}"


def _lpips(look: dict[str, Any]) -> Iterator[str]:
    for h, row in look["horizons"].items():
        of = f"{look['backbone']}, {look['weights_hash'][:8]}, {look['windows']} windows"
        yield f"lpips ({of}) at {h}: {_beside(row)}"


def _fvd(look: dict[str, Any]) -> Iterator[str]:
    row = {who: look[who] for who in ("generated", "real_floor", "ceiling", "persistence")}
    yield f"fvd ({look['backbone']}, {look['weights_hash'][:8]}, {look['clips']} clips): {_beside(row)}"
    yield from (f"warning: {sentence}" for sentence in look["warnings"])


def _beside(row: dict[str, Any]) -> str:
    return ", ".join(f"{who} {number(value, 3)}" for who, value in row.items())


DESCRIBE = {
    "step_sizes": _step_sizes,
    "consistency": _consistency,
    "spread": _spread,
    "distances": _distances,
    "levels": _levels,
    "components": _components,
    "features": _features,
    "lpips": _lpips,
    "fvd": _fvd,
}
