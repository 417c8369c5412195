"""Does what the README says come out here? Every shipped world on episodes recorded now, `verify`, perhaps the demo.

    python scripts/expected.py                     # 1.5 minutes: 48 windows of episodes that no number was made on
    python scripts/expected.py --short             # one: 16 windows and what exactly they gave; CI runs this
    python scripts/expected.py --demo runs/demo    # after `bash scripts/demo.sh`: its numbers too

Expected values and tolerances are in scripts/expected.toml. The episodes are the same wherever the same ViZDoom records
them, so the short form allows for rounding alone. Exit code 1 when a value is missed; times are only told.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
Line = tuple[str, float, str, bool | None]  # what, measured, expected, whether it holds; None where it is only told
SAID = {True: "ok", False: "MISSED", None: "told"}


def main() -> None:
    a = _arguments()
    expected = tomllib.loads((ROOT / "scripts" / "expected.toml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        lines = verify(expected["verify"])
        for name, of in expected["worlds"].items():
            lines += world(name, of, of["short" if a.short else "full"], Path(folder) / name)
    if a.demo:
        lines += demo(expected["demo"], json.loads((a.demo / "summary.json").read_text()))
    width = max(len(line[0]) for line in lines)
    for what, measured, range_, holds in lines:
        print(f"{what:<{width}}  {measured:8.2f}  {range_:<18}{SAID[holds]}")
    held, counted = count(lines)
    print(f"\n{held} of {counted} values are as expected; times are only told")
    sys.exit(0 if held == counted else 1)


def count(lines: list[Line]) -> tuple[int, int]:
    """(values that hold, values that are checked): what is only told counts in neither."""
    checked = [holds for *_, holds in lines if holds is not None]
    return sum(checked), len(checked)


def verify(of: dict) -> list[Line]:
    """The oracles: all must hold."""
    seconds, result = _run("verify", "--no-metrics", "--json", check=False)
    return [
        ("verify: checks that fail", result["failed"], "0", result["ok"]),
        ("verify: seconds", seconds, f"about {of['seconds']}", None),
    ]


def world(name: str, of: dict, form: dict, folder: Path) -> list[Line]:
    """A shipped world: its prompt imagined, and its scores on episodes that are recorded now."""
    checkpoint = str(ROOT / "checkpoints" / name)
    seconds, _ = _run("rollout", checkpoint, "--out", f"{folder}-rollout", "--json")
    lines = [(f"{name}: rollout, seconds", seconds, f"about {of['rollout_seconds']}", None)]
    _run("record", *of["record"], "--out", f"{folder}-data", "--json")
    said = _run("eval", checkpoint, f"{folder}-data", "--out", f"{folder}-eval", "--windows", str(form["windows"]),
                "--looks", "none", "--json")[1]  # fmt: skip
    for what, (value, tolerance) in form["scores"].items():
        measured = _score(said, what)
        lines.append((f"{name}: {what}", measured, f"{value:g} +- {tolerance:g}", abs(measured - value) <= tolerance))
    return lines


def demo(of: dict, summary: dict) -> list[Line]:
    """The demo's table."""
    found = {f"gain_{h}": row["gain_db"]["value"] for h, row in summary["horizons"].items()}
    found |= {"delta_4": summary["action_delta_db"]["value"], "minutes": summary["seconds"]["whole"] / 60}
    return [
        (f"demo: {what}", found[what], f"{value:g} +- {tolerance:g}",
         None if what == "minutes" else abs(found[what] - value) <= tolerance)
        for what, (value, tolerance) in of.items()
    ]  # fmt: skip


def _score(result: dict, what: str) -> float:
    kind, _, h = what.partition("_")
    if kind == "delta":
        return result["action_delta_db"]["shuffled"][h]["value"]
    row = result["horizons"][h]
    return row["gain_db"]["value"] if kind == "gain" else row[f"{kind}_ratio"]


def _run(*words: str, check: bool = True) -> tuple[float, dict]:
    """(seconds, the JSON object printed) of one command."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "ahriuwu_cli", *words], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"ahriuwu {' '.join(words)} failed: {done.stderr}")
    return time.monotonic() - began, json.loads(done.stdout)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="the demo's folder")
    parser.add_argument("--short", action="store_true", help="fewer windows a world, exact to rounding")
    return parser.parse_args()


if __name__ == "__main__":
    main()
