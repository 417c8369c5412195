"""What a sweep says: the best cell, those that cannot be told from it, warnings, and whether a default should change.

Cells are ranked by mean PSNR at one generated frame (gain over persistence ranks alike, since the floor is common).
"Cannot be told": the 95 % interval of the paired difference to the best reaches 0. With one episode nothing can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.evaluation.metrics import motion_cosine, ratio
from ahriuwu_cli.evaluation.protocol import Interval, paired_bootstrap
from ahriuwu_cli.evaluation.sweep_grid import OTHERS, group, name, names, untrained_taus, varying
from ahriuwu_cli.evaluation.sweep_run import Done
from ahriuwu_cli.rollout import RolloutConfig
from ahriuwu_cli.world import World

FROZEN = 0.3  # motion ratio below which a rollout is called frozen
BLURRIER = 0.05  # of the truth's gradient energy: less than this is not called a difference in sharpness


@dataclass(frozen=True)
class Best:
    """The best cell, and the others that cannot be told from it with what they are behind it, in dB."""

    cell: Done
    same: list[tuple[Done, Interval]]

    def to_json(self, at: int) -> dict[str, Any]:
        same = [asdict(d.cell) | {"behind_db": gap} for d, gap in self.same]
        return asdict(self.cell.cell) | {"at": at, "not_told_apart": same}


def difference(a: Done, b: Done, episodes: Sequence[str], h: int) -> Interval:
    """PSNR of a minus that of b at generated frame h, dB, paired by window."""
    return paired_bootstrap(a.psnr[:, h - 1] - b.psnr[:, h - 1], episodes)


def find_best(done: Sequence[Done], episodes: Sequence[str], at: int) -> Best | None:
    """The finite cell of highest PSNR at generated frame `at`; None when no cell is finite."""
    finite = [d for d in done if np.isfinite(d.psnr[:, at - 1]).all()]
    if not finite:
        return None
    top = max(finite, key=lambda d: d.psnr[:, at - 1].mean())
    gaps = [(d, difference(top, d, episodes, at)) for d in finite if d is not top]
    return Best(top, [(d, gap) for d, gap in gaps if not gap.lo > 0])


def warnings(world: World, done: Sequence[Done], best: Best | None, episodes: Sequence[str], at: int) -> list[str]:
    """What to be careful about. done: the cells that were measured, also those that the grid still lacks."""
    if not done:
        return []
    also = varying([d.cell for d in done])

    def listed(cells: Sequence[Done]) -> str:
        return names([d.cell for d in cells], also)

    found = ["no cell is finite, so there is no best"] if best is None else _edges(done, best)
    below = [d for d in done if gain_of(d, at) < 0]
    frozen = [d for d in done if motion_of(d, at) < FROZEN]
    if below:
        found.append(f"below persistence at frame {at}: tau {listed(below)}")
    if frozen:
        found.append(f"frozen (motion ratio below {FROZEN}): tau {listed(frozen)}")
    return found + _untrained(world, done, listed) + (disagreement(done, best, episodes, at) if best else [])


def disagreement(done: Sequence[Done], best: Best, episodes: Sequence[str], at: int) -> list[str]:
    """PSNR prefers blur: a sentence when the best cell is clearly blurrier than one that it should be compared with.

    That is every cell that cannot be told from it, and the one whose sharpness ratio is nearest to 1 (by |log|).
    Clearly blurrier: nearer to 1 lies the other, the best has less gradient energy by BLURRIER of the truth's or more,
    and the 95 % interval of that difference, paired by window, lies above 0.
    """
    true = best.cell.fixed["truth"]["energy"][:, at - 1].mean()
    if not true:  # flat frames: nothing is sharper or blurrier
        return []
    others = [d for d, _ in best.same]
    finite = [d for d in done if math.isfinite(off_sharpness(d, at))]
    nearest = min(finite, key=lambda d: off_sharpness(d, at), default=None)
    if nearest is not None and nearest is not best.cell and nearest not in others:
        others.append(nearest)
    also, sentences = varying([d.cell for d in done]), []
    for other in others:
        more = (_energy(other, at) - _energy(best.cell, at)) / true
        clear = float(more.mean()) >= BLURRIER and paired_bootstrap(more, episodes).lo > 0
        if clear and off_sharpness(other, at) < off_sharpness(best.cell, at):
            gap = difference(best.cell, other, episodes, at).value
            sentences.append(f"tau {name(other.cell, also)} has {sharpness_of(other, at):.2f}, {gap:.2f} dB behind")
    if not sentences:
        return []
    if len(sentences) > 3:
        sentences[3:] = [f"and so on for {len(sentences) - 3} more"]
    return [
        f"PSNR and sharpness disagree: the best, tau {name(best.cell.cell, also)}, has a sharpness ratio of "
        f"{sharpness_of(best.cell, at):.2f}, while {'; '.join(sentences)}: PSNR prefers blur, so look at the video"
    ]


def decide(done: Sequence[Done], own: RolloutConfig, episodes: Sequence[str], at: int) -> dict[str, Any]:
    """Which tau_ctx to keep as the default: {"tau_ctx", "before", "changed", "why", "ahead_db"}.

    Only cells that differ from the world's own settings by tau_ctx alone count. The default is left alone unless the
    best of them can be told from it.
    """
    mine = [d for d in done if group(d.cell) == group(own)]
    now = next((d for d in mine if d.cell == own), None)
    best = find_best(mine, episodes, at)
    kept = {"before": own.tau_ctx, "tau_ctx": own.tau_ctx, "changed": False, "ahead_db": None}
    if best is None or now is None:
        return kept | {"why": "no cell is finite" if best is None else "the default was not measured"}
    new = best.cell.cell.tau_ctx
    if best.cell is now:
        return kept | {"why": f"the default, tau {new:g}, is the best"}
    gap = difference(best.cell, now, episodes, at)
    if gap.lo > 0:
        why = f"tau {new:g} is better than the default, tau {own.tau_ctx:g}"
    elif math.isnan(gap.value):
        why = f"the default, tau {own.tau_ctx:g}, is not finite"
    else:
        why = f"the default, tau {own.tau_ctx:g}, cannot be told from the best, tau {new:g}"
        return kept | {"why": why, "ahead_db": gap}
    return kept | {"tau_ctx": new, "changed": True, "why": why, "ahead_db": gap}


def check_on_test(test: dict[str, Any], at: int, decision: dict[str, Any] | None) -> list[str]:
    """Sentences where test clearly says the opposite of val; a tau_ctx that loses to the default there is not kept.

    test: its differences (Interval by frame). decision: of `decide`; changed in place.
    """
    found = []
    for other, words in (("reference", "the reference"), ("own", "the checkpoint's own settings")):
        gap = test.get(f"best_minus_{other}_db", {}).get(at)
        if gap and gap.hi < 0:
            found.append(f"on test the best is clearly worse than {words} at frame {at}: the choice does not hold")
    gap = test.get("chosen_minus_own_db", {}).get(at)
    if decision and gap and gap.hi < 0:
        why = f"tau {decision['tau_ctx']:g} beats it on val, but is clearly worse on test"
        decision.update(tau_ctx=decision["before"], changed=False, why=why)
    return found


def evidence(result: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps about a tau_ctx that was written back: what was measured, on what, and how sure it is.

    result: of `sweep`, with a decision that changes the default.
    """
    told, made = result["write_back"], result["settings"]
    own = made["own"] | {"tau_ctx": told["tau_ctx"]}
    at, test = str(result["compared_at"]), result["test"]
    cell = next(c for c in result["cells"] if all(c[n] == value for n, value in own.items()))
    found = {
        "measured": f"gain over persistence in dB at generated frame {at}, free running; {LABEL}",
        "tau_ctx_before": told["before"],
        "tau_ctx": told["tau_ctx"],
        "gain_db": cell["gain_db"][at],
        "ahead_of_before_db": told["ahead_db"],
        "tried": sorted({c["tau_ctx"] for c in result["cells"] if all(c[n] == own[n] for n in OTHERS)}),
        "generation": own,
        "split": made["split"],
        "n": result["n"],
        "context": made["evaluation"]["context"],
        "horizon": made["evaluation"]["horizon"],
        "seed": made["evaluation"]["seed"],
        "manifest_hash": made["manifest_hash"],
        "dataset_fingerprint": made["dataset_fingerprint"],
        "checkpoint_hash": made["checkpoint_hash"],
        "interval": made["interval"],
        "warnings": result["warnings"],
        "ahriuwu": made["ahriuwu"],
    }
    if test and "chosen" in test["cells"]:
        found["test"] = {
            "gain_db": test["cells"]["chosen"]["gain_db"][at],
            "ahead_of_before_db": test["chosen_minus_own_db"][at],
            "n": test["n"],
            "manifest_hash": test["manifest_hash"],
        }
    return found


