"""What SIGINT, SIGTERM and SIGHUP do: at first exit, and later raise KeyboardInterrupt.

A KeyboardInterrupt in the middle of an import may become any other exception, or a traceback. While
a command starts, there is nothing to clean up yet.
"""

import os
import signal
from typing import Any

from electra_wrap.errors import Interrupted

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

MESSAGE = "interrupted; the same command resumes"


def _exit(number: int, frame: Any) -> None:
    os.write(2, f"electra_wrap: error: {MESSAGE}\n".encode())
    os._exit(Interrupted.exit_code)


def exit_at_once() -> None:
    """Have signals end the process with one line. For a command that only imports and reads."""
    _handle(_exit)


def raise_interrupts() -> None:
    """Have signals raise KeyboardInterrupt. For a command that writes, after its imports."""
    _handle(signal.default_int_handler)


def _handle(handler: Any) -> None:
    for number in NUMBERS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, handler)
