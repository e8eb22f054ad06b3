"""Stage `evaluate`: metrics of the latest checkpoint on held-out text."""

from __future__ import annotations

from electra_wrap.engine import Checkpoint
from electra_wrap.engines import ENGINES, choose_devices, engine_of, find_checkpoint, weight_digests
from electra_wrap.errors import UsageError
from electra_wrap.events import Evaluation, Event
from electra_wrap.monitor import evaluation
from electra_wrap.pipeline.checkpoints import require_checkpoint
from electra_wrap.pipeline.corpus import evaluation_problem
from electra_wrap.pipeline.stage import Digest, Stage, Values
from electra_wrap.progress import warn
from electra_wrap.run import Run


def _inputs(run: Run, digest: Digest) -> Values:
    held_out = engine_of(run).EXAMPLES[1]
    return {
        **weight_digests(run, find_checkpoint(run)),
        "held-out examples": digest(run.directory / held_out),
        "train.batch_size": run.profile.train.batch_size,
        "train.seed": run.profile.train.seed,
    }


def _execute(run: Run) -> Values:
    checkpoint = find_checkpoint(run)
    if checkpoint is None or not run.results(run.examples_record)["held_out_examples"]:
        # A model without metrics is still a model.
        warn(f"the model is not evaluated: {_problem(run)}")
        return {}
    event, run.last_evaluation = run.last_evaluation, None
    if event and event.step == checkpoint.step:  # the native engine evaluates as it ends
        return _metrics(event)
    return evaluate_checkpoint(run, checkpoint)


def _metrics(event: Evaluation) -> Values:
    return {"step": event.step, "examples": event.examples, **event.scalars}


def _problem(run: Run) -> str:
    return (
        evaluation_problem(run.results("corpus"))
        or "there are no held-out examples; raise corpus.held_out, or give more documents"
    )


def evaluate_checkpoint(run: Run, checkpoint: Checkpoint) -> Values:
    """Evaluate a checkpoint with its own engine and record the metrics; return step and metrics.

    Without a GPU this works on the CPU, whatever the profile requires for training.
    """
    devices = choose_devices(run, "evaluate", require=False)
    metrics: Values = {}

    def record(event: Event) -> None:
        if isinstance(event, Evaluation):
            evaluation.record(run, checkpoint.engine, event)
            metrics.update(_metrics(event))

    ENGINES[checkpoint.engine].evaluate(run, checkpoint, devices, record)
    return metrics


def evaluate(run: Run, step: int | None) -> Values:
    """Evaluate the latest checkpoint, or that of `step`; return step and metrics.

    UsageError if there is no such checkpoint or no held-out example.
    """
    with run.lock():
        checkpoint = require_checkpoint(run, step)
        if not run.results(f"examples {checkpoint.engine}").get("held_out_examples"):
            raise UsageError(f"{run.directory} cannot be evaluated: {_problem(run)}")
        held_out = ENGINES[checkpoint.engine].EXAMPLES[1]
        written = run.record(f"examples {checkpoint.engine}")["outputs"][held_out]
        run.forget_digests(run.directory / held_out)
        if run.digest(run.directory / held_out) != written:
            raise UsageError(f"{run.directory / held_out} is damaged; `run` builds it again")
        ENGINES[checkpoint.engine].prepare(run)
        return evaluate_checkpoint(run, checkpoint)


STAGE = Stage(
    name="evaluate",
    inputs=_inputs,
    execute=_execute,
    versions=lambda run: engine_of(run).versions("train"),
    record=lambda run: f"evaluate {run.profile.model_name}",
    depends_on=("examples", "train"),
    enabled=lambda run: run.profile.corpus.held_out > 0,
)
