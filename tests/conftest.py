"""The tiny model and the tiny clip that several tests share. One thread, so that timings and sums are repeatable."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)

SLOTS = (("binary", 2, (), ()), ("discrete", 3, (), ()), ("continuous", 1, (-2.0,), (4.0,)))
TINY = {
    "tokens": 4,
    "latent_dim": 8,
    "width": 32,
    "depth": 4,
    "heads": 4,
    "kv_heads": 4,
    "mlp_hidden": 48,
    "time_every": 2,
    "time_attention": "place",
    "registers": 0,
    "conditioning": "add",
    "linear_skip": True,
    "window": 5,
    "k_max": 8,
    "action_space": SLOTS,
}


@dataclass(frozen=True)
class Clip:
    """B = 2 clips of T = 7 frames: latents and noise (B, T, N, D); tau, d, known (B, T); incoming actions (B, T, A)."""

    z_clean: Tensor
    noise: Tensor
    z_tau: Tensor
    tau: Tensor
    d: Tensor
    actions: Tensor
    known: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What `Dynamics.forward` takes."""
        return self.z_tau, self.tau, self.d, self.actions, self.known


def random_actions(batch: int, frames: int, generator: torch.Generator) -> Tensor:
    """Rows (B, T, 4) of SLOTS: two buttons, one of three choices, one value in -2..4."""
    buttons = torch.randint(0, 2, (batch, frames, 2), generator=generator).float()
    choice = torch.randint(0, 3, (batch, frames, 1), generator=generator).float()
    value = torch.rand(batch, frames, 1, generator=generator) * 6 - 2
    return torch.cat([buttons, choice, value], dim=-1)


def make_clip(batch: int = 2, frames: int = 7, k_max: int = 8, seed: int = 0) -> Clip:
    g = torch.Generator().manual_seed(seed)
    z_clean, noise = torch.randn(2, batch, frames, 4, 8, generator=g)
    d = 2.0 ** -torch.randint(0, k_max.bit_length(), (batch, frames), generator=g)
    tau = d * (torch.floor(torch.rand(batch, frames, generator=g) / d) + 1)
    level = tau[..., None, None]
    known = torch.ones(batch, frames, dtype=torch.bool)
    known[:, 0] = False
    z_tau = (1 - level) * z_clean + level * noise
    return Clip(z_clean, noise, z_tau, tau, d, random_actions(batch, frames, g), known)


@pytest.fixture
def make_dynamics() -> Callable:
    """A tiny Dynamics with fields of TINY changed; its head is as loud as a trained one's, so that nothing hides."""

    def make(*, seed: int = 0, loud: bool = True, **fields):
        from ahriuwu_cli.models.dynamics import Dynamics
        from ahriuwu_cli.models.dynamics_config import DynamicsConfig

        torch.manual_seed(seed)
        model = Dynamics(DynamicsConfig(**{**TINY, **fields})).eval().requires_grad_(False)
        if loud:
            model.head.weight.mul_(10)
            model.channel_scale.copy_(torch.linspace(0.5, 1.5, model.config.latent_dim))
        return model

    return make


@pytest.fixture
def tiny_dynamics(make_dynamics):
    """4 layers of width 32, 4 tokens of 8 channels, window 5, k_max 8, one action component of every kind."""
    return make_dynamics()


@pytest.fixture
def tiny_clip() -> Clip:
    return make_clip()


@pytest.fixture(scope="module")
def start():
    """Starts real processes quickly, see `killing.Nursery`."""
    from killing import Nursery

    with Nursery() as start:
        yield start


@pytest.fixture
def run(capsys):
    """run(words...): (exit code, stdout, stderr) of a command line."""
    from ahriuwu_cli.cli import main

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            raise SystemExit(main([str(a) for a in arguments]))
        shown = capsys.readouterr()
        return stopped.value.code or 0, shown.out, shown.err

    return call


@pytest.fixture
def flushed(tmp_path, monkeypatch) -> list[str]:
    """What is flushed and renamed below tmp_path from now on, in order: "sync NAME" and "NAME -> NAME"."""
    calls, fsync = [], os.fsync

    def plain(path: str | Path) -> str:
        name = "tmp_path" if Path(path) == tmp_path else Path(path).name
        return re.sub(r"\.\d+\.(tmp|old)$", r".N.\1", re.sub(r"^state-[0-9a-f]{16}", "state-HASH", name))

    def noted_fsync(descriptor: int) -> None:
        held = os.fstat(descriptor)
        (path,) = (p for p in (tmp_path, *tmp_path.rglob("*")) if os.path.samestat(p.lstat(), held))
        assert path.is_dir() or held.st_size, f"{path} has nothing in it yet"
        fsync(descriptor)
        calls.append(f"sync {plain(path)}")

    def noted(rename: Callable) -> Callable:
        def call(old, new, **options):
            rename(old, new, **options)
            calls.append(f"{plain(old)} -> {plain(new)}")

        return call

    monkeypatch.setattr(os, "fsync", noted_fsync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    return calls
