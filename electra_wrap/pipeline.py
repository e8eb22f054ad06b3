"""Which stages a run has to do, and doing them.

A stage is repeated when what it is made from has changed. That follows from the profile and from
the sizes and times of the sources, without running anything. So a plan is exact, and costs nothing.
"""

import datetime
import json
import time

from electra_wrap import checkpoints, files, initial_weights
from electra_wrap.engines import choose_devices, engine_of
from electra_wrap.errors import UsageError
from electra_wrap.progress import format_duration, log
from electra_wrap.run import Record, Run
from electra_wrap.stages import CONVERT, EVALUATE, EXAMPLES, STAGES, TRAIN, Stage, Values


def execute(run: Run, until: str | None = None, *, dry_run: bool = False) -> int:
    """Do the stages, up to `until`, that are missing or out of date; return how many.

    UsageError, before any work, if the run must not continue.
    """
    names = [stage.name for stage in STAGES]
    if until not in (None, *names):
        raise UsageError(f"--until {until}: no such stage; the stages are {', '.join(names)}")
    number = names.index(until or names[-1]) + 1
    if dry_run:
        initial_weights.resolve(run, dry_run=True)
        for stage, reason in (planned := _plan(run, number)):
            log(f"would do: {stage.name} ({reason})")
        if not planned:
            log("nothing to do: everything is up to date")
        return 0
    started = time.monotonic()
    with run.lock():
        initial_weights.resolve(run)
        has_begun = bool(checkpoints.steps(run.model_dir))
        if has_begun and _plan(run, number) and checkpoints.latest_intact(run.model_dir) is None:
            initial_weights.resolve(run)  # the damaged ones are renamed: training starts again
        planned = _plan(run, number)
        if not planned:
            log("nothing to do: everything is up to date")
            return 0
        for stage, reason in planned:
            log(f"to do: {stage.name} ({reason})")
        _prepare(run, [stage for stage, _ in planned])
        files.write_json(run.directory / "profile.json", run.profile.model_dump())
        for stage, _ in planned:
            _do(run, stage)
    took = format_duration(time.monotonic() - started)
    log(f"{len(planned)} of {number} stages done, {took}")
    return len(planned)


def _plan(run: Run, number: int) -> list[tuple[Stage, str]]:
    """Return those of the first `number` stages that have to be done, each with the reason.

    UsageError if one of all stages must not be done: data of a trained model is not replaced.
    """
    planned: list[tuple[Stage, str]] = []
    for stage in STAGES:
        reason = _find_reason(run, stage)
        if reason is None and TRAIN in (earlier for earlier, _ in planned):
            reason = "depends on train"
        if reason:
            planned.append((stage, reason))
    return [(stage, reason) for stage, reason in planned if stage in STAGES[:number]]


def _find_reason(run: Run, stage: Stage) -> str | None:
    """Return why a stage has to be done; None if it is up to date."""
    record = run.manifest.stages.get(stage.record_name(run))
    if stage is TRAIN:
        return _find_reason_to_train(run, record)
    inputs = _as_json(stage.inputs(run))  # an error if a source is missing
    if record is None:
        return "not done yet"
    if change := _describe_change(record.inputs, inputs):
        return change
    if not record.done:
        return "interrupted"
    lost = [path.name for path in stage.outputs(run) if not path.exists()]
    return f"{lost[0]} is missing" if lost else None


def _find_reason_to_train(run: Run, record: Record | None) -> str | None:
    step, steps = max(checkpoints.steps(run.model_dir), default=0), run.profile.train.steps
    if not checkpoints.steps(run.model_dir):
        return "not done yet"
    if record is None:
        raise UsageError(f"{run.model_dir} has a model of another run; choose another model_name")
    if change := _describe_change(record.inputs, _as_json(TRAIN.inputs(run))):
        raise UsageError(
            f"{run.model_dir} has a model trained for {step:,} steps, and {change}; restore that, "
            "or train another model: --set model_name=NAME or --run-dir DIR"
        )
    if step > steps:
        where = f"{run.model_dir} is at step {step:,}"
        raise UsageError(f"{where}, train.steps = {steps}; set train.steps={step} or more")
    if step < steps:
        return f"at step {step:,} of {steps:,}"
    return None if record.done else "interrupted"


def _describe_change(before: Values, now: Values) -> str | None:
    """Describe the first input that changed, with both values; None if none did."""
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old != new:
            return f"{key} was {old!r} and is {new!r}"
    return None


def _as_json(values: Values) -> Values:
    """Return values as they are read back from the manifest."""
    read: Values = json.loads(json.dumps(values))
    return read


def _prepare(run: Run, planned: list[Stage]) -> None:
    """Do what can fail before hours of other work."""
    if {EXAMPLES, TRAIN, EVALUATE} & set(planned):
        engine_of(run).prepare(run)
    if TRAIN in planned and run.profile.train.device == "gpu":
        choose_devices(run)


def _do(run: Run, stage: Stage) -> None:
    """Do a stage. Former outputs are renamed, because somebody may need them."""
    started, now = time.monotonic(), datetime.datetime.now(datetime.UTC)
    inputs = _as_json(stage.inputs(run))
    record = Record(inputs=inputs, started=now.isoformat(timespec="seconds"))
    for path in stage.outputs(run):
        if old := files.archive(path):
            log(f"{stage.name}: the former {path.name} is now {old.name}")
    run.manifest.stages[stage.record_name(run)] = record
    for later in (EVALUATE, CONVERT) if stage is TRAIN else ():
        run.manifest.stages.pop(later.record_name(run), None)  # they are of other weights
    run.save()
    record.results = stage.do(run)
    record.done, record.seconds = True, round(time.monotonic() - started, 1)
    run.save()
