"""The interface of tokenizers: frames to latents and back, and the hash that says which tokenizer made a latent."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod

import torch
from torch import Tensor, nn

from ahriuwu_cli.models import needs

MAX_SIDE = 4096  # pixels of a frame's side, as in a dataset


class Tokenizer(nn.Module):
    """Maps frames (B, T, H, W, 3) uint8 to latents (B, T, N, D) float32 and back to frames (B, T, H, W, 3) in [0, 1].

    Causal in time: latents of a frame never depend on later frames. `kind` names the class in a checkpoint and
    `to_json` gives its architecture; both together rebuild it (`build_tokenizer`).
    """

    kind: str
    height: int
    width: int
    tokens: int  # N
    latent_dim: int  # D
    sharpness: float = 0.0  # share of the gradient energy that decoding was fitted to keep; 0: it was not
    ordered: bool = False  # whether channels stand by how much of the picture they hold, the most first
    window: int = 1  # frames that a latent depends on, its own included
    decoder_window: int = 1  # frames of latents that a decoded frame depends on, its own included

    @abstractmethod
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, T, H, W, 3) -> latents (B, T, N, D), scaled to unit spread over the training data."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, T, N, D) -> frames (B, T, H, W, 3) float32 in [0, 1]."""

    def show(self, latents: Tensor) -> Tensor:
        """What `decode` gives as uint8 on the CPU, (B, T, H, W, 3), never all of it in float32 at once."""
        at_once = needs.in_parts(len(latents) * needs.of_pixels(self))
        shown = torch.empty(*latents.shape[:2], self.height, self.width, 3, dtype=torch.uint8)
        for start in range(0, latents.shape[1], at_once):
            shown[:, start : start + at_once] = as_pixels(self.decode(latents[:, start : start + at_once]))
        return shown

    @abstractmethod
    def to_json(self) -> dict:
        """Architecture, enough to rebuild the module before its weights are loaded."""

    @classmethod
    @abstractmethod
    def stored(cls, architecture: dict) -> int:
        """How many numbers a checkpoint of this architecture holds, before any is made. TypeError, ValueError."""

    def fingerprint(self) -> str:
        """sha256 over kind, architecture and every weight: two tokenizers with equal shapes are told apart.

        Of the weights as they compute, in float32, whatever format they are stored in.
        """
        digest = hashlib.sha256(json.dumps([self.kind, self.to_json()], sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def same_latents(self, other: Tokenizer) -> bool:
        """Whether the other encodes every frame as this one does: it may decode what this one encoded."""
        return self.fingerprint() == other.fingerprint()


def as_pixels(frames: Tensor) -> Tensor:
    """Frames in [0, 1] as uint8 on the CPU."""
    return (frames * 255).round().to(torch.uint8).cpu()


def build_tokenizer(kind: str, architecture: dict) -> Tokenizer:
    """An untrained tokenizer from its checkpoint description. ValueError for an unknown kind or a bad field."""
    return tokenizer_class(kind).from_json(architecture)


def tokenizer_class(kind: str) -> type[Tokenizer]:
    """The class that a checkpoint names. ValueError for an unknown kind."""
    from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
    from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer

    kinds = {c.kind: c for c in (LinearTokenizer, TransformerTokenizer)}
    if kind not in kinds:
        raise ValueError(f"unknown tokenizer kind {kind!r}, choose one of {', '.join(kinds)}")
    return kinds[kind]
