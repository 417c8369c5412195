"""Pictures of a page: the curve of PSNR as SVG, and films of windows as mp4 with a strip of stills for print."""

from __future__ import annotations

import base64
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ahriuwu_cli.data.panels import compose_grid
from ahriuwu_cli.data.resize import area_resize
from ahriuwu_cli.data.video_writing import write_mp4, write_strip
from ahriuwu_cli.evaluation.page_style import Html, tag

PANELS = ("truth", "rollout", "difference")
PANEL, STILL, COLUMNS = 160, 96, 8  # pixels of a film's panel and of a still at most; stills in a row
LINES = {"ceiling": "ceiling", "psnr": "world", "mean_frame": "mean frame", "floor": "floor"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 52, 124, 30, 50


PICTURE_STYLE = """
.films figure { margin: 1.6rem 0; } .films h3 { margin: 0 0 .5rem; } .films video { width: 100%; background: #181818; }
.strip { display: grid; grid-template-columns: auto 1fr; column-gap: .6rem; margin-bottom: .6rem; }
.strip img { width: 100%; } .strip span { font-size: .75rem; line-height: 1.2; color: var(--soft); }
.who { display: grid; grid-template-rows: repeat(3, 1fr); align-items: center; text-align: right; }
.when { grid-column: 2; display: grid; text-align: center; padding-top: .2rem; }
.chart { width: 100%; max-width: 44rem; margin-bottom: .7rem; } .chart text { font-size: 13px; fill: var(--soft); }
.chart .grid { stroke: var(--line); } .chart .band { fill: var(--model); opacity: .16; }
.chart path { fill: none; stroke: var(--soft); stroke-width: 1.6; } .chart .floor { stroke-dasharray: 7 4; }
.chart .ceiling { stroke-dasharray: 1.5 3.5; stroke-linecap: round; stroke-width: 2; }
.chart .mean_frame { stroke-dasharray: 9 3 2 3; opacity: .7; }
.chart .model { stroke: var(--model); stroke-width: 2.4; } .chart circle { fill: var(--model); }
.chart text.model { fill: var(--model); stroke: none; font-weight: 600; }
@media screen and (min-width: 52rem) {
  .films figure:has(video) { display: grid; column-gap: 2rem;
    grid-template: "title title" auto "video strip" auto "video note" 1fr / 1fr 1fr; }
  .films h3 { grid-area: title; } .films video { grid-area: video; } .strip { grid-area: strip; }
  .films figcaption { grid-area: note; padding-left: 4.6rem; }
}
@media (max-width: 40rem) { .films video { margin-bottom: .8rem; } .chart text { font-size: 18px; } }
@media print { .chart { max-width: 34rem; } .chart text { font-size: 13px; } }
"""


@dataclass(frozen=True)
class Film:
    """One window to look at: mp4 of truth | rollout | difference, and PNG stills of them in three rows."""

    title: str
    mp4: bytes
    strip: bytes
    frames: tuple[str, ...]  # what each column of the strip shows: "given", then numbers of generated frames
    note: str


@dataclass(frozen=True)
class Figure:
    """A picture for a section: PNG bytes or SVG text, and words for who cannot see it."""

    image: bytes | str
    alt: str


def films(
    truth: np.ndarray,
    rollout: np.ndarray,
    *,
    context: int,
    fps: float,
    titles: Sequence[str],
    captions: Sequence[list[str]] | None = None,
    finite: np.ndarray | None = None,
) -> list[Film]:
    """A film of every window, to be given to `write_page`.

    truth: uint8 (W, T, H, W, 3), whole windows; rollout: uint8 (W, T - context, H, W, 3), as `generate` returns it.
    titles: one a window; captions: for every window a line for each frame, such as the action; finite (W, T - context):
    where it is False, the frame is shown black, and the note counts it. Large frames are made smaller.
    """
    if rollout.shape[1] != truth.shape[1] - context or len(titles) != len(truth) or not 1 <= context < truth.shape[1]:
        raise ValueError(f"truth {truth.shape}, rollout {rollout.shape}, context {context}, {len(titles)} titles")
    captions = captions or [[] for _ in titles]
    made = []
    for i, title in enumerate(titles):
        broken = 0 if finite is None else int((~finite[i]).sum())
        future = rollout[i] if finite is None else rollout[i] * finite[i][:, None, None, None].astype(np.uint8)
        clip = np.concatenate([truth[i, :context], future])
        difference = np.abs(clip.astype(np.int16) - truth[i]).astype(np.uint8)
        rows = dict(zip(PANELS, (truth[i], clip, difference), strict=True))
        note = (
            f"{context} frames were given (orange border), then {len(future)} were generated (blue), {fps:g} a second."
        )
        if broken:
            note += f" {broken} generated frames are not finite: they are shown black."
        strip, shown = _strip(rows, context)
        made.append(Film(title, _mp4(rows, context, fps, captions[i]), strip, shown, note))
    return made


def _mp4(rows: dict[str, np.ndarray], context: int, fps: float, captions: list[str]) -> bytes:
    small = [(name, _shrink(clip, PANEL)) for name, clip in rows.items()]
    scale = max(1, PANEL // max(small[0][1].shape[1:3]))
    page = compose_grid(small, columns=3, scale=scale, context=context, captions=captions)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        write_mp4(path, page, fps)
        return path.read_bytes()


def _strip(rows: dict[str, np.ndarray], context: int) -> tuple[bytes, tuple[str, ...]]:
    """PNG of some frames: the last given one, then generated ones from the first to the last, evenly spread."""
    length = len(rows["truth"]) - context
    generated = sorted({round(x) for x in np.linspace(1, length, min(length, COLUMNS - 1))})
    at = [context - 1, *(context - 1 + g for g in generated)]
    stills = [_shrink(clip[at], STILL) for clip in rows.values()]
    white = np.full((len(at), 2, *stills[0].shape[2:]), 255, np.uint8)
    columns = np.concatenate([stills[0], white, stills[1], white, stills[2]], axis=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "strip.png"
        write_strip(path, columns)
        return path.read_bytes(), ("given", *map(str, generated))


def _shrink(clip: np.ndarray, side: int) -> np.ndarray:
    """(T, H, W, 3) with no side longer than `side`."""
    h, w = clip.shape[1:3]
    ratio = min(1.0, side / max(h, w))
    size = (max(1, round(h * ratio)), max(1, round(w * ratio)))
    return np.stack([area_resize(frame, *size) for frame in clip])


def chosen_windows(result: dict[str, Any]) -> dict[str, int]:
    """Which windows to film, so that nobody picks the fine ones: title -> index into the windows of the result.

    The best, median and worst by gain at the last frame; and the first that is not finite, if there is one.
    """
    gains = [row[f"gain_db_{result['last']}"] for row in result["windows"]]
    order = sorted((i for i, g in enumerate(gains) if g is not None), key=lambda i: -gains[i])
    chosen = {"Best": order[0], "Median": order[len(order) // 2], "Worst": order[-1]} if order else {}
    if None in gains:
        chosen["Not finite"] = gains.index(None)
    titles = {}
    for name, i in chosen.items():
        if i not in titles.values():
            row = result["windows"][i]
            gain = "" if gains[i] is None else f" gain, {gains[i]:+.1f} dB at frame {result['last']}".replace("-", "−")
            titles[f"{name}{gain} (episode {row['episode']} from {row['start']})"] = i
    return titles


def film_figures(films: Sequence[Film], room: int) -> list[Html]:
    """Films as elements of a page; videos that would take more than `room` bytes together are left out, in words."""
    parts, left_out = [], 0
    for film in films:
        strip, mp4 = _base64(film.strip), _base64(film.mp4)
        room -= len(strip)
        fits = len(mp4) <= room
        room, left_out = room - len(mp4) * fits, left_out + (not fits)
        alt = f"{film.title}: truth, rollout and difference"
        play = dict.fromkeys(("autoplay", "loop", "muted", "playsinline", "controls"), True)
        video = tag("video", src=f"data:video/mp4;base64,{mp4}", aria_label=alt, **play) if fits else None
        who = tag("div", [tag("span", row) for row in PANELS], class_="who", aria_hidden="true")
        columns = f"grid-template-columns: repeat({len(film.frames)}, 1fr)"
        when = tag("div", [tag("span", f) for f in film.frames], class_="when", aria_hidden="true", style=columns)
        words = f"{alt}, one in a row, at these frames: {', '.join(film.frames)}"
        still = tag("img", src=f"data:image/png;base64,{strip}", class_="mat", alt=words)
        strip_box = tag("div", who, still, when, class_="strip")
        parts.append(tag("figure", tag("h3", film.title), video, strip_box, tag("figcaption", film.note)))
    say = (
        "Rolled out again, a window at a time: of several noise seeds the first, and a pixel may differ by a level. "
        "Stills: the last given frame, then generated frames by number."
    )
    if left_out:
        say += f" To keep the page small, {left_out} of {len(films)} videos are left out: their stills alone are shown."
    return [tag("p", say), tag("div", parts, class_="films")]


def picture(figure: Figure) -> Html:
    """A figure as an element: an image of its own, so that nothing in it can run or reach the page."""
    kind, data = ("svg+xml", figure.image.encode()) if isinstance(figure.image, str) else ("png", figure.image)
    image = tag("img", src=f"data:image/{kind};base64,{_base64(data)}", alt=figure.alt, class_="mat")
    return tag("figure", image, tag("figcaption", figure.alt))


def _near(ends: list[float | None], drawn: list[float]) -> list[float | None]:
    """Ends of a band no further from what is drawn than its own height, or 10 dB: those of two episodes are far off."""
    if not drawn:
        return ends
    beyond = max(10.0, max(drawn) - min(drawn))
    return [None if v is None else min(max(v, min(drawn) - beyond), max(drawn) + beyond) for v in ends]


def curve_chart(curves: dict[str, Any]) -> Html:
    """PSNR by generated frame: the world with its band, floor, ceiling and mean frame. null leaves a gap in a line."""
    lines = {name: curves[name] for name in LINES if curves.get(name)}
    low, high = curves.get("psnr_lo") or [], curves.get("psnr_hi") or []
    drawn = [v for values in lines.values() for v in values if v is not None]
    low, high = (_near(each, drawn) for each in (low, high))
    known = [v for values in (drawn, low, high) for v in values if v is not None]
    if not known:
        return tag("p", "There is no curve: no value is finite.", class_="nan")
    count, ticks = len(lines["psnr"]), nice_ticks(min(known), max(known))
    x = lambda frame: LEFT + (WIDTH - LEFT - RIGHT) * ((frame - 1) / (count - 1) if count > 1 else 0.5)  # noqa: E731
    y = lambda v: TOP + (HEIGHT - TOP - BOTTOM) * (ticks[-1] - v) / (ticks[-1] - ticks[0])  # noqa: E731
    parts = [tag("text", "PSNR, dB", x=0, y=14)]
    for tick in ticks:
        parts.append(tag("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=_n(y(tick)), y2=_n(y(tick))))
        parts.append(tag("text", f"{tick:g}", x=LEFT - 10, y=_n(y(tick) + 4.5), text_anchor="end"))
    for frame in frame_ticks(count):
        parts.append(tag("text", frame, x=_n(x(frame)), y=HEIGHT - BOTTOM + 22, text_anchor="middle"))
    parts.append(tag("text", "generated frame", x=_n((LEFT + WIDTH - RIGHT) / 2), y=HEIGHT - 4, text_anchor="middle"))
    for a, b in _runs([lo is not None and hi is not None for lo, hi in zip(low, high, strict=True)]):
        edge = [(x(t + 1), y(high[t])) for t in range(a, b)] + [(x(t + 1), y(low[t])) for t in reversed(range(a, b))]
        parts.append(tag("polygon", class_="band", points=" ".join(f"{_n(u)},{_n(v)}" for u, v in edge)))
    for name, values in lines.items():
        for a, b in _runs([v is not None for v in values]):
            path = " L".join(f"{_n(x(t + 1))} {_n(y(values[t]))}" for t in range(a, b))
            parts.append(tag("path", class_="model" if name == "psnr" else name, d=f"M{path}"))
    for t, value in enumerate(lines["psnr"] if count <= 40 else []):
        if value is not None:
            parts.append(tag("circle", cx=_n(x(t + 1)), cy=_n(y(value)), r=3))
    finite = {name: [v for v in values if v is not None] for name, values in lines.items()}
    ends = {name: y(values[-1]) for name, values in finite.items() if values}
    for name, height in spread_out(ends, gap=19).items():
        side = {"x": _n(x(count) + 12), "y": _n(height + 4.5), "class_": "model" if name == "psnr" else None}
        parts.append(tag("text", LINES[name], **side))
    words = (
        f"PSNR in dB by generated frame 1 to {count}, of the world and its references; the numbers are in the tables"
    )
    return tag("svg", parts, class_="chart", viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=words)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values at equal distances, the first at most low and the last at least high, always two or more."""
    span = max(high - low, 1e-6 * max(abs(low), abs(high), 1.0))
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(m * power for m in (1, 2, 5, 10) if m * power * about >= span)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def frame_ticks(count: int, about: int = 9) -> list[int]:
    """Whole frames to write below an axis: 1, the last, and round ones between."""
    step = next(m * 10**p for p in range(9) for m in (1, 2, 5) if m * 10**p * about >= count)
    between = [f for f in range(step, count, step) if f - 1 >= step * 0.7 and count - f >= step * 0.7]
    return sorted({1, count, *between})


def spread_out(places: dict[str, float], gap: float) -> dict[str, float]:
    """The same places in order, moved apart until neighbours are `gap` away from each other, about their middle."""
    names = sorted(places, key=lambda name: places[name])
    groups: list[tuple[float, list[str]]] = []  # (centre, names from above to below)
    for name in names:
        centre, members = places[name], [name]
        while groups and centre - (len(members) - 1) * gap / 2 < groups[-1][0] + (len(groups[-1][1]) + 1) * gap / 2:
            _, before = groups.pop()
            members = before + members
            centre = sum(places[m] for m in members) / len(members)
        groups.append((centre, members))
    return {m: c + (i - (len(ms) - 1) / 2) * gap for c, ms in groups for i, m in enumerate(ms)}


def _runs(there: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, end) of every stretch that is True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(there, bool), [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _n(value: float) -> str:
    return f"{value:.1f}"
