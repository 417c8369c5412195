"""`ahriuwu train dynamics`: a dataset in, a world out. And where `train` gets its two commands from."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands.options import AsJson, Device, Out, Overwrite, parse_seconds
from ahriuwu_cli.commands.train_tokenizer import train_tokenizer
from ahriuwu_cli.errors import UserError


def register(app: typer.Typer) -> None:
    train = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer or the dynamics.")
    train.command("tokenizer")(train_tokenizer)
    train.command("dynamics")(train_dynamics)
    app.add_typer(train, name="train")


def train_dynamics(
    dataset: Path = typer.Argument(..., help="Dataset folder."),
    out: Path = Out,
    tokenizer: Path = typer.Option(None, help="Tokenizer folder; without it a linear one is fitted first."),
    size: str = typer.Option("nano", help="nano, mini, tiny, small, medium, large or xlarge; see `ahriuwu info`."),
    steps: int = typer.Option(None, help="Optimiser steps. Give this or --budget."),
    budget: str = typer.Option(None, help="Training time, such as 90s, 4m or 2h (default 4m)."),
    batch: int = typer.Option(16, help="Clips a step, of all micro-batches and processes together."),
    frames: int = typer.Option(12, help="Frames of a clip."),
    long_frames: int = typer.Option(0, help="Frames of a long clip, at equal frames a step."),
    long_every: int = typer.Option(0, help="Every how many steps the clips are long ones."),
    accumulate: int = typer.Option(1, help="Micro-batches a step of a process; a resume may change it."),
    forcing: str = typer.Option(
        "independent", help="Draws of tau and d: independent, context, uniform, horizon, prefix."
    ),
    tau_ctx: float = typer.Option(0.1, help="Noise of context frames, tau (0 clean, 1 noise)."),
    ramp: str = typer.Option("paper", help="Loss weight over tau: paper, inverted, flat, velocity."),
    bootstrap_share: float = typer.Option(0.125, help="Share of clips that train larger step sizes d (eq. 7)."),
    bootstrap_target: str = typer.Option("eq7", help="Target of larger steps: eq7, or for ablation second."),
    predicts: str = typer.Option("x", help="What the network gives: x (z_clean), or for ablation v (velocity)."),
    single_image_share: float = typer.Option(0.0, help="Share of clips seen as single images."),
    optimizer: str = typer.Option("muon", help="muon, adamw, or adafactor (hardly any state; wants ten times the lr)."),
    optimizer_state: str = typer.Option("float32", help="Number format of muon's momentum: float32 or bfloat16."),
    lr: float = typer.Option(3e-3, help="Learning rate."),
    weight_decay: float = typer.Option(0.0, help="Decoupled weight decay."),
    warmup: int = typer.Option(20, help="Steps of linear warm-up."),
    decay: float = typer.Option(0.4, help="Share of the run in which the learning rate falls to 0."),
    clip: float = typer.Option(1.0, help="Largest gradient norm."),
    ema: float = typer.Option(0.98, help="Decay of the averaged weights that are sampled from."),
    precision: str = typer.Option("float32", help="float32, or bfloat16 autocast."),
    checkpoint_activations: bool = typer.Option(
        False, "--checkpoint-activations", help="Compute activations again instead of keeping them: less memory."
    ),
    compile_model: bool = typer.Option(False, "--compile", help="torch.compile the blocks: slow start, faster steps."),
    threads: int = typer.Option(0, help="CPU threads; 0 leaves it to PyTorch."),
    seed: int = typer.Option(0, help="Seed of everything drawn."),
    log_every: int = typer.Option(10, help="Steps between lines of metrics."),
    preview_every: int = typer.Option(0, help="Steps between held-out rollouts; 0: three a run."),
    save_every: int = typer.Option(0, help="Steps between resumable states; 0: with every preview."),
    keep: int = typer.Option(2, help="Resumable states kept."),
    preview_windows: int = typer.Option(32, help="Windows of a preview."),
    resume: bool = typer.Option(
        False,
        "--resume",
        help="Insist on going on with the run in --out, exactly; the same command does.",
    ),
    init_from: Path = typer.Option(None, help="Start from the weights of this world."),
    forecast: bool = typer.Option(
        False,
        "--dry-run",
        help="Write nothing: forecast parameters, FLOPs and memory, and what fits on a card.",
    ),
    parallel: str = typer.Option(
        None, help="Under torchrun: ddp (default), or fsdp for models that do not fit one GPU; a resume may change it."
    ),
    device: str = Device,
    overwrite: bool = Overwrite,
    as_json: bool = AsJson,
) -> None:
    """Train the dynamics on a dataset's latents: shortcut forcing (Dreamer 4, eq. 7 and 8), EMA, previews, resume."""
    settings = dict(locals())
    from ahriuwu_cli.training.restart import stoppable

    with stoppable() as stop:
        result = _with_options(settings, stop)
    if result is None:
        return
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{result['steps']} steps in {result['seconds']:.0f} s; best free-running gain over persistence on val: "
        f"{result['best_preview_gain_db']:+.2f} dB -> {result['world']}"
    )


