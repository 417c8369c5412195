"""Checkpoints: a folder with safetensors weights and JSON, written whole or not at all, loaded strictly.

    world/
      config.json          what it is: architecture, tau convention, k_max, trained d, action space, defaults, facts
      model.safetensors    EMA weights of the dynamics
      tokenizer/           config.json and model.safetensors of the tokenizer that made its latents

A tokenizer alone is a folder of the same form. Nothing is ever pickled; an unknown, missing or misshapen field or
tensor is an error, never a default.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.folders import replacing, whole
from ahriuwu_cli.models.dynamics import Dynamics, DynamicsConfig
from ahriuwu_cli.models.tokenizer import Tokenizer, build_tokenizer
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training.state import write_tensors
from ahriuwu_cli.world import World

FORMAT = "ahriuwu-checkpoint/1"
_WORLD_FIELDS = {
    "format", "kind", "tau_convention", "architecture", "tokenizer_hash", "action_space", "fps", "frame_skip",
    "trained_d", "forcing", "trained_unlabelled", "generation", "facts",
}  # fmt: skip
_TOKENIZER_FIELDS = {"format", "kind", "tokenizer", "architecture", "facts"}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device cpu") from None
    return device


def save_world(world: World, folder: Path) -> None:
    """Write the world as a checkpoint folder: under a temporary name first, then renamed over what was there."""
    document = {
        "format": FORMAT,
        "kind": "dynamics",
        "tau_convention": tau_.CONVENTION,
        "architecture": world.dynamics.config.to_json(),
        "tokenizer_hash": world.tokenizer.fingerprint(),
        "action_space": world.action_space.to_json(),
        "fps": world.fps,
        "frame_skip": world.frame_skip,
        "trained_d": list(world.trained_d),
        "forcing": world.forcing,
        "trained_unlabelled": world.trained_unlabelled,
        "generation": asdict(world.generation),
        "facts": world.facts,
    }
    with replacing(folder) as temporary:
        _write_module(temporary, world.dynamics, document)
        (temporary / "tokenizer").mkdir()
        _write_module(temporary / "tokenizer", world.tokenizer, _tokenizer_document(world.tokenizer, {}))


def load_world(path: Path | str, device: str = "auto") -> World:
    """Load a world from a checkpoint folder, or from a run folder (its `best`). CheckpointError in a sentence.

    While a run saves it: all of one save (`folders.whole`). The device is looked for first.
    """
    where, folder = pick_device(device), _resolve(Path(path))
    return whole(folder, lambda: _load_world(folder, where))


def _load_world(folder: Path, where: torch.device) -> World:
    document = _read_config(folder, "dynamics", _WORLD_FIELDS)
    if document["tau_convention"] != tau_.CONVENTION:
        raise CheckpointError(
            f"{folder} was trained with the convention {document['tau_convention']!r}, this is {tau_.CONVENTION!r}: "
            f"its noise levels would run backwards; train anew"
        )
    tokenizer = _load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint() != document["tokenizer_hash"]:
        raise CheckpointError(
            f"{folder / 'tokenizer'} is not the tokenizer that this model was trained with "
            f"(hash {tokenizer.fingerprint()[:12]}, expected {str(document['tokenizer_hash'])[:12]}): restore it"
        )
    try:
        dynamics = Dynamics(_dynamics_config(document["architecture"]))
        action_space = ActionSpace.from_json(document["action_space"], f"{folder / 'config.json'}: action_space")
        generation = _generation(document["generation"])
        numbers = (float(document["fps"]), int(document["frame_skip"]), tuple(float(d) for d in document["trained_d"]))
    except (TypeError, ValueError, DataError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from None
    if dynamics.config.action_space != action_slots(action_space):
        raise CheckpointError(f"{folder / 'config.json'}: architecture and action_space name different actions")
    if (dynamics.config.tokens, dynamics.config.latent_dim) != (tokenizer.tokens, tokenizer.latent_dim):
        raise CheckpointError(f"{folder}: the model's latents and the tokenizer's have different shapes")
    load_weights(dynamics, folder / "model.safetensors")
    return World(
        dynamics=dynamics.to(where).eval().requires_grad_(False),
        tokenizer=tokenizer.to(where),
        action_space=action_space,
        fps=numbers[0],
        frame_skip=numbers[1],
        trained_d=numbers[2],
        forcing=document["forcing"],
        trained_unlabelled=document["trained_unlabelled"],
        generation=generation,
        path=folder,
        facts=document["facts"],
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, facts: dict) -> None:
    """Write a tokenizer folder, temporary name first."""
    with replacing(folder) as temporary:
        _write_module(temporary, tokenizer, _tokenizer_document(tokenizer, facts))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer folder, or the tokenizer inside a world. CheckpointError in a sentence."""
    folder = Path(path)

    def read() -> Tokenizer:
        inside = folder / "tokenizer"
        return _load_tokenizer(inside if (inside / "config.json").is_file() else folder)

    return whole(folder, read)


