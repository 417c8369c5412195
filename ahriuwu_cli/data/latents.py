"""Latent packs: a dataset's latents, encoded once per tokenizer, read in random windows.

One file per (dataset, split, tokenizer): see `pack_format` for what it holds and `packing` for how it is made.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.pack_check import check_some
from ahriuwu_cli.data.pack_format import OtherFormat, read_pack_header
from ahriuwu_cli.data.pack_journal import sweep
from ahriuwu_cli.data.packing import make_pack
from ahriuwu_cli.data.tensors import fill, read_header
from ahriuwu_cli.errors import DataError

if TYPE_CHECKING:
    from ahriuwu_cli.data.actions import ActionSpace
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.tokenizer import Tokenizer


class LatentPack:
    """An open pack. `lengths` (episodes,) in frames; windows never cross an episode's end.

    Windows are announced to the system all at once, then read: on a cold disk that is many times faster than one by
    one. A file that is cut short or a disk that fails is a DataError or OSError, never a crash; so are latents that are
    not finite and actions outside `space`, whatever their hashes say.
    """

    def __init__(self, path: Path, facts: dict, space: ActionSpace) -> None:
        self.path, self.space = path, space
        self.ids: list[str] = [e["id"] for e in facts["episodes"]]
        self.lengths = np.array([e["frames"] for e in facts["episodes"]], dtype=np.int64)
        self.labelled = np.array([e["labelled"] for e in facts["episodes"]], dtype=bool)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]
        self._tensors = read_header(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  open as long as the pack is
        weakref.finalize(self, self._file.close)  # and however its use ends
        self._ends: dict[int, np.ndarray] = {}
        count = self._tensors["latents"].shape[0]
        if int(self.lengths.sum()) != count:
            raise DataError(f"{path} holds {count} frames but lists {int(self.lengths.sum())}: delete it")

    def draw(self, count: int, frames: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """`count` windows (episode index, first frame), uniform over all windows. DataError if there is none."""
        if frames not in self._ends:
            self._ends[frames] = np.cumsum(np.maximum(self.lengths - frames + 1, 0))
        ends = self._ends[frames]
        if not ends[-1]:
            raise DataError(
                f"no training episode has {frames} frames (the longest has {self.lengths.max()}): "
                f"train with fewer --frames or record longer episodes"
            )
        flat = rng.integers(0, ends[-1], count)
        episodes = np.searchsorted(ends, flat, side="right")
        before = np.where(episodes > 0, ends[episodes - 1], 0)
        return list(zip(episodes.tolist(), (flat - before).tolist(), strict=True))

    def read(self, windows: list[tuple[int, int]], frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """(latents (B, T, N, D) float32, actions (B, T-1, A) float32, labelled (B,) bool) of the windows."""
        first = [int(self.starts[e]) + s for e, s in windows]
        latents, actions = self._latents(first, frames), self._rows("actions", first, frames - 1)
        labelled = self.labelled[[e for e, _ in windows]]
        sound = np.where(labelled, self.space.allows(actions).all((1, 2)), ~actions.any((1, 2)))
        if not sound.all():
            window = self.name(windows[int(sound.argmin())])
            raise self._damaged(f"actions from {window} on lie outside the action space")
        return latents, torch.from_numpy(actions), torch.from_numpy(labelled)

    def name(self, window: tuple[int, int]) -> str:
        """'episode:start', as window manifests write it."""
        return f"{self.ids[window[0]]}:{window[1]}"

    def spread(self, most: int = 4096) -> Tensor:
        """Standard deviation of each latent channel (D,), above 0, from `most` frames spread over the pack."""
        count = self._tensors["latents"].shape[0]
        rows = np.linspace(0, count - 1, min(most, count)).astype(int)
        return self._latents(rows.tolist(), 1).flatten(0, 2).std(0).clamp(min=1e-6)  # of still channels too

    def _latents(self, first: list[int], count: int) -> Tensor:
        """Rows of latents as float32; DataError unless all are finite."""
        latents = torch.from_numpy(self._rows("latents", first, count)).float()
        if not torch.isfinite(latents.sum()):  # no sum of so few float16 is infinite by itself
            raise self._damaged("it holds latents that are not finite")
        return latents

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path} is damaged ({why}): delete it, it is made anew")

    def _rows(self, name: str, first: list[int], count: int) -> np.ndarray:
        """(len(first), count, ...) rows of a tensor, `count` from each of `first` on."""
        info = self._tensors[name]
        out = np.empty((len(first), count, *info.shape[1:]), np.float16 if info.dtype == "F16" else np.float32)
        if not out.size:
            return out
        row, length, file = out[0, 0].nbytes, out[0].nbytes, self._file.fileno()
        offsets = [info.offset + i * row for i in first]
        if hasattr(os, "posix_fadvise"):
            for offset in offsets:
                os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)
        for offset, window in zip(offsets, out, strict=True):
            fill(file, window, offset, self.path)
        return out


def open_pack(
    store: EpisodeStore,
    tokenizer: Tokenizer,
    split: str = "train",
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> LatentPack:
    """The pack of this dataset, split and tokenizer; encoded now if it is not there yet, or only in part.

    It lies in the dataset's `latents/` folder and is named after the tokenizer's hash. A pack made from other data is
    never used: its header records the dataset's fingerprint. progress(frames done, frames in all); workers: processes
    that encode, chosen by the work where None; announce gets sentences for the user (default: stderr). DataError for a
    pack that is damaged, and where one cannot be written; CheckpointError for a tokenizer whose latents do not fit one.
    """
    announce = announce or _say
    tokenizer_hash = tokenizer.fingerprint()
    path = Path(store.path) / "latents" / f"{split}-{tokenizer_hash[:16]}.safetensors"

    def is_there(say: Callable[[str], None] = announce) -> bool:
        return _is_current(path, store, tokenizer, tokenizer_hash, split, say)

    if not is_there(_silent):  # asked again under the packer's lock, and said there
        make_pack(path, store, tokenizer, split, is_there, progress or _silent, announce, workers)
    sweep(path)
    facts, layout = read_pack_header(path)
    check_some(path, facts, layout, store.action_space)
    return LatentPack(path, facts, store.action_space)


def _is_current(
    path: Path, store: EpisodeStore, tokenizer: Tokenizer, tokenizer_hash: str, split: str, announce: Callable
) -> bool:
    """A pack of these data by this tokenizer is there; an older one is said, a damaged one is a DataError."""
    if not path.exists():
        return False
    try:
        facts, layout = read_pack_header(path)
    except OtherFormat as error:
        announce(f"{error}: encoding again")
        return False
    if (facts["tokenizer"], facts["dataset"], facts["split"]) != (tokenizer_hash, store.fingerprint, split):
        announce(f"{path} was made from other data: encoding again")
        return False
    shapes = {name: shape[1:] for name, (_, shape) in layout.shapes.items()}
    wanted = {"latents": (tokenizer.tokens, tokenizer.latent_dim), "actions": (store.action_space.width,)}
    episodes = [(e.id, e.frames, e.labelled, e.sha256) for e in store.episodes(split)]
    listed = [(e["id"], e["frames"], e["labelled"], e["source"]) for e in facts["episodes"]]
    if shapes != wanted or listed != episodes:
        raise DataError(f"{path} is damaged (its header does not fit the dataset): delete it, it is made anew")
    return True


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def _silent(*_: object) -> None:
    pass
