"""The arithmetic between the products, with gradients by hand: RMSNorm, SwiGLU, attention over short lines.

On a CPU the products run near the machine's peak, and what is left to win is memory passed over: autograd keeps and
walks every intermediate of a norm or a gate. Each piece here keeps only what its gradient needs. Compiled graphs, GPUs
and 16-bit formats take the plain formulas, PyTorch's own kernels; `by_hand` decides, and the tests hold the two against
each other.

A line is the tokens that attend to one another: those of a frame (`space`), one place over time (`place`), or all
tokens of all frames (`frame`). Heads leave a projection as (B, T, S, H, D); in attention they are (rows, heads, L, D).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

EPS = 1e-6
CHUNK = 1 << 18  # numbers that an elementwise piece works on at a time
SHORT = 512  # longest line whose table of attention weights is held in memory
TABLED = (torch.float32, torch.bfloat16)
ORDERS = {"space": (0, 1, 3, 2, 4), "frame": (0, 3, 1, 2, 4), "place": (0, 2, 3, 1, 4)}  # of (B, T, S, H, D)
BACK = {"space": (0, 1, 3, 2, 4), "frame": (0, 2, 3, 1, 4), "place": (0, 3, 1, 2, 4)}

Tables = tuple[Tensor, Tensor]  # cos and sin of rotary positions: (T, D / 2), or (T, S, D / 2) for `frame`


def by_hand(x: Tensor) -> bool:
    """Whether the pieces below beat the plain formulas: on a CPU, in 32 bits or more, outside of a compiled graph."""
    return x.dtype in (torch.float32, torch.float64) and _eager_on_cpu(x)


def holds_table(q: Tensor, k: Tensor) -> bool:
    """Whether attention holds its table of weights in memory: on a CPU, in float32 or bfloat16, for short lines."""
    return q.device.type in ("cpu", "meta") and q.dtype in TABLED and k.shape[2] <= SHORT


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / rms(x) * weight over the last axis, (..., C), in the number format of x."""
    if not by_hand(x):
        return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), EPS)
    return _RMSNorm.apply(x, weight) if torch.is_grad_enabled() else _normed(x, weight)[0]


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * value of x = (gate, value): (..., 2 H) -> (..., H)."""
    if by_hand(x) and torch.is_grad_enabled():
        return _SwiGLU.apply(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def split_heads(x: Tensor, kind: str) -> Tensor:
    """Heads (B, T, S, H, D) as attention takes them: (rows, heads, L, D) in lines of `kind`."""
    return _lines(x.permute(ORDERS[kind]), kind)


def norm_heads(x: Tensor, gain: Tensor, kind: str, tables: Tables | None) -> Tensor:
    """Queries or keys (B, T, S, H, D) normed, scaled by gain (D,) and rotated: (rows, heads, L, D).

    In the number format of x; of bfloat16 on a CPU in float32, in which attention works there.
    """
    if x.dtype == torch.bfloat16 and _eager_on_cpu(x):
        x = x.float()
    if not by_hand(x):
        y = F.rms_norm(x, x.shape[-1:], gain.to(x.dtype), EPS).permute(ORDERS[kind])
        return _lines(y if tables is None else rotate(y, *tables), kind)
    if torch.is_grad_enabled():
        return _NormHeads.apply(x, gain, kind, *(tables or (None, None)))
    return _lines(_turned(_normed(x.permute(ORDERS[kind]), gain)[0], tables), kind)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) v of q (rows, H, L, D), k and v (rows, G, M, D), bias (L, M): (rows, H, L, D).

    In the number format of v. The scale is not applied here, it belongs into the gain of q. H is a multiple of G:
    grouped-query attention.
    """
    if holds_table(q, k):
        if q.dtype == v.dtype == torch.float32:
            return _by_table(q, k, v, bias)
        with torch.autocast(q.device.type, enabled=False):  # 16 bits are too few for scores, and no faster here
            return _by_table(q.float(), k.float(), v.float(), bias).to(v.dtype)
    mask = None if bias is None else bias.to(v.dtype)
    q, k = q.to(v.dtype), k.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=q.shape[1] != k.shape[1])


def _by_table(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    scores = torch.bmm(_grouped(q, k), k.flatten(0, 1).mT)  # queries of one group are rows of one product
    if bias is not None:
        scores = (scores.unflatten(1, (-1, q.shape[2])) + bias).flatten(1, 2)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).view(q.shape)


