"""What a frame is told besides its latents: the noise level tau, the step size d, and the action that led to it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.models.products import Linear

Slots = tuple[tuple[str, int, tuple[float, ...], tuple[float, ...]], ...]  # (kind, size, low, high) of each component


class LevelEmbedding(nn.Module):
    """tau (B, T) and d (B, T) -> (B, T, C). Equal halves of the input belong to tau and to d, so neither drowns.

    tau is looked up by interpolation between its two neighbours among 0, 1/k_max, ..., 1; d must be a power of two.
    """

    def __init__(self, k_max: int, width: int) -> None:
        super().__init__()
        self.k_max = k_max
        half = width // 2
        grid = torch.linspace(0, 1, k_max + 1)
        self.tau_table = nn.Parameter(_waves(grid, half))
        self.d_table = nn.Parameter(torch.randn(k_max.bit_length(), half) / math.sqrt(2))
        self.mix = nn.Sequential(Linear(2 * half, width), nn.SiLU(), Linear(width, width))

    def forward(self, tau: Tensor, d: Tensor) -> Tensor:
        lower, upper, share = tau_.grid_neighbours(tau, self.k_max)
        share = share[..., None].type_as(self.tau_table)
        of_tau = self.tau_table[lower] * (1 - share) + self.tau_table[upper] * share
        of_d = self.d_table[(-torch.log2(d)).round().long()]
        return self.mix(torch.cat([of_tau, of_d], dim=-1))


class ActionEmbedding(nn.Module):
    """Incoming actions (B, T, A) -> (B, T, C): the sum over components, or one learned vector where none is known.

    discrete: an embedding row; binary: one vector a pressed button; continuous: a linear map of the value scaled to
    [-1, 1]. Components lie side by side in A columns, in the order of the action space.
    """

    def __init__(self, slots: Slots, width: int) -> None:
        super().__init__()
        self.slots = slots
        self.unknown = nn.Parameter(torch.randn(width) * 0.5)
        self.tables = nn.ParameterList(torch.randn(size, width) for _, size, _, _ in slots)
        for i, (kind, _, low, high) in enumerate(slots):
            if kind == "continuous":
                self.register_buffer(f"low{i}", torch.tensor(low), persistent=False)
                self.register_buffer(f"high{i}", torch.tensor(high), persistent=False)

    def forward(self, actions: Tensor, known: Tensor) -> Tensor:
        total, column = self.unknown.new_zeros(self.unknown.shape), 0
        for i, (kind, size, _, _) in enumerate(self.slots):
            if kind == "discrete":
                total = total + self.tables[i][actions[..., column].long()]
                column += 1
                continue
            values = actions[..., column : column + size]
            column += size
            if kind == "continuous":
                low, high = getattr(self, f"low{i}"), getattr(self, f"high{i}")
                values = 2 * (values - low) / (high - low) - 1
            total = total + values.type_as(self.tables[i]) @ self.tables[i]
        return torch.where(known[..., None], total, self.unknown)


def _waves(grid: Tensor, width: int) -> Tensor:
    """Smooth start of the tau table: sines and cosines of rising frequency, (len(grid), width)."""
    rates = math.pi * 2.0 ** torch.linspace(-1, math.log2(len(grid)) - 2, math.ceil(width / 2))
    angles = grid[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
