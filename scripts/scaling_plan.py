"""The tables of docs/scaling.md: what every size costs to train and to roll out, computed from the code as it is.

    python scripts/scaling_plan.py                            # as Markdown
    python scripts/scaling_plan.py --into docs/scaling.md     # in place of the tables that are there

Nothing here is measured: FLOPs and bytes are counted on steps without storage, times follow from a roofline whose
ceilings and shares are the constants below. It takes minutes, no GPU and no dataset.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.models.dynamics import Dynamics, count_parameters
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.training.cards import usable
from ahriuwu_cli.training.shadow import PARTS, Ledger, Shadow, formulas_of

PEAK = 989e12  # FLOP/s, H100 SXM, dense bfloat16, from its data sheet
BANDWIDTH = 3.35e12  # bytes/s of its memory, likewise
TRAINING_SHARE = 0.40  # of PEAK that training reaches: assumed
ROLLOUT_SHARE = 0.40  # of PEAK that the products of a rollout reach: assumed
READING_SHARE = 0.70  # of BANDWIDTH that reading weights and cache reaches: assumed
LAUNCH = 5e-6  # seconds from one kernel to the next, without a graph: assumed
GPUS = 8  # of the sharded run
K = 4  # denoising steps of a frame
BOOTSTRAP = 0.125  # share of clips with two teacher passes
PAPER_FRAMES = 2541 * 3600 * 20  # the paper's video: 2,541 hours at 20 frames a second
MEASURED_READER = 14_300 * 16 * 16 * 32 * 2  # bytes/s: 14,300 cold windows of 16 frames of 16 x 32 (performance.md)
LARGE = 5e7  # parameters; below, launches decide how fast a GPU is, and a roofline says nothing
TRACED = (8, 16)  # clips
MARK = "<!-- made by scripts/scaling_plan.py, everything below this line -->"
ROWS = [(size, 16, 64) for size in SIZES] + [("large", 256, 32), ("xlarge", 256, 32)]
STATIC = [PARTS.index(part) for part in ("weights", "averaged", "optimizer", "gradients")]


class Launches(Ledger):
    """A ledger that also counts kernels: operations that are more than another view of the same bytes."""

    kernels = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.kernels += func.namespace == "aten" and not func.is_view
        return super().__torch_dispatch__(func, types, args, kwargs)


@dataclass
class Counted:
    """What one size costs, counted: FLOPs a frame, and bytes after every operation at two numbers of clips."""

    name: str
    parameters: int
    frames: int
    forward: float  # FLOPs a frame
    backward: dict[bool, float]  # by whether activations are checkpointed
    update: float  # FLOPs of the optimiser, a step
    owned: dict[str, int]  # bytes by part
    kept: dict[bool, float]  # bytes a clip leaves for its backward pass
    lines: dict[bool, tuple[np.ndarray, np.ndarray]]
    update_lines: np.ndarray
    block: int  # bytes of the weights of a block
    rollout: float  # FLOPs a frame
    kernels: int  # launched for a frame of a rollout
    cache: int  # bytes of keys and values in 16 bits
    latents: int  # bytes of a frame in 16 bits

    @property
    def trained(self) -> float:
        """FLOPs of training on a frame, teacher included, without the optimiser."""
        return self.forward * (1 + 2 * BOOTSTRAP) + self.backward[False]

    def peak(self, clips: int, again: bool, shares: int = 1) -> float:
        """Bytes of a step on one GPU, with weights, their average, gradients and state in so many shares."""
        few, many = self.lines[again]
        rest = [np.delete(x, STATIC, axis=1).sum(1) for x in (few, many)]
        grown = rest[1] + (rest[1] - rest[0]) * (clips - TRACED[1]) / (TRACED[1] - TRACED[0])
        passes = (many[:, STATIC].sum(1) / shares + grown).max()
        update = self.update_lines
        temporaries = update[:, PARTS.index("temporaries")]
        updating = (update[:, STATIC].sum(1) / shares + temporaries).max()
        gathered = 2 * self.block * (shares > 1)  # the block at work and the one that comes next
        return max(passes, updating) + gathered

    def fits(self, again: bool, shares: int = 1) -> int:
        """The most clips on a card of 80 GB."""
        fewer, more = 0, 4097  # fits, does not or is more than anybody asks for
        while more - fewer > 1:
            clips = (fewer + more) // 2
            fewer, more = (clips, more) if self.peak(clips, again, shares) <= usable(80) else (fewer, clips)
        return fewer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, help="A Markdown file whose tables are replaced.")
    into = parser.parse_args().into
    rows = [count(*row) for row in ROWS]
    large = [r for r in rows if r.parameters > LARGE]
    text = "\n\n".join([cost_table(rows), memory_table(rows), rollout_table(rows), run_table(large)]) + "\n"
    if into is None:
        print(text)
        return
    before, mark, _ = into.read_text().partition(MARK)
    if not mark:
        raise SystemExit(f"{into} has no line {MARK!r} to write behind")
    into.write_text(f"{before}{MARK}\n\n{text}")


def count(size: str, tokens: int, latent_dim: int) -> Counted:
    """Trace a size with so many latent tokens of so many channels a frame."""
    c = DynamicsConfig(tokens=tokens, latent_dim=latent_dim, action_space=(("binary", 8, (), ()),), **SIZES[size])
    frames = min(c.window, 64)
    config = TrainConfig(size=size, frames=frames, precision="bfloat16", bootstrap_share=0.0)
    shadow = Shadow(config, c, "cuda")
    owned = {part: shadow.ledger.totals[part] for part in ("weights", "averaged", "optimizer")}
    passes = {again: [shadow.passes(clips, frames, again) for clips in TRACED] for again in (False, True)}
    update = shadow.update()
    seen = TRACED[1] * frames
    with torch.device("meta"):
        model = Dynamics(c)
    flops, launched, cache = rollout_cost(c)
    return Counted(
        name=f"{size}, {tokens} x {latent_dim}",
        parameters=count_parameters(model),
        frames=frames,
        forward=passes[False][1].flops["forward"] / seen,
        backward={again: p[1].flops["backward"] / seen for again, p in passes.items()},
        update=update.flops["optimizer"],
        owned=owned,
        kept={again: p[1].kept / TRACED[1] for again, p in passes.items()},
        lines={again: (p[0].bytes, p[1].bytes) for again, p in passes.items()},
        update_lines=update.bytes,
        block=4 * count_parameters(model.blocks[0]),
        rollout=flops,
        kernels=launched,
        cache=cache,
        latents=2 * tokens * latent_dim,
    )


@torch.no_grad()
def rollout_cost(c: DynamicsConfig) -> tuple[float, int, int]:
    """Of one frame at K steps behind a full window: FLOPs and kernels; bytes of one rollout's cache in 16 bits."""
    ledger = Launches(fused=True)
    with ledger.fake:
        model = Dynamics(c)
        cache = model.new_cache(1)
        z = torch.empty(1, 2, c.tokens, c.latent_dim)
    cache.frames = 2 * c.window
    tau, d, actions, known = torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2, 8), torch.ones(1, 2).bool()
    with ledger, formulas_of("cuda"):
        model.extend(z, tau, d, actions, known, cache, keep=1, unread=1)  # the commit rides with the first step
        for _ in range(K - 1):
            model.extend(*(x[:, :1] for x in (z, tau, d, actions, known)), cache, keep=0)
    return sum(ledger.flops.values()), ledger.kernels, 2 * (cache.keys.numel() + cache.values.numel())


