"""The training loop of the dynamics: latents in, a world out. Readable from top to bottom; the pieces live beside it.

    video -> data -> tokenizer -> latents -> batches (forcing) -> objective (noise, dynamics, target, ramp) -> here

The randomness of a step is a function of (seed, step, clip): a resumed run is the unbroken run, bit for bit on a CPU,
and a run on several processes is the run on one, up to rounding.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import LatentPack
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.objective import ShortcutLoss
from ahriuwu_cli.errors import Interrupted, TrainingError
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.training.batches import Batch, draw_batch, shape_of, trained_sizes
from ahriuwu_cli.training.clip_loss import ClipLoss
from ahriuwu_cli.training.clock import SHORTEST, TrainingClock, Watch
from ahriuwu_cli.training.distributed import Group
from ahriuwu_cli.training.finite import not_finite
from ahriuwu_cli.training.optimiser import apply, build_optimizers, rate, set_rate, update_average
from ahriuwu_cli.training.preview import choose_sampler, preview, preview_manifest, stands_still
from ahriuwu_cli.training.run import Run
from ahriuwu_cli.training.sharding import gathered, keeping_apart, shard, synchronised, whole
from ahriuwu_cli.training.signals import StopRequest
from ahriuwu_cli.training.states import SAVE_SECONDS
from ahriuwu_cli.world import World

Report = Callable[[dict], None]
PREVIEWS = 3  # of a run, unless it says how often
WARM = 3  # steps of a process that say nothing of its speed
DEAD = (
    "held-out rollouts are as they were at the preview before, and worse than the last frame repeated: the network "
    "learns nothing; begin anew with a smaller --lr, or --adamw-lr-scale"
)


class DynamicsTrainer:
    """One run: the raw model that learns, the averaged model that is sampled from, and where the run stands.

    With several processes (`group`) all do the same steps, and the lead alone writes, reports and previews. A sharded
    model has a sharded average, so no step exchanges it; the lead's world is filled from it when it is looked at.
    """

    def __init__(
        self, world: World, pack: LatentPack, store: EpisodeStore, run: Run, group: Group | None = None
    ) -> None:
        self.world, self.pack, self.store, self.run = world, pack, store, run
        self.config, self.group = run.config, group or Group(world.device)
        self.average: Dynamics = world.dynamics
        self.model = copy.deepcopy(world.dynamics).train()
        self.model.let_train()
        self.model.checkpoint_activations = self.config.checkpoint_activations
        if self.group.sharded:
            self.model = shard(self.model, self.group)
            self.average = shard(copy.deepcopy(world.dynamics), self.group)
            if not self.group.leads:
                world.dynamics.to("meta")  # never looked at here
        if self.config.compile:
            self.model.compile_blocks()
        loss = ClipLoss(
            self.model,
            world.k_max,
            self.config.ramp,
            self.group.sharded,
            self.config.bootstrap_target,
            self.config.walk_to,
        )
        self.loss = synchronised(loss, self.group)
        self.optimizers = build_optimizers(self.model, self.config, self.config.muon_momentum)
        self.now = time.monotonic  # what a time budget counts; a study of equal work gives time.process_time
        self.step = 0
        self.total = self.config.steps  # None until a time budget has decided it
        self.finished = False  # the last preview is done as well
        self.warm: tuple[int, float] | None = None  # (step, elapsed) behind this process's first steps, which are slow
        self.elapsed = 0.0  # seconds of training (`clock`), over all resumed parts
        self.looked = self.looking = 0.0  # seconds of this process's last preview, and of all since `warm`
        self.crossed = False  # the step before came over a third of a time budget
        self.log = _Log(world.k_max)
        self.seen: dict | None = None  # the preview before, of this process
        self.best: float | None = None  # gain over persistence at the last previewed horizon, dB

    def train(self, report: Report, stop: StopRequest, stop_at: int | None = None) -> World:
        """Train to the end (or to step `stop_at`, for tests) and return the world with its averaged weights.

        Raises TrainingError on a loss or gradient that is not finite or a disk that is full, DataError where the data
        went away under the run, Interrupted after a signal; in the last preview, and while the first step is compiled,
        one ends the program where it stands.
        The run's folder is free for others afterwards.
        """
        if not self.config.compile:  # which takes longer than a cluster waits, with no step to save meanwhile
            stop.wait_for_step(self.run.asked_twice)
        with self.run.training(), Watch() as watch:
            self._train(report, stop, stop_at, watch)
        return self.world

    def _train(self, report: Report, stop: StopRequest, stop_at: int | None, watch: Watch) -> None:
        manifest = preview_manifest(self.store, self.config.preview_windows, self.config.seed)
        stood = watch.taken if self.now is time.monotonic else lambda: 0.0  # CPU seconds stand still by themselves
        clock = TrainingClock(
            lambda s: report(self.run.log({"step": self.step, "stood_still_s": round(s)})), self.now, stood
        )
        saved_at, taken, third = self.elapsed, 0, self._third()
        report = report if self.group.leads else lambda line: None
        while self.total is None or self.step < self.total:
            if self._decide_total():
                self.run.save(self)  # the schedule is part of the run: no step is taken on one that a kill could undo
            began = time.monotonic()
            losses, norm, frames = self._update()
            self.log.add(losses, norm, frames)  # waits for a GPU
            self.log.seconds += time.monotonic() - began
            self.step += 1
            stop.wait_for_step(self.run.asked_twice)
            _, signal = self._agree(clock, stop, report)
            before, third = third, self._third()
            self.crossed = third > before
            taken += 1
            if taken == WARM:
                self.warm, self.looking = (self.step, self.elapsed), 0.0

            # once in a while: write a line of metrics
            if self.step % self.config.log_every == 0 or self.step == self.total:
                report(self.run.log({**self.log.line(self.group), **self._progress()}))
            # once in a while: imagine held-out windows, keep the best world
            if self.step != self.total and self._due(self.config.preview_every):
                self._preview(manifest, report)
                self.looked, later = self._agree(clock, stop, report)  # a preview takes its time
                self.looking += self.looked
                signal = signal or later
            # once in a while: make the run resumable from here
            due = self._due(self.config.save_every or self.config.preview_every)
            if due or signal or self.step == stop_at or self.elapsed - saved_at > SAVE_SECONDS:
                self.run.save(self)
                saved_at = self.elapsed
            self._end_if(signal)
            if self.step == stop_at:
                break
        # at the end: choose a sampler, write the worlds (anew where they were lost)
        if self.step == self.total and (not self.finished or self.group.sum(torch.tensor(len(self.run.lacking)))):
            self._end_if(self.group.agree(0.0, stop.number)[1])  # it came while the state was saved
            stop.end_at_once(f"all {self.step} steps are done and saved, the worlds come of: {self.run.again}")
            self._preview(manifest, report)
            self.finished = True
            self.run.save(self)
        if self.finished:
            stop.end_at_once(f"{self.run.folder} is complete")

    def _agree(self, clock: TrainingClock, stop: StopRequest, report: Report) -> tuple[float, int]:
        """Count a lap: (its seconds, the number of a signal or 0), the same on every process.

        Where one stood still the others waited, and only its own clock knows: the fewest seconds are what all trained.
        """
        mine = clock.lap()
        seconds, signal = self.group.agree(mine, stop.number)
        self.elapsed += seconds
        if mine - seconds > SHORTEST:
            report(self.run.log({"step": self.step, "stood_still_s": round(mine - seconds)}))
        return seconds, signal

    def _third(self) -> int:
        """How many parts of a time budget are over: at each one's end there is a preview, at the last the run ends."""
        budget = self.config.budget
        return min(PREVIEWS - 1, int(PREVIEWS * self.elapsed / budget)) if budget else 0

    def _end_if(self, signal: int) -> None:
        """Interrupted where a signal came and the state is saved."""
        if signal:
            self.group.wait()  # none ends before the state is written
            raise Interrupted(
                f"stopped by signal {signal} at step {self.step}; state saved, go on with: {self.run.again}", signal
            )

    def _update(self) -> tuple[list[tuple[Batch, ShortcutLoss]], Tensor, int]:
        """One optimiser step over all micro-batches: (what each gave, gradient norm, frames seen)."""
        lr = self.config.lr * rate(self.step, self.total, self.config)
        set_rate(self.optimizers, lr, self.config.adamw_lr_scale)
        results, group = [], self.group
        for micro in range(self.config.accumulate):
            batch = draw_batch(
                self.pack, self.config, self.world.k_max, self.step, micro, group.rank, group.world, group.device
            )
            autocast = torch.autocast(group.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")
            with keeping_apart(self.loss, micro + 1 < self.config.accumulate):
                with autocast:
                    result = self.loss(batch)
                (result.loss / self.config.accumulate).backward()
            results.append((batch, result))
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip))
        broken = not all(torch.isfinite(r.loss) for _, r in results)
        if broken or not torch.isfinite(norm):
            windows = [window for batch, _ in results for window in batch.windows]
            what = f"loss {', '.join(f'{r.loss.item():.4g}' for _, r in results)}, gradient norm {norm.item():.4g}"
            error = not_finite(what, self.step, windows, self.run.states, self.config.precision)
            if torch.isfinite(norm):
                raise error
            group.end_where(broken, error)  # gradients are averaged: all are here
        apply(self.optimizers)
        update_average(self.average, self.model, self.config.ema, self.step)
        clips, frames = shape_of(self.config, self.step)
        return results, norm, clips * frames

    def _decide_total(self) -> bool:
        """With a time budget: when only the decay's share of it is left, fix how many steps there will be, once.

        Not before a tenth of it is over, whatever the decay, and by the speed that came after this process's first
        steps, which wait for a compiler and for memory: they would promise too few.
        """
        budget = self.config.budget
        if self.total is not None or not 0 < self.elapsed >= budget * self.config.open_share:
            return False
        first, began = self.warm or (self.step, self.elapsed)
        steps, seconds = self.step - first, self.elapsed - began - self.looking
        if not steps and self.elapsed < budget:
            return False
        left, every = budget - self.elapsed, self.config.preview_every
        each = max(seconds, 1e-9) / steps + (self.looked / every if every else 0) if steps else math.inf
        if not every:  # the previews that are still to come are as long as the last one
            left -= self.looked * (PREVIEWS - 1 - self._third())
        self.total = self.step + max(1, round(left / each))
        return True

    def _due(self, every: int) -> bool:
        """Every `every` steps and at the end; with every = 0 PREVIEWS times a run, of its steps or of its budget."""
        if self.step == self.total:
            return True
        if every:
            return self.step % every == 0
        return self.crossed if self.config.budget else self.step % -(-self.total // PREVIEWS) == 0

    def _preview(self, manifest, report: Report) -> None:
        """The lead looks, logs and reports; the other processes wait for it."""
        if self.average is not self.world.dynamics:
            tensors = gathered(self.average.state_dict(), keep=self.group.leads)
            if self.group.leads:
                self.world.dynamics.to(self.group.device).load_state_dict(tensors, strict=True)
        result = self._look(manifest) if self.group.leads else None
        if self.group.sharded:
            self.world.dynamics.to("cpu" if self.group.leads else "meta")
        self.group.wait()
        report(self.run.log({"step": self.step, "preview": result}))
        if self.group.leads and stands_still(self.seen, result):
            report({"step": self.step, "warning": DEAD})
        self.seen = result

    def _look(self, manifest) -> dict:
        self.world.trained_d = trained_sizes(self.config, self.world.k_max, self.step)
        try:
            if self.step == self.total:  # at the end: which sampler suits what was learnt
                self.world.generation, result, gains = choose_sampler(self.world, self.store, manifest)
                self.run.log({"step": self.step, "gain_db_by_sampler": gains})
            else:
                result = preview(self.world, self.store, manifest)
        except TrainingError as error:
            raise TrainingError(f"after step {self.step} {error}; {self.run.where_it_stands()}") from None
        gain = result["gain_db"][max(result["gain_db"], key=int)]
        if self.best is None or gain >= self.best:
            self.best = gain
            self.run.save_world(self.world, "best", self, gain)
        if self.step == self.total:
            self.run.save_world(self.world, "last", self, gain)
        return result

    def _progress(self) -> dict:
        done = self.step / self.total if self.total else self.elapsed / self.config.budget
        return {
            "step": self.step,
            "total_steps": self.total,
            "seconds": round(self.elapsed, 1),
            "eta_s": max(0.0, round(self.elapsed * (1 - done) / done, 1)) if done else None,
            "lr": self.config.lr * rate(self.step - 1, self.total, self.config),
        }


class _Log:
    """Means since the last line: losses, loss by tau bin (0 clean, 1 noise), gradient norm, frames a second.

    Sums and counts are of this process; `line` adds up those of all.
    """

    BINS = 10
    TERMS = ("loss", "flow", "bootstrap")
    shape = (2, len(TERMS) + BINS)  # of `unfinished`: sums, counts

    def __init__(self, k_max: int) -> None:
        self.k_max = k_max
        self._clear()

    def _clear(self) -> None:
        self.terms = torch.zeros(2, len(self.TERMS), dtype=torch.float64)  # sums, counts
        self.bins = torch.zeros(2, self.BINS, dtype=torch.float64)
        self.norms: list[float] = []
        self.frames, self.seconds = 0, 0.0  # of steps alone

    def add(self, results: list[tuple[Batch, ShortcutLoss]], norm: Tensor, frames: int) -> None:
        for batch, r in results:
            big = int((batch.d > 1 / self.k_max).sum())
            counts = torch.tensor([1, batch.d.numel() - big, big])  # shares of a step are alike: their losses weigh 1
            means = torch.stack([r.loss.detach(), r.flow, r.bootstrap]).cpu().double()
            means = means.where(counts > 0, 0)  # no frame of this kind: its mean is NaN
            self.terms += torch.stack([means * counts, counts])
            index = tau_.bin_index(batch.tau.flatten().cpu(), self.BINS)
            self.bins[0].index_add_(0, index, r.per_frame.flatten().double().cpu())
            self.bins[1].index_add_(0, index, torch.ones(len(index), dtype=torch.float64))
        self.norms.append(norm.item())
        self.frames += frames

    def unfinished(self, group: Group) -> tuple[Tensor, list[float]]:
        """What the next line already has: sums and counts over all processes, and the norms of its steps."""
        return group.sum(torch.cat([self.terms, self.bins], dim=1)), self.norms

    @staticmethod
    def holds(sums: Tensor) -> bool:
        """Whether these can be sums of squares and counts of them, so that the means of a line are numbers."""
        return bool((sums >= 0).all() and (sums[1] == sums[1].round()).all())

    def go_on(self, sums: Tensor, norms: list[float], shares: int, before: int) -> None:
        """Take up what `unfinished` gave: a line's means are over the same steps, whatever stopped the run between.

        shares: of a step, by micro-batches and processes, now and before. Each of their losses has counted 1.
        """
        self.terms, self.bins = (part.clone() for part in sums.split([len(self.TERMS), self.BINS], dim=1))
        if shares != before:
            total, count = self.terms[:, 0]
            self.terms[:, 0] = torch.stack([total * shares / before, (count / before).round() * shares])
        self.norms = list(norms)

    def line(self, group: Group) -> dict:
        terms, bins = group.sum(torch.cat([self.terms, self.bins], dim=1)).split([len(self.TERMS), self.BINS], dim=1)
        means, by_tau = (
            [round((s / n).item(), 6) if n else None for s, n in zip(*t, strict=True)] for t in (terms, bins)
        )
        line = {
            **dict(zip(self.TERMS, means, strict=True)),
            "grad_norm": round(sum(self.norms) / len(self.norms), 6),
            "loss_by_tau_bin": by_tau,
            "frames_per_s": round(self.frames / max(self.seconds, 1e-9), 1),
        }
        self._clear()
        return line
