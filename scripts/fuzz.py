"""Hostile files against every command that reads them: seeded mutations, each in a process of its own, with limits.

    python scripts/fuzz.py --mutations 1000 --seed 0 [--kinds checkpoint,video] [--json FILE]

A small world, its dataset, runs, packs, videos and results are made once. Every mutation damages one file of a copy
(`mutations.py`) and runs one command on it, in a forked process that has torch already. It must end in success, or in
one sentence on stderr with exit code 2, 3 or 4 (1 where a check's answer is no), within 30 s and 1 GiB, and write only
where it was asked to. A success must be explained: by what was changed and what the command reads. Exit code 1 when
anything did not hold; `--only N` runs mutation N again and prints what it said.

Chance rarely puts a pipe where it matters, so `--special` does it everywhere: each file of each kind becomes a pipe and
a device without an end, once for every command that reads it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mutations import mutate, sealed, sealed_tensors

SPECIAL = ("missing", "a folder", "a pipe", "a device", "a link to nothing", "a link to itself")
ENDLESS = ("a pipe", "a device")
SECONDS, MEMORY = 30, 1 << 30  # limits of one mutation, memory above what the process begins with
REFUSED = {2, 3, 4}
SMALL = ["--context", "2", "--length", "2", "--scale", "1"]
SCORED = ["--looks", "none", "--device", "cpu"]
WINDOWS = ["--windows", "3", "--context", "2", "--horizon", "2"]
TRAIN = [
    "--tokenizer",
    "tok",
    "--steps",
    "2",
    "--batch",
    "2",
    "--frames",
    "4",
    "--preview-windows",
    "2",
    "--device",
    "cpu",
]
TRAIN_TOKENIZER = ["--kind", "transformer", "--patch", "8", "--tokens", "2", "--latent-dim", "4", "--steps", "1",
                   "--batch", "1", "--frames", "2", "--device", "cpu"]  # fmt: skip
ROLLOUT = ["rollout", "world", "data", "--out", "out", "--device", "cpu", *SMALL]
EVAL = ["eval", "world", "data", "--out", "out", "--manifest", "windows.json", *SCORED]
RESUME = ["train", "dynamics", "data", "--out", "run", "--resume", *TRAIN]
PLAN = ["eval", "plan", "plan.toml", "--device", "cpu", "--out"]
SWEEP = ["sweep-tau", "world", "data", "--taus", "0,.1", "--out", "sweep", "--no-video", "--no-test", "--device", "cpu",
         *WINDOWS]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """files: globs of what is damaged. commands: what reads them. needs: what is copied. writes: what may change.

    rank: as which of two processes of torchrun.
    """

    files: tuple[str, ...]
    commands: tuple[list[str], ...]
    needs: tuple[str, ...]
    writes: tuple[str, ...] = ("out",)
    rank: int | None = None


KINDS = {
    "checkpoint": Kind(
        ("world/config.json", "world/config.json", "world/model.safetensors", "world/tokenizer/*",
        "world/prompt/dataset.json",
         "world/prompt/episodes/*"),
        (["info", "world"], ["rollout", "world", "--out", "out", "--device", "cpu", *SMALL], EVAL,
         ["export", "world", "--out", "out", "--steps", "1", "--sampler", "euler"]),
        ("world", "data", "windows.json"),
    ),
    "tokenizer": Kind(
        ("tok/*",), (["info", "tok"], ["info", "tok"], ["train", "dynamics", "data", "--out", "out", *TRAIN]),
        ("tok", "data"), ("out", "data/latents"),
    ),
    "state": Kind(("run/run.json", "run/metrics.jsonl", "run/state/*/*"), (RESUME,), ("run", "data", "tok"), ("run",)),
    "tokenizer state": Kind(
        ("tokrun/state/*/*", "tokrun/run.json", "tokrun/metrics.jsonl"),
        (["train", "tokenizer", "data", "--out", "tokrun", "--resume", *TRAIN_TOKENIZER],),
        ("tokrun", "data"), ("tokrun",),
    ),
    "pack": Kind(("data/latents/*.safetensors",), (RESUME, ["info", "data", "--check"]), ("run", "data", "tok"),
                 ("run", "data/latents")),
    "journal": Kind(("unfinished/.*.journal", "unfinished/.*.partial"), (RESUME,), ("run", "data", "tok", "unfinished"),
                    ("run", "data/latents")),
    "windows": Kind(
        ("windows.json",),
        (EVAL, ["sweep-tau", "world", "data", "--manifest", "windows.json", "--taus", "0", "--out", "out", "--no-video",
                "--no-test", "--no-delta", "--device", "cpu"]),
        ("world", "data", "windows.json"),
    ),
    "dataset": Kind(("data/dataset.json", "data/dataset.json", "data/episodes/*"),
                    (ROLLOUT, EVAL, ["info", "data", "--check"]), ("world", "data", "windows.json")),
    "video": Kind(
        ("videos/*.mp4", "videos/*.gif", "videos/*.csv", "videos/*.jsonl", "videos/actions.json"),
        (["import", "videos", "--out", "out", "--size", "16", "--max-frames", "2000"],
         ["rollout", "world", "videos/b.mp4", "--out", "out", "--device", "cpu", *SMALL, "--context", "1"]),
        ("videos", "world"),
    ),
    "image": Kind(
        ("image.*",), (["rollout", "world", "FILE", "--out", "out", "--device", "cpu", "--length", "2"],),
        ("image.png", "image.jpg", "image.bmp", "image.webp", "world"),
    ),
    "actions": Kind(
        ("pressed.*",),
        (["rollout", "world", "data", "--out", "out", "--device", "cpu", *SMALL, "--actions", "FILE"],),
        ("pressed.csv", "pressed.jsonl", "world", "data"),
    ),
    "plan": Kind(("plan.*",), (["eval", "plan", "FILE", "--out", "out", "--device", "cpu"],),
                 ("plan.toml", "plan.jsonl", "world", "data", "windows.json")),
    "saved rollouts": Kind(("saved/*",), (["eval", "score", "saved", "data", "--out", "out"],), ("saved", "data")),
    "cells": Kind(("planned/cells/*",), (["eval", "merge", "planned", "--out", "out.csv"], [*PLAN, "planned"]),
                  ("planned", "plan.toml", "world", "data"), ("out.csv", "out.txt", "out.md", "planned")),
    "own part": Kind(("parted/cells/*",), ([*PLAN, "parted"],), ("parted", "plan.toml", "world", "data"), ("parted",),
                     0),
    "part of another": Kind(("parted/cells/*",), ([*PLAN, "parted"],), ("parted", "plan.toml", "world", "data"),
                            ("parted",), 1),
    "sweep cells": Kind(("sweep/cells/*",), (SWEEP,), ("sweep", "world", "data"), ("sweep",)),
    "scores": Kind(("scores/eval.json",), (["export", "world", "--evidence", "scores", "--out", "out"],),
                   ("scores", "world")),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="begin with this one, to share the work out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="by commas; default: all")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--special", action="store_true", help="a pipe and a device for every file, not by chance")
    parser.add_argument("--only", type=int, help="this mutation alone, and what it said")
    a = parser.parse_args()
    unknown = sorted(set(a.kinds.split(",")) - set(KINDS))
    if unknown:
        parser.error(f"unknown kind {unknown[0]!r}: choose from {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        numbers = [a.only] if a.only is not None else range(a.first, a.first + a.mutations)
        if a.special:
            numbers = None if a.only is None else [a.only]
        rows = fuzz(Path(scratch), numbers, a.seed, a.kinds.split(","), a.special)
    print(table(rows))
    bad = [row for row in rows if row["wrong"]]
    for row in bad:
        print(f"\nmutation {row['number']}: {row['did']}\n  {row['wrong']}\n  {row['said']}")
    if a.json:
        a.json.write_text(
            json.dumps({"seed": a.seed, "mutations": len(rows), "wrong": len(bad), "rows": rows}, indent=1)
        )
    sys.exit(1 if bad else 0)


def fuzz(
    scratch: Path, numbers: Sequence[int] | None, seed: int, kinds: list[str], special: bool = False
) -> list[dict]:
    """A row for every mutation: number, kind, what was done, exit code, seconds, bytes, and what was wrong with it.

    special: of the cases of `specials` those of these numbers, None for all.
    """
    prepare()
    base = scratch / "base"
    code = in_a_child(lambda: build(base), scratch / "build.log", seconds=300)[0]
    if code:
        raise SystemExit(f"the files to damage could not be made:\n{(scratch / 'build.log').read_text()[-2000:]}")
    rows, made = [], snapshot(base)
    cases = specials(base, kinds) if special else []
    numbers = range(len(cases)) if numbers is None else numbers
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        kind, *chosen = cases[number] if special else (kinds[number % len(kinds)],)
        rows.append({"number": number, "kind": kind} | one(base, scratch / "work", kind, rng, *chosen))
        if sys.stderr.isatty():
            print(f"\r{len(rows)}/{len(numbers)}", end="", file=sys.stderr, flush=True)
        if len(numbers) == 1:
            print(json.dumps(rows[-1], indent=1))
    changed = touched(made, snapshot(base), ())
    assert not changed, changed  # no command reached out of its copy
    return rows


def prepare() -> None:
    """Import what the commands need, so that a mutation does not pay for it. Nothing is computed: forks stay safe."""
    import av  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import PIL.Image
    import safetensors.torch  # noqa: F401
    import torch

    PIL.Image.init()
    torch.set_num_threads(1)
    from ahriuwu_cli import cli, imagine, printing  # noqa: F401
    from ahriuwu_cli.commands import progress  # noqa: F401
    from ahriuwu_cli.data import importer, pack_check, validate  # noqa: F401
    from ahriuwu_cli.evaluation import cells, looks, merge, plots, saved, sweep, sweep_plots, sweep_report  # noqa: F401
    from ahriuwu_cli.training import assemble, describe, export, tokenizer_loop, tokenizer_quality  # noqa: F401

    torch.randn(1, device="meta").mul(2)  # the first of its kind imports 800 modules
    for command in (["info", "/nowhere"], ["rollout", "/nowhere", "/nowhere", "--out", "/nowhere"]):
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            cli.main(command)


def specials(base: Path, kinds: list[str]) -> list[tuple[str, str, list[str], str]]:
    """(kind, file, command, what the file becomes) for every file that is damaged and every command that reads it."""
    cases = []
    for kind in kinds:
        files = sorted({p for pattern in KINDS[kind].files for p in base.glob(pattern) if p.is_file()})
        commands = [c for i, c in enumerate(KINDS[kind].commands) if c not in KINDS[kind].commands[:i]]
        cases += [(kind, str(f.relative_to(base)), c, how) for f in files for c in commands for how in ENDLESS]
    return cases


def one(
    base: Path,
    work: Path,
    kind: str,
    rng: random.Random,
    chosen: str = "",
    command: list[str] | None = None,
    special: str = "",
) -> dict:
    """One mutation: copy, damage, run, judge. Which file, which command and how: as chosen, or drawn."""
    spec = KINDS[kind]
    if work.exists():
        shutil.rmtree(work)
    work.mkdir()
    for name in spec.needs:
        copy = shutil.copytree if (base / name).is_dir() else shutil.copy2
        copy(base / name, work / name)
    if chosen:
        file = work / chosen
    else:
        file = rng.choice(sorted(p for p in work.glob(rng.choice(spec.files)) if p.is_file()))
        command = rng.choice(spec.commands)
    command = [str(file.relative_to(work)) if word == "FILE" else word for word in command]
    before = file.read_bytes()
    how, hashes_fit = damage(file, before, rng, special)
    if kind == "journal":  # now it lies where the packer looks; the finished pack does not
        shutil.rmtree(work / "data" / "latents")
        (work / "unfinished").rename(work / "data" / "latents")
        file = work / "data" / "latents" / file.name
    name, damaged = str(file.relative_to(work)), file.read_bytes() if file.is_file() else None
    did = f"{name}: {how}{', hashes made to fit' if hashes_fit else ''}; ahriuwu {' '.join(command)}"
    seen = snapshot(work)
    code, seconds, memory = in_a_child(lambda: run(work, command, spec.rank), work.parent / "said", SECONDS)
    said = (work.parent / "said.err").read_text(errors="replace")
    shown = (work.parent / "said").read_text(errors="replace")
    outside = touched(seen, snapshot(work), spec.writes) + strays(work.parent)
    wrong = judge(code, memory, said, outside, command, hashes_fit)
    why = ""
    if not wrong and code == 0:
        why = explain(kind, base, work, name, (before, damaged), hashes_fit, command, said + shown)
        wrong = "" if why else "it was accepted, and nothing explains that"
    return {"did": did, "code": code, "seconds": round(seconds, 3), "memory": memory, "why": why, "wrong": wrong,
            "said": said[-600:]}  # fmt: skip


def damage(file: Path, data: bytes, rng: random.Random, special: str = "") -> tuple[str, bool]:
    """Damage the file on disk; (what was done, whether the hashes around it fit again). special: one of SPECIAL."""
    if special or rng.random() < 0.04:
        file.unlink()
        how = special or rng.choice(SPECIAL)
        if how == "a folder":
            file.mkdir()
        elif how == "a pipe":
            os.mkfifo(file)
        elif how != "missing":
            target = {"a device": "/dev/zero", "a link to nothing": "/nowhere", "a link to itself": str(file)}[how]
            file.symlink_to(target)
        return how, False
    how, changed = mutate(file.name, data, rng)
    if rng.random() < 0.15:
        more, changed = mutate(file.name, changed, rng)
        how += f", {more}"
    if changed == data:
        changed += b"\x00"
        how += ", a zero added"
    fit = rng.random() < 0.5
    if fit and file.suffix == ".safetensors" and (again := sealed_tensors(changed)) != changed:
        changed = again
    elif fit and file.name == "model.safetensors":
        config = file.with_name("config.json")
        config.write_bytes(sealed(config.name, config.read_bytes(), changed))
    elif fit and file.name.startswith("state-"):
        fit = _name_state(file, changed)
        return how, fit
    elif fit and file.suffix == ".json":
        weights = file.with_name("model.safetensors")
        again = sealed(file.name, changed, weights.read_bytes() if weights.exists() else None)
        fit, changed = again != changed, again
    else:
        fit = False
    file.write_bytes(changed)
    return how, fit


def _name_state(file: Path, changed: bytes) -> bool:
    digest = hashlib.sha256(changed).hexdigest()
    document = json.loads(file.with_name("state.json").read_bytes())
    document["tensors_sha256"] = digest
    file.unlink()
    file.with_name(f"state-{digest[:16]}.safetensors").write_bytes(changed)
    file.with_name("state.json").write_text(json.dumps(document))
    file.write_bytes(changed)
    return True


def run(work: Path, command: list[str], rank: int | None = None) -> None:
    from ahriuwu_cli.cli import main as ahriuwu

    if rank is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.chdir(work)
    sys.argv = ["ahriuwu", *command]
    ahriuwu(command)


def in_a_child(work, log: Path, seconds: float) -> tuple[int, float, int]:
    """(exit code, or minus the signal; seconds; bytes above the start) of work() in a fork; its words are in log."""
    began = time.monotonic()
    child = os.fork()
    if not child:
        code = 70
        try:
            for stream, path in ((1, log), (2, log.with_suffix(".err"))):
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(descriptor, stream)
                os.close(descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            signal.alarm(int(seconds))
            log.with_suffix(".rss").write_text(Path("/proc/self/statm").read_text().split()[1])
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 3 * MEMORY, size + 3 * MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            code = 0
            work()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    start = int(log.with_suffix(".rss").read_text()) * resource.getpagesize()  # its own; pages of libraries come later
    return code, time.monotonic() - began, max(0, usage.ru_maxrss * 1024 - start)


def judge(code: int, memory: int, said: str, outside: list[str], command: list[str], fit: bool) -> str:
    """What was wrong, or nothing. fit: the hashes were made to fit, so what is computed from it may not be finite."""
    sentences = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == -signal.SIGALRM:
        return f"it took more than {SECONDS} s"
    if memory > MEMORY:
        return f"it took {memory >> 20} MiB"
    if "Traceback" in said or "internal error" in said:
        return "it ended in a traceback or an internal error"
    if any(ord(c) < 32 and c not in "\n\t\r" for c in said):
        return "it wrote control characters to the terminal"
    if outside:
        return f"it wrote outside its output: {', '.join(outside[:3])}"
    if "Warning: " in said:
        return "it printed a warning that is for programmers"
    if code == 1 and "--check" in command and not sentences:
        return ""  # the check's answer is no
    if code == 1 and fit and command[0] in ("train", "rollout", "eval") and len(sentences) < 2:
        return ""  # it could be computed with, but not well
    if code and (code not in REFUSED or len(sentences) != 1):
        return f"exit code {code} with {len(sentences)} sentences"
    return "it succeeded with an error's sentence" if not code and sentences else ""


def snapshot(folder: Path) -> dict[str, tuple]:
    return {
        str(p.relative_to(folder)): (s.st_ino, s.st_size, s.st_mtime_ns if p.is_symlink() or not p.is_dir() else 0)
        for p in folder.rglob("*")
        if (s := p.lstat())
    }


def strays(scratch: Path) -> list[str]:
    """What lies beside the folders of this script, and where the paths of `mutations.TEXTS` lead to."""
    known = {"base", "work", "build.log", "build.err", "build.rss", "said", "said.err", "said.rss"}
    return [str(p) for p in (*scratch.iterdir(), Path("/tmp/outside")) if p.name not in known and os.path.lexists(p)]


def touched(before: dict, after: dict, allowed: tuple[str, ...]) -> list[str]:
    """What is new, changed or gone, other than in the folders that may change."""
    names = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
    return sorted(n for n in names if not any(n == a or n.startswith(f"{a}/") for a in allowed))


# What may be accepted, and why --------------------------------------------------------------------------------------

DESCRIBES = {"name", "source", "seed", "fps", "frame_skip", "split", "labels"}
SOUND = "its author made the hashes fit, and it says something else that is sound"


def explain(
    kind: str,
    base: Path,
    work: Path,
    name: str,
    content: tuple[bytes, bytes | None],
    fit: bool,
    command: list[str],
    shown: str,
) -> str:
    """Why a success is right; empty where nothing says so."""
    verb, (before, now) = " ".join(command[:2]), content
    if now is not None and same_content(name, before, now):
        return "the same content in other bytes"
    if kind == "checkpoint" and name.startswith("world/prompt/"):
        if "world data" in " ".join(command) or command[0] in ("info", "export"):
            return "not read by this command"
        return described(before, now) or "" if name.endswith("dataset.json") else "an episode that was not drawn"
    if kind in ("cells", "own part", "sweep cells"):
        if "set aside as" in shown:
            return "set aside, with a sentence, and measured anew"
        if now is None:
            return "measured anew"
    if kind == "part of another" and now is None:
        return "not there: its process measures it"
    if fit and kind in ("sweep cells", "own part", "part of another"):
        return SOUND
    if fit and kind in ("checkpoint", "tokenizer", "saved rollouts", "cells", "windows", "tokenizer state", "state"):
        return SOUND
    if kind in ("state", "tokenizer state"):
        if name.endswith("metrics.jsonl"):
            return "lines of the log that are not whole are dropped"
        if "made anew from the copy in" in shown:
            return "made anew from a state's copy, with a sentence"
        if name.endswith("run.json"):
            return "not read by this command" if kind == "tokenizer state" else said_of_a_run(before, now)
        if "set aside as" in shown:
            return "set aside, with a sentence; the state before it was used"
        newest = sorted((work / name.split("/")[0] / "state").glob("step-*"))
        return "an older state that is not needed" if newest and newest[-1].name not in name else ""
    if kind == "dataset":
        if name.endswith(".json"):
            return (
                described(before, now)
                or (verb == "rollout world" and "the hash of an episode that was not drawn")
                or ""
            )
        return "an episode that was not read" if command[0] == "rollout" or command[0] == "eval" else ""
    if kind == "pack" and command[0] == "info":
        if now is None:
            return "not there: made when it is needed"
        if "it is not used" in shown:
            return "named as a pack that is not used"
        same = _pack_facts(before) == _pack_facts(now)
        return "of another tokenizer by its header: not used by the one that it is named after" if same else ""
    if kind in ("pack", "journal"):
        made, whole = (sorted((f / "data" / "latents").glob("*.safetensors")) for f in (work, base))
        same = [p.read_bytes() for p in made] == [p.read_bytes() for p in whole]
        return "the pack was made anew, the same to the byte" if same else ""
    if kind in ("video", "image"):
        return (
            "not read by this command"
            if "videos/b.mp4" in command and name != "videos/b.mp4"
            else "it decodes: no hash"
        )
    if kind == "actions":
        return "rows of numbers that the action space allows"
    if kind == "plan":
        return "a plan that is sound and says something else"
    if kind == "scores":
        return "scores that are sound and say something else"
    return ""


def same_content(name: str, a: bytes, b: bytes) -> bool:
    def parts(data: bytes) -> tuple:
        if name.endswith((".safetensors", ".partial")):
            length = int.from_bytes(data[:8], "little")
            return json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True), data[8 + length :]
        return (json.dumps(json.loads(data), sort_keys=True),)

    try:
        return parts(a) == parts(b)
    except (ValueError, RecursionError):
        return False


def _pack_facts(data: bytes) -> dict:
    """What a pack's header says, but for the tokenizer."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["ahriuwu"]) | {"tokenizer": ""}


