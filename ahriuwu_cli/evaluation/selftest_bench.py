"""What the metrics' self-test is run on: models and videos whose order is known, scored as every evaluation scores.

In the closed-form world of `gaussian_world`: the perfect model, its blind copies and a collapsed sampler are rolled
out; noise, blur, frozen, shuffled, tinted and other videos are made from the truth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation import distances, evaluate, gaussian_world, scores, spread, summary
from ahriuwu_cli.evaluation.blind import SENSES, blind_copy
from ahriuwu_cli.evaluation.controls import partners
from ahriuwu_cli.evaluation.generate import generate, persist
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import WindowManifest, make_manifest, read_windows
from ahriuwu_cli.world import World

CONTEXT, HORIZON, WINDOWS = 8, 16, 48
AT = str(HORIZON)
TINT = 25  # levels of red and blue
DISTANT = (  # what distances between sets of clips are measured of
    "oracle", "other clip", "perfect model",
    "persistence", "mean frame", "noise", "blur", "shuffled", "tint", "few clips",
)  # fmt: skip
Row = dict[str, float]  # metric -> value at generated frame 16


@dataclass(frozen=True)
class Bench:
    """The dataset, the windows, and what is shown on them."""

    store: EpisodeStore
    manifest: WindowManifest
    frames: np.ndarray  # (W, T, H, W, 3)
    actions: np.ndarray
    worlds: dict[str, World]
    others: tuple[np.ndarray, list[str]]  # real clips of the same split, with their episodes
    reference: np.ndarray  # real clips of the train split
    seed: int

    @staticmethod
    def build(path: Path, seed: int) -> Bench:
        store = gaussian_world.record(path, seed=seed)
        manifest = make_manifest(store, "test", CONTEXT, HORIZON, WINDOWS, seed)
        perfect = gaussian_world.exact_world()
        worlds = {"perfect model": perfect, "mean forecast": replace(perfect, dynamics=gaussian_world.MeanForecast())}
        worlds |= {f"{sense}-blind": blind_copy(perfect, sense) for sense in SENSES}
        others = distances.reference_clips(store, WINDOWS, split="val", seed=seed)
        reference, _ = distances.reference_clips(store, distances.REFERENCE_CLIPS, split="train", seed=seed)
        return Bench(store, manifest, *read_windows(store, manifest), worlds, others, reference, seed)

    @property
    def perfect(self) -> World:
        return self.worlds["perfect model"]

    def videos(self) -> dict[str, Row]:
        """What needs no model: made from the truth (W, L, H, W, 3) and scored as a rollout is."""
        truth, rng = self.frames[:, CONTEXT:], np.random.default_rng(self.seed)
        mean = scores.mean_frame(self.store)
        tables, again = scores.references(self.perfect, self.frames, CONTEXT, 32, mean=mean)
        flat = np.broadcast_to(mean, truth.shape)
        fading = np.linspace(0, 1, HORIZON)[None, :, None, None, None]
        shown = {
            "oracle": _reconstructed(self.perfect, self.frames),
            "persistence": persist(self.frames, CONTEXT),
            "mean frame": flat,
            "noise": rng.integers(0, 256, truth.shape),
            "blur": _blurred(truth),
            "frozen": np.repeat(truth[:, :1], HORIZON, axis=1),
            "shuffled": truth[:, (7 * np.arange(HORIZON) + 3) % HORIZON],  # no frame keeps its place
            "tint": np.clip(truth.astype(int) + np.array([TINT, 0, -TINT]), 0, 255),
            "fading": (1 - fading) * truth + fading * flat,
            "other clip": truth[partners(self.manifest.episodes)],
            "few clips": np.concatenate([truth[:4], np.clip(2.0 * mean - truth[:4], 0, 255)])[np.arange(WINDOWS) % 8],
        }
        rows = {}
        for name, video in shown.items():
            video = np.ascontiguousarray(np.asarray(video).round().astype(np.uint8))
            own = again if name == "oracle" else self.frames[:, CONTEXT - 1]
            made = scores.score(video, truth, before=own, true_before=self.frames[:, CONTEXT - 1])
            found = tables | {"model": made}
            rows[name] = _row(
                summary.by_horizon(found, self.manifest.episodes, HORIZON),
                summary.drift(found, "model", self.manifest.episodes).value,
            ) | self._distance(name, video)
        return rows

    def models(self) -> dict[str, Row]:
        """What is rolled out: the whole of `evaluate` and the spread of four rollouts."""
        rows, config = {}, EvaluationConfig(seed=self.seed)
        for name, world in self.worlds.items():
            result = evaluate.evaluate(world, self.store, config, world.generation, self.manifest)
            at = result["horizons"][AT]
            row = _row(at, result["drift_db_per_frame"]["model"]["value"])
            row["delta"] = result["action_delta_db"]["shuffled"]["4"]["value"]
            row["delta_lo"] = result["action_delta_db"]["shuffled"]["4"]["lo"]
            row["delta_random"] = result["action_delta_db"]["random"]["4"]["value"]
            row["delta_moving"] = result["action_delta_moving_db"]["shuffled"]["4"]["value"]
            row["gain_4"] = result["horizons"]["4"]["gain_db"]["value"]
            row["forced"] = at["teacher_forced_psnr"]
            found = spread.sample_spread(
                world, self.store, self.manifest, world.generation, seeds=4, seed=self.seed, horizons=(1, HORIZON)
            )["horizons"]
            row["spread"], row["energy"] = (found[AT][n]["value"] for n in ("spread_ratio", "energy_score"))
            row["spread_1"], row["energy_1"] = (found["1"][n]["value"] for n in ("spread_ratio", "energy_score"))
            if name in DISTANT:
                made = generate(
                    world, self.frames, self.actions, self.manifest.keys, world.generation,
                    seed=self.seed, context=CONTEXT,
                )  # fmt: skip
                row |= self._distance(name, made.frames)
            rows[name] = row
        return rows

    def _distance(self, name: str, video: np.ndarray) -> Row:
        if name not in DISTANT:
            return {}
        found = distances.latent_distances(
            self.perfect, video, self.frames,
            context=CONTEXT, episodes=self.manifest.episodes, others=self.others, reference=self.reference,
        )  # fmt: skip
        frechet, kernel = found["latent_frechet"], found["latent_kernel"]
        return {
            "frechet": frechet["generated"], "p": frechet["p"], "kernel": kernel["generated"], "kernel_p": kernel["p"],
            "floor": frechet["real_floor"], "kernel_floor": kernel["real_floor"],
        }  # fmt: skip


def _reconstructed(world: World, frames: np.ndarray) -> np.ndarray:
    """What a model shows that knows the future: decode(encode(truth)) of the frames after the context."""
    with torch.no_grad():
        return world.decode(world.encode(torch.from_numpy(frames)))[:, CONTEXT:].numpy()


def _row(at: dict[str, Any], drift: float) -> Row:
    def value(number: Any) -> float:
        number = getattr(number, "value", number)
        return float(number["value"] if isinstance(number, dict) else number)

    names = {
        "gain": "gain_db", "psnr": "psnr", "ssim": "ssim", "motion": "motion_ratio", "cosine": "motion_cosine",
        "sharp": "sharpness_ratio", "colour": "colour_shift", "of_mse": "psnr_of_mse", "ceiling": "ceiling",
    }  # fmt: skip
    return {name: value(at[key]) for name, key in names.items()} | {"drift": drift}


def _blurred(frames: np.ndarray) -> np.ndarray:
    """3 x 3 box blur, edges repeated, of frames (..., H, W, 3)."""
    wide = np.pad(frames.astype(float), [(0, 0)] * (frames.ndim - 3) + [(1, 1), (1, 1), (0, 0)], mode="edge")
    height, width = frames.shape[-3:-1]
    return sum(wide[..., y : y + height, x : x + width, :] for y in range(3) for x in range(3)) / 9
