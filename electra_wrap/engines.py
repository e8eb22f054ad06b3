"""All engines, by their names in profiles, and what the pipeline needs of them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from electra_wrap.errors import EnvironmentProblem
from electra_wrap.events import OnEvent
from electra_wrap.native import engine as native
from electra_wrap.progress import log
from electra_wrap.run import Run
from electra_wrap.upstream import engine as upstream


class Engine(Protocol):
    """An engine builds examples and trains. It is a module with these functions.

    They raise UsageError, EnvironmentProblem, StageFailed or Interrupted.
    """

    def prepare(self, run: Run) -> None:
        """Fetch and verify what building and training need, before any work starts."""

    def devices(self) -> list[str]:
        """Return the names of the GPUs that the engine sees."""

    def build_examples(self, run: Run, text: Path, out: Path) -> int:
        """Fill the directory `out` with the examples of the shards in `text`; return how many."""

    def train(self, run: Run, devices: Sequence[str], on_event: OnEvent) -> None:
        """Train from the latest checkpoint, or from `run.initial`, to the profile's last step.

        `on_event` gets the Setup, each Step and each Evaluation.
        """

    def evaluate(self, run: Run, step: int, devices: Sequence[str], on_event: OnEvent) -> None:
        """Evaluate a checkpoint on the held-out examples. `on_event` gets the Evaluation."""

    def export(self, run: Run, step: int, out: Path) -> None:
        """Write `out`/discriminator and `out`/generator for transformers."""


ENGINES: dict[str, Engine] = {"native": native, "upstream": upstream}


def engine_of(run: Run) -> Engine:
    """Return the engine that the run's profile names."""
    return ENGINES[run.profile.engine]


@functools.cache
def list_devices(engine: str) -> list[str]:
    """Return the names of the GPUs that an engine sees. A process asks once: it takes seconds."""
    return ENGINES[engine].devices()


def choose_devices(run: Run, *, require: bool = True) -> list[str]:
    """Return the names of the GPUs to use; none means the CPU.

    EnvironmentProblem if `train.device` is "gpu", no GPU is visible and `require` is true.
    """
    requested = run.profile.train.device
    gpus = [] if requested == "cpu" else list_devices(run.profile.engine)
    if requested == "gpu" and not gpus and require:
        raise EnvironmentProblem(
            f'train.device = "gpu", but the {run.profile.engine} engine sees none; see `doctor`, '
            "or use the CPU: --set train.device=cpu"
        )
    log(f"on {len(gpus)} × {gpus[0]}" if gpus else "on the CPU")
    return gpus
