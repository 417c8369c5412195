"""The facts of a dataset for people and scripts: one dict, and the same as a table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.episodes import EpisodeStore
from ahriuwu_cli.data.metadata import SPLITS
from ahriuwu_cli.errors import DataError
from ahriuwu_cli.printing import one_line, printable

if TYPE_CHECKING:
    import numpy as np

MOST_VALUES = 32_000_000  # of actions that are looked at: 16 million steps of two columns; seconds
RUN, FEW = 256, 256  # steps in a row; as many times more as there are fewer than so many columns


def describe(path: Path, check: bool = False) -> dict[str, Any]:
    """Facts ready for JSON. With check, `checks` holds the rows of `data.validate` and `sound` whether none failed.

    DataError for what is no dataset, or goes away while it is read.
    """
    try:
        return _describe(path, check)
    except FileNotFoundError as error:
        gone = printable(str(error.filename))
        raise DataError(f"{gone} went away while {path} was read: put it back, or look again later") from None


def _describe(path: Path, check: bool) -> dict[str, Any]:
    store = EpisodeStore.open(path, verify=False)  # --check hashes every file itself, and says which are not sound
    facts: dict[str, Any] = {
        "kind": "dataset",
        "path": str(path),
        "name": store.name,
        "source": store.source,
        "fps": store.fps,
        "frame_skip": store.frame_skip,
        "height": store.height,
        "width": store.width,
        "seed": store.seed,
        "bytes": sum(store.file(e.id).stat().st_size for e in store.episodes()),
        "fingerprint": store.fingerprint,
        "splits": {split: _count(store, split) for split in SPLITS},
        "action_space": store.action_space.to_json(),
    }
    facts |= _histogram(store)
    if check:
        from ahriuwu_cli.data.pack_check import check_packs
        from ahriuwu_cli.data.validate import validate

        checks = validate(store) + check_packs(store)
        facts["checks"] = [vars(c) for c in checks]
        facts["sound"] = all(c.ok or c.warning for c in checks)
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """The table that `ahriuwu info`, `record` and `import` print."""
    source = ", ".join(f"{k} {v}" for k, v in facts["source"].items())
    picture = f"{facts['height']}x{facts['width']} at {facts['fps']:g} per second"
    lines = [
        f"dataset   {facts['path']} ({facts['bytes'] / 1e6:.1f} MB)",
        f"source    {source}",
        f"frames    {picture}, frame skip {facts['frame_skip']}",
        "",
        f"{'split':8}{'episodes':>10}{'labelled':>10}{'frames':>10}{'longest':>10}",
    ]
    for split, n in facts["splits"].items():
        lines.append(f"{split:8}{n['episodes']:10}{n['labelled']:10}{n['frames']:10}{n['longest']:10}")
    lines += ["", "actions"]
    for part in facts["action_space"]["components"]:
        lines.append(f"  {part['name']}: {part['kind']}, {part['size']}")
        for row in facts["actions"].get(part["name"], []):
            if part["kind"] == "continuous":
                lines.append(f"    {row['label']:20} mean {row['mean']:+.3f}, std {row['std']:.3f}")
            else:
                lines.append(f"    {row['label']:20} {row['share']:6.1%}")
    if not facts["action_space"]["components"]:
        lines.append("  none: video only")
    if facts["actions_outside"]:
        lines.append(f"  {facts['actions_outside']} steps lie outside the action space, not counted: see --check")
    if facts["actions_read"] < facts["actions_stored"]:
        lines.append(f"  looked at {facts['actions_read']} of {facts['actions_stored']} steps, evenly spread")
    for row in facts.get("checks", []):
        mark = "ok" if row["ok"] else "warn" if row["warning"] else "FAIL"
        lines += ["", "checks"] * (row is facts["checks"][0]) + [f"  {mark:5} {row['name']}: {row['detail']}"]
    return "\n".join(map(one_line, lines))


def _count(store: EpisodeStore, split: str) -> dict[str, int]:
    episodes = store.episodes(split)
    return {
        "episodes": len(episodes),
        "labelled": sum(e.labelled for e in episodes),
        "frames": sum(e.frames for e in episodes),
        "longest": max((e.frames for e in episodes), default=0),
    }


def _sample(store: EpisodeStore) -> Iterator[np.ndarray]:
    """Actions (T, A) of all steps, block after block; of every n-th block alone where all are more than MOST_VALUES."""
    labelled, width = [e for e in store.episodes() if e.labelled], max(1, store.action_space.width)
    run = max(RUN, RUN * FEW // width)
    stride = run * max(1, -(-sum(e.frames - 1 for e in labelled) * width // MOST_VALUES))
    begin = 0  # of the episode, counted over all of them
    for episode in labelled:
        end = begin + episode.frames - 1
        for block in range(begin // stride * stride, end, stride):
            start, stop = max(begin, block), min(end, block + run)
            if start < stop:
                yield store.actions(episode.id, start - begin, stop - begin)
        begin = end


def _histogram(store: EpisodeStore) -> dict[str, Any]:
    """`actions`, for each component: the share of steps of each value or button, or the mean and spread of each axis;
    `actions_outside`: how many steps the action space does not allow, which count for nothing else; `actions_read` of
    the `actions_stored` steps were looked at."""
    import numpy as np

    space, steps, outside = store.action_space, 0, 0
    total, squares, origin = np.zeros(space.width), np.zeros(space.width), None
    counts = [np.zeros(part.size, np.int64) for part, _ in space.slices()]
    for values in _sample(store):
        allowed = space.allows(values).all(1)
        values, outside = values[allowed].astype(np.float64), outside + int((~allowed).sum())
        if not len(values):
            continue
        origin = values[0] if origin is None else origin
        steps += len(values)
        total += values.sum(0)
        squares += ((values - origin) ** 2).sum(0)
        for count, (part, columns) in zip(counts, space.slices(), strict=True):
            if part.kind == "discrete":
                count += np.bincount(values[:, columns][:, 0].astype(int), minlength=part.size)
    out: dict[str, list[dict[str, Any]]] = {}
    stored = sum(e.frames - 1 for e in store.episodes() if e.labelled)
    facts = {"actions": out, "actions_outside": outside, "actions_read": steps + outside, "actions_stored": stored}
    if not steps:
        return facts
    mean = total / steps
    std = np.sqrt(np.maximum(squares / steps - (mean - origin) ** 2, 0))
    for count, (part, columns) in zip(counts, space.slices(), strict=True):
        if part.kind == "discrete":
            labels = part.labels or tuple(map(str, range(part.size)))
            shares = count / steps
            out[part.name] = [{"label": n, "share": float(s)} for n, s in zip(labels, shares, strict=True)]
        elif part.kind == "binary":
            shares = mean[columns]
            out[part.name] = [{"label": n, "share": float(s)} for n, s in zip(part.column_names, shares, strict=True)]
        else:
            spread = zip(part.column_names, mean[columns], std[columns], strict=True)
            out[part.name] = [{"label": n, "mean": float(m), "std": float(s)} for n, m, s in spread]
    return facts