def join_heads(x: Tensor, kind: str, shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `split_heads` for shape (B, T, S), heads side by side: (rows, heads, L, D) -> (B, T, S, H * D)."""
    batch, frames, tokens = shape
    axis, sizes = {"space": (0, (batch, frames)), "place": (1, (tokens, -1)), "frame": (2, (frames, tokens))}[kind]
    return x.unflatten(axis, sizes).permute(BACK[kind]).flatten(3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (..., T, D) by tables (T, D / 2), in the number format of x."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).type_as(x)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        y, scale = _normed(x, weight)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, scale = ctx.saved_tensors
        return _norm_gradient(g, x * scale, scale, weight, torch.empty(x.shape, dtype=x.dtype, device=x.device))


class _SwiGLU(Function):
    """Works through CHUNK numbers at a time, so that what lies between input and result stays in the cache."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        gate, value = x.flatten(0, -2).chunk(2, dim=-1)
        y = torch.empty(gate.shape, dtype=x.dtype, device=x.device)
        for gate_, value_, y_ in _in_chunks(gate, value, y):
            torch.mul(gate_, torch.sigmoid(gate_, out=y_), out=y_).mul_(value_)
        ctx.save_for_backward(x)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (gate, value), (d_gate, d_value) = (t.flatten(0, -2).chunk(2, dim=-1) for t in (x, dx))
        for gate_, value_, g_, d_gate_, d_value_ in _in_chunks(gate, value, g.flatten(0, -2), d_gate, d_value):
            s = torch.sigmoid(gate_)
            silu = gate_ * s
            torch.mul(g_, silu, out=d_value_)
            slope = torch.addcmul(s, s, torch.sub(gate_, silu, out=silu))  # silu' = s + s (gate - silu)
            torch.mul(slope.mul_(value_), g_, out=d_gate_)
        return dx


class _NormHeads(Function):
    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, kind: str, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        y, scale = _normed(x.permute(ORDERS[kind]), gain)
        ctx.save_for_backward(x, gain, scale, cos, sin)
        ctx.kind = kind
        return _lines(_turned(y, None if cos is None else (cos, sin)), kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, gain, scale, cos, sin = ctx.saved_tensors
        ordered = x.permute(ORDERS[ctx.kind])
        g = _turned(g.reshape(ordered.shape), None if cos is None else (cos, -sin))
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        normed = torch.mul(ordered, scale, out=torch.empty_like(g))
        _, d_gain = _norm_gradient(g, normed, scale, gain, dx.permute(ORDERS[ctx.kind]))
        return dx, d_gain, None, None, None


def _normed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight as a new tensor without gaps, 1 / rms(x)) over the last axis."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(length.new_full((), EPS), length, length, value=1 / x.shape[-1]).rsqrt_()
    y = torch.mul(x, scale, out=torch.empty(x.shape, dtype=x.dtype, device=x.device))
    return y.mul_(weight), scale


def _norm_gradient(g: Tensor, normed: Tensor, scale: Tensor, weight: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, written into dx, and of the weight, from g, x / rms(x) and 1 / rms(x)."""
    product = g * normed
    d_weight = product.flatten(0, -2).sum(0)
    mean = (product @ weight)[..., None].div_(weight.numel())
    torch.mul(g, weight, out=product).addcmul_(normed, mean, value=-1)
    return torch.mul(product, scale, out=dx), d_weight


def _eager_on_cpu(x: Tensor) -> bool:
    return x.device.type in ("cpu", "meta") and not torch.compiler.is_compiling()


def _turned(x: Tensor, tables: Tables | None) -> Tensor:
    """`rotate`, as two products and two sums straight into the result; x itself where there are no tables."""
    if tables is None:
        return x
    (a, b), (cos, sin), y = x.chunk(2, dim=-1), tables, torch.empty_like(x)
    first, second = y.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(a, sin, out=second).addcmul_(b, cos)
    return y


def _in_chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each tensor (rows, H), about CHUNK numbers at a time."""
    rows = max(1, CHUNK // tensors[0].shape[-1])
    return zip(*(t.split(rows) for t in tensors), strict=True)


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """(rows, H, L, D) as (rows * G, H / G * L, D), G being the heads of k."""
    return x.reshape(k.shape[0] * k.shape[1], -1, x.shape[-1])


def _lines(x: Tensor, kind: str) -> Tensor:
    """Heads in the order of `kind` to (rows, heads, L, D)."""
    first = {"space": 0, "place": 1, "frame": 2}[kind]
    return x.flatten(first, first + 1)
