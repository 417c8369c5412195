"""What is not finite stops a run, by name: the step, its clips, the last state that is good. Nothing is zeroed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ahriuwu_cli.errors import TrainingError
from ahriuwu_cli.printing import some_of
from ahriuwu_cli.training.states import States

MOST_NAMED = 64  # windows in the sentence


def not_finite(
    what: str, step: int, windows: Sequence[str], states: States, precision: str | None = None
) -> TrainingError:
    """The error for a step whose loss or gradient is not finite; windows as "episode:first frame"."""
    named = some_of(windows, MOST_NAMED)
    return TrainingError(
        f"loss or gradient is not finite at step {step} ({what}; windows {named}); the last good state is "
        f"{states.newest() or 'none'}: {_remedy(precision)}"
    )


def check_finite(tensors: Mapping[str, Tensor], step: int, newest: Path | None, precision: str | None = None) -> None:
    """TrainingError when a state that is about to be saved could only be gone on from to NaN."""
    bad = first_not_finite(tensors)
    if bad is not None:
        raise TrainingError(
            f"{bad} is not finite after step {step}, so this state is not saved; the last good state is "
            f"{newest or 'none'}: {_remedy(precision)}"
        )


def _remedy(precision: str | None) -> str:
    exact = " or --precision float32" if precision == "bfloat16" else ""
    return f"try a lower --lr{exact} in another --out"


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a number that is not finite, or None."""
    return next((n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)


def first_no_weight(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that no network has for a weight, not finite or of whole numbers; or None."""
    return next((n for n, t in tensors.items() if not (t.is_floating_point() and torch.isfinite(t).all())), None)
