"""Does a run that is killed at any moment end where an unbroken one does? SIGKILL, the same command again, compare.

    python scripts/kill_test.py --kills 100 --seed 0 --json out.json   # two to three minutes
    python scripts/kill_test.py --kills 10 --fresh                    # an interpreter of its own and `nano` each life

Half the kills wait until a state or a world is being written; the others fall anywhere. A run is killed ten times and
compared when it is through: every tensor of its last states, its worlds or tokenizer, and every line of its log, byte
for byte; only what a clock decides is left out. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from killing import DYNAMICS, TOKENIZER, Fresh, Nursery, differing_bytes, live_and_die, prepare  # noqa: E402

CASES = {
    "dynamics, muon": DYNAMICS,
    "dynamics, adamw, one state kept": f"{DYNAMICS} --optimizer adamw --keep 1 --forcing prefix",
    "transformer tokenizer": TOKENIZER,
}
EACH = 10  # kills a run


def main() -> None:
    a = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="kill-test-"))
    prepare(folder)
    rng, rows = random.Random(a.seed), {name: _row() for name in CASES}
    with Fresh() if a.fresh else Nursery() as start:
        for name, command in CASES.items():
            command += f" --steps {a.steps}"
            whole = start(command, folder / f"{name}, unbroken")
            if whole.ends():
                raise SystemExit(whole.said())
            rows[name]["command"] = f"ahriuwu {command}"
        number = 0
        while sum(row["kills"] for row in rows.values()) < a.kills:
            name = list(CASES)[number % len(CASES)]
            row, cwd = rows[name], folder / f"{name}, {number}"
            left = a.kills - sum(r["kills"] for r in rows.values())
            tally = live_and_die(start, rows[name]["command"][8:], cwd, min(EACH, left), rng, a.longest)
            differ = differing_bytes(folder / f"{name}, unbroken" / "run", cwd / "run")
            for key, value in (
                ("kills", sum(tally.kills.values())),
                ("inside a state", tally.kills["a state"]),
                ("inside a world", tally.kills["a world"]),
                ("went on from a state", len(tally.steps)),
                ("states set aside", tally.set_aside),
                ("runs compared", 1),
                ("differing bytes", sum(differ.values())),
                ("bad exits", sum(code != 0 for code in tally.codes)),
            ):
                row[key] += value
            print(f"{cwd.name}: {dict(tally.kills)}, {tally.lives} lives, differs in {differ or 'nothing'}", flush=True)
            if not differ:
                shutil.rmtree(cwd)
            number += 1
    _print(rows)
    if a.json:
        Path(a.json).write_text(json.dumps({"seed": a.seed, "steps": a.steps, "cases": rows}, indent=1) + "\n")
    bad = sum(row["differing bytes"] + row["bad exits"] for row in rows.values())
    if bad:
        raise SystemExit(f"the runs that differ are in {folder}")
    shutil.rmtree(folder)


def _row() -> dict:
    return dict.fromkeys(
        ("kills", "inside a state", "inside a world", "went on from a state", "states set aside", "runs compared",
         "differing bytes", "bad exits"), 0
    )  # fmt: skip


def _print(rows: dict[str, dict]) -> None:
    names = list(_row())
    print(f"\n| runs | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    total = Counter()
    for case, row in rows.items():
        total.update({name: row[name] for name in names})
        print(f"| {case} | {' | '.join(str(row[name]) for name in names)} |")
    print(f"| all | {' | '.join(str(total[name]) for name in names)} |")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="Optimiser steps of a run.")
    parser.add_argument("--longest", type=float, default=2.0, help="Seconds a life lasts at most.")
    parser.add_argument("--fresh", action="store_true", help="A fresh interpreter and the real sizes for every life.")
    parser.add_argument("--json", help="Write the table here.")
    asked = parser.parse_args()
    if asked.kills < 1 or asked.steps < 1 or not asked.longest > 0:
        parser.error("--kills, --steps and --longest must be above 0")
    if asked.json and not Path(asked.json).absolute().parent.is_dir():
        parser.error(f"there is no folder for --json {asked.json}")
    return asked


if __name__ == "__main__":
    main()
