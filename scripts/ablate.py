"""Ablations: arms of a plan, each trained for equal CPU time on the same latents and looked at on the same windows.

    python scripts/ablate.py run                        # all that scripts/ablations.toml lists and is not there yet
    python scripts/ablate.py run --only base,flat --seeds 3,4
    python scripts/ablate.py run --only base --seeds 3 --steps-of docs/results.json   # on a machine of another speed
    python scripts/ablate.py report                     # fills the tables of docs/results.md, and docs/results.json

A run takes one core: CPU seconds count, not the clock's, so that a busy machine changes how long a study takes and
hardly what comes out. A faster core takes more steps in them; with --steps-of a run takes as many as published ones.
Stop it at any time; finished arms and views are skipped. What a view gave lies in OUT/results/ARM-SEED-VIEW.json;
`ablation_tables.py` turns these into tables.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PLAN = HERE / "ablations.toml"


@dataclass(frozen=True)
class Arm:
    """One way of training. train: settings of `TrainConfig`; architecture: fields of the size's row that differ.

    blind: "d" where neither training nor sampling ever tells the network another step size than d_min.
    steps: so many optimiser steps instead of `seconds`.
    """

    name: str
    seconds: float
    seeds: tuple[int, ...]
    views: tuple[str, ...]
    train: dict[str, Any]
    architecture: dict[str, Any] = field(default_factory=dict)
    blind: str | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Plan:
    """What scripts/ablations.toml says."""

    windows: int
    context: int
    horizon: int
    record: list[str]
    tokenizer: list[str]
    views: dict[str, dict[str, Any]]
    arms: tuple[Arm, ...]


def read_plan(path: Path = PLAN, seeds: tuple[int, ...] | None = None) -> Plan:
    """The plan, strictly: an unknown key is a KeyError or TypeError here, before anything is trained."""
    document = tomllib.loads(path.read_text())
    study, common, views = document["study"], document["train"], document["views"]
    arms = []
    for entry in document["arm"]:
        settings = {"seconds": study["seconds"], "seeds": study["seeds"], "views": ["plain"], "train": {}} | entry
        settings["train"] = common | settings["train"]
        arm = Arm(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
        assert set(arm.views) <= set(views), arm
        assert arm.blind in (None, "d"), arm
        arms.append(arm if seeds is None else Arm(**{**vars(arm), "seeds": seeds}))
    assert len({arm.name for arm in arms}) == len(arms), "two arms of one name"
    limits = {name: study[name] for name in ("windows", "context", "horizon")}
    return Plan(**limits, **document["data"], views=views, arms=tuple(arms))


def main() -> None:
    a = _arguments()
    plan = read_plan(a.plan, a.seeds)
    arms = [arm for arm in plan.arms if a.only is None or arm.name in chosen(a.only, plan)]
    if a.steps_of:
        arms = [replace(arm, steps=_published_steps(arm, a.steps_of)) for arm in arms]
    if a.action == "report":
        from ablation_tables import write_report

        numbers = a.docs / ("results.json" if a.plan == PLAN else f"results/{a.plan.stem}.json")
        return write_report(tomllib.loads(a.plan.read_text()), a.out, a.docs, numbers)
    os.environ["OMP_NUM_THREADS"] = "1"
    _prepare(plan, a.out)
    for seed in dict.fromkeys(s for arm in arms for s in arm.seeds):  # a whole set of arms before the next seed
        for arm in arms:
            if seed in arm.seeds:
                train(plan, arm, seed, a.out)
                for view in arm.views:
                    look(plan, arm, seed, view, a.out)


def chosen(names: list[str], plan: Plan) -> list[str]:
    """The names, all of which are arms of the plan; else a sentence with the nearest one, and exit code 2."""
    known = [arm.name for arm in plan.arms]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or known
            _refuse(f"--only {name}: {len(known)} arms, and none of this name; try {', '.join(near)}")
    return names


def train(plan: Plan, arm: Arm, seed: int, out: Path) -> None:
    """Train one arm with one seed, into OUT/worlds/ARM-SEED, unless it is there."""
    import torch

    from ahriuwu_cli.config import TrainConfig
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.sizes import SIZES
    from ahriuwu_cli.training.assemble import assemble
    from ahriuwu_cli.training.checkpoint import load_tokenizer
    from ahriuwu_cli.training.signals import StopRequest

    folder = _world(out, arm, seed)
    if (folder / "last" / "config.json").exists():
        return
    _say(f"train {folder.name}: " + (f"{arm.steps} steps" if arm.steps else f"{arm.seconds:g} CPU seconds"))
    torch.set_num_threads(1)
    settings = dict(arm.train)
    if arm.architecture:
        size = f"{settings['size']}-{arm.name}"
        SIZES[size] = {**SIZES[settings["size"]], **arm.architecture}
        settings["size"] = size
    budget = None if arm.steps else float(arm.seconds)
    config = TrainConfig(steps=arm.steps, budget=budget, seed=seed, **settings)
    store, tokenizer = EpisodeStore.open(out / "data"), load_tokenizer(out / "tokenizer")
    trainer = assemble(
        store, tokenizer, config, folder, f"python scripts/ablate.py run --only {arm.name} --seeds {seed}",
        device=torch.device("cpu"), overwrite=True,
    )  # fmt: skip
    trainer.now = time.process_time
    if arm.blind == "d":
        for network in (trainer.model, trainer.average):
            network.register_forward_pre_hook(_never_told_d)
    with StopRequest() as stop:
        trainer.train(lambda line: None, stop)


def look(plan: Plan, arm: Arm, seed: int, view: str, out: Path) -> None:
    """Evaluate one view of a trained arm, into OUT/results, unless it is there."""
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.disk import write_whole
    from ahriuwu_cli.evaluation.blind import CleanContextTold, blind_copy
    from ahriuwu_cli.evaluation.evaluate import evaluate
    from ahriuwu_cli.evaluation.looks import LOOKS, look_closer
    from ahriuwu_cli.evaluation.prepare import EvaluationConfig
    from ahriuwu_cli.evaluation.protocol import make_manifest
    from ahriuwu_cli.training.checkpoint import load_world

    path = out / "results" / f"{arm.name}-{seed}-{view}.json"
    if path.exists():
        return
    _say(f"look at {path.stem}")
    settings = dict(plan.views[view])
    told_ctx, looks = settings.pop("told_ctx", None), settings.pop("looks", ())
    counts = {"context": plan.context}
    counts |= {name: settings.pop(name, getattr(plan, name)) for name in ("windows", "horizon")}
    store, world = EpisodeStore.open(out / "data"), load_world(_world(out, arm, seed) / "last", "cpu")
    generation = world.generation_with(settings)
    if arm.blind is not None:
        world = blind_copy(world, arm.blind)
    if told_ctx is not None:
        world = replace(world, dynamics=CleanContextTold(world.dynamics, told_ctx))
    config = EvaluationConfig(**counts)
    manifest = make_manifest(store, "test", plan.context, counts["horizon"], counts["windows"], 0)
    result = evaluate(world, store, config, generation, manifest)
    result |= look_closer(world, store, config, generation, manifest, [name for name in LOOKS if name in looks])
    log = (_world(out, arm, seed) / "metrics.jsonl").read_text().splitlines()
    result["study"] = {
        "arm": arm.name, "seed": seed, "view": view, "train": arm.train, "architecture": arm.architecture,
        "cpu_seconds": None if arm.steps else arm.seconds, "steps": world.facts["step"],
        "loss_by_tau_bin": [json.loads(line)["loss_by_tau_bin"] for line in log if "loss_by_tau_bin" in line][-1],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, allow_nan=False) + "\n")


def _published_steps(arm: Arm, numbers: Path) -> int:
    """The mean over seeds of the optimiser steps that an arm took, from what `report` wrote."""
    taken = {row["seed"]: row["steps"] for row in json.loads(numbers.read_text())["rows"] if row["arm"] == arm.name}
    if not taken:
        sys.exit(f"{numbers} knows no arm {arm.name}: leave it out by --only, or train it by its seconds")
    return round(sum(taken.values()) / len(taken))


def _never_told_d(network, inputs: tuple) -> tuple:
    """What a network gets, (z_tau, tau, d, actions, known), with d_min for every d."""
    import torch

    z_tau, tau, d, *rest = inputs
    return z_tau, tau, torch.full_like(d, 1 / network.config.k_max), *rest


def _prepare(plan: Plan, out: Path) -> None:
    """The dataset and the tokenizer that all arms share."""
    command = [sys.executable, "-m", "ahriuwu_cli"]
    if not (out / "data" / "dataset.json").exists():
        subprocess.run([*command, "record", *plan.record, "--out", str(out / "data")], check=True)
    if not (out / "tokenizer" / "config.json").exists():
        where = [str(out / "data"), "--out", str(out / "tokenizer")]
        subprocess.run([*command, "train", "tokenizer", *where, *plan.tokenizer], check=True)


def _world(out: Path, arm: Arm, seed: int) -> Path:
    return out / "worlds" / f"{arm.name}-{seed}"


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "report"))
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"), help="where data, worlds and results lie")
    parser.add_argument("--only", type=names, help="names of arms, by commas")
    parser.add_argument("--seeds", type=seeds, help="other seeds than the plan's, by commas")
    parser.add_argument("--steps-of", type=Path, help="train each arm for the steps that it took in this results.json")
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of results.md and results.json")
    a = parser.parse_args()
    if a.action == "report":
        for option in ("only", "seeds", "steps_of"):
            if getattr(a, option) is not None:
                _refuse(f"--{option.replace('_', '-')} is for `run`: `report` takes all that is in --out")
    return a


def names(text: str) -> list[str]:
    return text.split(",")


def seeds(text: str) -> tuple[int, ...]:
    return tuple(int(s) for s in text.split(","))


def _refuse(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
