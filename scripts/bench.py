"""How fast is it here, and how near to what this machine can do? One command, one table, everything beside its floor.

    python scripts/bench.py                          # the shape that other trainers were measured at, one thread
    python scripts/bench.py --threads 2 --json out.json

In one run: the machine's product peak and copy bandwidth, then rollout per frame (K = 1, 4, 16), training step (plain
and with the shortcut bootstrap), tokenizer, window reading. A floor is operations / measured peak. Machines are noisy,
so the peak is measured again right before and after every round of rollouts and steps, and a share of the floor is
the median over rounds. Compare within one run only. Float32 products are measured by torch's own call and by what the
models call (`ahriuwu_cli.models.products`); floors are those of the faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor

from ahriuwu_cli.config import TrainConfig
from ahriuwu_cli.data.action_component import ActionComponent
from ahriuwu_cli.data.actions import ActionSpace
from ahriuwu_cli.data.latents import LatentPack
from ahriuwu_cli.data.pack_format import write_header
from ahriuwu_cli.diffusion.forcing import FORCINGS, finest
from ahriuwu_cli.diffusion.objective import shortcut_forcing_loss
from ahriuwu_cli.models import products
from ahriuwu_cli.models.dynamics import Dynamics, count_parameters
from ahriuwu_cli.models.dynamics_config import DynamicsConfig
from ahriuwu_cli.models.linear_tokenizer import LinearTokenizer
from ahriuwu_cli.rollout import KeyedNoise, RolloutConfig, rollout
from ahriuwu_cli.training.optimiser import apply, build_optimizers

FIRST_FRAME = """
import sys, torch
from ahriuwu_cli.rollout import KeyedNoise, rollout
from ahriuwu_cli.training.checkpoint import load_world
torch.set_num_threads(int(sys.argv[2]))
world = load_world(sys.argv[1], "cpu")
shape = (world.tokenizer.tokens, world.tokenizer.latent_dim)
actions, known = torch.zeros(1, 9, world.action_space.width), torch.ones(1, 9, dtype=torch.bool)
noise = KeyedNoise(0, ["0"], shape)
frames = rollout(world.dynamics, torch.randn(1, 8, *shape), actions, known, world.generation, noise, world.k_max)
world.decode(next(frames)[:, None])
"""  # a process from its start to the first decoded frame of a shipped world, 8 frames given
SPACE = ActionSpace((ActionComponent("buttons", "binary", 3),))
SLOTS = (("binary", 3, (), ()),)
K_MAX = 64
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    a = _arguments()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    model = build_model(a)
    result = {"threads": a.threads, "torch": torch.__version__, "shape": _shape(a, model)}
    result |= machine(a)
    result["rollout"] = measure_rollout(model, a, result)
    result["train"] = measure_training(model, a, result)
    result["tokenizer"] = measure_tokenizer(a, result)
    result |= measure_windows(a, result)
    print(as_table(result))
    if a.json:
        Path(a.json).write_text(json.dumps(result, indent=1) + "\n")


def build_model(a: argparse.Namespace) -> Dynamics:
    """The paper's layout at the asked size: tokens for (tau, d) and the action, registers, time in every 4th layer.

    The MLP is 8/3 wide, rounded up to whole 64s: products of 683 columns run at two thirds of the speed of 704 here.
    """
    hidden = -(-a.dim * 8 // 3 // 64) * 64
    config = DynamicsConfig(
        tokens=a.tokens, latent_dim=a.latent_dim, width=a.dim, depth=a.depth, heads=a.heads, kv_heads=a.heads,
        mlp_hidden=a.hidden or hidden, time_every=min(4, a.depth), time_attention="place", registers=4,
        conditioning="token", linear_skip=False, window=a.context, k_max=K_MAX, action_space=SLOTS,
    )  # fmt: skip
    return Dynamics(config).eval()


def flops_per_frame(model: Dynamics, past: int, cached: bool) -> float:
    """Multiply-adds times two of one frame's forward pass: products with weights, then attention over its own frame or,
    in time layers, over `past` frames at each place."""
    c = model.config
    blocks = sum(p.numel() for b in model.blocks for p in b.parameters() if p.ndim == 2)
    ends = 2 * c.tokens * c.width * c.latent_dim * 2
    over_time = model.time_layers * 4 * c.sequence * past * c.width
    over_space = (c.depth - model.time_layers) * 4 * c.sequence**2 * c.width
    return 2 * blocks * c.sequence + ends + over_time + over_space


def machine(a: argparse.Namespace) -> dict:
    """Peak of large products and of products with one frame's tokens (GFLOP/s), float32 and bfloat16; copy (GB/s)."""
    found: dict = {"products": products.library()}
    rows, plain = a.tokens + 6, torch.nn.functional.linear
    forms = (("", torch.float32, plain), ("_ours", torch.float32, ours), ("_bfloat16", torch.bfloat16, plain))
    for name, kind, multiply in forms:
        for label, shape in (("peak_gflops", (1024, 1024, 1024)), ("frame_gflops", (rows, a.dim, 4 * a.dim))):
            x, w = torch.randn(shape[0], shape[1]).to(kind), torch.randn(shape[2], shape[1]).to(kind)
            count = max(1, round(3e8 / np.prod(shape)))
            seconds = median(lambda x=x, w=w, n=count, f=multiply: [f(x, w) for _ in range(n)], a.repeats)
            found[label + name] = round(2 * float(np.prod(shape)) * count / seconds / 1e9, 1)
    found["peak_gflops_best"] = max(found["peak_gflops"], found["peak_gflops_ours"])
    source = torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    found["copy_gb_per_s"] = round(2 * source.numel() / median(lambda: target.copy_(source), a.repeats) / 1e9, 2)
    return found


