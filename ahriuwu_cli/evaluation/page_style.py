"""What a page is made of: tags whose text is always escaped, tables of numbers, and the style sheet.

Text becomes HTML in `tag` alone, so a name with < in it can only come out as text.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ahriuwu_cli.printing import printable

VOID = ("meta", "img", "br")  # tags without content
POLICY = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"  # no script, no network
SIGNED = ("gain", "delta", "drift", "excess", "slope", "difference", "cosine")


class Html(str):
    """Text that is HTML already; every other string is escaped when it is put into a tag."""

    __slots__ = ()


def document(title: str, style: str, *body: Any) -> str:
    """A whole page, its style sheet and `style`. In ASCII, with references, so that no encoding can damage it."""
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("title", title),
        tag("style", Html(STYLE + style)),
    ]
    whole = tag("html", tag("head", head), tag("body", *body), lang="en")
    return f"<!doctype html>\n{whole}\n".encode("ascii", "xmlcharrefreplace").decode("ascii")


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """One element. children: text, Html, numbers, lists of them, or None for nothing. class_ becomes class, a_b a-b."""
    shown = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{_text(value)}"')
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>" if name in VOID else f"<{name}{shown}>{_inside(children)}</{name}>")


def _inside(child: Any) -> str:
    if child is None or isinstance(child, Html):
        return child or ""
    if isinstance(child, list | tuple):
        return "".join(map(_inside, child))
    return _text(child)


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def is_interval(value: Any) -> bool:
    """A mean with its ends, as JSON holds it."""
    return isinstance(value, Mapping) and set(value) == {"value", "lo", "hi"}


def is_scalar(value: Any) -> bool:
    """What fits into one cell."""
    return value is None or isinstance(value, str | bool | int | float) or is_interval(value)


def number(value: float | None, digits: int = 2, sign: bool = False) -> Html:
    """With a true minus; null stands out as nan."""
    if value is None:
        return tag("span", "nan", class_="nan")
    sign = sign and value != 0
    text = str(value) if isinstance(value, int) else f"{value:{'+' if sign else ''}.{digits}f}"
    if isinstance(value, float) and value and abs(value) < 0.5 * 10**-digits:
        text = f"{value:{'+' if sign else ''}.1e}"
    return Html(html.escape(text.replace("-", "−")))


def interval(value: Mapping[str, Any], digits: int = 2, sign: bool = False) -> Html:
    """The mean, with the interval's ends in small print below; without an interval the mean alone."""
    mean = number(value["value"], digits, sign)
    if value["lo"] is None or value["hi"] is None:
        return mean
    ends = Html(f"{number(value['lo'], digits, sign)} to {number(value['hi'], digits, sign)}")
    return Html(mean + tag("span", ends, class_="ends"))


def cell(value: Any, digits: int = 2, sign: bool = False) -> Any:
    """What stands in a table for a JSON value."""
    if is_interval(value):
        return interval(value, digits, sign)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value, digits, sign) if value is None or isinstance(value, int | float) else value


def digits_for(values: Sequence[Any], name: str = "") -> int:
    """Decimals for a whole column: 2 for dB, else so many that its smallest number shows two figures, at most 4."""
    means = [v["value"] if is_interval(v) else v for v in values]
    sizes = [abs(v) for v in means if isinstance(v, float) and v]
    if not sizes or "db" in name or "psnr" in name:
        return 2
    least = 1 if max(sizes) >= 100 else 2 if max(sizes) >= 1 else 3
    return max(least, min(4, 1 - math.floor(math.log10(min(sizes)))))


def is_signed(name: str) -> bool:
    """Whether a quantity of this name can be of either sign, and shows it."""
    return any(word in name for word in SIGNED)


