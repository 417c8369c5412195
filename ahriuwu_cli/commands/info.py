"""`ahriuwu info`: what a folder of ours holds (dataset, world, tokenizer, run), or the table of model sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ahriuwu_cli.commands.options import AsJson
from ahriuwu_cli.errors import DataError, UserError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    path: Annotated[Path | None, typer.Argument(help="A dataset, world, tokenizer or run; none: model sizes.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every byte of a dataset; exit 1 on defects.")] = False,
    as_json: bool = AsJson,
) -> None:
    """Describe a dataset, a world, a tokenizer or a run; without a path, list the model sizes and their parameters."""
    if path is not None and not path.exists():
        raise DataError(f"{path} does not exist: give a dataset, world, tokenizer or run folder")
    if path is not None and (path / "dataset.json").is_file():
        _describe_dataset(path, check, as_json)
        return
    if check:
        raise UserError("--check is for datasets: `ahriuwu verify CHECKPOINT` tests a world")
    from ahriuwu_cli.training.describe import as_text, describe_checkpoint, describe_sizes

    facts = describe_sizes() if path is None else describe_checkpoint(path)
    typer.echo(json.dumps(facts) if as_json else as_text(facts))


def _describe_dataset(path: Path, check: bool, as_json: bool) -> None:
    from ahriuwu_cli.data.describe import as_text, describe

    facts = describe(path, check)
    typer.echo(json.dumps(facts) if as_json else as_text(facts))
    if check and not facts["sound"]:
        raise typer.Exit(1)
