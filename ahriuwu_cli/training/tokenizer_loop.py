"""The training loop of the transformer tokenizer: video in, a tokenizer with scaled latents out.

    windows of frames -> hidden patches -> reconstruction -> MSE + 0.2 LPIPS, each over its running RMS -> optimiser

The randomness of a step (windows, masks) is a function of (seed, step): a resumed run is the unbroken run, bit for bit
on a CPU. The run folder is that of any run: see `run_folder`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import draw_windows, enumerate_windows
from ahriuwu_cli.errors import DataError, Interrupted, TrainingError
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, draw_patch_mask
from ahriuwu_cli.training.asked import Asked, agrees
from ahriuwu_cli.training.checkpoint import is_sound_tokenizer
from ahriuwu_cli.training.distributed import machine, machine_changes
from ahriuwu_cli.training.finite import not_finite
from ahriuwu_cli.training.losses import LPIPS, RunningRMS, load_lpips, reconstruction_loss
from ahriuwu_cli.training.optimiser import apply, build_optimizers, rate, set_rate
from ahriuwu_cli.training.run_folder import RunFolder, goes_on
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.state import load_optimizer_tensors, optimizer_tensors, under_prefix, with_prefix
from ahriuwu_cli.training.state_check import Expected, held, not_negative
from ahriuwu_cli.training.states import SAVE_SECONDS
from ahriuwu_cli.training.tokenizer_config import TokenizerTrainConfig

Progress = Callable[[int, int], None]
FREE = ("log_every", "save_every", "keep")  # settings that going on may change
SCALE_WINDOWS = 64  # training windows that the spread of latents is measured on


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
    command: str = "train tokenizer",
    keep: Callable[[TransformerTokenizer, bool], None] | None = None,
) -> TransformerTokenizer:
    """Train on the train split and return the tokenizer, latents scaled to unit spread, in evaluation mode.

    keep gets it while the run's folder still is this run's alone, to write it there, and whether it is there already.

    It goes on with the same run where that is in run_dir already; resume insists on it. progress(steps done, steps in
    all); announce gets sentences for the user (which loss, where it goes on). UserError for a used folder or other
    settings, DataError for data that do not fit, CheckpointError when all states are damaged, TrainingError on a loss
    that is not finite or a full disk, Interrupted (state saved) after a signal that `stop` caught.
    """
    announce, stop = announce or (lambda sentence: None), stop or StopRequest()
    trainer = _Trainer(store, config, Path(run_dir), torch.device(device), command)
    with trainer.run.training():
        trainer.begin(resume, overwrite, announce)
        announce(f"training on {trainer.loss_name}")
        stop.wait_for_step(trainer.run.asked_twice)
        _train(trainer, stop, progress)
        stop.end_at_once(f"all {trainer.step} steps are done and saved, the tokenizer comes of: {trainer.run.again}")
        trainer.scale_latents()
        trainer.model.eval()
        if keep is not None:
            with trainer.run.writing():
                keep(trainer.model, trainer.run.has_made(trainer.run.folder / "tokenizer"))
    return trainer.model


def _train(trainer: _Trainer, stop: StopRequest, progress: Progress | None) -> None:
    config, run = trainer.config, trainer.run
    since = saved_at = time.monotonic()
    seen = 0
    while trainer.step < config.steps:
        metrics = trainer.update()
        seen += 1
        done = trainer.step == config.steps
        signal, now = stop.number, time.monotonic()

        # once in a while: write a line of metrics
        if trainer.step % config.log_every == 0 or done:
            rate_now = seen / max(now - since, 1e-9)  # steps a second
            run.log({**metrics, "frames_per_s": round(rate_now * config.batch * config.frames, 1),
                     "eta_s": round((config.steps - trainer.step) / rate_now, 1)})  # fmt: skip
        # once in a while: make the run resumable from here
        if trainer.step % config.save_every == 0 or done or signal or now - saved_at > SAVE_SECONDS:
            trainer.save()
            saved_at = now
        if progress is not None:
            progress(trainer.step, config.steps)
        if signal and not done:
            raise Interrupted(
                f"stopped by signal {signal} at step {trainer.step}; state saved, go on with: {run.again}", signal
            )


class _TokenizerRun(RunFolder):
    """What comes of it lies in tokenizer/."""

    needed = ("total", "optimizers")
    product = "tokenizer"

    def lost(self, document: dict[str, Any]) -> list[str]:
        due = document["step"] == document.get("total")
        return ["tokenizer"] if due and not self.has_made(self.folder / "tokenizer") else []

    def has_made(self, folder: Path) -> bool:
        """Whether a tokenizer is there whole, and of this run: by what it states. An older version's states less."""
        if not is_sound_tokenizer(folder):
            return False
        document = read_object(folder / "config.json")
        asked = self.asked["config"] | self.asked["facts"] | {"kind": TransformerTokenizer.kind}
        made = {"architecture": document["architecture"], "kind": document["tokenizer"]}
        return agrees(asked, document["facts"], FREE, **made)