def _load_tokenizer(folder: Path) -> Tokenizer:
    document = _read_config(folder, "tokenizer", _TOKENIZER_FIELDS)
    try:
        tokenizer = build_tokenizer(document["tokenizer"], document["architecture"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from None
    load_weights(tokenizer, folder / "model.safetensors")
    return tokenizer.eval().requires_grad_(False)


def tokenizer_facts(folder: Path) -> dict:
    """What a tokenizer folder says of how its tokenizer came about. CheckpointError."""
    return _read_config(folder, "tokenizer", _TOKENIZER_FIELDS)["facts"]


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a safetensors file into a module, exactly: same names, shapes and number formats. CheckpointError if not."""
    tensors = read_tensors(path)
    expected = module.state_dict()
    wrong = sorted(set(expected) ^ set(tensors))
    wrong += sorted(n for n in set(expected) & set(tensors) if expected[n].shape != tensors[n].shape)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{path} does not fit its config.json: {', '.join(wrong[:3])}{more} differ")
    bad = sorted(n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all())
    if bad:
        raise CheckpointError(f"{path} holds weights that are not finite ({bad[0]}): use an earlier checkpoint")
    module.load_state_dict(tensors, strict=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. CheckpointError when it is missing or damaged."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}): the file is damaged") from None


def action_slots(space: ActionSpace) -> tuple:
    """The action space as the model's configuration holds it: (kind, size, low, high) of each component."""
    return tuple((c.kind, c.size, tuple(c.low), tuple(c.high)) for c in space.components)


def write_tau_ctx(folder: Path, tau_ctx: float, evidence: dict) -> None:
    """Store another default tau_ctx in a world's config.json, and under facts the evidence for it; all else stays.

    A temporary name first, then renamed; weights and tokenizer are not touched. CheckpointError when it is no world.
    """
    document = _read_config(folder, "dynamics", _WORLD_FIELDS)
    changed = asdict(_generation(document["generation"])) | {"tau_ctx": tau_ctx}
    document |= {"generation": changed, "facts": document["facts"] | {"tau_ctx_evidence": evidence}}
    temporary = folder / f".config.json.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(document, indent=1, allow_nan=False))
        os.replace(temporary, folder / "config.json")
    finally:
        temporary.unlink(missing_ok=True)


def _tokenizer_document(tokenizer: Tokenizer, facts: dict) -> dict:
    return {
        "format": FORMAT,
        "kind": "tokenizer",
        "tokenizer": tokenizer.kind,
        "architecture": tokenizer.to_json(),
        "facts": facts,
    }


def _write_module(folder: Path, module: nn.Module, document: dict) -> None:
    tensors = {name: t.detach().cpu().contiguous() for name, t in module.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": FORMAT, "tau_convention": tau_.CONVENTION})
    (folder / "config.json").write_text(json.dumps(document, indent=1))


def _resolve(path: Path) -> Path:
    """The world that a path means: its own folder, or a run's `best`, even in the instant in which that is replaced."""
    in_run = (path / "best" / "config.json").is_file() or (path / "run.json").is_file()
    return path / "best" if in_run and not (path / "config.json").is_file() else path


def _read_config(folder: Path, kind: str, names: set[str]) -> dict:
    file = folder / "config.json"
    if not folder.exists():
        raise CheckpointError(f"there is no checkpoint at {folder}")
    if not file.is_file():
        raise CheckpointError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        if file.stat().st_size > 10_000_000:
            raise ValueError("it is larger than 10 MB")
        document = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error})") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{file} is not an ahriuwu checkpoint of format {FORMAT!r}")
    if document.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {document.get('kind')}, but a {kind} checkpoint is needed here")
    if kind == "dynamics" and "tau_convention" not in document:
        raise CheckpointError(f"{file} states no tau convention: refused, since 0 could be clean or noise")
    wrong = sorted(set(document) ^ names)
    if wrong:
        raise CheckpointError(f"{file} has missing or unknown fields: {', '.join(wrong)}")
    return document


def _generation(stored: dict) -> RolloutConfig:
    # Worlds saved before `ctx_label` existed lack it; honest labels were the only ones then. Nothing else is defaulted.
    stored = {"ctx_label": "honest"} | stored
    wrong = sorted(set(stored) ^ {f.name for f in fields(RolloutConfig)})
    if wrong:
        raise ValueError(f"generation has missing or unknown fields: {', '.join(wrong)}")
    return RolloutConfig(**stored)


def _dynamics_config(architecture: dict) -> DynamicsConfig:
    names = {f.name for f in fields(DynamicsConfig)}
    wrong = sorted(set(architecture) ^ names)
    if wrong:
        raise ValueError(f"architecture has missing or unknown fields: {', '.join(wrong)}")
    slots = tuple((kind, size, tuple(low), tuple(high)) for kind, size, low, high in architecture["action_space"])
    return DynamicsConfig(**{**architecture, "action_space": slots})