def _with_options(settings: dict, stop) -> dict | None:
    """Train with the command's options; the result, or None where another process of the group has it."""
    from dataclasses import fields

    from ahriuwu_cli.config import TrainConfig

    if settings["steps"] is not None and settings["budget"] is not None:
        raise UserError("give either --steps or --budget, not both")
    if settings["steps"] is None:
        settings["budget"] = parse_seconds(settings["budget"] or "4m", "--budget")
    settings["compile"] = settings["compile_model"]
    try:
        config = TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        raise UserError(f"bad training option: {error}") from None
    _check_names(config)
    if settings["forecast"]:
        from ahriuwu_cli.commands.dry_run import dry_run

        return dry_run(settings["dataset"], settings["tokenizer"], config, settings["device"], settings["as_json"])

    from ahriuwu_cli.training.distributed import join

    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    with join(settings["device"], settings["parallel"]) as group:
        if settings["parallel"] == "fsdp" and group.world == 1:
            typer.echo("one process: --parallel fsdp has nothing to share out", err=True)
        given = {name: settings[name] for name in ("dataset", "out", "tokenizer", "resume", "overwrite", "init_from")}
        result = _train(group, config, stop, **given, quiet=settings["as_json"] or not group.leads)
    return result if group.leads else None


def _train(
    group,
    config,
    stop,
    *,
    dataset: Path,
    out: Path,
    tokenizer: Path | None,
    resume: bool,
    overwrite: bool,
    init_from: Path | None,
    quiet: bool,
) -> dict:
    """What every process of the group does, from the dataset to the end of the run."""
    from ahriuwu_cli.commands.progress import bar, training_bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.training.assemble import assemble, fit_for_all
    from ahriuwu_cli.training.batches import check_shares
    from ahriuwu_cli.training.checkpoint import load_tokenizer
    from ahriuwu_cli.training.restart import command_line
    from ahriuwu_cli.training.run import run_goes_on

    def opened():
        check_shares(config, group.world)
        store = EpisodeStore.open(dataset)
        there = run_goes_on(out, config, {}, resume, overwrite)
        kept = out / "tokenizer" if there and (out / "tokenizer" / "config.json").is_file() else None
        return store, load_tokenizer(tokenizer or kept) if tokenizer or kept else None

    store, encoder = group.together(opened)
    if fitted := encoder is None:
        with bar("fit tokenizer", "episode", quiet=quiet) as progress:
            encoder = fit_for_all(group, store, progress)
    with bar("encode", "frame", quiet=quiet) as progress:
        trainer = assemble(
            store, encoder, config, out, command_line(), device=group.device, resume=resume, overwrite=overwrite,
            init_from=init_from, progress=progress, group=group, announce=lambda s: typer.echo(s, err=True),
            fitted=fitted,
        )  # fmt: skip
    if trainer.run.found and group.leads:
        typer.echo(trainer.run.found, err=True)
    with training_bar(config, quiet=quiet) as report:
        trainer.train(report, stop)
    return {
        "run": str(out),
        "world": str(out / "best"),
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "best_preview_gain_db": trainer.best,
    }


def _check_names(config) -> None:
    from ahriuwu_cli.diffusion.forcing import FORCINGS
    from ahriuwu_cli.diffusion.objective import BOOTSTRAPS, RAMPS
    from ahriuwu_cli.errors import did_you_mean
    from ahriuwu_cli.models.dynamics import PREDICTS

    for option, name, known in (
        ("--forcing", config.forcing, tuple(FORCINGS)),
        ("--ramp", config.ramp, RAMPS),
        ("--bootstrap-target", config.bootstrap_target, BOOTSTRAPS),
        ("--predicts", config.predicts, PREDICTS),
    ):
        if name not in known:
            raise UserError(f"unknown {option} {name!r}: {did_you_mean(name, known)}")
