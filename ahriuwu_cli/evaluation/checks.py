"""One line of `ahriuwu verify`, how it is decided, and the table that it stands in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ahriuwu_cli.printing import one_line


@dataclass(frozen=True)
class Check:
    """One line of the table. `finding` is the review's number and subject, or "model"."""

    finding: str
    name: str
    measured: float
    expected: str
    ok: bool


def as_table(checks: list[Check]) -> str:
    """Aligned text: finding, check, measured, expected, ok."""
    rows = [("finding", "check", "measured", "expected", "ok")]
    rows += [(c.finding, c.name, f"{c.measured:.4g}", c.expected, "ok" if c.ok else "FAIL") for c in checks]
    rows = [tuple(map(one_line, row)) for row in rows]  # components of actions have names
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


Line = tuple[str, float, str, bool]  # name, measured, expected, ok


def near(name: str, measured: float | Tensor, wanted: float, slack: float) -> Line:
    """Holds within `slack` of `wanted`, ends included."""
    measured = float(measured)
    return name, measured, f"{wanted:g} +- {slack:g}", abs(measured - wanted) <= slack


def below(name: str, measured: float | Tensor, bound: float) -> Line:
    """Holds strictly below `bound`; NaN never does."""
    measured = float(measured)
    return name, measured, f"below {bound:g}", measured < bound


def above(name: str, measured: float | Tensor, bound: float) -> Line:
    """Holds strictly above `bound`; NaN never does."""
    measured = float(measured)
    return name, measured, f"above {bound:g}", measured > bound


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same for a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms(x: Tensor) -> Tensor:
    """Root mean square, ()."""
    return x.float().square().mean().sqrt()


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def relative(a: Tensor, b: Tensor) -> float:
    """RMS of the difference over the RMS of b."""
    return (rms(a - b) / rms(b)).item()
