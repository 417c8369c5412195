"""What no command may do: `--overwrite` a folder that it reads, or the one that the user stands in."""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ahriuwu_cli.places import keep_apart


def guarded(command: Any) -> Any:
    """A command tree of typer in which every command that has --overwrite looks at its paths first, once."""
    for below in getattr(command, "commands", {}).values():
        guarded(below)
    has_overwrite = any(p.name == "overwrite" for p in command.params)
    if command.callback is not None and has_overwrite and not hasattr(command.callback, "guarded"):
        command.callback = _guard(command.callback)
    return command


def _guard(callback: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(callback)
    def checked(**given: Any) -> Any:
        if given.get("overwrite") and given.get("out") is not None:
            kinds = typing.get_type_hints(callback)
            paths = [given[name] for name, kind in kinds.items() if kind is Path and name != "out"]
            paths += [Path(word) for name, kind in kinds.items() if kind == list[str] for word in given[name] or ()]
            keep_apart(given["out"], [path for path in paths if path is not None])
        return callback(**given)

    checked.guarded = True
    return checked
