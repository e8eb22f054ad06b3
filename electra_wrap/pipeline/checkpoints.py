"""Which checkpoint a command means."""

from __future__ import annotations

from typing import Literal

from electra_wrap.engine import Checkpoint
from electra_wrap.errors import UsageError
from electra_wrap.monitor import evaluation
from electra_wrap.run import Run


def require_checkpoint(run: Run, step: int | Literal["best"] | None) -> Checkpoint:
    """Return the latest intact checkpoint, that of a step or the best one. UsageError if none.

    Its files are read and compared with their checksums.
    """
    run.forget_digests(run.model_dir)
    if step == "best":
        if best := evaluation.best(run):
            return best
        raise UsageError(f"{run.model_dir} has no evaluated checkpoint; first `evaluate` one")
    if checkpoint := evaluation.locate(run, step):
        return checkpoint
    which = "checkpoint" if step is None else f"intact checkpoint of step {step:,}"
    raise UsageError(f"{run.model_dir} has no {which}; first `run`, or choose another --step")