@torch.no_grad()
def ours(x: Tensor, w: Tensor) -> Tensor:
    """A product as the models make it."""
    return products.linear(x, w)


def measure_rollout(model: Dynamics, a: argparse.Namespace, found: dict) -> dict:
    """Milliseconds a frame by K and form of the model, once the context is full; frame 2,000 against frame 100."""
    forms, k, compile_seconds = {}, a.steps, {}
    for kind in ("float32", "bfloat16"):
        for compiled in (False,) if a.eager else (False, True):
            name = f"{kind}, compiled" if compiled else kind
            forms[name] = form = build_model(a).requires_grad_(False)
            form.load_state_dict(model.state_dict())
            if kind == "bfloat16":
                form.multiply_in(torch.bfloat16)
            if compiled:
                form.compile_passes()
                compile_seconds[kind] = round(seconds_of(partial(list, frame_seconds(form, a, k, 2))), 1)
    rows = {(name, steps): 0.0 for name in forms for steps in sorted({1, 4, 16, k})}
    for name, steps in rows:
        seconds = list(frame_seconds(forms[name], a, steps, a.context + 4 * a.repeats))[a.context :]
        rows[name, steps] = 1e3 * statistics.median(seconds)
    # The pass that commits the last frame rides along with the first one of the next: K passes, K + 1 frames of work.
    operations = (k + 1) * flops_per_frame(model, a.context, cached=True)
    share = {
        name: share_of_peak(
            lambda form=forms[name]: statistics.median(list(frame_seconds(form, a, k, a.context + 24))[a.context :]),
            operations, a.repeats,
        )[0]
        for name in forms if "float32" in name
    }  # fmt: skip
    best = min(forms, key=lambda name: rows[name, k])
    return {
        "ms_per_frame": round(rows[best, k], 2),
        "form": best,
        "ms_per_frame_float32": round(
            min(ms for (name, steps), ms in rows.items() if "float32" in name and steps == k), 2
        ),
        "ms_per_frame_eager": round(rows["float32", k], 2),
        "ms_per_frame_bfloat16": round(rows["bfloat16", k], 2),
        "by_steps": {f"{name}, K = {steps}": round(ms, 2) for (name, steps), ms in rows.items()},
        "passes_per_frame": count_passes(model, a),
        "compile_seconds": compile_seconds or None,
        "floor_ms": round(1e3 * operations / (found["peak_gflops_best"] * 1e9), 2),
        "share_of_floor": round(max(share.values()), 3),
        "share_of_floor_eager": round(share["float32"], 3),
        "ratio_frame_2000_to_100": round(late_over_early(model, a), 3),
        "bfloat16_against_float32": agreement(forms["bfloat16"], model, a),
        "first_frame_seconds": round(first_frame(a), 2),
    }


def first_frame(a: argparse.Namespace) -> float:
    """Seconds from the start of a process to its first frame: interpreter, torch, a checkpoint, a prompt, K passes."""
    command = [sys.executable, "-c", FIRST_FRAME, str(ROOT / "checkpoints" / "defend_the_center"), str(a.threads)]
    return median(lambda: subprocess.run(command, check=True, cwd=ROOT), 5)


