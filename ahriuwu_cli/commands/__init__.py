"""Commands, one file a verb: options to config to a few core calls. Heavy imports stay inside the functions."""

from collections.abc import Callable

import typer

from ahriuwu_cli.commands import eval, export, import_, info, record, rollout, sweep_tau, train, verify

# One line a verb, in the order that `ahriuwu --help` shows.
ALL: tuple[Callable[[typer.Typer], None], ...] = (
    record.register,
    import_.register,
    train.register,
    rollout.register,
    eval.register,
    sweep_tau.register,
    verify.register,
    export.register,
    info.register,
)
