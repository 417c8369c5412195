"""Reports of a sweep: a table for the terminal, long CSVs, and a page of Markdown that says how it was measured."""

from __future__ import annotations

from collections.abc import Sequence

from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.evaluation.protocol import FEW
from ahriuwu_cli.evaluation.report import Row, in_markdown, interval, number, table
from ahriuwu_cli.evaluation.sweep_grid import name, names
from ahriuwu_cli.printing import one_line

NONE = {"value": None, "lo": None, "hi": None}
HEADINGS = {"steps": "K", "sampler": "sampler", "ctx_mode": "ctx mode", "ctx_label": "ctx label"}
# What a column means, for Markdown.
MEANINGS = f"""\
- tau_ctx: noise of context frames, {LABEL}; in brackets the level that the context was told, where it differs
- K: model passes a frame; in brackets those really made, since a walk ends at tau_ctx
- gain@h: PSNR of generated frame h minus that of the repeated last context frame, dB
- minus least tau: difference in PSNR to the cell of the same K, sampler, mode and label with the least tau_ctx, dB
- motion, sharp: frame-to-frame change up to that frame, and gradient energy of it, each divided by the truth's
- cos: cosine of generated and true frame-to-frame change: 1 moves as the truth does, 0 unrelated or still
- delta: PSNR with true actions minus PSNR with another window's, dB
- drift: slope of the gain over generated frames, dB a frame
- [ ]: 95 % over episodes, by bootstrap or, below {FEW}, Student's t; leaves out training seeds, and is
  not widened for many cells"""


def sweep_rows(cell: Row) -> list[Row]:
    """Lines of sweep.csv about one cell: one a reported frame. What has no frame is repeated."""
    rows = []
    for h in cell["psnr"]:
        row = _settings(cell) | {"frame": int(h)}
        row |= {metric: cell[metric][h] for metric in ("psnr", "psnr_of_mse", "gain_db", "difference_db", "ssim")}
        row |= {metric: cell[metric][h] for metric in ("motion_ratio", "motion_cosine", "sharpness_ratio")}
        row |= {"action_delta_db": cell["action_delta_db"] or NONE}
        row |= {"drift_db_per_frame": cell["drift_db_per_frame"] or NONE}
        rows.append(row | {n: cell[n] for n in ("not_finite_frames", "frames_per_s")})
    return rows


def window_rows(windows: Sequence[Row]) -> list[Row]:
    """Lines of sweep-windows.csv: each cell, window and reported frame."""
    return [{f"tau_ctx {LABEL}": row["tau_ctx"]} | {n: v for n, v in row.items() if n != "tau_ctx"} for row in windows]


def sweep_text(result: Row) -> str:
    """The table by cell, the best with the set that cannot be told from it, what test says, and warnings."""
    told = [_sentence(result), *_verdict(result), *_cautions(result)]
    return "\n".join([table(*_table(result)), "", *map(one_line, told)])


def sweep_markdown(result: Row) -> str:
    """The same as a page of Markdown, with the meaning of every column and the settings."""
    header, rows = _table(result)
    lines = ["# Sweep of tau_ctx", "", in_markdown(_sentence(result)), ""]
    lines += [f"- {in_markdown(line)}" for line in _verdict(result)]
    if cautions := _cautions(result):
        lines += ["", "## Be careful", "", *(f"- {in_markdown(line.removeprefix('note: '))}" for line in cautions)]
    lines += ["", "## Cells", "", *_markdown(header, rows), ""]
    if result["test"]:
        lines += ["## On test", "", *_markdown(*_test_table(result)), ""]
    lines += ["## Columns", "", MEANINGS, "", "## Settings", ""]
    lines += [f"- {key}: {in_markdown(value)}" for key, value in _flat(result["settings"]).items()]
    return "\n".join(lines) + "\n"


def _table(result: Row) -> tuple[list[str], list[list[str]]]:
    at, shown = str(result["compared_at"]), [str(h) for h in result["reported"]]
    varying = [n for n in result["varying"] if n != "steps"]
    header = ["tau", "K", *(HEADINGS[n] for n in varying), *(f"gain@{h}" for h in shown)]
    header += [f"@{at} minus least tau [95 %]", "motion", "cos", "sharp", "delta", "drift"]
    header += ["not finite", "frames/s"]
    best, rows = result["best"], []
    for cell in result["cells"]:
        top = best and all(cell[n] == best[n] for n in ("tau_ctx", *HEADINGS))
        delta, drift = cell["action_delta_db"], cell["drift_db_per_frame"]
        rows.append(
            [
                f"{cell['tau_ctx']:g}{_really(cell['tau_ctx'], cell['label'])}{' *' if top else ''}",
                f"{cell['steps']}{_really(cell['steps'], cell['passes'])}",
                *(cell[n] for n in varying),
                *(number(cell["gain_db"][h]["value"], sign=True) for h in shown),
                interval(cell["difference_db"][at]),
                number(cell["motion_ratio"][at]),
                number(cell["motion_cosine"][at]),
                number(cell["sharpness_ratio"][at]),
                "-" if delta is None else number(delta["value"], sign=True),
                "-" if drift is None else number(drift["value"], 3, sign=True),
                str(cell["not_finite_frames"]),
                number(cell["frames_per_s"], 0),
            ]
        )
    return header, rows


