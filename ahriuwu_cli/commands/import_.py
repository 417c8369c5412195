"""`ahriuwu import`: video files, with action files beside them or without, become a dataset."""

from __future__ import annotations

import json
import os
from pathlib import Path

import typer

from ahriuwu_cli import ranges
from ahriuwu_cli.commands import options, values


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("import")(import_)


def import_(
    folder: Path = typer.Argument(..., help="Folder with the videos (mp4, mkv, webm, avi, mov, gif)."),
    out: Path = typer.Option(..., "--out", help="Folder of the dataset to make."),
    size: str = options.text(
        "64", "--size", values.parse_size, "Pixels of a frame: a side, or HEIGHTxWIDTH; videos are cropped."
    ),
    fps: float | None = options.number(None, "--fps", *ranges.FPS, "Thin videos without actions to this rate."),
    max_frames: int = options.whole(100_000, "--max-frames", 2, options.MANY, "Refuse a video with more frames."),
    seed: int = options.seed("Seed of the splits."),
    splits: str = options.text(
        "0.8,0.1,0.1", "--splits", values.parse_splits, "Shares of episodes for train, val, test."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier dataset at --out."),
    as_json: bool = options.AsJson,
) -> None:
    """Import video files, each an episode, into a dataset.

    clip.mp4 takes its actions from clip.csv (a header of column names, then numbers) or clip.jsonl (an object or array
    a line): row t takes frame t to frame t+1, so N frames need N-1 rows. Videos without such a file are kept
    unlabelled.

    actions.json may declare the action space: {"components": [{"name": "steer", "kind": "continuous", "size": 1,
    "low": [-1], "high": [1]}]}; kinds are discrete, binary, continuous. Without it the space is inferred and announced.
    """
    from tqdm import tqdm

    from ahriuwu_cli.data import describe
    from ahriuwu_cli.data.documents import as_text
    from ahriuwu_cli.data.episode_writer import EpisodeWriter, check_target
    from ahriuwu_cli.data.importer import ImportConfig, import_videos, plan_import
    from ahriuwu_cli.data.resize import parse_size
    from ahriuwu_cli.data.splits import parse_fractions
    from ahriuwu_cli.startup import complete

    height, width = parse_size(size)
    fractions = parse_fractions(splits)
    check_target(out, overwrite)
    plan = plan_import(ImportConfig(folder, height, width, fps, max_frames))
    writer = EpisodeWriter(
        out,
        height=height,
        width=width,
        fps=plan.fps,
        action_space=plan.action_space,
        source={"kind": "import", "folder": as_text(os.path.basename(os.path.realpath(folder)))},
        seed=seed,
        fractions=fractions,
        overwrite=overwrite,
        then=lambda: complete(out),
    )
    with tqdm(total=len(plan.videos), unit="video", disable=as_json or None) as bar, writer:
        for episode in import_videos(plan):
            writer.add(*episode)
            del episode  # before the next video is decoded
            bar.update()
    for note in plan.notes:
        options.say(f"note: {note}")
    facts = describe.describe(out)
    typer.echo(json.dumps(facts) if as_json else describe.as_text(facts))
