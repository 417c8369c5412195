"""Errors for the person at the terminal: one sentence that says what is wrong and what to try.

Raised anywhere, printed in one place (`cli.main`). The exit code tells scripts which part to look at.
"""


class UserError(Exception):
    """A usage mistake: a bad option, an unknown name, a refused overwrite. Exit code 2."""

    exit_code = 2


class DataError(UserError):
    """A dataset, video, action file, latent pack or manifest that is missing, damaged or does not fit. Exit code 3."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or made for another tokenizer, action space or convention. Exit code 4."""

    exit_code = 4


def did_you_mean(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The tail of an "unknown name" sentence: the nearest known name, or the list of all of them."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose one of: {', '.join(known)}"
