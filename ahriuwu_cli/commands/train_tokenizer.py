"""`ahriuwu train tokenizer`: a dataset in, a tokenizer out, fitted in closed form or trained as a run."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands import options, values
from ahriuwu_cli.errors import UserError

KINDS = ("linear", "transformer")
TRANSFORMER = (  # options of that kind alone
    "tokens", "steps", "batch", "frames", "lr", "lpips_weights", "seed", "log_every", "save_every", "keep", "resume",
    "device",
)  # fmt: skip


def train_tokenizer(
    ctx: typer.Context,
    dataset: Path = typer.Argument(..., help="Dataset folder."),
    out: Path = options.Out,
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
    gradient_weight: float = options.number(
        0.0, "--gradient-weight", 0, 1000, "linear: weight of gradients beside pixels: 0 plain, 1 or 2 sharper edges."
    ),
    sharpness: float = options.number(
        0.0, "--sharpness", 0, 1, "linear: share of gradient energy that decoding keeps; 0: the least error."
    ),
    encoder: Path = typer.Option(
        None, help="linear: keep this tokenizer's (or world's) encoder and fit only the decoder to --sharpness."
    ),
    tokens: int = options.whole(16, "--tokens", 1, 4096, "transformer: latent tokens N of a frame."),
    steps: int = options.whole(2000, "--steps", 1, options.MANY, "transformer: optimiser steps."),
    batch: int = options.whole(8, "--batch", 1, 65536, "transformer: clips a step."),
    frames: int = options.whole(8, "--frames", 1, 10_000, "transformer: frames of a clip."),
    lr: float = options.number(3e-3, "--lr", 0, 10, "transformer: learning rate.", "()"),
    lpips_weights: Path = typer.Option(None, help="transformer: LPIPS v0.1, backbone and heads (extra: lpips)."),
    seed: int = options.seed("transformer: seed of everything drawn."),
    log_every: int = options.whole(10, "--log-every", 1, options.MANY, "transformer: steps between lines of metrics."),
    save_every: int = options.whole(
        500, "--save-every", 1, options.MANY, "transformer: steps between resumable states."
    ),
    keep: int = options.whole(2, "--keep", 1, 1_000_000, "transformer: resumable states kept."),
    resume: bool = typer.Option(
        False, "--resume", help="transformer: insist on going on with the run in --out; the same command does."
    ),
    device: str = options.text("auto", "--device", values.device_name, f"transformer: {options.DEVICES}"),
    overwrite: bool = options.Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Fit a tokenizer (frames <-> latents) to the train split and print its reconstruction on the val split."""
    if kind == "linear":
        options.only_for(ctx, "is for --kind transformer", *TRANSFORMER)
    else:
        options.only_for(ctx, "is for --kind linear", "whitening", "gradient_weight", "sharpness", "encoder")
    if encoder is not None:
        options.only_for(
            ctx, "is about the encoder, which --encoder gives", "patch", "latent_dim", "whitening", "gradient_weight"
        )
        if not sharpness:
            raise UserError("--encoder keeps all but the decoder: give --sharpness, what it is fitted to")
    if resume:
        options.only_for(ctx, "contradicts --resume, which keeps what is in --out", "overwrite")
    settings = {
        "tokens": tokens, "steps": steps, "batch": batch, "frames": frames, "lr": lr, "seed": seed,
        "lpips_weights": str(lpips_weights) if lpips_weights else None,
        "log_every": log_every, "save_every": save_every, "keep": keep,
    }  # fmt: skip
    from ahriuwu_cli.training.distributed import refuse_several
    from ahriuwu_cli.training.restart import stoppable

    refuse_several("train tokenizer")
    if kind == "linear":
        tokenizer, quality, folder = _linear(
            dataset, out, patch or "16", latent_dim or 64, (whitening, gradient_weight, sharpness), encoder, overwrite,
            quiet=as_json,
        )  # fmt: skip
    else:
        with stoppable() as stop:
            tokenizer, quality, folder = _transformer(
                dataset, out, patch or "8", latent_dim or 32, settings, device, stop, resume, overwrite, quiet=as_json
            )
    result = {
        "tokenizer": str(folder),
        "kind": kind,
        "tokens": tokenizer.tokens,
        "latent_dim": tokenizer.latent_dim,
        "hash": tokenizer.fingerprint(),
        "val_psnr_db": quality["psnr_db"],
        "val_sharpness_ratio": quality.get("sharpness_ratio"),  # tokenizers of before do not say it
    }
    if as_json:
        typer.echo(json.dumps(result))
        return
    sharpness = result["val_sharpness_ratio"]
    typer.echo(
        f"{kind} tokenizer: {tokenizer.tokens} tokens x {tokenizer.latent_dim} channels a frame, "
        f"{quality['psnr_db']:.2f} dB{'' if sharpness is None else f' and {sharpness:.2f} of the sharpness'} "
        f"on {quality['frames']} val frames -> {folder}"
    )


