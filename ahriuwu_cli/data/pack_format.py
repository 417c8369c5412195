"""What a latent pack is on disk: a safetensors file whose header says what its rows were made from, and their hashes.

    latents  F16 (F, N, D)     the frames of all episodes of one split, one episode after the other
    actions  F32 (F, A)        row t takes frame t to t + 1; the last row of an episode is zero, unused
    metadata "ahriuwu"         JSON: format, tokenizer, dataset, split, episodes

An episode falls into parts of PART frames. A part is encoded, hashed and taken up again as one; its hash is the SHA-256
of its latent rows, then its action rows.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.documents import is_hash, parse_object
from ahriuwu_cli.data.metadata import SPLITS
from ahriuwu_cli.data.tensors import TensorInfo, make_header, read_header_and_metadata
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.tokenizer import Tokenizer

FORMAT = "ahriuwu-latents/2"
PART = 1024  # frames
NO_HASH = "0" * 64
_BUFFER = 4 << 20  # bytes read at a time


@dataclass(frozen=True)
class Part:
    """Frames start..stop-1 of one episode, from the pack's row on; index counts all parts of the pack."""

    index: int
    episode: str
    start: int
    stop: int
    row: int

    def __str__(self) -> str:
        return f"episode {self.episode}, frames {self.start}..{self.stop - 1}"


@dataclass(frozen=True)
class Layout:
    """Where things lie in a pack: shapes as safetensors has them, first bytes, and the size of the file."""

    shapes: dict[str, tuple[str, tuple[int, ...]]]
    offsets: dict[str, int]
    size: int

    @property
    def row_bytes(self) -> dict[str, int]:
        """Bytes of one row of each tensor."""
        return {name: math.prod(shape[1:]) * int(dtype[1:]) // 8 for name, (dtype, shape) in self.shapes.items()}


def new_facts(store: EpisodeStore, tokenizer_hash: str, split: str) -> dict[str, Any]:
    """The header's facts of a pack that is to be made; its parts have no hashes yet. DataError for an empty split."""
    episodes = store.episodes(split)
    if not episodes:
        raise DataError(f"{store.path} has no episodes in its {split} split: record or import more episodes")
    entries = [
        {
            "id": e.id,
            "frames": e.frames,
            "labelled": e.labelled,
            "source": e.sha256,
            "parts": [NO_HASH] * -(-e.frames // PART),
        }
        for e in episodes
    ]
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_hash,
        "dataset": store.fingerprint,
        "split": split,
        "episodes": entries,
    }


def new_layout(path: Path, store: EpisodeStore, tokenizer: Tokenizer, facts: dict) -> Layout:
    """The layout of a pack with these facts; other hashes change nothing in it."""
    total = sum(e["frames"] for e in facts["episodes"])
    shapes = {
        "latents": ("F16", (total, tokenizer.tokens, tokenizer.latent_dim)),
        "actions": ("F32", (total, store.action_space.width)),
    }
    return _lay_out(shapes, len(pack_header(path, shapes, facts)))


def pack_header(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], facts: dict) -> bytes:
    """The first bytes of the pack's file. DataError when a dataset has too many episodes for one header."""
    return make_header(path, shapes, {"ahriuwu": json.dumps(facts, separators=(",", ":"))})


def write_header(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], facts: dict) -> dict[str, int]:
    """Make a file with the header and the full size, rows to be filled in. Returns each tensor's offset."""
    header = pack_header(path, shapes, facts)
    layout = _lay_out(shapes, len(header))
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(layout.size)
    return layout.offsets


def parts_of(facts: dict) -> Iterator[Part]:
    """All parts of a pack, in the order of its rows."""
    index = row = 0
    for episode in facts["episodes"]:
        for start in range(0, episode["frames"], PART):
            stop = min(start + PART, episode["frames"])
            yield Part(index, episode["id"], start, stop, row + start)
            index += 1
        row += episode["frames"]


def hashes_of(facts: dict) -> list[str]:
    """The hash of every part, as the header has it."""
    return [digest for episode in facts["episodes"] for digest in episode["parts"]]


