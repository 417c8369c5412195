"""Making a latent pack: resumable, safe beside another packer, and under its name only when every row is there.

lock -> partial file and journal of what is finished -> encode the rest -> header with hashes, fsync, rename
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.data.pack_encode import Target, encode_parts
from ahriuwu_cli.data.pack_format import (
    Layout,
    Part,
    hash_part,
    new_facts,
    new_layout,
    pack_header,
    parts_of,
)
from ahriuwu_cli.data.pack_journal import Journal, Workplace, locked, read_journal, write_all
from ahriuwu_cli.disk import FULL, REFUSALS, more_room, sync
from ahriuwu_cli.errors import CheckpointError, DataError, DiskError

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.models.tokenizer import Tokenizer


def make_pack(
    path: Path,
    store: EpisodeStore,
    tokenizer: Tokenizer,
    split: str,
    is_there: Callable[[], bool],
    progress: Callable[[int, int], None],
    announce: Callable[[str], None],
    workers: int | None,
) -> None:
    """Write the pack, going on where an earlier packer was cut short; nothing is done when is_there() under the lock.

    Raises DiskError when the disk is full, read-only or failing, DataError when a source is damaged or the folder may
    not be written; finished parts are kept for next time. CheckpointError when the tokenizer's latents do not fit a
    pack; then nothing is kept.
    """
    facts = new_facts(store, tokenizer.fingerprint(), split)
    layout = new_layout(path, store, tokenizer, facts)
    if os.path.dirname(os.path.realpath(path.parent)) != os.path.realpath(store.path):
        raise DataError(f"{path.parent} leads out of the dataset: make it a folder, since latents are written into it")
    if os.path.lexists(path.parent) and not path.parent.is_dir():
        raise DataError(f"{path.parent} is no folder: remove it, since latents are written into a folder of that name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path, announce) as place:
            if not is_there():
                _make(path, store, tokenizer, facts, layout, place, progress, announce, workers)
    except BlockingIOError:  # no process more could be started
        raise
    except OSError as error:
        kind = DiskError if error.errno in REFUSALS else DataError
        raise kind(_sentence(error, path, layout)) from None


def _make(
    path: Path,
    store: EpisodeStore,
    tokenizer: Tokenizer,
    facts: dict[str, Any],
    layout: Layout,
    place: Workplace,
    progress: Callable[[int, int], None],
    announce: Callable[[str], None],
    workers: int | None,
) -> None:
    parts = list(parts_of(facts))
    total, shown = parts[-1].row + parts[-1].stop - parts[-1].start, 0

    def tick(frames: int) -> None:
        nonlocal shown
        shown += frames
        progress(shown, total)

    purpose = {name: facts[name] for name in ("tokenizer", "dataset", "split")} | {"pack_format": facts["format"]}
    done = _believed(path, parts, layout, place, purpose, announce, tick)
    descriptor = os.open(place.partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    try:
        try:
            if not done:
                _reserve(descriptor, layout.size)
            with closing(Journal(place.journal, purpose, done)) as journal:
                rest = [part for part in parts if part.index not in done]
                target = Target(descriptor, layout, place.lock)
                with closing(encode_parts(rest, store, tokenizer, target, tick, workers)) as finished:
                    for part, digest in finished:
                        journal.add(part.index, digest)
                        done[part.index] = digest
        except (CheckpointError, DataError, DiskError, OSError) as error:
            if isinstance(error, CheckpointError) or not done:  # none of it will be whole, or nothing is lost
                place.partial.unlink(missing_ok=True)
                place.journal.unlink(missing_ok=True)
            raise
        hashes = iter([done[part.index] for part in parts])
        for episode in facts["episodes"]:
            episode["parts"] = [next(hashes) for _ in episode["parts"]]
        write_all(descriptor, pack_header(path, layout.shapes, facts), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(place.partial, path)
    sync(path.parent)
    place.journal.unlink(missing_ok=True)


def _believed(
    path: Path,
    parts: list[Part],
    layout: Layout,
    place: Workplace,
    purpose: dict[str, Any],
    announce: Callable[[str], None],
    tick: Callable[[int], None],
) -> dict[int, str]:
    """Parts that an earlier packer finished, by the hash of their rows; what cannot be believed is removed and said."""
    known = read_journal(place.journal, purpose)
    size = place.partial.stat().st_size if place.partial.exists() else None
    if known is None or size != layout.size:
        if place.journal.exists() and known is None:
            announce(f"what {place.partial} holds is for other data or another tokenizer: beginning anew")
        elif size is not None and size != layout.size:
            announce(f"{place.partial} does not have the size that it should have: beginning anew")
        elif size is not None:
            announce(f"nothing says what is finished in {place.partial}: beginning anew")
        place.partial.unlink(missing_ok=True)
        place.journal.unlink(missing_ok=True)
        return {}
    done = {}
    descriptor = os.open(place.partial, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for part in parts:
            if part.index in known and hash_part(descriptor, layout, part) == known[part.index]:
                done[part.index] = known[part.index]
                tick(part.stop - part.start)
    finally:
        os.close(descriptor)
    announce(f"going on with {path}: {len(done)} of {len(parts)} parts are there")
    if len(done) < len(known):
        announce(f"{len(known) - len(done)} parts do not have the hash that was noted: encoding them again")
    return done


def _reserve(descriptor: int, size: int) -> None:
    """Take the whole room on disk now: a full disk is found before the first frame, not after the last."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    os.ftruncate(descriptor, size)


def _sentence(error: OSError, path: Path, layout: Layout) -> str:
    if error.errno in FULL:
        return (
            f"no room for {path}, which needs {layout.size / 1e6:.1f} MB ({error.strerror}): "
            f"{more_room(error)} and run the same command again; what was finished is kept"
        )
    return (
        f"cannot write {path} ({error.strerror}): latents are kept in the dataset's folder, so make it writable, or "
        f"copy the dataset to where you may write; what was finished is kept"
    )
