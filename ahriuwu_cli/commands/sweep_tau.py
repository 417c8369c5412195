"""`ahriuwu sweep-tau`: which noise of context frames is best for a world, and which cannot be told from it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ahriuwu_cli import ranges
from ahriuwu_cli.commands import options, values
from ahriuwu_cli.errors import CheckpointError

if TYPE_CHECKING:
    from ahriuwu_cli.evaluation.sweep import Ready, Sweep
    from ahriuwu_cli.world import World

TAUS = "0,.02,.05,.1,.2,.3,.5,.9"
_TAUS = values.by_commas("--taus", values.Number("--taus", 0, 1, "[)", options.CLEAN_TO_NOISE))
_STEPS = values.by_commas("--steps", values.Whole("--steps", *ranges.STEPS))
_SAMPLERS = values.by_commas("--sampler", values.Name("--sampler", None, options.SAMPLERS))
_CTX_MODES = values.by_commas("--ctx-mode", values.Name("--ctx-mode", None, options.CTX_MODES))
_CTX_LABELS = values.by_commas("--ctx-label", values.Name("--ctx-label", None, options.CTX_LABELS))


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("sweep-tau")(sweep_tau)


def sweep_tau(
    ctx: typer.Context,
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    dataset: Path = typer.Argument(..., help="Dataset folder with the same actions and frame size."),
    out: Path = typer.Option(
        ..., "--out", help="Folder for sweep.json, CSVs, sweep.md, plots, video and the finished cells."
    ),
    taus: str = options.text(
        TAUS, "--taus", _TAUS, "Noise of context frames to try, tau (0 clean, 1 noise), by commas."
    ),
    steps: str = options.text(
        None, "--steps", _STEPS, "K to try, model passes a frame, by commas (default: the checkpoint's)."
    ),
    sampler: str = options.text(
        None, "--sampler", _SAMPLERS, "shortcut, euler, multistep, renoise, by commas (default: the checkpoint's)."
    ),
    ctx_mode: str = options.text(
        None,
        "--ctx-mode",
        _CTX_MODES,
        "By commas: stop (the state at tau_ctx becomes context), renoise (z_hat with fresh noise).",
    ),
    ctx_label: str = options.text(
        None,
        "--ctx-label",
        _CTX_LABELS,
        "By commas: honest (context is labelled tau_ctx), clean (labelled 0, a lie, for ablation).",
    ),
    split: str = options.name(
        None, "--split", options.SPLITS, "Episodes to choose on (default: val; the choice is reported on test)."
    ),
    windows: int = options.windows("Windows, the same in every cell (default: 32)."),
    context: int = options.context(),
    horizon: int = options.horizon(),
    manifest: Path = typer.Option(None, help="Choose on the windows of this windows.json instead of drawing new ones."),
    no_test: bool = typer.Option(False, "--no-test", help="Do not report the choice on the test split."),
    seed: int = options.seed("Seed of the windows and of the noise."),
    batch: int = options.batch(),
    delta: bool = typer.Option(True, "--delta/--no-delta", help="The action delta of every cell: a quarter more work."),
    budget: str = options.text(
        None,
        "--budget",
        values.seconds,
        "Begin no cell that would not end in this time: 90s, 5m, 2h. The same command goes on later.",
    ),
    write_back: bool = typer.Option(
        False, "--write-back", help="Store a tau_ctx that beats the checkpoint's default in it, with the evidence."
    ),
    no_video: bool = typer.Option(False, "--no-video", help="Leave out the comparison video."),
    allow_nan: bool = typer.Option(False, "--allow-nan", help="Exit 0 even when a rollout is not finite."),
    device: str = options.Device,
    resume: bool = typer.Option(False, "--resume", help="Go on in --out also with another grid; keeps what fits."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in --out, finished cells as well."),
    as_json: bool = options.AsJson,
) -> None:
    """Sweep the noise of context frames, tau (0 clean, 1 noise), on common windows and noise.

    Each finished cell is kept at once, and the same command goes on where it stopped. Exit 1 when a rollout is not
    finite.
    """
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.commands.windows import choose_windows
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.disk import clear_files
    from ahriuwu_cli.evaluation import report, sweep_cells, sweep_report
    from ahriuwu_cli.evaluation.cells import weights_hash
    from ahriuwu_cli.evaluation.sweep import Storage, SweepConfig, ready, sweep
    from ahriuwu_cli.evaluation.sweep_verdict import evidence
    from ahriuwu_cli.folders import claimed
    from ahriuwu_cli.places import check_folder, refuse_folders
    from ahriuwu_cli.training.checkpoint import load_world, write_tau_ctx

    config = SweepConfig(
        taus=_TAUS(taus), steps=_STEPS(steps), samplers=_SAMPLERS(sampler), ctx_modes=_CTX_MODES(ctx_mode),
        ctx_labels=_CTX_LABELS(ctx_label),
        seed=seed, batch=batch, delta=delta, test=not no_test,
    )  # fmt: skip
    seconds = values.seconds(budget) if budget else None
    check_folder(out, overwrite=True, holds="pieces")  # what may be in it, only the sweep itself can say
    store = EpisodeStore.open(dataset)
    world = load_world(checkpoint, device)
    asked = {"split": split, "windows": windows, "context": context, "horizon": horizon}
    config, stored = choose_windows(config, asked, manifest, store)
    plan = ready(world, store, config, world.generation, stored, write_back)
    if write_back and not os.access(world.path, os.W_OK | os.X_OK):
        raise CheckpointError(f"{world.path} cannot be written to: copy the checkpoint, or leave out --write-back")
    files = _files(out, test=plan.test is not None, video=not no_video)
    weights = weights_hash(world)
    identity = _identity(weights, plan, config, world)
    if not sweep_cells.check_results(out, identity, resume=resume, overwrite=overwrite):
        refuse_folders(files.values())
    ctx.with_resource(claimed(out, True, options.say))
    # again, now that nobody else writes there
    if sweep_cells.check_results(out, identity, resume=resume, overwrite=overwrite):
        sweep_cells.begin(out, identity, overwrite)
        ctx.with_resource(claimed(out, True, options.say))  # another folder has that name now

    clear_files(out, "|".join(map(re.escape, files)))
    clear_files(out / sweep_cells.FOLDER, ".+")
    storage = Storage(out / sweep_cells.FOLDER, weights)
    unfinished = not files["sweep.json"].exists()  # else its files belong together, and change together
    if unfinished:
        plan.manifest.save(files["windows.json"])
    rows: list[dict[str, Any]] = []

    def on_cell(cell: dict[str, Any]) -> None:
        if not rows:  # what was measured before is given up now
            sweep_cells.note_asked(out, identity)
        rows.extend(sweep_report.sweep_rows(cell))
        if unfinished:
            report.write_text(files["sweep.csv"], report.as_csv(rows))

    found = sweep(
        world, store, config, world.generation, plan.manifest, storage=storage, write_back=write_back,
        bar=lambda title: bar(title, "pass", quiet=as_json), on_cell=on_cell,
        say=(lambda _: None) if as_json else _say, complain=_say, budget_s=seconds,
    )  # fmt: skip
    decision = found.result["write_back"]
    if decision:
        decision["written"] = _changes_world(found.result, allow_nan)

    def change_world() -> None:
        if decision and decision["written"]:
            write_tau_ctx(world, decision["tau_ctx"], evidence(found.result))

    result = _write_files(files, found, plan, world.fps, rows, change_world)
    typer.echo(json.dumps(result, allow_nan=False) if as_json else f"{sweep_report.sweep_text(result)}\n-> {out}")
    if result["status"] != "ok" and not allow_nan:
        raise typer.Exit(1)


def _identity(weights: str, plan: Ready, config: Any, world: World) -> dict[str, Any]:
    """What makes this sweep another one. That write-back adds the checkpoint's own settings does not."""
    from ahriuwu_cli.evaluation.sweep import check_grid

    return {
        "checkpoint": weights,
        "windows": plan.manifest.hash,
        "grid": [asdict(cell) for cell in check_grid(world, config, world.generation)],
        "seed": config.seed,
        "delta": config.delta,
    }