def gain_of(d: Done, h: int) -> float:
    """Mean gain over persistence at generated frame h, dB."""
    return float((d.psnr[:, h - 1] - d.fixed["floor"]["psnr"][:, h - 1]).mean())


def motion_of(d: Done, h: int) -> float:
    """Motion ratio over generated frames 1..h."""
    return ratio(d.scores.tables["model"]["motion"][:, :h].mean(), d.fixed["truth"]["motion"][:, :h].mean())


def cosine_of(d: Done, h: int) -> float:
    """Cosine of generated and true frame-to-frame change over generated frames 1..h."""
    table = d.scores.tables["model"]
    return motion_cosine(*(table[f"motion_{product}"][:, :h].mean() for product in ("gg", "gt", "tt")))


def sharpness_of(d: Done, h: int) -> float:
    """Sharpness ratio at generated frame h."""
    return ratio(_energy(d, h).mean(), d.fixed["truth"]["energy"][:, h - 1].mean())


def off_sharpness(d: Done, h: int) -> float:
    """|log(sharpness ratio)|: how far from as sharp as the truth; infinite for a flat frame, NaN if unknown."""
    value = sharpness_of(d, h)
    return math.inf if value == 0 else abs(math.log(value))


def _energy(d: Done, h: int) -> np.ndarray:
    return d.scores.tables["model"]["energy"][:, h - 1]


