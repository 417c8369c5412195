"""`ahriuwu export`: a trained world as a small folder to hand on: 16-bit weights, prompts, a model card."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands import options
from ahriuwu_cli.commands.values import listed

MOST_WORDS = 1_000_000  # bytes of --notes


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    ctx: typer.Context,
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    out: Path = typer.Option(..., "--out", help="Folder to write; must be new or empty unless --overwrite."),
    weights: str = options.name(
        "bfloat16",
        "--weights",
        listed("training.export", "FORMATS"),
        "Number format of the weights: bfloat16, float16 or float32.",
    ),
    prompts: Path = typer.Option(None, help="Dataset to take prompts from, so that a rollout needs no other file."),
    clips: int = options.whole(3, "--clips", 1, 10_000, "Prompt clips."),
    frames: int = options.whole(40, "--frames", 2, 10_000, "Frames of a prompt clip."),
    split: str = options.name("test", "--split", options.SPLITS, "Split of the prompts."),
    pick: str = options.name(
        "random", "--pick", options.PICKS, "Prompts at random, or the busiest (most edges in view) of 64."
    ),
    steps: int = options.passes("Another default K, model passes a frame."),
    sampler: str = options.sampler("Another default sampler: shortcut, euler, multistep or renoise."),
    seed: int = options.seed("Seed by which prompts are drawn."),
    average: Path = typer.Option(
        None, help="World trained on from this one, or this from it: the weights become the mean of both."
    ),
    tokenizer: Path = typer.Option(
        None, help="Another decoder: a tokenizer made by `train tokenizer --encoder` of this world's own."
    ),
    evidence: Path = typer.Option(None, help="Folder of `ahriuwu eval`, whose scores go into the model card."),
    notes: Path = typer.Option(
        None, help="Text file with the first words of the model card: limits, licence of the art."
    ),
    overwrite: bool = options.Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Write a world ready to ship: weights in 16 bits, prompts, and a model card. `ahriuwu rollout` runs it alone."""
    from ahriuwu_cli.data.documents import decode, read_bytes
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.errors import UserError
    from ahriuwu_cli.places import check_folder
    from ahriuwu_cli.startup import complete
    from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world
    from ahriuwu_cli.training.export import averaged, with_decoder
    from ahriuwu_cli.training.export import export as write

    if prompts is None:
        options.only_for(ctx, "is about the prompts that --prompts takes", "clips", "frames", "split", "pick", "seed")
    check_folder(out, overwrite, holds="world", own=("world",))
    try:
        words = decode(read_bytes(notes, MOST_WORDS)) if notes else ""
    except (OSError, ValueError) as error:
        raise UserError(f"{notes} cannot be read as text ({error}): give a text file") from None
    store = None if prompts is None else EpisodeStore.open(prompts)
    world = load_world(checkpoint, "cpu")
    if average is not None:
        world = averaged(world, load_world(average, "cpu"))
    if tokenizer is not None:
        world = with_decoder(world, load_tokenizer(tokenizer))
    facts = write(
        world, out, weights=weights, prompts=store, clips=clips, frames=frames, split=split,
        pick=pick, seed=seed, generation={"steps": steps, "sampler": sampler}, evidence=evidence, notes=words,
        overwrite=overwrite, then=lambda: complete(out),
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(
        f"{facts['megabytes']:.1f} MB: {facts['parameters'] / 1e6:.2f}M parameters in {weights}, "
        f"{facts['prompts']} prompts -> {out}"
    )
