"""The standard LPIPS and FVD, on weights that the user supplies by path and sha256: only these may bear bare names.

Both files are safetensors: what others publish is pickled (.pth, TorchScript), and nothing pickled is read here. It is
converted once, elsewhere; names and values must stay as they are. The hash stands beside every number.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.tensors import read_tensors
from ahriuwu_cli.disk import file_hash
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation.distances import CLIP_FRAMES, check_clips, check_horizon, frechet_distance, reference_clips
from ahriuwu_cli.evaluation.generate import generate, persist, reconstruct
from ahriuwu_cli.evaluation.perceptual import pad_same
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_windows
from ahriuwu_cli.evaluation.summary import jsonable, pick_horizons
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.training.finite import first_no_weight
from ahriuwu_cli.world import World

MAX_BYTES = 1_000_000_000  # of a file of weights: VGG16 whole takes half of it
FEW_CLIPS = 256  # below it the bias of a Frechet distance between 400 numbers a clip drowns what it measures
LPIPS_SIDE = 32  # pixels; a smaller frame leaves AlexNet's last layers nothing
I3D_SIDE, I3D_CLASSES, I3D_BATCH = 224, 400, 8
# Channels of an Inception block: 1x1 | 1x1, 3x3x3 | 1x1, 3x3x3 | pool, 1x1 (Carreira & Zisserman 2017, figure 3).
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


@dataclass(frozen=True)
class Weights:
    """A safetensors file and the sha256 (64 hexadecimal digits) that it must have."""

    path: Path
    hash: str

    @staticmethod
    def given(name: str, path: Path | None, hash: str | None) -> Weights | None:
        """What --NAME-weights and --NAME-hash say; None without both, UserError for one alone or for no sha256."""
        if path is None and hash is None:
            return None
        if path is None or hash is None:
            raise UserError(f"--{name}-weights and --{name}-hash belong together: give both or neither")
        if len(hash) != 64 or set(hash) - set(string.hexdigits):
            raise UserError(f"--{name}-hash {hash!r} is not a sha256: give the 64 digits of `sha256sum {path}`")
        return Weights(path, hash.lower())

    def read(self) -> dict[str, Tensor]:
        """The tensors. CheckpointError for a file that is missing, has another hash or is not safetensors."""
        try:
            found = file_hash(self.path)
            if found != self.hash:
                raise CheckpointError(f"{self.path} has the sha256 {found}, not {self.hash}: give that file")
            return read_tensors(self.path, MAX_BYTES)
        except OSError as error:
            raise CheckpointError(f"cannot read weights at {self.path} ({error.strerror}): check the path") from None
        except DataError as error:
            raise CheckpointError(f"{error}; convert the published one to safetensors (docs/evaluation.md)") from None


def check_size(store: EpisodeStore) -> None:
    """UserError for frames that LPIPS is too large for."""
    if min(store.height, store.width) < LPIPS_SIDE:
        raise UserError(f"LPIPS needs frames of {LPIPS_SIDE} pixels a side, not {store.height}x{store.width}")


def standard_distances(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    *,
    lpips: Weights | None = None,
    fvd: Weights | None = None,
) -> dict[str, Any]:
    """{"lpips": ..., "fvd": ...} of the weights that are given, each with N, backbone and hash, beside its floors.

    LPIPS: the mean over windows at the reported horizons, for model, ceiling (decode(encode)) and persistence. FVD: see
    `frechet_video_distance`. Both networks are loaded before anything is generated.
    """
    if lpips:
        check_size(store)
    if fvd:
        check_horizon("FVD", manifest)
    judge = load_lpips(lpips).to(world.device) if lpips else None
    i3d = load_i3d(fvd).to(world.device) if fvd else None
    frames, actions = read_windows(store, manifest)
    made = generate(
        world, frames, actions, manifest.keys, rollout_config,
        seed=config.seed, context=manifest.context, batch=config.batch,
    )  # fmt: skip
    truth = frames[:, manifest.context :]
    ceiling = reconstruct(world, frames, config.batch)[:, manifest.context :]
    shown = {"ceiling": ceiling, "persistence": persist(frames, manifest.context)}
    found: dict[str, Any] = {}
    if judge:
        at = [h - 1 for h in pick_horizons(config.horizons, manifest.horizon)]
        rows = {
            who: lpips_distance(judge, clips[:, at], truth[:, at], config.batch)
            for who, clips in ({"model": made.frames} | shown).items()
        }
        rows["model"] = np.where(made.finite[:, at], rows["model"], np.nan)
        found["lpips"] = {
            "backbone": judge.backbone,
            "weights_hash": judge.sha256,
            "windows": len(truth),
            "resized": None,
            "horizons": {f"{h + 1}": {who: r[:, i].mean() for who, r in rows.items()} for i, h in enumerate(at)},
        }
    if i3d:
        real, _ = reference_clips(store, len(truth), split=manifest.split, seed=config.seed, avoid=manifest)
        clips = {"generated": made.frames, "real_floor": truth} | shown
        facts = {"backbone": "I3D RGB, Kinetics-400 logits", "weights_hash": fvd.hash}
        found["fvd"] = facts | frechet_video_distance(lambda c: i3d_logits(i3d, c), clips, real, made.finite)
    return jsonable(found)


def load_lpips(weights: Weights):
    """LPIPS v0.1 (Zhang 2018) on AlexNet or VGG16: the class of tokenizer training, with the heads from the file too.

    Keys: torchvision's "features.<i>.weight" and ".bias", and the published heads "lin0.model.1.weight" to "lin4...",
    each (1, channels, 1, 1). The package `lpips` would unpickle its own heads, so it is asked for none.
    CheckpointError for other contents, UserError without the package; nothing is downloaded.
    """
    from ahriuwu_cli.training.losses import LPIPS, build_lpips

    try:
        network, backbone = build_lpips(weights.read(), weights.path)
    except ValueError as error:
        raise CheckpointError(f"{error}") from None
    return LPIPS(network, backbone, weights.hash)


@torch.no_grad()
def lpips_distance(judge, frames: np.ndarray, truth: np.ndarray, batch: int = 32) -> np.ndarray:
    """LPIPS (W, L) of every frame to the true one, both uint8 (W, L, H, W, 3), at their own size; 0 where identical.

    CheckpointError where it is not finite, which is the network's fault: every frame is.
    """
    if frames.shape != truth.shape:
        raise ValueError(f"frames {frames.shape} and truth {truth.shape}")
    device = next(judge.parameters()).device
    flat, rows = [x.reshape(-1, *x.shape[2:]) for x in (frames, truth)], []
    for i in range(0, len(flat[0]), batch):
        a, b = (torch.from_numpy(x[i : i + batch]).to(device).movedim(-1, 1).float() / 255 for x in flat)
        rows.append(judge.network(a, b, normalize=True).flatten().double().cpu())
    return _joined(rows, "--lpips-weights").reshape(frames.shape[:2]).numpy()


class I3D(nn.Module):
    """Inception-v1 inflated to three dimensions (Carreira & Zisserman 2017), RGB, 400 Kinetics classes: 12.7M.

    Keys are those of the widespread PyTorch conversion: "Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3" and
    "Mixed_3b" to "Mixed_5c" with branches "b0", "b1a", "b1b", "b2a", "b2b", "b3b", each with ".conv3d.weight" and ".bn"
    (weight, bias, running_mean, running_var); "logits.conv3d.weight" and ".bias". The file says nothing of padding and
    batch norm's eps: as in the original, TensorFlow's SAME and 1e-3 (one PyTorch copy has 1e-5).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        width = 192
        for name, channels in MIXED.items():
            self.add_module(f"Mixed_{name}", _Mixed(width, channels))
            width = sum(channels[i] for i in (0, 2, 4, 5))
        self.logits = _Unit(width, I3D_CLASSES, 1, plain=True)
        self.eval().requires_grad_(False)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, 400), the mean over time, of clips (B, 3, T >= 9, 224, 224) in [-1, 1]."""
        x = _pool(self.Conv3d_1a_7x7(clips), (1, 3, 3), (1, 2, 2))  # (B, 64, T/2, 56, 56)
        x = _pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))  # (B, 192, T/2, 28, 28)
        for name in MIXED:
            if name == "4b":
                x = _pool(x, (3, 3, 3), (2, 2, 2))  # (B, 480, T/4, 14, 14)
            elif name == "5b":
                x = _pool(x, (2, 2, 2), (2, 2, 2))  # (B, 832, T/8, 7, 7)
            x = getattr(self, f"Mixed_{name}")(x)
        return self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1)).mean(dim=(2, 3, 4))


def load_i3d(weights: Weights) -> I3D:
    """The I3D of FVD (Unterthiner 2018) from a safetensors file with `I3D`'s keys. CheckpointError for other contents.

    The usual `i3d_torchscript.pt` is an archive of pickles and is not read: save the state dict of a conversion with
    these names by `safetensors.torch.save_file`. That the values are the standard ones is what the hash is for.
    """
    tensors = {k: v for k, v in weights.read().items() if not k.endswith("num_batches_tracked")}
    network = I3D()
    own = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    wrong = sorted(own.keys() ^ tensors.keys()) or [k for k in own if own[k].shape != tensors[k].shape]
    if wrong:
        raise CheckpointError(
            f"{weights.path} is not an RGB I3D with {I3D_CLASSES} classes: {len(wrong)} keys or shapes differ, first "
            f"{wrong[0]}; see I3D in ahriuwu_cli/evaluation/standard.py for the names"
        )
    if bad := first_no_weight(tensors):
        raise CheckpointError(
            f"{weights.path} is no trained network: {bad} is not of finite numbers; give another file"
        )
    if bad := next((k for k, v in tensors.items() if k.endswith("running_var") and (v < 0).any()), None):
        raise CheckpointError(f"{weights.path} is no trained network: {bad} is below 0; give another file")
    network.load_state_dict(tensors, strict=True)
    return network


@torch.no_grad()
def i3d_logits(network: I3D, clips: np.ndarray, batch: int = I3D_BATCH) -> Tensor:
    """Logits (W, 400), float64 on the CPU, of the last 16 frames of clips uint8 (W, >= 16, H, W, 3).

    CheckpointError where they are not finite, which is the network's fault: every clip is.
    """
    device, rows = next(network.parameters()).device, []
    for i in range(0, len(clips), batch):
        x = torch.from_numpy(np.ascontiguousarray(clips[i : i + batch, -CLIP_FRAMES:])).to(device).movedim(-1, 1)
        rows.append(network(resize_as_tensorflow(x.float(), I3D_SIDE) / 127.5 - 1).double().cpu())
    return _joined(rows, "--fvd-weights")


def _joined(rows: list[Tensor], option: str) -> Tensor:
    """What a network made of all batches. CheckpointError where it is not finite: frames are, so it is the weights."""
    joined = torch.cat(rows)
    if not joined.isfinite().all():
        raise CheckpointError(f"the network of {option} makes of frames what is not finite: give another file")
    return joined


def resize_as_tensorflow(x: Tensor, side: int) -> Tensor:
    """(..., H, W) -> (..., side, side), bilinear as TensorFlow 1 does it: pixel i is read at i H / side, without the
    shift by half a pixel that PyTorch makes. FVD's published code resizes so."""
    for axis in (-2, -1):
        size = x.shape[axis]
        at = torch.arange(side, device=x.device, dtype=x.dtype) * (size / side)
        low = at.floor().long()
        x = x.movedim(axis, -1)
        x = torch.lerp(x[..., low], x[..., (low + 1).clamp(max=size - 1)], at - low)
        x = x.movedim(-1, axis)
    return x


