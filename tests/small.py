"""The smallest world and dataset that still do everything: for tests of training, checkpoints and commands."""

from pathlib import Path

import numpy as np
import torch

from ahriuwu_cli.config import OPTIMIZERS, PRECISIONS
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.video_writing import write_mp4
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training.checkpoint import action_slots, save_world
from ahriuwu_cli.world import World

LEARNERS = [  # optimizer and optimizer_state, all that there are
    (name, state) for name in OPTIMIZERS for state in PRECISIONS if name == "muon" or state == "float32"
]
SPACE = ActionSpace((ActionComponent("keys", "binary", 2, ("LEFT", "RIGHT")),))


def small_world(seed: int = 0) -> World:
    """16 x 16 frames, 4 tokens of 6 channels, two layers, k_max 8."""
    torch.manual_seed(seed)
    tokenizer = LinearTokenizer(16, 16, 8, 8, 6)
    tokenizer.components.copy_(torch.linalg.qr(torch.randn(192, 6))[0])
    config = DynamicsConfig(
        tokens=4, latent_dim=6, width=16, depth=2, heads=2, kv_heads=2, mlp_hidden=32, time_every=2, window=6, k_max=8,
        action_space=action_slots(SPACE),
    )  # fmt: skip
    levels = (1.0, 0.5, 0.25, 0.125)
    return World(
        Dynamics(config).eval().requires_grad_(False), tokenizer.eval(), SPACE, 10.0, 4, levels, "independent", False,
        RolloutConfig(steps=2), None, {},
    )  # fmt: skip


def small_dataset(
    path: Path,
    episodes: int = 8,
    frames: int = 40,
    labelled: bool = True,
    space=SPACE,
    silent: int = 0,
    still: bool = False,
) -> EpisodeStore:
    """A bright bar that moves left or right as the action says, on a noisy background: 16 x 16.

    silent: how many of the last episodes come without their actions. still: every frame is its episode's first.
    """
    rng = np.random.default_rng(0)
    with EpisodeWriter(path, height=16, width=16, fps=10.0, action_space=space, name="bar", seed=0) as writer:
        for episode in range(episodes):
            actions = space.random(frames - 1, (2, 5), rng)
            place, clip = int(rng.integers(16)), []
            for t in range(frames):
                frame = rng.integers(0, 8, (16, 16, 3)).astype(np.uint8)
                frame[:, place % 16] = 220
                clip.append(frame)
                if t < frames - 1 and space.width:
                    place += int(actions[t, -1]) - int(actions[t, 0])
            clip = [clip[0]] * frames if still else clip
            writer.add(np.stack(clip), actions if labelled and episode < episodes - silent else None)
    return EpisodeStore.open(path)


def small_place(folder: Path, films: dict[str, int]) -> Path:
    """The folder with `data`, a `world` for it, and `films`: black videos of so many frames, by name."""
    small_dataset(folder / "data")
    save_world(small_world(), folder / "world")
    (folder / "films").mkdir()
    for name, frames in films.items():
        write_mp4(folder / "films" / name, np.zeros((frames, 64, 64, 3), np.uint8), 10)
    return folder


def gradients_of(monkeypatch, loop) -> list[torch.Tensor]:
    """The list that gets all gradients as one vector whenever this training loop applies them."""
    seen, apply = [], loop.apply

    def noted(optimizers):
        grads = [p.grad for o in optimizers for g in o.param_groups for p in g["params"] if p.grad is not None]
        seen.append(torch.cat([g.flatten() for g in grads]))
        apply(optimizers)

    monkeypatch.setattr(loop, "apply", noted)
    return seen
