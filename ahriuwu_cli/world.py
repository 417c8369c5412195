"""A world: dynamics, tokenizer and the facts that go with them, as one checkpoint holds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.diffusion.samplers import told_step_size
from ahriuwu_cli.errors import CheckpointError, DataError
from ahriuwu_cli.models import needs
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.products import warn_of_bfloat16
from ahriuwu_cli.models.tokenizer import Tokenizer
from ahriuwu_cli.rollout import RolloutConfig, check_generation

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore


@dataclass
class World:
    """What `training.checkpoint.load_world` returns. Weights are the EMA weights, in evaluation mode."""

    dynamics: Dynamics
    tokenizer: Tokenizer
    action_space: ActionSpace
    fps: float
    frame_skip: int
    trained_d: tuple[float, ...]  # step sizes seen in training; a sampler that asks for another is refused
    forcing: str
    trained_unlabelled: bool  # whether video without actions was in the training data
    generation: RolloutConfig  # defaults for rollouts
    path: Path | None = None
    facts: dict = field(default_factory=dict)  # git revision, versions, training summary: for people
    config_hash: str = ""  # of the config.json that it was loaded from
    precision: str = "float32"  # number format of the dynamics' products, see `multiply_in`

    @property
    def k_max(self) -> int:
        return self.dynamics.config.k_max

    @property
    def device(self) -> torch.device:
        return self.dynamics.embed.weight.device

    def multiply_in(self, precision: str, say: Callable[[str], None] = lambda sentence: None) -> None:
        """From now on the dynamics multiplies in "float32" or "bfloat16" (`Dynamics.multiply_in`); its hash changes.

        say: told when that is no gain on this machine.
        """
        warn_of_bfloat16(precision, self.device, say)
        if precision == "bfloat16":
            self.dynamics.multiply_in(torch.bfloat16)
            self.precision = precision

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, H, W, 3) -> clean latents (B, T, N, D) on this world's device."""
        with torch.no_grad():
            if self.tokenizer.window > 1:  # it cuts clips itself, since frames need earlier ones
                return self.tokenizer.encode(frames.to(self.device))
            parts = frames.split(needs.in_parts(len(frames) * needs.of_pixels(self.tokenizer)), dim=1)
            return torch.cat([self.tokenizer.encode(part.to(self.device)) for part in parts], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, T, N, D) -> uint8 frames (B, T, H, W, 3) on the CPU: exactly what is shown, stored and scored."""
        with torch.no_grad():
            return self.tokenizer.show(latents)

    def generation_with(self, overrides: dict[str, Any]) -> RolloutConfig:
        """This world's defaults for rollouts, with those overrides that are not None. Not yet checked."""
        return replace(self.generation, **{name: value for name, value in overrides.items() if value is not None})

    def check_dataset(self, store: EpisodeStore) -> None:
        """DataError when a dataset's actions or frame size are not those that this world was trained with."""
        if store.action_space != self.action_space:
            theirs, ours = (", ".join(s.column_names) or "none" for s in (store.action_space, self.action_space))
            if theirs == ours:
                theirs, ours = (str(s.to_json()["components"]) for s in (store.action_space, self.action_space))
            raise DataError(
                f"{store.path} has the actions [{theirs}], but the world was trained with [{ours}]: "
                f"choose its own dataset"
            )
        size, trained = (store.height, store.width), (self.tokenizer.height, self.tokenizer.width)
        if size != trained:
            raise DataError(
                f"{store.path} has frames of {size[0]}x{size[1]}, but the world has {trained[0]}x{trained[1]}: "
                f"record or import it at that size"
            )

    def check_generation(self, config: RolloutConfig) -> None:
        """Refuse what this model was not trained for, in a sentence: unknown names (2), untrained d (4)."""
        check_generation(config, self.k_max)
        told = told_step_size(config.sampler, config.steps, self.k_max)
        if told not in self.trained_d:
            known = ", ".join(f"1/{round(1 / d)}" for d in self.trained_d)
            raise CheckpointError(
                f"this model was not trained for step size d = 1/{round(1 / told)} (trained: {known}); "
                f"use --sampler euler, or train with --bootstrap-share above 0"
            )
