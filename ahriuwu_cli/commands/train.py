"""`ahriuwu train tokenizer` and `ahriuwu train dynamics`: a dataset in, a tokenizer or a world out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from ahriuwu_cli.commands import options, values
from ahriuwu_cli.commands.values import listed
from ahriuwu_cli.errors import CheckpointError, UserError

Out = typer.Option(..., "--out", help="Folder to write; must be new or empty unless --overwrite.")
Overwrite = typer.Option(False, "--overwrite", help="Replace what is in --out.")
KINDS = ("linear", "transformer")
ECHO = 5.0  # seconds in which torchrun may pass on a signal that its processes already got
TRANSFORMER = ("tokens", "steps", "batch", "frames", "lr", "lpips_weights", "resume")  # options of that kind alone


def register(app: typer.Typer) -> None:
    train = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer or the dynamics.")
    train.command("tokenizer")(train_tokenizer)
    train.command("dynamics")(train_dynamics)
    app.add_typer(train, name="train")


def train_tokenizer(
    ctx: typer.Context,
    dataset: Path = typer.Argument(..., help="Dataset folder."),
    out: Path = Out,
    kind: str = options.name(
        "linear", "--kind", lambda: KINDS, "linear (principal components, seconds) or transformer."
    ),
    patch: str = options.text(
        None, "--patch", values.pair, "Patch in pixels, 16 or 16x32 (default: linear 16, transformer 8)."
    ),
    latent_dim: int = options.whole(
        None, "--latent-dim", 1, 65536, "Channels D of a latent token (default: linear 64, transformer 32)."
    ),
    whitening: float = options.number(
        0.5, "--whitening", 0, 1, "linear: 0 keeps pixel distances, 1 equalises the components."
    ),
    tokens: int = options.whole(16, "--tokens", 1, 4096, "transformer: latent tokens N of a frame."),
    steps: int = options.whole(2000, "--steps", 1, options.MANY, "transformer: optimiser steps."),
    batch: int = options.whole(8, "--batch", 1, 65536, "transformer: clips a step."),
    frames: int = options.whole(8, "--frames", 1, 10_000, "transformer: frames of a clip."),
    lr: float = options.number(3e-3, "--lr", 0, 10, "transformer: learning rate.", "()"),
    lpips_weights: Path = typer.Option(None, help="transformer: LPIPS backbone weights (extra: lpips)."),
    seed: int = options.seed("Seed of everything drawn."),
    resume: bool = typer.Option(False, "--resume", help="transformer: go on with the run in --out."),
    device: str = options.Device,
    overwrite: bool = Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Fit a tokenizer (frames <-> latents) to the train split and print its reconstruction on the val split."""
    if kind == "linear":
        options.only_for(ctx, "is for --kind transformer", *TRANSFORMER)
    else:
        options.only_for(ctx, "is for --kind linear", "whitening")
    if resume:
        options.only_for(ctx, "contradicts --resume, which keeps what is in --out", "overwrite")
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.folders import check_folder
    from ahriuwu_cli.training.assemble import fit_linear_tokenizer
    from ahriuwu_cli.training.checkpoint import pick_device, save_tokenizer
    from ahriuwu_cli.training.distributed import refuse_several
    from ahriuwu_cli.training.run import versions
    from ahriuwu_cli.training.tokenizer_quality import reconstruction

    refuse_several("train tokenizer")
    check_folder(out, overwrite or resume)
    where = pick_device(device)
    store = EpisodeStore.open(dataset)
    patch = patch or ("16" if kind == "linear" else "8")
    latent_dim = latent_dim or (64 if kind == "linear" else 32)
    if kind == "linear":
        with bar("fit tokenizer", "episode", quiet=as_json) as progress:
            tokenizer = fit_linear_tokenizer(store, values.pair(patch), latent_dim, whitening, progress)
    else:
        from ahriuwu_cli.training.signals import StopRequest
        from ahriuwu_cli.training.tokenizer_loop import train_transformer_tokenizer

        config = _transformer_config(
            store, values.pair(patch), tokens=tokens, latent_dim=latent_dim, steps=steps, batch=batch,
            frames=frames, lr=lr, lpips_weights=str(lpips_weights) if lpips_weights else None, seed=seed,
        )  # fmt: skip
        with bar("train tokenizer", "step", quiet=as_json) as progress, StopRequest() as stop:
            tokenizer = train_transformer_tokenizer(
                store, config, out, where, progress, resume, overwrite=overwrite, stop=stop,
                announce=lambda sentence: typer.echo(sentence, err=True),
            )  # fmt: skip
    quality = reconstruction(tokenizer, store, "val")
    facts = {**versions(), "dataset": store.name, "dataset_fingerprint": store.fingerprint, "val": quality}
    folder = out if kind == "linear" else out / "tokenizer"
    save_tokenizer(tokenizer.cpu(), folder, facts)
    result = {
        "tokenizer": str(folder),
        "kind": kind,
        "tokens": tokenizer.tokens,
        "latent_dim": tokenizer.latent_dim,
        "hash": tokenizer.fingerprint(),
        "val_psnr_db": quality["psnr_db"],
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{kind} tokenizer: {tokenizer.tokens} tokens x {tokenizer.latent_dim} channels a frame, "
        f"{quality['psnr_db']:.2f} dB on {quality['frames']} val frames -> {folder}"
    )


