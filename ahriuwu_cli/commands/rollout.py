"""`ahriuwu rollout`: a world, a prompt and actions in; an imagined video out, beside the truth where there is one."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from ahriuwu_cli.commands.options import Device


def register(app: typer.Typer) -> None:
    app.command("rollout")(rollout)


def rollout(
    checkpoint: Path = typer.Argument(..., help="World: a checkpoint folder, or a run folder (its `best`)."),
    prompt: Path = typer.Argument(
        None,
        help="Where the context frames come from: dataset, video file or image (default: the world's own prompts).",
    ),
    out: Path = typer.Option(..., "--out", help="Folder to write; must be new or empty unless --overwrite."),
    episode: str = typer.Option(None, help="Dataset prompt: episode id (default: drawn from --split by --seed)."),
    start: int = typer.Option(None, help="First context frame (default: drawn; 0 for a video)."),
    split: str = typer.Option("test", help="Dataset prompt: split to draw the episode from."),
    pick: str = typer.Option("random", help="Dataset prompt: random, or busiest (most edges in view) of 64 windows."),
    context: int = typer.Option(8, help="Context frames."),
    length: int = typer.Option(32, help="Frames to imagine; may go far beyond the model's window."),
    actions: list[str] = typer.Option(
        [],
        help="data (default for a dataset), random, none, repeat:NAME (repeat:TURN_LEFT, repeat:2), or a file; "
        "several times: the same prompt and noise under each.",
    ),
    samples: int = typer.Option(1, help="Rollouts of the same prompt with different noise."),
    steps: int = typer.Option(None, help="K, model passes a frame (default: the checkpoint's)."),
    sampler: str = typer.Option(None, help="shortcut, euler or renoise (default: the checkpoint's)."),
    tau_ctx: float = typer.Option(None, help="Noise of context frames, tau (0 clean, 1 noise)."),
    ctx_mode: str = typer.Option(
        None, help="stop: the state at tau_ctx is the context; renoise: z_hat with fresh noise."
    ),
    ctx_label: str = typer.Option(None, help="Label of context frames: honest, its level; clean, a lie for ablation."),
    seed: int = typer.Option(0, help="Seed of the noise, of the drawn window and of random actions."),
    scale: int = typer.Option(0, help="Enlargement of the video (default: to about 256 pixels high)."),
    compile_model: bool = typer.Option(
        False, "--compile", help="torch.compile the passes: starts up to a minute later, for long rollouts."
    ),
    device: str = Device,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace what is in --out."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON object instead of text."),
) -> None:
    """Imagine video: writes rollout.mp4 (truth | rollout | difference), a GIF, a PNG strip and the raw arrays."""
    from ahriuwu_cli.commands.progress import bar
    from ahriuwu_cli.imagine import Request, imagine
    from ahriuwu_cli.prompts import shipped_prompt
    from ahriuwu_cli.training.checkpoint import load_world
    from ahriuwu_cli.training.run_folder import refuse_used

    prompt = shipped_prompt(checkpoint) if prompt is None else prompt
    request = Request(prompt, episode, start, split, pick, context, length, tuple(actions), samples, seed)
    request.check()
    refuse_used(out, overwrite)
    world = load_world(checkpoint, device)
    if compile_model:
        world.dynamics.compile_passes()
    given = {"steps": steps, "sampler": sampler, "tau_ctx": tau_ctx, "ctx_mode": ctx_mode, "ctx_label": ctx_label}
    with bar("rollout", "frame", quiet=as_json) as progress:
        result = imagine(world, request, given, out, scale, progress)
    if as_json:
        typer.echo(json.dumps(result))
        return
    shown = f", {result['psnr_db']:.2f} dB against the truth" if result["psnr_db"] is not None else ""
    typer.echo(
        f"{length} frames from {result['prompt']} at {result['frames_per_s']:.1f} frames/s"
        f"{shown} -> {result['files']['mp4']}"
    )
