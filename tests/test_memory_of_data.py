"""Nothing that reads a dataset takes it into memory as a whole: measured on a single episode of 300 MB."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter

ROOT = Path(__file__).resolve().parents[1]
SHORT, LONG = 5_000, 25_000  # frames of 64 x 64: 61 and 307 MB
BOUND = 8e6  # bytes that 246 MB more of dataset may take
# glibc gives every larger block back when it is freed: the peak is what was alive, and the same in every run
RETURNING = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SPACE = ActionSpace((ActionComponent("axis", "continuous", 1, low=(-1.0,), high=(1.0,)),))

MEASURE = """
import json, sys
from pathlib import Path
import torch
import ahriuwu_cli.models.linear_tokenizer, safetensors.torch
from ahriuwu_cli.data.describe import describe
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import open_pack
from ahriuwu_cli.training.assemble import fit_linear_tokenizer
from ahriuwu_cli.training.checkpoint import load_tokenizer, save_tokenizer

torch.set_num_threads(1)
path, task = Path(sys.argv[1]), sys.argv[2]


def peak():  # of this program; getrusage would count what the test's own process held before
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


before = peak()
if task == "fit":
    save_tokenizer(fit_linear_tokenizer(EpisodeStore.open(path), (16, 16), 32, 0.5), path.parent / "tokenizer", {})
if task == "pack":
    open_pack(EpisodeStore.open(path), load_tokenizer(path.parent / "tokenizer"), workers=1)
if task == "check":
    assert describe(path, check=True)["checks"][-1]["name"] == "latent packs match their hashes"
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_fitting_packing_and_checking_take_far_less_memory_than_the_dataset(tmp_path):
    peaks = {}
    for name, frames in (("short", SHORT), ("long", LONG)):
        rng = np.random.default_rng(0)
        with EpisodeWriter(tmp_path / name, height=64, width=64, fps=10, action_space=SPACE) as writer:
            writer.add(rng.integers(0, 256, (frames, 64, 64, 3), np.uint8), rng.random((frames - 1, 1), np.float32))
        for task in ("fit", "pack", "check"):
            command = [sys.executable, "-c", MEASURE, str(tmp_path / name), task]
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | RETURNING
            answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
            peaks[name, task] = json.loads(answer)
    grown = {task: peaks["long", task] - peaks["short", task] for task in ("fit", "pack", "check")}
    print(grown, peaks)
    assert max(grown.values()) < BOUND, grown
    assert all(peak < LONG * 64 * 64 * 3 / 4 for peak in peaks.values()), peaks