def hash_part(descriptor: int, layout: Layout, part: Part) -> str:
    """SHA-256 of a part's rows as they lie in the file, read a few megabytes at a time."""
    digest = hashlib.sha256()
    for name, row_bytes in layout.row_bytes.items():
        at = layout.offsets[name] + part.row * row_bytes
        end = at + (part.stop - part.start) * row_bytes
        while at < end:
            block = os.pread(descriptor, min(_BUFFER, end - at), at)
            if not block:
                return NO_HASH  # the file ends here: no hash of rows that are there is this one
            digest.update(block)
            at += len(block)
    return digest.hexdigest()


def read_pack_header(path: Path) -> tuple[dict[str, Any], Layout]:
    """Facts and layout of a pack, checked key by key before a row is read. Raises DataError with a sentence."""
    tensors, metadata = read_header_and_metadata(path)
    try:
        facts = parse_object(metadata["ahriuwu"])
        version = facts["format"]
    except (KeyError, ValueError):
        raise DataError(f"{path} is not a latent pack: delete it, it is made anew") from None
    if version != FORMAT:
        raise OtherFormat(f"{path} has the format {version!r}, not {FORMAT!r}")
    problem = _facts_problem(facts) or _shapes_problem(tensors, facts)
    if problem:
        raise DataError(f"{path} is damaged ({problem}): delete it, it is made anew")
    shapes = {name: (tensors[name].dtype, tensors[name].shape) for name in ("latents", "actions")}
    return facts, Layout(shapes, {name: tensors[name].offset for name in shapes}, path.stat().st_size)


class OtherFormat(DataError):
    """A pack of another version of ours: sound perhaps, but made anew."""


def _lay_out(shapes: dict[str, tuple[str, tuple[int, ...]]], size: int) -> Layout:
    row_bytes, offsets = Layout(shapes, {}, 0).row_bytes, {}
    for name, (_, shape) in shapes.items():
        offsets[name] = size
        size += shape[0] * row_bytes[name]
    return Layout(shapes, offsets, size)


def _facts_problem(facts: dict) -> str:
    kinds = {"format": str, "tokenizer": str, "dataset": str, "split": str, "episodes": list}
    if set(facts) != set(kinds) or not all(type(facts[k]) is kind for k, kind in kinds.items()):
        return "its header has other keys or types"
    if facts["split"] not in SPLITS or not all(is_hash(facts[k]) for k in ("tokenizer", "dataset")):
        return "its header names no split, tokenizer and dataset"
    kinds = {"id": str, "frames": int, "labelled": bool, "source": str, "parts": list}
    seen = set()
    for entry in facts["episodes"]:
        if type(entry) is not dict or set(entry) != set(kinds):
            return "an episode in its header has other keys"
        if not all(type(entry[k]) is kind for k, kind in kinds.items()):
            return "an episode in its header has other types"
        hashes = [entry["source"], *entry["parts"]]
        if not all(map(is_hash, hashes)):
            return f"episode {entry['id']!r} has no hashes"
        if entry["frames"] < 2 or len(entry["parts"]) != -(-entry["frames"] // PART) or entry["id"] in seen:
            return f"episode {entry['id']!r} cannot be as its header says"
        seen.add(entry["id"])
    return "" if seen else "its header lists no episodes"


def _shapes_problem(tensors: dict[str, TensorInfo], facts: dict) -> str:
    found = {name: (t.dtype, len(t.shape)) for name, t in tensors.items()}
    if found != {"latents": ("F16", 3), "actions": ("F32", 2)}:
        return f"it holds {', '.join(sorted(tensors)) or 'nothing'} in other forms than latents and actions"
    if not all(tensors["latents"].shape):
        return "its latents have no numbers"
    frames = sum(e["frames"] for e in facts["episodes"])
    lengths = {t.shape[0] for t in tensors.values()}
    return "" if lengths == {frames} else f"it holds {max(lengths)} frames and lists {frames}"
