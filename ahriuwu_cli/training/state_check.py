"""What a state must say and hold so that a run can go on from it, checked before anything of it is used.

A hash says that a state is as it was written, not that it makes sense: who writes one can make its hashes fit. So there
is one table of what its document says and one of its tensors, for runs of every kind. ValueError with what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ahriuwu_cli.data.documents import extent, is_hash, to_json
from ahriuwu_cli.data.tensors import TORCH, TensorInfo
from ahriuwu_cli.training.finite import first_not_finite
from ahriuwu_cli.training.state import describe_optimizer, with_prefix

MOST = 2**53  # steps, processes, threads
SHORTEST = 1e-6  # seconds of a step at least: by the mean of all a time budget decides how many there will be
LONGEST = 1e12  # seconds of a run, as a world may say them
LOUDEST = 1e4  # dB between two pictures
STEEPEST = 4e38  # norm of a gradient, which is a number in float32
WORDS = 40  # characters of a name
DEEPEST, MOST_VALUES = 16, 400_000  # of a run.json: ours has 6, and as many values as its actions
LARGEST = 9_000_000  # bytes of one: a document of ours has 10 MB at most
COPY = "run_json"  # what a document calls the run.json of its run

Check = Callable[[Any], bool]


def check_document(document: Mapping[str, Any], needed: Sequence[str], steps: int | None) -> None:
    """ValueError unless every field is what a run writes there.

    needed: those that may not be missing; states of older versions lack others. steps: how many the run was asked for,
    None where a time budget decides.
    """
    for name, holds in _fields(document["step"], steps).items():
        if name not in document and name in needed:
            raise ValueError(f"it has no {name}")
        if name in document and not holds(document[name]):
            raise ValueError(f"{name} is {repr(document[name])[:WORDS]}")


def check_run(said: object) -> None:
    """ValueError unless this is what a run.json says, and a state has room for a copy of it."""
    if type(said) is not dict:
        raise ValueError("it is not an object")
    depth, values = extent(said)
    if depth > DEEPEST or values > MOST_VALUES:
        raise ValueError(f"it holds more than {MOST_VALUES} values, or is nested more than {DEEPEST} deep")
    to_json(said, 1, LARGEST)
    for name, kind in (("kind", str), ("config", dict), ("facts", dict), ("command", str)):
        if name not in said:
            raise ValueError(f"it has no {name}")
        if type(said[name]) is not kind:
            raise ValueError(f"{name} is not a {kind.__name__}")
    if said["kind"] not in ("dynamics", "tokenizer"):
        raise ValueError(f"its kind is {said['kind'][:WORDS]!r}")
    start = said["facts"].get("init_from")
    if start is not None and not is_path(start):
        raise ValueError("init_from is no path")


def is_path(value: object) -> bool:
    """Whether a value that others may have written can be a path."""
    return type(value) is str and "\0" not in value


def _is_run(said: object) -> bool:
    try:
        check_run(said)
    except ValueError:
        return False
    return True


def _fields(step: int, steps: int | None) -> dict[str, Check]:
    undecided = _or_none(_whole(step, MOST))
    counts = dict.fromkeys(("processes", "accumulate", "threads"), _whole(1, MOST))
    texts = dict.fromkeys(("parallel", "products"), lambda value: type(value) is str and len(value) <= WORDS)
    return {
        "step": _whole(0, MOST if steps is None else steps),
        "total": undecided if steps is None else _whole(steps, steps),
        "logged": _whole(0, step),
        "elapsed": _number(step * SHORTEST, LONGEST),
        "looked": _number(0, LONGEST),
        "best": _or_none(_number(-LOUDEST, LOUDEST)),
        "grad_norms": lambda v: type(v) is list and len(v) <= step and all(map(_number(0, STEEPEST), v)),
        "finished": lambda value: type(value) is bool,
        "optimizers": lambda value: type(value) is list,
        COPY: _is_run,
        "worlds": lambda v: type(v) is dict and v.keys() <= {"best", "last"} and all(map(is_hash, v.values())),
        **counts,
        **texts,
    }


def _whole(low: int, high: int) -> Check:
    return lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> Check:
    return lambda value: type(value) in (int, float) and low <= value <= high


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def any_number(tensor: Tensor) -> bool:
    return True


def not_negative(tensor: Tensor) -> bool:
    """Sums and means of squares."""
    return bool((tensor >= 0).all())


@dataclass(frozen=True)
class Held:
    """A tensor that a state must hold: number format, shape, and which finite numbers make sense in it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sound: Callable[[Tensor], bool] = any_number

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


def held(prefix: str, tensors: Mapping[str, Tensor], sound: Callable[[Tensor], bool] = any_number) -> dict[str, Held]:
    """Tensors like these, as `with_prefix` names them."""
    return with_prefix(prefix, {name: Held(t.dtype, tuple(t.shape), sound) for name, t in tensors.items()})


