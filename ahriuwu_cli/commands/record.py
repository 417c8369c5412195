"""`ahriuwu record`: play a world with random actions and keep what was seen and done."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands import options, values


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("record")(record)


def record(
    source: str = typer.Argument(
        ..., help="doom:SCENARIO or gym:NAME, such as doom:defend_the_center or gym:ALE/Breakout-v5."
    ),
    out: Path = typer.Option(..., "--out", help="Folder of the dataset to make."),
    episodes: int = options.whole(64, "--episodes", 1, 1_000_000, "How many episodes."),
    frames: int | None = options.whole(
        None, "--frames", 2, options.MANY, "Stop after the episode that reaches so many frames in all."
    ),
    size: str = options.text(
        "64", "--size", values.parse_size, "Pixels of a frame: a side, or HEIGHTxWIDTH; pictures are squeezed."
    ),
    frame_skip: int | None = options.whole(
        None, "--frame-skip", 1, 1000, "Steps of the world for a frame; default 4 for doom and Atari, else 1."
    ),
    max_frames: int = options.whole(512, "--max-frames", 2, 1_000_000, "Cut episodes to so many frames."),
    min_frames: int = options.whole(32, "--min-frames", 2, 1_000_000, "Drop episodes with fewer frames."),
    hold_min: int = options.whole(2, "--hold-min", 1, 1_000_000, "Hold a random action for at least so many frames."),
    hold_max: int = options.whole(8, "--hold-max", 1, 1_000_000, "Hold a random action for at most so many frames."),
    seed: int = options.seed("Seed of worlds, actions and splits."),
    splits: str = options.text(
        "0.8,0.1,0.1", "--splits", values.parse_splits, "Shares of episodes for train, val, test."
    ),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace an earlier dataset at --out."),
    as_json: bool = options.AsJson,
) -> None:
    """Record episodes of random play from ViZDoom or a Gymnasium environment into a dataset."""
    from tqdm import tqdm

    from ahriuwu_cli.data.describe import as_text, describe
    from ahriuwu_cli.data.episode_writer import EpisodeWriter, check_target
    from ahriuwu_cli.data.recording import RecordConfig, Shortfall, record_episodes
    from ahriuwu_cli.data.resize import parse_size
    from ahriuwu_cli.data.sources import open_world
    from ahriuwu_cli.data.splits import parse_fractions
    from ahriuwu_cli.startup import complete

    height, width = parse_size(size)
    fractions = parse_fractions(splits)
    config = RecordConfig(source, height, width, frame_skip, max_frames, min_frames, (hold_min, hold_max), seed)
    check_target(out, overwrite)
    place = out.absolute()  # now: an environment is somebody's program, and may leave this folder for another
    world = open_world(source, config)
    dropped = Shortfall()
    try:
        settings = {"max_frames": max_frames, "min_frames": min_frames, "hold": [hold_min, hold_max]}
        writer = EpisodeWriter(
            place,
            height=height,
            width=width,
            fps=world.fps,
            frame_skip=world.frame_skip,
            action_space=world.action_space,
            source=world.facts | settings,
            seed=seed,
            fractions=fractions,
            overwrite=overwrite,
            then=lambda: complete(out),
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
    facts = describe(place) | {"path": str(out)}
    typer.echo(json.dumps(facts) if as_json else as_text(facts))
