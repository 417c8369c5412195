"""Encoding the parts of a pack: here, or on all cores in processes of their own; the bytes are the same either way.

Every part is encoded by one thread, so that the number of processes changes no rounding. Rows go straight from a
process into the pack's file; only jobs, ticks and hashes travel through pipes.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from ahriuwu_cli.data.pack_format import Layout, Part
from ahriuwu_cli.data.pack_journal import write_all
from ahriuwu_cli.errors import CheckpointError

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.tokenizer import Tokenizer

CHUNK = 256  # most frames encoded at a time
CHUNK_BYTES = 64 << 20  # most bytes of uint8 frames encoded at a time; in float32 they are four times as many
START_SECONDS = 2.5  # what a process costs before its first frame, most of it importing torch
PROBE_SECONDS = 0.5  # how long encoding is timed here before other processes are thought of


@dataclass(frozen=True)
class Target:
    """Where rows go: the open partial pack, its layout, and the lock that lives as long as anybody may write."""

    descriptor: int
    layout: Layout
    lock: int | None


def encode_parts(
    parts: list[Part],
    store: EpisodeStore,
    tokenizer: Tokenizer,
    target: Target,
    tick: Callable[[int], None],
    workers: int | None = None,
) -> Iterator[tuple[Part, str]]:
    """Encode the parts into the target; yields each with the hash of its rows as it is finished. tick(frames).

    workers: processes; 1 encodes here. None encodes here too, and starts processes once the rest would take longer
    here than starting them: as many as there are cores (or threads that PyTorch may use, where those are fewer).
    """
    device = next(tokenizer.buffers()).device
    most = 1 if device.type != "cpu" else min(_cores(), torch.get_num_threads())
    left, frames, begun = sum(p.stop - p.start for p in parts), 0, time.perf_counter()
    with _one_thread(device):
        for number, part in enumerate(parts):
            elapsed = time.perf_counter() - begun
            if workers is None and frames and elapsed > PROBE_SECONDS:
                wanted = min(most, int(elapsed / frames * left / START_SECONDS))
            else:
                wanted = workers or 1
            if wanted > 1:
                from ahriuwu_cli.data.pack_worker import Workers

                with Workers(min(wanted, len(parts) - number), store, tokenizer, target) as others:
                    yield from others.run(parts[number:], tick)
                return
            yield part, encode_part(store, tokenizer, target, part, tick)
            frames += part.stop - part.start
            left -= part.stop - part.start


def encode_part(
    store: EpisodeStore, tokenizer: Tokenizer, target: Target, part: Part, tick: Callable[[int], None]
) -> str:
    """Encode one part, write its rows, return their hash. DataError when the episode is not what was recorded,
    CheckpointError when the tokenizer's latents do not fit."""
    row_bytes, offsets = target.layout.row_bytes, target.layout.offsets
    digest = hashlib.sha256()
    chunk = max(1, min(CHUNK, CHUNK_BYTES // (store.height * store.width * 3)))
    for start in range(part.start, part.stop, chunk):
        stop = min(start + chunk, part.stop)
        rows = _encode(store, tokenizer, part.episode, start, stop).tobytes()
        at = part.row + start - part.start
        write_all(target.descriptor, rows, offsets["latents"] + at * row_bytes["latents"])
        digest.update(rows)
        tick(stop - start)
    rows = _actions(store, part).tobytes()
    write_all(target.descriptor, rows, offsets["actions"] + part.row * row_bytes["actions"])
    digest.update(rows)
    return digest.hexdigest()


@torch.no_grad()
def _encode(store: EpisodeStore, tokenizer: Tokenizer, episode: str, start: int, stop: int) -> np.ndarray:
    """float16 latents (stop - start, N, D). A tokenizer that looks back in time gets its window of earlier frames.

    CheckpointError where it gives what float16 does not hold: frames are pixels, so nothing else can be wrong.
    """
    lead = min(start, tokenizer.window - 1)
    frames = torch.from_numpy(store.frames(episode, start - lead, stop))[None]
    latents = tokenizer.encode(frames.to(next(tokenizer.buffers()).device))[0, lead:].cpu().to(torch.float16)
    if not torch.isfinite(latents).all():  # as they are kept: float16 ends at 65504
        raise CheckpointError(
            f"the tokenizer gives latents that do not fit float16, in which packs keep them (episode {episode}, frames "
            f"{start}..{stop - 1}): train with another tokenizer"
        )
    return latents.numpy()


def _actions(store: EpisodeStore, part: Part) -> np.ndarray:
    """float32 (stop - start, A): the actions that leave these frames, zero where there is none."""
    actions = np.zeros((part.stop - part.start, store.action_space.width), np.float32)
    episode = store.episode(part.episode)
    if episode.labelled and store.action_space.width:
        known = store.actions(part.episode, part.start, min(part.stop, episode.frames - 1))
        actions[: len(known)] = known
    return actions


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """One thread where the CPU encodes: sums must not depend on how many there are."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
