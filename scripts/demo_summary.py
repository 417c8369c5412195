"""Collects what the demo's commands wrote into runs/demo/summary.json and prints it as a table."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def summary(out: Path, seconds: float) -> dict:
    """The demo's numbers: seconds by stage, parameters, gain over persistence by horizon, action delta, files."""
    result = json.loads((out / "eval" / "eval.json").read_text())
    lines = (out / "stages.tsv").read_text().splitlines()
    stages = {name: int(spent) for name, spent in (line.split("\t") for line in lines)}
    horizons = {}
    for h in ("1", "4", "16"):
        row = result["horizons"][h]
        horizons[h] = {"psnr": row["psnr"], "floor": row["floor"], "ceiling": row["ceiling"], "gain_db": row["gain_db"]}
    return {
        "seconds": {"whole": seconds, **stages},
        "parameters": parameters(out / "world" / "best"),
        "horizons": horizons,
        "action_delta_db": result["action_delta_db"]["shuffled"]["4"],
        "action_delta_random_db": result["action_delta_db"]["random"]["4"],
        "windows": result["n"],
        "video": str(out / "rollout" / "rollout.mp4"),
        "turns": str(out / "turns" / "rollout.mp4"),
        "report": str(out / "eval" / "report.html"),
        "sweep": str(out / "sweep"),
    }


def parameters(world: Path) -> int:
    """Parameters of the dynamics, counted in its weights file."""
    from safetensors import safe_open

    with safe_open(world / "model.safetensors", framework="np") as file:
        return sum(int(file.get_tensor(name).size) for name in file.keys())  # noqa: SIM118 - not a dict


def table(facts: dict) -> str:
    """The summary as aligned text."""

    def number(entry: dict, sign: str = "") -> str:
        return f"{entry['value']:{sign}.2f} [{entry['lo']:.2f}, {entry['hi']:.2f}]"

    rows = [("horizon", "PSNR dB", "floor (persistence)", "ceiling (tokenizer)", "gain over floor dB")]
    for h, row in facts["horizons"].items():
        plain = [number(row[name]) for name in ("psnr", "floor", "ceiling")]
        rows.append((h, *plain, number(row["gain_db"], "+")))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    lines = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
    stages = ", ".join(f"{name} {spent} s" for name, spent in facts["seconds"].items() if name != "whole")
    n = facts["windows"]
    return "\n".join(
        [
            "",
            f"{facts['parameters']:,} parameters; {n['windows']} held-out windows of {n['episodes']} episodes, K = 4, "
            "95 % intervals",
            *lines,
            f"action delta at 4: {number(facts['action_delta_db'], '+')} dB against shuffled actions, "
            f"{number(facts['action_delta_random_db'], '+')} dB against random ones",
            f"{facts['seconds']['whole']} s in all: {stages}",
            f"look at {facts['video']}, {facts['turns']} (one prompt, turned left, right and as played),",
            f"{facts['report']} and {facts['sweep']}",
        ]
    )


def main() -> None:
    """demo_summary.py OUT SECONDS"""
    out = Path(sys.argv[1])
    facts = summary(out, int(sys.argv[2]))
    temporary = out / ".summary.json.tmp"
    temporary.write_text(json.dumps(facts, indent=1))
    temporary.rename(out / "summary.json")
    print(table(facts))


if __name__ == "__main__":
    main()
