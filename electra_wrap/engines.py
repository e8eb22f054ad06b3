"""All engines, by their names in profiles."""

from __future__ import annotations

from collections.abc import Iterable

from electra_wrap.engine import Checkpoint, Engine
from electra_wrap.errors import EnvironmentProblem
from electra_wrap.files import is_intact
from electra_wrap.native import engine as native
from electra_wrap.progress import log
from electra_wrap.run import Run
from electra_wrap.upstream import engine as upstream

ENGINES: dict[str, Engine] = {"native": native, "upstream": upstream}


def engine_of(run: Run) -> Engine:
    """Return the engine that the run's profile names."""
    return ENGINES[run.profile.engine]


def checkpoints(run: Run) -> list[Checkpoint]:
    """Return the checkpoints of every engine in the model's directory, latest first.

    At the same step, those of the profile's engine come first.
    """
    found: Iterable[Checkpoint] = (
        checkpoint
        for engine in ENGINES.values()
        for checkpoint in engine.checkpoints(run.model_dir)
    )
    return sorted(found, key=lambda c: (c.step, c.engine == run.profile.engine), reverse=True)


def is_checkpoint_intact(run: Run, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's files are as its engine wrote them."""
    return is_intact(ENGINES[checkpoint.engine].checksums(checkpoint), run.digest)


def find_checkpoint(run: Run, step: int | None = None) -> Checkpoint | None:
    """Return the latest intact checkpoint, or that of `step`; None if there is none."""
    return next(
        (
            checkpoint
            for checkpoint in checkpoints(run)
            if step in (None, checkpoint.step) and is_checkpoint_intact(run, checkpoint)
        ),
        None,
    )


def weight_digests(run: Run, checkpoint: Checkpoint | None) -> dict[str, str]:
    """Return the SHA-256 of each weight file, as inputs of a stage."""
    if checkpoint is None:
        return {}
    files = ENGINES[checkpoint.engine].weight_files(checkpoint)
    return {f"checkpoint {file.relative_to(run.model_dir)}": run.digest(file) for file in files}


def choose_devices(run: Run, purpose: str, *, require: bool = True) -> list[str]:
    """Return the names of the GPUs to use for `purpose`, a word for the log; none means the CPU.

    EnvironmentProblem if `train.device` is "gpu", no GPU is visible and `require` is true.
    """
    engine, requested = engine_of(run), run.profile.train.device
    gpus = [] if requested == "cpu" else engine.devices()
    if gpus:
        log(f"{purpose}: on {len(gpus)} × {gpus[0]}")
    elif requested == "gpu" and require:
        raise EnvironmentProblem(
            f'train.device = "gpu", but {engine.NO_GPU} (check with nvidia-smi), or use the CPU: '
            "--set train.device=cpu"
        )
    else:
        log(f"{purpose}: on the CPU")
    return gpus
