"""Latent packs: a dataset's latents, encoded once per tokenizer, read memory-mapped in random windows.

One safetensors file per (dataset, split, tokenizer): `latents` float16 (F, N, D), `actions` float32 (F, A) and the
episodes' table in the header. Row t of `actions` takes frame t to t + 1; the last row of an episode is zero, unused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.tensors import open_tensor
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.tokenizer import Tokenizer

FORMAT = "ahriuwu-latents/1"
CHUNK = 256  # frames encoded at a time


class LatentPack:
    """An open pack. `lengths` (episodes,) in frames; windows never cross an episode's end."""

    def __init__(self, path: Path, facts: dict) -> None:
        self.path = path
        self.latents = open_tensor(path, "latents")
        self.actions = open_tensor(path, "actions")
        self.ids: list[str] = [e["id"] for e in facts["episodes"]]
        self.lengths = np.array([e["frames"] for e in facts["episodes"]], dtype=np.int64)
        self.labelled = np.array([e["labelled"] for e in facts["episodes"]], dtype=bool)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]
        if int(self.lengths.sum()) != len(self.latents):
            raise DataError(f"{path} holds {len(self.latents)} frames but lists {int(self.lengths.sum())}: delete it")

    def draw(self, count: int, frames: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """`count` windows (episode index, first frame), uniform over all windows. DataError if there is none."""
        room = np.maximum(self.lengths - frames + 1, 0)
        if not room.sum():
            raise DataError(
                f"no training episode has {frames} frames (the longest has {self.lengths.max()}): "
                f"train with fewer --frames or record longer episodes"
            )
        ends = np.cumsum(room)
        flat = rng.integers(0, ends[-1], count)
        episodes = np.searchsorted(ends, flat, side="right")
        return [(int(e), int(f - (ends[e] - room[e]))) for e, f in zip(episodes, flat, strict=True)]

    def read(self, windows: list[tuple[int, int]], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """(latents (B, T, N, D) float32, actions (B, T-1, A) float32, labelled (B,) bool) of the windows."""
        first = [int(self.starts[e]) + s for e, s in windows]
        latents = np.stack([self.latents[i : i + frames] for i in first]).astype(np.float32)
        actions = np.stack([self.actions[i : i + frames - 1] for i in first])
        labelled = self.labelled[[e for e, _ in windows]]
        return torch.from_numpy(latents), torch.from_numpy(actions), torch.from_numpy(labelled)

    def name(self, window: tuple[int, int]) -> str:
        """'episode:start', as window manifests write it."""
        return f"{self.ids[window[0]]}:{window[1]}"

    def spread(self, most: int = 4096) -> Tensor:
        """Standard deviation of each latent channel (D,), from `most` frames spread over the pack."""
        rows = np.linspace(0, len(self.latents) - 1, min(most, len(self.latents))).astype(int)
        return torch.from_numpy(self.latents[rows].astype(np.float32)).flatten(0, 1).std(0)


def open_pack(
    store: EpisodeStore, tokenizer: Tokenizer, split: str = "train", progress: Callable[[int, int], None] | None = None
) -> LatentPack:
    """The pack of this dataset, split and tokenizer; encoded now if it is not there yet.

    It lies in the dataset's `latents/` folder and is named after the tokenizer's hash. A pack made from other data is
    never used: its header records the dataset's fingerprint. progress(frames done, frames in all).
    """
    tokenizer_hash = tokenizer.fingerprint()
    path = Path(store.path) / "latents" / f"{split}-{tokenizer_hash[:16]}.safetensors"
    if path.exists():
        facts = _read_facts(path)
        if facts["tokenizer"] == tokenizer_hash and facts["dataset"] == store.fingerprint:
            return LatentPack(path, facts)
    facts = _write_pack(path, store, tokenizer, tokenizer_hash, split, progress)
    return LatentPack(path, facts)


def _write_pack(
    path: Path,
    store: EpisodeStore,
    tokenizer: Tokenizer,
    tokenizer_hash: str,
    split: str,
    progress: Callable[[int, int], None] | None,
) -> dict:
    episodes = store.episodes(split)
    if not episodes:
        raise DataError(f"{store.path} has no episodes in its {split} split: record or import more episodes")
    facts = {
        "format": FORMAT,
        "tokenizer": tokenizer_hash,
        "dataset": store.fingerprint,
        "split": split,
        "episodes": [{"id": e.id, "frames": e.frames, "labelled": e.labelled} for e in episodes],
    }
    total = sum(e.frames for e in episodes)
    shapes = {"latents": ("F16", (total, tokenizer.tokens, tokenizer.latent_dim))}
    shapes["actions"] = ("F32", (total, store.action_space.width))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        offset = _write_header(temporary, shapes, facts)
        done = 0
        with open(temporary, "r+b") as file:
            for episode in episodes:
                for start in range(0, episode.frames, CHUNK):
                    stop = min(start + CHUNK, episode.frames)
                    rows = _encode(store, tokenizer, episode.id, start, stop)
                    file.seek(offset["latents"] + (done + start) * rows[0].nbytes)
                    file.write(rows.tobytes())
                    if progress is not None:
                        progress(done + stop, total)
                actions = np.zeros((episode.frames, store.action_space.width), np.float32)
                if episode.labelled and store.action_space.width:
                    actions[:-1] = store.actions(episode.id)
                file.seek(offset["actions"] + done * store.action_space.width * 4)
                file.write(actions.tobytes())
                done += episode.frames
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return facts


@torch.no_grad()
def _encode(store: EpisodeStore, tokenizer: Tokenizer, episode: str, start: int, stop: int) -> np.ndarray:
    """float16 latents (stop - start, N, D). A tokenizer that looks back in time gets its window of earlier frames."""
    lead = min(start, tokenizer.window - 1)
    frames = torch.from_numpy(store.frames(episode, start - lead, stop))[None]
    latents = tokenizer.encode(frames.to(next(tokenizer.buffers()).device))[0, lead:].cpu()
    if not torch.isfinite(latents).all():
        raise DataError(f"the tokenizer gives latents that are not finite: episode {episode}, frames {start}..{stop}")
    return latents.to(torch.float16).numpy()


def _write_header(path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], facts: dict) -> dict[str, int]:
    """Write the safetensors header and reserve the file's full size. Returns each tensor's offset in the file."""
    entries, begin = {"__metadata__": {"ahriuwu": json.dumps(facts)}}, 0
    for name, (dtype, shape) in shapes.items():
        size = int(np.prod(shape)) * {"F16": 2, "F32": 4}[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, begin + size]}
        begin += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + begin)
    return {name: 8 + len(header) + entries[name]["data_offsets"][0] for name in shapes}


def _read_facts(path: Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            facts = json.loads((file.metadata() or {})["ahriuwu"])
        if facts["format"] != FORMAT:
            raise KeyError(facts["format"])
        return facts
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is not a latent pack of this version ({error}): delete it, it is made anew") from None