def frechet_video_distance(
    embed: Callable[[np.ndarray], Tensor],
    clips: dict[str, np.ndarray],
    real: np.ndarray,
    finite: np.ndarray | None = None,
) -> dict[str, Any]:
    """FVD (Unterthiner 2018): Frechet distance between `embed`'s features (I3D logits) of clips and of real clips.

    clips: uint8 (W, L >= 16, H, W, 3) under "generated" and what stands beside it; `real`: other real clips, the same
    for all, so that "real_floor" (the truth of the same windows) is what a perfect model scores at this N. The last 16
    frames count. A clip with a frame that is not finite makes its distance NaN (null). UserError below 16 frames or 16
    clips; below 256 `warnings` says why the number means little.
    """
    for who, values in (clips | {"real": real}).items():
        check_clips(who, values)
    phi = {who: embed(values) for who, values in clips.items()}
    broken = np.zeros(len(clips["generated"]), bool) if finite is None else ~finite[:, -CLIP_FRAMES:].all(axis=1)
    phi["generated"][torch.from_numpy(broken)] = torch.nan
    beside = embed(real)
    few = min(len(real), *(len(values) for values in clips.values()))
    warned = f"FVD of {few} clips is mostly bias: compare it with real_floor alone, or give {FEW_CLIPS} windows or more"
    found: dict[str, Any] = {who: float(frechet_distance(x, beside)) for who, x in phi.items()}
    return jsonable(
        found
        | {
            "clips": len(phi["generated"]),
            "real_clips": len(real),
            "clip_frames": CLIP_FRAMES,
            "not_finite_clips": int(broken.sum()),
            "warnings": [warned] if few < FEW_CLIPS else [],
        }
    )


class _Unit(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU; `plain`: a bias instead of both."""

    def __init__(self, inside: int, out: int, kernel: int, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inside, out, kernel, stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))
        return x if self.bn is None else F.relu(self.bn(x))


class _Mixed(nn.Module):
    """One Inception block: four branches side by side."""

    def __init__(self, width: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.b0 = _Unit(width, channels[0], 1)
        self.b1a, self.b1b = _Unit(width, channels[1], 1), _Unit(channels[1], channels[2], 3)
        self.b2a, self.b2b = _Unit(width, channels[3], 1), _Unit(channels[3], channels[4], 3)
        self.b3b = _Unit(width, channels[5], 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Maximum with SAME padding; its zeros change nothing, since all that is pooled comes from a ReLU."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)
