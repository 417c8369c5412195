"""`ahriuwu eval plan` and `ahriuwu eval merge`: many evaluations by one plan, over many processes, then one comparison.

They are subcommands of a word that is a command itself: `register` puts them beside it.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ahriuwu_cli.commands import eval_saved, options
from ahriuwu_cli.commands.values import listed
from ahriuwu_cli.commands.values import shard as parse_shard
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.places import refuse_among_others, refuse_folders


class DefaultGroup(TyperGroup):
    """A group whose first command is meant when the first word is none of the others: `eval WORLD`, `eval plan`.

    A folder that is called as a subcommand is written ./plan.
    """

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        default, *others = self.list_commands(None)
        if args and args[0] in others:
            return super().make_context(info_name, args, parent, **extra)
        near = difflib.get_close_matches(args[0], others, n=1) if args else []
        if near and not os.path.exists(args[0]):
            raise UserError(f"there is no checkpoint at {args[0]}: did you mean `{info_name} {near[0]}`?")
        return self.commands[default].make_context(info_name, args, parent, **extra)


class DefaultCommand(TyperCommand):
    """The first command of a DefaultGroup: its help also lists the others."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        super().format_options(ctx, formatter)
        group = ctx.parent.command.get_command(ctx.parent, ctx.info_name)
        group.format_commands(ctx, formatter)


def register(app: typer.Typer, name: str, default: Callable[..., None]) -> None:
    """Add `default` as the command `name`, with plan and merge as its subcommands."""
    group = typer.Typer(cls=DefaultGroup, help=default.__doc__)
    group.command(name, cls=DefaultCommand, hidden=True)(default)
    group.command("plan")(plan)
    group.command("merge")(merge)
    group.command("generate")(eval_saved.generate)
    group.command("score")(eval_saved.score)
    app.add_typer(group, name=name)


def plan(
    plan: Path = typer.Argument(..., help="Cells in TOML ([defaults], [[cell]]) or JSON lines (an object a line)."),
    out: Path = typer.Option(..., "--out", help="Folder for the cells; those that are finished there are skipped."),
    shard: str = options.text(
        None, "--shard", parse_shard, "Only this share of the cells, as 1/4 (default: SLURM's array, else all)."
    ),
    share: str = options.name(
        "windows",
        "--share",
        listed("evaluation.shards", "SHARES"),
        "What torchrun's processes share: windows of every cell, or cells.",
    ),
    batch: int = options.batch(),
    allow_nan: bool = typer.Option(False, "--allow-nan", help="Exit 0 even when a rollout is not finite."),
    device: str = options.Device,
    as_json: bool = options.AsJson,
) -> None:
    """Evaluate many checkpoints and settings: one JSON file a cell, several processes if you like.

    A cell names checkpoint and dataset, and any of steps, sampler, tau_ctx, ctx_mode, ctx_label, split, windows,
    context, horizon, manifest, seed, noise_seeds. Paths are relative to the plan's folder.

    Exit 1 when a rollout is not finite; under torchrun, which would end the other processes, `merge` does that.
    """
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.evaluation.plan import read_plan
    from ahriuwu_cli.evaluation.shards import find_shards

    split = find_shards(shard, share, os.environ)
    if share != "windows" and split.local_rank is None:
        raise UserError("--share is about torchrun's processes: start with torchrun, or leave it out")
    cells = read_plan(plan)

    from ahriuwu_cli.evaluation.cells import run_plan

    quiet = as_json or not split.leads
    if split.source:
        typer.echo(f"this process: {split.source}", err=True)
    rows = run_plan(
        cells, out, split, device=device, batch=batch,
        bar=lambda title: bar(title, "frame", quiet=quiet), say=options.say,
    )  # fmt: skip
    bad = any(row["status"] == "nan" for row in rows)
    if split.leads:
        result = {"kind": "eval-plan", "status": "nan" if bad else "ok", "out": str(out), "cells": rows}
        typer.echo(json.dumps(result) if as_json else _told(rows, len(cells), out))
    if bad and not allow_nan and split.local_rank is None:
        raise typer.Exit(1)


def merge(
    ctx: typer.Context,
    folder: Path = typer.Argument(..., help="The --out of `ahriuwu eval plan`."),
    out: Path = typer.Option(None, "--out", help="The CSV; tables lie beside it as .txt, .md (default: in FOLDER)."),
    plan: Path = typer.Option(None, "--plan", help="The plan: compare its cells alone, and fail when one is missing."),
    reference: str = typer.Option(None, help="Compare with this checkpoint or cell (default: the best of each table)."),
    allow_nan: bool = typer.Option(False, "--allow-nan", help="Exit 0 even when a rollout was not finite."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace the files of --out."),
    as_json: bool = options.AsJson,
) -> None:
    """Compare the finished cells of a plan: one CSV, and a table with paired 95 % intervals for every set of windows.

    Exit 1 when a rollout was not finite, or a cell of --plan is missing.
    """
    from ahriuwu_cli.evaluation import report
    from ahriuwu_cli.evaluation.cells import planned
    from ahriuwu_cli.evaluation.merge import as_markdown, as_text, merged_rows, of_plan, read_cells
    from ahriuwu_cli.evaluation.merge import merge as compare
    from ahriuwu_cli.evaluation.plan import read_plan
    from ahriuwu_cli.startup import complete

    if out is None:
        options.only_for(ctx, "is for --out: the tables in FOLDER are made anew each time", "overwrite")
    files = _merged_files(folder, out, overwrite)
    named = None if plan is None else planned(read_plan(plan))
    cells, notes = read_cells(folder)
    missing: list[str] = []
    if named is not None:
        cells, missing, left = of_plan(cells, named)
        notes += left
    result = compare(cells, reference, notes, missing)
    text = as_text(result)
    texts = {"csv": report.as_csv(merged_rows(cells)), "txt": text + "\n", "md": as_markdown(result)}
    report.write_together({files[kind]: texts[kind] for kind in texts}, then=lambda: complete(files["csv"]))
    result["files"] = {name: str(path) for name, path in files.items()}
    shown = ", ".join(path.name for path in files.values())
    typer.echo(json.dumps(result, allow_nan=False) if as_json else f"{text}\n-> {files['csv'].parent}: {shown}")
    if missing or (result["status"] != "ok" and not allow_nan):
        raise typer.Exit(1)


def _told(rows: list[dict[str, Any]], of: int, out: Path) -> str:
    states = [row["state"] for row in rows]
    counts = f"{states.count('done')} done, {states.count('skipped')} were there"
    if "part" in states:
        counts += f", {states.count('part')} in part: other processes finish them"
    lines = [f"{len(rows)} of {of} cells: {counts} -> {out}"]
    lines += [f"FAILED: cell {row['cell']} has frames that are not finite" for row in rows if row["status"] == "nan"]
    return "\n".join(lines)


def _merged_files(folder: Path, out: Path | None, overwrite: bool) -> dict[str, Path]:
    """Those in FOLDER are replaced freely, since they can be made again any time; those elsewhere only when asked."""
    target = folder / "merged.csv" if out is None else out
    if target.suffix != ".csv":
        raise UserError(f"--out {target} must be a name that ends in .csv")
    files = {kind: target.with_suffix(f".{kind}") for kind in ("csv", "txt", "md")}
    refuse_folders(files.values())
    if out is None:
        return files
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise UserError(f"{target.parent} is no folder that can be written to: choose another --out")
    refuse_among_others(target.parent)
    for path in files.values():
        if path.exists() and not overwrite:
            raise UserError(f"{path} is there already: choose another --out, or give --overwrite to replace it")
    return files
