"""Evaluations on held-out text, and the best checkpoint.

The engines draw different masks, so only evaluations by the same engine can be compared. The
weights of each engine's best checkpoint are kept in models/NAME/best-STEP.
"""

from __future__ import annotations

import math
from pathlib import Path

from electra_wrap import files
from electra_wrap.engine import Checkpoint
from electra_wrap.engines import ENGINES, find_checkpoint, is_checkpoint_intact
from electra_wrap.events import Evaluation
from electra_wrap.monitor import scalars
from electra_wrap.progress import log
from electra_wrap.run import Run

#: The metric by which checkpoints are ranked; lower is better.
RANKED_BY = "loss/total"


def ranking_engine(run: Run) -> str:
    """Return the profile's engine if it evaluated the model, or else the one that did."""
    recorded = run.model.get("evaluations", {})
    engines = filter(recorded.get, (run.profile.engine, *ENGINES))
    return next(engines, run.profile.engine)


def evaluations(run: Run, engine: str | None = None) -> dict[int, dict[str, float]]:
    """Return the metrics of each step that an engine evaluated, in the order of steps.

    The default engine is `ranking_engine`.
    """
    recorded = run.model.get("evaluations", {}).get(engine or ranking_engine(run), {})
    return {int(step): recorded[step] for step in sorted(recorded, key=int)}


def record(run: Run, engine: str, event: Evaluation) -> None:
    """Record an evaluation in the manifest and for TensorBoard, and keep the best checkpoints."""
    with scalars.Writer(run.model_dir / "eval") as writer:
        writer.write_scalars(event.step, event.scalars)
    recorded = run.model.setdefault("evaluations", {}).setdefault(engine, {})
    recorded[str(event.step)] = {**event.scalars, "examples": event.examples}
    best_steps = _keep_best(run)
    loss, auc = event.scalars[RANKED_BY], event.scalars["discriminator/auc"]
    note = ", the best so far" if best_steps.get(engine) == event.step else ""
    what = f"step {event.step:,} on {event.examples:,} held-out examples"
    log(f"evaluate: {what}: loss {loss:.4f}, AUC {auc:.4f}{note}")


def find(run: Run, checkpoint: Checkpoint) -> tuple[str, dict[str, float]]:
    """Return the engine and the metrics of a checkpoint's evaluation; empty if there is none.

    If both engines evaluated that step, the checkpoint's own engine is preferred.
    """
    for engine in (checkpoint.engine, *ENGINES):
        if metrics := evaluations(run, engine).get(checkpoint.step):
            return engine, metrics
    return "", {}


def best(run: Run, engine: str | None = None) -> Checkpoint | None:
    """Return the checkpoint with the lowest held-out loss, of those whose weights exist.

    The ranking is that of `evaluations(run, engine)`.
    """
    by_step = evaluations(run, engine)
    ranked = sorted(by_step, key=lambda step: by_step[step].get(RANKED_BY, math.inf))
    return next(filter(None, (locate(run, step) for step in ranked)), None)


def locate(run: Run, step: int | None) -> Checkpoint | None:
    """Return the intact checkpoint of `step`, by default the latest; None if there is none."""
    if step is not None:
        for engine in ENGINES.values():
            for checkpoint in engine.checkpoints(run.model_dir / f"best-{step}"):
                if is_checkpoint_intact(run, checkpoint):
                    return checkpoint
    return find_checkpoint(run, step)


def discard_after(run: Run, step: int) -> None:
    """Discard the evaluations of later steps: training continues from `step` to other weights.

    The weights of a best checkpoint after `step` are archived.
    """
    recorded = run.model.get("evaluations", {})
    run.model["evaluations"] = {
        engine: {key: metrics for key, metrics in by_step.items() if int(key) <= step}
        for engine, by_step in recorded.items()
    }
    with scalars.Writer(run.model_dir / "eval", start=step + 1):
        pass
    for kept_step, directory in _kept(run).items():
        if kept_step > step:
            files.archive(directory)
    _keep_best(run)


def _keep_best(run: Run) -> dict[str, int]:
    """Keep the weights of each engine's best checkpoint, remove others, and return the best steps.

    A kill at any moment leaves a best checkpoint: new weights are in place before the manifest
    names them, and old ones are removed after that.
    """
    best_steps = {}
    for engine in ENGINES:
        if checkpoint := best(run, engine):
            best_steps[engine] = checkpoint.step
            if checkpoint.directory == run.model_dir:
                _link(checkpoint)
    run.save()
    for step, directory in _kept(run).items():
        if step not in best_steps.values():
            files.remove(directory)
    return best_steps


def _kept(run: Run) -> dict[int, Path]:
    """Return the directories best-STEP by their steps."""
    paths = run.model_dir.glob("best-*")
    return {int(step): p for p in paths if (step := p.name.removeprefix("best-")).isdecimal()}


def _link(checkpoint: Checkpoint) -> None:
    """Link a checkpoint's weights to best-STEP, where they outlive the checkpoint."""
    engine, source = ENGINES[checkpoint.engine], checkpoint.directory
    with files.new_directory(source / f"best-{checkpoint.step}", replace=True) as directory:
        for file in engine.weight_files(checkpoint):
            target = directory / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            files.link_or_copy(file, target)
        copy = Checkpoint(checkpoint.engine, checkpoint.step, directory)
        files.write_checksums(engine.checksums(copy), engine.weight_files(copy))
