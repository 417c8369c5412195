"""What `ahriuwu record` can record from: a name of the user's to the world that it means."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from ahriuwu_cli.data.recording import RecordConfig, World
from ahriuwu_cli.errors import UserError, did_you_mean

KINDS = ("doom", "gym")


def parse_source(text: str) -> tuple[str, str]:
    """(kind, name) of "doom:defend_the_center", "gym:ALE/Breakout-v5", or a bare name that one of them knows.

    Raises UserError with the nearest known name.
    """
    kind, colon, name = text.partition(":")
    if colon and kind in KINDS:
        if not name:
            raise UserError(f"{text!r} names no world: give {kind}:NAME, such as doom:defend_the_center")
        return kind, name
    if colon:
        raise UserError(f"unknown source {kind!r} in {text!r}: {did_you_mean(kind, KINDS)}")
    known: dict[str, str] = {}
    if importlib.util.find_spec("vizdoom"):
        from ahriuwu_cli.data import doom

        known |= dict.fromkeys(doom.scenario_names(), "doom")
    if text not in known and importlib.util.find_spec("gymnasium"):
        from ahriuwu_cli.data import gym

        known |= dict.fromkeys(gym.environment_names(), "gym")
    if text not in known:
        hint = did_you_mean(text, list(known))
        if not hint.startswith("did you mean"):
            hint = "give doom:SCENARIO such as doom:defend_the_center, or gym:NAME such as gym:ALE/Breakout-v5"
        raise UserError(f"unknown source {text!r}: {hint}")
    return known[text], text


def open_world(source: str, config: RecordConfig) -> World:
    """Start the world that a source names; config.name is replaced by its name. Close it after use."""
    kind, name = parse_source(source)
    config = replace(config, name=name)
    if kind == "doom":
        from ahriuwu_cli.data.doom import DoomWorld

        return DoomWorld(config)
    from ahriuwu_cli.data.gym import GymWorld

    return GymWorld(config)
