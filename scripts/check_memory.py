"""Is the forecast of `ahriuwu train dynamics --dry-run` right here? Real steps, each in a process of its own.

    python scripts/check_memory.py                                  # nano, mini and tiny at several batches
    python scripts/check_memory.py --sizes medium --batches 2 --json out.json

Memory is the peak resident set above what the process holds before it builds the model, on a CPU; or what PyTorch's
allocator held at most, on a GPU. FLOPs are those that FlopCounterMode counts in one real step of the training loop.
`--allocator system` leaves glibc to keep what was freed; the default returns it, so that the peak is what was alive.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

RETURNING = {  # glibc gives every larger block back when it is freed
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
COLUMNS = ("size", "batch", "frames", "checkpointed", "precision", "optimizer", "accumulate")


def main() -> None:
    a = _arguments()
    if a.one:
        print(json.dumps(compare(json.loads(a.one), a.device)))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if a.allocator == "returning":
        environment |= RETURNING
    rows = []
    for size in a.sizes:
        for batch in a.batches:
            for checkpointed in (False, True):
                for precision in a.precisions:
                    values = (size, batch, a.frames, checkpointed, precision, a.optimizer, a.accumulate)
                    case = dict(zip(COLUMNS, values, strict=True))
                    command = [sys.executable, __file__, "--one", json.dumps(case), "--device", a.device]
                    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
                    if found.returncode:
                        raise SystemExit(f"{case} failed:\n{found.stderr}")
                    rows.append(json.loads(found.stdout))
                    print(_line(rows[-1]), flush=True)
    worst = {name: max(abs(r[name] - 1) for r in rows) for name in ("memory_ratio", "flops_ratio")}
    print(f"farthest from 1: memory {worst['memory_ratio']:.3f}, FLOPs {worst['flops_ratio']:.4f}")
    if a.json:
        Path(a.json).write_text(json.dumps({"rows": rows, "allocator": a.allocator}, indent=1) + "\n")


def compare(case: dict, device: str) -> dict:
    """Predicted and measured bytes and FLOPs of one step. The measured ones come first: nothing fake runs before."""
    import torch

    from ahriuwu_cli.config import TrainConfig
    from ahriuwu_cli.models.dynamics_config import DynamicsConfig
    from ahriuwu_cli.models.sizes import SIZES

    names = ("batch", "frames", "precision", "optimizer", "accumulate")
    config = TrainConfig(
        size=case["size"], steps=100, budget=None, checkpoint_activations=case["checkpointed"],
        **{n: case[n] for n in names},
    )  # fmt: skip
    architecture = DynamicsConfig(**SIZES[case["size"]], action_space=(("binary", 3, (), ()),))
    measured = measure(config, architecture, torch.device(device))

    from ahriuwu_cli.training.estimate import estimate

    forecast = estimate(config, architecture, device)
    predicted = {"bytes": forecast.peak, "flops": sum(forecast.flops.values())}
    return {
        **case,
        "predicted_bytes": predicted["bytes"],
        "measured_bytes": measured["bytes"],
        "memory_ratio": predicted["bytes"] / measured["bytes"],
        "predicted_flops": predicted["flops"],
        "measured_flops": measured["flops"],
        "flops_ratio": predicted["flops"] / measured["flops"],
    }


def measure(config, architecture, device) -> dict:
    """Peak bytes of three real steps of the training loop, and the FLOPs of a fourth."""
    import torch

    from ahriuwu_cli.data.action_component import ActionComponent
    from ahriuwu_cli.data.actions import ActionSpace
    from ahriuwu_cli.models.dynamics import Dynamics

    space = ActionSpace((ActionComponent("buttons", "binary", 3),))

    class Pack:
        """Random latents in place of a dataset's."""

        def draw(self, count, frames, rng):
            return [(0, i) for i in range(count)]

        def read(self, windows, frames):
            count, c = len(windows), architecture
            latents = torch.randn(count, frames, c.tokens, c.latent_dim)
            return latents, torch.zeros(count, frames - 1, space.width), torch.ones(count, dtype=torch.bool)

        def name(self, window):
            return f"{window[0]}:{window[1]}"

    def trainer(architecture, config):
        from ahriuwu_cli.training.loop import DynamicsTrainer

        dynamics = Dynamics(architecture).to(device).requires_grad_(False)
        world = SimpleNamespace(dynamics=dynamics, device=device, k_max=architecture.k_max)
        return DynamicsTrainer(world, Pack(), None, SimpleNamespace(config=config))

    warm = trainer(architecture, config)  # oneDNN writes code for every shape, 20 to 27 MB, and keeps it
    for _ in range(2):
        step(warm)
    del warm
    base = _reset_peak(device)
    real = trainer(architecture, config)
    for _ in range(3):
        step(real)
    peak = _peak(device) - base
    return {"bytes": peak, "flops": count_flops(lambda: step(real))}


def step(trainer) -> None:
    trainer._update()
    trainer.step += 1


def count_flops(work) -> int:
    """FLOPs of one call by FlopCounterMode, which is lent formulas for attention on CPUs and for oneDNN's products."""
    from torch.utils.flop_counter import FlopCounterMode

    from ahriuwu_cli.training.shadow import FORMULAS

    counter = FlopCounterMode(display=False)
    counter.flop_registry |= FORMULAS
    with counter:
        work()
    return counter.get_total_flops()


def _reset_peak(device) -> int:
    """Bytes held now; peaks count from here."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device) -> int:
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _line(r: dict) -> str:
    how = "again" if r["checkpointed"] else "kept"
    return (
        f"{r['size']:<7} batch {r['batch']:>3} x {r['frames']}  {how:<5} {r['precision']:<8}  "
        f"memory {r['predicted_bytes'] / 1e6:8.1f} predicted {r['measured_bytes'] / 1e6:8.1f} MB measured "
        f"{r['memory_ratio']:.3f}  FLOPs {r['predicted_flops'] / 1e9:8.2f} {r['measured_flops'] / 1e9:8.2f} G "
        f"{r['flops_ratio']:.4f}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["nano", "mini", "tiny"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--precisions", nargs="+", default=["float32"])
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allocator", choices=("returning", "system"), default="returning")
    parser.add_argument("--json", help="Write the rows here.")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
