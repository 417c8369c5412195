"""The protocol that every score shares: which windows are looked at, and how sure a mean over them is.

Windows come from a stored manifest, drawn once from a seed on held-out episodes and refused when the data changed.
Intervals are bootstrapped over episodes, since windows of one episode are not independent.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from ahriuwu_cli import memory
from ahriuwu_cli.data.documents import read_object, to_json
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.metadata import SPLITS
from ahriuwu_cli.data.windows import draw_windows
from ahriuwu_cli.disk import write_whole
from ahriuwu_cli.errors import DataError, UserError
from ahriuwu_cli.ranges import CONTEXT, HORIZON, SEED, WINDOWS

FORMAT = "ahriuwu-windows/1"
RESAMPLES = 2000
FEW = 8  # episodes; below, resamples cover too little


@dataclass(frozen=True)
class WindowManifest:
    """Which windows are scored: `context` given frames, then `horizon` generated ones, from (episode, first frame)."""

    fingerprint: str  # of the dataset
    split: str
    seed: int
    context: int
    horizon: int
    windows: tuple[tuple[str, int], ...]

    @property
    def hash(self) -> str:
        """sha256 over everything else: equal hashes mean the same windows of the same data."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def length(self) -> int:
        """Frames of a window."""
        return self.context + self.horizon

    @property
    def keys(self) -> list[str]:
        """'episode:start' of every window, by which its noise is keyed."""
        return [f"{episode}:{start}" for episode, start in self.windows]

    @property
    def episodes(self) -> list[str]:
        """The episode of every window."""
        return [episode for episode, _ in self.windows]

    def save(self, path: Path) -> None:
        """Write as JSON: a temporary name first, then renamed."""
        write_whole(path, self.as_json())

    def as_json(self) -> str:
        """What `save` writes."""
        return to_json({"format": FORMAT, **asdict(self), "hash": self.hash}, 1) + "\n"

    @staticmethod
    def load(
        path: Path, store: EpisodeStore, advice: str = "leave out --manifest to make new windows"
    ) -> WindowManifest:
        """Read a manifest for this dataset. DataError, with advice, when it is damaged, edited, or of other data."""
        manifest = _parse(path, advice)
        if manifest.fingerprint != store.fingerprint:
            raise DataError(
                f"{path} was made for another dataset, or {store.path} changed since "
                f"(fingerprint {manifest.fingerprint[:12]}, now {store.fingerprint[:12]}): {advice}"
            )
        lengths = {e.id: e.frames for e in _usable(store, manifest.split)}
        for episode, start in manifest.windows:
            if not 0 <= start <= lengths.get(episode, -1) - manifest.length:
                raise DataError(
                    f"{path} asks for {manifest.length} frames from {start} of episode {episode}, which the split "
                    f"{manifest.split!r} of {store.path} does not have: {advice}"
                )
        return manifest


