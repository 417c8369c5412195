"""The configuration of a training run: one frozen dataclass, stored in the run folder and read back strictly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_type_hints

from ahriuwu_cli.diffusion.tau import TAU_CTX

OPTIMIZERS = ("muon", "adamw", "adafactor")
PRECISIONS = ("float32", "bfloat16")
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
MOST_FRAMES = 1 << 22  # of a step: beyond it are slips of the finger, not clusters
AT_TAU_CTX = ("horizon", "prefix", "context")  # forcings that draw tau_ctx itself
SELF_MADE = ("resampled",)  # forcings whose frames look back at copies that the model itself walks to tau_ctx
ONE_STEP_SIZE = ("uniform", "horizon")  # forcings that draw d = 1/k_max alone: they train no shortcut
ADDED = {"muon_momentum": 0.95, "adamw_lr_scale": 1.0}  # what runs were trained with before there were such fields


@dataclass(frozen=True)
class TrainConfig:
    """How the dynamics is trained. Defaults train a small world that works on two cores."""

    size: str = "nano"
    steps: int | None = None  # exactly this many optimiser steps; or
    budget: float | None = 240.0  # seconds: the decay phase starts when its share of them is left
    batch: int = 16  # B, clips a step
    frames: int = 12  # T, frames of a clip
    long_frames: int = 0  # every long_every-th step uses clips this long ...
    long_every: int = 0  # ... and as many as fit into the frames of a step; 0 = never
    accumulate: int = 1  # micro-batches a step
    forcing: str = "independent"
    tau_ctx: float = TAU_CTX
    ramp: str = "paper"
    bootstrap_share: float = 0.125  # of the clips that draw d > d_min and aim at the bootstrap target (eq. 7)
    bootstrap_target: str = "eq7"  # or, for ablation, "second": the second half step's prediction
    predicts: str = "x"  # what the network gives: z_clean, or the velocity ("v")
    single_image_share: float = 0.0  # of the clips whose frames are seen as single images (paper: 0.3)
    optimizer: str = "muon"
    optimizer_state: str = "float32"  # of Muon's momentum; or "bfloat16": half the bytes
    muon_momentum: float = 0.95
    lr: float = 3e-3
    adamw_lr_scale: float = 1.0  # of lr, beside Muon: for gains, embeddings, first and last projection
    weight_decay: float = 0.0
    warmup: int = 20  # optimiser steps of linear warm-up
    decay: float = 0.4  # share of the run in which the learning rate falls to zero
    clip: float = 1.0  # gradient norm
    ema: float = 0.98  # decay of the averaged weights that are sampled from
    precision: str = "float32"  # or "bfloat16": autocast
    checkpoint_activations: bool = False  # compute activations again in the backward pass instead of keeping them
    compile: bool = False
    threads: int = 0  # 0: PyTorch's own choice
    seed: int = 0
    log_every: int = 10
    preview_every: int = 0  # steps; 0: three times a run
    save_every: int = 0  # steps; 0: with every preview
    keep: int = 2  # resumable checkpoints kept
    preview_windows: int = 32

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(TrainConfig).items():
            kinds, value = get_args(hint) or (hint,), getattr(self, name)
            if type(value) not in kinds and not (float in kinds and type(value) is int):
                words = " or ".join(_WORDS[kind] for kind in kinds)
                raise ValueError(f"{name} is {repr(value)[:40]}, not {words}")
        positive = ("batch", "frames", "accumulate", "log_every", "keep", "preview_windows")
        problems = [(getattr(self, n) < 1, f"{n} must be at least 1, got {getattr(self, n)}") for n in positive]
        whole = ("long_frames", "long_every", "warmup", "threads", "preview_every", "save_every", "seed")
        problems += [(getattr(self, n) < 0, f"{n} must not be negative, got {getattr(self, n)}") for n in whole]
        shares = ("bootstrap_share", "single_image_share", "decay", "ema")
        problems += [(not 0 <= getattr(self, n) <= 1, f"{n} must be in [0, 1], got {getattr(self, n)}") for n in shares]
        problems += [
            ((self.steps is None) == (self.budget is None), "give either steps or a time budget, not both or neither"),
            (self.steps is not None and self.steps < 1, f"steps must be at least 1, got {self.steps}"),
            (self.budget is not None and not 0 < self.budget < 1e8, f"budget {self.budget} is not a number of seconds"),
            (self.frames < 2, f"frames must be at least 2 for the dynamics to see motion, got {self.frames}"),
            (self.long_frames == 1, "long_frames must be at least 2 for the dynamics to see motion, got 1"),
            (bool(self.long_every) != bool(self.long_frames), "long_frames and long_every go together"),
            (
                self.batch * self.frames > MOST_FRAMES,
                f"batch {self.batch} of {self.frames} frames is more than {MOST_FRAMES} frames a step",
            ),
            (self.long_frames > self.batch * self.frames, "long_frames is larger than a whole batch of frames"),
            (not 0 <= self.tau_ctx < 1, f"tau_ctx must be in [0, 1) where 0 is clean, got {self.tau_ctx}"),
            (
                self.ramp == "velocity" and self.forcing in AT_TAU_CTX and self.tau_ctx < 1e-6,
                f"--ramp velocity weighs by 1 / tau^2, and --forcing {self.forcing} draws tau_ctx: give a --tau-ctx "
                f"of at least 1e-6, not {self.tau_ctx:g}",
            ),
            (not 0 < self.lr < 10, f"lr {self.lr} is not in (0, 10)"),
            (not 0 <= self.muon_momentum < 1, f"muon_momentum must be in [0, 1), got {self.muon_momentum}"),
            (not 0 < self.adamw_lr_scale <= 100, f"adamw_lr_scale {self.adamw_lr_scale} is not in (0, 100]"),
            (not 0 <= self.weight_decay < 10, f"weight_decay {self.weight_decay} is not in [0, 10)"),
            (not self.clip > 0, f"clip must be above 0, got {self.clip}"),
            (self.batch % self.accumulate != 0, f"batch {self.batch} does not divide by accumulate {self.accumulate}"),
            (self.shortcut_share + self.single_image_share > 1, "bootstrap_share and single_image_share exceed 1"),
            (self.optimizer not in OPTIMIZERS, f"optimizer {self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}"),
            (self.precision not in PRECISIONS, f"precision {self.precision!r} is not float32 or bfloat16"),
            (
                self.optimizer_state not in PRECISIONS,
                f"optimizer_state {self.optimizer_state!r} is not float32 or bfloat16",
            ),
            (
                self.optimizer_state == "bfloat16" and self.optimizer != "muon",
                f"optimizer_state bfloat16 is for muon's momentum; {self.optimizer} keeps its own (adafactor: least)",
            ),
        ]
        for wrong, sentence in problems:
            if wrong:
                raise ValueError(sentence)

    @property
    def shortcut_share(self) -> float:
        """Share of a step's clips that aim at the bootstrap target, where the forcing draws larger steps at all."""
        return 0.0 if self.forcing in ONE_STEP_SIZE else self.bootstrap_share

    @property
    def walk_to(self) -> float | None:
        """Where the model walks the past of every frame to; None where it is not of its own making."""
        return self.tau_ctx if self.forcing in SELF_MADE else None

    @property
    def open_share(self) -> float:
        """Share of a time budget after which it decides how many steps there are: before the rate falls."""
        return max(1 - self.decay, 0.1)

    def to_json(self) -> dict:
        """All fields but those of ADDED that are as in runs from before them, which so are the same runs still."""
        as_before = {n for n, value in ADDED.items() if getattr(self, n) == value or self.optimizer != "muon"}
        return {name: value for name, value in asdict(self).items() if name not in as_before}

    @classmethod
    def from_json(cls, document: dict) -> TrainConfig:
        """Strict: a missing or unknown field is a ValueError, but for those that `to_json` leaves out."""
        document = ADDED | document
        wrong = sorted(set(document) ^ {f.name for f in fields(cls)})
        if wrong:
            raise ValueError(f"missing or unknown fields: {', '.join(wrong)}")
        return cls(**document)

    @classmethod
    def check_stated(cls, document: dict[str, Any]) -> None:
        """ValueError unless some run can have the settings that a document states; others may stand beside them."""
        cls(**{f.name: document[f.name] for f in fields(cls) if f.name in document})
