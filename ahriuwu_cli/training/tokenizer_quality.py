"""How well a tokenizer gives frames back: the ceiling of everything that is generated through it."""

from __future__ import annotations

import numpy as np
import torch

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.evaluation.metrics import gradient_energy, psnr_per_frame, ratio
from ahriuwu_cli.models.tokenizer import Tokenizer


def check_split(store: EpisodeStore, split: str) -> None:
    """DataError where a tokenizer could not be judged on a split, for who is about to make one."""
    if not store.episodes(split):
        raise DataError(f"{store.path} has no {split} episodes to judge a tokenizer by: record more episodes")


@torch.no_grad()
def reconstruction(tokenizer: Tokenizer, store: EpisodeStore, split: str, most: int = 16) -> dict:
    """Of decode(encode(frames)) on up to `most` episodes: what no world on this tokenizer can pass on average.

    {"psnr_db": mean PSNR per frame, "sharpness_ratio": gradient energy / the frames' own (None where those are flat),
    "frames": count}. DataError where the split has none.
    """
    check_split(store, split)
    values, energy, truth = [], [], []
    for episode in store.episodes(split)[:most]:
        frames = torch.from_numpy(store.frames(episode.id, 0, min(episode.frames, 256)))[None]
        again = tokenizer.decode(tokenizer.encode(frames)).cpu()
        values.append(np.asarray(psnr_per_frame(again, frames)).ravel())
        energy.append(gradient_energy(again).ravel())
        truth.append(gradient_energy(frames).ravel())
    sharpness = ratio(np.concatenate(energy).mean(), np.concatenate(truth).mean())
    return {
        "psnr_db": float(np.concatenate(values).mean()),
        "sharpness_ratio": sharpness if np.isfinite(sharpness) else None,
        "frames": int(sum(len(v) for v in values)),
    }
