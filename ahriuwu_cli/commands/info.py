"""`ahriuwu info`: what a folder of ours holds, as a table or as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ahriuwu_cli.errors import DataError, UserError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("info")(info)


def info(
    path: Annotated[Path | None, typer.Argument(help="A dataset folder.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read every byte and report defects; exit 1 if any.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Describe a dataset: episodes, frames, rate, size, actions; with --check also whether it is sound."""
    if path is None:
        raise UserError("nothing to describe: give a dataset folder, as in `ahriuwu info data/doom`")
    if not path.exists():
        raise DataError(f"{path} does not exist: give a dataset folder")
    if (path / "dataset.json").is_file():
        _describe_dataset(path, check, as_json)
    else:
        raise DataError(f"{path} is not a dataset or checkpoint: give a folder made by `ahriuwu record` or `import`")


def _describe_dataset(path: Path, check: bool, as_json: bool) -> None:
    from ahriuwu_cli.data.describe import as_text, describe

    facts = describe(path, check)
    typer.echo(json.dumps(facts) if as_json else as_text(facts))
    if check and not facts["sound"]:
        raise typer.Exit(1)
