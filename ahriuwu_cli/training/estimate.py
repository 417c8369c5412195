"""What a training run will need, before it starts: parameters, FLOPs of a step, and the peak of its memory by part.

Counted on a step without storage (`shadow`), so it follows the code. Outside of the forecast: what the allocator loses
between tensors, scratch inside kernels, the CUDA context, the process itself, and the rollouts of previews.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.training.batches import shape_of
from ahriuwu_cli.training.shadow import PARTS, PHASES, fewest_images, trace_step


@dataclass(frozen=True)
class Estimate:
    """FLOPs are of the mean step, bytes of the one that needs most."""

    shape: tuple[int, int]  # clips and frames of a micro-batch
    parameters: dict[str, int]  # by part of the model
    flops: dict[str, int]  # by phase: forward, teacher (the bootstrap's two passes), backward, optimizer
    memory: dict[str, int]  # by part, at the moment of the peak
    kept: int  # bytes that the forward pass keeps for the backward pass
    largest: tuple[int, str]  # bytes of the largest single temporary, and the operation that makes it
    frames: int  # trained on in a step

    @property
    def peak(self) -> int:
        """Bytes alive at once, at most."""
        return sum(self.memory.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "parameters": {**self.parameters, "total": sum(self.parameters.values())},
            "flops": {**self.flops, "total": sum(self.flops.values())},
            "frames": self.frames,
            "memory_bytes": {**self.memory, "peak": self.peak},
            "kept_for_backward_bytes": self.kept,
            "largest_temporary": {"bytes": self.largest[0], "operation": self.largest[1]},
            "micro_batch": {"clips": self.shape[0], "frames": self.shape[1]},
        }


def estimate(config: TrainConfig, architecture: DynamicsConfig, device: str = "cpu") -> Estimate:
    """The forecast of a run. device: cpu or cuda, where the optimisers go about it in different ways."""
    every = config.long_every or 1
    short, long = (
        (clips // config.accumulate, frames) for clips, frames in (shape_of(config, 0), shape_of(config, every - 1))
    )
    shapes = {short: 1 - 1 / every, long: 1 / every} if short != long else {short: 1.0}
    traces = {shape: trace_step(config, architecture, *shape, device) for shape in shapes}
    flops = dict.fromkeys(PHASES, 0.0)
    for (clips, frames), trace in traces.items():
        rows, fewest = config.shortcut_share * clips, fewest_images(config, clips)
        often = dict.fromkeys(PHASES, 1.0) | {"teacher": rows / ceil(rows) if rows else 1.0}
        mean, more = trace.flops, min(config.single_image_share * clips, clips - ceil(rows)) - fewest
        if more > 0:  # between that many images and one more
            other = trace_step(config, architecture, clips, frames, device, fewest + 1).flops
            mean = {phase: (1 - more) * trace.flops[phase] + more * other[phase] for phase in PHASES}
        for phase in PHASES:
            flops[phase] += shapes[clips, frames] * often[phase] * mean[phase]
    shape, worst = max(traces.items(), key=lambda item: sum(item[1].peak.values()))
    return Estimate(
        shape,
        count_by_part(architecture),
        {p: round(n) for p, n in flops.items()},
        worst.peak,
        worst.kept,
        worst.largest,
        round(sum(n * clips * frames for (clips, frames), n in shapes.items()) * config.accumulate),
    )


def count_by_part(architecture: DynamicsConfig) -> dict[str, int]:
    """Trainable parameters of every part; those of the blocks by what they are in a block."""
    with torch.device("meta"):
        model = Dynamics(architecture)
    counts: Counter[str] = Counter()
    for name, p in model.named_parameters():
        words = name.split(".")
        counts[f"blocks.{words[2]}" if words[0] == "blocks" else words[0]] += p.numel()
    return dict(counts)


def as_text(e: Estimate) -> str:
    """Aligned lines for a terminal."""
    total, peak = sum(e.parameters.values()), e.peak
    clips, frames = e.shape
    lines = [f"parameters  {total / 1e6:,.2f}M: " + _shares(e.parameters, 1e6, "M")]
    flops = sum(e.flops.values())
    lines.append(f"a step      {flops / 1e9:,.4g} GFLOP for {e.frames} frames: " + _shares(e.flops, 1e9, ""))
    lines.append(f"memory      {peak / 1e6:,.4g} MB at the peak, micro-batches of {clips} clips of {frames} frames:")
    lines += [f"  {name:<12}{e.memory[name] / 1e6:>10,.1f} MB" for name in PARTS]
    lines.append(f"  kept for the backward pass at its start {e.kept / 1e6:,.1f} MB")
    lines.append(f"  largest single temporary {e.largest[0] / 1e6:,.1f} MB, of {e.largest[1].removeprefix('aten.')}")
    lines.append("  tensors alone: the process, scratch of kernels and what the allocator holds on to come on top")
    return "\n".join(lines)


def _shares(counts: dict[str, int], unit: float, sign: str) -> str:
    """'name 1.20M, ...' of all that is more than a thousandth of the whole."""
    total = sum(counts.values())
    return ", ".join(f"{name} {n / unit:,.4g}{sign}" for name, n in counts.items() if n > total / 1000)
