"""Distances between what is generated and what is real, as distributions of 16-frame clips of tokenizer latents.

A clip becomes few numbers, fitted on real clips that are neither scored nor generated: its first R principal
components, the energy that they leave out, how much it moves and how roughly. On these, a Frechet distance (FID's, on
other features) and a kernel distance (KID's). Every set is compared with the same other real clips, so that beside the
generated ones stand what real clips of the same number score (the noise floor), decode(encode(real)) (the ceiling) and
persistence. Both judge distributions: a model that makes fine videos of the wrong actions is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.evaluation.generate import persist, reconstruct
from ahriuwu_cli.evaluation.protocol import Interval, WindowManifest, read_clips, student_975
from ahriuwu_cli.evaluation.summary import jsonable
from ahriuwu_cli.world import World

CLIP_FRAMES = 16
MIN_CLIPS = 16  # of every set; fewer say nothing about a distribution
MAX_COMPONENTS = 16
REFERENCE_CLIPS = 256
CLIPS_A_COMPONENT = 32  # measured on 64 clips of Doom: 8 components of 256 clips see shuffled and blurred video better
SWAPS = 1000  # than 16 do, and the noise floor is a third
MEASURED_ON = (
    "tokenizer latents of 16-frame clips: whitened principal components, RMS of what they leave out, RMS of motion, "
    "motion over distance to the clip's mean frame"
)


def latent_distances(
    world: World,
    generated: np.ndarray,
    frames: np.ndarray,
    *,
    context: int,
    episodes: Sequence[str],
    others: tuple[np.ndarray, Sequence[str]],
    reference: np.ndarray,
    finite: np.ndarray | None = None,
    batch: int = 32,
) -> dict[str, Any]:
    """Frechet and kernel distance of generated clips to other real clips, beside floor, ceiling and persistence.

    generated: uint8 (W, L, H, W, 3), L >= 16, of which the last 16 frames count; finite (W, L) is False where a latent
    was not. frames: the windows themselves, uint8 (W, context + L, H, W, 3); episodes: one a window. others: real clips
    of the same split that share no frame with them, and their episodes; reference: real clips of the train split, which
    fit the features (`reference_clips` draws both).

    `real_floor` is what the truth of the same windows scores, as a perfect model would. `excess` is generated minus
    `ceiling`, the distance that the tokenizer allows, with a 95 % interval by jackknife over episodes; `p` is how often
    a perfect model's clips lie as far above the ceiling (`swap_test`). Frechet distances are biased upwards at small N:
    compare them with the floor beside them, never with a number at another N. What a clip with a frame that is not
    finite touches is NaN (null). UserError for too few clips or frames.
    """
    truth = frames[:, context:]
    if generated.shape != truth.shape or len(episodes) != len(truth):
        raise ValueError(f"generated {generated.shape}, truth {truth.shape}, {len(episodes)} episodes")
    clips = {
        "generated": generated,
        "real_floor": truth,
        "ceiling": reconstruct(world, frames, batch)[:, context:],
        "persistence": persist(frames, context),
    }
    found = clip_distances(
        lambda values: clip_latents(world, values, batch), clips,
        name="latent", episodes=episodes, others=others, reference=reference, finite=finite,
    )  # fmt: skip
    return {"measured_on": MEASURED_ON, "tokenizer_fingerprint": world.tokenizer.fingerprint()} | found


def clip_distances(
    embed: Callable[[np.ndarray], Tensor],
    clips: dict[str, np.ndarray],
    *,
    name: str,
    episodes: Sequence[str],
    others: tuple[np.ndarray, Sequence[str]],
    reference: np.ndarray,
    finite: np.ndarray | None = None,
) -> dict[str, Any]:
    """Frechet and kernel distance of clips to other real clips, on an embedding: {name_frechet, name_kernel, ...}.

    clips: uint8 (W, L, H, W, 3), L >= 16, under "generated", "real_floor" (the truth of the same windows), "ceiling"
    and "persistence"; embed makes (W, 16, N, D) of them. The rest, the units and the p-values are `latent_distances`'.
    """
    other, other_episodes = others
    for who, values in (clips | {"other": other, "reference": reference}).items():
        check_clips(who, values)
    if len(other_episodes) != len(other):
        raise ValueError(f"{len(other)} other clips of {len(other_episodes)} episodes")
    basis = fit_basis(embed(reference), most=min(len(episodes), len(other)) // 4)
    phi = {who: basis.features(embed(values)) for who, values in clips.items()}
    broken = np.zeros(len(episodes), bool) if finite is None else ~finite[:, -CLIP_FRAMES:].all(axis=1)
    phi["generated"][torch.from_numpy(broken)] = torch.nan
    beside, (groups, other_groups) = basis.features(embed(other)), _numbered(episodes, other_episodes)
    measures: dict[str, Measure] = {
        f"{name}_frechet": lambda x, y, a, b: frechet_distance(x, y),
        f"{name}_kernel": kernel_distance,
    }
    found: dict[str, Any] = {
        "clips": len(episodes),
        "other_clips": len(other),
        "reference_clips": len(reference),
        "episodes": len(set(episodes)),
        "clip_frames": CLIP_FRAMES,
        "components": basis.components.shape[1],
        "components_share": basis.share,
        "not_finite_clips": int(broken.sum()),
    }
    for key, measure in measures.items():
        found[key] = {who: float(measure(x, beside, groups, other_groups)) for who, x in phi.items()}
        found[key] |= _excess(measure, phi["generated"], phi["ceiling"], beside, groups, other_groups)
    return jsonable(found)


def reference_clips(
    store: EpisodeStore,
    count: int,
    frames: int = CLIP_FRAMES,
    *,
    split: str,
    seed: int = 0,
    avoid: WindowManifest | None = None,
) -> tuple[np.ndarray, list[str]]:
    """`count` real clips uint8 (count, frames, H, W, 3) of a split and their episodes; the same for a seed.

    None shares a frame with a window of `avoid`. Where the dataset has actions, only labelled episodes count, as for
    scored windows. DataError when the split has not so many.
    """
    windows = reference_windows(store, count, frames, split=split, seed=seed, avoid=avoid)
    return read_clips(store, windows, frames), [e for e, _ in windows]


def reference_windows(
    store: EpisodeStore,
    count: int,
    frames: int = CLIP_FRAMES,
    *,
    split: str,
    seed: int = 0,
    avoid: WindowManifest | None = None,
) -> list[tuple[str, int]]:
    """(episode, first frame) of `reference_clips`, whose frames are not read."""
    usable = {e.id: e.frames for e in store.episodes(split) if e.labelled or not store.action_space.width}
    free = {f"{e}:{a}": (e, a, b) for e, n in usable.items() for a, b in _gaps(e, n, avoid)}
    if usable and not free:
        raise DataError(f"the scored windows leave nothing of {store.path}'s split {split!r}: ask for fewer")
    left = max((b - a for _, a, b in free.values()), default=frames)
    if left < frames <= max(usable.values(), default=0):
        raise DataError(
            f"the scored windows leave no {frames} frames in a row of {store.path}'s split {split!r}, {left} at most: "
            "ask for fewer --windows, or record more episodes"
        )
    drawn = draw_windows({key: b - a for key, (_, a, b) in free.items()}, frames, count, seed)
    return [(free[key][0], free[key][1] + start) for key, start in drawn]


def clip_latents(world: World, frames: np.ndarray, batch: int = 32) -> Tensor:
    """Clean latents (W, 16, N, D), float64 on the CPU, of the last 16 frames of clips uint8 (W, >= 16, H, W, 3)."""
    last = frames[:, -CLIP_FRAMES:]
    parts = [torch.from_numpy(np.ascontiguousarray(last[i : i + batch])) for i in range(0, len(last), batch)]
    return torch.cat([world.encode(part).double().cpu() for part in parts])


@dataclass(frozen=True)
class Basis:
    """How a clip becomes R + 3 numbers: fitted on reference clips alone, so that it favours none of the sets compared.

    mean (P,) and components (P, R) of flattened clips, P = 16 N D; centre and unit (R + 3,) of the features.
    """

    mean: Tensor
    components: Tensor
    centre: Tensor
    unit: Tensor
    scale: float  # RMS of latents about `mean`
    share: float  # of the reference clips' variance that lies in the components

    def features(self, latents: Tensor) -> Tensor:
        """Clips (W, 16, N, D) -> (W, R + 3), each of mean 0 and spread 1 over real clips."""
        return (_describe(latents, self.mean, self.components, self.scale) - self.centre) / self.unit


def fit_basis(latents: Tensor, most: int = MAX_COMPONENTS) -> Basis:
    """The basis of reference clips (M, 16, N, D): components from every other clip, centre and unit from the rest.

    R = min(16, most, M // 32). The components are whitened, or the scene's brightness would rule. They are blind to
    fine detail, so beside them stand the RMS that they leave out (blur, noise), the RMS of frame-to-frame differences
    (frozen), and the latter over the RMS distance to the clip's own mean frame (sqrt 2 for frames in no order, less the
    smoother it moves). Units come from clips that did not choose the components, since those spread too widely along
    them. UserError for fewer than 32 clips, DataError when they are all alike.
    """
    if len(latents) < CLIPS_A_COMPONENT or most < 1:
        raise UserError(f"{len(latents)} reference clips fit no component: give at least {CLIPS_A_COMPONENT}")
    fitted, rest = latents[::2], latents[1::2]
    mean = fitted.flatten(1).mean(dim=0)
    flat = fitted.flatten(1) - mean
    power, rows = torch.linalg.eigh(flat @ flat.T)  # (M/2, M/2): far fewer clips than values
    power, rows = power.flip(0).clamp(min=0), rows.flip(1)
    rank = int((power > 1e-9 * power[0]).sum())
    count = min(MAX_COMPONENTS, most, len(latents) // CLIPS_A_COMPONENT, rank)
    if count < 1:
        raise DataError("the reference clips are all alike, so nothing can be measured by them: record other episodes")
    components = flat.T @ rows[:, :count] / power[:count].sqrt()
    scale = float(flat.square().mean().sqrt())
    described = _describe(rest, mean, components, scale)
    unit = described.std(dim=0).clamp(min=1e-3 * scale)  # what never varies must not be blown up
    return Basis(mean, components, described.mean(dim=0), unit, scale, float(power[:count].sum() / power.sum()))


def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Frechet distance of Gaussians fitted to x (..., n, R) and y (..., m, R): () or the batch (Dowson & Landau 1982).

    |mx - my|^2 + tr(Cx + Cy - 2 (Cx^1/2 Cy Cx^1/2)^1/2), as FID: the squared distance. float64, and square roots from
    eigenvalues of symmetric matrices, so nothing complex can arise. Biased upwards at small n; NaN where a value is.
    """
    (mx, cx), (my, cy) = (_moments(v.double()) for v in (x, y))
    bad = torch.isnan(cx).any(-1).any(-1) | torch.isnan(cy).any(-1).any(-1)
    power, axes = torch.linalg.eigh(torch.nan_to_num(cx))
    root = (axes * power.clamp(min=0).sqrt()[..., None, :]) @ axes.mT
    inner = root @ torch.nan_to_num(cy) @ root
    cross = torch.linalg.eigvalsh((inner + inner.mT) / 2).clamp(min=0).sqrt().sum(-1)
    spread = cx.diagonal(dim1=-2, dim2=-1).sum(-1) + cy.diagonal(dim1=-2, dim2=-1).sum(-1)
    return ((mx - my).square().sum(-1) + spread - 2 * cross).masked_fill(bad, torch.nan)


