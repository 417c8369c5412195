"""The configuration of a run that trains the transformer tokenizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from ahriuwu_cli.config import OPTIMIZERS, PRECISIONS
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizerConfig


@dataclass(frozen=True)
class TokenizerTrainConfig:
    """How the transformer tokenizer is trained. Defaults suit small frames on two cores. ValueError for bad values."""

    architecture: TransformerTokenizerConfig = field(default_factory=TransformerTokenizerConfig)  # and its mask_max
    steps: int = 2000
    batch: int = 8  # B, clips a step
    frames: int = 8  # T, frames of a clip; at least architecture.window, so that every distance in time is trained
    optimizer: str = "muon"
    optimizer_state: str = "float32"  # of Muon's momentum; or "bfloat16"
    lr: float = 3e-3
    weight_decay: float = 0.0
    warmup: int = 50  # optimiser steps of linear warm-up
    decay: float = 0.4  # share of the run in which the learning rate falls to zero
    clip: float = 1.0  # gradient norm
    precision: str = "float32"  # or "bfloat16": autocast
    lpips_weights: str | None = None  # path of the LPIPS backbone's weights; None: MSE only
    seed: int = 0
    log_every: int = 10  # steps between lines of metrics
    save_every: int = 500  # steps between resumable states; the end always is one
    keep: int = 2  # resumable states kept

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "frames", "log_every", "save_every", "keep")
        problems = [(getattr(self, n) < 1, f"{n} must be at least 1, got {getattr(self, n)}") for n in positive]
        problems += [
            (getattr(self, n) < 0, f"{n} must not be negative, got {getattr(self, n)}") for n in ("warmup", "seed")
        ]
        problems += [
            (
                self.frames < self.architecture.window,
                f"frames {self.frames} is below window {self.architecture.window}",
            ),
            (self.optimizer not in OPTIMIZERS, f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"),
            (
                self.optimizer_state not in PRECISIONS,
                f"optimizer_state {self.optimizer_state!r} is not float32 or bfloat16",
            ),
            (not 0 < self.lr < 10, f"lr {self.lr} is not in (0, 10)"),
            (not 0 <= self.weight_decay < 10, f"weight_decay {self.weight_decay} is not in [0, 10)"),
            (not 0 <= self.decay <= 1, f"decay must be in [0, 1], got {self.decay}"),
            (not self.clip > 0, f"clip must be above 0, got {self.clip}"),
            (self.precision not in PRECISIONS, f"precision {self.precision!r} is not float32 or bfloat16"),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)

    def to_json(self) -> dict:
        return asdict(self)