def table(
    label: str, header: Sequence[Any], groups: Mapping[Any, Sequence[Sequence[Any]]], caption: str | None = None
) -> Html:
    """A table in a box that scrolls by itself. groups: heading ("" for none) -> rows; a row's first cell is its header.

    Columns of text stand left, columns of numbers right. The caption is the label, unless there is another one.
    """
    rows = [row for group in groups.values() for row in group]
    words = [bool(rows) and all(_is_text(row[i]) for row in rows) for i in range(len(header))]
    style = ["text" if i == 0 or words[i] else None for i in range(len(header))]
    head = [tag("th", h, scope="col", class_=c) for h, c in zip(header, style, strict=True)]
    bodies = []
    for heading, group in groups.items():
        lines = (
            [tag("tr", tag("th", heading, scope="rowgroup", colspan=len(header)), class_="group")] if heading else []
        )
        for row in group:
            cells = [tag("td", c, class_=s) for c, s in zip(row[1:], style[1:], strict=True)]
            lines.append(tag("tr", tag("th", row[0], scope="row", class_="text"), cells))
        bodies.append(tag("tbody", lines, class_="keep" if len(group) <= 12 else None))
    above = tag("caption", label if caption is None else caption) if caption != "" else None
    inner = tag("table", above, tag("thead", tag("tr", head)), bodies)
    box = "scroll keep" if len(rows) <= 12 else "scroll"
    return tag("div", inner, class_=box, role="region", tabindex=0, aria_label=label)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and (not isinstance(value, Html) or value.startswith("<code"))


def block(value: Any) -> list[Html]:
    """Any part of a result: tables of rows, facts, and JSON for what is nested deeper."""
    if isinstance(value, list):
        return _rows(value) or [as_json("rows", value)]
    if not isinstance(value, Mapping):
        return [] if value is None else [tag("p", cell(value))]
    notes, facts, below = [], [], []
    families: dict[tuple, dict[str, Mapping]] = {}  # rows that have the same columns
    for key, inner in value.items():
        if "note" in str(key) and isinstance(inner, str):
            notes.append(tag("p", _sentence(inner)))
        elif isinstance(inner, Mapping) and {"ok", "reason"} <= set(inner):
            said = {"True": "passed", "False": "failed", "None": "open"}.get(str(inner["ok"]), inner["ok"])
            notes.append(
                tag("p", tag("strong", f"{plain(key).capitalize()}: {said}"), ". ", _sentence(inner["reason"]))
            )
            facts += [(plain(k), cell(v, 2)) for k, v in inner.items() if k not in ("ok", "reason") and is_scalar(v)]
        elif is_scalar(inner):
            facts.append((plain(key), cell(inner, digits_for([inner], str(key)), is_signed(str(key)))))
        elif isinstance(inner, list) and len(inner) <= 12 and all(map(is_scalar, inner)):
            facts.append((plain(key), [[", " * bool(i), cell(v, 3)] for i, v in enumerate(inner)] or "none"))
        elif isinstance(inner, Mapping) and inner and all(map(is_scalar, inner.values())):
            families.setdefault(tuple(inner), {})[key] = inner
        elif tables := _rows(inner):
            title = {"horizons": "by generated frame", "rows": ""}.get(key, plain(key))
            below += [tag("h3", f"{title[:1].upper()}{title[1:]}"), *tables] if title else tables
        else:
            below.append(as_json(plain(key), inner))
    for rows in families.values():
        if len(rows) > 1:
            below[:0] = _rows(rows)
        for key, row in rows.items() if len(rows) == 1 else ():
            pairs = [[tag("span", plain(k), class_="soft"), " ", cell(v, digits_for([v], k))] for k, v in row.items()]
            facts.append((plain(key), tag("span", [[" · " * bool(i), pair] for i, pair in enumerate(pairs)])))
    listed = [tag("dl", [[tag("dt", k), tag("dd", v)] for k, v in facts], class_="facts")] if facts else []
    return [*notes, *below, *listed]


