"""The errors that a user sees: one line each, with an exit code, and no secret in it."""

import re

#: A password in a URL, or the only name before its host, where services expect a token. A variable,
#: ${NAME}, is neither.
PASSWORD = re.compile(
    r"(https?://(?=[^/?#:@\n]*@)|://[^/?#:@\n]*:)(?!\$\{\w+\}@)[^/?#\n]*@", re.IGNORECASE
)

#: A long value in a URL's query or fragment, unless it is a variable. It may be a signature or key.
_VALUE = re.compile(
    r"(?<=[?&;#])([^=&#\s]*=)?+(?!\$\{\w+\}(?:[\s&#'\"),;]|$))"
    r"[^&#\s]{12,}?(?=['\"),;.:]*(?:[\s&#]|$))"
)

#: Longest message. Of a longer one, the middle is left out.
MAX_LENGTH = 1500

#: Characters that a terminal obeys: controls, and changes of the writing direction.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def mask(text: str) -> str:
    """Replace what may be a secret in the URLs of a text by `***`."""
    masked = PASSWORD.sub(r"\1***@", text)
    masked = re.sub(r"://(?!\$\{\w+\}@)[^/?#:@\n]{12,}@", "://***@", masked)  # of any protocol
    # A path that was made of a URL has one slash, and spaces need not be the URL's end.
    return re.sub(r"\w:/.*", lambda urls: _VALUE.sub(r"\1***", urls[0]), masked)


def printable(text: str) -> str:
    """Return a text as a line for a terminal: not endless, no secrets, no control characters."""
    text = visible(mask(text))
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 400]} … {text[-400:]}"


def visible(text: str) -> str:
    """Replace characters that a terminal would obey by U+FFFD."""
    return _CONTROL.sub("\ufffd", text)


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


def from_os_error(error: OSError) -> EnvironmentProblem:
    """Convert an OSError to an error with a one-line message."""
    file = f" ({error.filename})" if error.filename else ""
    return EnvironmentProblem(f"{error.strerror or error}{file}; fix that and run again")


def diverged(step: int, loss: float) -> StageFailed:
    """Return the error for a loss, weights or gradients that are not finite."""
    return StageFailed(
        f"training diverged at step {step:,}: the loss is {loss:.4g} and some weights or gradients "
        "are not finite. The last checkpoint is from before that step; train again with a lower "
        "train.learning_rate or more warm-up steps: --set model_name=NAME"
    )