def make_manifest(store: EpisodeStore, split: str, context: int, horizon: int, count: int, seed: int) -> WindowManifest:
    """Draw `count` windows of a split, spread over its episodes; the same for a seed.

    Where the dataset has actions, only labelled episodes count. UserError for numbers below 1 and an unknown split,
    DataError when the split has no such windows or not so many.
    """
    for name, value in (("--context", context), ("--horizon", horizon), ("--windows", count)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    lengths = {e.id: e.frames for e in _usable(store, split)}
    if not lengths:
        labelled = " with actions" if store.action_space.width else ""
        raise DataError(f"{store.path} has no episode{labelled} in its split {split!r}: choose another --split")
    windows = draw_windows(lengths, context + horizon, count, seed)
    return WindowManifest(store.fingerprint, split, seed, context, horizon, tuple(windows))


def read_windows(
    store: EpisodeStore, manifest: WindowManifest, first: int = 0, stop: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Windows first..stop-1: frames uint8 (W, T, H, W, 3) and actions float32 (W, T-1, A); A = 0 without actions."""
    frames = read_clips(store, manifest.windows[first:stop], manifest.length)
    return frames, read_actions(store, manifest, first, stop)


def read_clips(store: EpisodeStore, windows: Sequence[tuple[str, int]], length: int) -> np.ndarray:
    """`length` frames of every (episode, first frame), uint8 (W, length, H, W, 3). MemoryError beyond the machine's."""
    shape = (len(windows), length, store.height, store.width, 3)
    memory.refuse_beyond(math.prod(shape))
    clips = np.empty(shape, np.uint8)  # clips in a list would be there twice
    for clip, (episode, start) in zip(clips, windows, strict=True):
        clip[:] = store.frames(episode, start, start + length)
    return clips


def read_actions(store: EpisodeStore, manifest: WindowManifest, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Actions float32 (W, T-1, A) of windows first..stop-1, without touching their frames."""
    windows = manifest.windows[first:stop]
    if not store.action_space.width:
        return np.zeros((len(windows), manifest.length - 1, 0), np.float32)
    return np.stack([store.actions(e, s, s + manifest.length - 1) for e, s in windows])


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval. All three are NaN when any value was; the ends alone with a single episode."""

    value: float
    lo: float
    hi: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def paired_bootstrap(
    values: np.ndarray, episodes: list[str] | np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of values (W,) with a 95 % interval from resampling episodes (clusters), with all their windows.

    For a paired comparison give the differences. Percentiles are widened for few episodes (Hesterberg 2015, "expanded
    percentile"): plain ones cover about 85 % with five. Below FEW episodes that is not enough, since no resample leaves
    the range of what was seen: there the interval is Student's t, with the standard error of a ratio. One episode says
    nothing about others: lo and hi are NaN then. So they are, with the value, where a value is not finite.
    """
    values = np.asarray(values, np.float64)
    names, cluster = np.unique(np.asarray(episodes), return_inverse=True)
    if values.shape != cluster.shape or values.ndim != 1 or not len(values):
        raise ValueError(f"values {values.shape} and episodes {cluster.shape} must be equal rows, not empty")
    if not np.isfinite(values).all():
        return Interval(np.nan, np.nan, np.nan)
    mean, n = float(values.mean()), len(names)
    if n < 2:
        return Interval(mean, np.nan, np.nan)
    return interval_of_ratio(mean, np.bincount(cluster, values), np.bincount(cluster), resamples, seed)


def interval_of_ratio(value: float, above: np.ndarray, below: np.ndarray, resamples: int, seed: int) -> Interval:
    """The interval of value = sum(above) / sum(below), sums (n,) of n >= 2 episodes, as `paired_bootstrap` says.

    Its ends are NaN where a resample has no ratio.
    """
    n = len(above)
    if n < FEW:
        apart = above - value * below  # of a ratio, by its linear part
        half = student_975(n - 1) * float(np.sqrt(n / (n - 1) * np.square(apart).sum())) / float(below.sum())
        return Interval(value, value - half, value + half)
    drawn = (_draw if n <= 1000 else _draw.__wrapped__)(n, resamples, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = (drawn @ above) / (drawn @ below)
    if not np.isfinite(ratios).all():
        return Interval(value, np.nan, np.nan)
    tail = NormalDist().cdf(-np.sqrt(n / (n - 1)) * student_975(n - 1))
    lo, hi = np.quantile(ratios, [tail, 1 - tail])
    return Interval(value, float(lo), float(hi))


@lru_cache(maxsize=1)
def _draw(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n is drawn (resamples, n); kept while it is small, since every interval asks for the same."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)


def student_975(freedom: int) -> float:
    """The 97.5 % point of Student's t: exact at one degree of freedom, else by its expansion in their inverse
    (Abramowitz & Stegun 26.7.5), 0.7 % too small at 2, 0.1 % at 3, less above."""
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    z, n = NormalDist().inv_cdf(0.975), freedom
    return float(
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def _usable(store: EpisodeStore, split: str) -> list:
    return [e for e in store.episodes(split) if e.labelled or not store.action_space.width]


def _parse(path: Path, advice: str) -> WindowManifest:
    try:
        document = read_object(path)
        if document.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of the format {FORMAT!r}")
        stated = document.pop("hash")
        windows = tuple((str(e), _whole(s)) for e, s in document.pop("windows"))
        numbers = {name: _whole(document.pop(name)) for name in ("seed", "context", "horizon")}
        names = {name: str(document.pop(name)) for name in ("fingerprint", "split")}
        if document or not windows or min(numbers["context"], numbers["horizon"]) < 1:
            raise ValueError(f"unknown or empty fields: {', '.join(document) or 'windows, context or horizon'}")
        _check_ranges(numbers | {"windows": len(windows)})
        if names["split"] not in SPLITS:
            raise ValueError(f"its split is {names['split'][:40]!r}")
        if len(set(windows)) != len(windows):
            raise ValueError("it lists a window twice")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: {advice}") from None
    except KeyError as error:
        raise DataError(f"{path} is no window manifest: it lacks {error}; {advice}") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no window manifest ({error}): {advice}") from None
    manifest = WindowManifest(windows=windows, **numbers, **names)
    if stated != manifest.hash:
        raise DataError(f"{path} was edited: its hash does not fit its content; {advice}")
    return manifest


def _check_ranges(numbers: dict[str, int]) -> None:
    """ValueError for numbers that the options of these names would refuse."""
    within = {"seed": SEED, "context": CONTEXT, "horizon": HORIZON, "windows": WINDOWS}
    for name, value in numbers.items():
        if not within[name][0] <= value <= within[name][1]:
            raise ValueError(f"its {name} is {value}, not from {within[name][0]} to {within[name][1]}")


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value
