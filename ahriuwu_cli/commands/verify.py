"""`ahriuwu verify`: the mathematics against closed-form oracles, and with a checkpoint that model as well."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands import options
from ahriuwu_cli.errors import DataError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("verify")(verify)


def verify(
    ctx: typer.Context,
    checkpoint: Path = typer.Argument(
        None, help="A checkpoint or run folder to question as well; without it, mathematics only."
    ),
    dataset: Path = typer.Option(None, "--dataset", help="Question the model on this dataset's val split."),
    metrics: bool = typer.Option(
        True, help="Run every metric on models and videos whose order is known (ten seconds)."
    ),
    device: str = options.Device,
    as_json: bool = options.AsJson,
) -> None:
    """Check the mathematics, the metrics, and what a checkpoint hears of d, tau (0 clean, 1 noise), action and context.

    With --dataset, also whether the metrics tell the checkpoint from its own blind copies. Exit code 1 when a check
    fails.
    """
    if checkpoint is None:
        options.only_for(ctx, "is for questioning a model, and no checkpoint was given", "dataset", "device")
    if dataset is not None and not dataset.exists():
        raise DataError(f"{dataset} does not exist: give a dataset folder")

    from ahriuwu_cli.evaluation.summary import jsonable
    from ahriuwu_cli.evaluation.verify import as_table, verify_mathematics, verify_world

    world = store = None
    if checkpoint is not None:
        from ahriuwu_cli.data.episodes import EpisodeStore
        from ahriuwu_cli.training.checkpoint import load_world

        world = load_world(checkpoint, device)
        store = None if dataset is None else EpisodeStore.open(dataset)
    from ahriuwu_cli.evaluation import selftest

    of_world = [] if world is None else verify_world(world, store)  # first: a dataset may be too short for it
    if metrics and store is not None:
        of_world += selftest.question_metrics(world, store)
    checks, controls = verify_mathematics(), selftest.self_test() if metrics else None
    checks += (controls.checks if controls else []) + of_world
    failed = sum(not c.ok for c in checks)
    if as_json:
        lines = [{**vars(c), "measured": c.measured if c.measured == c.measured else None} for c in checks]
        document = {"ok": not failed, "failed": failed, "checks": lines}
        typer.echo(json.dumps(document | ({} if controls is None else {"controls": jsonable(controls.rows)})))
    else:
        if controls is not None:
            typer.echo(f"{controls.as_table()}\n")
        typer.echo(as_table(checks))
        typer.echo(f"\n{len(checks) - failed} of {len(checks)} checks hold")
    if failed:
        raise typer.Exit(1)
