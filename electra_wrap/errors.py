"""The errors a user sees: one line each, and the exit code that goes with it."""


class ElectraWrapError(Exception):
    """What is wrong; what to do. `exit_code` is the process's."""

    exit_code = 1


class UsageError(ElectraWrapError):
    """The command or the profile is wrong."""

    exit_code = 2


class EnvironmentLacks(ElectraWrapError):
    """The machine lacks something: upstream, a GPU, disk, network, a package."""

    exit_code = 3


def from_os(error: OSError) -> EnvironmentLacks:
    """What the system says of a file, as one of ours."""
    where = f" ({error.filename})" if error.filename else ""
    return EnvironmentLacks(f"{error.strerror or error}{where}; mend that and run again")


class StageFailed(ElectraWrapError):
    """A stage failed. `tail` holds the last lines of its log."""

    exit_code = 4

    def __init__(self, message: str, tail: str = "") -> None:
        super().__init__(message)
        self.tail = tail


def diverged(step: int, loss: float) -> StageFailed:
    """Training went wrong for good: its loss is no number, or leads to weights that are none."""
    return StageFailed(
        f"at step {step:,} the loss is {loss:.4g}, with weights or gradients that are not finite; the last checkpoint "
        "is from before. Train anew with a lower train.learning_rate or a longer warm-up: --set model_name=NAME"
    )


class Interrupted(ElectraWrapError):
    """Stopped by a signal; the same command resumes."""

    exit_code = 130
