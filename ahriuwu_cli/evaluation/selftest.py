"""The metrics' self-test: every metric on models and videos whose order is known beforehand, good ones and broken.

What they are run on is in `selftest_bench`, what must come out in `selftest_lines`; `ahriuwu verify` calls this.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.evaluation import evaluate, selftest_lines, step_sizes
from ahriuwu_cli.evaluation.blind import blind_copy
from ahriuwu_cli.evaluation.checks import Check, above, near
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.protocol import make_manifest, paired_bootstrap
from ahriuwu_cli.evaluation.selftest_bench import CONTEXT, HORIZON, Bench, Row
from ahriuwu_cli.world import World

COLUMNS = {  # of the table: heading and format
    "gain": "{:+.2f}", "psnr": "{:.2f}", "ssim": "{:.2f}", "motion": "{:.2f}", "cosine": "{:.2f}", "sharp": "{:.2f}",
    "colour": "{:.3f}", "drift": "{:+.2f}", "delta": "{:+.2f}", "spread": "{:.2f}", "energy": "{:.4f}",
    "frechet": "{:.2f}", "p": "{:.3f}",
}  # fmt: skip


@dataclass(frozen=True)
class SelfTest:
    """checks: the lines of `ahriuwu verify`. rows: every metric (see COLUMNS) of every control, NaN where not asked."""

    checks: list[Check]
    rows: dict[str, Row]

    def as_table(self) -> str:
        """Aligned text, a line a control: at generated frame 16, with the action delta at frame 4."""
        lines = [("control", *COLUMNS)]
        for name, row in self.rows.items():
            shown = (f.format(row[c]) if math.isfinite(row.get(c, math.nan)) else "-" for c, f in COLUMNS.items())
            lines.append((name, *shown))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                (c.rjust if i else c.ljust)(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def self_test(seed: int = 0) -> SelfTest:
    """Run every metric on every control; about ten seconds on one core."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bench = Bench.build(Path(folder) / "data", seed)
        rows = bench.videos() | bench.models()
        checks = []
        for part in selftest_lines.PARTS:
            try:
                checks.extend(Check("metrics", *line) for line in part(bench, rows))
            except Exception as error:  # a metric that breaks on a control has failed; the others still count
                broke = f"{part.__name__} broke with {type(error).__name__}: {' '.join(str(error).split())[:60]}"
                checks.append(Check("metrics", broke, math.nan, "no error", False))
    return SelfTest(checks, rows)


def question_metrics(world: World, store: EpisodeStore, seed: int = 0, windows: int = 16) -> list[Check]:
    """The same question on a trained world's own blind copies, on val windows: do the metrics tell them apart?

    A world that is young may be no better than its blind copies; what must not be is that one is surely better (95 %).
    DataError when the split has no such windows.
    """
    context = min(CONTEXT, max(1, world.dynamics.config.window - 1))
    manifest = make_manifest(store, "val", context, HORIZON, windows, seed)
    config, checks = EvaluationConfig(seed=seed), []

    def ask(who: World) -> dict[str, Any]:
        return evaluate.evaluate(who, store, config, world.generation, manifest)

    def most(own: dict[str, Any], other: dict[str, Any]) -> float:
        """Upper end of the 95 % interval of PSNR at frame 1, own minus the other's: below 0, it is surely worse."""
        pairs = zip(own["windows"], other["windows"], strict=True)
        gained = [_number(a["psnr_1"]) - _number(b["psnr_1"]) for a, b in pairs]
        interval = paired_bootstrap(np.array(gained, float), manifest.episodes)
        return interval.value if math.isnan(interval.hi) else interval.hi

    own = ask(world)
    for sense in ("context", "tau"):
        other = ask(blind_copy(world, sense))
        checks.append(above(f"PSNR at 1, own minus the {sense}-blind copy's: at most (dB)", most(own, other), 0))
    if world.action_space.width:
        other = ask(blind_copy(world, "action"))
        worst = max(abs(_number(at["value"])) for by in other["action_delta_db"].values() for at in by.values())
        checks.append(near("action delta of the action-blind copy (dB)", worst, 0, 0))
        delta = own["action_delta_db"]["shuffled"]["4"]
        at_most = next((x for x in (delta["hi"], delta["value"]) if x is not None), math.nan)
        checks.append(above("action delta at 4 of the world itself: at most (dB)", at_most, 0))
    if len(world.trained_d) > 1:
        verdict = step_sizes.consistency(blind_copy(world, "d"), store, manifest, windows=8, seed=seed)["verdict"]
        checks.append(
            ("consistency of the d-blind copy: called ok", float(verdict["ok"] is True), "0", not verdict["ok"])
        )
    return [Check("blind copies", *line) for line in checks]


def _number(value: float | None) -> float:
    """A number of a result, where null is NaN."""
    return math.nan if value is None else value