def _changes_world(result: dict[str, Any], allow_nan: bool) -> bool:
    """Whether the new tau_ctx is to be stored: everything was measured, and it should change."""
    fine = result["status"] == "ok" or allow_nan
    return bool(result["write_back"]["changed"] and result["complete"] and fine)


def _files(out: Path, test: bool, video: bool) -> dict[str, Path]:
    """Where the results go, by their names."""
    names = ["sweep.json", "sweep.csv", "sweep-windows.csv", "sweep.md", "gain.png", "curves.png", "map.png"]
    names += ["windows.json", *["windows-test.json"] * test, *["sweep.mp4"] * video]
    return {name: out / name for name in names}


def _write_files(
    files: dict[str, Path],
    found: Sweep,
    plan: Ready,
    fps: float,
    rows: list[dict[str, Any]],
    change_world: Callable[[], None],
) -> dict[str, Any]:
    """All that is made at the end, together, so that none denies another; what sweep.json holds.

    rows: of sweep.csv. change_world comes when the files are written, and before any has its name.
    """
    from ahriuwu_cli.evaluation import report, sweep_plots, sweep_report

    result = found.result | {"files": {name: str(path) for name, path in files.items()}}
    contents: dict[str, report.Content] = {
        "sweep.csv": report.as_csv(rows),
        "sweep-windows.csv": report.as_csv(sweep_report.window_rows(found.windows)),
        "sweep.md": sweep_report.sweep_markdown(found.result),
        "gain.png": lambda path: sweep_plots.plot_gain_by_tau(found.result, path),
        "curves.png": lambda path: sweep_plots.plot_sweep_curves(found.result, path),
        "map.png": lambda path: sweep_plots.plot_gain_map(found.result, path),
        "windows.json": plan.manifest.as_json(),
        "sweep.json": report.as_json(result),
    }
    if plan.test:
        contents["windows-test.json"] = plan.test.as_json()
    if "sweep.mp4" in files:
        contents["sweep.mp4"] = lambda path: _write_video(path, found, plan.manifest.context, fps)
    report.write_together({files[name]: content for name, content in contents.items()}, first=change_world)
    for name in _files(Path(), test=True, video=True).keys() - files.keys():  # of the sweep before, which had them
        (files["sweep.json"].parent / name).unlink(missing_ok=True)
    return result


def _write_video(path: Path, found: Sweep, context: int, fps: float) -> None:
    """The truth's row of windows first, then a row for every tau of the best cell's K, sampler, mode and label."""
    from ahriuwu_cli.data.panels import compose_grid, largest_scale
    from ahriuwu_cli.data.video_writing import write_mp4
    from ahriuwu_cli.evaluation.sweep_grid import OTHERS

    cells, best = found.result["cells"], found.result["best"]
    shown = best or cells[0]
    clips = [
        clip for cell, clip in zip(cells, found.clips[1:], strict=True) if all(cell[n] == shown[n] for n in OTHERS)
    ]
    rows = [found.clips[0], *clips]
    columns, (height, width) = len(rows[0][1]), rows[0][1].shape[2:4]
    panels = [(title, window) for title, windows in rows for window in windows]
    scale = largest_scale(max(1, min(4, 1600 // (len(rows) * height))), len(panels), height, width, columns) or 1
    write_mp4(path, compose_grid(panels, columns=columns, scale=scale, context=context), fps)


def _say(sentence: str) -> None:
    """A line on stderr that does not break a progress bar."""
    from tqdm import tqdm

    tqdm.write(sentence, file=sys.stderr)
