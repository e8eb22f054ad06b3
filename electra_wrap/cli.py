"""The command line: arguments are parsed, a command runs, an error becomes one line.

It imports neither TensorFlow nor PyTorch, and nothing slow before a command.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from typing import NoReturn

from absl import app, flags, logging

from electra_wrap import __version__, signals
from electra_wrap.commands import COMMANDS, Arguments
from electra_wrap.errors import (
    ElectraWrapError,
    Interrupted,
    StageFailed,
    UsageError,
    from_os_error,
    printable,
    visible,
)


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"electra_wrap: error: {printable(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(UsageError.exit_code)


def _parse(argv: list[str]) -> Arguments:
    """Parse a command line, which starts with the program's name."""
    flags.FLAGS(argv[:1])  # absl's own flags keep their defaults
    parser = _Parser(prog="python -m electra_wrap", description=sys.modules["electra_wrap"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for function, description, arguments in COMMANDS:
        command = commands.add_parser(function.__name__, help=description, description=description)
        command.set_defaults(function=function)
        for add in arguments:
            add(command)
    for text in argv:
        if text.startswith("--") and text.endswith("=--"):
            parser.error(f"{text} gives no value")  # argparse would take it for an empty list
    return parser.parse_args(argv[1:])


def _main(arguments: Arguments) -> None:
    """Run a command. An error becomes one line and an exit code."""
    failure: ElectraWrapError | None = None
    try:
        _run_command(arguments)
    except ElectraWrapError as error:
        failure = error
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)  # the work is done, or was stopped
    if failure is None:
        return
    if arguments.debug:
        raise failure
    if isinstance(failure, StageFailed) and failure.log_tail:
        print(*map(visible, failure.log_tail.split("\n")), sep="\n", file=sys.stderr)
    print(f"electra_wrap: error: {printable(str(failure))}", file=sys.stderr)
    sys.exit(failure.exit_code)


def _run_command(arguments: Arguments) -> None:
    """Run a command. Every exception becomes an ElectraWrapError."""
    try:
        arguments.function(arguments)
    except ElectraWrapError:
        raise
    except KeyboardInterrupt:
        raise Interrupted(signals.MESSAGE) from None
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        raise from_os_error(error) from error
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise ElectraWrapError(
            f"this is a bug of electra_wrap ({message}); report it with what --debug prints"
        ) from error


def entry_point() -> None:
    """Run the command line."""
    logging.set_verbosity(logging.ERROR)  # libraries' logs are not for our users
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack some characters
    app.run(_main, flags_parser=_parse)
