"""Does a world fade, freeze or turn to noise when it runs on? Random play from held-out prompts, stretch by stretch.

    python scripts/collapse.py checkpoints/defend_the_center data/center
    python scripts/collapse.py runs/mine data/mine --frames 400 --prompts 32 --json out.json

Nothing recorded shows what random actions would have led to, so nothing is compared frame by frame: motion (mean
absolute change from frame to frame) and sharpness (gradient energy) of every 25 generated frames stand as a ratio to
those of the recorded test frames. --frames is a multiple of 25, so that every frame is looked at. Exit code 1 when one
of them leaves 0.5..2, or a frame is not finite.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.generate import generate
from ahriuwu_cli.evaluation.metrics import gradient_energy, motion_per_frame
from ahriuwu_cli.evaluation.protocol import make_manifest, read_windows
from ahriuwu_cli.training.checkpoint import load_world

STRETCH = 25  # frames
LOW, HIGH = 0.5, 2.0


def main() -> None:
    a = _arguments()
    torch.set_num_threads(a.threads)
    world, store = load_world(a.world, a.device), EpisodeStore.open(a.dataset)
    world.check_dataset(store)
    found = look(world, store, a.prompts, a.context, a.frames, a.seed)
    for first, motion, sharpness in zip(found["first_frame"], found["motion"], found["sharpness"], strict=True):
        print(f"frames {first:4} to {first + STRETCH - 1:4}   motion {motion:.2f}   sharpness {sharpness:.2f}")
    values = [*found["motion"], *found["sharpness"]]
    found["holds"] = bool(found["finite"] and min(values) >= LOW and max(values) <= HIGH)
    print(f"all within {LOW} to {HIGH}: {found['holds']}")
    if a.json:
        a.json.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    raise SystemExit(0 if found["holds"] else 1)


def look(world, store: EpisodeStore, prompts: int, context: int, frames: int, seed: int) -> dict:
    """Motion and sharpness of every stretch over those of recorded frames; by prompt, then the mean over prompts."""
    manifest = make_manifest(store, "test", context, 1, prompts, seed)
    rng = np.random.default_rng(seed)
    given = read_windows(store, manifest)[0][:, :context]
    actions = np.stack([store.action_space.random(context + frames - 1, (2, 8), rng) for _ in range(prompts)])
    room = np.zeros((prompts, frames, *given.shape[2:]), np.uint8)  # of frames that nobody has recorded
    made = generate(
        world, np.concatenate([given, room], axis=1), actions, manifest.keys, world.generation,
        seed=seed, context=context, batch=prompts,
    )  # fmt: skip
    recorded = [store.frames(e.id, 0, e.frames) for e in store.episodes("test")]
    motion = float(np.mean([motion_per_frame(r).mean() for r in recorded]))
    sharp = float(np.mean([gradient_energy(r).mean() for r in recorded]))
    stretches = range(0, frames, STRETCH)
    return {
        "prompts": prompts, "frames": frames, "seed": seed, "finite": bool(made.finite.all()),
        "first_frame": [s + 1 for s in stretches],
        "motion": [float(motion_per_frame(made.frames[:, s : s + STRETCH]).mean() / motion) for s in stretches],
        "sharpness": [float(gradient_energy(made.frames[:, s : s + STRETCH]).mean() / sharp) for s in stretches],
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path)
    parser.add_argument("dataset", type=Path)
    for name, value in {"frames": 200, "prompts": 16, "context": 8, "seed": 0, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    if a.json and not a.json.absolute().parent.is_dir():
        parser.error(f"there is no folder for --json {a.json}")
    if a.prompts < 1 or a.context < 1:
        parser.error("--prompts and --context must be at least 1")
    if a.frames < STRETCH or a.frames % STRETCH:
        parser.error(f"--frames {a.frames}: give a multiple of {STRETCH}, since stretches of {STRETCH} are looked at")
    return a


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
