"""A layer of the dynamics: attention over space or time, then an MLP; and what attention over time needs to know."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahriuwu_cli.models.cache import Held, hold
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.kernels import Tables
from ahriuwu_cli.models.layers import Attention, RMSNorm, SwiGLU, rotary
from ahriuwu_cli.models.products import Linear


class TimeContext:
    """What time layers need besides activations: rotary tables, a bias, and in a rollout the window that is held."""

    def __init__(self, config: DynamicsConfig, rotary: Tables, bias: Tensor, held: Held | None = None) -> None:
        """rotary: `time_tables` of the new frames; bias (T * each, slots * each), each = a line's tokens a frame."""
        self.kind, self.rotary, self.bias, self.held = config.time_attention, rotary, bias, held
        self.layer = 0  # which time layer comes next; counts up within one pass

    def attend(self, attention: Attention, h: Tensor, asked: slice | None = None) -> Tensor:
        """Attention of h (B, T, S, C) over T and over the tokens of a line, causal within the window."""
        bias, store = self.bias, None
        if asked is not None:
            bias = bias.unflatten(0, (h.shape[1], -1))[asked].flatten(0, 1)
        if self.held is not None:
            store = partial(hold, self.held, self.layer)
            self.layer += 1
        return attention(h, self.kind, self.rotary, bias, store, asked)


def time_tables(config: DynamicsConfig, positions: Tensor) -> Tables:
    """cos and sin of positions (T,): (T, head_dim / 2), or (T, S, head_dim / 2) where tokens see across frames.

    Across frames half of the pairs turn with the frame's position and half with the token's index.
    """
    head_dim = config.width // config.heads
    if config.time_attention == "place":
        return rotary(positions, head_dim)
    in_space = head_dim // 4
    over_time = rotary(positions, head_dim - 2 * in_space)
    over_space = rotary(torch.arange(config.sequence, device=positions.device), 2 * in_space)
    cos, sin = (
        torch.cat([a[:, None].expand(-1, len(b), -1), b.expand(len(a), -1, -1)], dim=-1)
        for a, b in zip(over_time, over_space, strict=True)
    )
    return cos, sin


class Block(nn.Module):
    """x + attention(norm x), then x + MLP(norm x); attention over space or over time. Modulation is optional."""

    def __init__(self, config: DynamicsConfig, over_time: bool) -> None:
        super().__init__()
        self.over_time = over_time
        self.attention_norm = RMSNorm(config.width)
        self.attention = Attention(config.width, config.heads, config.kv_heads)
        self.mlp_norm = RMSNorm(config.width)
        self.mlp = SwiGLU(config.width, config.mlp_hidden)
        self.modulation = Linear(config.width, 4 * config.width) if config.conditioning == "modulate" else None

    def forward(self, x: Tensor, condition: Tensor | None, time: TimeContext, asked: slice | None = None) -> Tensor:
        """x (B, T, S, C) -> the same, or only what is asked for: frames of a time layer, tokens of a space layer."""
        scale1 = shift1 = scale2 = shift2 = None
        if self.modulation is not None:
            told = self.modulation(F.silu(condition))[:, :, None]
            scale1, shift1, scale2, shift2 = told.chunk(4, dim=-1)
        h = _modulate(self.attention_norm(x), scale1, shift1)
        h = time.attend(self.attention, h, asked) if self.over_time else self.attention(h, asked=asked)
        if asked is not None:
            x = x[:, asked] if self.over_time else x[:, :, asked]
            if self.over_time and scale2 is not None:
                scale2, shift2 = scale2[:, asked], shift2[:, asked]
        x = x + h
        return x + self.mlp(_modulate(self.mlp_norm(x), scale2, shift2))


def _modulate(h: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return h if scale is None else h * (1 + scale) + shift
