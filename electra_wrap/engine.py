"""What the pipeline needs of an engine. upstream/engine.py and native/engine.py implement it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from electra_wrap.events import Event
from electra_wrap.run import Run

OnEvent = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, in `directory`: the model's directory, or its best checkpoint's."""

    engine: str
    step: int
    directory: Path


class Engine(Protocol):
    """An engine builds examples and trains. It is a module with these functions.

    Functions raise UsageError, EnvironmentProblem, StageFailed or Interrupted.
    """

    #: The engine's name in profiles.
    NAME: str
    #: The line of the model card that credits it.
    CREDIT: str
    #: Why it may see no GPU, and what to do.
    NO_GPU: str
    #: Directories of examples in the run directory: for training, and held out.
    EXAMPLES: tuple[str, str]

    def versions(self, stage: str) -> dict[str, str]:
        """Return the packages and pins on which `examples`, `train` or `convert` depends."""

    def devices(self) -> list[str]:
        """Return the names of the GPUs that the engine sees."""

    def precision(self, requested: str, devices: Sequence[str]) -> str:
        """Return the precision of matrix products for `train.precision` on these GPUs."""

    def prepare(self, run: Run) -> None:
        """Fetch and verify what building and training need, before any work starts."""

    def build_examples(
        self, run: Run, text: Path, parts: Path, jobs: dict[str, Any], log: Path, on_event: OnEvent
    ) -> None:
        """Build one part under `parts` for each shard of `text`; `jobs` go to `parts.build`."""

    def join_examples(self, run: Run, text: Path, parts: Sequence[Path], out: Path) -> None:
        """Fill the directory `out` with the examples of all parts of `text`."""

    def import_records(self, run: Run, records: Path, out: Path) -> int:
        """Write upstream's records to the directory `out`; return the number of examples.

        UsageError if they do not fit the profile.
        """

    def train(self, run: Run, devices: Sequence[str], on_event: OnEvent) -> None:
        """Train to the profile's last step. `on_event` gets each Step and each Evaluation."""

    def evaluate(
        self, run: Run, checkpoint: Checkpoint, devices: Sequence[str], on_event: OnEvent
    ) -> None:
        """Evaluate a checkpoint on the held-out examples. `on_event` gets the Evaluation."""

    def checkpoints(self, directory: Path) -> list[Checkpoint]:
        """Return the checkpoints in a directory, in the order of their steps."""

    def checksums(self, checkpoint: Checkpoint) -> Path:
        """Return the file with the SHA-256 of each file of a checkpoint."""

    def weight_files(self, checkpoint: Checkpoint) -> list[Path]:
        """Return the files that hold a checkpoint's weights."""

    def archive(self, checkpoint: Checkpoint) -> None:
        """Rename a checkpoint so that it is no longer discovered."""

    def export(
        self, run: Run, checkpoint: Checkpoint, out: Path, *, optimizer: bool = False
    ) -> None:
        """Write `out`/discriminator and `out`/generator for transformers.

        With `optimizer`, Adam's slots are written beside each model.
        """

    def import_checkpoint(self, run: Run, exported: Path, step: int) -> None:
        """Make a checkpoint from the directory that another engine's `export` wrote."""