def _rows(rows: Any) -> list[Html]:
    """Tables of rows, a list or by name: of their scalars, and a group for each entry that is itself by frame.

    Rows of a list are named by their first entries, as many as tell them apart. Nothing for what are not rows.
    """
    named = dict(enumerate(rows)) if isinstance(rows, list) else rows
    if not isinstance(named, Mapping) or not named or not all(map(_is_row, named.values())):
        return []
    keys = list(dict.fromkeys(key for row in named.values() for key in row))
    nested = [k for k in keys if any(isinstance(r.get(k), Mapping) and not is_interval(r[k]) for r in named.values())]
    names, lead = [plain(name) for name in named], []
    if isinstance(rows, list):
        for key in [k for k in keys if all(isinstance(row.get(k), str | int | float) for row in rows)]:
            lead.append(key)
            names = [
                ", ".join(f"{row[k]:g}" if isinstance(row[k], float) else str(row[k]) for k in lead) for row in rows
            ]
            if len(set(names)) == len(names):
                break
    columns, tables = [k for k in keys if k not in nested and k not in lead], []
    subs = list(dict.fromkeys(sub for k in nested for row in named.values() for sub in row.get(k) or {}))
    flat = {"": _cells(list(named.values()), names, columns)} if columns else {}
    deep = {plain(k): _cells([row.get(k) or {} for row in named.values()], names, subs, k) for k in nested}
    for groups, over in ((flat, columns), (deep, subs)):
        header = [", ".join(map(plain, lead)), *(f"frame {c}" if str(c).isdigit() else plain(c) for c in over)]
        small = "Small: 95 % interval" if 'class="ends"' in str(groups) else ""
        if groups:
            tables.append(table(", ".join(map(plain, keys)), header, groups, small))
    return tables


def _cells(rows: Sequence[Mapping], names: Sequence[str], columns: Sequence[str], of: str = "") -> list[list[Any]]:
    """Lines of a table; `of`: the quantity that all columns are, if it is one."""
    every = digits_for([row.get(c) for row in rows for c in columns], of)
    digits = {c: every if of else digits_for([row.get(c) for row in rows], str(c)) for c in columns}
    show = lambda row, c: cell(row[c], digits[c], is_signed(of or str(c))) if c in row else ""  # noqa: E731
    return [[name, *(show(row, c) for c in columns)] for name, row in zip(names, rows, strict=True)]


def as_json(title: str, value: Any) -> Html:
    """A value as it is, folded away."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
    return tag("details", tag("summary", title), tag("pre", tag("code", text)))


def plain(key: Any) -> str:
    """A name of the result in words: latent_frechet -> latent frechet."""
    return str(key).replace("_", " ").replace(" db", " dB")


def _sentence(text: Any) -> str:
    return f"{str(text)[:1].upper()}{str(text)[1:]}."


def _is_row(value: Any) -> bool:
    flat = lambda v: is_scalar(v) or (isinstance(v, Mapping) and all(map(is_scalar, v.values())))  # noqa: E731
    return isinstance(value, Mapping) and bool(value) and not is_interval(value) and all(map(flat, value.values()))


LIGHT = """color-scheme: light; --ink: #1c2127; --soft: #5a646f; --line: #dde1e6; --paper: #fff; --panel: #f6f7f9;
  --model: #1c66a8; --warn: #7a4a00; --warn-panel: #fff6e2; --bad: #a1161b; --bad-panel: #fdeded;"""
DARK = """color-scheme: dark; --ink: #e4e8ec; --soft: #a0abb6; --line: #363d45; --paper: #14171a; --panel: #1c2025;
  --model: #74b6ef; --warn: #f0c46c; --warn-panel: #2b2413; --bad: #ff9c98; --bad-panel: #331a1b;"""
