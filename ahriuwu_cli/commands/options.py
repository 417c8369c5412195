"""Options that commands share, and typer options whose values are checked as the command line is read (`values`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from ahriuwu_cli import ranges
from ahriuwu_cli.commands.values import Name, Number, Text, Whole, device_name, listed
from ahriuwu_cli.errors import UserError
from ahriuwu_cli.printing import one_line

MANY = 10**9  # steps, frames: more than anybody waits for
CLEAN_TO_NOISE = " where 0 is clean and 1 is noise"
SPLITS = listed("data.metadata", "SPLITS")
SAMPLERS = listed("diffusion.samplers", "SAMPLERS")
CTX_MODES, CTX_LABELS = listed("rollout", "CTX_MODES"), listed("rollout", "CTX_LABELS")
PICKS = listed("prompts", "PICKS")


def whole(default: int | None, option: str, low: int, high: int, help: str) -> Any:
    """A typer option for a whole number in low..high."""
    return typer.Option(default, option, parser=Whole(option, low, high), help=help)


def number(
    default: float | None, option: str, low: float, high: float, help: str, ends: str = "[]", meaning: str = ""
) -> Any:
    """A typer option for a finite number from low to high, see `Number`."""
    return typer.Option(default, option, parser=Number(option, low, high, ends, meaning), help=help)


def name(default: str | None, option: str, known: Callable[[], tuple[str, ...]], help: str) -> Any:
    """A typer option for one of the names that known() gives."""
    return typer.Option(default, option, parser=Name(option, default, known), help=help)


def text(default: str | None, option: str, parse: Callable[[str], Any], help: str) -> Any:
    """A typer option for a text that `parse` understands."""
    return typer.Option(default, option, parser=Text(parse), help=help)


def say(sentence: str) -> None:
    """A line on stderr, for people."""
    typer.echo(one_line(sentence), err=True)


def only_for(context: typer.Context, reason: str, *names: str) -> None:
    """UserError when one of these parameters was given by the user: it would be ignored, for this reason."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name)
        if parameter.name in names and source is not None and source.name != "DEFAULT":
            raise UserError(f"{parameter.opts[-1]} {reason}: leave it out")


Precision = name(
    "float32", "--precision", listed("config", "PRECISIONS"), "float32, or bfloat16 weights and products: faster where "
    "a GPU or CPU has units for it."
)  # fmt: skip
DEVICES = "auto (CUDA where there is one), cpu, cuda, cuda:1, ..."
Device = text("auto", "--device", device_name, DEVICES)
Out = typer.Option(..., "--out", help="Folder to write: new, empty, or with this very run to go on with.")
Overwrite = typer.Option(False, "--overwrite", help="Replace what is in --out.")
AsJson = typer.Option(False, "--json", help="Print one JSON object instead of text.")


def passes(help: str = "K, model passes a frame (default: the checkpoint's).") -> Any:
    return whole(None, "--steps", *ranges.STEPS, help)


def sampler(help: str = "shortcut, euler, multistep or renoise (default: the checkpoint's).") -> Any:
    return name(None, "--sampler", SAMPLERS, help)


def tau_ctx(default: float | None = None) -> Any:
    help = "Noise of context frames, tau (0 clean, 1 noise)."
    return number(default, "--tau-ctx", *ranges.TAU_CTX, help, "[)", CLEAN_TO_NOISE)


def ctx_mode(help: str) -> Any:
    return name(None, "--ctx-mode", CTX_MODES, help)


def ctx_label(help: str) -> Any:
    return name(None, "--ctx-label", CTX_LABELS, help)


def seed(help: str) -> Any:
    return whole(0, "--seed", *ranges.SEED, help)


def windows(help: str) -> Any:
    return whole(None, "--windows", *ranges.WINDOWS, help)


def context(help: str = "Frames that are given, never scored (default: 8).") -> Any:
    return whole(None, "--context", *ranges.CONTEXT, help)


def horizon() -> Any:
    return whole(None, "--horizon", *ranges.HORIZON, "Frames that are generated (default: 16).")


def batch(help: str = "Windows at a time; changes the speed, not the numbers.") -> Any:
    return whole(32, "--batch", *ranges.BATCH, help)


def noise_seeds() -> Any:
    return whole(1, "--noise-seeds", *ranges.NOISE_SEEDS, "Rollouts of every window with different noise, averaged.")
