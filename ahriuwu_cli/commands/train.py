"""`ahriuwu train tokenizer` and `ahriuwu train dynamics`: a dataset in, a tokenizer or a world out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import typer

from ahriuwu_cli.commands.options import Device, parse_pair, parse_seconds
from ahriuwu_cli.errors import UserError

Out = typer.Option(..., "--out", help="Folder to write; must be new or empty unless --overwrite.")
Overwrite = typer.Option(False, "--overwrite", help="Replace what is in --out.")
ECHO = 5.0  # seconds in which torchrun may pass on a signal that its processes already got
AsJson = typer.Option(False, "--json", help="Print one JSON object instead of text.")


def register(app: typer.Typer) -> None:
    train = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train a tokenizer or the dynamics.")
    train.command("tokenizer")(train_tokenizer)
    train.command("dynamics")(train_dynamics)
    app.add_typer(train, name="train")


def train_tokenizer(
    dataset: Path = typer.Argument(..., help="Dataset folder."),
    out: Path = Out,
    kind: str = typer.Option("linear", help="linear (principal components, seconds) or transformer."),
    patch: str = typer.Option(None, help="Patch in pixels, 16 or 16x32 (default: linear 16, transformer 8)."),
    latent_dim: int = typer.Option(None, help="Channels D of a latent token (default: linear 64, transformer 32)."),
    whitening: float = typer.Option(0.5, help="linear: 0 keeps pixel distances, 1 equalises the components."),
    tokens: int = typer.Option(16, help="transformer: latent tokens N of a frame."),
    steps: int = typer.Option(2000, help="transformer: optimiser steps."),
    batch: int = typer.Option(8, help="transformer: clips a step."),
    frames: int = typer.Option(8, help="transformer: frames of a clip."),
    lr: float = typer.Option(3e-3, help="transformer: learning rate."),
    lpips_weights: Path = typer.Option(None, help="transformer: LPIPS backbone weights (extra: lpips)."),
    seed: int = typer.Option(0, help="Seed of everything drawn."),
    resume: bool = typer.Option(False, "--resume", help="transformer: go on with the run in --out."),
    device: str = Device,
    overwrite: bool = Overwrite,
    as_json: bool = AsJson,
) -> None:
    """Fit a tokenizer (frames <-> latents) to the train split and print its reconstruction on the val split."""
    if kind not in ("linear", "transformer"):
        from ahriuwu_cli.errors import did_you_mean

        raise UserError(f"unknown --kind {kind!r}: {did_you_mean(kind, ('linear', 'transformer'))}")
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.training.assemble import fit_linear_tokenizer
    from ahriuwu_cli.training.checkpoint import pick_device, save_tokenizer
    from ahriuwu_cli.training.distributed import refuse_several
    from ahriuwu_cli.training.run import refuse_used, versions
    from ahriuwu_cli.training.tokenizer_quality import reconstruction

    refuse_several("train tokenizer")
    store = EpisodeStore.open(dataset)
    if not resume:
        refuse_used(out, overwrite)
    where = pick_device(device)
    patch = patch or ("16" if kind == "linear" else "8")
    latent_dim = latent_dim or (64 if kind == "linear" else 32)
    if kind == "linear":
        with bar("fit tokenizer", "episode", quiet=as_json) as progress:
            tokenizer = fit_linear_tokenizer(store, parse_pair(patch, "--patch"), latent_dim, whitening, progress)
    else:
        from ahriuwu_cli.training.signals import StopRequest
        from ahriuwu_cli.training.tokenizer_loop import train_transformer_tokenizer

        config = _transformer_config(
            store, parse_pair(patch, "--patch"), tokens=tokens, latent_dim=latent_dim, steps=steps, batch=batch,
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
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out, exactly."),
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
    from dataclasses import fields

    from ahriuwu_cli.config import TrainConfig

    if steps is not None and budget is not None:
        raise UserError("give either --steps or --budget, not both")
    if steps is None:
        settings["budget"] = parse_seconds(budget or "4m", "--budget")
    settings["compile"] = compile_model
    try:
        config = TrainConfig(**{f.name: settings[f.name] for f in fields(TrainConfig)})
    except ValueError as error:
        raise UserError(f"bad training option: {error}") from None
    _check_names(config)
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
    from ahriuwu_cli.training.assemble import assemble, fit_for_all
    from ahriuwu_cli.training.batches import check_shares
    from ahriuwu_cli.training.checkpoint import load_tokenizer
    from ahriuwu_cli.training.distributed import launcher
    from ahriuwu_cli.training.run import refuse_used
    from ahriuwu_cli.training.signals import StopRequest

    def opened():
        check_shares(config, group.world)
        store = EpisodeStore.open(dataset)
        if not resume:
            refuse_used(out, overwrite)
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
