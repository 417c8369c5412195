"""Checkpoints: a folder with safetensors weights and JSON, written whole or not at all, loaded strictly.

    world/
      config.json          what it is: architecture, tau convention, k_max, trained d, action space, defaults, facts,
                           the sha256 of the weights, and its own
      model.safetensors    EMA weights of the dynamics
      tokenizer/           config.json and model.safetensors of the tokenizer that made its latents

A tokenizer alone is a folder of the same form. Nothing is ever pickled; an unknown, missing or misshapen field or
tensor is an error, never a default. Sizes are compared before memory is taken, hashes before anything is believed.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ahriuwu_cli.data import tensors as tensors_
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.documents import document_hash, to_json
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.disk import file_hash, write_inside
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.folders import holding, replacing, whole
from ahriuwu_cli.models.dynamics import Dynamics
from ahriuwu_cli.models.tokenizer import Tokenizer, tokenizer_class
from ahriuwu_cli.places import is_run
from ahriuwu_cli.printing import some_of
from ahriuwu_cli.training.config_json import (
    FORMAT,
    TOKENIZER,
    UNSEALED,
    WORLD,
    check_facts,
    check_seal,
    dynamics_config,
    generation_of,
    numbers_of,
    read_config,
    seal,
)
from ahriuwu_cli.training.state import write_tensors
from ahriuwu_cli.world import World


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\n|\. ", str(error))[0]  # after that torch lists what it knows
        raise UserError(f"device {name!r} cannot be used ({reason}): try --device cpu") from None
    return device


def save_world(world: World, folder: Path) -> None:
    """Write the world as a checkpoint folder: under a temporary name first, then renamed over what was there."""
    with replacing(folder) as temporary:
        fill_with_world(world, temporary)


def fill_with_world(world: World, folder: Path) -> None:
    """Write the files of a world into a new folder, for who puts it in place (`folders.replacing`)."""
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
    _write_module(folder, world.dynamics, document)
    (folder / "tokenizer").mkdir()
    _write_module(folder / "tokenizer", world.tokenizer, _tokenizer_document(world.tokenizer, {}))


def load_world(path: Path | str, device: str = "auto") -> World:
    """Load a world from a checkpoint folder, or from a run folder (its `best`). CheckpointError in a sentence.

    While a run saves it: all of one save (`folders.whole`). The device is looked for first.
    """
    where, folder = pick_device(device), _resolve(Path(path))
    return whole(folder, lambda: _load_world(folder, where))


def _load_world(folder: Path, where: torch.device) -> World:
    document = read_config(folder, "dynamics", WORLD)
    if document["tau_convention"] != tau_.CONVENTION:
        raise CheckpointError(
            f"{folder} was trained with the convention {document['tau_convention']!r}, this is {tau_.CONVENTION!r}: "
            f"its noise levels would run backwards; train anew"
        )
    tokenizer, inner = _open_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint() != document["tokenizer_hash"]:
        raise CheckpointError(
            f"{folder / 'tokenizer'} is not the tokenizer that this model was trained with "
            f"(hash {tokenizer.fingerprint()[:12]}, expected {str(document['tokenizer_hash'])[:12]}): restore it"
        )
    try:
        config = dynamics_config(document["architecture"])
        action_space = ActionSpace.from_json(document["action_space"], "action_space")
        generation = generation_of(document["generation"], config.k_max)
        numbers = numbers_of(document, config.k_max)
        check_facts(document["facts"])
    except (TypeError, ValueError, DataError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from None
    if config.action_space != action_slots(action_space):
        raise CheckpointError(f"{folder / 'config.json'}: architecture and action_space name different actions")
    config = replace(config, action_space=action_slots(action_space))
    if (config.tokens, config.latent_dim) != (tokenizer.tokens, tokenizer.latent_dim):
        raise CheckpointError(f"{folder}: the model's latents and the tokenizer's have different shapes")
    dynamics = build_with_weights(lambda: Dynamics(config), config.stored, folder / "model.safetensors")
    check_seal(folder / "tokenizer", inner)
    check_seal(folder, document)
    if document["format"] == UNSEALED:
        _say(f"{folder} is of {UNSEALED!r}, without hashes: damage would not be noticed; `ahriuwu export` adds them")
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
        config_hash=document_hash(document),
    )


def is_sound(folder: Path) -> bool:
    """Whether a world is there as it was saved, by its hashes, with the tokenizer that it was trained with."""
    inside = folder / "tokenizer"
    if not (_is_sealed(folder, "dynamics", WORLD) and is_sound_tokenizer(inside)):
        return False
    try:
        return load_tokenizer(inside).fingerprint() == read_config(folder, "dynamics", WORLD)["tokenizer_hash"]
    except CheckpointError:
        return False


def is_sound_tokenizer(folder: Path) -> bool:
    """The same of a tokenizer's folder."""
    return _is_sealed(folder, "tokenizer", TOKENIZER)


