"""`ahriuwu train dynamics`: a dataset in, a world out. And where `train` gets its two commands from."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer

from ahriuwu_cli.commands import options, values
from ahriuwu_cli.commands.train_tokenizer import train_tokenizer
from ahriuwu_cli.commands.values import listed
from ahriuwu_cli.errors import UserError

FORCING = "independent"  # by default
ONE_STEP_SIZE = listed("config", "ONE_STEP_SIZE")


def register(app: typer.Typer) -> None:
    train = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer or the dynamics.")
    train.command("tokenizer")(train_tokenizer)
    train.command("dynamics")(train_dynamics)
    app.add_typer(train, name="train")


def train_dynamics(
    ctx: typer.Context,
    dataset: Path = typer.Argument(..., help="Dataset folder."),
    out: Path = options.Out,
    tokenizer: Path = typer.Option(None, help="Tokenizer folder; without it a linear one is fitted first."),
    size: str = options.name(
        "nano",
        "--size",
        listed("models.sizes", "SIZES"),
        "nano, mini, tiny, small, medium, large or xlarge; see `ahriuwu info`.",
    ),
    steps: int = options.whole(None, "--steps", 1, options.MANY, "Optimiser steps. Give this or --budget."),
    budget: str = options.text(None, "--budget", values.seconds, "Training time, such as 90s, 4m or 2h (default 4m)."),
    batch: int = options.whole(16, "--batch", 1, 65536, "Clips a step, of all micro-batches and processes together."),
    frames: int = options.whole(12, "--frames", 2, 10_000, "Frames of a clip."),
    long_frames: int = options.whole(
        0, "--long-frames", 0, 10_000, "Frames of a long clip; a step has as many as fit."
    ),
    long_every: int = options.whole(
        0, "--long-every", 0, options.MANY, "Every how many steps the clips are long ones."
    ),
    accumulate: int = options.whole(
        1, "--accumulate", 1, 65536, "Micro-batches a step of a process; a resume may change it."
    ),
    forcing: str = options.name(
        FORCING,
        "--forcing",
        listed("diffusion.forcing", "FORCINGS"),
        "Draws of tau and d: independent, context, committed, resampled, uniform, horizon, prefix.",
    ),
    tau_ctx: float = options.tau_ctx(0.1),
    ramp: str = options.name(
        "paper",
        "--ramp",
        listed("diffusion.objective", "RAMPS"),
        "Loss weight over tau: paper, inverted, flat, velocity.",
    ),
    bootstrap_share: float = options.number(
        0.125, "--bootstrap-share", 0, 1, "Share of clips that train larger step sizes d (eq. 7)."
    ),
    bootstrap_target: str = options.name(
        "eq7",
        "--bootstrap-target",
        listed("diffusion.objective", "BOOTSTRAPS"),
        "Target of larger steps: eq7, or for ablation second.",
    ),
    predicts: str = options.name(
        "x",
        "--predicts",
        listed("models.dynamics_config", "PREDICTS"),
        "What the network gives: x (z_clean), or for ablation v (velocity).",
    ),
    single_image_share: float = options.number(
        0.0, "--single-image-share", 0, 1, "Share of clips seen as single images."
    ),
    optimizer: str = options.name(
        "muon",
        "--optimizer",
        listed("config", "OPTIMIZERS"),
        "muon, adamw, or adafactor (hardly any state; wants ten times the lr).",
    ),
    optimizer_state: str = options.name(
        "float32",
        "--optimizer-state",
        listed("config", "PRECISIONS"),
        "Number format of muon's momentum: float32 or bfloat16.",
    ),
    muon_momentum: float = options.number(0.95, "--muon-momentum", 0, 1, "Muon's momentum.", "[)"),
    lr: float = options.number(3e-3, "--lr", 0, 10, "Learning rate.", "()"),
    adamw_lr_scale: float = options.number(
        1.0,
        "--adamw-lr-scale",
        0,
        100,
        "Of --lr, for what AdamW trains beside Muon: gains, embeddings, first and last projection.",
        "(]",
    ),
    weight_decay: float = options.number(0.0, "--weight-decay", 0, 10, "Decoupled weight decay.", "[)"),
    warmup: int = options.whole(20, "--warmup", 0, options.MANY, "Steps of linear warm-up."),
    decay: float = options.number(0.4, "--decay", 0, 1, "Share of the run in which the learning rate falls to 0."),
    clip: float = options.number(1.0, "--clip", 0, 1e9, "Largest gradient norm.", "(]"),
    ema: float = options.number(0.98, "--ema", 0, 1, "Decay of the averaged weights that are sampled from."),
    precision: str = options.name(
        "float32", "--precision", listed("config", "PRECISIONS"), "float32, or bfloat16 autocast."
    ),
    checkpoint_activations: bool = typer.Option(
        False, "--checkpoint-activations", help="Compute activations again instead of keeping them: less memory."
    ),
    compile_model: bool = typer.Option(False, "--compile", help="torch.compile the blocks: slow start, faster steps."),
    threads: int = options.whole(0, "--threads", 0, 1024, "CPU threads; 0 leaves it to PyTorch."),
    seed: int = options.seed("Seed of everything drawn."),
    log_every: int = options.whole(10, "--log-every", 1, options.MANY, "Steps between lines of metrics."),
    preview_every: int = options.whole(
        0, "--preview-every", 0, options.MANY, "Steps between held-out rollouts; 0: three a run."
    ),
    save_every: int = options.whole(
        0, "--save-every", 0, options.MANY, "Steps between resumable states; 0: with every preview."
    ),
    keep: int = options.whole(2, "--keep", 1, 1_000_000, "Resumable states kept."),
    preview_windows: int = options.whole(32, "--preview-windows", 1, 1_000_000, "Windows of a preview."),
    resume: bool = typer.Option(
        False, "--resume", help="Insist on going on with the run in --out, exactly; the same command does."
    ),
    init_from: Path = typer.Option(None, help="Start from the weights of this world."),
    forecast: bool = typer.Option(
        False,
        "--dry-run",
        help="Write nothing: forecast parameters, FLOPs and memory of this command, and what fits on a card.",
    ),
    parallel: str = options.name(
        None,
        "--parallel",
        listed("training.distributed", "PARALLEL"),
        "Under torchrun: ddp (default), or fsdp for models that do not fit one GPU; a resume may change it.",
    ),
    device: str = options.Device,
    overwrite: bool = options.Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Train the dynamics on a dataset's latents: shortcut forcing (Dreamer 4, eq. 7 and 8), EMA, previews, resume."""
    settings = dict(locals())
    if resume:
        options.only_for(ctx, "contradicts --resume, which keeps what is in --out", "overwrite")
    if forcing != FORCING and forcing in ONE_STEP_SIZE():  # for another than the default torch is there already
        unused = ("bootstrap_share", "bootstrap_target") if bootstrap_share else ("bootstrap_target",)
        options.only_for(ctx, f"says nothing to --forcing {forcing}, which draws the smallest d alone", *unused)
    if optimizer != "muon":
        options.only_for(ctx, f"says nothing to --optimizer {optimizer}", "muon_momentum", "adamw_lr_scale")
    if bootstrap_share == 0:
        options.only_for(ctx, "says nothing to --bootstrap-share 0, which trains no larger steps", "bootstrap_target")
    if long_frames == frames:
        raise UserError(f"--long-frames {long_frames} is --frames, so no clip would be longer: choose more of them")
    if steps is not None and long_every > steps:
        raise UserError(f"--long-every {long_every} is beyond --steps {steps}, so no clip would be long: choose fewer")
    if steps is not None and budget is not None:
        raise UserError("give either --steps or --budget, not both")
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

    if settings["steps"] is None:
        settings["budget"] = values.seconds(settings["budget"] or "4m")
    settings["compile"] = settings["compile_model"]
    try:
        config = TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        raise UserError(f"bad training option: {error}") from None
    given = {name: settings[name] for name in ("dataset", "out", "tokenizer", "resume", "overwrite", "init_from")}
    if settings["forecast"]:
        from ahriuwu_cli.commands.dry_run import dry_run
        from ahriuwu_cli.evaluation.shards import processes

        if processes(os.environ)[1] > 1:
            raise UserError("--dry-run is a forecast of one process: run it without torchrun")
        store, encoder = _opened(config, **given)
        return dry_run(store, encoder, config, settings["device"], settings["init_from"], settings["as_json"])

    from ahriuwu_cli.startup import complete
    from ahriuwu_cli.training.distributed import join

    if config.threads:
        import torch

        torch.set_num_threads(config.threads)
    with join(settings["device"], settings["parallel"]) as group:
        if settings["parallel"] and group.world == 1:
            typer.echo(f"one process: --parallel {settings['parallel']} has nothing to share out", err=True)
        result = _train(group, config, stop, given, quiet=settings["as_json"] or not group.leads)
        complete(settings["out"])
    return result if group.leads else None


