"""What a long rollout costs: memory and milliseconds a frame at 100 to 10,000 frames, all files written.

    python scripts/long_rollout.py checkpoints/defend_the_center [--length 10000]

The figures of docs/reliability.md. A frame's milliseconds are the mean since the last row, decoding, drawing and the
video's codec included; memory is what the process holds at that frame.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from ahriuwu_cli.errors import UserError

MARKS = (100, 500, 2_000, 5_000, 10_000)


def resident_mb() -> float:
    """Megabytes of memory that this process holds now; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--length", type=int, default=10_000)
    asked = parser.parse_args()

    import torch

    from ahriuwu_cli.imagine import imagine
    from ahriuwu_cli.prompts import Request, shipped_prompt
    from ahriuwu_cli.training.checkpoint import load_world

    torch.set_num_threads(1)
    world = load_world(asked.checkpoint, "cpu")
    marks, last = {min(m, asked.length) for m in MARKS}, (0, time.monotonic(), time.process_time())

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done in marks:
            now = (done, time.monotonic(), time.process_time())
            wall, cpu = (1000 * (b - a) / (done - last[0]) for a, b in zip(last[1:], now[1:], strict=True))
            print(f"{done:6d} frames  {resident_mb():7.1f} MB  {wall:6.1f} ms a frame ({cpu:.1f} of CPU)", flush=True)
            last = now

    with tempfile.TemporaryDirectory() as folder:
        request = Request(shipped_prompt(asked.checkpoint), length=asked.length, actions=("random",))
        result = imagine(world, request, {}, Path(folder) / "out", None, progress)
        for name, path in result["files"].items():
            print(f"{name:8s} {Path(path).stat().st_size / 1e6:8.2f} MB", flush=True)
    print(f"K = {result['generation']['steps']}, {result['generation']['sampler']}, {resident_mb():.1f} MB at the end")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
