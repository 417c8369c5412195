"""`ahriuwu rollout`: a world, a prompt and actions in; an imagined video out, beside the truth where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands import options


def register(app: typer.Typer) -> None:
    app.command("rollout")(rollout)


def rollout(
    ctx: typer.Context,
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    prompt: Path = typer.Argument(
        None,
        help="Where the context frames come from: dataset, video file or image (default: the world's own prompts).",
    ),
    out: Path = typer.Option(..., "--out", help="Folder to write; must be new or empty unless --overwrite."),
    episode: str = typer.Option(None, help="Dataset prompt: episode id (default: drawn from --split by --seed)."),
    start: int = options.whole(
        None, "--start", 0, options.MANY, "First context frame (default: drawn; 0 for a video or a named episode)."
    ),
    split: str = options.name("test", "--split", options.SPLITS, "Dataset prompt: split to draw the episode from."),
    pick: str = options.name(
        "random", "--pick", options.PICKS, "Dataset prompt: random, or busiest (most edges in view) of 64 windows."
    ),
    context: int = options.context("Context frames (default: 8; of an image, 1)."),
    length: int = options.whole(
        32, "--length", 1, 1_000_000, "Frames to imagine; may go far beyond the model's window."
    ),
    actions: list[str] = typer.Option(
        [],
        help="data (default for a dataset), random, none, repeat:NAME (repeat:TURN_LEFT, repeat:2), or a file: its "
        "first row leaves a video's first frame, else the first context frame. Several times: the same prompt and "
        "noise under each.",
    ),
    samples: int = options.whole(1, "--samples", 1, 256, "Rollouts of the same prompt with different noise."),
    steps: int = options.passes(),
    sampler: str = options.sampler(),
    tau_ctx: float = options.tau_ctx(),
    ctx_mode: str = options.ctx_mode("stop: the state at tau_ctx is the context; renoise: z_hat with fresh noise."),
    ctx_label: str = options.ctx_label("Label of context frames: honest, its level; clean, a lie for ablation."),
    seed: int = options.seed("Seed of the noise, of the drawn window and of random actions."),
    scale: int = options.whole(
        None, "--scale", 1, 64, "Enlargement of the video (default: to about 256 pixels high); GIFs may get less."
    ),
    compile_model: bool = typer.Option(
        False, "--compile", help="torch.compile the passes: starts up to a minute later, for long rollouts."
    ),
    precision: str = options.Precision,
    device: str = options.Device,
    overwrite: bool = options.Overwrite,
    as_json: bool = options.AsJson,
) -> None:
    """Imagine video: writes rollout.mp4 (truth | rollout | difference), a GIF, a PNG strip and the raw arrays."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.imagine import Request, imagine
    from ahriuwu_cli.models.compiling import check_compile
    from ahriuwu_cli.places import check_folder
    from ahriuwu_cli.prompts import IMAGES, shipped_prompt
    from ahriuwu_cli.startup import complete
    from ahriuwu_cli.training.checkpoint import load_world

    check_folder(out, overwrite, holds="rollout")
    prompt = shipped_prompt(checkpoint) if prompt is None else prompt
    if prompt.is_file():
        options.only_for(ctx, f"is for a dataset, and {prompt} is a file", "episode", "split", "pick")
    if prompt.suffix.lower() in IMAGES and not prompt.is_dir():
        options.only_for(ctx, f"is for a video or a dataset, and {prompt} is one image", "start", "context")
    if episode is not None:
        options.only_for(ctx, "draws an episode, and --episode names one", "split")
    context = context or Request.context
    request = Request(prompt, episode, start, split, pick, context, length, tuple(actions), samples, seed)
    request.check()
    world = load_world(checkpoint, device)
    world.multiply_in(precision, options.say)
    if compile_model:
        check_compile(world.device)
        world.dynamics.compile_passes()
    given = {"steps": steps, "sampler": sampler, "tau_ctx": tau_ctx, "ctx_mode": ctx_mode, "ctx_label": ctx_label}
    with bar("rollout", "frame", quiet=as_json) as progress:
        result = imagine(world, request, given, out, scale, progress, overwrite, then=lambda: complete(out))
    for warning in result["warnings"]:
        options.say(f"note: {warning}")
    if as_json:
        typer.echo(json.dumps(result))
        return
    shown = f", {result['psnr_db']:.2f} dB against the truth" if result["psnr_db"] is not None else ""
    typer.echo(
        f"{length} frames from {result['prompt']} at {result['frames_per_s']:.1f} frames/s"
        f"{shown} -> {result['files']['mp4']}"
    )