def kernel_distance(x: Tensor, y: Tensor, x_groups: Tensor | None = None, y_groups: Tensor | None = None) -> Tensor:
    """Unbiased squared MMD of x (..., n, R) and y (..., m, R) with the kernel (x.y / R + 1)^3 (KID, Binkowski 2018).

    All pairs, no subsets. Unbiased, so it is about 0 for equal distributions and may be below. With groups (n,), (m,)
    (episodes), only pairs of different groups count, within a set and between sets: clips of one episode are alike, and
    would pass for a likeness of the sets. NaN without such a pair, and where a value is.
    """
    x_groups = torch.arange(x.shape[-2]) if x_groups is None else x_groups
    y_groups = -1 - torch.arange(y.shape[-2]) if y_groups is None else y_groups

    def mean_kernel(a: Tensor, b: Tensor, a_groups: Tensor, b_groups: Tensor) -> Tensor:
        apart = a_groups[:, None] != b_groups
        kernel = (a.double() @ b.double().mT / a.shape[-1] + 1) ** 3
        return (kernel * apart).sum(dim=(-2, -1)) / apart.sum()

    within = mean_kernel(x, x, x_groups, x_groups) + mean_kernel(y, y, y_groups, y_groups)
    return within - 2 * mean_kernel(x, y, x_groups, y_groups)


