"""`ahriuwu eval generate` and `ahriuwu eval score`: rollouts saved once, scored many times."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer

from ahriuwu_cli import ranges
from ahriuwu_cli.commands import options, values


def generate(
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    dataset: Path = typer.Argument(..., help="Dataset folder with the same actions and frame size."),
    out: Path = typer.Option(..., "--out", help="Folder for the rollouts; parts that are finished there are skipped."),
    split: str = options.name(None, "--split", options.SPLITS, "Episodes to take windows from (default: test)."),
    windows: int = options.windows("Windows to score (default: 64)."),
    context: int = options.context(),
    horizon: int = options.horizon(),
    manifest: Path = typer.Option(None, help="The windows of this windows.json instead of new ones."),
    steps: int = options.passes(),
    sampler: str = options.sampler(),
    tau_ctx: float = options.tau_ctx(),
    ctx_mode: str = options.ctx_mode("stop or renoise (default: the checkpoint's)."),
    ctx_label: str = options.ctx_label("honest, or clean, a lie for ablation (default: the checkpoint's)."),
    seed: int = options.seed("Seed of the windows, the noise and the random actions."),
    noise_seeds: int = options.noise_seeds(),
    batch: int = options.batch("Windows at a time, and in a part."),
    shard: str = options.text(
        None, "--shard", values.shard, "Only this share of the windows, as 1/4 (default: by SLURM or torchrun)."
    ),
    device: str = options.Device,
    as_json: bool = options.AsJson,
) -> None:
    """Roll out all that `eval` scores, true and wrong actions, and save it: frames as they are scored, no metrics."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.commands.windows import choose_windows
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation.evaluate import EvaluationConfig, ready
    from ahriuwu_cli.evaluation.saved import save_rollouts
    from ahriuwu_cli.evaluation.shards import choose_device, find_shards, shard_windows
    from ahriuwu_cli.places import check_folder
    from ahriuwu_cli.training.checkpoint import load_world

    mine = find_shards(shard, "cells", os.environ)  # here the windows are what is shared
    check_folder(out, overwrite=True, holds="pieces")
    store = EpisodeStore.open(dataset)
    world = load_world(checkpoint, choose_device(device, mine))
    given = {"steps": steps, "sampler": sampler, "tau_ctx": tau_ctx, "ctx_mode": ctx_mode, "ctx_label": ctx_label}
    generation = world.generation_with(given)
    asked = {"split": split, "windows": windows, "context": context, "horizon": horizon}
    config, stored = choose_windows(
        EvaluationConfig(seed=seed, batch=batch, noise_seeds=noise_seeds), asked, manifest, store
    )
    config, stored = ready(world, store, config, generation, stored)
    share = shard_windows(stored, *mine.cells)
    with bar("generate", "frame", quiet=as_json) as progress:
        result = save_rollouts(world, store, config, generation, stored, out, progress, share, options.say)
    result = {"kind": "eval-generate", "out": str(out), "windows": len(share)} | result
    typer.echo(
        json.dumps(result)
        if as_json
        else f"{len(share)} windows: {result['written']} parts written, {result['skipped']} were there -> {out}"
    )


def score(
    rollouts: Path = typer.Argument(..., help="The --out of `ahriuwu eval generate`."),
    dataset: Path = typer.Argument(..., help="The dataset that the windows are of."),
    out: Path = typer.Option(..., "--out", help="Folder for eval.json, eval.csv, windows.csv, curve.png."),
    delta_at: int = options.whole(
        None, "--delta-at", *ranges.HORIZON, "Generated frame of the action delta, beside the last (default: 4)."
    ),
    allow_nan: bool = typer.Option(False, "--allow-nan", help="Exit 0 even when a rollout is not finite."),
    overwrite: bool = options.Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Score saved rollouts: the same numbers as `eval`, with neither the world nor a GPU. No closer looks."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation import plots, report
    from ahriuwu_cli.evaluation.saved import made_by, score_rollouts
    from ahriuwu_cli.folders import claimed, replacing
    from ahriuwu_cli.places import check_folder
    from ahriuwu_cli.startup import complete

    check_folder(out, overwrite)
    store = EpisodeStore.open(dataset)
    with claimed(out, overwrite, options.say), replacing(out, overwrite, then=lambda: complete(out)) as folder:
        with bar("score", "window", quiet=as_json) as progress:
            result = score_rollouts(rollouts, store, delta_at, progress)
        result["settings"]["checkpoint_hash"] = made_by(rollouts)
        names = ("eval.json", "eval.csv", "windows.csv", "curve.png")
        result["files"] = {name: str(out / name) for name in names}
        report.write_text(folder / "eval.csv", report.as_csv(report.evaluation_rows(result)))
        report.write_text(folder / "windows.csv", report.as_csv(result["windows"]))
        plots.plot_curve(result, folder / "curve.png")
        report.write_json(folder / "eval.json", result)
    typer.echo(json.dumps(result, allow_nan=False) if as_json else f"{report.evaluation_text(result)}\n-> {out}")
    if result["status"] != "ok" and not allow_nan:
        raise typer.Exit(1)
