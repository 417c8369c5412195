"""Settings that a file of results says it was measured with, held to what the same work would write.

A checksum says that a file is as it was written, not that it makes sense: who writes one can make it fit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ahriuwu_cli import ranges
from ahriuwu_cli.config import PRECISIONS
from ahriuwu_cli.data.documents import is_hash
from ahriuwu_cli.data.metadata import SPLITS
from ahriuwu_cli.diffusion.samplers import SAMPLERS
from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.evaluation.controls import HOLD
from ahriuwu_cli.evaluation.metrics import CAP_DB
from ahriuwu_cli.evaluation.prepare import INTERVAL, INTERVAL_BEFORE
from ahriuwu_cli.rollout import CTX_LABELS, CTX_MODES, RolloutConfig, check_generation

Check = Callable[[Any], bool]
Form = Check | Mapping[str, Any]  # a check that says yes, or what an object's entries must be


def hold(value: Any, form: Form, where: str = "") -> None:
    """ValueError, with the place, unless a JSON value has this form: of an object exactly these entries."""
    if not isinstance(form, Mapping):
        if not form(value):
            raise ValueError(f"its {where} is {repr(value)[:40]}")
        return
    if type(value) is not dict or value.keys() != form.keys():
        odd = min(value.keys() ^ form.keys()) if type(value) is dict else "all"
        raise ValueError(f"of its {where or 'entries'} {odd[:40]!r} is missing or unknown")
    for name, each in form.items():
        hold(value[name], each, f"{where}.{name}" if where else name)


def whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def number(low: float, high: float) -> Check:
    return lambda value: type(value) in (int, float) and low <= value <= high


def exactly(wanted: Any) -> Check:
    """This JSON value: 1 is neither true nor 1.0, in lists too."""
    return lambda value: type(value) is type(wanted) and repr(value) == repr(wanted)


def one_of(names: Any) -> Check:
    return lambda value: type(value) is str and value in names


def or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def text(value: Any) -> bool:
    return type(value) is str


def device(value: Any) -> bool:
    """A device as PyTorch calls it."""
    try:
        return text(value) and str(torch.device(value)) == value
    except RuntimeError:
        return False


def _version(value: Any) -> bool:
    return type(value) is str and re.fullmatch(r"[0-9A-Za-z.+-]{1,60}", value) is not None


def _horizons(value: Any) -> bool:
    return type(value) is list and len(value) <= 1000 and all(map(whole(*ranges.HORIZON), value))


EVALUATION = {
    "windows": whole(*ranges.WINDOWS), "context": whole(*ranges.CONTEXT), "horizon": whole(*ranges.HORIZON),
    "horizons": _horizons, "seed": whole(*ranges.SEED), "split": one_of(SPLITS),
    "delta_at": whole(*ranges.HORIZON), "noise_seeds": whole(*ranges.NOISE_SEEDS),
}  # fmt: skip
BATCH = whole(*ranges.BATCH)
GENERATION = {
    "steps": whole(*ranges.STEPS), "sampler": one_of(SAMPLERS), "tau_ctx": number(*ranges.TAU_CTX),
    "ctx_mode": one_of(CTX_MODES), "ctx_label": one_of(CTX_LABELS),
}  # fmt: skip
K_MAX = whole(*ranges.STEPS)
IDENTITY = {  # of `cells.identity`
    "checkpoint_hash": is_hash, "tau": exactly(LABEL), "tokenizer_fingerprint": is_hash, "dataset_fingerprint": is_hash,
    "split": one_of(SPLITS), "manifest_hash": is_hash, "window_seed": whole(*ranges.SEED), "evaluation": EVALUATION,
    "generation": GENERATION, "k_max": K_MAX, "random_action_hold": exactly(list(HOLD)),
    "psnr_cap_db": exactly(CAP_DB), "interval": one_of((INTERVAL, INTERVAL_BEFORE)), "precision": one_of(PRECISIONS),
    "ahriuwu": _version,
}  # fmt: skip

SETTINGS = {name: form for name, form in IDENTITY.items() if name != "checkpoint_hash"} | {  # of `prepare.settings`
    "evaluation": EVALUATION | {"batch": BATCH}, "checkpoint": or_none(text), "checkpoint_git": or_none(text),
    "dataset": text, "device": device, "torch": text,
}  # fmt: skip
SAVED = {  # of saved.json, see `saved`
    "format": text, "identity": IDENTITY, "generation": GENERATION, "evaluation": EVALUATION | {"batch": BATCH},
    "manifest": is_hash, "checksum": is_hash,
    "world": {
        "path": or_none(text), "git": or_none(text), "tokenizer": is_hash, "k_max": K_MAX, "fps": number(*ranges.FPS),
        "frame_skip": whole(*ranges.FRAME_SKIP), "device": device, "precision": one_of(PRECISIONS),
    },
}  # fmt: skip


def check_rollouts(generation: dict[str, Any], k_max: int) -> None:
    """ValueError for settings of rollouts, each within its range, that no world of this k_max makes."""
    try:
        check_generation(RolloutConfig(**generation), k_max)
    except UserError as error:
        raise ValueError(str(error)) from None
