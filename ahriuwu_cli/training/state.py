"""Training state on disk: tensors in safetensors, everything else in JSON, replaced as one and refused when damaged.

A state is `state.json` and the one tensors file it names by hash. The tensors are written first and the rename of
`state.json` is the moment the new state counts: whatever stops the writing, the state before it can still be loaded.
Both renames are flushed. Nothing is pickled. Optimizers are flattened to plain tensors and JSON. What a run can go on
from stands in `state_check`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ahriuwu_cli.data.documents import is_hash, parse_object, read_json, to_json
from ahriuwu_cli.data.tensors import as_any_file, read_header, read_tensors
from ahriuwu_cli.disk import file_hash, sync
from ahriuwu_cli.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from ahriuwu_cli.training.state_check import Expected

T = TypeVar("T")
FORMAT = "ahriuwu-state-1"
MAX_BYTES = 100_000_000  # of the document, which lists every tensor of the optimisers
DOCUMENT = "state.json"


def save_state(folder: Path, tensors: Mapping[str, Tensor], document: dict[str, Any]) -> None:
    """Write tensors and a JSON document into `folder`, which is made if needed, in place of the state that is there.

    Tensors may lie on any device and share memory; each is stored by itself. ValueError when the document is not JSON
    (NaN and infinity are not: say None), OSError when the disk is full. Other files of the folder are left alone.
    """

    text = to_json(document, most=MAX_BYTES)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "state.safetensors.partial"
    write_tensors(partial, {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()})
    digest = file_hash(partial)
    sync(partial)
    partial.rename(folder / _tensors_name(digest))
    sync(folder)
    facts = {
        "format": FORMAT,
        "tensors_sha256": digest,
        "document_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "document": document,
    }
    partial = folder / (DOCUMENT + ".partial")
    partial.write_text(to_json(facts, 1, MAX_BYTES) + "\n")
    sync(partial)
    partial.rename(folder / DOCUMENT)
    sync(folder)
    for old in folder.glob("state-*.safetensors"):
        if old.name != _tensors_name(digest):
            old.unlink()


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU, as they were saved, dtype and bits) and the document of the state in `folder`.

    Tuples of the document come back as lists and its keys as strings. CheckpointError, one sentence, when the state is
    missing, cut short, altered or of another format.
    """
    document, digest = read_document(folder)
    return load_tensors(folder, document, digest), document


def load_tensors(
    folder: Path, document: dict[str, Any], digest: str, expected: Expected | None = None
) -> dict[str, Tensor]:
    """The tensors of the state in `folder`, whose document `read_document` gave. CheckpointError likewise.

    expected: what they must be. Sizes come first, since a hash takes as long as its file is large, then the hash.
    """
    path = folder / _tensors_name(digest)
    try:
        header = read_header(path)
        if expected is not None:
            expected.check(document, header)
        if file_hash(path) != digest:
            raise CheckpointError(f"{path} was altered after it was written (its sha256 differs): use another state")
        tensors = read_tensors(path)
        if expected is not None:
            expected.check_values(tensors)
        return tensors
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    except DataError as error:
        raise CheckpointError(f"{folder} has no sound tensors ({error}): use another state") from None
    except ValueError as error:
        raise CheckpointError(f"{folder} is no state of this run ({error}): use another state") from None


def read_document(folder: Path) -> tuple[dict[str, Any], str]:
    """The document of the state in `folder`, unaltered, and the sha256 that its tensors must have. CheckpointError."""
    path = folder / DOCUMENT
    try:
        facts = read_json(path, MAX_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read a training state at {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): the training state is damaged, use another one") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a training state of the format {FORMAT}: use one that this version wrote")
    document, digest = facts.get("document"), facts.get("tensors_sha256")
    sum_of_document = hashlib.sha256(json.dumps(document).encode()).hexdigest()
    if not isinstance(document, dict) or sum_of_document != facts.get("document_sha256"):
        raise CheckpointError(f"{path} was altered after it was written (its sha256 differs): use another state")
    if not is_hash(digest):
        raise CheckpointError(f"{path} names no tensors file: the training state is damaged, use another one")
    return document, digest


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. OSError, as from any other file, when the disk is full or read-only."""
    from safetensors.torch import save_file

    with as_any_file(path):
        save_file(dict(tensors), path, metadata=metadata)
    if metadata:
        _in_order(path)


def _in_order(path: Path) -> None:
    """Sort the metadata, which safetensors shuffles: the same tensors are the same bytes, and have the same hash."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = parse_object(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size, (len(text), size)
        file.seek(8)
        file.write(text)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's whole state as (tensors, document): the document is its description, with the tensors' names.

    Tensors are "<parameter index>.<name>" (exp_avg, step, momentum_buffer, ...). They are the optimizer's own, not
    copies: save them before the next step.
    """
    tensors = {
        f"{index}.{name}": value
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    return tensors, describe_optimizer(optimizer) | {"tensors": sorted(tensors)}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimizer is without its tensors, as JSON gives it back: kind, shapes of its parameters, groups."""
    groups = optimizer.state_dict()["param_groups"]
    return {
        "kind": type(optimizer).__name__,
        "shapes": [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups],
        "groups": [{n: list(v) if isinstance(v, tuple) else v for n, v in group.items()} for group in groups],
        "scalars": {},  # of the format: none of ours has any
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], document: dict[str, Any]
) -> None:
    """Put back what `optimizer_tensors` gave into an optimizer that was made alike (`state_check` compares).

    PyTorch's loading makes floats those of the parameter; here each is in its own number format at once, since what is
    saved again may be saved before the next step.
    """
    saved = zip(optimizer.state_dict()["param_groups"], document["groups"], strict=True)
    groups = [own | {"lr": group["lr"]} for own, group in saved]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, fields in state.items():
        loaded = optimizer.state[parameters[index]]
        loaded.update({field: value.to(loaded[field].device) for field, value in fields.items()})


def with_prefix(prefix: str, tensors: Mapping[str, T]) -> dict[str, T]:
    """The tensors named "<prefix>.<name>", so that several parts share one state."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors that `with_prefix(prefix, ...)` made, under their own names again."""
    return {name[len(prefix) + 1 :]: t for name, t in tensors.items() if name.startswith(prefix + ".")}


def _tensors_name(digest: str) -> str:
    return f"state-{digest[:16]}.safetensors"
