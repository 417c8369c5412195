"""Merging: finished cells become one CSV, and tables that compare them with paired intervals, window by window.

Only cells of the same windows of the same data are compared; others stand in a table of their own. The reference is
the best cell at the last frame unless one is named, and every other cell is shown as its difference to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahriuwu_cli.errors import DataError, UserError, did_you_mean
from ahriuwu_cli.evaluation import report
from ahriuwu_cli.evaluation.agreement import check_agreement
from ahriuwu_cli.evaluation.cell_check import check_cell
from ahriuwu_cli.evaluation.cells import FOLDER, digest, read_cell
from ahriuwu_cli.evaluation.prepare import INTERVAL
from ahriuwu_cli.evaluation.protocol import WindowManifest, paired_bootstrap
from ahriuwu_cli.evaluation.report import Row
from ahriuwu_cli.evaluation.summary import jsonable
from ahriuwu_cli.evaluation.sweep_cells import is_sweep
from ahriuwu_cli.printing import one_line, some_of

NAMED = 8  # missing cells that are named in a note; JSON has all of them
_HASHES = ("checkpoint_hash", "tokenizer_fingerprint")


@dataclass(frozen=True)
class FinishedCell:
    """A cell as it lies on disk."""

    name: str  # its hash
    checkpoint: str
    dataset: str
    identity: dict[str, Any]
    result: dict[str, Any]

    @property
    def windows(self) -> WindowManifest:
        """The windows that were scored, as the result lists them."""
        told = self.identity
        return WindowManifest(
            fingerprint=told["dataset_fingerprint"],
            split=told["split"],
            seed=told["window_seed"],
            context=told["evaluation"]["context"],
            horizon=told["evaluation"]["horizon"],
            windows=tuple((row["episode"], row["start"]) for row in self.result["windows"]),
        )

    @property
    def horizons(self) -> list[int]:
        return [int(h) for h in self.result["horizons"]]

    def psnr(self, h: int) -> np.ndarray:
        """(W,) dB at generated frame h; NaN where the rollout was not finite."""
        return np.array([row[f"psnr_{h}"] for row in self.result["windows"]], dtype=float)  # null becomes NaN


def read_cells(out: Path) -> tuple[list[FinishedCell], list[str]]:
    """The finished cells of a plan's folder in the order of their names, and notes on what is not finished there.

    DataError when there is none, or when one is damaged: leaving it out would change what is compared.
    """
    folder = out / FOLDER
    if is_sweep(out):
        raise DataError(f"{out} holds a sweep, not cells of a plan: `ahriuwu sweep-tau` compares those itself")
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise DataError(f"{out} holds no finished cell: run `ahriuwu eval plan PLAN --out {out}` first")
    cells = [_read(path) for path in paths]
    finished = {c.name for c in cells}
    begun = sorted({p.name.split(".")[0] for p in folder.glob("*.part-*.safetensors")} - finished)
    return cells, [f"cell {name} has only parts: run its plan again to finish it, it is not in here" for name in begun]


def of_plan(
    cells: Sequence[FinishedCell], planned: Mapping[str, str]
) -> tuple[list[FinishedCell], list[str], list[str]]:
    """Of finished cells those of a plan ({name: its place}), the places of those that it lacks, and notes on the rest.

    DataError when none of its cells is there.
    """
    mine = [cell for cell in cells if cell.name in planned]
    if not mine:
        raise DataError(
            "none of the plan's cells is finished there: it ran with another --out, or its worlds or data have changed"
        )
    finished = {cell.name for cell in mine}
    missing = [where for name, where in planned.items() if name not in finished]
    others = len(cells) - len(mine)
    notes = [f"{others} finished cell(s) there are not of this plan and are left out"] if others else []
    return mine, missing, notes


def merge(
    cells: Sequence[FinishedCell],
    reference: str | None = None,
    notes: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> Row:
    """JSON-able: `tables`, one for every set of windows, with rows of gains and paired differences in dB.

    reference: a cell's name (or its beginning) or a checkpoint, in every table that has it; UserError when none has.
    missing: where the cells that should be here stand in their plan; status "incomplete" when there are any.
    """
    groups: dict[str, list[FinishedCell]] = {}
    for cell in cells:
        groups.setdefault(cell.identity["manifest_hash"], []).append(cell)
    ordered = sorted(groups.values(), key=lambda group: (group[0].dataset, group[0].identity["manifest_hash"]))
    asked = set() if reference is None else _asked(cells, reference)
    tables = [_table(group, reference, asked) for group in ordered]
    nan = [c.name for c in cells if c.result["status"] != "ok"]
    notes = list(notes)
    if len(tables) > 1:
        notes.append(
            f"the cells are of {len(tables)} different sets of windows, each in a table of its own: "
            f"numbers of different tables cannot be compared"
        )
    if nan:
        notes.append(f"FAILED: cells with frames that are not finite: {', '.join(nan)}; what they touch is nan")
    if missing:
        named = some_of(missing, NAMED)
        notes.append(f"FAILED: {len(missing)} cell(s) of the plan are not finished ({named}): run it again")
    return jsonable(
        {
            "kind": "eval-merge",
            "status": "incomplete" if missing else "nan" if nan else "ok",
            "cells": len(cells),
            "missing": list(missing),
            "tables": tables,
            "notes": notes,
        }
    )


def merged_rows(cells: Sequence[FinishedCell]) -> list[Row]:
    """For the CSV, one row a cell and horizon: settings, hashes, then everything that `ahriuwu eval` reports there."""
    rows = []
    for cell in cells:
        told, n = cell.identity, cell.result["n"]
        about = {
            "cell": cell.name,
            "checkpoint": cell.checkpoint,
            "dataset": cell.dataset,
            "status": cell.result["status"],
            **{name: told["generation"][name] for name in ("sampler", "steps", "ctx_mode", "ctx_label")},
            **{name: told["evaluation"][name] for name in ("seed", "context", "horizon")},
            "split": told["split"],
            **n,
            "checkpoint_hash": told["checkpoint_hash"],
            "dataset_fingerprint": told["dataset_fingerprint"],
            "manifest_hash": told["manifest_hash"],
        }
        rows += [report.flatten({**about, **row}) for row in report.evaluation_rows(cell.result)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


def as_text(merged: Row) -> str:
    """Every table aligned for a terminal, with its windows above it and its notes below."""
    parts = []
    for t in merged["tables"]:
        table, footer = report.table(*_cells(t)), map(one_line, _footer(t))
        parts.append("\n".join([one_line(_title(t)), "", table, "", *footer]))
    notes = "\n".join(one_line(f"note: {note}") for note in merged["notes"])
    return "\n\n".join([*parts, *([notes] if notes else [])])


def as_markdown(merged: Row) -> str:
    """The same as Markdown."""
    parts = []
    for t in merged["tables"]:
        header, rows = _cells(t)
        lines = [
            f"### {report.in_markdown(_title(t))}",
            "",
            _line(header),
            _line(["---"] + ["---:"] * (len(header) - 1)),
        ]
        parts.append("\n".join([*lines, *map(_line, rows), "", *_bullets(_footer(t))]))
    parts += _bullets(merged["notes"])
    return "\n\n".join(parts) + "\n"


def _read(path: Path) -> FinishedCell:
    try:
        document = read_cell(path)
    except FileNotFoundError:
        raise DataError(f"{path} leads to no file: remove it, and run its plan again") from None
    except DataError as error:
        raise DataError(f"{error}: run its plan again, which sets it aside and redoes it, or remove it") from None
    try:
        return as_finished(path.stem, document)
    except ValueError as error:
        raise DataError(f"{path} {error}: move it away") from None


def as_finished(name: str, document: dict[str, Any]) -> FinishedCell:
    """The cell that a file of this name holds. ValueError: what it is else.

    Its checksum fits, but whoever wrote it may have written anything.
    """
    try:
        check_cell(document)
    except ValueError as error:
        raise ValueError(f"is no cell of this version ({error})") from None
    names = document["names"]
    cell = FinishedCell(name, names["checkpoint"], names["dataset"], document["identity"], document["result"])
    if digest(cell.identity) != name or cell.windows.hash != cell.identity["manifest_hash"]:
        raise ValueError("was measured with other settings or windows than its name says")
    return cell


def _asked(cells: Sequence[FinishedCell], reference: str) -> set[str]:
    """Names of the cells of this checkpoint; where none is called so, of those that begin so (4 digits at least)."""
    found = {c.name for c in cells if c.checkpoint == reference}
    found = found or {c.name for c in cells if len(reference) >= 4 and c.name.startswith(reference)}
    if not found:
        known = tuple(dict.fromkeys([*(c.checkpoint for c in cells), *(c.name for c in cells)]))
        raise UserError(f"--reference {reference!r} is none of the cells: {did_you_mean(reference, known)}")
    return found


def _table(group: list[FinishedCell], reference: str | None, among: set[str]) -> Row:
    manifest, horizons, names = group[0].windows, group[0].horizons, _labels(group)
    last = horizons[-1]
    other = next((c.name for c in group if c.horizons != horizons), None)
    if other is not None:
        raise DataError(f"cell {other} reports other frames than cell {group[0].name} of these windows: move it away")
    check_agreement(group)
    asked = [c for c in group if c.name in among]
    if len(asked) > 1:
        raise UserError(
            f"--reference {reference!r} fits {len(asked)} cells ({', '.join(c.name for c in asked)}): give one's name"
        )
    ranked = sorted(group, key=lambda c: (-np.nan_to_num(c.psnr(last).mean(), nan=-np.inf), names[c.name]))
    finite = [c for c in ranked if np.isfinite(c.psnr(last)).all()]
    other = asked[0] if asked else next(iter(finite), None)
    rows = []
    for c in ranked:
        row: Row = {"cell": c.name, "label": names[c.name], "status": c.result["status"]}
        row["psnr"] = {h: c.psnr(h).mean() for h in horizons}
        row["gain_db"] = {h: c.result["horizons"][str(h)]["gain_db"] for h in horizons}
        row["difference_db"] = (
            None
            if other in (None, c)
            else {h: paired_bootstrap(c.psnr(h) - other.psnr(h), manifest.episodes) for h in horizons}
        )
        rows.append(row)
    warnings = list(dict.fromkeys(w for c in group for w in c.result["warnings"]))
    return {
        "manifest_hash": manifest.hash,
        "dataset": group[0].dataset,
        "split": manifest.split,
        "context": manifest.context,
        "horizon": manifest.horizon,
        "n": {"windows": len(manifest.windows), "episodes": len(set(manifest.episodes))},
        "frames": horizons,
        "reference": other and {"cell": other.name, "label": names[other.name], "chosen": bool(asked)},
        "rows": rows,
        "interval": INTERVAL,
        "warnings": warnings,
    }


def _labels(group: list[FinishedCell]) -> dict[str, str]:
    """The checkpoint and the settings that differ in the table; the hash of the weights where that is not enough."""
    flat = {c.name: _flat(c.identity) for c in group}
    names = list(dict.fromkeys(name for settings in flat.values() for name in settings if name not in _HASHES))
    varying = [n for n in names if len({str(settings.get(n)) for settings in flat.values()}) > 1]
    labels = {}
    for c in group:
        told = ", ".join(f"{n} {flat[c.name].get(n)}" for n in varying)
        labels[c.name] = f"{c.checkpoint} ({told})" if told else c.checkpoint
    shown = Counter(labels.values())
    for c in group:
        if shown[labels[c.name]] > 1:
            labels[c.name] += f" weights {c.identity['checkpoint_hash'][:8]}"
    return labels


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value) if isinstance(value, dict) else {name: value}
    return flat


def _title(t: Row) -> str:
    return (
        f"{t['n']['windows']} windows of {t['n']['episodes']} episodes of {t['dataset']} ({t['split']}), "
        f"{t['context']} frames given, {t['horizon']} generated; windows {t['manifest_hash'][:12]}"
    )


def _cells(t: Row) -> tuple[list[str], list[list[str]]]:
    frames = [str(h) for h in t["frames"]]
    header = ["cell", f"PSNR@{frames[-1]}", *(f"gain@{h}" for h in frames), *(f"@{h} minus ref [95 %]" for h in frames)]
    rows = []
    for row in t["rows"]:
        differences = row["difference_db"]
        found = ["ref" if t["reference"] else "nan"] * len(frames)
        if differences:
            found = [report.interval(differences[h]) for h in frames]
        gains = [report.number(row["gain_db"][h]["value"], sign=True) for h in frames]
        rows.append([row["label"], report.number(row["psnr"][frames[-1]]), *gains, *found])
    return header, rows


def _footer(t: Row) -> list[str]:
    lines = ["dB by generated frame; gain over persistence; differences are paired by window"]
    if len(t["rows"]) > 1 and t["reference"]:
        last, name = str(t["frames"][-1]), t["reference"]["label"]
        how = "as asked" if t["reference"]["chosen"] else f"the highest PSNR at frame {last}"
        compared = [(r["label"], r["difference_db"][last]) for r in t["rows"] if r["difference_db"]]
        same = [label for label, difference in compared if not _told_apart(difference)]
        lines.append(f"ref: {name} ({how}); cannot be told from it at frame {last}: {', '.join(same) or 'none'}")
    lines.append(f"intervals: {t['interval']}")
    return lines + [f"note: {warning}" for warning in t["warnings"]]


def _told_apart(difference: Row) -> bool:
    """Whether the interval leaves out 0; without one nothing can be told, and a rollout that broke is no candidate."""
    if difference["value"] is None:
        return True
    return difference["lo"] is not None and (difference["lo"] > 0 or difference["hi"] < 0)


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {report.in_markdown(line)}" for line in lines]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(report.in_markdown(c) for c in cells) + " |"