def _is_sealed(folder: Path, kind: str, names: set[str]) -> bool:
    try:
        document = read_config(folder, kind, names)
        _header(folder / "model.safetensors")  # sizes first: a hash takes as long as the file is large
        check_seal(folder, document)
    except (CheckpointError, OSError):
        return False
    return True


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    facts: dict,
    overwrite: bool = True,
    then: Callable[[], None] = lambda: None,
    own: tuple[str, ...] | None = None,
) -> None:
    """Write a tokenizer folder, temporary name first. overwrite False: UserError where something came meanwhile.

    then, own: as of `replacing`.
    """
    with replacing(folder, overwrite, then, own) as temporary:
        _write_module(temporary, tokenizer, _tokenizer_document(tokenizer, facts))


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Load a tokenizer folder, or the tokenizer inside a world. CheckpointError in a sentence."""
    folder = Path(path)

    def read() -> Tokenizer:
        inside = folder / "tokenizer"
        where = inside if (inside / "config.json").is_file() else folder
        tokenizer, document = _open_tokenizer(where)
        check_seal(where, document)
        if document["format"] == UNSEALED:
            _say(f"{where} is of {UNSEALED!r}, without hashes: damage would not be noticed; train it anew for them")
        return tokenizer

    return whole(folder, read)


def _open_tokenizer(folder: Path) -> tuple[Tokenizer, dict]:
    """The tokenizer and its config.json, whose hashes are still to be checked."""
    document = read_config(folder, "tokenizer", TOKENIZER)
    try:
        kind, architecture = tokenizer_class(document["tokenizer"]), document["architecture"]
        tokenizer = build_with_weights(
            lambda: kind.from_json(architecture), kind.stored(architecture), folder / "model.safetensors"
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be used: {error}") from None
    return tokenizer.eval().requires_grad_(False), document


def tokenizer_facts(folder: Path) -> dict:
    """What a tokenizer folder says of how its tokenizer came about. CheckpointError."""
    return read_config(folder, "tokenizer", TOKENIZER)["facts"]


def build_with_weights(build: Callable[[], nn.Module], stored: int, path: Path) -> nn.Module:
    """What `build` makes, with the weights of a safetensors file: exactly its names and shapes. CheckpointError.

    stored: how many numbers its checkpoint holds. A configuration that describes more than the file holds by its header
    is refused before it is built, that is before memory is taken.
    """
    found = _header(path)
    count = sum(math.prod(info.shape) for info in found.values())
    if stored > count:
        raise CheckpointError(f"{path} does not fit its config.json: it holds {count} numbers, {stored} are described")
    module = build()
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += sorted(n for n in expected.keys() & found.keys() if expected[n] != found[n].shape)
    if wrong:
        raise CheckpointError(f"{path} does not fit its config.json: {some_of(wrong, 3)} differ")
    tensors = read_tensors(path)
    odd = sorted(n for n, t in module.state_dict().items() if t.is_floating_point() != tensors[n].is_floating_point())
    if odd:
        raise CheckpointError(f"{path} holds {odd[0]} as {tensors[odd[0]].dtype}, which is no format of weights")
    module.load_state_dict(tensors, strict=True)
    held = module.state_dict()  # in the module's own formats, which may be narrower than the file's
    bad = sorted(n for n, t in held.items() if t.is_floating_point() and not torch.isfinite(t).all())
    if bad:
        raise CheckpointError(f"{path} holds weights that are not finite ({bad[0]}): use an earlier checkpoint")
    return module


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. CheckpointError when it is missing or damaged."""
    _header(path)
    try:
        return tensors_.read_tensors(path)
    except DataError as error:
        raise CheckpointError(f"the weights are damaged: {error}") from None