Measure = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of features x, y and their groups


def swap_test(
    measure: Measure, x: Tensor, perfect: Tensor, other: Tensor, groups: Tensor, other_groups: Tensor
) -> float:
    """One-sided p that x lies no further from `other` than `perfect` does, by exchanging them episode by episode.

    A perfect model's clip and the true one are exchangeable given the context, so any exchange is as likely as what was
    found: exact at any N, whatever the bias of the distance. At best 2^-episodes; NaN where a value is.
    """
    if torch.isnan(x).any():
        return float("nan")
    draw = torch.Generator().manual_seed(0)
    names, place = torch.unique(groups, return_inverse=True)
    swap = (torch.rand(SWAPS, len(names), generator=draw) < 0.5)[:, place, None]  # (SWAPS, n, 1)

    def gap(a: Tensor, b: Tensor) -> Tensor:
        return measure(a, other, groups, other_groups) - measure(b, other, groups, other_groups)

    found = gap(x, perfect)
    swapped = torch.cat([gap(torch.where(s, perfect, x), torch.where(s, x, perfect)) for s in swap.split(50)])
    if torch.isnan(found) or torch.isnan(swapped).any():  # no pair of two episodes: there is no distance
        return float("nan")
    return (1 + int((swapped >= found - 1e-12 * found.abs()).sum())) / (1 + SWAPS)