class Expected:
    """The tensors of a run's states, those of its optimisers among them.

    optional: others that may be missing, each where the document lacks this field, as an older version's may. A
    parameter without a gradient so far has no state in its optimiser; any other has all of it.
    """

    def __init__(
        self,
        tensors: Mapping[str, Held],
        optimizers: Sequence[torch.optim.Optimizer],
        optional: Mapping[str, str] | None = None,
    ) -> None:
        self.optimizers = list(optimizers)
        of_optimizers: dict[str, Held] = {}
        for i, optimizer in enumerate(self.optimizers):
            of_optimizers |= with_prefix(f"optimizer{i}", _of_optimizer(optimizer))
        self.tensors, self.of_optimizers = {**tensors, **of_optimizers}, of_optimizers.keys()
        self.optional = optional or {}

    def check(self, document: Mapping[str, Any], header: Mapping[str, TensorInfo]) -> None:
        """Compare names, number formats and shapes, and the description of the optimisers, before memory is taken."""
        there = {name.rpartition(".")[0] for name in header}
        for name in self.tensors.keys() - header.keys():
            never_stepped = name in self.of_optimizers and name.rpartition(".")[0] not in there
            of_older = name in self.optional and not {self.optional[name], COPY} & document.keys()
            if not (never_stepped or of_older):
                raise ValueError(f"it has no tensor {name}")
        for name, info in header.items():
            if name not in self.tensors:
                raise ValueError(f"no such run has a tensor {name[:WORDS]}")
            expected = self.tensors[name]
            found = replace(expected, dtype=getattr(torch, TORCH[info.dtype]), shape=info.shape)
            if found != expected:
                raise ValueError(f"{name} is {found} instead of {expected}")
        if len(document["optimizers"]) != len(self.optimizers):
            raise ValueError(f"it is of {len(document['optimizers'])} optimizers instead of {len(self.optimizers)}")
        for i, (optimizer, saved) in enumerate(zip(self.optimizers, document["optimizers"], strict=True)):
            prefix = f"optimizer{i}."
            names = sorted(name.removeprefix(prefix) for name in header if name.startswith(prefix))
            _check_optimizer(optimizer, saved, names)

    def check_values(self, tensors: Mapping[str, Tensor]) -> None:
        """No run saves a number that is not finite, or one that its step could not come to."""
        bad = first_not_finite(tensors)
        if bad is not None:
            raise ValueError(f"{bad} is not finite")
        for name, tensor in tensors.items():
            if not self.tensors[name].sound(tensor):
                raise ValueError(f"{name} holds numbers that no training comes to")


def _check_optimizer(optimizer: torch.optim.Optimizer, saved: object, names: list[str]) -> None:
    """All that it is described by must be as it was made for this run; its learning rate belongs to the step."""
    own = describe_optimizer(optimizer) | {"tensors": names}
    if type(saved) is not dict or saved.keys() != own.keys():
        raise ValueError("an optimizer is not described as one of this version")
    if saved["kind"] != own["kind"]:
        raise ValueError(f"it is of the optimizer {repr(saved['kind'])[:WORDS]}, this run uses {own['kind']}")
    groups = saved["groups"]
    if type(groups) is not list or not all(type(g) is dict and _number(0, MOST)(g.get("lr")) for g in groups):
        raise ValueError(f"the learning rate of {own['kind']} is no number")
    mine, its = (each | {"groups": [group | {"lr": 0} for group in each["groups"]]} for each in (own, saved))
    differs = [name for name in mine if mine[name] != its[name]]
    if differs:
        raise ValueError(f"the {' and '.join(differs)} of {own['kind']} differ from this run's")


def _of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Held]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    of: dict[str, Held] = {}
    for i, p in enumerate(parameters):
        if p.requires_grad:
            of |= with_prefix(str(i), _OF_PARAMETER[type(optimizer).__name__](optimizer, p))
    return of


def _of_muon(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Held]:
    return {"momentum_buffer": Held(optimizer.state_dtype or p.dtype, tuple(p.shape))}


def _of_adamw(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Held]:
    like = (p.dtype, tuple(p.shape))
    return {"step": _STEP, "exp_avg": Held(*like), "exp_avg_sq": Held(*like, not_negative)}


def _of_adafactor(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Held]:
    shape = tuple(p.shape)
    if len(shape) < 2:
        return {"step": _STEP, "variance": Held(p.dtype, shape, not_negative)}
    row, column = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
    return {
        "step": _STEP,
        "row_var": Held(p.dtype, row, not_negative),
        "col_var": Held(p.dtype, column, not_negative),
    }


_STEP = Held(torch.float32, (), lambda tensor: bool(tensor >= 1))  # 0 would be divided by
_OF_PARAMETER = {"Muon": _of_muon, "AdamW": _of_adamw, "Adafactor": _of_adafactor}
