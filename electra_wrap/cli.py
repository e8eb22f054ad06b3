"""The command line: arguments are parsed, a command runs, an error becomes one line.

It imports neither TensorFlow nor PyTorch, and nothing slow before a command.
"""

import functools
import io
import os
import signal
import sys
import threading
from typing import NoReturn

from absl import app, logging
from absl.flags import argparse_flags

from electra_wrap import __version__, errors, signals
from electra_wrap.commands import COMMANDS, Arguments
from electra_wrap.errors import ElectraWrapError, Interrupted, StageFailed, UsageError, visible


class _Parser(argparse_flags.ArgumentParser):  # type: ignore[misc]
    """absl's parser, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        print(f"electra_wrap: error: {visible(message)}; see {self.prog} --help", file=sys.stderr)
        sys.exit(UsageError.exit_code)


def _parse(argv: list[str]) -> Arguments:
    """Parse a command line, which starts with the program's name."""
    parser = _Parser(prog="python -m electra_wrap", description=sys.modules["electra_wrap"].__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    added = parser.add_subparsers(
        required=True,
        metavar="COMMAND",
        parser_class=functools.partial(_Parser, inherited_absl_flags=None),
    )
    for function, description, arguments in COMMANDS:
        command = added.add_parser(function.__name__, help=description, description=description)
        command.set_defaults(function=function)
        for names, options in arguments:
            command.add_argument(*names, **options)
    for text in argv:
        if text.startswith("--") and text.endswith("=--"):
            parser.error(f"{text} gives no value")  # argparse would take it for an empty list
    parsed: Arguments = parser.parse_args(argv[1:])
    return parsed


def _main(arguments: Arguments) -> None:
    """Run a command. An error becomes one line and an exit code."""
    failure: ElectraWrapError | None = None
    try:
        arguments.function(arguments)
    except KeyboardInterrupt:
        failure = Interrupted(signals.MESSAGE)
    except BrokenPipeError:  # the reader, such as `head`, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ElectraWrapError, OSError) as error:
        failure = errors.convert(error)
        failure.__cause__ = None if failure is error else error
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        failure = ElectraWrapError(
            f"this is a bug of electra_wrap ({message}); report it with what --debug prints"
        )
        failure.__cause__ = error
    for number in signals.NUMBERS:
        signal.signal(number, signal.SIG_IGN)  # the work is done, or was stopped
    if failure is None:
        return
    if arguments.debug:
        raise failure
    if isinstance(failure, StageFailed) and failure.log_tail:
        print(*map(visible, failure.log_tail.split("\n")), sep="\n", file=sys.stderr)
    print(f"electra_wrap: error: {visible(str(failure))}", file=sys.stderr)
    sys.exit(failure.exit_code)


def entry_point() -> None:
    """Run the command line."""
    logging.set_verbosity(logging.ERROR)  # libraries' logs are not for our users
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack some characters
    # TensorBoard writes in a thread. It raises an error of the disk again where we write next.
    threading.excepthook = lambda details: None
    app.run(_main, flags_parser=_parse)
