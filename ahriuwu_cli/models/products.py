"""Products of activations with weights, by the faster of the two libraries that torch brings for a CPU.

torch gives float32 products to MKL, and MKL gives processors that are not Intel's its code for AVX2, whatever they can
do. oneDNN, which torch takes for 16-bit products, goes by what the processor says: with AVX-512 on an AMD it multiplies
2.3 times as fast (docs/performance.md). The machine alone decides, never a measurement, so that two runs on one machine
compute alike. Everywhere else, under autocast and in other formats, torch's own product is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def _onednn_wins() -> bool:
    """Whether oneDNN's float32 products are the faster ones: AVX-512 on a processor that MKL gives AVX2 code."""
    there = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    if not there or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and _vendor() not in ("", "GenuineIntel")


def _vendor() -> str:
    """The processor's vendor as Linux tells it, or nothing."""
    try:
        with Path("/proc/cpuinfo").open() as lines:
            return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")
    except OSError:
        return ""


ONEDNN = _onednn_wins()
LEAST = 1 << 20  # multiplications from which oneDNN's call, 9 us dearer, pays: 16 rows by 256 x 256


def library(precision: str = "float32") -> str:
    """Who multiplies matrices here: what a training state says, since the last bits go with it."""
    return ("oneDNN" if ONEDNN else "torch") + (" and bfloat16 units" if at_best(precision) != torch.float32 else "")


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 by itself, so that it is faster than float32. Other than x86 is believed."""
    known = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2", "AVX512")
    return not known or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def at_best(precision: str) -> torch.dtype:
    """The number format for products that bear 16 bits, outside of autocast: float32 unless asked for and faster."""
    return torch.bfloat16 if precision == "bfloat16" and has_bfloat16_units() else torch.float32


def warn_of_bfloat16(precision: str, device: torch.device, say: Callable[[str], None]) -> None:
    """Say where the number format "bfloat16" is no gain on this machine."""
    if precision == "bfloat16" and device.type == "cpu" and not has_bfloat16_units():
        say("this CPU has no units for bfloat16: --precision float32 is as good and faster")


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` is to be taken for these two: plain float32 on a CPU, where it is faster, and not too small."""
    float32 = x.dtype == torch.float32 and weight.dtype == torch.float32
    plain = float32 and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return ONEDNN and plain and x.numel() * weight.shape[0] >= LEAST


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias by oneDNN, without a gradient: x (..., I) and weight (O, I) in any layout -> (..., O)."""
    if torch.compiler.is_compiling():  # torch's compiler would copy what is transposed, and insists on constant weights
        return _product_in_graph(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.custom_op("ahriuwu::product", mutates_args=())
def _product_in_graph(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@_product_in_graph.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of x (..., I), weight (O, I), bias (O,): (..., O), as `F.linear`, with its gradients."""
    if not multiplies(x, weight) or _in_frozen_graph():
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def _in_frozen_graph() -> bool:
    """Inside a graph without gradients: there `constant_weights` makes the compiler take the same library."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


@contextmanager
def constant_weights(work: int) -> Iterator[None]:
    """torch's compiler, called inside, makes weights constants of a graph without gradients, packed for its products.

    For float32 it would take MKL, but on ARM; it is told to take oneDNN as it does there, where that is the faster one.
    work: multiplications of a product of usual size.
    """
    from torch._inductor import config

    with ExitStack() as stack:
        stack.enter_context(config.patch(freezing=True))  # as an option of torch.compile it does nothing, and is silent
        if ONEDNN and work >= LEAST:
            stack.enter_context(patch.object(torch.ops.mkldnn, "_is_mkldnn_acl_supported", lambda: True))
        yield


class Linear(nn.Linear):
    """`nn.Linear` that multiplies by `linear`, in the number format of its weights; the result has that of x."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return linear(x, self.weight, self.bias)
        return linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        given, asked, d_weight = x.flatten(0, -2), g.flatten(0, -2), None
        if wants_weight:  # the longer side of the weight in the columns: up to 1.4 times as fast
            tall = weight.shape[0] > weight.shape[1]
            d_weight = product(given.T, asked.T).T if tall else product(asked.T, given.T)
        return product(g, weight.T) if wants_x else None, d_weight, asked.sum(0) if wants_bias else None
