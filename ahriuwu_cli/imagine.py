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
from ahriuwu_cli.prompts import Prompt, Request, read_prompt
from ahriuwu_cli.rollout import KeyedNoise, rollout
from ahriuwu_cli.world import World

Progress = Callable[[int, int], None]
CHUNK = 64  # frames decoded at a time


def imagine(world: World, request: Request, given: dict, out: Path, scale: int, progress: Progress) -> dict:
    """Generate and write everything into `out`; returns what `rollout.json` holds. given: overrides, None is unset."""
    config = world.generation_with(given)
    world.check_generation(config)
    prompt = read_prompt(world, request)
    seconds = time.monotonic()
    frames = _generate(world, request, prompt, config, progress)  # (samples, L, H, W, 3)
    seconds = time.monotonic() - seconds
    compared = prompt.truth[: request.length if prompt.same_actions else 0]
    psnr = None
    if len(compared):
        psnr = float(np.mean(np.asarray(psnr_per_frame(frames[0, : len(compared)], compared))))
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    result = {
        "prompt": prompt.name,
        "context": len(prompt.context),
        "length": request.length,
        "samples": request.samples,
        "seed": request.seed,
        "actions": request.actions or "default",
        "generation": asdict(config),
        "tau": LABEL,
        "frames_per_s": round(request.samples * request.length / max(seconds, 1e-9), 2),
        "psnr_db": psnr,
        "psnr_frames": len(compared),
        "checkpoint": str(world.path),
        "files": _write(world, prompt, frames, out, scale),
    }
    (out / "rollout.json").write_text(json.dumps(result, indent=1))
    return result


def _generate(world: World, request: Request, prompt: Prompt, config, progress: Progress) -> np.ndarray:
    """uint8 (samples, L, H, W, 3). TrainingError names the frame where a rollout stops being finite."""
    n, device = request.samples, world.device
    latents = world.encode(torch.from_numpy(prompt.context)[None]).expand(n, -1, -1, -1)
    actions, known = incoming_actions(torch.from_numpy(prompt.actions)[None], torch.ones(1, dtype=torch.bool))
    known[:, 1:] = torch.from_numpy(prompt.known)
    noise = KeyedNoise(request.seed, [f"{prompt.name}/{i}" for i in range(n)], latents.shape[2:], device)
    imagined = rollout(
        world.dynamics, latents, actions.expand(n, -1, -1).to(device), known.expand(n, -1).to(device), config, noise,
        world.k_max,
    )  # fmt: skip
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
    return np.concatenate(shown, axis=1)


def _write(world: World, prompt: Prompt, frames: np.ndarray, out: Path, scale: int) -> dict[str, str]:
    samples = len(frames)
    known = len(prompt.truth)
    scale = scale or max(1, min(8, 256 // world.tokenizer.height))
    both = [np.concatenate([prompt.context, s]) for s in frames]
    cells = []
    if known:
        truth = np.concatenate([prompt.context, prompt.truth])
        truth = np.concatenate([truth, np.zeros((len(both[0]) - len(truth), *truth.shape[1:]), np.uint8)])
        cells.append(("truth" if prompt.same_actions else "recorded, with its own actions", truth))
    cells += [("rollout" if samples == 1 else f"rollout {i + 1}", clip) for i, clip in enumerate(both)]
    if known and prompt.same_actions:
        difference = np.abs(both[0].astype(np.int16) - truth).astype(np.uint8)
        difference[len(prompt.context) + known :] = 0
        cells.append(("difference", difference))
    captions = [""] + [
        f"action {world.action_space.describe(row)}" if seen else "action unknown"
        for row, seen in zip(prompt.actions, prompt.known, strict=True)
    ]
    if not world.action_space.width:
        captions = []
    page = compose_grid(cells, columns=min(len(cells), 4), scale=scale, context=len(prompt.context), captions=captions)
    files = {"mp4": out / "rollout.mp4", "gif": out / "rollout.gif", "strip": out / "strip.png"}
    write_mp4(files["mp4"], page, world.fps)
    write_gif(files["gif"], page[:128], world.fps)
    write_strip(files["strip"], page, every=max(1, len(page) // 12), scale=1)
    files["arrays"] = out / "arrays.safetensors"
    arrays = {"frames": frames, "context": prompt.context, "truth": prompt.truth, "actions": prompt.actions}
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, files["arrays"])
    return {name: str(path) for name, path in files.items()}
