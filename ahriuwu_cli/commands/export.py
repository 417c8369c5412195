"""`ahriuwu export`: a trained world as a small folder to hand on: 16-bit weights, prompts, a model card."""

from __future__ import annotations

import json
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(export)


def export(
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    out: Path = typer.Option(..., "--out", help="Folder to write; must be new or empty unless --overwrite."),
    weights: str = typer.Option("bfloat16", help="Number format of the weights: bfloat16, float16 or float32."),
    prompts: Path = typer.Option(None, help="Dataset to take prompts from, so that a rollout needs no other file."),
    clips: int = typer.Option(3, help="Prompt clips."),
    frames: int = typer.Option(40, help="Frames of a prompt clip."),
    split: str = typer.Option("test", help="Split of the prompts."),
    pick: str = typer.Option("random", help="Prompts at random, or the busiest (most edges in view) of 64."),
    steps: int = typer.Option(None, help="Another default K, model passes a frame."),
    sampler: str = typer.Option(None, help="Another default sampler: shortcut, euler or renoise."),
    seed: int = typer.Option(0, help="Seed by which prompts are drawn."),
    evidence: Path = typer.Option(None, help="Folder of `ahriuwu eval`, whose scores go into the model card."),
    notes: Path = typer.Option(
        None, help="Text file with the first words of the model card: limits, licence of the art."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in --out."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Write a world ready to ship: weights in 16 bits, prompts, and a model card. `ahriuwu rollout` runs it alone."""
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.errors import UserError
    from ahriuwu_cli.training.checkpoint import load_world
    from ahriuwu_cli.training.export import export as write
    from ahriuwu_cli.training.run_folder import refuse_used

    refuse_used(out, overwrite)
    try:
        words = notes.read_text() if notes else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{notes} cannot be read as text ({error}): give a text file") from None
    store = None if prompts is None else EpisodeStore.open(prompts)
    facts = write(
        load_world(checkpoint, "cpu"), out, weights=weights, prompts=store, clips=clips, frames=frames, split=split,
        pick=pick, seed=seed, generation={"steps": steps, "sampler": sampler}, evidence=evidence, notes=words,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(facts))
        return
    typer.echo(
        f"{facts['megabytes']:.1f} MB: {facts['parameters'] / 1e6:.2f}M parameters in {weights}, "
        f"{facts['prompts']} prompts -> {out}"
    )