STYLE = (
    f":root {{ {LIGHT} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}\n"
    + """
* { box-sizing: border-box; } html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 62rem; padding: 3rem 1.5rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { font-size: 2rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; line-height: 1.3; font-weight: 650; margin: 0 0 .5rem; }
h3 { font-size: 1rem; font-weight: 650; margin: 1.5rem 0 .4rem; } p { margin: 0 0 .8rem; max-width: 44rem; }
a { color: var(--model); } :focus-visible { outline: 2px solid var(--model); outline-offset: 2px; }
section { margin-top: 3rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
.eyebrow { margin: 0 0 .3rem; }
.eyebrow, .soft, figcaption, caption, small { color: var(--soft); font-size: .875rem; line-height: 1.5; }
nav { margin-top: 1.2rem; font-size: .875rem; } nav a { margin-right: 1.1rem; white-space: nowrap; }
.note { border-left: 4px solid var(--warn); background: var(--warn-panel); padding: .8rem 1.1rem; margin: 1.5rem 0 0; }
.note h2 { font-size: 1rem; color: var(--warn); margin: 0 0 .2rem; }
.note ul { margin: 0; padding-left: 1.1rem; } .note p { margin: 0; }
.note.bad { border-color: var(--bad); background: var(--bad-panel); }
.note.bad h2, .nan { color: var(--bad); } .nan { font-style: italic; }
.gains { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 1.5rem;
  margin: 1.2rem 0 1.4rem; }
.gains div { border-left: 2px solid var(--line); padding-left: 1rem; }
.gains dt { color: var(--soft); font-size: .875rem; } .gains dd { margin: 0; font-size: .875rem; line-height: 1.45; }
.gains .big { font-size: 2rem; line-height: 1.25; font-weight: 300; letter-spacing: -.02em; white-space: nowrap; }
.big small { font-size: 1rem; letter-spacing: 0; } figure { margin: 1.2rem 0; }
figcaption, figure > img { max-width: min(100%, 44rem); }
figure img, figure video, figure svg { display: block; height: auto; } video, svg { max-width: 100%; }
.mat { background: #fff; padding: .4rem; } .scroll { overflow-x: auto; margin: 1.2rem 0; position: relative; }
table { border-collapse: separate; border-spacing: 0; font-size: .9375rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .4rem; white-space: nowrap; }
th, td { padding: .4rem 0 .4rem 2.2rem; text-align: right; vertical-align: top; font-weight: 400; white-space: nowrap; }
th:first-child { padding-left: 0; } th.text, td.text { text-align: left; }
td.text { white-space: normal; min-width: 7rem; } td.text:has(code) { min-width: 14rem; overflow-wrap: anywhere; }
thead th { color: var(--soft); font-size: .8125rem; vertical-align: bottom; border-bottom: 1px solid var(--ink); }
tbody th, tbody td { border-bottom: 1px solid var(--line); }
@media screen { tbody th.text { position: sticky; left: 0; background: var(--paper); background-clip: padding-box; } }
tr.group th { text-align: left; white-space: normal; padding: 1.1rem 0 .35rem; font-weight: 650; }
tr.group small { display: block; font-weight: 400; max-width: min(40rem, calc(100vw - 2rem)); }
.facts { display: grid; grid-template-columns: auto 1fr; gap: .2rem 2rem; margin: 1.2rem 0; font-size: .875rem; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; }
.ends { display: block; color: var(--soft); font-size: .8125rem; line-height: 1.3; }
code, pre { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--panel); padding: .9rem 1.1rem; white-space: pre-wrap; margin: .8rem 0; }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--model); }
@media (max-width: 40rem) {
  body { padding: 1.8rem 1rem 3rem; } h1 { font-size: 1.6rem; } section { margin-top: 2.2rem; }
  .gains { grid-template-columns: 1fr 1fr; gap: 1.2rem .8rem; } .gains div { padding-left: .7rem; }
  .gains .big { font-size: 1.6rem; } th, td { padding-left: 1rem; }
}
@media print {
  @page { margin: 16mm 15mm; } html { font-size: 9.5pt; } body { padding: 0; max-width: none; }
  nav, figure video, details:not([open]), #more:not(:has(details[open])) { display: none; }
  section { margin-top: 1.4rem; padding-top: .9rem; }
  h1, h2, h3, caption, tr.group, section > p { break-after: avoid; }
  figure, tr, p, .keep, .note, .gains, pre { break-inside: avoid; } thead { display: table-header-group; }
  .scroll { overflow: visible; } th, td { padding-left: 1rem; }
  .note, pre { border: 1px solid var(--line); border-left-width: 4px; background: none; } a { color: inherit; }
  a[href^="http"]::after { content: " (" attr(href) ")"; }
}
"""
)