def train_dynamics(
    ctx: typer.Context,
    dataset: Path = typer.Argument(..., help="Dataset folder."),
    out: Path = Out,
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
    long_frames: int = options.whole(0, "--long-frames", 0, 10_000, "Frames of a long clip, at equal frames a step."),
    long_every: int = options.whole(
        0, "--long-every", 0, options.MANY, "Every how many steps the clips are long ones."
    ),
    accumulate: int = options.whole(
        1, "--accumulate", 1, 65536, "Micro-batches a step of a process; a resume may change it."
    ),
    forcing: str = options.name(
        "independent",
        "--forcing",
        listed("diffusion.forcing", "FORCINGS"),
        "Draws of tau and d: independent, context, uniform, horizon, prefix.",
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
        listed("models.dynamics", "PREDICTS"),
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
    lr: float = options.number(3e-3, "--lr", 0, 10, "Learning rate.", "()"),
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
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out, exactly."),
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
    overwrite: bool = Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Train the dynamics on a dataset's latents: shortcut forcing (Dreamer 4, eq. 7 and 8), EMA, previews, resume."""
    settings = dict(locals())
    if resume:
        options.only_for(ctx, "contradicts --resume, which keeps what is in --out", "overwrite")
    if forcing == "horizon":
        options.only_for(ctx, "says nothing to --forcing horizon, which trains the smallest d alone", "bootstrap_share")
    from dataclasses import fields

    from ahriuwu_cli.config import TrainConfig

    if steps is not None and budget is not None:
        raise UserError("give either --steps or --budget, not both")
    if steps is None:
        settings["budget"] = values.seconds(budget or "4m")
    settings["compile"] = compile_model
    try:
        config = TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        raise UserError(f"bad training option: {error}") from None
    if forecast:
        from ahriuwu_cli.commands.dry_run import dry_run

        return dry_run(dataset, tokenizer, config, device, as_json)

    from ahriuwu_cli.training.distributed import join

    if threads:
        import torch

        torch.set_num_threads(threads)
    with join(device, parallel) as group:
        if parallel == "fsdp" and group.world == 1:
            typer.echo("one process: --parallel fsdp has nothing to share out", err=True)
        result = _train(
            group, config, dataset, out, tokenizer, resume=resume, overwrite=overwrite, init_from=init_from,
            quiet=as_json or not group.leads,
        )  # fmt: skip
    if not group.leads:
        return
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo(
        f"{result['steps']} steps in {result['seconds']:.0f} s; best free-running gain over persistence on val: "
        f"{result['best_preview_gain_db']:+.2f} dB -> {result['world']}"
    )


def _train(
    group,
    config,
    dataset: Path,
    out: Path,
    tokenizer: Path | None,
    *,
    resume: bool,
    overwrite: bool,
    init_from: Path | None,
    quiet: bool,
) -> dict:
    """What every process of the group does, from the dataset to the end of the run."""
    from ahriuwu_cli.commands.progress import bar, training_bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.folders import check_folder
    from ahriuwu_cli.training.assemble import assemble, fit_for_all
    from ahriuwu_cli.training.batches import check_shares
    from ahriuwu_cli.training.checkpoint import load_tokenizer
    from ahriuwu_cli.training.distributed import launcher
    from ahriuwu_cli.training.signals import StopRequest

    def opened():
        if init_from is not None and not init_from.exists():
            raise CheckpointError(f"there is no checkpoint at {init_from}")
        check_folder(out, overwrite or resume)
        check_shares(config, group.world)
        store = EpisodeStore.open(dataset)
        return store, load_tokenizer(tokenizer) if tokenizer is not None else None

    store, encoder = group.together(opened)
    if encoder is None:
        with bar("fit tokenizer", "episode", quiet=quiet) as progress:
            encoder = fit_for_all(group, store, progress)
    command = " ".join([launcher(), *sys.argv[1:]]).removesuffix(" --resume")
    with bar("encode", "frame", quiet=quiet) as progress:
        trainer = assemble(
            store, encoder, config, out, command, device=group.device, resume=resume, overwrite=overwrite,
            init_from=init_from, progress=progress, group=group, announce=lambda s: typer.echo(s, err=True),
        )  # fmt: skip
    with StopRequest(echo=ECHO if group.world > 1 else 0.0) as stop, training_bar(config, quiet=quiet) as report:
        trainer.train(report, stop)
    return {
        "run": str(out),
        "world": str(out / "best"),
        "steps": trainer.step,
        "seconds": round(trainer.elapsed, 1),
        "best_preview_gain_db": trainer.best,
    }


def _transformer_config(store, patch: tuple[int, int], *, tokens: int, latent_dim: int, frames: int, **settings):
    """The training configuration of a transformer tokenizer for this dataset's frames."""
    from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizerConfig
    from ahriuwu_cli.training.tokenizer_loop import TokenizerTrainConfig

    if patch[0] != patch[1]:
        raise UserError(f"--patch {patch[0]}x{patch[1]} is not square, as the transformer tokenizer needs it")
    try:
        architecture = TransformerTokenizerConfig(
            height=store.height, width=store.width, patch=patch[0], tokens=tokens, latent_dim=latent_dim, window=frames
        )
        return TokenizerTrainConfig(architecture=architecture, frames=frames, **settings)
    except ValueError as error:
        raise UserError(f"bad tokenizer option: {error}") from None
