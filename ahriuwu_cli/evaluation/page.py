"""The result of an evaluation as one HTML page that needs nothing else: no network, no script, no other file.

Known parts of the result have sections of their own; what is not known is shown as JSON, so nothing is left out.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from ahriuwu_cli.diffusion.tau import LABEL
from ahriuwu_cli.evaluation.page_charts import PICTURE_STYLE, Figure, Film, curve_chart, film_figures, picture
from ahriuwu_cli.evaluation.page_style import (
    Html,
    as_json,
    block,
    cell,
    digits_for,
    document,
    is_scalar,
    is_signed,
    number,
    plain,
    table,
    tag,
)
from ahriuwu_cli.evaluation.report import write_text
from ahriuwu_cli.evaluation.summary import jsonable

MAX_BYTES = 3_000_000  # of the whole page: films that would not fit are left out, and the page says so

WHO = {"": "world", "floor_": "floor", "ceiling_": "ceiling", "mean_frame_": "mean frame"}
MEASURES = {  # a metric's key -> its name, and what one must know to read it
    "psnr_of_mse": ("PSNR of the mean error, dB", "The squared error is averaged over windows first, so a few easy "
                    "windows cannot raise it."),
    "ssim": ("SSIM", "Structural similarity: 1 is identical."),
    "motion_ratio": ("Motion ratio", "How much moves from frame to frame, against the truth, over all frames so far: "
                     "0 is a frozen video, 1 as much as the truth, above 1 flickers."),
    "motion_cosine": ("Motion cosine", "Whether the same places change in the same way: 1 moves as the truth does, "
                      "0 is unrelated or still, below 0 the wrong way."),
    "sharpness_ratio": ("Sharpness ratio", "Gradient energy against the truth: below 1 is blur, above 1 is noise."),
    "colour_shift": ("Colour shift", "Distance of a frame's mean colour from the true one, on a scale of 0 to 1."),
    "colour_drift": ("Colour drift", "How far the mean colour has moved away from the true one, on a scale of 0 to 1."),
}  # fmt: skip
PSNR_COLUMNS = {"psnr": "world", "floor": "floor", "ceiling": "ceiling", "mean_frame_psnr": "mean frame",
                "gain_db": "gain", "teacher_forced_psnr": "one step", "teacher_forced_floor": "its floor"}  # fmt: skip
BLOCKS = {  # an optional part of the result -> its title, and what it is
    "step_sizes": ("Step sizes", "K is the number of model passes a frame; each is told the size d of its step. Alike "
                   "scores at every K do not show that d is heard: see the consistency of steps."),
    "consistency": ("Consistency of steps", "How far one step of d ends from the smaller steps it stands for: from two "
                    "of d/2 (halves), and from all the smallest (fine); 0 is best. Blind: a copy of the world that is "
                    "told the smallest d always; gain is what the world does better. Heard: how much d changes."),
    "spread": ("Spread of samples", "Rollouts of the same window with other noise. Spread ratio: 1 when samples differ "
               "from each other as much as the truth differs from them; near 0 all noise gives the same answer. Energy "
               "score: an error that also punishes too narrow and too wide forecasts; lower is better."),
    "distances": ("Distances between sets of clips", "How far generated clips, taken together, lie from other real "
                  "clips; lower is nearer. The real floor is what real clips of the same number score, the ceiling "
                  "what the tokenizer allows. Compare only numbers of equally many clips."),
    "levels": ("Error by noise level", f"How well the world predicts the clean latents from noisy ones; {LABEL}. Where "
               "training has shown few noisy frames, the error is high."),
    "components": ("Error by component", "Latent channels in groups, from the strongest of the picture to the finest. "
                   "Error over variance: 0 is right, 1 what leaving it out gets, 2 another draw of the same kind. "
                   "Energy: 1 is as much detail as there is; beside an error above 1 it is made up."),
    "features": ("Seen by EfficientNet-Lite0", "Distances where a small ImageNet network looks; lower is nearer. "
                 "Numbers on another network do not compare."),
    "lpips": ("LPIPS", "Perceptual distance of frames (Zhang 2018) on the weights whose hash stands here; lower is "
              "nearer."),
    "fvd": ("FVD", "Frechet distance between clips on I3D (Unterthiner 2018), with the weights whose hash stands here. "
            "Compare it with the real floor, and only with numbers of equally many clips."),
}  # fmt: skip
SETTINGS = {  # what a setting means, where its name does not say it
    "tau": "how noise levels are written on this page",
    "generation.steps": "K, model passes a frame",
    "generation.sampler": "how a frame is made from noise",
    "generation.tau_ctx": "noise left in the frames that the world looks back at; " + LABEL,
    "generation.ctx_mode": "stop: the unfinished frame becomes context; renoise: the finished one with fresh noise",
    "evaluation.context": "frames that are given and never scored",
    "evaluation.horizon": "frames that are generated",
    "k_max": "finest grid of steps that the world was trained on",
    "psnr_cap_db": "PSNR that identical frames get",
    "manifest_hash": "the same hash means the same windows of the same data",
    "random_action_hold": "frames that a random action lasts, fewest and most",
}
HANDLED = {"kind", "status", "not_finite_frames", "not_finite_looks", "settings", "n", "last", "horizons",
           "action_delta_db", "timing", "action_delta_moving_db", "action_delta_note", "drift_db_per_frame", "curves",
           "windows", "warnings", "files"} | set(BLOCKS)  # fmt: skip


def write_page(
    path: Path,
    result: Mapping[str, Any],
    *,
    name: str | None = None,
    command: Sequence[str] | str | None = None,
    films: Sequence[Film] = (),
    figures: Mapping[str, Figure] | None = None,
) -> None:
    """Write the page of what `evaluate` returned, whole or not at all.

    name: the world's; by default the end of the checkpoint's path. command: what repeats this, as one line or as words
    to be quoted. films: of `page_charts.films`. figures: by section, that is by the result's key (`levels`, `horizons`,
    `step_sizes`, ...); one of another name gets a section of its own.
    """
    write_text(path, page(result, name=name, command=command, films=films, figures=figures))


def page(
    result: Mapping[str, Any],
    *,
    name: str | None = None,
    command: Sequence[str] | str | None = None,
    films: Sequence[Film] = (),
    figures: Mapping[str, Figure] | None = None,
) -> str:
    """The page as text; arguments as in `write_page`."""
    result, figures = jsonable(dict(result)), dict(figures or {})
    name = name or _world_name(result)
    take = lambda key: [picture(figures.pop(key))] if key in figures else []  # noqa: E731
    sections = [
        ("curve", "PSNR by generated frame", [*_curve(result), *take("curves")]),
        ("films", "Films", films),
        ("table", "Numbers by generated frame", [*_psnr_table(result), *_measures(result), *take("horizons")]),
        ("actions", "Action following", [*_actions(result), *take("action_delta_db")]),
    ]
    for key, (title, say) in BLOCKS.items():
        if result.get(key) is not None or key in figures:
            sections.append((key, title, [tag("p", say), *block(result.get(key)), *take(key)]))
    if figures:
        sections.append(("figures", "Figures", [picture(figure) for figure in figures.values()]))
    sections.append(("settings", "Settings and how to repeat it", _settings(result, command)))
    rest = {key: value for key, value in result.items() if key not in HANDLED}
    if result.get("windows") or rest:
        sections.append(("more", "More", [*_windows(result), *(as_json(plain(k), v) for k, v in rest.items())]))
    sections = [s for s in sections if s[2]]

    head = [*_title(result, name), *_cautions(result), *_headline(result)]
    links = tag("nav", [tag("a", title, href=f"#{key}") for key, title, _ in sections], aria_label="Contents")
    size = sum(len(part) for *_, parts in sections for part in parts if isinstance(part, str))
    body = [tag("header", head, links)]
    for key, title, parts in sections:
        if key == "films":
            parts = film_figures(films, MAX_BYTES - size - 60_000)
        body.append(tag("section", tag("h2", title, id=f"{key}-title"), parts, id=key, aria_labelledby=f"{key}-title"))
    return document(f"{name}: evaluation", PICTURE_STYLE, tag("main", body))


def _world_name(result: Mapping[str, Any]) -> str:
    parts = PurePath((result.get("settings") or {}).get("checkpoint") or "").parts[-2:]
    return " / ".join(part for part in parts if part != "/") or "A world without a name"


def _title(result: Mapping[str, Any], name: str) -> list[Html]:
    n, settings = result.get("n") or {}, result.get("settings") or {}
    said = f"{_count(n.get('windows'), 'window')} of {_count(n.get('episodes'), 'episode')}"
    where = f" of the {settings.get('split')} split of {settings['dataset']}" if settings.get("dataset") else ""
    eyebrow, below = tag("p", "Evaluation of a world", class_="eyebrow"), tag("p", said + where, class_="soft")
    return [eyebrow, tag("h1", name), below]


def _cautions(result: Mapping[str, Any]) -> list[Html]:
    boxes = []
    if result.get("status", "ok") != "ok":
        found = {**(result.get("not_finite_frames") or {}), **result.get("not_finite_looks", {})}
        counts = [f"{plain(who)} {count}" for who, count in found.items() if count]
        said = f"Frames with values that are not finite, by what was generated: {', '.join(counts) or 'not counted'}. "
        said += "Nothing was dropped: every mean that they touch is shown as "
        boxes.append(tag("div", tag("h2", "This run failed"), tag("p", said, number(None), "."), class_="note bad"))
    if result.get("warnings"):
        items = [tag("li", text) for text in result["warnings"]]
        boxes.append(tag("div", tag("h2", "To be careful about"), tag("ul", items), class_="note"))
    return boxes


def _headline(result: Mapping[str, Any]) -> list[Html]:
    cards, last = [], str(result.get("last"))
    for h, row in (result.get("horizons") or {}).items():
        gain = row.get("gain_db") or {"value": None, "lo": None, "hi": None}
        ends = "no interval"
        if gain["lo"] is not None:
            ends = [number(gain["lo"], sign=True), " to ", number(gain["hi"], sign=True)]
        value = tag("dd", number(gain["value"], sign=True), tag("small", " dB"), class_="big")
        title = tag("dt", f"Frame {h}{', the last' if h == last else ''}")
        cards.append(tag("div", title, value, tag("dd", ends), tag("dd", _verdict(gain), class_="soft")))
    n, how = result.get("n") or {}, (result.get("settings") or {}).get("interval")
    said = (
        f"{_count(n.get('windows'), 'window')} of {_count(n.get('episodes'), 'episode')}, "
        f"{_count(n.get('noise_seeds'), 'noise seed')}. Intervals: {how or 'not described'}."
    )
    gain_is = (
        "Gain is the PSNR of the world minus that of persistence, which repeats the last given frame, on the same "
        "windows. At 0 dB the world predicts no better than a still picture."
    )
    title, below = tag("h2", "Gain over persistence"), tag("p", said, class_="soft")
    return [tag("section", title, tag("dl", cards, class_="gains"), tag("p", gain_is), below)]


def _verdict(gain: Mapping[str, Any]) -> str:
    if gain["value"] is None or gain["lo"] is None:
        return "nothing can be concluded"
    return "better than persistence" if gain["lo"] > 0 else "worse than persistence" if gain["hi"] < 0 else (
        "not told apart from persistence")  # fmt: skip


def _curve(result: Mapping[str, Any]) -> list[Html]:
    if not result.get("curves"):
        return []
    caption = (
        "PSNR measures closeness to the true frame in dB; higher is closer. Band: 95 % interval of the world. "
        "Ceiling: the true frame through the tokenizer and back, the best that this tokenizer allows. Floor: "
        "the last given frame, repeated. Mean frame: the average picture of the training data."
    )
    parts = [tag("figure", curve_chart(result["curves"]), tag("figcaption", caption))]
    slopes = {who: slope for who, slope in (result.get("drift_db_per_frame") or {}).items() if slope}
    if slopes:
        rows = [["world" if who == "model" else plain(who), cell(slope, 3, sign=True)] for who, slope in slopes.items()]
        say = "Drift is the slope of these lines: dB lost or won with every further frame."
        parts += [tag("h3", "Drift"), tag("p", say), table("dB a frame [95 %]", ["", "drift"], {"": rows})]
    return parts


def _psnr_table(result: Mapping[str, Any]) -> list[Html]:
    show = lambda row, c: cell(row[c], sign=is_signed(c)) if c in row else ""  # noqa: E731
    rows = [[h, *(show(row, c) for c in PSNR_COLUMNS)] for h, row in (result.get("horizons") or {}).items()]
    say = (
        "Each row is one generated frame. Below a number: its 95 % interval. One step: the world predicts this frame "
        "alone, with as many true frames right before it as the world was given; in the column “world” its own frames "
        "lie in between."
    )
    return [tag("p", say), table("PSNR, dB", ["frame", *PSNR_COLUMNS.values()], {"": rows})] if rows else []


def _measures(result: Mapping[str, Any]) -> list[Html]:
    """All other entries of the rows: for every metric its frames, the world beside its references."""
    horizons = result.get("horizons") or {}
    found: dict[str, dict[str, str]] = {}  # metric -> prefix -> key in the row
    for key in dict.fromkeys(k for row in horizons.values() for k in row if k not in PSNR_COLUMNS):
        prefix = next((p for p in WHO if p and key.startswith(p)), "")
        found.setdefault(key.removeprefix(prefix), {})[prefix] = key
    groups = {}
    for metric, keys in found.items():
        title, say = MEASURES.get(metric, (plain(metric), None))
        values = [row.get(key) for row in horizons.values() for key in keys.values()]
        if not all(map(is_scalar, values)):
            continue  # shown as JSON below
        digits = {"ssim": 3, "motion_ratio": 2, "motion_cosine": 2}.get(metric) or digits_for(values, metric)
        show = lambda v, m=metric, d=digits: cell(v, d, is_signed(m))  # noqa: E731
        heading = Html(tag("span", title) + (tag("small", say) if say else ""))
        groups[heading] = [
            [h, *(show(row[keys[p]]) if p in keys and keys[p] in row else "" for p in WHO)]
            for h, row in horizons.items()
        ]  # fmt: skip
    nested = {h: {k: v for k, v in row.items() if not is_scalar(v)} for h, row in horizons.items()}
    parts = [table("Other measures, by generated frame", ["frame", *WHO.values()], groups)] if groups else []
    return parts + ([as_json("More by generated frame", nested)] if any(nested.values()) else [])


def _actions(result: Mapping[str, Any]) -> list[Html]:
    deltas, moving = result.get("action_delta_db") or {}, result.get("action_delta_moving_db") or {}
    note = result.get("action_delta_note")
    said = [tag("p", f"{note[:1].upper()}{note[1:]}.", class_="soft")] if note else []
    if not deltas:
        return said
    rows = []
    for control, by_frame in deltas.items():
        for h, value in by_frame.items():
            quarter = (moving.get(control) or {}).get(h)
            second = cell(quarter, sign=True) if quarter else ""
            rows.append([f"{plain(control)}, frame {h}", cell(value, sign=True), second])
    say = (
        "Delta PSNR is the PSNR with the true actions minus the PSNR with other ones, with the same noise (after ",
        tag("a", "Genie", href="https://arxiv.org/abs/2402.15391"),
        "). At 0 dB the world does not listen to its actions; an interval that holds 0 does not show that it does. "
        "Where little moves, actions matter little, so the quarter of windows that moves most stands beside.",
    )
    header = ["against actions", "all windows", "moving most"]
    return [tag("p", say), table("Delta PSNR, dB [95 %]", header, {"": rows}), *said]


def _settings(result: Mapping[str, Any], command: Sequence[str] | str | None) -> list[Html]:
    parts = []
    if command:
        line = command if isinstance(command, str) else shlex.join(map(str, command))
        parts += [tag("h3", "Command"), tag("pre", tag("code", line))]
    rows = []
    for group in ("settings", "timing", "files"):
        for key, value in _flat(result.get(group) or {}):
            shown = f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)
            rows.append([key, tag("code", shown), SETTINGS.get(key, "")])
    header = ["setting", "value", "what it is"]
    return parts + ([table("Everything that the numbers depend on", header, {"": rows})] if rows else [])


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested names joined by dots."""
    rows = []
    for key, value in values.items():
        rows += _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else [(before + key, value)]
    return rows


def _windows(result: Mapping[str, Any]) -> list[Html]:
    rows = result.get("windows") or []
    keys = [k for k in (rows[0] if rows else {}) if k.startswith("gain_db_")]
    header = ["episode", "start", *(f"gain at {k.removeprefix('gain_db_')}, dB" for k in keys)]
    lines = [[r.get("episode"), cell(r.get("start")), *(cell(r.get(k), sign=True) for k in keys)] for r in rows]
    inner = table("Gain of every window", header, {"": lines})
    return [tag("details", tag("summary", f"Gain of each of {len(rows)} windows"), inner)] if rows else []


def _count(number: Any, thing: str) -> str:
    return f"{'an unknown number of' if number is None else number} {thing}{'' if number == 1 else 's'}"