def _edges(done: Sequence[Done], best: Best) -> list[str]:
    found, top = [], best.cell.cell
    taus = [d.cell.tau_ctx for d in done if group(d.cell) == group(top)]
    if len(taus) > 1 and top.tau_ctx in (min(taus), max(taus)):
        advice = "widen --taus" if top.tau_ctx > 0 else "nothing lies below it"
        found.append(f"the best tau {top.tau_ctx:g} lies at the grid's edge: {advice}")
    steps = {d.cell.steps for d in done}
    if len(steps) > 1 and top.steps in (min(steps), max(steps)):
        advice = "widen --steps" if top.steps > 1 else "nothing lies below it"
        found.append(f"the best K {top.steps} lies at the grid's edge: {advice}")
    return found


def _untrained(world: World, done: Sequence[Done], listed) -> list[str]:
    """Cells whose context carries a label that the training never drew."""
    labels = {d.cell: d.cell.tau_ctx if d.cell.ctx_label == "honest" else 0.0 for d in done}
    unknown = untrained_taus(world, sorted(set(labels.values())))
    if unknown is None:
        return [
            f"whether these tau were trained is not known: the checkpoint does not say what tau_ctx its "
            f"{world.forcing!r} forcing had"
        ]
    cells = [d for d in done if labels[d.cell] in unknown]
    if not cells:
        return []
    return [f"outside the trained range (the label of context was never drawn by its {world.forcing!r} forcing): "
            f"tau {listed(cells)}"]  # fmt: skip