def cost_table(rows: list[Counted]) -> str:
    head = ["size, tokens x channels", "parameters", "T", "forward, GFLOP a frame", "training, GFLOP a frame",
            "with activations again", "Muon, GFLOP a step"]  # fmt: skip
    body = []
    for r in rows:
        again = r.trained + r.backward[True] - r.backward[False]
        counts = (_digits(n / 1e9) for n in (r.forward, r.trained, again, r.update))
        body.append([r.name, f"{r.parameters / 1e6:,.1f}M", str(r.frames), *counts])
    return "## FLOPs (computed)\n\n" + _table(head, body)


def memory_table(rows: list[Counted]) -> str:
    head = ["size, tokens x channels", "weights", "average", "gradients", "Muon's state", "kept a clip", "kept, again",
            "1 GPU or DDP: 8 clips", "again", f"FSDP2 over {GPUS}: 8 clips each", "again",
            "clips on 80 GB, 1 GPU / FSDP2", "again"]  # fmt: skip
    body = []
    for r in rows:
        o = r.owned
        line = [r.name, o["weights"], o["averaged"], o["weights"], o["optimizer"], r.kept[False], r.kept[True]]
        line += [r.peak(8, again, shares) for shares in (1, GPUS) for again in (False, True)]
        cells = [line[0], *(_digits(x / 1e9) for x in line[1:])]
        cells += [f"{_clips(r.fits(again))} / {_clips(r.fits(again, GPUS))}" for again in (False, True)]
        body.append(cells)
    return "## Memory of a training step, GB (computed)\n\n" + _table(head, body)


def rollout_table(rows: list[Counted]) -> str:
    head = ["size, tokens x channels", "weights, 16 bits, GB", "cache at its window, GB", f"read a frame, K = {K}, GB",
            "of it the cache", "GFLOP a frame", "ms by reading", "ms by FLOPs", "ms by launches", "frames/s, eager",
            "frames/s, launches hidden", "cache read at that rate, GB/s"]  # fmt: skip
    body = []
    for r in rows:
        weights = 2 * r.parameters
        read = K * (weights + r.cache)
        seconds = [read / (BANDWIDTH * READING_SHARE), r.rollout / (PEAK * ROLLOUT_SHARE), r.kernels * LAUNCH]
        eager, graph = 1 / max(seconds), 1 / max(seconds[:2])
        body.append(
            [r.name, *(_digits(x / 1e9) for x in (weights, r.cache, read)), f"{r.cache * K / read:.0%}",
             _digits(r.rollout / 1e9), *(_digits(1e3 * s) for s in seconds), _digits(eager),
             _digits(graph) if r.parameters > LARGE else "-", _digits(K * r.cache * graph / 1e9)]
        )  # fmt: skip
    return "## One rollout on an H100 (computed)\n\n" + _table(head, body)


def run_table(rows: list[Counted]) -> str:
    head = ["size, tokens x channels", "training frames/s, 1 GPU", "windows/s", "latents, MB/s", f"{GPUS} GPUs, MB/s",
            "share of the reader (measured)", "GPU-days a pass over the paper's video", "again, GPU-days"]  # fmt: skip
    body = []
    for r in rows:
        rate = PEAK * TRAINING_SHARE / r.trained
        slower = 1 + (r.backward[True] - r.backward[False]) / r.trained
        days = PAPER_FRAMES / rate / 86400
        eats = rate * r.latents
        rates = (rate, rate / r.frames, eats / 1e6, GPUS * eats / 1e6)
        share = f"{GPUS * eats / MEASURED_READER:.0%}"
        body.append([r.name, *map(_digits, rates), share, _digits(days), _digits(days * slower)])
    return "## Training on H100s (computed, beside the measured reader)\n\n" + _table(head, body)


def _table(head: list[str], body: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *body])


def _digits(x: float) -> str:
    """Three digits, and no powers of ten."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _clips(n: int) -> str:
    return f"{n}+" if n >= 4096 else str(n) if n else "none"


if __name__ == "__main__":
    main()
