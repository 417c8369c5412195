"""`ahriuwu sweep-tau`: which noise of context frames is best for a world, and which cannot be told from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ahriuwu_cli.commands.options import Device, parse_seconds
from ahriuwu_cli.errors import UserError

if TYPE_CHECKING:
    import numpy as np

TAUS = "0,.02,.05,.1,.2,.3,.5,.9"
FILES = ("sweep.json", "sweep.csv", "gain.png", "curves.png", "windows.json")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep-tau")(sweep_tau)


def sweep_tau(
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    dataset: Path = typer.Argument(..., help="Dataset folder with the same actions and frame size."),
    out: Path = typer.Option(..., "--out", help="Folder for sweep.json, sweep.csv, plots, sweep.mp4 and windows.json."),
    taus: str = typer.Option(TAUS, help="Noise of context frames to try, tau (0 clean, 1 noise), by commas."),
    steps: str = typer.Option(None, help="K to try, model passes a frame, by commas (default: the checkpoint's)."),
    split: str = typer.Option(None, help="Episodes to take windows from (default: val; choose there, report on test)."),
    windows: int = typer.Option(None, help="Windows, the same in every cell (default: 32)."),
    context: int = typer.Option(None, help="Frames that are given, never scored (default: 8)."),
    horizon: int = typer.Option(None, help="Frames that are generated (default: 16)."),
    manifest: Path = typer.Option(None, help="Use the windows of this windows.json instead of drawing new ones."),
    sampler: str = typer.Option(None, help="shortcut, euler or renoise (default: the checkpoint's)."),
    ctx_mode: str = typer.Option(
        None, help="stop: the state at tau_ctx becomes context; renoise: z_hat with fresh noise."
    ),
    seed: int = typer.Option(0, help="Seed of the windows and of the noise."),
    batch: int = typer.Option(32, help="Windows at a time; changes the speed, not the numbers."),
    delta: bool = typer.Option(False, "--delta", help="Also the action delta of every cell: twice the work."),
    budget: str = typer.Option(None, help="Begin no further cell after this time: 90s, 5m, 2h."),
    no_video: bool = typer.Option(False, "--no-video", help="Leave out the comparison video."),
    allow_nan: bool = typer.Option(False, "--allow-nan", help="Exit 0 even when a rollout is not finite."),
    device: str = Device,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace results in --out."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Sweep the noise of context frames, tau (0 clean, 1 noise), on common windows and noise.

    sweep.csv grows as cells finish. Exit 1 when a rollout is not finite.
    """
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.commands.windows import choose_windows
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation import plots, report
    from ahriuwu_cli.evaluation.sweep import SweepConfig, ready, sweep
    from ahriuwu_cli.training.checkpoint import load_world

    config = SweepConfig(
        taus=_numbers(taus, "--taus", float), steps=_numbers(steps, "--steps", int) if steps is not None else (),
        seed=seed, batch=batch, delta=delta,
    )  # fmt: skip
    seconds = parse_seconds(budget, "--budget") if budget else None
    report.check_folder(out, overwrite)
    store = EpisodeStore.open(dataset)
    world = load_world(checkpoint, device)
    given = {"sampler": sampler, "ctx_mode": ctx_mode}
    generation = world.generation_with(given)
    asked = {"split": split, "windows": windows, "context": context, "horizon": horizon}
    config, stored = choose_windows(config, asked, manifest, store)
    stored = ready(world, store, config, generation, stored)

    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / name for name in FILES}
    stored.save(files["windows.json"])
    rows: list[dict[str, Any]] = []

    def on_cell(cell: dict[str, Any]) -> None:
        rows.append(report.sweep_row(cell))
        report.write_text(files["sweep.csv"], report.as_csv(rows))

    with bar("sweep-tau", "frame", quiet=as_json) as progress:
        found = sweep(world, store, config, generation, stored, progress, on_cell, seconds)
    plots.plot_gain_by_tau(found.result, files["gain.png"])
    plots.plot_sweep_curves(found.result, files["curves.png"])
    if not no_video:
        files["sweep.mp4"] = out / "sweep.mp4"
        _write_video(files["sweep.mp4"], found.clips, stored.context, world.fps)
    result = found.result | {"files": {name: str(path) for name, path in files.items()}}
    report.write_json(files["sweep.json"], result)
    typer.echo(json.dumps(result, allow_nan=False) if as_json else f"{report.sweep_text(result)}\n-> {out}")
    if result["status"] != "ok" and not allow_nan:
        raise typer.Exit(1)


def _numbers(text: str, option: str, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """'0,.1' -> (0.0, 0.1)."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r} is not a list of numbers: write them with commas, as in {TAUS}") from None


def _write_video(path: Path, clips: list[tuple[str, np.ndarray]], context: int, fps: float) -> None:
    """The truth's row of windows first, then a row for every cell."""
    from ahriuwu_cli.data.video import compose_grid, write_mp4

    columns, height = len(clips[0][1]), clips[0][1].shape[2]
    scale = max(1, min(4, 1600 // (len(clips) * height)))
    cells = [(title, window) for title, windows in clips for window in windows]
    write_mp4(path, compose_grid(cells, columns=columns, scale=scale, context=context), fps)
