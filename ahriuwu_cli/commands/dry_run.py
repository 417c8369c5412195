"""`ahriuwu train dynamics --dry-run`: what the run would need, and what would fit where. Nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ahriuwu_cli.config import TrainConfig
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.tokenizer import Tokenizer


def dry_run(
    store: EpisodeStore, tokenizer: Tokenizer | None, config: TrainConfig, device: str, init_from: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Print the forecast, of what the same command would train. Without a tokenizer, of its default's sizes."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.errors import UserError
    from ahriuwu_cli.models.sizes import SIZES
    from ahriuwu_cli.training import cards, estimate
    from ahriuwu_cli.training.assemble import architecture_for, check_fits, default_tokenizer, start_from
    from ahriuwu_cli.training.checkpoint import pick_device

    where = pick_device(device)
    encoder = tokenizer or default_tokenizer(store)
    architecture = architecture_for(config.size, encoder, store, config.predicts)
    check_fits(store, encoder, config)
    if init_from is not None:
        start_from(init_from, architecture, tokenizer)
    architectures, beyond = {}, []
    for size in SIZES:
        try:
            architectures[size] = architecture_for(size, encoder, store, config.predicts)
        except UserError as error:
            beyond.append(str(error))
    forecast = estimate.estimate(config, architecture, where.type)
    if not as_json:
        typer.echo(f"{config.size}, {config.precision}, {config.optimizer}, as on {where.type}; nothing is written")
        typer.echo(estimate.as_text(forecast))
        typer.echo("what fits on cards: every size is traced, a minute or two", err=True)
    with bar("what fits", "size", quiet=as_json) as progress:
        fits = cards.what_fits(config, architectures, progress)
    if as_json:
        assumed = {"margin": cards.MARGIN, "cuda_context_bytes": cards.CONTEXT, "frames": config.frames}
        typer.echo(json.dumps({**forecast.to_json(), "fits": fits, "fits_assume": assumed}))
        return
    typer.echo("\n".join([cards.as_text(fits, config), *beyond]))