def _opened(
    config,
    dataset: Path,
    out: Path,
    tokenizer: Path | None,
    resume: bool,
    overwrite: bool,
    init_from: Path | None,
    processes: int = 1,
    announce=lambda sentence: None,
) -> tuple:
    """(dataset, tokenizer or None) of a run that may be begun, or gone on with; nothing is written.

    announce gets a sentence where the run that is gone on with has lost the tokenizer that was fitted for it.
    """
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.errors import CheckpointError
    from ahriuwu_cli.training.batches import check_shares
    from ahriuwu_cli.training.checkpoint import is_sound_tokenizer, load_tokenizer
    from ahriuwu_cli.training.run import copy_of_tokenizer, has_fitted, has_state, is_own_tokenizer, run_goes_on

    check_shares(config, processes)
    store = EpisodeStore.open(dataset)
    there = run_goes_on(out, config, {}, resume, overwrite)
    if init_from is not None and not init_from.exists() and not (there and has_state(out)):
        raise CheckpointError(f"there is no checkpoint at {init_from}")
    if there and is_own_tokenizer(tokenizer, out):
        kept = out / "tokenizer"
        if is_sound_tokenizer(kept):
            tokenizer = kept
        elif kept.exists() or has_fitted(out):
            tokenizer = copy_of_tokenizer(out)
            announce(f"{kept} is missing or damaged, and {f'copied from {tokenizer}' if tokenizer else 'fitted anew'}")
    return store, load_tokenizer(tokenizer) if tokenizer else None


