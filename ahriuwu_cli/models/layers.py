"""Layers of the block-causal transformer: RMSNorm, SwiGLU, rotary positions, attention over space and over time.

Activations are (B, T, S, C): B clips, T frames, S tokens of a frame, C channels. Attention mixes the tokens of a line:
those of one frame (`space`), one token place over time (`place`), or all tokens over time (`frame`).
Dreamer 4 (arXiv 2509.24527), section 3.4: pre-RMSNorm, SwiGLU, QK-norm, grouped-query attention.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ahriuwu_cli.models.kernels import Tables, attend, join_heads, norm_heads, rms_norm, split_heads, swiglu
from ahriuwu_cli.models.products import Linear


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class SwiGLU(nn.Module):
    """Gated MLP: (silu(x W1) * x W2) W3, hidden width `hidden`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, 2 * hidden, bias=False)
        self.down = Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(swiglu(self.up(x)))


class Attention(nn.Module):
    """Multi-head attention within lines of tokens, with QK-norm and grouped keys and values.

    kind: which tokens form a line (`kernels`). `rotary` are tables of positions in the line, `bias` (L, M) is 0 where a
    query may look and -inf where not. `store`, in a rollout, takes new keys and values and gives the window's.
    """

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q = Linear(width, heads * self.head_dim, bias=False)
        self.kv = Linear(width, 2 * kv_heads * self.head_dim, bias=False)
        self.out = Linear(heads * self.head_dim, width, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(
        self,
        x: Tensor,
        kind: str = "space",
        rotary: Tables | None = None,
        bias: Tensor | None = None,
        store=None,
        asked: slice | None = None,
    ) -> Tensor:
        """x (B, T, S, C) -> the same, or only what is asked for: tokens where lines lie in space, else frames."""
        if torch.is_autocast_enabled(x.device.type):  # once for both products
            x = x.to(torch.get_autocast_dtype(x.device.type))
        seeking, turn = x, rotary
        if asked is not None:
            seeking = x[:, :, asked] if kind == "space" else x[:, asked]
            turn = None if rotary is None else (rotary[0][asked], rotary[1][asked])
        q = self.q(seeking).unflatten(-1, (self.heads, self.head_dim))
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(-3)
        q = norm_heads(q, self.q_norm.weight * self.head_dim**-0.5, kind, turn)  # (rows, heads, L, D)
        k, v = norm_heads(k, self.k_norm.weight, kind, rotary), split_heads(v, kind)
        if store is not None:
            k, v = store(k, v)
        return self.out(join_heads(attend(q, k, v, bias), kind, seeking.shape[:3]))


def rotary(positions: Tensor, head_dim: int) -> Tables:
    """cos and sin (T, head_dim / 2) of rotary positions. Angles in float64: frame 100,000 is as exact as 1."""
    rates = 100.0 ** -torch.linspace(0, 1, head_dim // 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def window_mask(frames: int, window: int, device: torch.device) -> Tensor:
    """(T, T) bool: frame t may look at frames t - window + 1 .. t."""
    t = torch.arange(frames, device=device)
    age = t[:, None] - t[None, :]
    return (age >= 0) & (age < window)


def as_bias(mask: Tensor) -> Tensor:
    """A mask, True where a row may look at a column, as what attention adds to its scores: 0 or -inf."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
