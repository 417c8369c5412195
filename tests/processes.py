"""What one of several processes does for test_distributed: `python processes.py FOLDER`, ranks by torchrun's names.

Used as a module by the tests for the one-process side of every comparison, so both sides run the same lines.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from small import small_dataset

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.training import loop as loop_module
from ahriuwu_cli.training.assemble import assemble, fit_linear_tokenizer
from ahriuwu_cli.training.batches import draw_batch
from ahriuwu_cli.training.distributed import PARALLEL, Group, join
from ahriuwu_cli.training.sharding import gathered
from ahriuwu_cli.training.signals import StopRequest

SMALL = {  # the size "test", while these tests run
    "width": 16, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_hidden": 30, "window": 6, "time_every": 2, "k_max": 8,
}  # fmt: skip
PAPER = SMALL | {"conditioning": "token", "registers": 2, "linear_skip": False}  # as the sizes from medium on are
CONFIG = TrainConfig(
    size="test", steps=6, budget=None, batch=8, frames=6, log_every=1, preview_windows=2, warmup=2, bootstrap_share=0.5
)
STEPS = {
    "bootstrap": CONFIG,
    "accumulated": replace(CONFIG, accumulate=2),
    "activations again": replace(CONFIG, checkpoint_activations=True),
    "images": replace(CONFIG, single_image_share=0.5),
    "few of a kind": replace(CONFIG, batch=2, bootstrap_share=0.5, single_image_share=0.5),  # not on every process
    "long": replace(CONFIG, long_frames=12, long_every=1),
    "behind a past of its own": replace(CONFIG, forcing="resampled", accumulate=2),
}
RUNS = {
    "muon": CONFIG,
    "half a momentum": replace(CONFIG, optimizer_state="bfloat16"),
    "adamw": replace(CONFIG, optimizer="adamw", accumulate=2),
    "paper": replace(CONFIG, size="paper"),
}


def prepare(folder: Path) -> None:
    """The dataset that all processes read."""
    small_dataset(folder / "data")


def trainer_for(folder: Path, config: TrainConfig, out: Path, group: Group, **options):
    store = EpisodeStore.open(folder / "data")
    tokenizer = fit_linear_tokenizer(store, (8, 8), 6, 0.5)
    with patch.dict(SIZES, test=SMALL, paper=PAPER):
        return assemble(store, tokenizer, config, out, "train", device=group.device, group=group, **options)


def gradients(folder: Path, mode: str, group: Group) -> None:
    """The whole gradient of the first step of each of STEPS, before it is clipped or used."""
    for name, config in STEPS.items():
        trainer = trainer_for(folder, replace(config, clip=1e9), folder / mode / "steps" / name, group)
        found = {}

        def look(_, trainer=trainer, found=found) -> None:
            found.update({n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None})

        before, loop_module.apply = loop_module.apply, look
        try:
            trainer._update()
        finally:
            loop_module.apply = before
        whole = gathered(found, keep=group.leads)
        if group.leads:
            save_file(whole, folder / mode / "steps" / f"{name}.safetensors")


def runs(folder: Path, mode: str, group: Group) -> None:
    """Each of RUNS to its end; and one that stops after 3 steps, for others to go on with."""
    for name, config in RUNS.items():
        train(trainer_for(folder, config, folder / mode / name, group))
        train(trainer_for(folder, config, folder / mode / f"{name} half", group), stop_at=3)


def clips(folder: Path, mode: str, group: Group) -> None:
    """Which windows this process read at three steps, and a number of each clip's noise."""
    pack = trainer_for(folder, CONFIG, folder / mode / "clips", group).pack
    seen = []
    for step in range(3):
        for micro in range(2):
            config = replace(CONFIG, accumulate=2, single_image_share=0.25)
            batch = draw_batch(pack, config, 8, step, micro, group.rank, group.world)
            levels = [round(float(t), 6) for t in batch.tau.sum(1)]
            noise = [float(n.flatten()[0]) for n in batch.noise]
            seen += [[step, *row] for row in zip(batch.windows, levels, noise, strict=True)]
    (folder / mode / f"clips-{group.rank}.json").write_text(json.dumps(seen))


def resumed(folder: Path, mode: str, group: Group, half: Path) -> list[str]:
    """Go on with what another number of processes began; what was said of it."""
    name, said = half.name.removesuffix(" half"), []
    trainer = trainer_for(folder, RUNS[name], half, group, resume=True, announce=said.append)
    before = max(half.glob("state/*/state-*"))  # the newest, named by its hash
    group.wait()
    trainer.run.save(trainer)
    group.wait()
    assert before.exists(), "a state that was saved before the next step differs from the one that was loaded"
    train(trainer)
    return said


def broken(folder: Path, mode: str, group: Group) -> None:
    """A run to its end, and the same run as two: one that stops after 3 steps, and what goes on with it."""
    config = replace(CONFIG, batch=2 * group.world)
    for name, stops in {"unbroken": [None], "broken": [3, None]}.items():
        for i, stop_at in enumerate(stops):
            train(trainer_for(folder, config, folder / f"{mode} {name}", group, resume=i > 0), stop_at)


def train(trainer, stop_at: int | None = None) -> None:
    trainer.train(lambda line: None, StopRequest(), stop_at)


def everything(folder: Path, mode: str, group: Group) -> None:
    for work in (gradients, runs, clips):
        work(folder, mode, group)
    for name in RUNS:
        half = folder / f"one for {mode}" / f"{name} half"
        if half.exists():
            said = resumed(folder, mode, group, half)
            if group.leads:
                (folder / mode / f"{name} said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join("cpu", None) as this:
        for mode in PARALLEL:
            (everything if this.world == 2 else broken)(Path(sys.argv[1]), mode, replace(this, parallel=mode))
