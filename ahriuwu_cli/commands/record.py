"""`ahriuwu record`: play a world with random actions and keep what was seen and done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("record")(record)


def record(
    source: Annotated[
        str, typer.Argument(help="doom:SCENARIO or gym:NAME, such as doom:defend_the_center or gym:ALE/Breakout-v5.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the dataset to make.")],
    episodes: Annotated[int, typer.Option(min=1, help="How many episodes.")] = 64,
    frames: Annotated[
        int | None, typer.Option(min=2, help="Stop after the episode that reaches so many frames in all.")
    ] = None,
    size: Annotated[str, typer.Option(help="Pixels of a frame: a side, or HEIGHTxWIDTH.")] = "64",
    frame_skip: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Steps of the world for a frame; default 4 for doom and Atari, else 1."),
    ] = None,
    max_frames: Annotated[int, typer.Option(min=2, max=1_000_000, help="Cut episodes to so many frames.")] = 512,
    min_frames: Annotated[int, typer.Option(min=2, help="Drop episodes with fewer frames.")] = 32,
    hold_min: Annotated[int, typer.Option(min=1, help="Hold a random action for at least so many frames.")] = 2,
    hold_max: Annotated[int, typer.Option(min=1, help="Hold a random action for at most so many frames.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of worlds, actions and splits.")] = 0,
    splits: Annotated[str, typer.Option(help="Shares of episodes for train, val, test.")] = "0.8,0.1,0.1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier dataset at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Record episodes of random play from ViZDoom or a Gymnasium environment into a dataset."""
    from tqdm import tqdm

    from ahriuwu_cli.data.describe import as_text, describe
    from ahriuwu_cli.data.episodes import EpisodeWriter, check_target, parse_fractions, split_episodes
    from ahriuwu_cli.data.recording import RecordConfig, Shortfall, record_episodes
    from ahriuwu_cli.data.resize import parse_size
    from ahriuwu_cli.data.sources import open_world

    height, width = parse_size(size)
    fractions = parse_fractions(splits)
    split_episodes(episodes, fractions, seed)
    config = RecordConfig(source, height, width, frame_skip, max_frames, min_frames, (hold_min, hold_max), seed)
    check_target(out, overwrite)
    world = open_world(source, config)
    dropped = Shortfall()
    try:
        settings = {"max_frames": max_frames, "min_frames": min_frames, "hold": [hold_min, hold_max]}
        writer = EpisodeWriter(
            out,
            height=height,
            width=width,
            fps=world.fps,
            frame_skip=world.frame_skip,
            action_space=world.action_space,
            source=world.facts | settings,
            seed=seed,
            fractions=fractions,
            overwrite=overwrite,
        )
        bar = tqdm(total=frames or episodes, unit="frame" if frames else "episode", disable=as_json or None)
        with bar, writer:
            for done, episode in enumerate(record_episodes(world, config, dropped), 1):
                writer.add(episode.frames, episode.actions, episode.info["source"])
                bar.update(min(len(episode.frames), frames - bar.n) if frames else 1)
                if done == episodes or (frames and writer.frames >= frames):
                    break
    finally:
        world.close()
    if dropped.episodes:
        typer.echo(f"note: dropped {dropped.episodes} episodes shorter than {min_frames} frames", err=True)
    if frames and writer.frames < frames:
        typer.echo(f"note: {episodes} episodes gave {writer.frames} of {frames} frames; raise --episodes", err=True)
    facts = describe(out)
    typer.echo(json.dumps(facts) if as_json else as_text(facts))
