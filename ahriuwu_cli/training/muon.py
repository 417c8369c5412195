"""Muon for hidden matrices: momentum, made orthogonal by a few matrix products, scaled to AdamW's update size.

The method is Keller Jordan's (2024) with the scale of Liu et al. (arXiv 2502.16982), and with four optimal polynomials
instead of five equal Newton-Schulz steps: two thirds of the time for the same loss (docs/performance.md). PyTorch's own
`torch.optim.Muon` works in bfloat16 only, which costs 30 times a training step on a CPU without bfloat16 units
(measured: docs/log.md). This one works in bfloat16 on a GPU and in what it is told on a CPU, and stacks matrices of one
shape.
Its momentum can be kept in bfloat16: a step moves it by a twentieth of the way, well above bfloat16's 1/256.

An orthogonal update needs the whole matrix. Where weights are sharded, momentum stays sharded, every process gathers
the directions of a few matrices at a time, makes them all orthogonal, and keeps its rows: one all-gather of the
matrices a step more than AdamW, and the same arithmetic on every process, as copies of the model would do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ahriuwu_cli.models.products import multiplies, product
from ahriuwu_cli.training.sharding import is_sharded, local, placed, whole

GATHERED = 8  # sharded matrices that are whole at a time
STACKED = 2**23  # elements of matrices that are made orthogonal at once; temporaries are about six times as many


# Odd quintics a x + b x^3 + c x^5, each the best approximation of 1 on the interval that the one before it leaves
# (Amsel et al., "The Polar Express", arXiv 2505.16932): together they take singular values in [SMALLEST, 1] to
# [0.78, 1.22]. Intervals are widened by 1 % on both sides, so that rounding to bfloat16 leads no value out of them.
SMALLEST = 0.003  # of the Frobenius norm; smaller ones grow 295-fold and stay below
QUINTICS = (
    (8.383674, -24.765913, 18.357088),
    (4.008308, -2.927716, 0.542845),
    (3.497023, -2.573264, 0.504491),
    (2.515883, -1.833648, 0.426543),
)


def orthogonalise(g: Tensor, products: torch.dtype = torch.float32) -> Tensor:
    """U V^T, roughly, of each matrix of g (M, rows, columns): its singular vectors, with singular values near 1.

    products: number format of the matrix products on a CPU. On a GPU it is bfloat16.
    """
    x = g.bfloat16() if g.is_cuda else g.to(products)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = _through_quintics(x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7))
    return (x.mT if tall else x).type_as(g)


def _through_quintics(x: Tensor) -> Tensor:
    """QUINTICS of the singular values of each matrix of x (M, rows, columns), rows <= columns, none above 1."""
    if multiplies(x[0], x[0]):  # in oneDNN, which takes one matrix at a time
        return torch.stack([_one_through_quintics(each) for each in x])
    for a, b, c in QUINTICS:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x


def _one_through_quintics(x: Tensor) -> Tensor:
    """The same of one matrix, with sums taken on diagonals: a x + (b s + c s^2) x = (a I + (b I + c s) s) x."""
    for a, b, c in QUINTICS:
        s = product(x, x)  # x x^T, symmetric
        inner = s * c
        inner.diagonal().add_(b)
        outer = product(inner, s)
        outer.diagonal().add_(a)
        x = product(outer, x.mT)
    return x


class Muon(torch.optim.Optimizer):
    """Muon over 2-D parameters with Nesterov momentum and decoupled weight decay. Update RMS is 0.2, as AdamW's.

    state: number format of the momentum, float32 or bfloat16; None: that of the parameters. products: see
    `orthogonalise`.
    """

    def __init__(
        self,
        params,
        lr: float = 3e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        state: torch.dtype | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.state_dtype, self.products = state, products
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim != 2:
                    raise ValueError(f"Muon takes matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        assert closure is None, "closures are not supported"
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((*p.shape, p.dtype), []).append(p)
            for matrices in by_shape.values():
                at_once = max(1, STACKED // matrices[0].numel())
                if is_sharded(matrices[0]):
                    at_once = min(at_once, GATHERED)
                for i in range(0, len(matrices), at_once):
                    self._update(matrices[i : i + at_once], group)

    def _update(self, matrices: list[Tensor], group: dict) -> None:
        directions = []
        for p in matrices:
            buffer = self.momentum(p)
            mine = local(buffer)
            mine.copy_(mine.to(p.dtype).lerp_(local(p.grad), 1 - group["momentum"]))
            directions.append(whole(torch.lerp(p.grad, buffer.to(p.dtype), group["momentum"])))
        scale = 0.2 * max(matrices[0].shape) ** 0.5
        updates = orthogonalise(torch.stack(directions), self.products)
        for p, update in zip(matrices, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(placed(update, p), alpha=-group["lr"] * scale)

    def momentum(self, p: Tensor) -> Tensor:
        """The momentum of a parameter, zero before its first step."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p, dtype=self.state_dtype)
        return state["momentum_buffer"]
