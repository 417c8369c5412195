"""Shards: which share of the work a process does, and how shares of one cell become whole again.

Whole cells are shared by `--shard`, or by SLURM's array; the windows of every cell by the processes of torchrun. They
talk through files alone, written whole or not at all: whoever finishes a cell's last part joins the parts. Noise
belongs to the window, so the numbers are those of one process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli import disk
from ahriuwu_cli.errors import DataError, UserError, did_you_mean

if TYPE_CHECKING:
    from ahriuwu_cli.evaluation.measure import Measured
    from ahriuwu_cli.evaluation.protocol import WindowManifest
    from ahriuwu_cli.evaluation.score_files import Shapes

FORMAT = "ahriuwu-part/2"
SHARES = ("windows", "cells")  # what the processes of torchrun share


@dataclass(frozen=True)
class Shards:
    """This process's (index from 0, count): of the cells, and of the windows of each. source: who said so."""

    cells: tuple[int, int] = (0, 1)
    windows: tuple[int, int] = (0, 1)
    local_rank: int | None = None  # which GPU of the box; None outside torchrun
    source: str = ""

    @property
    def leads(self) -> bool:
        """Whether this process speaks for the others that torchrun started with it."""
        return self.windows[0] == 0

    def of_cells(self, count: int) -> range:
        """The numbers of this process's cells, every n-th of `count`."""
        return range(self.cells[0], count, self.cells[1])


def find_shards(shard: str | None, share: str, environment: Mapping[str, str]) -> Shards:
    """From --shard i/n (i from 1), else SLURM's array variables, and from torchrun's RANK and WORLD_SIZE. UserError.

    share: what torchrun's processes share, the windows of every cell or the (shard's) cells.
    """
    if share not in SHARES:
        raise UserError(f"--share {share!r} is not known: {did_you_mean(share, SHARES)}")
    cells, sources = (0, 1), []
    if shard is not None:
        cells = _parse_shard(shard)
        sources.append(f"cells {cells[0] + 1}/{cells[1]} by --shard")
    elif "SLURM_ARRAY_TASK_ID" in environment:
        cells = _from_slurm(environment)
        sources.append(f"cells {cells[0] + 1}/{cells[1]} by SLURM_ARRAY_TASK_ID")
    windows, local = (0, 1), None
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = processes(environment)
        local = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0
        if share == "cells":
            cells = (cells[0] * world_size + rank, cells[1] * world_size)
        else:
            windows = (rank, world_size)
        sources.append(f"{share} {rank + 1}/{world_size} by RANK")
    return Shards(cells, windows, local, ", ".join(sources))


