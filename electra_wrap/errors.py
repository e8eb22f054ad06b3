"""The errors that a user sees: one line each, and an exit code."""

import errno
import os
import re

#: A full or failing disk. A library may raise the system's message for it as any exception.
_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOTCONN)
_DISK_ERROR = re.compile("|".join(map(os.strerror, _DISK_ERRNOS)))

#: Characters that a terminal obeys: controls, and changes of the writing direction.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Replace characters that a terminal would obey by U+FFFD."""
    return CONTROL.sub("\ufffd", text)


class ElectraWrapError(Exception):
    """What is wrong; what to do. The process ends with `exit_code`."""

    exit_code = 1


class UsageError(ElectraWrapError):
    """The command or the profile is wrong."""

    exit_code = 2


class EnvironmentProblem(ElectraWrapError):
    """The machine lacks something: upstream, a GPU, disk space, a network, a package."""

    exit_code = 3


class StageFailed(ElectraWrapError):
    """A stage failed. `log_tail` holds the last lines of its log."""

    exit_code = 4

    def __init__(self, message: str, log_tail: str = "") -> None:
        super().__init__(message)
        self.log_tail = log_tail


class Interrupted(ElectraWrapError):
    """A signal stopped the run. The same command resumes it."""

    exit_code = 130


def convert(error: Exception) -> ElectraWrapError:
    """Return an exception of any library as one of ours, with a message of one line."""
    if isinstance(error, ElectraWrapError):
        # PyTorch puts the traceback of a data loader's worker before the message.
        *before, message = str(error).strip().splitlines()
        return type(error)(message.partition(": ")[2]) if before else error
    if isinstance(error, OSError) and error.strerror:
        file = f" ({error.filename})" if error.filename else ""
        return EnvironmentProblem(f"{error.strerror}{file}; fix that and run again")
    message = " ".join(f"{type(error).__name__}: {error}".split())
    return find_disk_error(message) or StageFailed(message)


def find_disk_error(text: str) -> EnvironmentProblem | None:
    """Return an error if a text has one of the system's messages for a full or failing disk."""
    found = _DISK_ERROR.search(text)
    return EnvironmentProblem(f"{found[0]}; fix that and run again") if found else None


def diverged(step: int, loss: float) -> StageFailed:
    """Return the error for a loss, weights or gradients that are not finite."""
    return StageFailed(
        f"training diverged at step {step:,}: the loss is {loss:.4g} and some weights or gradients "
        "are not finite. The last checkpoint is from before that step; train again with a lower "
        "train.learning_rate or more warm-up steps: --set model_name=NAME"
    )