def _describe(latents: Tensor, mean: Tensor, components: Tensor, scale: float) -> Tensor:
    """(W, 16, N, D) -> (W, R + 3): scores, RMS left out, RMS of motion, roughness."""
    flat = latents.flatten(1) - mean
    scores = flat @ components
    left_out = (flat - scores @ components.T).square().mean(dim=1).sqrt()
    moved = latents.diff(dim=1).square().mean(dim=(1, 2, 3)).sqrt()
    away = (latents - latents.mean(dim=1, keepdim=True)).square().mean(dim=(1, 2, 3)).sqrt()
    return torch.cat([scores, torch.stack([left_out, moved, moved / (away + 1e-3 * scale)], dim=1)], dim=1)


def _excess(measure: Measure, x, perfect, other, groups, other_groups) -> dict[str, Any]:
    """Distance of x minus that of `perfect`, with a jackknife interval over episodes, and the swap test's p."""

    def gap(keep: Tensor, keep_other: Tensor) -> float:
        if not keep.any() or not keep_other.any():
            return float("nan")
        rest, rest_groups = other[keep_other], other_groups[keep_other]
        a, b = (measure(v[keep], rest, groups[keep], rest_groups) for v in (x, perfect))
        return float(a - b)

    names = torch.unique(torch.cat([groups, other_groups]))
    value = gap(torch.ones_like(groups, dtype=torch.bool), torch.ones_like(other_groups, dtype=torch.bool))
    without = np.array([gap(groups != name, other_groups != name) for name in names])
    n = len(names)
    half = student_975(n - 1) * np.sqrt((n - 1) * without.var()) if n > 1 else np.nan
    return {
        "excess": Interval(value, value - half, value + half),
        "p": swap_test(measure, x, perfect, other, groups, other_groups),
    }


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (..., R) and covariance (..., R, R) of rows (..., n, R)."""
    mean = x.mean(dim=-2)
    apart = x - mean[..., None, :]
    return mean, apart.mT @ apart / (x.shape[-2] - 1)


def _numbered(*names: Sequence[str]) -> list[Tensor]:
    """Every list of names as whole numbers (n,), equal where the names are."""
    numbers = {name: i for i, name in enumerate(sorted({n for row in names for n in row}))}
    return [torch.tensor([numbers[name] for name in row]) for row in names]


def check_horizon(what: str, manifest: WindowManifest) -> None:
    """UserError for windows without a whole clip."""
    if manifest.horizon < CLIP_FRAMES:
        raise UserError(f"{what} needs clips of {CLIP_FRAMES} frames, not {manifest.horizon}: give a longer --horizon")


def check_count(name: str, clips: int) -> None:
    if clips < MIN_CLIPS:
        raise UserError(f"{clips} {name} clips say nothing about a distribution: give at least {MIN_CLIPS}")


def check_clips(name: str, clips: np.ndarray) -> None:
    check_count(name, len(clips))
    if clips.shape[1] < CLIP_FRAMES:
        raise UserError(
            f"distances are between clips of {CLIP_FRAMES} frames, but the {name} clips have {clips.shape[1]}: "
            f"give --horizon {CLIP_FRAMES} or more"
        )


def _gaps(episode: str, frames: int, avoid: WindowManifest | None) -> list[tuple[int, int]]:
    """What the windows of `avoid` leave of an episode's frames, as (first, stop)."""
    windows, length = (avoid.windows, avoid.length) if avoid else ((), 0)
    gaps, at = [], 0
    for start in [*sorted(s for e, s in windows if e == episode), frames]:
        if start > at:
            gaps.append((at, start))
        at = max(at, start + length)
    return gaps
