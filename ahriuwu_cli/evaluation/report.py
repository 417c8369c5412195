"""Reports: results as aligned text for a terminal, as CSV, and as JSON, each written whole or not at all."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ahriuwu_cli.data.documents import MAX_RESULT, to_json
from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.disk import arriving, clear_files, sync, write_whole
from ahriuwu_cli.places import refuse_folders
from ahriuwu_cli.printing import one_line, printable
from ahriuwu_cli.stopping import unbroken

Row = dict[str, Any]


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Strict JSON, a temporary name first."""
    write_text(path, as_json(document))


def as_json(document: dict[str, Any]) -> str:
    """Strict JSON, no larger than what is read again."""
    return to_json(document, 1, MAX_RESULT) + "\n"


def write_text(path: Path, text: str) -> None:
    """A text file, a temporary name first."""
    write_whole(path, text)


Content = str | Callable[[Path], None]  # a text, or what writes the file at the name that it is given


def write_together(
    files: Mapping[Path, Content],
    then: Callable[[], None] = lambda: None,
    first: Callable[[], None] = lambda: None,
) -> None:
    """All these files or none of them, whatever stops the writing, but a kill between two renames. OSError, UserError.

    then: called once they have their names, before a signal can end the program again. first: called when all are
    written and no signal ends the program any more, before they have their names; where it raises, none gets one.
    """
    refuse_folders(files)
    folders = {path.parent for path in files}
    for folder in folders:
        clear_files(folder, "|".join(re.escape(path.name) for path in files))
    with ExitStack() as stack:
        hidden = {path: stack.enter_context(arriving(path)) for path in reversed(files)}  # errors name the first
        for path, content in files.items():
            if isinstance(content, str):
                hidden[path].write_bytes(content.encode())
            else:
                content(hidden[path])
            sync(hidden[path])
        with unbroken():
            first()
            for path in files:
                os.replace(hidden[path], path)
            then()
        for folder in folders:
            sync(folder)


def as_csv(rows: Sequence[Row]) -> str:
    """Rows of equal keys as CSV with a header; a mapping {value, lo, hi} becomes three columns; null is empty.

    A text that a spreadsheet would compute, which begins with = + - @ or a control character, gets a quote in front.
    """
    flat = [{harmless(name): harmless(value) for name, value in flatten(row).items()} for row in rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def harmless(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula, without control characters; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    return printable(f"'{value}" if value[:1] in tuple("=+-@\t\r\n") else value)


def in_markdown(text: Any) -> str:
    """Text for Markdown, in a table or behind a bullet: one line, no end of a cell, no HTML, no link, no picture."""
    text = printable(" ".join(str(text).split())).replace("\\", "\\\\").replace("|", "\\|")
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("`", "\\`")
    return re.sub(r"\](?=[(\[:])", r"\]", text)  # what follows would be an address; intervals stay as they are


def flatten(row: Row) -> Row:
    """Intervals as the columns name, name_lo, name_hi."""
    flat: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {name: value["value"], f"{name}_lo": value["lo"], f"{name}_hi": value["hi"]}
        else:
            flat[name] = value
    return flat


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right, the first one to the left."""
    cells = [[one_line(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number for a table; 'nan' for null, so that nobody overlooks it."""
    return "nan" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def interval(value: Row, sign: bool = True) -> str:
    """'+1.23 [+0.80, +1.60]'; the brackets are left out where there is no interval."""
    text = number(value["value"], sign=sign)
    if value["lo"] is None:
        return text
    return f"{text} [{number(value['lo'], sign=sign)}, {number(value['hi'], sign=sign)}]"


def evaluation_text(result: Row) -> str:
    """The table of `evaluate` by generated frame, the action deltas, and what to be careful about."""
    header = ["frame", "PSNR dB", "floor", "ceiling", "mean", "gain dB [95 %]", "SSIM", "floor"]
    header += ["motion", "cos", "sharp", "colour", "1-step dB"]
    rows = [
        [
            h,
            number(r["psnr"]["value"]),
            number(r["floor"]["value"]),
            number(r["ceiling"]["value"]),
            number(r["mean_frame_psnr"]),
            interval(r["gain_db"]),
            number(r["ssim"], 3),
            number(r["floor_ssim"], 3),
            number(r["motion_ratio"]),
            number(r["motion_cosine"]),
            number(r["sharpness_ratio"]),
            number(r["colour_shift"], 3),
            number(r["teacher_forced_psnr"]),
        ]
        for h, r in result["horizons"].items()
    ]
    n, how = result["n"], result["settings"]["generation"]
    kept = ", ".join(f"{number(r['ceiling_sharpness_ratio'])} at {h}" for h, r in result["horizons"].items())
    lines = [
        table(header, rows),
        f"sharp of the ceiling, which is all that its tokenizer keeps: {kept}",
        "",
        f"{n['windows']} windows of {n['episodes']} episodes ({result['settings']['split']}), "
        f"{n['noise_seeds']} noise seed(s); sampler {how['sampler']}, K = {how['steps']}, "
        f"context at {LABEL} {how['tau_ctx']:g}, {how['ctx_mode']}"
        + (", labelled clean: a lie" if how.get("ctx_label") == "clean" else ""),
    ]
    for control, by_frame in (result["action_delta_db"] or {}).items():
        shown = ", ".join(f"{interval(value)} at {h}" for h, value in by_frame.items())
        lines.append(f"action delta dB against {control} actions: {shown}")
    for control, by_frame in (result["action_delta_moving_db"] or {}).items():
        shown = ", ".join(f"{interval(value)} at {h}" for h, value in by_frame.items())
        lines.append(f"  on the quarter of windows that moves most, against {control}: {shown}")
    lines.append(result["action_delta_note"])
    slopes = {who: slope for who, slope in result["drift_db_per_frame"].items() if slope}
    if slopes:
        shown = ", ".join(f"{who} {interval(slope)}" for who, slope in slopes.items())
        lines.append(f"drift, dB a frame: {shown}")
    return "\n".join(lines + _cautions(result))


def evaluation_rows(result: Row) -> list[Row]:
    """One row a horizon, for eval.csv."""
    rows = []
    for h, values in result["horizons"].items():
        row = {"frame": int(h), **values}
        for control in result["action_delta_db"] or {}:
            empty = {"value": None, "lo": None, "hi": None}
            row[f"delta_{control}_db"] = result["action_delta_db"][control].get(h, empty)
        rows.append(row | {"tau_ctx " + LABEL: result["settings"]["generation"]["tau_ctx"]})
    return rows


def _cautions(result: Row) -> list[str]:
    lines = [f"note: {warning}" for warning in result["warnings"]]
    if result["status"] == "nan":
        counts = {**result["not_finite_frames"], **result.get("not_finite_looks", {})}
        lines.append(f"FAILED: frames that are not finite: {counts}; means they touch are nan")
    return lines
