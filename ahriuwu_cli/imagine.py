"""One request to imagine, from a world and a prompt to files: mp4, GIF, PNG strip and the raw arrays."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from ahriuwu_cli.data.video import compose_grid, write_gif, write_mp4, write_strip
from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.errors import TrainingError
from ahriuwu_cli.evaluation.metrics import psnr_per_frame
from ahriuwu_cli.models.dynamics import incoming_actions
from ahriuwu_cli.prompts import Prompt, Request, read_prompts
from ahriuwu_cli.rollout import KeyedNoise, rollout
from ahriuwu_cli.world import World

Progress = Callable[[int, int], None]
CHUNK = 64  # frames decoded at a time
STRIP = 12  # frames of the PNG strip at most


def imagine(world: World, request: Request, given: dict, out: Path, scale: int, progress: Progress) -> dict:
    """Generate and write everything into `out`; returns what `rollout.json` holds. given: overrides, None is unset."""
    config = world.generation_with(given)
    world.check_generation(config)
    prompts = read_prompts(world, request)
    seconds = time.monotonic()
    frames = _generate(world, request, prompts, config, progress)  # (sources, samples, L, H, W, 3)
    seconds = time.monotonic() - seconds
    psnr, compared = None, 0
    for prompt, made in zip(prompts, frames[:, 0], strict=True):
        if prompt.same_actions and len(prompt.truth):
            compared = min(len(prompt.truth), request.length)
            psnr = float(np.mean(psnr_per_frame(made[:compared], prompt.truth[:compared])))
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    result = {
        "prompt": prompts[0].name,
        "context": len(prompts[0].context),
        "length": request.length,
        "samples": request.samples,
        "seed": request.seed,
        "actions": list(request.actions) or ["default"],
        "generation": asdict(config),
        "tau": LABEL,
        "frames_per_s": round(len(prompts) * request.samples * request.length / max(seconds, 1e-9), 2),
        "psnr_db": psnr,
        "psnr_frames": compared,
        "checkpoint": str(world.path),
        "files": _write(world, request, prompts, frames, out, scale),
    }
    (out / "rollout.json").write_text(json.dumps(result, indent=1))
    return result


def _generate(world: World, request: Request, prompts: list[Prompt], config, progress: Progress) -> np.ndarray:
    """uint8 (sources of actions, samples, L, H, W, 3). TrainingError names the frame where a rollout is not finite.

    All sources share context and noise, so that what differs comes from the actions.
    """
    n, device = request.samples, world.device
    rows = len(prompts) * n
    latents = world.encode(torch.from_numpy(prompts[0].context)[None]).expand(rows, -1, -1, -1)
    given = torch.from_numpy(np.stack([p.actions for p in prompts])).repeat_interleave(n, dim=0)
    actions, known = incoming_actions(given, torch.ones(rows, dtype=torch.bool))
    known[:, 1:] = torch.from_numpy(np.stack([p.known for p in prompts])).repeat_interleave(n, dim=0)
    keys = [f"{prompts[0].name}/{i}" for i in range(n)] * len(prompts)
    noise = KeyedNoise(request.seed, keys, latents.shape[2:], device)
    imagined = rollout(world.dynamics, latents, actions.to(device), known.to(device), config, noise, world.k_max)
    lead = world.tokenizer.decoder_window - 1  # latents that a tokenizer looks back at
    shown, waiting, past = [], [], latents[:, max(0, latents.shape[1] - lead) :] if lead else latents[:, :0]
    for t, z_hat in enumerate(imagined):
        if not torch.isfinite(z_hat).all():
            raise TrainingError(
                f"the rollout is not finite from generated frame {t} on: try another --tau-ctx or --steps"
            )
        waiting.append(z_hat)
        if len(waiting) == CHUNK or t + 1 == request.length:
            clip = torch.cat([past, torch.stack(waiting, dim=1)], dim=1)
            shown.append(world.decode(clip).numpy()[:, past.shape[1] :])
            waiting, past = [], clip[:, clip.shape[1] - lead :] if lead else past
        progress(t + 1, request.length)
    return np.concatenate(shown, axis=1).reshape(len(prompts), n, request.length, *shown[0].shape[2:])


def _write(
    world: World, request: Request, prompts: list[Prompt], frames: np.ndarray, out: Path, scale: int
) -> dict[str, str]:
    prompt, alone = prompts[0], len(prompts) == 1
    known = len(prompt.truth)
    scale = scale or max(1, min(8, 256 // world.tokenizer.height))
    both = [np.concatenate([prompt.context, made]) for made in frames.reshape(-1, *frames.shape[2:])]
    cells = []
    if known:
        truth = np.concatenate([prompt.context, prompt.truth])
        truth = np.concatenate([truth, np.zeros((len(both[0]) - len(truth), *truth.shape[1:]), np.uint8)])
        cells.append(("truth" if alone and prompt.same_actions else "recorded, with its own actions", truth))
    cells += list(zip(_titles(request), both, strict=True))
    if known and alone and prompt.same_actions:
        difference = np.abs(both[0].astype(np.int16) - truth).astype(np.uint8)
        difference[len(prompt.context) + known :] = 0
        cells.append(("difference", difference))
    captions = [""] + [
        f"action {world.action_space.describe(row)}" if seen else "action unknown"
        for row, seen in zip(prompt.actions, prompt.known, strict=True)
    ]
    if not world.action_space.width or not alone:
        captions = []  # with several sources of actions their names are the titles
    page = compose_grid(cells, columns=min(len(cells), 4), scale=scale, context=len(prompt.context), captions=captions)
    files = {"mp4": out / "rollout.mp4", "gif": out / "rollout.gif", "strip": out / "strip.png"}
    write_mp4(files["mp4"], page, world.fps)
    write_gif(files["gif"], page[:128], world.fps)
    column = compose_grid(cells, columns=1, scale=max(1, 128 // world.tokenizer.height), context=len(prompt.context))
    write_strip(files["strip"], column, every=-(-len(column) // STRIP))
    files["arrays"] = out / "arrays.safetensors"
    arrays = {"frames": frames[0] if alone else frames, "context": prompt.context, "truth": prompt.truth}
    arrays["actions"] = prompt.actions if alone else np.stack([p.actions for p in prompts])
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, files["arrays"])
    return {name: str(path) for name, path in files.items()}


def _titles(request: Request) -> list[str]:
    """Of every rollout: its source of actions where there are several, and the number of its sample likewise."""
    sources = request.actions if len(request.actions) > 1 else ("rollout",)
    numbers = [""] if request.samples == 1 else [f" {i + 1}" for i in range(request.samples)]
    return [source + number for source in sources for number in numbers]
