"""Errors for the person at the terminal: one sentence that says what is wrong and what to try.

Raised anywhere, printed in one place (`cli.main`). The exit code tells scripts which part to look at.
"""


class UserError(Exception):
    """A usage mistake: a bad option, an unknown name, a refused overwrite. Exit code 2."""

    exit_code = 2


class DataError(UserError):
    """A dataset, video, action file, latent pack or manifest that is missing, damaged or does not fit. Exit code 3."""

    exit_code = 3


class ReplacedError(DataError):
    """A dataset that was replaced by another one while it was read. Exit code 3."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or made for another tokenizer, action space or convention. Exit code 4."""

    exit_code = 4


class TrainingError(UserError):
    """A run that cannot go on: a loss or gradient that is not finite, a full disk. Exit code 1."""

    exit_code = 1


class DiskError(UserError):
    """A disk that takes no more: it is full, read-only or failing. Exit code 1."""

    exit_code = 1


class Interrupted(UserError):
    """A signal ended a run after its state was saved. Exit code 128 + the signal's number."""

    def __init__(self, sentence: str, signal_number: int) -> None:
        super().__init__(sentence)
        self.exit_code = 128 + signal_number


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The tail of an "unknown name" sentence: the nearest known name, or the list of all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"