def _really(asked: float, done: float) -> str:
    return "" if asked == done else f" ({done:g})"


def _sentence(result: Row) -> str:
    n, common = result["n"], result["common"]
    how = ", ".join(f"{HEADINGS[key]} {value}" for key, value in common.items() if key != "steps")
    return (
        f"gain over persistence in dB by generated frame; {LABEL}; in brackets what the context was really told and "
        f"the passes really made. {n['windows']} windows of {n['episodes']} episodes ({result['settings']['split']}), "
        f"same noise in all cells{'; ' + how if how else ''}"
    )


def _verdict(result: Row) -> list[str]:
    """The best, the set that cannot be told from it, what test says, and what became of the default."""
    best, varying, lines = result["best"], result["varying"], []
    if best:
        same = names(best["not_told_apart"], varying) or "none"
        lines.append(f"best at frame {best['at']} (*): tau {name(best, varying)}; cannot be told from it: {same}")
    if result["test"]:
        lines += _test_lines(result)
    if decision := result["write_back"]:
        done = "default left as it is"
        if decision["changed"]:
            done = "written back" if decision.get("written") else "not written back"
        lines.append(f"{done}: tau_ctx {decision['tau_ctx']:g}, since {decision['why']}")
    return lines


def _test_lines(result: Row) -> list[str]:
    test, at = result["test"], str(result["compared_at"])
    n = test["n"]
    lines = [f"on test, {n['windows']} fresh windows of {n['episodes']} episodes, at frame {at}:"]
    for role, cell in test["cells"].items():
        if role == "best" or cell != test["cells"].get("best"):
            called = {"own": "the checkpoint's own settings", "chosen": "what was chosen"}.get(role, f"the {role}")
            shown = f"tau {name(cell, result['varying'])}"
            lines.append(f"  {called}, {shown}, gains {interval(cell['gain_db'][at])} dB")
    for key, words in (
        ("best_minus_reference_db", "the best minus the reference"),
        ("best_minus_own_db", "the best minus the checkpoint's own settings"),
        ("chosen_minus_own_db", "what was chosen minus the checkpoint's own settings"),
    ):
        if key in test and test["cells"][key.split("_")[0]] != test["cells"][key.split("_")[2]]:
            lines.append(f"  {words}: {interval(test[key][at])} dB")
    return lines


def _test_table(result: Row) -> tuple[list[str], list[list[str]]]:
    shown = [str(h) for h in result["reported"]]
    header = ["cell", "tau (K, ...)", *(f"gain@{h} dB [95 %]" for h in shown), "motion", "sharp", "not finite"]
    at = str(result["compared_at"])
    rows = [
        [
            role,
            name(cell, result["varying"]),
            *(interval(cell["gain_db"][h]) for h in shown),
            number(cell["motion_ratio"][at]),
            number(cell["sharpness_ratio"][at]),
            str(cell["not_finite_frames"]),
        ]
        for role, cell in result["test"]["cells"].items()
    ]
    for key in ("best_minus_reference_db", "best_minus_own_db", "chosen_minus_own_db"):
        if key in result["test"]:
            differences = [interval(result["test"][key][h]) for h in shown]
            rows.append([key.removesuffix("_db").replace("_", " "), "", *differences, "", "", ""])
    return header, rows


def _settings(cell: Row) -> Row:
    row = {f"tau_ctx {LABEL}": cell["tau_ctx"], f"tau_end {LABEL}": cell["tau_end"], f"label {LABEL}": cell["label"]}
    return row | {n: cell[n] for n in ("steps", "passes", "sampler", "ctx_mode", "ctx_label")}


def _cautions(result: Row) -> list[str]:
    lines = [f"note: {warning}" for warning in result["warnings"]]
    if result["status"] == "nan":
        lines.append(f"FAILED: frames that are not finite: {result['not_finite_frames']}; means they touch are nan")
    return lines


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; a bar inside a cell would end it."""
    lines = [list(header), ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(in_markdown(c) for c in line)} |" for line in lines]


def _flat(values: Row, before: str = "") -> Row:
    """Nested settings as dotted names; the grid is in the table."""
    found: Row = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{before}{key}.")
        elif key != "grid":
            found[before + key] = value
    return found
