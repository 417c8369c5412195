"""The command line: every command is added here, and every error for the user is printed here and nowhere else."""

from __future__ import annotations

import difflib
import errno
import os
import re
import signal
import sys

import typer
from typer.main import get_command

from ahriuwu_cli import __version__, memory
from ahriuwu_cli.commands.guard import guarded
from ahriuwu_cli.commands.values import check_words
from ahriuwu_cli.disk import REFUSALS, refusal, visible
from ahriuwu_cli.errors import UserError, did_you_mean
from ahriuwu_cli.printing import OutputLost, one_sentence, only_text
from ahriuwu_cli.startup import begin, ended

INTERRUPTED = 128 + signal.SIGINT
app = typer.Typer(
    name="ahriuwu",
    help="Train, roll out and evaluate Dreamer-4-style world models. tau is 0 for clean latents and 1 for pure noise.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ahriuwu {__version__}")
        raise typer.Exit()


@app.callback()
def _global_options(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the full traceback of an error."),
) -> None:
    """Options that come before the command's name."""


def _add_commands() -> None:
    from ahriuwu_cli import commands

    for register in commands.ALL:
        register(app)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; without argv as the program of this process, which minds its signals and streams.

    Exit codes: 0 done, 1 a check failed, a disk is full or memory ran out, 2 usage, 3 data, 4 checkpoint, 128 + the
    number of a signal (SIGPIPE's, 141, where the reader of stdout has ended).
    """
    if argv is None:
        begin()
    # Threads that wait for each other must sleep, not spin: beside one other busy process spinning made a rollout forty
    # times slower. OpenMP reads this when torch is imported; whoever set it already is right.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["MPLBACKEND"] = "Agg"  # figures go to files; matplotlib dies of a name that it does not know
    arguments = sys.argv[1:] if argv is None else argv
    debug = "--debug" in arguments or os.environ.get("AHRIUWU_DEBUG", "") not in ("", "0")
    arguments = [a for a in arguments if a != "--debug"]
    with only_text():
        code = _run(arguments, debug)
    code = code if isinstance(code, int) else 0
    if argv is None:
        ended(code)
    sys.exit(code)


def _run(arguments: list[str], debug: bool) -> object:
    """The command's exit code, its error printed."""
    try:
        code = _outcome(arguments, debug)
        sys.stdout.flush()
        return code
    except OutputLost as error:
        if error.errno == errno.EPIPE:  # whoever read it has enough
            return 128 + signal.SIGPIPE
        _complain(f"stdout takes no output ({error}): send it elsewhere; nothing else went wrong")
        return 1


def _outcome(arguments: list[str], debug: bool) -> object:
    try:
        check_words(arguments)
        _check_variables()
        code = guarded(get_command(app)).main(args=arguments, prog_name="ahriuwu", standalone_mode=False)
        if code == INTERRUPTED:  # Typer's answer to a KeyboardInterrupt, which is raised within another program alone
            _complain("interrupted")
        return code
    except UserError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except OutputLost:
        raise
    except Exception as error:
        if debug:
            raise
        return _explain(error, arguments)


def _check_variables() -> None:
    """UserError where a variable for one of the libraries that make up a command line is one that it dies of."""
    if bars := sorted(name for name in os.environ if name.startswith("TQDM_")):
        try:
            from tqdm import tqdm

            with open(os.devnull, "w") as nowhere, tqdm(total=1, disable=False, file=nowhere) as bar:
                bar.update()
        except Exception as error:
            raise UserError(f"{', '.join(bars)} cannot be used for progress bars ({error}): unset it") from None
    if asked := os.environ.get("_AHRIUWU_COMPLETE"):
        words = {"COMP_WORDS", "_TYPER_COMPLETE_ARGS"} & os.environ.keys()
        if not re.fullmatch(r"(source|complete)_\w+", asked) or (asked.startswith("complete") and not words):
            raise UserError("_AHRIUWU_COMPLETE is for a shell that completes a command: unset it")


def _explain(error: Exception, arguments: list[str]) -> int:
    """Say what is wrong, in one sentence, and return the exit code."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # a word is missing that says what to do
        typer.echo(context.get_help())
        _complain(f"name a command after `{context.command_path}`")
        return 2
    if hasattr(error, "format_message"):  # Typer's own usage errors
        sentence = error.format_message().removesuffix(".").replace(". Did", ": did")
        if unknown := getattr(error, "option_name", None) if hasattr(error, "possibilities") else None:
            known = [name for parameter in context.command.params for name in parameter.opts if name[:2] == "--"]
            sentence = f"unknown option {unknown}: {did_you_mean(unknown, sorted(known))}"
            if getattr(context.command, "commands", None) and not difflib.get_close_matches(unknown, known, cutoff=0.8):
                sentence = f"unknown option {unknown}: a command's options follow the command"
        hint = f"; see `{context.command_path} --help`" if context and not sentence.endswith("?") else ""
        _complain(sentence + hint)
        return getattr(error, "exit_code", 2)
    if memory.ran_out(error):
        _complain(memory.sentence(" ".join(arguments), error))
        return 1
    if isinstance(error, BlockingIOError) and error.filename is None:  # of a fork
        _complain(memory.NO_PROCESS)
        return 1
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        _complain("too many open files: raise the limit (`ulimit -n`)")
        return 1
    if isinstance(error, OSError) and error.errno in REFUSALS:
        _complain(refusal(error, visible(error.filename) or _out(arguments)))
        return 1
    if isinstance(error, OSError) and error.filename is not None:  # the system refused a path that somebody gave
        _complain(f"{visible(error.filename)[:200]}: {error.strerror}; give another path, or make this one usable")
        return 2
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # Python's own, for whoever asks
        _complain("no folder for temporary files can be written to: make room in /tmp, or set TMPDIR to another one")
        return 1
    if memory.at_limit():
        _complain(memory.sentence(" ".join(arguments)))
        return 1
    _complain(f"internal error: {type(error).__name__}: {error} (run again with --debug, and please report it)")
    return 70


def _out(arguments: list[str]) -> str:
    """What --out is on a command line, where an error does not say what it was about."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if word == "--out" or word.startswith("--out="):
            return word.removeprefix("--out=") if "=" in word else following
    return "its output"


def _complain(sentence: str) -> None:
    sys.stderr.write(f"error: {one_sentence(sentence)}\n")


_add_commands()