def late_over_early(model: Dynamics, a: argparse.Namespace, early: int = 100, late: int = 2000) -> float:
    """Seconds of frame `late` over those of frame `early`, K = 1: two rollouts take turns, so both see the same noise
    of the machine."""
    pair = [frame_seconds(model, a, 1, frame + 200) for frame in (early, late)]
    for frames, count in zip(pair, (early, late), strict=True):
        for _ in range(count):
            next(frames)
    turns = [[seconds_of(lambda frames=frames: next(frames)) for frames in pair] for _ in range(150)]
    return statistics.median(second for _, second in turns) / statistics.median(first for first, _ in turns)


def frame_seconds(model: Dynamics, a: argparse.Namespace, steps: int, frames: int) -> Iterator[float]:
    """Seconds of every frame of one rollout, the first one with the prompt's included."""
    c = model.config
    prompt = torch.randn(a.rollouts, a.context, c.tokens, c.latent_dim)
    actions = torch.zeros(a.rollouts, a.context + frames, 3)
    known = torch.ones(a.rollouts, a.context + frames, dtype=torch.bool)
    noise = KeyedNoise(0, [str(i) for i in range(a.rollouts)], (c.tokens, c.latent_dim))
    config = RolloutConfig(steps=steps)
    last = time.perf_counter()
    for _ in rollout(model, prompt, actions, known, config, noise, c.k_max):
        now = time.perf_counter()
        yield now - last
        last = now


def count_passes(model: Dynamics, a: argparse.Namespace) -> float:
    """Model calls a frame in a rollout at --steps, counted."""
    calls, extend = [], model.extend
    model.extend = lambda *args, **kwargs: (calls.append(0), extend(*args, **kwargs))[1]
    try:
        frames = len(list(frame_seconds(model, a, a.steps, 20)))
    finally:
        del model.extend
    return round((len(calls) - 1) / frames, 3)  # one call fills the context


def agreement(other: Dynamics, model: Dynamics, a: argparse.Namespace) -> float:
    """Relative RMS difference of one prediction in bfloat16 from float32: rounding alone, weights being random."""
    c = model.config
    z = torch.randn(2, a.context, c.tokens, c.latent_dim)
    tau = torch.rand(2, a.context)
    known = torch.ones(2, a.context, dtype=torch.bool)
    inputs = (torch.full_like(tau, 1 / K_MAX), torch.zeros(2, a.context, 3), known)
    with torch.no_grad():
        exact, rounded = model(z, tau, *inputs), other(z, tau, *inputs)
    return round(float((rounded - exact).square().mean().sqrt() / exact.square().mean().sqrt()), 5)


