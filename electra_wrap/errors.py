"""The errors that a user sees: one line each, with an exit code."""


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
