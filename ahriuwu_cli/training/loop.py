"""The training loop of the dynamics: latents in, a world out. Readable from top to bottom; the pieces live beside it.

    video -> data -> tokenizer -> latents -> batches (forcing) -> objective (noise, dynamics, target, ramp) -> here

The randomness of a step is a function of (seed, rank, step): a resumed run is the unbroken run, bit for bit on a CPU.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import LatentPack
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.objective import Denoise, ShortcutLoss, shortcut_forcing_loss
from ahriuwu_cli.errors import Interrupted, TrainingError
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.training.batches import Batch, draw_batch, shape_of
from ahriuwu_cli.training.clock import TrainingClock
from ahriuwu_cli.training.optimiser import apply, build_optimizers, rate, set_rate, update_average
from ahriuwu_cli.training.preview import choose_sampler, preview, preview_manifest
from ahriuwu_cli.training.run import Run
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.world import World

Report = Callable[[dict], None]


class DynamicsTrainer:
    """One run: the raw model that learns, the averaged model that is sampled from, and where the run stands."""

    def __init__(self, world: World, pack: LatentPack, store: EpisodeStore, run: Run) -> None:
        self.world, self.pack, self.store, self.run = world, pack, store, run
        self.config = run.config
        self.average: Dynamics = world.dynamics
        self.model = copy.deepcopy(world.dynamics).train().requires_grad_(True)
        self.model.checkpoint_activations = self.config.checkpoint_activations
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        self.optimizers = build_optimizers(self.model, self.config)
        self.step = 0
        self.total = self.config.steps  # None until a time budget has decided it
        self.elapsed = 0.0  # seconds of training (`clock`), over all resumed parts
        self.best: float | None = None  # gain over persistence at the last previewed horizon, dB

    def train(self, report: Report, stop: StopRequest, stop_at: int | None = None) -> World:
        """Train to the end (or to step `stop_at`, for tests) and return the world with its averaged weights.

        Raises TrainingError on a loss or gradient that is not finite, Interrupted after a signal.
        """
        manifest = preview_manifest(self.store, self.config.preview_windows, self.config.seed)
        clock = TrainingClock(
            self.elapsed, lambda s: report(self.run.log({"step": self.step, "stood_still_s": round(s)}))
        )
        log = _Log()
        while self.total is None or self.step < self.total:
            self._decide_total()
            losses, norm, frames = self._update()
            self.step += 1
            self.elapsed = clock.lap()
            log.add(losses, norm, frames)

            # once in a while: write a line of metrics
            if self.step % self.config.log_every == 0 or self.step == self.total:
                report(self.run.log({**log.line(), **self._progress()}))
            # once in a while: imagine held-out windows, keep the best world
            if self._due(self.config.preview_every, 3):
                report(self.run.log({"step": self.step, "preview": self._preview(manifest)}))
            # once in a while: make the run resumable from here
            if self._due(self.config.save_every or self.config.preview_every, 3) or stop.number or self.step == stop_at:
                self.run.save(self)
            if stop.number and self.step != self.total:
                raise Interrupted(
                    f"stopped by signal {stop.number} at step {self.step}; state saved, go on with: {self.run.command} "
                    f"--resume", stop.number
                )  # fmt: skip
            if self.step == stop_at:
                break
            clock.rest()
        return self.world

    def _update(self) -> tuple[list[tuple[Batch, ShortcutLoss]], Tensor, int]:
        """One optimiser step over all micro-batches: (what each gave, gradient norm, frames seen)."""
        set_rate(self.optimizers, self.config.lr * rate(self.step, self.total, self.config))
        results = []
        for micro in range(self.config.accumulate):
            batch = draw_batch(self.pack, self.config, self.world.k_max, self.step, micro, device=self.world.device)
            with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                result = shortcut_forcing_loss(
                    denoiser(self.forward, batch),
                    batch.z_clean,
                    batch.noise,
                    batch.tau,
                    batch.d,
                    k_max=self.world.k_max,
                    ramp=self.config.ramp,
                    teacher=lambda rows, batch=batch: denoiser(self.forward, batch, rows),
                    bootstrap_rows=batch.bootstrap_rows,
                )
            (result.loss / self.config.accumulate).backward()
            results.append((batch, result))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if not torch.isfinite(norm) or not all(torch.isfinite(r.loss) for _, r in results):
            windows = ", ".join(w for b, _ in results for w in b.windows[:4])
            raise TrainingError(
                f"loss or gradient is not finite at step {self.step} (windows {windows}, ...); the last good state is "
                f"{self.run.newest_state() or 'none'}: try a lower --lr or --precision float32"
            )
        apply(self.optimizers)
        update_average(self.average, self.model, self.config.ema, self.step)
        clips, frames = shape_of(self.config, self.step)
        return results, norm, clips * frames * self.config.accumulate

    def _decide_total(self) -> None:
        """With a time budget: when only the decay's share of it is left, fix how many steps there will be."""
        if self.total is None and self.step and self.elapsed >= self.config.budget * (1 - self.config.decay):
            self.total = max(self.step + 1, round(self.step / max(1 - self.config.decay, 1e-3)))

    def _due(self, every: int, times_a_run: int) -> bool:
        """Every `every` steps and at the end; with every = 0 `times_a_run` times in a run of known length."""
        if self.step == self.total:
            return True
        if every:
            return self.step % every == 0
        return self.total is not None and self.step % max(1, -(-self.total // times_a_run)) == 0

    def _preview(self, manifest) -> dict:
        if self.step == self.total:  # at the end: which sampler suits what was learnt
            self.world.generation, result, gains = choose_sampler(self.world, self.store, manifest)
            self.run.log({"step": self.step, "gain_db_by_sampler": gains})
        else:
            result = preview(self.world, self.store, manifest)
        gain = result["gain_db"][max(result["gain_db"], key=int)]
        if self.best is None or gain >= self.best:
            self.best = gain
            self.run.save_world(self.world, "best", self)
        if self.step == self.total:
            self.run.save_world(self.world, "last", self)
        return result

    def _progress(self) -> dict:
        done = self.step / self.total if self.total else self.elapsed / self.config.budget
        return {
            "step": self.step,
            "total_steps": self.total,
            "seconds": round(self.elapsed, 1),
            "eta_s": round(self.elapsed * (1 - done) / done, 1) if done else None,
            "lr": self.config.lr * rate(self.step - 1, self.total, self.config),
        }


def denoiser(model: Callable[..., Tensor], batch: Batch, rows: int | None = None) -> Denoise:
    """`denoise(z, tau, d)` for the batch's clips (or its first `rows`), which knows their actions.

    The batch's last `image_rows` clips are seen as T single images each: no past, no action.
    """
    count = batch.z_clean.shape[0] if rows is None else rows
    video = min(count, batch.z_clean.shape[0] - batch.image_rows)

    def denoise(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        parts = []
        if video:
            parts.append(model(z[:video], tau[:video], d[:video], batch.actions[:video], batch.known[:video]))
        if video < count:
            inputs = (z, tau, d, batch.actions, batch.known)
            alone = model(*(t[video:count].flatten(0, 1)[:, None] for t in inputs))
            parts.append(alone.unflatten(0, (count - video, -1))[:, :, 0])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return denoise


class _Log:
    """Means since the last line: losses, loss by tau bin (0 clean, 1 noise), gradient norm, frames a second."""

    BINS = 10

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, list[float]] = {"loss": [], "flow": [], "bootstrap": [], "grad_norm": []}
        self.bins = torch.zeros(2, self.BINS)
        self.frames, self.since = 0, time.monotonic()

    def add(self, results: list[tuple[Batch, ShortcutLoss]], norm: Tensor, frames: int) -> None:
        for batch, r in results:
            for name, value in (("loss", r.loss), ("flow", r.flow), ("bootstrap", r.bootstrap)):
                if not torch.isnan(value):  # NaN means: no frame of this kind in the batch; the loss itself was checked
                    self.sums[name].append(value.item())
            index = tau_.bin_index(batch.tau.flatten().cpu(), self.BINS)
            self.bins[0].index_add_(0, index, r.per_frame.flatten().float().cpu())
            self.bins[1].index_add_(0, index, torch.ones(len(index)))
        self.sums["grad_norm"].append(norm.item())
        self.frames += frames

    def line(self) -> dict:
        means = {name: round(sum(v) / len(v), 6) if v else None for name, v in self.sums.items()}
        by_tau = [round((s / n).item(), 6) if n else None for s, n in zip(*self.bins, strict=True)]
        seconds = max(time.monotonic() - self.since, 1e-9)
        frames_per_s = round(self.frames / seconds, 1)
        self._clear()
        return {**means, "loss_by_tau_bin": by_tau, "frames_per_s": frames_per_s}
