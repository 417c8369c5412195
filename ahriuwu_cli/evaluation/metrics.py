"""Metrics of frames, the only ones in the code base: PSNR, SSIM, motion and sharpness, on arrays, never on video files.

Frames are uint8 or floating [0, 1], NumPy or torch, (..., H, W, 3); the peak is 1.0 on [0, 1] in every metric. Sums are
in float64. A NaN in a frame makes that frame's value NaN: nothing is dropped here, and nothing is averaged away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Frames = Any  # np.ndarray or Tensor, uint8 or floating in [0, 1], (..., H, W, 3)
CAP_DB = 60.0  # PSNR of identical frames: a finite number, so that means exist
SSIM_WINDOW = 7
_PIXELS = 200_000  # values worked on at once: bounds the memory, and stays in the cache


def mse_per_frame(a: Frames, b: Frames) -> np.ndarray:
    """Mean squared error of every frame on [0, 1], shape (...)."""
    return _per_frame(lambda x, y: (x - y).square().mean(dim=(-3, -2, -1)), a, b)


def psnr_from_mse(mse: np.ndarray | float, cap: float = CAP_DB) -> np.ndarray:
    """-10 log10(mse) in dB, at most cap; 0 dB for an error of 1; NaN stays NaN."""
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(np.asarray(mse, np.float64)) + 0.0, cap)


def psnr_per_frame(a: Frames, b: Frames, cap: float = CAP_DB) -> np.ndarray:
    """PSNR of every frame in dB, shape (...): black against white is 0, identical frames are cap."""
    return psnr_from_mse(mse_per_frame(a, b), cap)


def psnr_of_mse(a: Frames, b: Frames, cap: float = CAP_DB) -> float:
    """PSNR in dB of the squared error averaged over all frames: a perfect frame does not rule the mean."""
    return float(psnr_from_mse(mse_per_frame(a, b).mean(), cap))


def ssim(a: Frames, b: Frames) -> np.ndarray:
    """Structural similarity (Wang et al. 2004) of every frame, shape (...), mean over channels; 1 for identical frames.

    Uniform 7 x 7 windows that lie wholly inside the frame, sample covariance, K1 = .01, K2 = .03, as scikit-image's
    `structural_similarity(data_range=1, win_size=7)`. ValueError for frames smaller than the window.
    """
    height, width = a.shape[-3:-1]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM needs frames of at least {SSIM_WINDOW}x{SSIM_WINDOW}, got {height}x{width}")
    return _per_frame(_ssim, a, b)


def _ssim(x: Tensor, y: Tensor) -> Tensor:
    """(F, H, W, 3) float64 -> (F,)."""
    mx, my, mxx, myy, mxy = (_window_means(v) for v in (x, y, x * x, y * y, x * y))
    sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)
    vx, vy, vxy = sample * (mxx - mx * mx), sample * (myy - my * my), sample * (mxy - mx * my)
    c1, c2 = 0.01**2, 0.03**2
    map_ = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return map_.mean(dim=(1, 2, 3))


def _window_means(v: Tensor) -> Tensor:
    """Means over all 7 x 7 windows inside (F, H, W, 3), one axis after the other: 7 = 2 + 2 + 2 + 1 neighbours."""
    for axis in (1, 2):
        size = v.shape[axis] - SSIM_WINDOW + 1
        pairs = v.narrow(axis, 0, size + 5) + v.narrow(axis, 1, size + 5)
        seventh = v.narrow(axis, 6, size)
        v = pairs.narrow(axis, 0, size) + pairs.narrow(axis, 2, size) + pairs.narrow(axis, 4, size) + seventh
    return v / SSIM_WINDOW**2


def motion_per_frame(clips: Frames) -> np.ndarray:
    """Mean absolute difference of each frame to the one before: (..., T, H, W, 3) -> (..., T - 1)."""
    return _per_frame(
        lambda x, y: (x - y).abs().mean(dim=(-3, -2, -1)), clips[..., 1:, :, :, :], clips[..., :-1, :, :, :]
    )


def motion_ratio(generated: Frames, truth: Frames) -> float:
    """Mean absolute frame-to-frame difference, generated / truth, over clips (..., T, H, W, 3), T >= 2.

    0 is a frozen video, 1 moves as much as the truth, above 1 flickers. NaN when the truth does not move at all.
    """
    return ratio(motion_per_frame(generated).mean(), motion_per_frame(truth).mean())


def motion_products(generated: Frames, truth: Frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over pixels of (g g, g t, t t) for the frame-to-frame differences g and t of clips (..., T, H, W, 3).

    Each (..., T - 1). What `motion_cosine` is made of; kept apart so that sums over windows come before the division.
    """
    g, t = (_differences(clips) for clips in (generated, truth))
    return tuple(_per_frame(lambda x, y: (x * y).mean(dim=(-3, -2, -1)), *pair) for pair in ((g, g), (g, t), (t, t)))