def described(before: bytes, now: bytes | None) -> str:
    """A dataset.json that differs only in what describes the data."""
    try:
        old, new = json.loads(before), json.loads(now or b"")
        other = {k for k in old | new if old.get(k) != new.get(k)} - {"episodes", "action_space"}
        parts = zip(*(d["action_space"]["components"] for d in (old, new)), strict=True)
        for a, b in [*zip(old["episodes"], new["episodes"], strict=False), *parts]:
            other |= {k for k in a | b if a.get(k) != b.get(k)}
        shorter = len(new["episodes"]) < len(old["episodes"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return (
        "describes the data; its fingerprint is another one then" if other <= DESCRIBES and (other or shorter) else ""
    )


def said_of_a_run(before: bytes, now: bytes | None) -> str:
    old, new = json.loads(before), json.loads(now or b"{}")
    other = {k for k in old | new if old.get(k) != new.get(k)}
    if other <= {"command", "versions", "processes", "parallel"}:
        return "what is said of the run for people"
    asked = [{k: v for k, v in d["config"].items() if k != "accumulate"} for d in (old, new)]
    more = all(new["facts"].get(k) == v for k, v in old["facts"].items())
    return "what a resume may change, or does not ask for" if asked[0] == asked[1] and more else ""


def table(rows: list[dict]) -> str:
    """Markdown: by kind, what became of the mutations."""
    lines = [
        "| what | mutations | exit 1 | 2 | 3 | 4 | accepted | wrong | worst s | worst MiB |",
        "|---|" + "---:|" * 9,
    ]
    for kind in [*dict.fromkeys(row["kind"] for row in rows), None]:
        mine = [row for row in rows if kind in (None, row["kind"])]
        codes = Counter(row["code"] for row in mine if not row["wrong"])
        cells = [len(mine), *(codes[c] for c in (1, 2, 3, 4, 0)), sum(bool(row["wrong"]) for row in mine)]
        cells += [f"{max(row['seconds'] for row in mine):.1f}", max(row["memory"] for row in mine) >> 20]
        lines.append(f"| {kind or 'all'} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", "accepted, and why:", ""]
    whys = Counter((row["kind"], row["why"]) for row in rows if row["why"])
    lines += [f"- {kind}: {count} x {why}" for (kind, why), count in sorted(whys.items())]
    return "\n".join(lines)


def build(base: Path) -> None:
    """Everything that is damaged later, made by the commands themselves."""
    import numpy as np
    from PIL import Image

    from ahriuwu_cli.data.action_component import ActionComponent
    from ahriuwu_cli.data.actions import ActionSpace
    from ahriuwu_cli.data.episode_writer import EpisodeWriter
    from ahriuwu_cli.data.video_writing import write_gif, write_mp4

    base.mkdir()
    os.chdir(base)
    rng, space = np.random.default_rng(0), ActionSpace((ActionComponent("keys", "binary", 2, ("LEFT", "RIGHT")),))
    clips = []
    with EpisodeWriter(
        Path("data"), height=16, width=16, fps=10.0, action_space=space, fractions=(0.4, 0.3, 0.3)
    ) as data:
        for _ in range(6):
            actions, place = space.random(11, (2, 5), rng), int(rng.integers(16))
            clip = rng.integers(0, 8, (12, 16, 16, 3)).astype(np.uint8)
            for t in range(12):
                clip[t, :, place % 16] = 220
                place += int(actions[t, 1] - actions[t, 0]) if t < 11 else 0
            data.add(clip, actions)
            clips.append(clip)

    def ahriuwu(*command: str) -> None:
        from ahriuwu_cli.cli import main as call

        try:
            sys.argv = ["ahriuwu", *command]
            call(list(command))
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{command}: {end.code}") from None

    ahriuwu("train", "tokenizer", "data", "--out", "tok", "--patch", "8", "--latent-dim", "6")
    ahriuwu("train", "dynamics", "data", "--out", "run", *TRAIN)
    ahriuwu("train", "tokenizer", "data", "--out", "tokrun", *TRAIN_TOKENIZER)
    ahriuwu("export", "run", "--out", "world", "--steps", "1", "--sampler", "euler", "--prompts", "data", "--clips",
    "2",
            "--frames", "8")  # fmt: skip
    ahriuwu("eval", "world", "data", "--out", "scores", *WINDOWS, *SCORED)
    shutil.copy("scores/windows.json", "windows.json")
    ahriuwu("eval", "generate", "world", "data", "--out", "saved", *WINDOWS, "--device", "cpu")
    Path("plan.toml").write_text(
        '[defaults]\ndataset = "data"\nwindows = 3\ncontext = 2\nhorizon = 2\n[[cell]]\ncheckpoint = "world"\n'
        'steps = 2\n[[cell]]\ncheckpoint = "world"\nseed = 1\n'
    )
    Path("plan.jsonl").write_text(
        '{"defaults": {"dataset": "data"}}\n{"checkpoint": "world", "manifest": "windows.json", "tau_ctx": 0.2}\n'
    )
    ahriuwu("eval", "plan", "plan.toml", "--out", "planned", "--device", "cpu")
    os.environ |= {"RANK": "0", "WORLD_SIZE": "2"}
    ahriuwu(*PLAN, "parted")  # the part of the first of two processes
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    ahriuwu(*SWEEP)
    Path("videos").mkdir()
    for name, clip in zip("ab", clips, strict=False):
        write_mp4(f"videos/{name}.mp4", clip.repeat(2, 1).repeat(2, 2), 10)
    write_gif("videos/c.gif", clips[2], 10)
    Path("videos/a.csv").write_text("steer,go\n" + "".join(f"{t / 10},{t % 2}\n" for t in range(11)))
    Path("videos/b.jsonl").write_text("".join(json.dumps({"steer": t / 20, "go": 1}) + "\n" for t in range(11)))
    axis = {"kind": "continuous", "size": 1, "low": [-1], "high": [2]}
    document = {"components": [{"name": n, "labels": [n], **axis} for n in ("steer", "go")]}
    Path("videos/actions.json").write_text(json.dumps(document))
    for kind in ("png", "jpg", "bmp", "webp"):
        Image.fromarray(clips[0][0]).save(f"image.{kind}")
    Path("pressed.csv").write_text("LEFT,RIGHT\n" + "0,1\n1,0\n" * 10)
    Path("pressed.jsonl").write_text(
        '{"LEFT": 0, "RIGHT": 1}\n[1, 0]\n'.replace("[1, 0]", '{"LEFT": 1, "RIGHT": 1}') * 10
    )
    unfinished(base)


def unfinished(base: Path) -> None:
    """A pack whose packer was killed after its last part: everything is there but the name and the header's hashes."""
    from ahriuwu_cli.data.pack_format import NO_HASH, hashes_of, pack_header, read_pack_header
    from ahriuwu_cli.data.pack_journal import Journal

    pack = next((base / "data" / "latents").glob("*.safetensors"))
    folder = base / "unfinished"
    folder.mkdir()
    facts, layout = read_pack_header(pack)
    purpose = {name: facts[name] for name in ("tokenizer", "dataset", "split")} | {"pack_format": facts["format"]}
    Journal(folder / f".{pack.name}.journal", purpose, dict(enumerate(hashes_of(facts)))).close()
    for episode in facts["episodes"]:
        episode["parts"] = [NO_HASH] * len(episode["parts"])
    header = pack_header(pack, layout.shapes, facts)
    (folder / f".{pack.name}.partial").write_bytes(header + pack.read_bytes()[len(header) :])


if __name__ == "__main__":
    main()
