"""Rows of a sweep: what is published about a cell, and about each of its windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ahriuwu_cli.evaluation import sweep_verdict as verdict
from ahriuwu_cli.evaluation.metrics import psnr_from_mse
from ahriuwu_cli.evaluation.protocol import Interval, WindowManifest, paired_bootstrap
from ahriuwu_cli.evaluation.summary import delta, drift, gain
from ahriuwu_cli.evaluation.sweep_grid import reference_of, varying, walked
from ahriuwu_cli.evaluation.sweep_run import Done, Runner
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

NOTHING = Interval(np.nan, np.nan, np.nan)


@dataclass(frozen=True)
class Rows:
    """What the rows of cells on the same windows share. delta_at: None without shuffled actions."""

    world: World
    manifest: WindowManifest
    horizons: list[int]
    delta_at: int | None
    grid: list[RolloutConfig]

    @property
    def at(self) -> int:
        """The generated frame by which cells are ranked: 16, or else the last."""
        return 16 if 16 in self.horizons else self.manifest.horizon

    @property
    def varying(self) -> list[str]:
        """Which settings besides tau_ctx differ between cells."""
        return varying(self.grid)

    def title(self, cell: RolloutConfig) -> str:
        """'tau 0.1, K 4', and what else varies."""
        more = [str(getattr(cell, n)) for n in self.varying if n != "steps"]
        return ", ".join([f"tau {cell.tau_ctx:g}", f"K {cell.steps}", *more])

    def of_cell(self, d: Done, done: Sequence[Done]) -> dict[str, Any]:
        """Everything about one cell; differences to the reference of its group, null where that was not measured."""
        cell, tables, episodes, last = d.cell, d.tables, self.manifest.episodes, self.manifest.horizon
        end, passes = walked(cell, self.world.k_max)
        first = next((x for x in done if x.cell == reference_of(self.grid, cell)), None)
        gaps = {h: NOTHING if first is None else verdict.difference(d, first, episodes, h) for h in
                range(1, last + 1)}  # fmt: skip
        gains = {h: gain(tables, episodes, h) for h in range(1, last + 1)}
        psnrs = {h: paired_bootstrap(d.psnr[:, h - 1], episodes) for h in range(1, last + 1)}
        model, shown = d.scores.tables["model"], self.horizons
        above = {"g": {"psnr": d.psnr - d.fixed["floor"]["psnr"]}}
        return asdict(cell) | {
            "tau_end": end,
            "label": end if cell.ctx_label == "honest" else 0.0,
            "passes": passes,
            "psnr": {h: psnrs[h].value for h in shown},
            "psnr_of_mse": {h: float(psnr_from_mse(model["mse"][:, h - 1].mean())) for h in shown},
            "gain_db": {h: gains[h] for h in shown},
            "difference_db": {h: gaps[h] for h in shown},
            "ssim": {h: float(model["ssim"][:, h - 1].mean()) for h in shown},
            "motion_ratio": {h: verdict.motion_of(d, h) for h in shown},
            "motion_cosine": {h: verdict.cosine_of(d, h) for h in shown},
            "sharpness_ratio": {h: verdict.sharpness_of(d, h) for h in shown},
            "action_delta_db": delta(tables, "shuffled", episodes, self.delta_at) if self.delta_at else None,
            "drift_db_per_frame": drift(above, "g", episodes),
            "not_finite_frames": d.scores.not_finite,
            "frames_per_s": len(episodes) * last / max(d.scores.seconds, 1e-9),
            "curve": {"psnr": list(psnrs.values()), "gain_db": list(gains.values()), "difference_db": [*gaps.values()]},
        }

    def by_window(self, d: Done) -> Iterator[dict[str, Any]]:
        """Rows of one cell: each window at each reported frame."""
        model = d.scores.tables["model"]
        for w, (episode, start) in enumerate(self.manifest.windows):
            for h in self.horizons:
                floor, ceiling = (d.fixed[who]["psnr"][w, h - 1] for who in ("floor", "ceiling"))
                row = asdict(d.cell) | {"split": self.manifest.split, "episode": episode, "start": start, "frame": h}
                row |= {"psnr": model["psnr"][w, h - 1], "floor": floor, "ceiling": ceiling}
                row |= {"gain_db": row["psnr"] - floor, "mse": model["mse"][w, h - 1], "ssim": model["ssim"][w, h - 1]}
                row |= {"motion": model["motion"][w, h - 1], "true_motion": d.fixed["truth"]["motion"][w, h - 1]}
                row |= {"energy": model["energy"][w, h - 1], "true_energy": d.fixed["truth"]["energy"][w, h - 1]}
                yield row | {"finite": bool(np.isfinite(row["psnr"]))}

    def references(self, runner: Runner) -> dict[str, Any]:
        """floor and ceiling by reported frame and, under curves, by every frame."""
        psnr = {who: runner.fixed[who]["psnr"].mean(0) for who in ("floor", "ceiling")}
        shown = {who: {h: values[h - 1] for h in self.horizons} for who, values in psnr.items()}
        return shown | {"curves": {who: list(values) for who, values in psnr.items()}}