def measure_training(model: Dynamics, a: argparse.Namespace, found: dict) -> dict:
    """Milliseconds of forward + backward, plain and with the bootstrap, and of the optimiser; share of the peak.

    share_of_peak is against torch's own float32 product, so above 1 where ours is faster; share_of_best_peak is not.
    """
    config, c = TrainConfig(batch=a.batch, frames=a.frames), model.config
    model.train().requires_grad_(True)
    draw = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, a.batch, a.frames, c.tokens, c.latent_dim, generator=draw)
    tau, d = FORCINGS["independent"](a.batch, a.frames, K_MAX, 0.1, draw)
    actions, known = torch.zeros(a.batch, a.frames, 3), torch.ones(a.batch, a.frames, dtype=torch.bool)

    def step(rows: int, model: Dynamics = model, kind: str = "float32") -> None:
        def denoise(z: Tensor, tau: Tensor, d: Tensor) -> Tensor:
            return model(z, tau, d, actions[: len(z)], known[: len(z)])

        told = d.clone()
        told[rows:] = finest(told[rows:], K_MAX)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
            loss = shortcut_forcing_loss(
                denoise, z, noise, tau, told, k_max=K_MAX, teacher=lambda n: denoise, bootstrap_rows=rows
            ).loss
        loss.backward()
        for p in model.parameters():
            p.grad = None

    rows = max(1, round(config.bootstrap_share * a.batch))
    operations = 3 * a.batch * a.frames * flops_per_frame(model, (a.frames + 1) / 2, cached=False)
    more = rows / a.batch * 2 / 3  # two more forward passes over those rows
    for _ in range(3):
        step(rows)  # until the heap has its size
    (share, plain), (share_shortcut, shortcut) = (
        share_of_peak(lambda n=n: seconds_of(lambda: step(n)), flops, max(3, a.repeats // 2))
        for n, flops in ((0, operations), (rows, operations * (1 + more)))
    )
    by_form, compile_seconds = {}, {}
    for kind, compiled in (("bfloat16", False), *((("float32", True), ("bfloat16", True)) if not a.eager else ())):
        trained = model
        if compiled:
            trained = build_model(a).train()
            trained.load_state_dict(model.state_dict())
            trained.compile_blocks()
            compile_seconds[kind] = round(sum(seconds_of(partial(step, n, trained, kind)) for n in (0, rows)), 1)
        for name, n in (("plain", 0), ("bootstrapped", rows)):
            ms = 1e3 * median(partial(step, n, trained, kind), max(3, a.repeats // 2))
            by_form[f"{kind}{', compiled' if compiled else ''}, {name}"] = round(ms, 1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimiser = {}
    for kind in ("float32", "bfloat16"):
        optimizers = build_optimizers(model, replace(config, precision=kind))
        optimiser[kind] = 1e3 * median(lambda o=optimizers: [each.step() for each in o], max(3, a.repeats // 2))
    apply(optimizers)
    model.eval().requires_grad_(False)
    floor = 1e3 * operations / (found["peak_gflops_best"] * 1e9)
    better = found["peak_gflops_best"] / found["peak_gflops"]
    return {
        "plain_ms": round(1e3 * plain, 1),
        "shortcut_ms": round(1e3 * shortcut, 1),
        "optimiser_ms": round(optimiser["float32"], 1),
        "optimiser_bfloat16_ms": round(optimiser["bfloat16"], 1),
        "bootstrap_rows": rows,
        "floor_ms": round(floor, 1),
        "by_form": by_form,
        "compile_seconds": compile_seconds or None,
        "share_of_peak": round(share * better, 3),
        "share_of_peak_shortcut": round(share_shortcut * better, 3),
        "share_of_best_peak": round(share, 3),
        "share_of_best_peak_shortcut": round(share_shortcut, 3),
    }


def measure_tokenizer(a: argparse.Namespace, found: dict) -> dict:
    """Milliseconds a frame of the linear tokenizer, 64 x 64, 16 tokens of 64 channels, 64 frames at a time."""
    tokenizer = LinearTokenizer(64, 64, 16, 16, 64)
    frames = torch.randint(0, 256, (1, 64, 64, 64, 3), dtype=torch.uint8)
    latents = tokenizer.encode(frames)
    floor = 1e3 * 2 * 16 * 768 * 64 / (found["peak_gflops_best"] * 1e9)
    return {
        "encode_ms": round(1e3 * median(lambda: tokenizer.encode(frames), a.repeats) / 64, 4),
        "decode_ms": round(1e3 * median(lambda: tokenizer.decode(latents), a.repeats) / 64, 4),
        "floor_ms": round(floor, 4),
    }


def measure_windows(a: argparse.Namespace, found: dict) -> dict:
    """Random windows a second from a pack of --pack-mb on disk, cold (dropped from memory) and warm, and the need."""
    frames = max(4 * a.frames, int(a.pack_mb * 1e6 / (2 * a.tokens * a.latent_dim)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pack.safetensors"
        facts = {"episodes": [{"id": "0", "frames": frames, "labelled": True}]}
        shapes = {"latents": ("F16", (frames, a.tokens, a.latent_dim)), "actions": ("F32", (frames, 3))}
        offset = write_header(path, shapes, facts)
        with open(path, "r+b") as file:
            file.seek(offset["latents"])
            block = np.random.default_rng(0).standard_normal((1024, a.tokens, a.latent_dim)).astype(np.float16)
            for first in range(0, frames, 1024):
                file.write(block[: frames - first].tobytes())
            os.fsync(file.fileno())
        space = ActionSpace((ActionComponent("buttons", "binary", 3),))
        pack, rng = LatentPack(path, facts, space), np.random.default_rng(1)

        def rate(seconds: float) -> float:
            count, end = 0, time.perf_counter() + seconds
            while time.perf_counter() < end:
                pack.read(pack.draw(a.batch, a.frames, rng), a.frames)
                count += a.batch
            return count / seconds

        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold = rate(0.5)
        warm = rate(1.0)
    needed = a.batch / (found["train"]["shortcut_ms"] / 1e3)
    return {
        "windows_per_second": round(warm),
        "windows_per_second_cold": round(cold),
        "windows_needed_per_second": round(needed, 2),
        "windows_of_frames": a.frames,
    }


def share_of_peak(work: Callable[[], float], operations: float, rounds: int) -> tuple[float, float]:
    """(median share of the best float32 peak, median seconds) of work, which gives the seconds of `operations`.

    The peak of a round is that of products right before and right after it: neighbours come and go.
    """
    x, w = torch.randn(2, 1024, 1024)
    flops = 2 * 1024**3 * 10

    def peak() -> float:
        return flops / seconds_of(lambda: [ours(x, w) for _ in range(10)])

    peak()
    shares, seconds = [], []
    for _ in range(rounds):
        before, took, after = peak(), work(), peak()
        shares.append(2 * operations / took / (before + after))
        seconds.append(took)
    return statistics.median(shares), statistics.median(seconds)


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def median(work: Callable[[], object], repeats: int) -> float:
    """Median seconds of several runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def as_table(r: dict) -> str:
    """What was measured, its floor, and how near it is."""
    o, t, k = r["rollout"], r["train"], r["tokenizer"]
    eager = (o["ms_per_frame_eager"], o["floor_ms"], o["share_of_floor_eager"])
    compiled = (o["by_steps"].get(f"float32, compiled, K = {r['shape']['steps']}"), o["floor_ms"], o["share_of_floor"])
    compiling = f"rollout, float32, compiled in {o['compile_seconds']['float32']} s" if o["compile_seconds"] else ""
    shortcut = (t["shortcut_ms"], "", t["share_of_best_peak_shortcut"])
    windows = f"{r['windows_per_second']} ({r['windows_per_second_cold']})"
    lines = [
        ("what", "measured", "floor", "share"),
        ("products, float32, torch's, GFLOP/s (a frame's)", f"{r['peak_gflops']} ({r['frame_gflops']})", "", ""),
        (f"products, float32, ours, by {r['products']}", f"{r['peak_gflops_ours']} ({r['frame_gflops_ours']})", "", ""),
        ("products, bfloat16, GFLOP/s", f"{r['peak_gflops_bfloat16']} ({r['frame_gflops_bfloat16']})", "", ""),
        ("copy, GB/s", f"{r['copy_gb_per_s']}", "", ""),
        (f"rollout, float32, ms a frame, K = {r['shape']['steps']}", *eager),
        *([(compiling, *compiled)] if compiling else []),
        *((f"rollout, {name}, ms a frame", ms, "", "") for name, ms in o["by_steps"].items()),
        ("rollout, passes a frame", o["passes_per_frame"], "", ""),
        ("rollout, first frame of a shipped world after its process started, s", o["first_frame_seconds"], "", ""),
        ("rollout, frame 2,000 over frame 100", o["ratio_frame_2000_to_100"], "", ""),
        ("training, plain, forward + backward, ms", t["plain_ms"], t["floor_ms"], t["share_of_best_peak"]),
        (f"training, {t['bootstrap_rows']} rows bootstrapped, ms", *shortcut),
        *((f"training, {name}, ms", ms, "", "") for name, ms in t["by_form"].items()),
        ("training, optimiser, ms", t["optimiser_ms"], "", ""),
        ("training, optimiser, --precision bfloat16, ms", t["optimiser_bfloat16_ms"], "", ""),
        ("tokenizer, encode and decode, ms a frame", f"{k['encode_ms']} {k['decode_ms']}", k["floor_ms"], ""),
        ("windows a second, warm (cold), and needed", windows, r["windows_needed_per_second"], ""),
    ]
    widths = [max(len(str(line[i])) for line in lines) for i in range(4)]
    return "\n".join("  ".join(str(c).ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _shape(a: argparse.Namespace, model: Dynamics) -> dict:
    names = ("dim", "depth", "heads", "tokens", "latent_dim", "context", "frames", "steps", "batch", "rollouts")
    gflop = flops_per_frame(model, a.context, cached=True) / 1e9
    return {n: getattr(a, n) for n in names} | {
        "parameters": count_parameters(model), "tokens_a_frame": model.config.sequence,
        "gflop_a_frame": round(gflop, 4),
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    whole = {
        "dim": 256, "depth": 8, "heads": 4, "hidden": 0, "tokens": 16, "latent-dim": 32, "context": 16, "frames": 16,
        "steps": 4, "threads": 1, "batch": 8, "rollouts": 1, "repeats": 15, "pack-mb": 256,
    }  # fmt: skip
    for name, value in whole.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--eager", action="store_true", help="Leave out compiled rollouts, which take a minute or two.")
    parser.add_argument("--json", help="File to write the numbers to.")
    return parser.parse_args()


if __name__ == "__main__":
    main()
