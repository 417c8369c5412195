"""Processes that train together: who they are, what they decide together, and who speaks for them.

torchrun starts them and says who is who by RANK, WORLD_SIZE and LOCAL_RANK. Process 0 leads: it alone writes, prints
and decides when time is up. Gradients go through gloo on CPUs and NCCL on GPUs; decisions always through gloo, where
waiting for the lead's preview may take hours. One process is a group of its own and never asks anybody.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.errors import CheckpointError, Interrupted, TrainingError, UserError, did_you_mean
from ahriuwu_cli.evaluation.shards import choose_device, find_shards, processes
from ahriuwu_cli.models import products
from ahriuwu_cli.training.checkpoint import pick_device

PARALLEL = ("ddp", "fsdp")
STEP_PATIENCE = timedelta(minutes=30)  # for gradients of a process that is late
LEAD_PATIENCE = timedelta(hours=12)  # for the lead: packing, previews, saving

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """All processes of a run as one of them sees them. `world` 1 is a run without torchrun."""

    device: torch.device
    rank: int = 0
    world: int = 1
    parallel: str = "ddp"
    # Torch's process group for decisions, by a weak reference: see `join`. None in a world of one.
    control: weakref.ref[torch.distributed.ProcessGroup] | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether every process holds only its share of the weights (FSDP2)."""
        return self.world > 1 and self.parallel == "fsdp"

    def together(self, work: Callable[[], T], lead_first: bool = False) -> T:
        """The result of `work` on every process; where it fails on one, that one says why and all end.

        lead_first: the others begin when the lead is done, and so find what it wrote. `work` itself must not wait for
        other processes.
        """
        if self.world == 1:
            return work()
        result = None
        for turn in (self.leads, not self.leads) if lead_first else (True,):
            error = None
            if turn:
                try:
                    result = work()
                except UserError as caught:
                    error = caught
            self._end_if_any(error)
        return result

    def agree(self, seconds: float, signal_number: int) -> tuple[float, int]:
        """(the fewest seconds, the number of a signal that any process got or 0), the same on every process.

        Where one stood still the others waited, and only its own clock knows.
        """
        if self.world == 1:
            return seconds, signal_number
        told = torch.tensor([-seconds, signal_number], dtype=torch.float64)
        self._reduce(told, "MAX")
        return -told[0].item(), int(told[1])

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        self._reduce(total, "SUM")
        return total

    def copy_from_lead(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite these CPU tensors with the lead's."""
        for name in sorted(tensors) if self.world > 1 else ():
            torch.distributed.broadcast(tensors[name], 0, group=self.control())

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            torch.distributed.barrier(group=self.control())

    def check_same_step(self, step: int | None, folder: object) -> None:
        """CheckpointError when the processes found different states in a run's folder. step: None where no run is."""
        if self.world == 1:
            return
        least, most = (int(end) for end in self._ends(torch.tensor(-1 if step is None else step)))
        what = "a run, and no run," if least < 0 else f"states of steps {least} to {most}"
        sentence = f"the processes found {what} in {folder}: put it where all nodes see the same files"
        self._end_if_any(CheckpointError(sentence) if least != most else None)

    def check_agreed(self, said: Mapping[str, Any]) -> None:
        """UserError, with the names, where the processes say other things under the same ones (JSON values)."""
        if self.world == 1:
            return
        digests = [hashlib.sha256(json.dumps(said[name], sort_keys=True).encode()).digest() for name in sorted(said)]
        least, most = self._ends(torch.tensor([int.from_bytes(digest[:7]) for digest in digests]))
        other = [name for name, same in zip(sorted(said), (least == most).tolist(), strict=True) if not same]
        sentence = f"the processes disagree on {', '.join(other)}: give all the same options and the same files"
        self._end_if_any(UserError(sentence) if other else None)

    def end_where(self, guilty: bool, error: UserError) -> NoReturn:
        """Every process ends: the guilty ones by `error`, the others without a word by its exit code; if none is, all.

        For what all notice at once, though it came about on some.
        """
        if self.sum(torch.tensor(int(guilty))) and not guilty:
            raise SystemExit(error.exit_code)
        raise error

    def facts(self, config: TrainConfig) -> dict:
        """What a saved state says of who wrote it: all that may change on the way, and the last bits with it."""
        said = {"processes": self.world, "parallel": self.parallel if self.world > 1 else "none"}
        said["accumulate"] = config.accumulate
        return said | machine(self.device, config.precision)

    def _ends(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(the least, the most) over all processes of each of these whole numbers."""
        ends = torch.stack((-values, values))
        self._reduce(ends, "MAX")
        return -ends[0], ends[1]

    def _reduce(self, tensor: Tensor, operation: str) -> None:
        torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, operation), group=self.control())

    def _end_if_any(self, error: UserError | None) -> None:
        """The first process that failed raises its error; the others end without a word, by the same exit code."""
        said = torch.tensor([self.world if error is None else self.rank, -error.exit_code if error else 0])
        self._reduce(said, "MIN")
        first, code = int(said[0]), -int(said[1])
        if error is not None and first == self.rank:
            raise error
        if first < self.world:
            raise SystemExit(code)


@contextmanager
def join(device: str, parallel: str | None) -> Iterator[Group]:
    """The group that torchrun put this process in, or a group of one. UserError for a mode or device that is not there.

    A process that loses the others ends with a TrainingError: which of them failed first says its own message.

    A thread of gloo's that lets go of a tensor needs Python, and ends the process by SIGABRT where Python is ending.
    Only torch owns the group for decisions, so that destroying it here waits for its threads, whoever holds the Group.
    """
    if parallel is not None and parallel not in PARALLEL:
        raise UserError(f"unknown --parallel {parallel!r}: {did_you_mean(parallel, PARALLEL)}")
    shards = find_shards(None, "windows", {n: os.environ[n] for n in _VARIABLES if n in os.environ})
    rank, world = shards.windows
    if device.startswith("cuda:") and world > 1 and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UserError(f"--device {device} would put all processes of this box on one GPU: give --device cuda")
    where = pick_device(choose_device(device, shards))
    if world == 1:
        yield Group(where)
        return

    import torch.distributed as dist

    if where.type == "cuda":
        torch.cuda.set_device(where)
    try:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=STEP_PATIENCE)
        control = weakref.ref(dist.new_group(backend="gloo", timeout=LEAD_PATIENCE))
    except (ValueError, dist.DistError) as error:
        raise UserError(
            f"RANK {rank} of WORLD_SIZE {world} finds no other processes ({_reason(error)}): unset both, or start with "
            "torchrun"
        ) from None
    try:
        yield Group(where, rank, world, parallel or "ddp", control)
    except (UserError, SystemExit) as error:  # agreed on, or the others will notice: leave no thread for Python's end
        dist.destroy_process_group()
        if isinstance(error, Interrupted) and rank:  # all of them, after the same step
            raise SystemExit(error.exit_code) from None
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(name in str(error) for name in ("gloo", "NCCL")):
            raise
        raise TrainingError(
            f"process {rank} of {world} lost the others ({_reason(error)}): see which failed first, then give the "
            "same command again"
        ) from error
    else:
        dist.destroy_process_group()


def refuse_several(what: str) -> None:
    """UserError under torchrun with several processes, for what one process does alone."""
    if processes(os.environ)[1] > 1:
        raise UserError(f"{what} runs as one process: start it without torchrun")


def _reason(error: Exception) -> str:
    """What torch.distributed says, without its line of C++."""
    return re.sub(r"^\[[^]]*\] ", "", str(error)).split(". ")[0].splitlines()[0]


def what_changed(before: dict, group: Group, config: TrainConfig) -> str | None:
    """One sentence on a run that goes on in another way than its state was written in, or None.

    before: the `facts` of then; those that an older version did not write are not compared.
    """
    now = group.facts(config)
    changed = {name: before[name] for name in now if name in before and before[name] != now[name]}
    if not changed:
        return None
    said = []
    if "processes" in changed or "parallel" in changed:
        processes = _counted(group.world, "process", "processes")
        if "processes" in changed:
            processes += f" instead of {changed['processes']}"
        if "none" not in (before["parallel"], now["parallel"]) and "parallel" in changed:
            processes += f" by {now['parallel']} instead of {changed['parallel']}"
        said.append(processes)
    if "accumulate" in changed:
        said.append(f"--accumulate {config.accumulate} instead of {changed['accumulate']}")
    said += machine_changes(changed, now)
    return (
        f"resuming with {', '.join(said)}: steps stay the same up to rounding, "
        f"the global batch stays {config.batch}, each process takes {config.batch // group.world} clips"
    )


def machine(device: torch.device, precision: str) -> dict:
    """What a saved state says of the machine that wrote it, where the last bits go with it: on CPUs."""
    if device.type != "cpu":
        return {}
    return {"threads": torch.get_num_threads(), "products": products.library(precision)}


def machine_changes(before: dict, now: dict) -> list[str]:
    """What is another than before of what `machine` says, for people; what an older version did not write is not."""
    said = []
    if before.get("threads", now.get("threads")) != now.get("threads"):
        said.append(f"{_counted(now['threads'], 'thread', 'threads')} instead of {before['threads']}")
    if before.get("products", now.get("products")) != now.get("products"):
        said.append(f"products by {now['products']} instead of {before['products']}")
    return said


def _counted(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
