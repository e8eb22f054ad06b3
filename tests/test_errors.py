"""Errors: each is one line that controls no terminal."""

import errno

import pytest

from electra_wrap.errors import EnvironmentProblem, StageFailed, UsageError, convert, visible


def test_message_is_one_line_without_control_characters() -> None:
    text = "año\x1b[31m\n\r\x9b2J\u202enoche \U0001f642"
    assert visible(text) == "año\ufffd[31m\ufffd\ufffd\ufffd2J\ufffdnoche \U0001f642"


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.EACCES, "No", "/x"), EnvironmentProblem, "No (/x); fix that and run again"),
        (RuntimeError("a\n  b"), StageFailed, "RuntimeError: a b"),
        (
            ValueError("x: No space left on device (1)"),
            EnvironmentProblem,
            "No space left on device; fix that and run again",
        ),
        (UsageError("mine"), UsageError, "mine"),
    ],
)
def test_error_of_a_library_becomes_one_of_ours(error: Exception, kind: type, message: str) -> None:
    assert type(convert(error)) is kind and str(convert(error)) == message
