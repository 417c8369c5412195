"""The lines of the metrics' self-test: what every metric must say of models and videos whose order is known.

Each part takes the bench and the rows that were measured on it, and yields lines of `checks`. A metric that a broken
model or video passes fails its line here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ahriuwu_cli.evaluation import evaluate, gaussian_world, levels, question, step_sizes
from ahriuwu_cli.evaluation.blind import SENSES
from ahriuwu_cli.evaluation.checks import Line, above, below, near
from ahriuwu_cli.evaluation.oracles import paper_level
from ahriuwu_cli.evaluation.prepare import EvaluationConfig
from ahriuwu_cli.evaluation.selftest_bench import AT, CONTEXT, DISTANT, HORIZON, TINT, WINDOWS, Bench, Row

REAL = ("oracle", "perfect model", "other clip")  # the right kind of video, if not always the right one


def frames(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    """Metrics of frames, on all controls."""
    oracle = rows["oracle"]
    yield near("PSNR of the oracle, minus the ceiling (dB)", oracle["psnr"] - oracle["ceiling"], 0, 1e-3)
    for name, key, margin in (("PSNR", "psnr", 3), ("PSNR of MSE", "of_mse", 3), ("SSIM", "ssim", 0.005)):
        rest = [row[key] for who, row in rows.items() if who != "oracle"]
        yield above(f"{name}: oracle minus the best of {len(rest)} others", oracle[key] - max(rest), margin)
        yield below(f"{name}: noise minus perfect model", rows["noise"][key] - rows["perfect model"][key], -0.1)
        yield above(f"{name}: blur minus perfect model", rows["blur"][key] - rows["perfect model"][key], 0.1)
    tinted = -10 * math.log10(2 / 3 * (TINT / 255) ** 2)
    yield near(f"PSNR of a tint of {TINT} of 255 in two of three channels (dB)", rows["tint"]["psnr"], tinted, 0.1)
    yield near("gain of persistence over itself (dB)", rows["persistence"]["gain"], 0, 0)
    yield above("gain of the perfect model at 4 (dB)", rows["perfect model"]["gain_4"], 1)
    yield near("motion ratio of the oracle", oracle["motion"], 1, 0.03)
    yield near("motion ratio of the perfect model", rows["perfect model"]["motion"], 1, 0.1)
    yield near("motion ratio of persistence", rows["persistence"]["motion"], 0, 0)
    yield below("motion ratio of a frozen video", rows["frozen"]["motion"], 0.15)
    yield above(
        "motion ratio of noise and of shuffled frames", min(rows[n]["motion"] for n in ("noise", "shuffled")), 1.3
    )
    yield above("motion cosine of the oracle", oracle["cosine"], 0.95)
    aimless = ("persistence", "noise", "shuffled", "other clip", "action-blind")
    yield below("motion cosine of what moves otherwise, largest", max(abs(rows[n]["cosine"]) for n in aimless), 0.2)
    yield above(
        "motion cosine: perfect minus action-blind",
        rows["perfect model"]["cosine"] - rows["action-blind"]["cosine"],
        0.2,
    )
    yield near("sharpness ratio of the oracle", oracle["sharp"], 1, 0.05)
    yield below(
        "sharpness ratio of blur, mean frame and mean forecast",
        max(rows[n]["sharp"] for n in ("blur", "mean frame", "mean forecast")),
        0.7,
    )
    yield above("sharpness ratio of noise", rows["noise"]["sharp"], 3)
    yield below("colour shift of oracle and blur", max(rows[n]["colour"] for n in ("oracle", "blur")), 0.001)
    yield near("colour shift of that tint", rows["tint"]["colour"], 2 / 3 * TINT / 255, 0.002)
    yield below(
        "drift of a fading video, minus the oracle's (dB a frame)", rows["fading"]["drift"] - oracle["drift"], -0.5
    )
    yield near("drift of the oracle (dB a frame)", oracle["drift"], 0, 0.05)
    forced = rows["perfect model"]["forced"] - rows["perfect model"]["psnr"]
    yield above("PSNR at 16: one step from true context minus free running (dB)", forced, 3)


def actions(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    perfect = rows["perfect model"]
    yield above("action delta of the perfect model, low end (dB)", perfect["delta_lo"], 0.5)
    yield above("action delta against random actions (dB)", perfect["delta_random"], 0.5)
    yield above("action delta where most moves (dB)", perfect["delta_moving"], 0.5)
    for key, name in (
        ("delta", "shuffled"),
        ("delta_random", "random"),
        ("delta_moving", "shuffled, where most moves"),
    ):
        blind = max(abs(rows[who][key]) for who in ("action-blind", "context-blind"))
        yield near(f"action delta of action- and context-blind copies: {name} (dB)", blind, 0, 0)


def samples(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    """Many samples of one future: what PSNR gets wrong."""
    perfect, collapsed = rows["perfect model"], rows["mean forecast"]
    yield above("PSNR is fooled: mean forecast minus perfect model (dB)", collapsed["psnr"] - perfect["psnr"], 1)
    fooled = rows["mean frame"]["psnr"] - perfect["psnr"]
    yield above("PSNR is fooled: mean frame minus perfect model at 16 (dB)", fooled, 0)
    yield near("spread ratio of the perfect model at 1", perfect["spread_1"], 1, 0.12)
    yield near("spread ratio of the perfect model at 16", perfect["spread"], 1, 0.15)
    yield near("spread ratio of the mean forecast", collapsed["spread"], 0, 1e-6)
    yield below("spread ratio of the d-blind copy at K = 4", rows["d-blind"]["spread"], 0.75)
    for key, at in (("energy_1", 1), ("energy", HORIZON)):
        rest = {who: row[key] for who, row in rows.items() if key in row and who != "perfect model"}
        least = min(rest.values()) / perfect[key]
        yield above(f"energy score at {at}: least of {len(rest)} broken models over the perfect one's", least, 1.02)


def distributions(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    """Distances between sets of clips: the right kind of video passes, whichever clip it is."""
    for name, key, p, most in (("Frechet", "frechet", "p", 0.01), ("kernel", "kernel", "kernel_p", 0.05)):
        right = min(rows[who][p] for who in REAL)
        yield above(f"{name} distance: p of oracle, perfect model and other clips, least", right, 0.01)
        wrong = [who for who in DISTANT if who not in REAL]
        yield below(
            f"{name} distance: p of {len(wrong)} broken videos, largest", max(rows[who][p] for who in wrong), most
        )
        perfect = max(rows[who][key] for who in REAL)
        yield above(
            f"{name} distance: nearest broken video minus furthest right one",
            min(rows[w][key] for w in wrong) - perfect,
            0,
        )


def steps(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    """Step sizes: consistency and its d-blind control, and what more passes a frame do."""

    def asked(name: str) -> dict[str, Any]:
        return step_sizes.consistency(bench.worlds[name], bench.store, bench.manifest, seed=bench.seed)

    perfect, blind = asked("perfect model"), asked("d-blind")
    yield (
        "consistency of the perfect model: called ok",
        float(perfect["verdict"]["ok"] is True),
        "1",
        perfect["verdict"]["ok"] is True,
    )
    yield above(
        "share of the d-blind copy's distance that it does away with", perfect["verdict"]["gap_closed"] or 0, 0.8
    )
    yield (
        "consistency of the d-blind copy: called broken",
        float(blind["verdict"]["ok"] is False),
        "1",
        blind["verdict"]["ok"] is False,
    )
    tau_blind = asked("tau-blind")
    yield (
        "consistency of the tau-blind copy: called ok",
        float(tau_blind["verdict"]["ok"] is True),
        "0",
        tau_blind["verdict"]["ok"] is not True,
    )
    sharp = {}
    for name in ("perfect model", "d-blind"):
        curve = step_sizes.step_size_curve(
            bench.worlds[name], bench.store, bench.manifest, steps=(1, 16), windows=16, seed=bench.seed
        )["rows"]
        sharp[name] = {(r["sampler"], r["steps"]): r["sharpness_ratio"][AT] for r in curve}
    own, blinded = (sharp[name]["shortcut", 1] / sharp[name]["shortcut", 16] for name in ("perfect model", "d-blind"))
    yield near("sharpness at K = 1 over K = 16, perfect model", own, 1, 0.1)
    yield below("sharpness at K = 1 over K = 16, d-blind copy", blinded, 0.6)


def by_tau(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    """Error by tau and position, against what no model can avoid."""
    found = {
        name: levels.error_by_level(bench.worlds[name], bench.store, bench.manifest, seed=bench.seed)
        for name in ("perfect model", "tau-blind", "context-blind", "action-blind")
    }
    variance = gaussian_world.settled_variance(bench.perfect.generation.tau_ctx)
    last = np.array(found["perfect model"]["error"])[CONTEXT:].mean(axis=0)
    signals = [paper_level(level) for level in found["perfect model"]["levels"]]
    floor = np.array([gaussian_world.exact_error(signal, variance) for signal in signals])
    yield near("error by tau, perfect model against the closed form: ratio", (last / floor).mean(), 1, 0.1)
    mean = {name: np.array([b["value"] for b in table["by_bin"]]) for name, table in found.items()}
    for name in ("tau-blind", "context-blind", "action-blind"):
        yield above(f"error by tau: least ratio of {name} to perfect", (mean[name] / mean["perfect model"]).min(), 1.05)
    alone = np.array(found["context-blind"]["alone"])
    yield near("error by tau, context-blind: with context over alone", (mean["context-blind"] / alone).mean(), 1, 0.1)


def senses(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    """The questions of `verify CHECKPOINT`: none fails on the perfect model, each blind copy fails its own."""
    words = {"tau": "labelled", "d": "d = 1/1 against", "action": "another action", "context": "another clip's context"}
    failed = {
        name: [c.name for c in question.verify_world(world) if not c.ok]
        for name, world in bench.worlds.items()
        if name != "mean forecast"
    }
    yield near("questions to a checkpoint that the perfect model fails", len(failed["perfect model"]), 0, 0)
    for sense in SENSES:
        own = sum(name.startswith(words[sense]) or words[sense] in name for name in failed[f"{sense}-blind"])
        yield above(f"questions about {sense} that its blind copy fails", own, 0)


def not_finite(bench: Bench, rows: dict[str, Row]) -> Iterator[Line]:
    broken = replace(bench.perfect, dynamics=_Breaks(bench.perfect.dynamics, CONTEXT + 12))
    config = EvaluationConfig(seed=bench.seed, batch=WINDOWS)
    found = evaluate.evaluate(broken, bench.store, config, broken.generation, bench.manifest)
    yield near("frames of one window that are NaN from 13 on: counted", found["not_finite_frames"]["model"], 4, 0)
    yield "... and the run is called", float(found["status"] == "nan"), "1 (nan)", found["status"] == "nan"
    hidden = found["horizons"][AT]["psnr"]["value"]
    yield "... and no mean at 16 is given", float(hidden is None), "1 (null)", hidden is None


class _Breaks:
    """The model that turns to NaN in the first window from one frame on."""

    def __init__(self, model: Any, position: int) -> None:
        self.model, self.position, self.config, self.embed = model, position, model.config, model.embed

    def new_cache(self, batch: int):
        return self.model.new_cache(batch)

    def extend(self, z_tau, tau, d, actions, known, cache, keep, unread=0):
        first = cache.frames
        z_hat = self.model.extend(z_tau, tau, d, actions, known, cache, keep).clone()
        z_hat[0, max(0, self.position - first) :] = torch.nan
        return z_hat[:, unread:]


PARTS = (frames, actions, samples, distributions, steps, by_tau, senses, not_finite)
