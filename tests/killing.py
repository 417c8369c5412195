"""Runs that are killed again and again and go on by the same command, and the comparison with one that never was.

Used by test_kill.py and scripts/kill_test.py. The runs are real processes of the real command line, and SIGKILL is
real. By default they are forked from one that has imported everything and trains models of a few thousand weights: a
life costs a tenth of a second instead of five. `python killing.py` is that process.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path

from small import small_dataset

CLOCKS = {
    "seconds",
    "eta_s",
    "frames_per_s",
    "train_seconds",
    "elapsed",
    "looked",
    "git",
    "sha256",
}  # of a clock or a commit
KILLED = -signal.SIGKILL
TINY = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 2, "mlp_hidden": 32, "window": 6, "time_every": 2, "k_max": 8}
TINY_TOKENIZER = {
    "model_width": 16, "depth_encoder": 2, "depth_decoder": 2, "heads": 2, "kv_heads": 2, "mlp_hidden": 32,
    "time_every": 2,
}  # fmt: skip

DYNAMICS = (  # accumulation, long and short clips, single images, bootstrap, videos with and without actions
    "train dynamics ../data --tokenizer ../tok --out run --batch 4 --frames 4 --accumulate 2 --long-frames 8 "
    "--long-every 3 --single-image-share 0.25 --bootstrap-share 0.5 --preview-every 10 --preview-windows 2 --warmup 2 "
    "--save-every 3 --log-every 2 --device cpu"
)
TOKENIZER = (
    "train tokenizer ../data --kind transformer --out run --batch 2 --frames 4 --patch 8 --tokens 4 --latent-dim 6 "
    "--save-every 3 --log-every 2 --device cpu"
)


def prepare(folder: Path) -> None:
    """Data with and without actions, and a tokenizer."""
    from ahriuwu_cli.training.assemble import fit_linear_tokenizer
    from ahriuwu_cli.training.checkpoint import save_tokenizer

    store = small_dataset(folder / "data", frames=14, silent=3)
    save_tokenizer(fit_linear_tokenizer(store, (8, 8), 6, 0.5), folder / "tok", {})


class Nursery:
    """`with Nursery() as start:` -> start(command, cwd) is a life: a forked process that runs the command there."""

    def __enter__(self) -> "Nursery":
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __call__(self, command: str, cwd: Path, largest_file: int | None = None) -> "Life":
        cwd.mkdir(exist_ok=True)
        (cwd / "exit.txt").unlink(missing_ok=True)
        (cwd / "output.txt").write_text("")
        self._process.stdin.write(json.dumps([command.split(), str(cwd), largest_file]) + "\n")
        self._process.stdin.flush()
        return Life(int(self._process.stdout.readline()), cwd)

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


class Fresh:
    """The same with an interpreter of its own for every life."""

    def __enter__(self) -> "Fresh":
        return self

    def __call__(self, command: str, cwd: Path) -> "Life":
        cwd.mkdir(exist_ok=True)
        with open(cwd / "output.txt", "w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ahriuwu_cli", *command.split()], cwd=cwd, stdout=output, stderr=output,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        return Life(process.pid, cwd, process)

    def __exit__(self, *_: object) -> None:
        pass


class Life:
    """One process of a run."""

    def __init__(self, pid: int, cwd: Path, process: subprocess.Popen | None = None) -> None:
        self.pid, self.cwd, self._process = pid, cwd, process

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it ended by itself
            os.kill(self.pid, number)

    def has_ended(self) -> bool:
        return (self.cwd / "exit.txt").exists() if self._process is None else self._process.poll() is not None

    def ends(self, patience: float = 120) -> int:
        """Its exit code, negative for a signal, once it has ended; it is killed when it takes too long."""
        until = time.monotonic() + patience
        while not self.has_ended():
            if time.monotonic() > until:
                self.signal(signal.SIGKILL)
            time.sleep(0.002)
        return int((self.cwd / "exit.txt").read_text()) if self._process is None else self._process.returncode

    def said(self) -> str:
        return (self.cwd / "output.txt").read_text()


@dataclass
class Tally:
    """What happened to a run until it was through."""

    kills: Counter = field(default_factory=Counter)  # by where: "a state", "a world", "elsewhere"
    lives: int = 0
    steps: list[int] = field(default_factory=list)  # that lives went on from
    set_aside: int = 0
    codes: list[int] = field(default_factory=list)  # of lives that ended by themselves


def live_and_die(start, command: str, cwd: Path, kills: int, rng: random.Random, longest: float) -> Tally:
    """Run the command until it is through, killing it `kills` times on the way: inside a save every second time.

    Those wait for a state of this life first, so that the run gets on. The others fall anywhere in the first `longest`
    seconds. A run that is through earlier is killed less often.
    """
    tally, last = Tally(), ".tokenizer.*" if "tokenizer" in command.split()[:2] else ".last.*"
    while True:
        life = start(command, cwd)
        tally.lives += 1
        done = sum(tally.kills.values())
        if done < kills and done % 2:
            time.sleep(rng.random() * longest)
        elif done < kills:
            choices = ["state/.step-*", ".best.*"] if last == ".last.*" else ["state/.step-*"]
            wait_for_progress(life, cwd / "run")
            stop_inside(life, cwd / "run", last if done + 2 >= kills > 2 else rng.choice(choices), rng)
        if done < kills:
            life.signal(signal.SIGKILL)
        code = life.ends()
        tally.set_aside += life.said().count("set aside as")
        tally.steps += map(int, re.findall(r"going on with .* after step (\d+)", life.said()))
        if code == KILLED:
            tally.kills[_inside(cwd / "run")] += 1
            continue
        tally.codes.append(code)
        if code or sum(tally.kills.values()) >= kills or _through(cwd / "run"):
            return tally


def wait_for_progress(life: Life, run: Path) -> None:
    """Until there is a state that was not there before, or the process has ended."""
    before = set(run.glob("state/step-*"))
    while not set(run.glob("state/step-*")) - before and not life.has_ended():
        time.sleep(0.001)


def wait_for(life: Life, run: Path, pattern: str) -> None:
    """Until a hidden name of this pattern is there, or the process has ended."""
    while not next(run.glob(pattern), None) and not life.has_ended():
        time.sleep(0.0003)


def stop_inside(life: Life, run: Path, pattern: str, rng: random.Random) -> None:
    """Hold the process, some milliseconds after a hidden name of this pattern appeared, while it is still there."""
    while not life.has_ended():
        wait_for(life, run, pattern)
        time.sleep(rng.random() * 0.003)
        life.signal(signal.SIGSTOP)
        time.sleep(0.002)
        if next(run.glob(pattern), None) is not None:
            return
        life.signal(signal.SIGCONT)  # it was through: wait for the next one


def _inside(run: Path) -> str:
    """What was being written when the process died, by what it left."""
    if any(run.glob("state/.step-*.partial")):
        return "a state"
    return "a world" if any(run.glob(".*.tmp")) or any(run.glob(".*.old")) else "elsewhere"


def _through(run: Path) -> bool:
    from ahriuwu_cli.training.states import States

    document = States(run / "state", 1).glance() or {}
    return document.get("step") == document.get("total", -1)


def differing_bytes(one: Path, other: Path) -> dict[str, int]:
    """Bytes in which two runs differ, by file; what a clock decides left out. A file that one lacks counts whole."""
    found = {}
    names = {_plain(p, run): p for run in (one, other) for p in run.rglob("*") if p.is_file()}
    for name in names:
        a, b = (_content(run, name) for run in (one, other))
        found[name] = abs(len(a) - len(b)) + sum(x != y for x, y in zip(a, b, strict=False))
    return {name: count for name, count in found.items() if count}


def _plain(path: Path, run: Path) -> str:
    """The name of a file in a run, that of a state's tensors without its hash."""
    parts = path.relative_to(run).parts
    return "/".join("state.safetensors" if p.startswith("state-") else p for p in parts)


