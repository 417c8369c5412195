"""`ahriuwu eval`: held-out scores of a world, beside floor, ceiling and wrong actions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ahriuwu_cli.commands import eval_plan, options

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation.prepare import EvaluationConfig
    from ahriuwu_cli.evaluation.protocol import WindowManifest
    from ahriuwu_cli.rollout import RolloutConfig
    from ahriuwu_cli.world import World


def register(app: typer.Typer) -> None:
    """Add the command, with `plan` and `merge` as its subcommands."""
    eval_plan.register(app, "eval", evaluate)


def evaluate(
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    dataset: Path = typer.Argument(..., help="Dataset folder with the same actions and frame size."),
    out: Path = typer.Option(
        ..., "--out", help="Folder for eval.json, eval.csv, windows.csv, curve.png, windows.json, levels*.png."
    ),
    split: str = options.name(None, "--split", options.SPLITS, "Episodes to take windows from (default: test)."),
    windows: int = options.windows("Windows to score (default: 64)."),
    context: int = options.context(),
    horizon: int = options.horizon(),
    manifest: Path = typer.Option(None, help="Score the windows of this windows.json instead of drawing new ones."),
    steps: int = options.passes(),
    sampler: str = options.sampler(),
    tau_ctx: float = options.tau_ctx(),
    ctx_mode: str = options.ctx_mode("stop: the state at tau_ctx becomes context; renoise: z_hat with fresh noise."),
    ctx_label: str = options.ctx_label("Label of context frames: honest, its level; clean, a lie for ablation."),
    seed: int = options.seed("Seed of the windows, the noise and the random actions."),
    noise_seeds: int = options.noise_seeds(),
    batch: int = options.batch(),
    looks: str = typer.Option(
        "all",
        help="Closer looks: all, none, or of step_sizes,consistency,spread,distances,levels,components by commas.",
    ),
    features_weights: Path = typer.Option(None, help="EfficientNet-Lite0 (safetensors): adds the look `features`."),
    lpips_weights: Path = typer.Option(None, help="LPIPS v0.1, backbone and heads (safetensors): adds `lpips`."),
    lpips_hash: str = typer.Option(None, help="sha256 of --lpips-weights."),
    fvd_weights: Path = typer.Option(None, help="I3D of Kinetics-400 (safetensors): adds `fvd`."),
    fvd_hash: str = typer.Option(None, help="sha256 of --fvd-weights."),
    report_page: bool = typer.Option(False, "--report", help="Also write report.html: one page, with films."),
    allow_nan: bool = typer.Option(False, "--allow-nan", help="Exit 0 even when a rollout is not finite."),
    precision: str = options.Precision,
    device: str = options.Device,
    overwrite: bool = options.Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Score a world on held-out windows: gain over persistence with intervals, tokenizer ceiling, action following.

    Definitions: docs/evaluation.md. Exit 1 when a rollout is not finite.
    """
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.commands.windows import choose_windows
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation import plot_levels, plots, report
    from ahriuwu_cli.evaluation.cells import weights_hash
    from ahriuwu_cli.evaluation.evaluate import EvaluationConfig
    from ahriuwu_cli.evaluation.evaluate import evaluate as run
    from ahriuwu_cli.evaluation.looks import check_fits, look_closer, not_finite, optional_looks, parse_looks
    from ahriuwu_cli.evaluation.looks_text import looks_text
    from ahriuwu_cli.evaluation.prepare import prepare
    from ahriuwu_cli.folders import claimed, replacing
    from ahriuwu_cli.places import check_folder
    from ahriuwu_cli.startup import complete
    from ahriuwu_cli.training.checkpoint import load_world

    wanted = parse_looks(looks)
    extra = optional_looks(features_weights, (lpips_weights, lpips_hash), (fvd_weights, fvd_hash))
    check_folder(out, overwrite)
    store = EpisodeStore.open(dataset)
    world = load_world(checkpoint, device)
    loaded = weights_hash(world)
    world.multiply_in(precision, options.say)
    given = {"steps": steps, "sampler": sampler, "tau_ctx": tau_ctx, "ctx_mode": ctx_mode, "ctx_label": ctx_label}
    generation = world.generation_with(given)
    asked = {"split": split, "windows": windows, "context": context, "horizon": horizon}
    config = EvaluationConfig(seed=seed, batch=batch, noise_seeds=noise_seeds)
    config, stored = choose_windows(config, asked, manifest, store)
    config, stored = prepare(world, store, config, generation, stored)
    check_fits(extra, store, stored, seed)
    with claimed(out, overwrite, options.say), replacing(out, overwrite, then=lambda: complete(out)) as folder:
        with bar("eval", "frame", quiet=as_json) as progress:
            result = run(world, store, config, generation, stored, progress)
        result["settings"]["checkpoint_hash"] = loaded
        say = None if as_json else lambda name: typer.echo(f"looking closer: {name}", err=True)
        closer = look_closer(world, store, config, generation, stored, wanted, say, extra)
        result["timing"]["looks"] = closer.pop("look_seconds")
        result |= closer
        if broken := not_finite(closer):
            result |= {"status": "nan", "not_finite_looks": broken}

        files = {name: folder / name for name in ("eval.json", "eval.csv", "windows.csv", "curve.png", "windows.json")}
        if "error" in result.get("levels", {}):
            files |= {name: folder / name for name in ("levels.png", "levels_map.png")}
            plot_levels.plot_error_by_level(result["levels"], files["levels.png"])
            plot_levels.plot_level_maps(result["levels"], files["levels_map.png"])
        if report_page:
            files["report.html"] = folder / "report.html"
        result["files"] = {name: str(out / name) for name in files}
        stored.save(files["windows.json"])
        report.write_text(files["eval.csv"], report.as_csv(report.evaluation_rows(result)))
        report.write_text(files["windows.csv"], report.as_csv(result["windows"]))
        plots.plot_curve(result, files["curve.png"])
        report.write_json(files["eval.json"], result)
        if report_page:
            _write_page(files, result, world, store, config, generation, stored)
    text = "\n".join(part for part in (report.evaluation_text(result), looks_text(result), f"-> {out}") if part)
    typer.echo(json.dumps(result, allow_nan=False) if as_json else text)
    if result["status"] != "ok" and not allow_nan:
        raise typer.Exit(1)