def _linear(
    dataset: Path,
    out: Path,
    patch: str,
    latent_dim: int,
    weights: tuple[float, float, float],
    encoder: Path | None,
    overwrite: bool,
    quiet: bool,
) -> tuple:
    """(tokenizer, its quality, its folder): fitted in closed form and written.

    weights: whitening, gradient weight, sharpness. encoder: the folder that gives all but the decoder.
    """
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.places import check_folder
    from ahriuwu_cli.startup import complete
    from ahriuwu_cli.training.assemble import fit_decoder, fit_linear_tokenizer
    from ahriuwu_cli.training.checkpoint import load_tokenizer
    from ahriuwu_cli.training.run_folder import OWN
    from ahriuwu_cli.training.tokenizer_quality import check_split

    check_folder(out, overwrite, holds="tokenizer", own=OWN["tokenizer"])
    store = EpisodeStore.open(dataset)
    check_split(store, "val")
    whitening, gradient_weight, sharpness = weights
    start = None if encoder is None else load_tokenizer(encoder)
    with bar("fit tokenizer", "episode", quiet=quiet) as progress:
        if start is not None:
            tokenizer = fit_decoder(store, start, sharpness, progress)
        else:
            size = values.pair(patch), latent_dim
            tokenizer = fit_linear_tokenizer(store, *size, whitening, progress, gradient_weight, sharpness)
    return tokenizer, _write_tokenizer(tokenizer, store, out, overwrite, lambda: complete(out), OWN["tokenizer"]), out


def _transformer(
    dataset: Path,
    out: Path,
    patch: str,
    latent_dim: int,
    settings: dict,
    device: str,
    stop,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> tuple:
    """(tokenizer, its quality, its folder): trained in the run folder `out`, or gone on with, or found finished."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.startup import complete
    from ahriuwu_cli.training.checkpoint import load_tokenizer, pick_device, tokenizer_facts
    from ahriuwu_cli.training.restart import command_line
    from ahriuwu_cli.training.tokenizer_loop import train_transformer_tokenizer
    from ahriuwu_cli.training.tokenizer_quality import check_split

    store = EpisodeStore.open(dataset)
    check_split(store, "val")
    where, folder = pick_device(device), out / "tokenizer"
    config = _transformer_config(store, values.pair(patch), latent_dim=latent_dim, **settings)

    written = []

    def keep(tokenizer, is_there: bool) -> None:  # under the run's lock: afterwards the folder may become another run's
        if not is_there:  # else written by this run, which had come to its end
            _write_tokenizer(tokenizer, store, folder, train=config.to_json())
        written.extend((load_tokenizer(folder), tokenizer_facts(folder)["val"]))

    with bar("train tokenizer", "step", quiet=quiet) as progress:
        train_transformer_tokenizer(
            store, config, out, where, progress, resume, overwrite=overwrite, stop=stop, command=command_line(),
            announce=lambda sentence: typer.echo(sentence, err=True), keep=keep,
        )  # fmt: skip
    complete(out)
    return *written, folder


def _write_tokenizer(
    tokenizer, store, folder: Path, overwrite: bool = True, then=lambda: None, own=None, **more
) -> dict:
    """Save a tokenizer with its reconstruction on the val split, which comes back."""
    from ahriuwu_cli.training.checkpoint import save_tokenizer
    from ahriuwu_cli.training.tokenizer_quality import reconstruction
    from ahriuwu_cli.training.versions import versions

    quality = reconstruction(tokenizer, store, "val")
    data = {"dataset": store.name, "dataset_fingerprint": store.fingerprint}
    facts = {**versions(), **data, "val": quality, **more}
    save_tokenizer(tokenizer.cpu(), folder, facts, overwrite, then, own)
    return quality


def _transformer_config(store, patch: tuple[int, int], *, tokens: int, latent_dim: int, frames: int, **settings):
    """The training configuration of a transformer tokenizer for this dataset's frames."""
    from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizerConfig
    from ahriuwu_cli.training.tokenizer_config import TokenizerTrainConfig

    if patch[0] != patch[1]:
        raise UserError(f"--patch {patch[0]}x{patch[1]} is not square, as the transformer tokenizer needs it")
    try:
        architecture = TransformerTokenizerConfig(
            height=store.height, width=store.width, patch=patch[0], tokens=tokens, latent_dim=latent_dim, window=frames
        )
        return TokenizerTrainConfig(architecture=architecture, frames=frames, **settings)
    except ValueError as error:
        raise UserError(f"bad tokenizer option: {error}") from None