def _train(group, config, stop, given: dict, quiet: bool) -> dict:
    """What every process of the group does, from the dataset to the end of the run. given: what `_opened` takes."""
    from dataclasses import asdict

    from ahriuwu_cli.commands.progress import bar, training_bar
    from ahriuwu_cli.models.compiling import check_compile
    from ahriuwu_cli.models.products import warn_of_bfloat16
    from ahriuwu_cli.training.assemble import assemble, fit_for_all
    from ahriuwu_cli.training.restart import command_line
    from ahriuwu_cli.training.run import is_own_tokenizer, seen_step

    group.check_agreed(
        asdict(config)
        | {name: given[name] for name in ("resume", "overwrite")}
        | {name: given[name] is not None for name in ("tokenizer", "init_from")}
    )
    if config.compile:
        group.together(lambda: check_compile(group.device))

    def announce(sentence: str) -> None:
        if group.leads:
            typer.echo(sentence, err=True)

    store, encoder = group.together(lambda: _opened(config, **given, processes=group.world, announce=announce))
    out = given["out"]
    if not given["overwrite"]:  # from here on, what is found there decides what the processes do together
        group.check_same_step(group.together(lambda: seen_step(out)), out)
    begun = {name: given[name] for name in ("resume", "overwrite", "init_from")}
    warn_of_bfloat16(config.precision, group.device, announce)
    if encoder is None:
        with bar("fit tokenizer", "episode", quiet=quiet) as progress:
            encoder = fit_for_all(group, store, progress)
    with bar("encode", "frame", quiet=quiet) as progress:
        trainer = assemble(
            store, encoder, config, out, command_line(), device=group.device, progress=progress, group=group,
            announce=announce, fits=is_own_tokenizer(given["tokenizer"], out), **begun,
        )  # fmt: skip
    if trainer.run.found:
        announce(trainer.run.found)
    with training_bar(config, quiet=quiet) as report:
        trainer.train(report, stop)
    return {
        "run": str(out),
        "world": str(out / "best"),
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "best_preview_gain_db": trainer.best,
    }
