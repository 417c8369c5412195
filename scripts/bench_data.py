"""How fast are latents packed, checked and read here, and how near to what the disk and the memory can do?

    python scripts/bench_data.py                         # about three minutes and 3 GB of disk in the temporary folder
    python scripts/bench_data.py --large-mb 0 --json data.json

Packing: frames a second for 1 and 2 processes, of both tokenizers, beside the same encoding alone in one process.
Opening and checking: seconds beside bytes / measured speed of SHA-256. Windows: a second, cold (every window for the
first time since the file was dropped from memory) and warm, beside bytes / measured bandwidth; and what training eats.
Medians of several repetitions; cpu is the share of one core that this process got. Compare within one run only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.episode_writer import EpisodeWriter
from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.latents import LatentPack, open_pack
from ahriuwu_cli.data.pack_check import check_some, damaged_parts
from ahriuwu_cli.data.pack_format import (
    FORMAT,
    PART,
    hash_part,
    pack_header,
    parts_of,
    read_pack_header,
    write_header,
)
from ahriuwu_cli.models.dynamics import Dynamics, count_parameters
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.models.sizes import SIZES
from ahriuwu_cli.models.tokenizer import Tokenizer
from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizer, TransformerTokenizerConfig

SPACE = ActionSpace((ActionComponent("buttons", "binary", 3),))
TOKENS, CHANNELS, FRAMES, BATCH = 16, 32, 64, 16
H100_FLOPS = 989e12  # dense bfloat16, from its data sheet
H100_SHARE = 0.4  # what a well-tuned training step of a large model reaches; small ones reach far less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack-mb", type=int, default=256, help="Pack that stays in memory, MiB.")
    parser.add_argument("--large-mb", type=int, default=2048, help="Larger pack, MiB; 0 leaves it out.")
    parser.add_argument(
        "--frames", type=int, default=4000, help="Frames that are packed (linear: eight times as many)."
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="File to write the numbers to.")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {"torch": torch.__version__, "packing": measure_packing(Path(folder), a), "packs": []}
        for megabytes in filter(None, (a.pack_mb, a.large_mb)):
            path = make_pack(Path(folder), megabytes)
            result["packs"].append(measure_check(path, a.repeats) | measure_windows(path, a.repeats))
            path.unlink()
    result["needed_windows_per_second"] = {size: needed(size) for size in SIZES}
    print(as_table(result))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


def measure_packing(folder: Path, a: argparse.Namespace) -> list[dict]:
    """Frames a second of a whole `open_pack` with 1 and 2 processes, start included, and of encoding alone."""
    rows = []
    for name, tokenizer, frames in (
        ("linear", LinearTokenizer(64, 64, 16, 16, 64), 8 * a.frames),
        ("transformer", TransformerTokenizer(TransformerTokenizerConfig()), a.frames),
    ):
        store = make_dataset(folder / name, frames)
        row = {"tokenizer": name, "frames": frames, "encode_alone": encode_alone(tokenizer.eval(), store)}
        for workers in (1, 2):
            begun, used = time.perf_counter(), os.times()
            pack = open_pack(store, tokenizer, workers=workers)
            seconds, now = time.perf_counter() - begun, os.times()
            row[f"workers_{workers}"] = round(pack.lengths.sum() / seconds)
            busy = sum(now[:4]) - sum(used[:4])  # user and system, of this process and of those that it waited for
            row[f"workers_{workers}_cpu"] = round(busy / seconds, 2)
            row[f"workers_{workers}_frames_per_cpu_second"] = round(pack.lengths.sum() / busy)
            pack.path.unlink()
        rows.append(row)
        shutil.rmtree(store.path)
    return rows


def make_dataset(path: Path, frames: int) -> EpisodeStore:
    """Noise, 64 x 64, in train episodes of 500 frames."""
    rng = np.random.default_rng(0)
    with EpisodeWriter(path, height=64, width=64, fps=10, action_space=SPACE, fractions=(1, 0, 0)) as writer:
        for _ in range(max(1, frames // 500)):
            clip = rng.integers(0, 256, (500, 64, 64, 3), np.uint8)
            writer.add(clip, rng.integers(0, 2, (499, 3)).astype(np.float32))
    return EpisodeStore.open(path)


@torch.no_grad()
def encode_alone(tokenizer: Tokenizer, store: EpisodeStore) -> int:
    """Frames a second of `encode` on frames in memory: no packing can be faster in one process."""
    frames = torch.from_numpy(store.frames(store.episodes()[0].id, 0, 256))[None]
    return round(256 / median(lambda: tokenizer.encode(frames), 3))


def make_pack(folder: Path, megabytes: int) -> Path:
    """A sound pack of noise, episodes of PART frames."""
    path, count = folder / "pack.safetensors", megabytes * 2**20 // (2 * TOKENS * CHANNELS) // PART
    shapes = {"latents": ("F16", (count * PART, TOKENS, CHANNELS)), "actions": ("F32", (count * PART, 3))}
    block = np.random.default_rng(0).standard_normal((PART, TOKENS, CHANNELS)).astype(np.float16).tobytes()
    digest = hashlib.sha256(block + bytes(PART * 12)).hexdigest()
    entry = {"frames": PART, "labelled": True, "source": "0" * 64, "parts": [digest]}
    facts = {"format": FORMAT, "tokenizer": "0" * 64, "dataset": "0" * 64, "split": "train"}
    facts["episodes"] = [{"id": f"{i:06d}"} | entry for i in range(count)]
    offsets = write_header(path, shapes, facts)
    with open(path, "r+b") as file:
        file.write(pack_header(path, shapes, facts))
        file.seek(offsets["latents"])
        for _ in range(count):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return path


def measure_check(path: Path, repeats: int) -> dict:
    """Seconds to open for training, and to check every byte, warm; the floor is bytes / speed of SHA-256."""
    size, (facts, layout) = path.stat().st_size, read_pack_header(path)
    block = os.urandom(1 << 26)
    speed = len(block) / median(lambda: hashlib.sha256(block).digest(), repeats)
    parts = list(parts_of(facts))
    assert not damaged_parts(path, facts, layout, parts, SPACE)

    def opened() -> None:
        read, found = read_pack_header(path)
        check_some(path, read, found, SPACE)
        LatentPack(path, read, SPACE)

    with open(path, "rb") as file:
        whole = median(lambda: [hash_part(file.fileno(), layout, part) for part in parts], repeats)
        drop(file.fileno())
        begun = time.perf_counter()
        for part in parts:
            hash_part(file.fileno(), layout, part)
        cold = time.perf_counter() - begun
    return {
        "mb": round(size / 1e6),
        "open_s": round(median(opened, repeats), 3),
        "check_s": round(whole, 3),
        "check_floor_s": round(size / speed, 3),
        "check_cold_s": round(cold, 3),
        "sha256_gb_per_s": round(speed / 1e9, 2),
    }


def measure_windows(path: Path, repeats: int) -> dict:
    """Windows of FRAMES frames a second, cold and warm. Cold: no window is read twice."""
    facts, _ = read_pack_header(path)
    pack, rng = LatentPack(path, facts, SPACE), np.random.default_rng(1)
    row = 2 * TOKENS * CHANNELS
    every = [(e, s) for e in range(len(pack.ids)) for s in range(0, PART, FRAMES)]
    chosen = [every[i] for i in rng.permutation(len(every))[: 64 * BATCH]]

    def read_all() -> None:
        for i in range(0, len(chosen), BATCH):
            pack.read(chosen[i : i + BATCH], FRAMES)

    cold, sequential, cached = [], [], []
    with open(path, "rb", buffering=0) as file:
        for _ in range(repeats):
            drop(file.fileno())
            begun = time.perf_counter()
            read_all()
            cold.append(len(chosen) / (time.perf_counter() - begun))
            drop(file.fileno())
            sequential.append(read_through(file))
            cached.append(read_through(file))
    disk, memory = statistics.median(sequential), statistics.median(cached)
    half = torch.empty(BATCH * FRAMES, TOKENS, CHANNELS, dtype=torch.float16)
    whole = torch.empty(BATCH * FRAMES, TOKENS, CHANNELS)
    copy = BATCH * FRAMES * row / median(lambda: whole.copy_(half), 20)  # one copy, float16 in, float32 out
    warm = len(chosen) / median(read_all, repeats)
    window = FRAMES * row  # bytes

    def drawn() -> None:
        pack.read(pack.draw(BATCH, FRAMES, rng), FRAMES)

    many = LatentPack.__new__(LatentPack)
    many.lengths, many._ends = np.full(100_000, 500), {}
    return {
        "windows_cold": round(statistics.median(cold)),
        "windows_cold_floor": round(disk / window),
        "disk_gb_per_s": round(disk / 1e9, 2),
        "windows_warm": round(warm),
        "windows_warm_floor": round(1 / (window / memory + window / copy)),
        "page_cache_gb_per_s": round(memory / 1e9, 2),
        "convert_gb_per_s": round(copy / 1e9, 2),
        "windows_drawn_and_read": round(BATCH / median(drawn, 200)),
        "draw_of_100000_episodes_us": round(1e6 * median(lambda: many.draw(BATCH, FRAMES, rng), 200), 1),
    }


def read_through(file: FileIO) -> float:
    """Bytes a second of the file's first 256 MiB, one after the other, in blocks of a batch's size."""
    into = bytearray(BATCH * FRAMES * 2 * TOKENS * CHANNELS)
    file.seek(0)
    begun = time.perf_counter()
    while file.tell() < 1 << 28 and file.readinto(into):
        pass
    return file.tell() / (time.perf_counter() - begun)


def needed(size: str) -> dict:
    """What an H100 would eat at H100_SHARE of its peak: 6 FLOP a parameter and token, windows of FRAMES frames."""
    slots = (("binary", 3, (), ()),)
    with torch.device("meta"):
        model = Dynamics(
            DynamicsConfig(tokens=TOKENS, latent_dim=CHANNELS, k_max=64, action_space=slots, **SIZES[size])
        )
    parameters = count_parameters(model)
    flop = 6 * parameters * model.config.sequence * FRAMES
    return {"parameters": parameters, "windows_per_second": round(H100_FLOPS * H100_SHARE / flop, 1)}


def drop(descriptor: int) -> None:
    """Drop a file from memory."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def median(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of several runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def as_table(r: dict) -> str:
    """The numbers as lines: what, measured, floor."""
    lines = [("what", "measured", "floor")]
    for p in r["packing"]:
        for workers in (1, 2):
            what = f"pack {p['frames']} frames, {p['tokenizer']}, {workers} process(es), frames/s (cores got)"
            floor = p["encode_alone"] * workers
            lines.append((what, f"{p[f'workers_{workers}']} ({p[f'workers_{workers}_cpu']})", floor))
    for p in r["packs"]:
        lines += [
            (f"{p['mb']} MB pack: open for training, s", p["open_s"], ""),
            (
                f"{p['mb']} MB pack: check every byte, s (cold)",
                f"{p['check_s']} ({p['check_cold_s']})",
                p["check_floor_s"],
            ),
            (f"{p['mb']} MB pack: windows/s, cold", p["windows_cold"], p["windows_cold_floor"]),
            (f"{p['mb']} MB pack: windows/s, warm", p["windows_warm"], p["windows_warm_floor"]),
            (f"{p['mb']} MB pack: windows/s, drawn anywhere and read", p["windows_drawn_and_read"], ""),
        ]
    lines.append(("draw from 100,000 episodes, us a batch", r["packs"][0]["draw_of_100000_episodes_us"], ""))
    for size, need in r["needed_windows_per_second"].items():
        lines.append(
            (f"{size} ({need['parameters'] / 1e6:.1f}M): an H100 eats, windows/s", need["windows_per_second"], "")
        )
    widths = [max(len(str(line[i])) for line in lines) for i in range(3)]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


if __name__ == "__main__":
    main()
