"""The config.json of a checkpoint, read strictly: its fields, their types and ranges, and the hashes that seal it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.documents import document_hash, read_object
from ahriuwu_cli.data.metadata import MAX_FPS, MIN_FPS
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import CheckpointError, UserError
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.ranges import FRAME_SKIP
from ahriuwu_cli.rollout import RolloutConfig, check_generation

FORMAT, UNSEALED = "ahriuwu-checkpoint/2", "ahriuwu-checkpoint/1"  # the latter from before there were hashes
_SEAL = {"weights_sha256", "sha256"}
WORLD = {
    "format", "kind", "tau_convention", "architecture", "tokenizer_hash", "action_space", "fps", "frame_skip",
    "trained_d", "forcing", "trained_unlabelled", "generation", "facts",
}  # fmt: skip
_KINDS = {"tau_convention": str, "architecture": dict, "tokenizer_hash": str, "trained_d": list, "forcing": str,
          "trained_unlabelled": bool, "generation": dict, "facts": dict, "tokenizer": str}  # fmt: skip
MAX_STEPS = 4096  # K that a checkpoint may ask for by default
TOKENIZER = {"format", "kind", "tokenizer", "architecture", "facts"}


def read_config(folder: Path, kind: str, names: set[str]) -> dict:
    """The config.json of a checkpoint of a kind: exactly these fields, and their types. CheckpointError."""
    file = folder / "config.json"
    if not folder.exists():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        document = read_object(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error})") from None
    if document.get("format") not in (FORMAT, UNSEALED):
        raise CheckpointError(f"{file} is not an ahriuwu checkpoint of format {FORMAT!r}")
    if document.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {document.get('kind')}, but a {kind} checkpoint is needed here")
    if kind == "dynamics" and "tau_convention" not in document:
        raise CheckpointError(f"{file} states no tau convention: refused, since 0 could be clean or noise")
    wrong = sorted(set(document) ^ (names | (_SEAL if document["format"] == FORMAT else set())))
    if wrong:
        raise CheckpointError(f"{file} has missing or unknown fields: {', '.join(wrong)}")
    for name, type_ in _KINDS.items():
        if name in names and type(document[name]) is not type_:
            raise CheckpointError(f"{file}: {name} is {str(document[name])[:40]!r}, which has the wrong type")
    return document


def seal(document: dict) -> dict:
    """A config.json's document with the sha256 over all fields but that one."""
    kept = {name: value for name, value in document.items() if name != "sha256"}
    return kept | {"sha256": document_hash(kept)}


def identity(document: dict) -> str:
    """What makes a world this one and no other: the hash of all but its facts and how it is rolled out by default.

    The weights' hash is part of it; `sweep-tau --write-back` changes nothing of it.
    """
    return document_hash({n: value for n, value in document.items() if n not in ("generation", "facts", "sha256")})


def check_seal(folder: Path, document: dict) -> None:
    """CheckpointError when config.json or the weights are not what was saved, by their hashes."""
    if document["format"] == UNSEALED:
        return
    if seal(document)["sha256"] != document["sha256"]:
        raise CheckpointError(
            f"{folder / 'config.json'} was altered after it was written (its sha256 differs): use another copy"
        )
    if file_hash(folder / "model.safetensors") != document["weights_sha256"]:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} was altered after it was written (its sha256 differs): use another copy"
        )


def numbers_of(document: dict, k_max: int) -> tuple[float, int, tuple[float, ...]]:
    """(fps, frame_skip, trained_d). ValueError for numbers that no world of ours has."""
    fps, skip, trained = document["fps"], document["frame_skip"], document["trained_d"]
    if type(fps) not in (int, float) or not MIN_FPS <= fps <= MAX_FPS:
        raise ValueError(f"fps is {fps!r}, not a rate from {MIN_FPS} to {MAX_FPS:g}")
    least, most = FRAME_SKIP
    if type(skip) is not int or not least <= skip <= most:
        raise ValueError(f"frame_skip is {skip!r}, not a whole number from {least} to {most}")
    sizes = [2.0**-i for i in range(k_max.bit_length())]
    known = len(trained) <= len(sizes) and all(type(d) in (int, float) and d in sizes for d in trained)
    if not known or len(set(trained)) < len(trained) or sizes[-1] not in trained:
        raise ValueError(f"trained_d is {str(trained)[:40]}, not step sizes 1, 1/2, ... with 1/{k_max} among them")
    return float(fps), skip, tuple(float(d) for d in trained)


def check_facts(facts: dict) -> None:
    """Facts are for people, but for the run's settings and a few that are counted with. ValueError."""
    train, other = facts.get("train") or {}, facts.get("averaged_with") or {}
    if not isinstance(train, dict) or type(facts.get("git") or "") is not str:
        raise ValueError("facts: train is no object, or git no text")
    if not isinstance(other, dict) or type(other.get("command") or "") is not str:
        raise ValueError("facts: averaged_with is no object, or its command no text")
    try:
        TrainConfig.check_stated(train)
    except ValueError as error:
        raise ValueError(f"facts.train: {error}") from None
    most = {"train_seconds": (facts, 1e12), "frames": (train, 10_000), "long_frames": (train, 10_000)}
    for name, (where, high) in most.items():
        value = where.get(name)
        if value is not None and (type(value) not in (int, float) or not 0 <= value <= high):
            raise ValueError(f"facts: {name} is {str(value)[:40]!r}, not a number from 0 to {high:g}")


def generation_of(stored: dict, k_max: int) -> RolloutConfig:
    """How a world is rolled out by default. ValueError for fields or values that no world of ours has."""
    # Worlds saved before `ctx_label` existed lack it; honest labels were the only ones then. Nothing else is defaulted.
    stored = {"ctx_label": "honest"} | stored
    wrong = sorted(set(stored) ^ {f.name for f in fields(RolloutConfig)})
    if wrong:
        raise ValueError(f"generation has missing or unknown fields: {', '.join(wrong)}")
    for name in ("sampler", "ctx_mode", "ctx_label"):
        if type(stored[name]) is not str:
            raise ValueError(f"generation.{name} is {stored[name]!r}, not a text")
    if type(stored["steps"]) is not int or not 1 <= stored["steps"] <= MAX_STEPS:
        raise ValueError(f"generation.steps is {stored['steps']!r}, not a whole number from 1 to {MAX_STEPS}")
    if type(stored["tau_ctx"]) not in (int, float) or not 0 <= stored["tau_ctx"] < 1:
        raise ValueError(f"generation.tau_ctx is {stored['tau_ctx']!r}, not in [0, 1) where 0 is clean")
    config = RolloutConfig(**stored)
    try:
        check_generation(config, k_max)
    except UserError as error:  # a word on options: here nobody gave one
        raise ValueError(f"its own rollouts could not be made: {error}") from None
    return config


def dynamics_config(architecture: dict) -> DynamicsConfig:
    """The architecture that a config.json describes. ValueError or TypeError for one that cannot be."""
    names = {f.name for f in fields(DynamicsConfig)}
    wrong = sorted(set(architecture) ^ names)
    if wrong:
        raise ValueError(f"architecture has missing or unknown fields: {', '.join(wrong)}")
    slots = tuple((kind, size, tuple(low), tuple(high)) for kind, size, low, high in architecture["action_space"])
    return DynamicsConfig(**{**architecture, "action_space": slots})
