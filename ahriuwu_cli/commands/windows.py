"""Which windows `eval` and `sweep-tau` look at: those of a stored manifest, or options from which to draw new ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ahriuwu_cli.errors import UserError

if TYPE_CHECKING:
    from ahriuwu_cli.data.episodes import EpisodeStore
    from ahriuwu_cli.evaluation.protocol import WindowManifest


def choose_windows(
    config: Any, asked: dict[str, Any], manifest: Path | None, store: EpisodeStore
) -> tuple[Any, WindowManifest | None]:
    """The configuration with what was asked for (values that are not None), and the manifest, if one was named.

    UserError when an option contradicts the manifest.
    """
    from ahriuwu_cli.evaluation.protocol import WindowManifest

    asked = {name: value for name, value in asked.items() if value is not None}
    if manifest is None:
        return replace(config, **asked), None
    stored = WindowManifest.load(manifest, store)
    own = {"split": stored.split, "windows": len(stored.windows), "context": stored.context, "horizon": stored.horizon}
    for name, value in asked.items():
        if value != own[name]:
            raise UserError(f"--{name} {value} contradicts {manifest}, which has {own[name]}: leave one of them out")
    return config, stored