def _write_page(
    files: dict[str, Path],
    result: dict[str, Any],
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    generation: RolloutConfig,
    manifest: WindowManifest,
) -> None:
    """report.html, with films of the best, the median and the worst window."""
    from ahriuwu_cli.evaluation.generate import generate
    from ahriuwu_cli.evaluation.page import write_page
    from ahriuwu_cli.evaluation.page_charts import Figure, chosen_windows, films
    from ahriuwu_cli.evaluation.protocol import read_windows

    shown = []
    for title, i in chosen_windows(result).items():
        frames, actions = read_windows(store, manifest, i, i + 1)
        made = generate(
            world, frames, actions, manifest.keys[i : i + 1], generation, seed=config.seed, context=manifest.context
        )
        captions = ["", *(f"action {store.action_space.describe(row)}" for row in actions[0])] if actions.size else None
        shown += films(
            frames, made.frames, context=manifest.context, fps=world.fps, titles=[title],
            captions=captions and [captions], finite=made.finite,
        )  # fmt: skip
    figures = {}
    if "levels.png" in files:
        figures["levels"] = Figure(files["levels.png"].read_bytes(), "denoising error by noise level, ramp over it")
        figures["error and coverage by position and noise level"] = Figure(
            files["levels_map.png"].read_bytes(), "heat maps of error and of training draws over position and tau"
        )
    write_page(files["report.html"], result, command=["ahriuwu", *sys.argv[1:]], films=shown, figures=figures)
