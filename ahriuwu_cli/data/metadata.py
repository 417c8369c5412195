"""dataset.json, the one page that describes a dataset: read strictly, key by key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ahriuwu_cli import ranges
from ahriuwu_cli.data.documents import read_object
from ahriuwu_cli.errors import DataError

FORMAT = "ahriuwu-dataset/1"
SPLITS = ("train", "val", "test")
MAX_BYTES = 100_000_000  # of dataset.json
MAX_SIDE = 4096
MAX_FRAMES = 2**31
MIN_FPS, MAX_FPS = ranges.FPS
_FACTS = {
    "format": str,
    "name": str,
    "source": dict,
    "fps": (int, float),
    "frame_skip": int,
    "height": int,
    "width": int,
    "action_space": dict,
    "seed": int,
}
_ID = re.compile(r"[0-9]{6,12}")


def read_document(path: Path) -> dict[str, Any]:
    """The content of a dataset folder's dataset.json. Raises DataError that names the key and the value."""
    file = path / "dataset.json"
    if not path.is_dir():
        raise DataError(f"{path} is not a folder: give a dataset folder made by `ahriuwu record` or `ahriuwu import`")
    if not file.is_file():
        raise DataError(f"{path} is not a dataset (it has no dataset.json): make one with `ahriuwu record` or `import`")
    try:
        document = read_object(file, MAX_BYTES)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}): the dataset is damaged, record or import it again") from None
    if document.get("format") != FORMAT:
        raise DataError(f"{file} has the format {document.get('format')!r}, not {FORMAT!r}: record or import it again")
    check_document(document, str(file))
    return document


def check_document(document: dict[str, Any], where: str) -> None:
    """The rules of dataset.json, for who reads it and for who is about to write it. DataError."""
    _check_keys(document, _FACTS | {"episodes": list}, where)
    check_facts({key: document[key] for key in _FACTS}, where)
    if not document["episodes"]:
        raise DataError(f"{where} lists no episodes: record or import some")
    seen = set()
    for entry in document["episodes"]:
        _check_episode(entry, where)
        if entry["id"] in seen:
            raise DataError(f"{where} lists the episode {entry['id']} twice")
        seen.add(entry["id"])


def check_facts(facts: dict[str, Any], where: str) -> None:
    """The rules of all but the episodes, so that a writer knows before there are any. DataError."""
    _check_keys(facts, _FACTS, where)
    if not MIN_FPS <= facts["fps"] <= MAX_FPS:
        raise DataError(f"{where}: fps is {facts['fps']}, not a rate above zero, from {MIN_FPS} to {MAX_FPS:g}")
    for key, low, high in (("frame_skip", *ranges.FRAME_SKIP), ("height", 1, MAX_SIDE), ("width", 1, MAX_SIDE)):
        if not low <= facts[key] <= high:
            raise DataError(f"{where}: {key} is {facts[key]}, not within {low} to {high}")


def _check_episode(entry: Any, where: str) -> None:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: an episode is {entry!r}, not an object")
    kinds = {"id": str, "split": str, "frames": int, "labelled": bool, "sha256": str, "source": str}
    _check_keys(entry, kinds, f"{where}: an episode")
    if not _ID.fullmatch(entry["id"]):
        raise DataError(f"{where}: the episode id {entry['id']!r} is not a row of at least 6 digits")
    if entry["split"] not in SPLITS:
        raise DataError(
            f"{where}: episode {entry['id']} has the split {entry['split']!r}, not one of {', '.join(SPLITS)}"
        )
    if not 2 <= entry["frames"] <= MAX_FRAMES:
        least = "it takes 2 to show an action" if entry["frames"] < 2 else f"the limit is {MAX_FRAMES}"
        raise DataError(f"{where}: episode {entry['id']} has {entry['frames']} frames; {least}")
    if not re.fullmatch(r"[0-9a-f]{64}", entry["sha256"]):
        raise DataError(f"{where}: episode {entry['id']} has the sha256 {entry['sha256']!r}, not 64 hex digits")


def _check_keys(document: dict[str, Any], kinds: dict[str, Any], where: str) -> None:
    odd = sorted(set(kinds) ^ set(document))
    if odd:
        state = "is missing" if odd[0] in kinds else "is not known"
        raise DataError(f"{where}: the key {odd[0]!r} {state}; record or import the dataset again")
    for key, kind in kinds.items():
        value = document[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{where}: {key} is {value!r}, which has the wrong type")
