"""The loss of one micro-batch as a module: what goes through it is all that a wrapper of several processes ever sees.

DDP arms its reducer in the wrapper's forward, so the loss is that forward: teacher passes, video and single images lie
inside. A sharded model (FSDP2) gathers weights in every forward and every backward, on all processes together; there
`lockstep` makes their number the same everywhere, with a forward of one frame where a process has no such clips.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ahriuwu_cli.diffusion.objective import Denoise, ShortcutLoss, shortcut_forcing_loss
from ahriuwu_cli.models.dynamics import Past
from ahriuwu_cli.training.batches import Batch
from ahriuwu_cli.training.resampling import resampled


class ClipLoss(nn.Module):
    """Shortcut forcing (eq. 7, 8) on a batch, by a model that is its own teacher."""

    def __init__(
        self,
        model: nn.Module,
        k_max: int,
        ramp: str,
        lockstep: bool = False,
        aim: str = "eq7",
        walk_to: float | None = None,
    ) -> None:
        """walk_to: the tau_ctx that the model itself walks a batch's past to; None where it stands there."""
        super().__init__()
        self.walk_to = walk_to
        self.model, self.k_max, self.ramp, self.lockstep, self.aim = model, k_max, ramp, lockstep, aim

    def forward(self, batch: Batch) -> ShortcutLoss:
        """The loss of this batch, a mean over its frames."""
        if self.walk_to is not None:
            seen = max(1, len(batch.z_clean) - batch.image_rows)  # single images have no past; all processes walk one
            start, *given = Past(*(t[:seen] for t in batch.past)), batch.actions[:seen], batch.known[:seen]
            batch = replace(batch, past=resampled(self.model, start, *given, self.walk_to))
        taught = batch.bootstrap_rows
        if self.lockstep and batch.kinds.bootstrap:
            taught = max(taught, 1)  # a clip at d_min runs along, and keeps its own target
        return shortcut_forcing_loss(
            denoiser(self.model, batch, alike=self.lockstep),
            batch.z_clean,
            batch.noise,
            batch.tau,
            batch.d,
            k_max=self.k_max,
            ramp=self.ramp,
            teacher=lambda rows: denoiser(self.model, batch, rows),
            bootstrap_rows=taught,
            always_teach=self.lockstep,
            aim=self.aim,
        )


def denoiser(model: Callable[..., Tensor], batch: Batch, rows: int | None = None, alike: bool = False) -> Denoise:
    """`denoise(z, tau, d)` for the batch's clips (or its first `rows`), which knows their actions.

    The batch's last `image_rows` clips are seen as T single images each: no past, no action. alike: with a forward for
    every kind of clip that any process has in this micro-batch.
    """
    count = batch.z_clean.shape[0] if rows is None else rows
    video = min(count, batch.z_clean.shape[0] - batch.image_rows)
    passes = max(1, int(batch.kinds.video) + int(batch.kinds.images)) if alike else 0

    def denoise(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
        parts = []
        if video:
            past = Past(*(t[:video] for t in batch.past)) if batch.past else None
            parts.append(model(z[:video], tau[:video], d[:video], batch.actions[:video], batch.known[:video], past))
        if video < count:
            inputs = (z, tau, d, batch.actions, batch.known)
            alone = model(*(t[video:count].flatten(0, 1)[:, None] for t in inputs))
            parts.append(alone.unflatten(0, (count - video, -1))[:, :, 0])
        z_hat = parts[0] if len(parts) == 1 else torch.cat(parts)
        for _ in range(passes - len(parts)):
            frame = model(*(t[:1, :1] for t in (z, tau, d, batch.actions, batch.known)))
            z_hat = z_hat + 0 * frame.sum()  # no part of the loss, but of its backward
        return z_hat

    return denoise
