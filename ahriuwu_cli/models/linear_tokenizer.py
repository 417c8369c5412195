"""The linear tokenizer: each patch to its principal components, fitted in closed form in seconds.

A patch place keeps its own mean; the components are shared by all places. Component i is divided by its spread to the
power `whitening`: 0 keeps pixel distances (strong components rule), 1 gives every component the same spread. The whole
is then scaled to unit spread, so that noise at tau means the same for every world.

With a gradient weight w, principal is what has most energy by |x|^2 + w |gradient of x|^2 (the Sobolev norm of H^1; its
matrix W is the identity plus w times the Laplacian of a patch's grid): edges count beside areas. The components D are
orthonormal there, D^T W D = 1, so a patch x has the coordinates D^T W x, and D times them is the nearest to x.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ahriuwu_cli.models.tokenizer import MAX_SIDE, Tokenizer

MAX_GRADIENT_WEIGHT = 1000  # far beyond: 16 loses areas of one colour (docs/log.md)


class LinearTokenizer(Tokenizer):
    """Patches of patch_height x patch_width pixels to latent_dim principal components: N = patches, D = latent_dim."""

    kind = "linear"
    ordered = True

    def __init__(
        self,
        height: int,
        width: int,
        patch_height: int,
        patch_width: int,
        latent_dim: int,
        gradient_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(height, width, patch_height, patch_width, latent_dim, gradient_weight)
        values = patch_height * patch_width * 3
        self.height, self.width, self.latent_dim = height, width, latent_dim
        self.patch_height, self.patch_width, self.gradient_weight = patch_height, patch_width, float(gradient_weight)
        self.rows, self.columns = height // patch_height, width // patch_width
        self.tokens = self.rows * self.columns
        self.register_buffer("mean", torch.zeros(self.tokens, values))
        self.register_buffer("components", torch.eye(values, latent_dim))  # D, orthonormal by W
        self.register_buffer("scale", torch.ones(latent_dim))

    @classmethod
    def stored(cls, architecture: dict) -> int:
        height, width, patch_height, patch_width, latent_dim, _ = check_sizes(**architecture)
        values = patch_height * patch_width * 3
        return height * width * 3 + values * latent_dim + latent_dim

    @classmethod
    def from_json(cls, architecture: dict) -> LinearTokenizer:
        return cls(**architecture)

    def to_json(self) -> dict:
        names = ("height", "width", "patch_height", "patch_width", "latent_dim")
        weight = {"gradient_weight": self.gradient_weight} if self.gradient_weight else {}  # as files were before it
        return {name: getattr(self, name) for name in names} | weight

    def encode(self, frames: Tensor) -> Tensor:
        patches = self._patches(frames.to(self.mean.device).float() / 255)  # (B, T, N, P)
        return (patches - self.mean) @ self._weighed(self.components) / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        patches = (latents.float() * self.scale) @ self.components.T + self.mean
        return self._frames(patches).clamp(0, 1)

    def fit(self, batches: Iterable[Tensor], whitening: float = 0.5) -> None:
        """Fit mean, components and scale to uint8 frames, given as batches (F, H, W, 3). Only two sums are kept."""
        values = self.mean.shape[1]
        count, total = 0, torch.zeros(self.tokens, values, dtype=torch.float64)
        second = torch.zeros(values, values, dtype=torch.float64)
        for frames in batches:
            patches = self._patches(frames[None].float().div_(255))[0]  # (F, N, P)
            count += len(patches)
            total += patches.sum(0).double()
            flat = patches.reshape(-1, values)
            second += (flat.T @ flat).double()
        if count < 2:
            raise ValueError(f"the linear tokenizer needs at least 2 frames to fit, got {count}")
        mean = total / count
        covariance = (second - count * mean.T @ mean) / (count * self.tokens)
        if self.gradient_weight:  # with W = half half^T: components of half^T x, taken back to x
            half = torch.linalg.cholesky(self._weighed(torch.eye(values, dtype=torch.float64)))
            power, directions = torch.linalg.eigh(half.T @ covariance @ half)
            directions = torch.linalg.solve_triangular(half.T, directions, upper=True)
        else:
            power, directions = torch.linalg.eigh(covariance)
        power = power.flip(0)[: self.latent_dim].clamp(min=1e-8)
        scale = power.sqrt() ** whitening
        overall = (power / scale.square()).mean().sqrt()  # spread of all latents together
        self.mean.copy_(mean)
        self.components.copy_(directions.flip(1)[:, : self.latent_dim])
        self.scale.copy_(scale * overall)

    def _weighed(self, columns: Tensor) -> Tensor:
        """W times columns (P, d)."""
        if not self.gradient_weight:
            return columns
        pictures = columns.reshape(self.patch_height, self.patch_width, 3, -1)
        laplacian = torch.zeros_like(pictures)
        for axis in (0, 1):
            steps = pictures.diff(dim=axis)
            laplacian.narrow(axis, 1, steps.shape[axis]).add_(steps)
            laplacian.narrow(axis, 0, steps.shape[axis]).sub_(steps)
        return columns + self.gradient_weight * laplacian.reshape(columns.shape)

    def _patches(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, T, N, P)."""
        b, t = frames.shape[:2]
        grid = frames.reshape(b, t, self.rows, self.patch_height, self.columns, self.patch_width, 3)
        return grid.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, self.tokens, -1)

    def _frames(self, patches: Tensor) -> Tensor:
        """(B, T, N, P) -> (B, T, H, W, 3)."""
        b, t = patches.shape[:2]
        grid = patches.reshape(b, t, self.rows, self.columns, self.patch_height, self.patch_width, 3)
        return grid.permute(0, 1, 2, 4, 3, 5, 6).reshape(b, t, self.height, self.width, 3)


def check_sizes(
    height: int, width: int, patch_height: int, patch_width: int, latent_dim: int, gradient_weight: float = 0.0
) -> tuple:
    """The same, checked. ValueError for sizes that cannot be."""
    sides = {"height": height, "width": width, "patch_height": patch_height, "patch_width": patch_width}
    for name, value in sides.items():
        if type(value) is not int or not 1 <= value <= MAX_SIDE:
            raise ValueError(f"{name} must be a whole number of pixels from 1 to {MAX_SIDE}, got {value!r}")
    if height % patch_height or width % patch_width:
        raise ValueError(f"frames of {height}x{width} do not divide into patches of {patch_height}x{patch_width}")
    values = patch_height * patch_width * 3
    if type(latent_dim) is not int or not 1 <= latent_dim <= values:
        raise ValueError(f"latent_dim {latent_dim!r} is not in 1..{values}, the values of a patch")
    known = isinstance(gradient_weight, (int, float)) and not isinstance(gradient_weight, bool)
    if not known or not 0 <= gradient_weight <= MAX_GRADIENT_WEIGHT:
        raise ValueError(f"gradient_weight {gradient_weight!r} is not a number in 0..{MAX_GRADIENT_WEIGHT}")
    return height, width, patch_height, patch_width, latent_dim, float(gradient_weight)
