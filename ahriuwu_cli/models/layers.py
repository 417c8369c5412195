"""Layers of the block-causal transformer: RMSNorm, SwiGLU, rotary positions, attention over space and over time.

Activations are (B, T, S, C): B clips, T frames, S tokens of a frame, C channels. Space attention mixes the S tokens of
one frame; time attention mixes the T frames at one token place, causally and within a window of frames.
Dreamer 4 (arXiv 2509.24527), section 3.4: pre-RMSNorm, SwiGLU, QK-norm, grouped-query attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    """Gated MLP: (silu(x W1) * x W2) W3, hidden width `hidden`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


def rotary(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin (T, head_dim / 2) of rotary positions. Angles in float64: frame 100,000 is as exact as 1."""
    rates = 100.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., T, head_dim) by tables (T, head_dim / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class Attention(nn.Module):
    """Multi-head attention over the second to last axis of its input, with QK-norm and grouped keys and values."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = nn.Linear(width, heads * self.head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(heads * self.head_dim, width, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys, values of x (..., L, C), each (..., heads, L, head_dim); queries and keys are normed."""
        q = self.q(x).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        return (
            self.q_norm(q).transpose(-2, -3),
            self.k_norm(k).transpose(-2, -3),
            v.transpose(-2, -3),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention and the output projection: (..., heads, L, head_dim) -> (..., L, C)."""
        grouped = self.kv_heads != self.heads
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.out(y.transpose(-2, -3).flatten(-2))

    def forward(self, x: Tensor) -> Tensor:
        """Attention without a mask over axis -2: what a space layer does with (B, T, S, C)."""
        return self.attend(*self.project(x), None)


def window_mask(frames: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: frame t may look at frames t - window + 1 .. t."""
    t = torch.arange(frames, device=device)
    age = t[:, None] - t[None, :]
    return (age >= 0) & (age < window)
