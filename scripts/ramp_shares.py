"""What a ramp spends training on: draws, loss and gradient by noise level, for trained worlds (docs/results.md, a).

    python scripts/ramp_shares.py runs/ablations/worlds/base-? --data runs/ablations/data

By bins of tau (0 clean, 1 noise): the share of frames that each forcing draws there, and for each ramp the share of the
loss and of the gradient (its norm over all weights, of that bin's frames alone) of the flow term (d = 1/k_max).
Several worlds (seeds of one arm) share the table: the mean, and least and most where they differ.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.diffusion import tau as tau_
from ahriuwu_cli.diffusion.forcing import FORCINGS
from ahriuwu_cli.diffusion.objective import x_prediction_loss
from ahriuwu_cli.training.batches import draw_batch
from ahriuwu_cli.training.checkpoint import load_world
from ahriuwu_cli.training.clip_loss import denoiser

RAMPS = ("paper", "flat", "inverted")


def main() -> None:
    a = _arguments()
    torch.set_num_threads(1)
    rows = [shares(world, a.data, a.forcing, a.bins, a.batches) for world in a.world]
    print(as_markdown(rows, a.bins))
    if a.json:
        Path(a.json).write_text(json.dumps(rows, indent=1) + "\n")


def shares(folder: Path, data: Path, forcing: str, bins: int, batches: int) -> dict:
    """One run folder's {"draws": {forcing: [share of each bin]}, "loss": {ramp: ...}, "gradient": {ramp: ...}}."""
    world = load_world(folder / "last", "cpu")
    pack = open_pack(EpisodeStore.open(data), world.tokenizer, "train")
    config = TrainConfig.from_json(world.facts["train"])
    config = replace(config, forcing=forcing, bootstrap_share=0.0, single_image_share=0.0, accumulate=1, long_every=0,
                     long_frames=0)  # fmt: skip
    model = world.dynamics.train().requires_grad_(True)
    weights = [p for p in model.parameters() if p.numel()]
    loss = {ramp: torch.zeros(bins) for ramp in RAMPS}
    gradient = {ramp: torch.zeros(bins) for ramp in RAMPS}
    for step in range(batches):
        batch = draw_batch(pack, config, world.k_max, step)
        z_tau = tau_.add_noise(batch.z_clean, batch.noise, batch.tau)
        z_hat = denoiser(model, batch)(z_tau, batch.tau, batch.d)
        index = tau_.bin_index(batch.tau, bins)
        for ramp in RAMPS:
            per_frame = x_prediction_loss(z_hat, batch.z_clean, batch.tau, ramp, reduce="none")
            for i in range(bins):
                here = per_frame[index == i].sum() / per_frame.numel()
                found = torch.autograd.grad(here, weights, retain_graph=True, allow_unused=True)
                loss[ramp][i] += here.detach()
                gradient[ramp][i] += sum(g.square().sum() for g in found if g is not None).sqrt()
    draws = {name: _draws(name, world.k_max, config, bins) for name in ("independent", "uniform", "context")}
    return {"draws": draws, "loss": {r: _share(v) for r, v in loss.items()},
            "gradient": {r: _share(v) for r, v in gradient.items()}}  # fmt: skip


def as_markdown(worlds: list[dict], bins: int) -> str:
    """Per cent by bin of tau: the mean of the worlds, and the least and most of them where they differ."""
    edges = [f"{i / bins:g} to {(i + 1) / bins:g}" for i in range(bins)]
    lines = [["share, %, by tau (0 clean, 1 noise)", *edges], ["---"] * (bins + 1)]
    for what, by_name in worlds[0].items():
        for name in by_name:
            lines.append([f"{what}, {name}", *map(_cell, zip(*(world[what][name] for world in worlds), strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(shares: tuple[float, ...]) -> str:
    least, most = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    mean = f"{100 * sum(shares) / len(shares):.0f}"
    return mean if least == most else f"{mean} ({least} to {most})"


def _draws(name: str, k_max: int, config: TrainConfig, bins: int) -> list[float]:
    tau, _ = FORCINGS[name](20000, config.frames, k_max, config.tau_ctx, torch.Generator().manual_seed(0))
    return _share(torch.bincount(tau_.bin_index(tau, bins).flatten(), minlength=bins).float())


def _share(values: torch.Tensor) -> list[float]:
    return [round(v, 4) for v in (values / values.sum()).tolist()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path, nargs="+", help="run folders of trained worlds, seeds of one arm")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--forcing", default="independent", help="the draws that loss and gradient are measured on")
    parser.add_argument("--bins", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--json", help="file to write the shares to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
