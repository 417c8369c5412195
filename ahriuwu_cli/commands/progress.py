"""Progress on stderr: bars with an ETA for people, nothing for machines (`--json`) and little for log files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ahriuwu_cli.config import TrainConfig


@contextmanager
def bar(title: str, unit: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yields progress(done, total); the bar appears with the first call."""
    from tqdm import tqdm

    shown: list[tqdm] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc=title, unit=unit, disable=quiet or not sys.stderr.isatty()))
        shown[0].update(done - shown[0].n)

    try:
        yield progress
    finally:
        for b in shown:
            b.close()


@contextmanager
def training_bar(config: TrainConfig, quiet: bool = False) -> Iterator[Callable[[dict], None]]:
    """Yields report(line of metrics): a bar with loss, gain and ETA; plain lines without a terminal."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty() and not quiet
    shown = tqdm(total=1000, bar_format="train {percentage:3.0f}%|{bar:20}| {desc}", disable=not terminal)
    notes = {"gain": ""}

    def report(line: dict) -> None:
        if "warning" in line:
            tqdm.write(f"step {line['step']}: {line['warning']}", file=sys.stderr)
            return
        if "stood_still_s" in line:
            if not quiet:
                tqdm.write(f"the machine stood still for {line['stood_still_s']} s: not counted", file=sys.stderr)
            return
        if "preview" in line:
            gains = ", ".join(f"{float(v):+.2f} at {h}" for h, v in line["preview"]["gain_db"].items())
            notes["gain"] = f" | gain dB {gains}"
            if not quiet and not terminal:
                print(f"step {line['step']}: held-out gain over persistence, dB: {gains}", file=sys.stderr, flush=True)
            return
        done = line["seconds"] / max(line["seconds"] + (line["eta_s"] or 0), 1e-9)
        shown.n = round(1000 * done)
        text = (
            f"step {line['step']}/{line['total_steps'] or '?'} loss {line['loss']:.4f} "
            f"{line['frames_per_s']:.0f} frames/s ETA {line['eta_s'] or 0:.0f}s{notes['gain']}"
        )
        shown.set_description_str(text)
        if not quiet and not terminal and line["step"] % (10 * config.log_every) == 0:
            print(text, file=sys.stderr, flush=True)

    try:
        yield report
    finally:
        shown.close()