def _content(run: Path, name: str) -> bytes:
    """A file's bytes; of JSON what no clock decides."""
    path = run / name
    if path.name == "state.safetensors":
        path = next(path.parent.glob("state-*"), path)
    if not path.exists() or path.name == ".lock":
        return b""
    if path.name == "metrics.jsonl":
        lines = map(json.loads, path.read_text().splitlines())
        return "\n".join(json.dumps(_timeless(line)) for line in lines if "stood_still_s" not in line).encode()
    if path.name == "state.json":
        facts = json.loads(path.read_text())
        return json.dumps(_timeless({n: v for n, v in facts.items() if n != "document_sha256"})).encode()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(path.read_text()))).encode()
    return path.read_bytes()


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(v) for name, v in value.items() if name not in CLOCKS}
    return value


def nursery() -> None:
    """Read commands, fork a process for each, tell its pid and how it ended."""
    import torch
    import torch._dynamo

    from ahriuwu_cli import cli
    from ahriuwu_cli.models.sizes import SIZES
    from ahriuwu_cli.models.transformer_tokenizer import TransformerTokenizerConfig
    from ahriuwu_cli.training import assemble, tokenizer_loop, tokenizer_quality  # noqa: F401  imported once for all

    torch.set_num_threads(1)
    SIZES["nano"] = TINY
    defaults = [TINY_TOKENIZER.get(f.name, f.default) for f in fields(TransformerTokenizerConfig)]
    TransformerTokenizerConfig.__init__.__defaults__ = tuple(defaults)
    with suppress(SystemExit), open(os.devnull, "w") as void, redirect_stderr(void):
        cli.main(["train", "tokenizer", "nowhere", "--out", "nowhere"])  # what is imported on the way stays imported
    for line in sys.stdin:
        if os.fork():
            continue
        arguments, cwd, largest_file = json.loads(line)
        os.chdir(cwd)
        pid = os.fork()
        if pid == 0:
            output = os.open("output.txt", os.O_WRONLY | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            sys.argv[1:] = arguments
            cli.main()
        print(pid, flush=True)
        Path("exit.tmp").write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
        os.rename("exit.tmp", "exit.txt")
        os._exit(0)


if __name__ == "__main__":
    nursery()