class _Trainer:
    """One run: the model, its optimisers and loss normalisers, and how many steps are done."""

    def __init__(
        self, store: EpisodeStore, config: TokenizerTrainConfig, run_dir: Path, device: torch.device, command: str
    ) -> None:
        c = config.architecture
        if (c.height, c.width) != (store.height, store.width):
            raise DataError(
                f"the tokenizer is for frames of {c.height}x{c.width}, {store.path} has {store.height}x{store.width}"
            )
        self.store, self.config, self.device = store, config, device
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
        self.run = _TokenizerRun(run_dir, tokenizer_asked(store, config, self.loss_name), command, config.keep, FREE)

    def begin(self, resume: bool, overwrite: bool, announce: Callable[[str], None]) -> None:
        """Open the run folder: a new one, or the same run at its newest state, exactly."""
        if not goes_on(self.run.folder, self.run.asked, FREE, resume, overwrite):
            return self.run.begin(overwrite, announce)
        found = self.run.go_on(announce, self.expected())
        if found is not None:
            self.restore(*found[1:])
            changed = machine_changes(found[2], machine(self.device, self.config.precision))
            if changed and self.step < self.config.steps:
                announce(f"resuming with {' and '.join(changed)}: steps stay the same up to rounding")
        announce(self.run.found)

    def update(self) -> dict:
        """One optimiser step; returns its metrics. TrainingError when loss or gradient is not finite."""
        config = self.config
        lr = config.lr * rate(self.step, config.steps, config)
        set_rate(self.optimizers, lr)
        windows, mask = self._draw()
        frames, mask = self._read(windows).to(self.device), mask.to(self.device)
        frames = frames.float() / 255
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            reconstruction = self.model(frames, mask)
        loss, terms = reconstruction_loss(reconstruction, frames, self.rms["mse"], self.lpips, self.rms["lpips"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            what = f"loss {loss.item():.4g}, gradient norm {norm.item():.4g}"
            raise not_finite(what, self.step, [f"{name}:{at}" for name, at in windows], self.run.states)
        apply(self.optimizers)
        self.step += 1
        values = {name: term.item() for name, term in terms.items()}
        values["masked_psnr_db"] = round(-10 * float(np.log10(max(values["mse"], 1e-10))), 3)
        return {"step": self.step, "loss": loss.item(), **values, "grad_norm": norm.item(), "lr": lr}

    def _draw(self) -> tuple[list[tuple[str, int]], Tensor]:
        """Windows (episode, first frame) and hidden patches (B, T, P) of this step, a function of (seed, step)."""
        c, rng = self.config, np.random.default_rng([self.config.seed, self.step])
        chosen = [self.windows[i] for i in rng.integers(0, len(self.windows), c.batch)]
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        mask = draw_patch_mask(c.batch, c.frames, c.architecture.patches, c.architecture.mask_max, generator)
        return chosen, mask

    def _read(self, windows: list[tuple[str, int]]) -> Tensor:
        """uint8 frames (B, T, H, W, 3)."""
        frames = self.config.frames
        return torch.from_numpy(np.stack([self.store.frames(name, at, at + frames) for name, at in windows]))

    def save(self) -> None:
        """Save everything that the next step depends on."""
        tensors = with_prefix("model", self.model.state_dict()) | with_prefix("rms", self.rms.state_dict())
        document = {"step": self.step, "total": self.config.steps, "optimizers": []}
        document |= machine(self.device, self.config.precision)
        for i, optimizer in enumerate(self.optimizers):
            state, description = optimizer_tensors(optimizer)
            tensors |= with_prefix(f"optimizer{i}", state)
            document["optimizers"].append(description)
        self.run.save_state(self.step, tensors, document)

    def expected(self) -> Expected:
        """What `save` would write, but for its numbers."""
        tensors = held("model", self.model.state_dict()) | held("rms", self.rms.state_dict(), not_negative)
        return Expected(tensors, self.optimizers)

    def restore(self, tensors: dict[str, Tensor], document: dict) -> None:
        """Bring this fresh trainer exactly to a saved state, which was held to what is expected of it."""
        self.model.load_state_dict(under_prefix("model", tensors), strict=True)
        self.rms.load_state_dict(under_prefix("rms", tensors), strict=True)
        for i, optimizer in enumerate(self.optimizers):
            load_optimizer_tensors(optimizer, under_prefix(f"optimizer{i}", tensors), document["optimizers"][i])
        self.step = document["step"]

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


def tokenizer_asked(store: EpisodeStore, config: TokenizerTrainConfig, loss: str) -> Asked:
    """What must be the same when a run is gone on with."""
    facts = {"dataset": store.name, "dataset_fingerprint": store.fingerprint, "loss": loss}
    return {"kind": "tokenizer", "config": config.to_json(), "facts": facts}