def processes(environment: Mapping[str, str]) -> tuple[int, int]:
    """(which of torchrun's processes this is, how many there are) by RANK and WORLD_SIZE; (0, 1) without either.

    UserError when one of them is no number, or they contradict each other.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return 0, 1
    rank, world_size = (_number(environment, name) for name in ("RANK", "WORLD_SIZE"))
    if rank >= world_size:
        raise UserError(f"RANK {rank} is not below WORLD_SIZE {world_size}: unset both, or start with torchrun")
    return rank, world_size


def choose_device(name: str, shards: Shards) -> str:
    """cuda:LOCAL_RANK for `auto` and `cuda` under torchrun where there are GPUs; otherwise the name as it is."""
    import torch

    if shards.local_rank is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    count = torch.cuda.device_count()
    if shards.local_rank >= count:
        raise UserError(
            f"LOCAL_RANK is {shards.local_rank}, but this box has {count} GPU(s): "
            f"start torchrun with --nproc-per-node {count}, or give --device cpu"
        )
    return f"cuda:{shards.local_rank}"


def shard_windows(manifest: WindowManifest, rank: int, world_size: int) -> range:
    """Which windows process `rank` scores: equal runs up to 1, in order; empty for more processes than windows."""
    parts = part_count(manifest, world_size)
    count = len(manifest.windows)
    return range(rank * count // parts, (rank + 1) * count // parts) if rank < parts else range(0)


def part_count(manifest: WindowManifest, world_size: int) -> int:
    """How many processes get windows."""
    return min(world_size, len(manifest.windows))


def part_file(folder: Path, digest: str, rank: int, parts: int) -> Path:
    """Where the part of one process lies."""
    return folder / f"{digest}.part-{rank + 1}-of-{parts}.safetensors"


def write_part(path: Path, measured: Measured, identity: dict[str, Any]) -> None:
    """The tables of some windows with the settings that they were measured with."""
    from ahriuwu_cli.evaluation.score_files import flat, write_scores

    facts = {"not_finite": measured.not_finite, "frames": measured.frames, "seconds": measured.seconds}
    write_scores(path, FORMAT, flat(measured.tables), identity, facts)


def read_part(path: Path, identity: dict[str, Any], expected: Shapes) -> Measured:
    """FileNotFoundError when it is not there, DataError when it is damaged or holds other settings or windows."""
    from ahriuwu_cli.evaluation.measure import Measured
    from ahriuwu_cli.evaluation.score_files import read_scores, tables_of
    from ahriuwu_cli.evaluation.table_check import check_tables

    def sound(arrays, facts) -> bool:
        seeds, counts = identity["evaluation"]["noise_seeds"], facts["not_finite"]
        lost = check_tables(tables_of(arrays), seeds)  # a mean over noise seeds lacks what one of them lacks
        fits = counts.keys() == lost.keys() and all(lost[n] <= counts[n] <= lost[n] * seeds for n in counts)
        return fits and facts["frames"] == arrays["model/psnr"].size * seeds

    if not path.exists():
        raise FileNotFoundError(path)
    kinds = {"not_finite": dict, "frames": int, "seconds": float}
    try:
        arrays, facts = read_scores(path, FORMAT, identity, expected, kinds, sound)
    except DataError:
        if path.exists():
            raise
        raise FileNotFoundError(path) from None  # another process joined it meanwhile
    return Measured(tables_of(arrays), **facts)


def join_measured(parts: Sequence[Measured]) -> Measured:
    """Parts in the order of their windows as one; seconds are those of the slowest, since parts run side by side."""
    from ahriuwu_cli.evaluation.measure import Measured
    from ahriuwu_cli.evaluation.scores import join

    names = list(dict.fromkeys(name for p in parts for name in p.not_finite))
    not_finite = {name: sum(p.not_finite.get(name, 0) for p in parts) for name in names}
    return Measured(
        join([p.tables for p in parts]), not_finite, sum(p.frames for p in parts), max(p.seconds for p in parts)
    )


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file to a free name beside it; None when another process was faster."""
    try:
        return disk.set_aside(path)
    except FileNotFoundError:
        return None


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text!r} is not a share: write 1/4 to 4/4 for four shards")
    return int(match[1]) - 1, int(match[2])


def _from_slurm(environment: Mapping[str, str]) -> tuple[int, int]:
    task, count = _number(environment, "SLURM_ARRAY_TASK_ID"), _number(environment, "SLURM_ARRAY_TASK_COUNT")
    first = _number(environment, "SLURM_ARRAY_TASK_MIN") if "SLURM_ARRAY_TASK_MIN" in environment else 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    last = _number(environment, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in environment else None
    gaps = last is not None and last != first + (count - 1) * step
    if gaps or step < 1 or (task - first) % step or not 0 <= (task - first) // step < count:
        raise UserError(
            f"SLURM's array has gaps (task {task} of {count} from {first}), so shares would be left out: "
            f"use --array=0-{max(count - 1, 0)}, or give --shard"
        )
    return (task - first) // step, count


def _number(environment: Mapping[str, str], name: str) -> int:
    if name not in environment:
        raise UserError(f"SLURM_ARRAY_TASK_ID is set, but not {name}: give --shard 1/4 or the like")
    if not re.fullmatch(r"[0-9]{1,9}", environment[name]):
        raise UserError(f"the environment variable {name} is {environment[name]!r}, not a whole number: unset it")
    return int(environment[name])