def motion_cosine(gg: float, gt: float, tt: float) -> float:
    """Cosine of generated and true frame-to-frame change: 1 moves as the truth does, 0 unrelated or still, -1 against.

    What does not depend on how much moves, as the motion ratio does, but on what moves where: a pan to the wrong side
    is negative. NaN when the truth does not move at all.
    """
    return 0.0 if gg == 0 and tt > 0 else ratio(gt, (gg * tt) ** 0.5)


def colour_shift(generated: Frames, truth: Frames) -> np.ndarray:
    """|mean colour of a generated frame - that of the true one| on [0, 1], averaged over channels, shape (...)."""
    return _per_frame(lambda x, y: (x.mean(dim=(1, 2)) - y.mean(dim=(1, 2))).abs().mean(dim=-1), generated, truth)


def gradient_energy(frames: Frames) -> np.ndarray:
    """Mean squared difference of neighbouring pixels (down and right, summed) of every frame, shape (...)."""
    return _per_frame(
        lambda x, _: x.diff(dim=-3).square().mean(dim=(-3, -2, -1)) + x.diff(dim=-2).square().mean(dim=(-3, -2, -1)),
        frames,
        frames,
    )


def sharpness_ratio(generated: Frames, truth: Frames) -> float:
    """Gradient energy, generated / truth: below 1 is blur, above 1 is noise. NaN when the truth is flat."""
    return ratio(gradient_energy(generated).mean(), gradient_energy(truth).mean())


def ratio(above: float, below: float) -> float:
    """above / below; NaN where below is 0, since nothing can be said there."""
    return float(above / below) if below != 0 else float("nan")


def _per_frame(measure, a: Frames, b: Frames) -> np.ndarray:
    """measure((F, H, W, 3), (F, H, W, 3)) -> (F,) over all frames, a bounded number of them at a time."""
    if tuple(a.shape) != tuple(b.shape) or len(a.shape) < 3:
        raise ValueError(f"frames of {tuple(a.shape)} cannot be compared with frames of {tuple(b.shape)}")
    x, y = (torch.as_tensor(v).reshape(-1, *v.shape[-3:]) for v in (a, b))
    chunk = max(1, _PIXELS // max(1, x[0].numel())) if len(x) else 1
    values = [measure(_unit(x[i : i + chunk]), _unit(y[i : i + chunk])) for i in range(0, len(x), chunk)]
    return torch.cat(values).cpu().numpy().reshape(a.shape[:-3]) if values else np.zeros(a.shape[:-3])


def _differences(clips: Frames) -> Tensor:
    """Each frame minus the one before on [0, 1], float32 (differences of uint8 are exact in it up to the scale)."""
    clips = torch.as_tensor(clips)
    clips = clips.float() / 255 if clips.dtype == torch.uint8 else clips
    return clips.diff(dim=-4)


def _unit(frames: Tensor) -> Tensor:
    """uint8 or floating frames as float64 on [0, 1]."""
    if frames.dtype == torch.uint8:
        return frames.double() / 255
    if frames.is_floating_point():
        return frames.double()
    raise ValueError(f"frames are uint8 or floating in [0, 1], not {frames.dtype}")