def _header(path: Path) -> dict[str, tensors_.TensorInfo]:
    if not path.exists():
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete")
    try:
        return tensors_.read_header(path)
    except DataError as error:
        raise CheckpointError(f"the weights are damaged: {error}") from None


def action_slots(space: ActionSpace) -> tuple:
    """The action space as the model's configuration holds it: (kind, size, low, high) of each component."""
    return tuple((c.kind, c.size, tuple(c.low), tuple(c.high)) for c in space.components)


def write_tau_ctx(world: World, tau_ctx: float, evidence: dict) -> None:
    """Store another default tau_ctx in a world's config.json, and under facts the evidence for it; all else stays.

    A temporary name first, then renamed; weights and tokenizer are not touched. CheckpointError when the folder that it
    was loaded from holds no world, or another one by now: a run that is alive saves a better `best` there.
    """
    folder = world.path
    with holding(folder) as (held, stays):
        before = read_config(folder, "dynamics", WORLD)
        if not stays() or document_hash(before) != world.config_hash:
            raise CheckpointError(f"{folder} holds another world than was measured: its tau_ctx stays, measure again")
        text = to_json(_with_tau_ctx(folder, before, tau_ctx, evidence), 1)
        try:
            write_inside(held, "config.json", text)
        except FileNotFoundError:  # the folder is removed already
            if stays():
                raise
        if not stays():
            raise CheckpointError(f"{folder} was replaced at this moment: its tau_ctx stays, measure again")


def _with_tau_ctx(folder: Path, before: dict, tau_ctx: float, evidence: dict) -> dict:
    document = dict(before)
    generation = generation_of(document["generation"], dynamics_config(document["architecture"]).k_max)
    changed = asdict(generation) | {"tau_ctx": tau_ctx}
    document |= {"generation": changed, "facts": document["facts"] | {"tau_ctx_evidence": evidence}}
    if document["format"] != UNSEALED:
        check_seal(folder, before)
        document = seal(document)
    return document


def _tokenizer_document(tokenizer: Tokenizer, facts: dict) -> dict:
    return {
        "format": FORMAT,
        "kind": "tokenizer",
        "tokenizer": tokenizer.kind,
        "architecture": tokenizer.to_json(),
        "facts": facts,
    }


def _write_module(folder: Path, module: nn.Module, document: dict) -> None:
    """Under the module's own names, also where torch.compile wrapped it or a part of it."""
    tensors = {n.replace("_orig_mod.", ""): t.detach().cpu().contiguous() for n, t in module.state_dict().items()}
    write_tensors(folder / "model.safetensors", tensors, {"format": FORMAT, "tau_convention": tau_.CONVENTION})
    document = seal(document | {"weights_sha256": file_hash(folder / "model.safetensors")})
    (folder / "config.json").write_text(to_json(document, 1))


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _resolve(path: Path) -> Path:
    """The world that a path means: its own folder, or a run's `best`, even in the instant in which that is replaced."""
    in_run = (path / "best" / "config.json").is_file() or is_run(path)
    return path / "best" if in_run and not (path / "config.json").is_file() else path
