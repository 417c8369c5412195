"""What `ahriuwu info` says of model sizes, worlds, tokenizers and runs."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.diffusion.tau import CONVENTION
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.models.dynamics import Dynamics, count_parameters
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.places import is_run
from ahriuwu_cli.printing import one_line
from ahriuwu_cli.training.asked import known_run
from ahriuwu_cli.training.checkpoint import load_tokenizer, load_world


def describe_sizes() -> dict[str, Any]:
    """The size table with parameter counts, from models that are built but never filled."""
    rows = []
    for name, size in SIZES.items():
        with torch.device("meta"):
            parameters = count_parameters(Dynamics(DynamicsConfig(**size)))
        rows.append({"size": name, "parameters": parameters, **size})
    return {"sizes": rows}


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """Facts of a world, tokenizer or run folder; DataError when it is none of them."""
    if is_run(path) and not (path / "best" / "config.json").is_file():
        if known_run(path)[0]["kind"] != "tokenizer":
            raise DataError(f"{path} is a run that has not saved a world yet: wait for its first preview")
        if not (path / "tokenizer" / "config.json").is_file():
            raise DataError(f"{path} is a run that has not saved its tokenizer yet: it does so at its end")
    if _is_world(path) or (path / "best" / "config.json").is_file():
        world = load_world(path, "cpu")
        return {
            "world": str(world.path),
            "parameters": count_parameters(world.dynamics.requires_grad_(True)),
            "convention": CONVENTION,
            "frames": f"{world.tokenizer.height}x{world.tokenizer.width} at {world.fps:g} per second",
            "actions": ", ".join(world.action_space.column_names) or "none",
            "tokenizer": f"{world.tokenizer.kind} {world.tokenizer.fingerprint()[:12]}",
            "trained_d": list(world.trained_d),
            "forcing": world.forcing,
            "generation": asdict(world.generation),
            "architecture": {k: v for k, v in world.dynamics.config.to_json().items() if k != "action_space"},
            "facts": {k: v for k, v in world.facts.items() if k not in ("train", "architecture")},
            "train": world.facts.get("train"),
        }
    if (path / "config.json").is_file() or (path / "tokenizer" / "config.json").is_file():
        tokenizer = load_tokenizer(path)
        shape = f"{tokenizer.height}x{tokenizer.width} -> {tokenizer.tokens} tokens x {tokenizer.latent_dim}"
        return {"tokenizer": tokenizer.kind, "frames": shape, "hash": tokenizer.fingerprint(), **tokenizer.to_json()}
    raise DataError(f"{path} is not a dataset, world, tokenizer or run: give a folder that a command of ours wrote")


def _is_world(path: Path) -> bool:
    """Whether it is a world's folder, by what it says of itself or has beside it: what it lacks, its loader tells."""
    with suppress(OSError, ValueError):
        kind = read_object(path / "config.json").get("kind")
        if kind in ("dynamics", "tokenizer"):
            return kind == "dynamics"
    return (path / "tokenizer" / "config.json").is_file() and any(
        os.path.lexists(path / name) for name in ("config.json", "model.safetensors")
    )


def as_text(facts: dict[str, Any]) -> str:
    """Aligned lines for a terminal."""
    if "sizes" in facts:
        names = ("size", "parameters", "width", "depth", "heads", "kv_heads", "time_every", "window", "conditioning")
        sizes = [row | {"parameters": _millions(row["parameters"])} for row in facts["sizes"]]
        rows = [names] + [tuple(_cell(row[n]) for n in names) for row in sizes]
        widths = [max(len(r[i]) for r in rows) for i in range(len(names))]
        return "\n".join("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows)
    lines = []
    for name, value in facts.items():
        if name == "parameters":
            value = _millions(value)
        if isinstance(value, dict):
            value = ", ".join(f"{k} {_cell(v)}" for k, v in value.items() if v is not None)
        lines.append(f"{name:<13} {_cell(value)}")
    return "\n".join(map(one_line, lines))


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:,.2f}M" if parameters >= 10_000 else str(parameters)


def _cell(value: object) -> str:
    if not isinstance(value, list):
        return str(value)
    return ", ".join(f"{v:g}" if isinstance(v, (int, float)) else str(v) for v in value)
