"""`ahriuwu train dynamics --dry-run`: what the run would need, and what would fit where. Nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ahriuwu_cli.config import TrainConfig


def dry_run(dataset: Path, tokenizer: Path | None, config: TrainConfig, device: str, as_json: bool) -> None:
    """Print the forecast. Of the dataset only frame size and actions are asked; without a tokenizer, its default's."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
    from ahriuwu_cli.models.sizes import SIZES
    from ahriuwu_cli.training import cards, estimate
    from ahriuwu_cli.training.assemble import architecture_for
    from ahriuwu_cli.training.batches import check_shares
    from ahriuwu_cli.training.checkpoint import load_tokenizer, pick_device

    check_shares(config, 1)
    store, where = EpisodeStore.open(dataset), pick_device(device)
    encoder = load_tokenizer(tokenizer) if tokenizer else LinearTokenizer(store.height, store.width, 16, 16, 64)
    architecture = architecture_for(config.size, encoder, store, config.predicts)
    forecast = estimate.estimate(config, architecture, where.type)
    if not as_json:
        typer.echo(f"{config.size}, {config.precision}, {config.optimizer}, as on {where.type}; nothing is written")
        typer.echo(estimate.as_text(forecast))
    with bar("what fits", "size", quiet=as_json) as progress:
        fits = cards.what_fits(
            config, {size: architecture_for(size, encoder, store, config.predicts) for size in SIZES}, progress
        )
    if as_json:
        assumed = {"margin": cards.MARGIN, "cuda_context_bytes": cards.CONTEXT, "frames": config.frames}
        typer.echo(json.dumps({**forecast.to_json(), "fits": fits, "fits_assume": assumed}))
        return
    typer.echo(cards.as_text(fits, config))
