"""The training loop of the transformer tokenizer: video in, a tokenizer with scaled latents out.

    windows of frames -> hidden patches -> reconstruction -> MSE + 0.2 LPIPS, each over its running RMS -> optimiser

The randomness of a step (windows, masks) is a function of (seed, step): a resumed run is the unbroken run, bit for bit
on a CPU. The run folder holds run.json, metrics.jsonl and state/, all that the next step depends on.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ahriuwu_cli.config import OPTIMIZERS, PRECISIONS
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import draw_windows, enumerate_windows
from ahriuwu_cli.errors import CheckpointError, DataError, Interrupted, TrainingError, UserError
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig, draw_patch_mask
from ahriuwu_cli.training.losses import LPIPS, RunningRMS, load_lpips, reconstruction_loss
from ahriuwu_cli.training.optimiser import apply, build_optimizers, rate, set_rate
from ahriuwu_cli.training.run import cut_log, refuse_used, versions
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.state import (
    load_optimizer_tensors,
    load_state,
    optimizer_tensors,
    save_state,
    under_prefix,
    with_prefix,
)

Progress = Callable[[int, int], None]
SCALE_WINDOWS = 64  # training windows that the spread of latents is measured on


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

    def __post_init__(self) -> None:
        positive = ("steps", "batch", "frames", "log_every", "save_every")
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


def train_transformer_tokenizer(
    store: EpisodeStore,
    config: TokenizerTrainConfig,
    run_dir: Path,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    resume: bool = False,
    *,
    overwrite: bool = False,
    announce: Callable[[str], None] | None = None,
    stop: StopRequest | None = None,
) -> TransformerTokenizer:
    """Train on the train split and return the tokenizer, latents scaled to unit spread, in evaluation mode.

    progress(steps done, steps in all); announce gets sentences for the user (which loss, where it resumes). UserError
    for a used folder or other settings on resume, DataError for data that do not fit, CheckpointError for a damaged
    state, TrainingError on a loss that is not finite, Interrupted (state saved) after a signal that `stop` caught.
    """
    announce = announce or (lambda sentence: None)
    trainer = _Trainer(store, config, run_dir, torch.device(device))
    if resume:
        trainer.load()
        announce(f"resumed {run_dir} after step {trainer.step} of {config.steps}")
    else:
        trainer.start(overwrite)
    announce(f"training on {trainer.loss_name}")
    since, seen = time.monotonic(), 0
    while trainer.step < config.steps:
        metrics = trainer.update()
        seen += 1
        done = trainer.step == config.steps
        stopping = stop is not None and stop.number

        # once in a while: write a line of metrics
        if trainer.step % config.log_every == 0 or done:
            rate_now = seen / max(time.monotonic() - since, 1e-9)  # steps a second
            trainer.log({**metrics, "frames_per_s": round(rate_now * config.batch * config.frames, 1),
                         "eta_s": round((config.steps - trainer.step) / rate_now, 1)})  # fmt: skip
        # once in a while: make the run resumable from here
        if trainer.step % config.save_every == 0 or done or stopping:
            trainer.save()
        if progress is not None:
            progress(trainer.step, config.steps)
        if stopping and not done:
            raise Interrupted(
                f"stopped by signal {stop.number} at step {trainer.step}; the state is saved, go on with --resume",
                stop.number,
            )
    trainer.scale_latents()
    return trainer.model.eval()


class _Trainer:
    """One run: the model, its optimisers and loss normalisers, and how many steps are done."""

    def __init__(self, store: EpisodeStore, config: TokenizerTrainConfig, run_dir: Path, device: torch.device) -> None:
        c = config.architecture
        if (c.height, c.width) != (store.height, store.width):
            raise DataError(
                f"the tokenizer is for frames of {c.height}x{c.width}, {store.path} has {store.height}x{store.width}"
            )
        self.store, self.config, self.run_dir, self.device = store, config, Path(run_dir), device
        self.windows = enumerate_windows(store.lengths("train"), config.frames)  # DataError when there is none
        self.lpips: LPIPS | None = None
        self.loss_name = "MSE only: no LPIPS weights were given"
        if config.lpips_weights is not None:
            self.lpips = load_lpips(Path(config.lpips_weights)).to(device)
            self.loss_name = f"MSE + 0.2 LPIPS ({self.lpips.backbone}, sha256 {self.lpips.sha256[:8]})"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = TransformerTokenizer(c).to(device)
        self.rms = nn.ModuleDict({name: RunningRMS() for name in ("mse", "lpips")}).to(device)
        self.optimizers = build_optimizers(self.model, config)
        self.step = 0

    def start(self, overwrite: bool) -> None:
        """A new run folder with its run.json."""
        refuse_used(self.run_dir, overwrite)
        if self.run_dir.exists():
            shutil.rmtree(self.run_dir)
        self.run_dir.mkdir(parents=True)
        document = {"kind": "tokenizer", **self._facts(), "versions": versions()}
        (self.run_dir / "run.json").write_text(json.dumps(document, indent=1) + "\n")

    def update(self) -> dict:
        """One optimiser step; returns its metrics. TrainingError when loss or gradient is not finite."""
        config = self.config
        lr = config.lr * rate(self.step, config.steps, config)
        set_rate(self.optimizers, lr)
        frames, mask = (x.to(self.device) for x in self._draw())
        frames = frames.float() / 255
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            reconstruction = self.model(frames, mask)
        loss, terms = reconstruction_loss(reconstruction, frames, self.rms["mse"], self.lpips, self.rms["lpips"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise TrainingError(
                f"loss {loss.item()} or gradient norm {norm.item()} is not finite at step {self.step}: try a lower lr "
                f"than {config.lr} or --precision float32; the last saved state is in {self.run_dir / 'state'}"
            )
        apply(self.optimizers)
        self.step += 1
        values = {name: term.item() for name, term in terms.items()}
        values["masked_psnr_db"] = round(-10 * float(np.log10(max(values["mse"], 1e-10))), 3)
        return {"step": self.step, "loss": loss.item(), **values, "grad_norm": norm.item(), "lr": lr}

    def _draw(self) -> tuple[Tensor, Tensor]:
        """uint8 frames (B, T, H, W, 3) and hidden patches (B, T, P) of this step, a function of (seed, step)."""
        c, rng = self.config, np.random.default_rng([self.config.seed, self.step])
        chosen = [self.windows[i] for i in rng.integers(0, len(self.windows), c.batch)]
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        mask = draw_patch_mask(c.batch, c.frames, c.architecture.patches, c.architecture.mask_max, generator)
        return self._read(chosen), mask

    def _read(self, windows: list[tuple[str, int]]) -> Tensor:
        frames = self.config.frames
        return torch.from_numpy(np.stack([self.store.frames(name, at, at + frames) for name, at in windows]))

    def log(self, line: dict) -> None:
        with open(self.run_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def save(self) -> None:
        """Save everything that the next step depends on, in place of the state before."""
        tensors = with_prefix("model", self.model.state_dict()) | with_prefix("rms", self.rms.state_dict())
        document = {"step": self.step, **self._facts(), "optimizers": []}
        for i, optimizer in enumerate(self.optimizers):
            state, description = optimizer_tensors(optimizer)
            tensors |= with_prefix(f"optimizer{i}", state)
            document["optimizers"].append(description)
        save_state(self.run_dir / "state", tensors, document)

    def load(self) -> None:
        """Bring this fresh trainer to the saved state, exactly, and drop later lines of the log."""
        if not (self.run_dir / "state" / "state.json").exists():
            raise UserError(f"{self.run_dir} has no saved tokenizer run to resume: start it without --resume")
        tensors, document = load_state(self.run_dir / "state")
        try:
            self._check_same(document)
            self.model.load_state_dict(under_prefix("model", tensors), strict=True)
            self.rms.load_state_dict(under_prefix("rms", tensors), strict=True)
            for i, optimizer in enumerate(self.optimizers):
                load_optimizer_tensors(optimizer, under_prefix(f"optimizer{i}", tensors), document["optimizers"][i])
            self.step = int(document["step"])
        except (RuntimeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the state in {self.run_dir / 'state'} does not fit this run: {error}") from None
        cut_log(self.run_dir / "metrics.jsonl", self.step)

    def scale_latents(self) -> None:
        """Measure the latents of training windows and scale them to zero mean and unit spread over all channels."""
        count = min(SCALE_WINDOWS, len(self.windows))
        self.model.set_scale(0.0, 1.0)
        self.model.eval()
        drawn = draw_windows(self.store.lengths("train"), self.config.frames, count, self.config.seed)
        latents = torch.cat([self.model.encode(self._read([window])) for window in drawn])  # (windows, T, N, D)
        mean = latents.mean(dim=(0, 1))  # one for every token and channel, one spread for all: dead channels stay quiet
        std = (latents - mean).square().mean().sqrt()
        if not std > 0:
            raise TrainingError("all latents are the same for every frame: train longer, or on video that changes")
        self.model.set_scale(mean, std)

    def _facts(self) -> dict:
        """What must be the same when the run is resumed."""
        return {"config": self.config.to_json(), "dataset": self.store.fingerprint, "loss": self.loss_name}

    def _check_same(self, document: dict) -> None:
        before, now = document.get("config", {}), json.loads(json.dumps(self.config.to_json()))
        free = {"log_every", "save_every"}
        names = [f.name for f in fields(self.config) if f.name not in free]
        changed = [f"{n} {before.get(n)!r} -> {now[n]!r}" for n in names if before.get(n) != now[n]]
        changed += [f"the {n} differs" for n in ("dataset", "loss") if document.get(n) != self._facts()[n]]
        if changed:
            raise UserError(
                f"{self.run_dir} was started with other settings ({'; '.join(changed)}): resume with the same"
            )
